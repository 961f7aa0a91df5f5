"""Each package tells its public names: ``__all__`` is sorted, complete and true."""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "autoprune"
MODULES = ["autoprune"] + sorted(
    f"autoprune.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")
)


def source_of(module: str) -> ast.Module:
    path = PACKAGE.parent.joinpath(*module.split("."), "__init__.py")
    return ast.parse(path.read_text())


def reexports(tree: ast.Module) -> set[str]:
    """Find the public names that a package imports from its own modules."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("autoprune")
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_")
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_package_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(source_of(module))


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_and_complete(module: str) -> None:
    package = importlib.import_module(module)
    names = list(getattr(package, "__all__", []))
    assert names == sorted(set(names))
    assert reexports(source_of(module)) <= set(names)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_exists_and_is_listed(module: str) -> None:
    package = importlib.import_module(module)
    for name in getattr(package, "__all__", []):
        assert getattr(package, name, None) is not None, f"{module}.{name} is missing"
        assert name in dir(package)


def test_a_reexport_is_found() -> None:
    tree = ast.parse("from autoprune.models.task import Task, _private\nimport os")
    assert reexports(tree) == {"Task"}
