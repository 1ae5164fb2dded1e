"""`python -m protoken`."""

from .cli import main

main()
