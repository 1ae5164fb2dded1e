"""The tree as CONTRIBUTING.md and the packages describe it: every module on a map, every import in its direction."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "protoken"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Packages whose own docstring is their map.
MAPPED = (
    "banks",
    "benchmarks",
    "cli",
    "evaluation",
    "integrations",
    "ledger",
    "methods",
    "models",
    "ops",
    "planning",
    "records",
    "report",
    "results",
    "streaming",
    "ways",
)
# What these may import of the package outside themselves. The ledger and the ops stand on their own, and a trace is
# numbers and text, whatever made it.
BELOW = {
    "ledger": {"arguments", "errors", "paths"},
    "ops": {"dispatch", "errors", "versions"},
    "kernels": {"ops"},
    "results": {"arguments", "errors", "paths"},
    "report": {"arguments", "errors", "paths", "results"},
    "integrations": {"arguments", "errors", "ledger", "paths"},
    "models": {"arguments", "errors", "ledger"},
    "banks": {"arguments", "errors", "ledger", "models", "ops"},
    "ways": {"banks", "errors", "models", "results"},
    "methods": {"errors", "ledger", "models", "ops", "ways"},
}
# Who may train federations, which is no part of tracing.
TRAINING = {"evaluation", "benchmarks", "demo", "demo_report", "cli"}


def sources() -> dict[str, Path]:
    """Every module by its dotted name; kernels/ is installed as protoken.kernels."""
    found = {}
    for folder, prefix in ((PACKAGE, "protoken"), (ROOT / "kernels", "protoken.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


SOURCES = sources()


def imports(module: str, *, at_import: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name) of every import; `at_import`: only of those that run when the module is imported."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (at_import and (later or typing)):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield (inside, "") if inside in SOURCES else (base, alias.name)


def room(module: str) -> str:
    """The package or module right below protoken."""
    return module.split(".")[1]


def test_every_module_is_on_the_map_of_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mapped = text.partition("## Where things live")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(?:protoken/)?(\w+(?:\.py|/))", mapped))
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert modules | folders <= named, f"not on the map: {sorted((modules | folders) - named)}"


@pytest.mark.parametrize("package", MAPPED)
def test_every_module_of_a_package_is_on_its_own_map(package: str) -> None:
    init = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
    mapped = set(re.findall(r"\w+\.py", ast.get_docstring(init) or ""))
    assert mapped == {path.name for path in (PACKAGE / package).glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+\.(?:py|pyi|cpp|cu|cuh|h|md|cmake))`", text))
    linked = {link.partition("#")[0] for link in links(text)} - {""}
    places = (ROOT, PACKAGE, ROOT / "csrc")
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()
    assert {link for link in linked if not (document.parent / link).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_heading_that_a_document_links_to_is_there(document: Path) -> None:
    lost = set()
    for link in links(document.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        if heading and heading not in headings(document.parent / file if file else document):
            lost.add(link)
    assert lost == set()


def headings(document: Path) -> set[str]:
    """A document's headings as GitHub links to them: in lower case, without punctuation, joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", text)}


def links(text: str) -> set[str]:
    """Where a Markdown text links to within the repository."""
    return {link for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) if "." in link or link.startswith("#")}


def test_no_module_takes_a_private_name_of_another() -> None:
    private = {
        (module, base, name)
        for module in SOURCES
        for base, name in imports(module)
        if base.startswith("protoken.") and name.startswith("_")
    }
    assert private == set()


def test_importing_a_module_never_comes_back_to_it() -> None:
    graph = {
        module: {base for base, _ in imports(module, at_import=True) if base in SOURCES and base != "protoken"}
        for module in SOURCES
    }
    # A package imports its modules; that these were imported through it is no circle of theirs.
    inner = {module: {base for base in bases if not module.startswith(f"{base}.")} for module, bases in graph.items()}
    assert list(TopologicalSorter(inner).static_order())  # CycleError names the circle


def test_rooms_do_not_lean_on_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module in set(SOURCES) - {"protoken"}:
        below = {base for base, _ in imports(module, at_import=True) if base in SOURCES and base != "protoken"}
        graph.setdefault(room(module), set()).update({room(base) for base in below} - {room(module)})
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("upper", BELOW)
def test_imports_point_downwards(upper: str) -> None:
    taken = {
        (module, base)
        for module in SOURCES
        if module != "protoken" and room(module) == upper
        for base, _ in imports(module, at_import=True)
        if base in SOURCES and base != "protoken" and room(base) not in BELOW[upper] | {upper}
    }
    assert taken == set()


def test_tracing_needs_no_training() -> None:
    taken = {
        (module, base)
        for module in SOURCES
        if module not in ("protoken", "protoken.__main__") and room(module) not in TRAINING
        for base, _ in imports(module)
        if base.startswith("protoken.evaluation")
    }
    assert taken == set()


@pytest.mark.parametrize(
    "module", ["results.result", "report.html", "account", "confidence", "verdict", "records.scores"]
)
def test_a_saved_trace_is_read_and_judged_without_torch(module: str) -> None:
    """By all that the module imports in its turn; what its calls import later is their own affair."""
    seen, coming = set(), [f"protoken.{module}"]
    while coming:
        now = coming.pop()
        seen.add(now)
        coming += [base for base, _ in imports(now, at_import=True) if base in SOURCES and base not in seen]
    taken = {(now, base) for now in seen for base, _ in imports(now, at_import=True)}
    assert {pair for pair in taken if pair[1].partition(".")[0] in ("torch", "transformers")} == set()
