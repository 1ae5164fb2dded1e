"""`python -m protoken`."""

from protoken.cli import main

main()
