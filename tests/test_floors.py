"""Imports point down, dependencies stay in their rooms, files stay short.

Everything here reads the source with ``ast``; nothing is imported.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autoprune"
PLUGINS = ROOT / "plugins"

FLOORS = {
    "errors": 0,
    "policy": 0,
    "sites": 0,
    "limits": 0,
    "options": 0,
    "config": 0,
    "search_config": 0,
    "hookspecs": 0,
    "plugins": 0,
    "models": 1,
    "compression": 2,
    "latency": 2,
    "exporting": 3,
    "evaluation": 5,
    "training": 4,
    "targets": 5,
    "searching": 6,
    "reporting": 7,
    "conclusion": 8,
    "preflight": 8,
    "parts": 9,
    "retraining": 9,
    "planning": 9,
    "deliver": 9,
    "run": 10,
    "adapting": 9,
    "advising": 10,
    "solving": 10,
    "policy_files": 9,
    "transfer": 10,
    "serving": 11,
    "proving": 12,
    "commands": 11,
    "export_commands": 13,
    "latency_commands": 13,
    "planning_commands": 13,
    "plugin_commands": 13,
    "cli": 14,
    "__main__": 15,
    "testing": 15,  # for plugin authors: it may use every room, and none uses it
    "__init__": 15,  # the public names; looked up from inside, it would hide a climb
}
"""Floor of every room. Rooms of one floor do not import each other, but floor 0."""

HOMES = {
    "accelerate": {"models"},
    "cmaes": {"searching"},
    "compressed_tensors": {"targets", "models"},
    "filelock": {"models", "compression", "searching", "training", "run"},
    "gguf": {"targets", "models"},
    "matplotlib": {"reporting"},
    "onnx_ir": {"targets"},
    "onnxruntime": {"targets"},
    "optuna": {"searching"},
    "pandas": {"searching", "reporting", "run", "cli"},
    "peft": {"training"},
    "platformdirs": {"models"},
    "plotly": {"reporting"},
    "pluggy": {"plugins", "hookspecs"},
    "psycopg": {"searching"},
    "pyarrow": {"latency", "reporting", "searching"},
    "pydantic": {"config", "limits", "search_config"},
    "ray": {"searching"},
    "rich": {"cli", "commands", "reporting"},
    "scipy": {"searching"},
    "sqlalchemy": {"searching"},
    "transformers": {
        "models",
        "exporting",
        "targets",
        "latency",
        "testing",
        "training",
    },
    "typer": {
        "cli",
        "export_commands",
        "latency_commands",
        "options",
        "planning_commands",
        "plugin_commands",
    },
}
"""Rooms in which a dependency may be imported; one that is not named may everywhere."""

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}
MAX_LINES = 300


def room_of(path: Path) -> str:
    """Name the room of a file: the part of its path below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Find imported modules with their lines, but for those of type checkers only.

    ``from a import b`` gives ``a.b``, because ``b`` may be a module; an import inside
    of a function counts like any other.
    """
    found: list[ast.AST] = [ast.parse(source)]
    while found:
        node = found.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{n.name}") for n in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += node.orelse
        else:
            found += ast.iter_child_nodes(node)


def faults(room: str, source: str) -> list[str]:
    """Tell every import of a file that climbs a floor or strays from its rooms."""
    told = []
    for line, module in sorted(imports(source)):
        top, _, rest = module.partition(".")
        if top == "autoprune":
            # `import autoprune` and `from autoprune import hookimpl` give public names.
            target = rest.partition(".")[0]
            target = target if target in FLOORS else "__init__"
            if target != room and not _may_import(room, target):
                told.append(f"line {line}: {room} imports {module}, which is not below")
        elif top == "autoprune_plugins":
            told.append(f"line {line}: {room} imports {module}: no room knows a plugin")
        elif room not in HOMES.get(top, {room}):
            told.append(f"line {line}: {room} imports {module}, at home elsewhere")
    return told


def _may_import(room: str, target: str) -> bool:
    below = FLOORS[target] < FLOORS[room]
    return below or FLOORS[target] == FLOORS[room] == 0 or room == "__init__"


def private_names(source: str) -> list[str]:
    """Tell the private names of AutoPrune that a file imports."""
    return [
        f"line {line}: {module}"
        for line, module in sorted(imports(source))
        if module.startswith("autoprune.")
        and any(part.startswith("_") for part in module.split("."))
    ]


def files(folder: Path) -> list[Path]:
    """List the source files below a folder."""
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source in {folder}"
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(PACKAGE), ids=name_of)
def test_imports_point_down_and_dependencies_stay_at_home(path: Path) -> None:
    assert faults(room_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", files(PACKAGE), ids=name_of)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", files(PLUGINS), ids=name_of)
def test_plugins_import_public_names_only(path: Path) -> None:
    assert private_names(path.read_text()) == []


def test_every_room_has_a_floor_and_a_name_of_its_own() -> None:
    rooms = {room_of(path) for path in files(PACKAGE)}
    assert rooms <= FLOORS.keys()
    stems = {path.stem for path in [*files(PACKAGE), *files(PLUGINS)]} | rooms
    assert not stems & FORBIDDEN_NAMES


def test_no_room_stands_inside_a_room() -> None:
    deep = [p for p in files(PACKAGE) if len(p.relative_to(PACKAGE).parts) > 2]
    assert deep == []


def test_every_room_and_every_plugin_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"])
    rooms = {f"autoprune.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {"autoprune", "autoprune_plugins", "autoprune_spaces"} | rooms
    points = project["project"]["entry-points"]["autoprune"]
    modules = {p.stem for p in PLUGINS.glob("*.py") if not p.stem.startswith("_")}
    assert points == {name: f"autoprune_plugins.{name}" for name in modules}


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        (
            "models",
            "import autoprune.searching.space",
            "models imports autoprune.searching",
        ),
        ("models", "from autoprune import cli", "models imports autoprune.cli"),
        ("models", "def f():\n    import autoprune.run", "line 2: models imports"),
        ("run", "import autoprune", "run imports autoprune, which is not below"),
        (
            "searching",
            "from autoprune import testing",
            "searching imports autoprune.testing",
        ),
        ("policy", "from autoprune.models.layers import x", "autoprune.models.layers"),
        ("evaluation", "import optuna", "evaluation imports optuna, at home elsewhere"),
        ("searching", "from transformers import T", "searching imports transformers.T"),
        ("run", "import autoprune_plugins.rtn", "no room knows a plugin"),
        (
            "models",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import autoprune.cli",
            "line 4: models imports autoprune.cli",
        ),
    ],
)
def test_the_checker_catches(room: str, source: str, fault: str) -> None:
    told = faults(room, source)
    assert len(told) == 1
    assert fault in told[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("searching", "import autoprune.models.layers"),
        ("searching", "from autoprune.searching.space import SearchSpace"),
        ("plugins", "from autoprune import hookspecs"),
        ("searching", "import optuna.samplers"),
        ("models", "if TYPE_CHECKING:\n    from autoprune.searching.space import S"),
    ],
)
def test_the_checker_lets_pass(room: str, source: str) -> None:
    assert faults(room, source) == []


def test_the_checker_catches_private_names() -> None:
    source = "import torch._C\nfrom autoprune.compression.store import _path, Store"
    assert private_names(source) == ["line 2: autoprune.compression.store._path"]


def test_the_checker_refuses_relative_imports() -> None:
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        list(imports("from .store import Store"))
