"""A module imports only from packages below its own, and the light packages import no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "omgoptim"

STOREYS = (
    ("errors", "bootstrap", "hardware", "text"),
    ("reports",),
    ("requests",),
    ("executors",),
    ("blocks",),
    ("runtimes",),
    ("models",),
    ("measure",),
    ("training",),
    ("techniques",),
    ("architecture_search",),
    ("operations",),
    ("render",),
    ("jobs",),
    ("cli", "server", "api"),
)
"""From the ground up. Rooms of one storey may import each other; the lowest and the top storey have more than one.

`render` is below `jobs`, because a run's worker writes the page of its report.
"""

HEIGHT = {room: height for height, storey in enumerate(STOREYS) for room in storey}
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350
PARAMS = {"Auto", "InvertedResidual"}
"""Names of two types: the arguments of a technique have its name, in `requests/`."""
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "factory"}


def room_of(module: Path) -> str:
    """First part of a module's path in the package; the package's own `__init__` is the doorstep, `""`."""
    first = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def rooms_imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Rooms of omgoptim that a source imports anywhere in it, functions included, with the line.

    Args:
        source: the text of a module.
        package: the package that holds the module, for relative imports: ("omgoptim", "jobs").
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "omgoptim" else [base]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "omgoptim" and len(parts) > 1 and not parts[1].startswith("__"):
                yield parts[1], node.lineno


def offences(source: str, room: str, package: tuple[str, ...]) -> list[str]:
    """Return the imports of a module of `room` from its own height or above."""
    return [
        f"line {line}: {room} imports {other}"
        for other, line in rooms_imported(source, package)
        if other != room and (other not in HEIGHT or HEIGHT[other] > HEIGHT[room])
    ]


def package_of(module: Path) -> tuple[str, ...]:
    return ("omgoptim", *module.relative_to(PACKAGE).parent.parts)


def module_id(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def test_every_module_stands_in_a_known_room() -> None:
    assert {room_of(module) for module in MODULES} <= {*HEIGHT, ""}


def test_a_module_imports_only_from_rooms_below_its_own() -> None:
    found = {
        module_id(module): offences(module.read_text(), room_of(module), package_of(module))
        for module in MODULES
        if room_of(module) in HEIGHT
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_doorstep_imports_only_errors_until_something_is_asked_of_it() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    rooms = {room for node in at_import for room, _ in rooms_imported(ast.unparse(node), ("omgoptim",))}
    assert rooms == {"errors"}


@pytest.mark.parametrize(
    "source",
    [
        "import omgoptim.jobs.submit",
        "from omgoptim import jobs",
        "from omgoptim.jobs import submit",
        "def late():\n    from omgoptim.jobs.submit import start",
        "from ..jobs import submit",
        "from .. import jobs",
        "from omgoptim import no_such_room",
    ],
)
def test_the_rule_sees_an_import_from_above_however_it_is_written(source: str) -> None:
    assert len(offences(source, "measure", ("omgoptim", "measure"))) == 1


@pytest.mark.parametrize(
    "source", ["from omgoptim.errors import OmgoptimError", "from . import size", "from omgoptim import __version__"]
)
def test_the_rule_lets_an_import_from_below_pass(source: str) -> None:
    assert offences(source, "measure", ("omgoptim", "measure")) == []


def test_a_module_is_short_and_its_name_and_docstring_say_what_it_holds() -> None:
    lengths = {module_id(module): len(module.read_text().splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    assert [module_id(module) for module in MODULES if module.stem in NO_NAMES] == []
    sources = {module_id(module): module.read_text() for module in MODULES}
    assert [name for name, text in sources.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []


def test_no_two_public_types_have_one_name() -> None:
    trees = [ast.parse(module.read_text()) for module in MODULES]
    types = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {name for name in types if types.count(name) > 1 and not name.startswith("_")} == PARAMS


def test_the_picture_in_contributing_shows_the_rooms_in_this_order() -> None:
    picture = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    drawn: list[str] = re.findall(r"^  │ (\w.*?)  ", picture, re.MULTILINE)
    assert [tuple(word.split(" · ")) for word in reversed(drawn)] == list(STOREYS)


def loaded_by(statement: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh Python that ran a statement."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import omgoptim.jobs.submit, omgoptim.server", "import omgoptim.render"])
def test_the_server_and_the_submit_side_load_nothing_heavy(statement: str) -> None:
    heavy = {
        "torch",
        "jinja2",
        "ray",
        "numpy",
        "rich",
        "typer",
        "onnx",
        "onnxruntime",
        "openvino",
        "safetensors",
        "thop",
    }
    assert loaded_by(statement) & heavy == set()


def test_importing_the_package_loads_neither_torch_nor_pydantic() -> None:
    assert loaded_by("import omgoptim") & {"torch", "numpy", "pydantic", "mcp"} == set()
