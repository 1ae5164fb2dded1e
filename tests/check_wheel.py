"""Install the built wheel into a fresh environment outside the checkout and use it; run by `make wheel`.

Not a pytest file: it needs an environment that has never seen the source tree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from results_cases import make

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"

CHECK = """
import importlib, importlib.util, pathlib, sys
import torch
import protoken
from protoken.dispatch import backends_for

home = pathlib.Path(protoken.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in home.parents, f"imported from {home}, not from the wheel"
shipped = pathlib.Path("shipped.txt").read_text().splitlines()
missing = [file for file in shipped if not (home.parent / file).exists()]
assert not missing, f"not in the wheel: {missing}"
for folder in (pathlib.PurePath(file).parent for file in shipped if file.endswith("__init__.py")):
    importlib.import_module(".".join(("protoken", *folder.parts)))
ours = importlib.util.find_spec("kernels")
assert ours is None, f"a top-level package called kernels came with the wheel: {ours}"
native = {b.name: b for b in backends_for("client_scores")}["cpp"]
assert native.available, native.reason
x, g, bank = torch.randn(3, 5), torch.randn(3, 7), torch.randn(2, 7, 5)
got = protoken.ops.client_scores(x, g, bank, backend="cpp")
want = protoken.ops.client_scores_reference(x, g, bank)
torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-4)
page = protoken.Trace.load("trace.json").to_html()
assert "client_0" in page and protoken.report.page.read("trace.css") in page, "the page lacks its clients or its style"
print(f"wheel: {len(shipped)} files, imports, the native op and a page are right")
"""


def main(dist: Path) -> None:
    wheel = next(dist.resolve().glob("protoken-*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        # torch by itself first, so that the constraint decides which build is taken.
        run(python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), "torch", cwd=folder)
        run(python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), str(wheel), cwd=folder)
        make().save(Path(folder) / "trace.json")
        (Path(folder) / "shipped.txt").write_text("\n".join(shipped()))
        run(python, "-c", CHECK, cwd=folder)
        run(str(Path(folder) / "bin" / "protoken"), "env", cwd=folder)


def shipped() -> list[str]:
    """Every file of the package that is no build product, as it is installed below protoken/."""
    found = []
    for folder, place in ((ROOT / "protoken", Path()), (ROOT / "kernels", Path("kernels"))):
        found += [str(place / path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if "__pycache__" not in name and not name.endswith(".so"))


def run(*command: str, cwd: str) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
