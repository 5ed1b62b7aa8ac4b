"""The floors of the house: no import runs upwards, or between rooms of one floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "tracin_transforms"
FLOORS = {"core": 0, "storage": 1, "models": 2, "beam": 2, "report": 2, "examples": 2}
# What only these rooms may know: sources read with whatever library knows their format.
FRAMEWORKS = {
    "tensorflow": {"models", "examples"},
    "keras": {"models"},
    "apache_beam": {"beam"},
    "pyarrow": {"storage", "examples"},
}
# All that core may import but itself: SciPy for its sparse products, threadpoolctl for BLAS.
CORE = {*sys.stdlib_module_names, "numpy", "scipy", "threadpoolctl"}
MODULES = sorted((ROOT / LIBRARY).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def _allowed(room: str, name: str) -> bool:
    package, _, rest = name.partition(".")
    if package == LIBRARY:
        other = rest.split(".")[0]
        return other == room or FLOORS.get(other, 9) < FLOORS[room]
    if room == "core":
        return package in CORE
    return package not in ("pipelines", "tests") and room in FRAMEWORKS.get(package, {room})


def _violations(room: str, imports: set[str]) -> list[str]:
    return [name for name in imports if not _allowed(room, name)]


def test_every_room_has_a_floor():
    rooms = {path.parent.name for path in MODULES if path.parent != ROOT / LIBRARY}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards_only(path):
    if path.parent != ROOT / LIBRARY:
        assert _violations(path.parent.name, _imports(path)) == []


@pytest.mark.parametrize(
    ("room", "name"),
    [
        ("core", "tracin_transforms.storage.files"),
        ("core", "pyarrow"),
        ("core", "jinja2"),
        ("storage", "tracin_transforms.beam.extract"),
        ("beam", "tracin_transforms.models.extractor"),
        ("beam", "tensorflow"),
        ("examples", "pipelines.cli"),
        ("models", "apache_beam"),
    ],
)
def test_the_rule_can_fail(room, name):
    assert _violations(room, {name}) == [name]


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_library_imports_neither_tensorflow_nor_beam():
    heavy = {"tensorflow", "keras", "apache_beam", "pyarrow"}
    assert not heavy & _loaded_after("import tracin_transforms")


@pytest.mark.parametrize("arguments", [["--help"], ["influence", "--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = {"tensorflow", "keras", "apache_beam", "pyarrow", "sklearn", "jinja2", "PIL"}
    statement = f"from pipelines.cli import main; sys.stdout = sys.stderr; main({arguments}); "
    assert not heavy & _loaded_after(statement + "sys.stdout = sys.__stdout__")


def test_everything_public_can_be_imported():
    import tracin_transforms

    for name in tracin_transforms.__all__:
        assert getattr(tracin_transforms, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tracin_transforms.nothing
