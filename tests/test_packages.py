"""The order of the package's folders: imports point one way, and no module is long."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_turbokv
from mlx_turbokv.cli import COMMANDS

ROOT = Path(mlx_turbokv.__file__).parent
# a folder imports from itself and from the folders before it
ORDER = [
    "quant",
    "policy",
    "model",
    "centring",
    "kernels",
    "attention",
    "cache",
    "loading",
    "evaluate",
    "doctor",
    "report",
    "serve",
    "cli",
    "__main__",
]
# run by python -m, and imported by nothing
SCRIPTS = {"__main__"} | {name for name in COMMANDS if not (ROOT / name).is_dir()}
# below all folders; the package itself only preloads OpenBLAS
BASE = {"checked", "errors", "files", "log", "safetensors", ""}
MOST_LINES = 300
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip("."): p
    for p in sorted(ROOT.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The package's modules that a module imports, at the top or within a function."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [x for x in package[: len(package) - node.level + 1] if x]
        module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
        for alias in node.names:
            inner = f"{module}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else module)
    return found


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ORDER) - {"__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_point_one_way(name: str) -> None:
    folder = "__main__" if name in SCRIPTS or name.endswith(".__main__") else name.split(".")[0]
    for imported in imports(name):
        target = imported.split(".")[0]
        if target in BASE or target == folder:
            continue
        assert folder in ORDER, f"{name} imports {imported}"
        assert ORDER.index(target) < ORDER.index(folder), f"{name} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: imports(name) - {name, ""} for name in MODULES if name}
    TopologicalSorter(graph).prepare()


def test_the_imports_are_seen() -> None:
    assert {"quant.layout", "kernels.packed"} <= imports("cache.rows")
    assert "evaluate.tables" in MODULES and len(MODULES) > 80


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
