"""Install the built wheel into a fresh environment outside the checkout and use it; run by `make wheel`.

Not a pytest file: it needs an environment that has never seen the source tree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"

CHECK = """
import importlib.util, pathlib, sys
import torch
import protoken, protoken.kernels, protoken.ops
from protoken.dispatch import backends_for

home = pathlib.Path(protoken.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in home.parents, f"imported from {home}, not from the wheel"
assert (home.parent / "py.typed").exists(), "py.typed is not in the wheel"
assert next((home.parent / "report").glob("*.jinja"), None), "the report's template is not in the wheel"
ours = importlib.util.find_spec("kernels")
assert ours is None, f"a top-level package called kernels came with the wheel: {ours}"
native = {b.name: b for b in backends_for("client_scores")}["cpp"]
assert native.available, native.reason
x, g, bank = torch.randn(3, 5), torch.randn(3, 7), torch.randn(2, 7, 5)
got = protoken.ops.client_scores(x, g, bank, backend="cpp")
want = protoken.ops.client_scores_reference(x, g, bank)
torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-4)
print("wheel: imports, data files and the native op are right")
"""


def main(dist: Path) -> None:
    wheel = next(dist.resolve().glob("protoken-*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        # torch by itself first, so that the constraint decides which build is taken.
        run(python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), "torch", cwd=folder)
        run(python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), str(wheel), cwd=folder)
        run(python, "-c", CHECK, cwd=folder)
        run(str(Path(folder) / "bin" / "protoken"), "env", cwd=folder)


def run(*command: str, cwd: str) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
