"""The shape of the house: who may import whom, and where the heavy libraries live."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlflow_soup

PACKAGE = Path(mlflow_soup.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = sorted(name for name in FILES if not name.endswith("__init__"))

# each room, and the rooms that it may import from; all may import the nouns
NOUNS = {"redaction", "errors", "records"}
ROOMS: dict[str, set[str]] = {
    "request": set(),
    "files": set(),
    "weights": {"files"},
    "decision": {"request"},
    "search": {"request", "decision"},
    "registry": {"request", "files"},
    "evaluation": {"request", "files", "weights"},
    "statistics": {"request", "files", "weights", "evaluation"},
    "workers": {"request", "files", "registry", "weights", "evaluation"},
    "reporting": {"decision", "search"},
}
ROOMS["workflows"] = set(ROOMS)
ROOMS["quickstart"] = set()
# may import everything; nothing imports it
FACE = {"cli", "output", "plugin", "__main__", "__init__"}

# the only rooms, or modules, that import a heavy library
HOMES = {
    "mlflow": {
        "registry",
        "quickstart",
        "plugin",
        "workflows.trials",
        "workflows.publication",
        "workflows.track",
        "workflows.doctor",
    },
    "lm_eval": {"evaluation"},
    "transformers": {
        *("quickstart", "evaluation.live", "evaluation.loading", "statistics.passes"),
        "weights.find",  # only for checkpoints that name code
    },
    "safetensors": {"weights", "statistics"},
    "torch": {"files.writer", "weights", "evaluation", "statistics", "workers", "quickstart"},
    "huggingface_hub": {"reporting.card"},
    "model_signing": {"weights.signature"},
    "bokeh": {"reporting.interactive"},
    "click": {"cli", "output"},
    "cloup": {"cli", "output"},
    "detect_secrets": {"redaction"},
}


def room_of(module):
    return module.partition(".")[0]


def imports(source):
    """Full names of all a source imports, in functions too: `a.b` for `from a import b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def siblings(source):
    """Modules of the package that a source imports; names of the package itself are __init__'s."""
    for name in imports(source):
        package, _, rest = name.partition(".")
        if package != "mlflow_soup":
            continue
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        yield rest or "__init__"


def read(module):
    return FILES[module].read_text(encoding="utf-8")


def test_the_walk_sees_every_way_to_import():
    source = (
        "import torch.nn as nn\n"
        "from mlflow_soup import errors, run\n"
        "from mlflow_soup.decision import gate\n"
        "def late():\n"
        "    from mlflow_soup.search.space import Space\n"
        "    import mlflow_soup.search.ask\n"
    )
    assert "torch.nn" in imports(source)
    found = ["__init__", "decision.gate", "errors", "search.ask", "search.space"]
    assert sorted(siblings(source)) == found


def test_every_module_has_its_room():
    assert {room_of(module) for module in MODULES} == {*NOUNS, *ROOMS, *FACE} - {"__init__"}
    assert not any(allowed - set(ROOMS) for allowed in ROOMS.values())


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_room_imports_only_from_the_rooms_below(module):
    room = room_of(module)
    used = {room_of(name) for name in siblings(read(module))}
    if room in FACE:
        return
    if room in NOUNS:
        order = ("redaction", "errors", "records")
        assert used <= set(order[: order.index(room)])
    else:
        assert used <= {room, *NOUNS, *ROOMS[room]}


def test_rooms_and_modules_import_in_no_circle():
    TopologicalSorter(ROOMS).prepare()  # raises a CycleError
    TopologicalSorter({module: set(siblings(read(module))) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [name for name in FILES if name.endswith(".__init__")])
def test_the_door_of_a_room_says_what_is_in_it_and_nothing_else(module):
    (statement,) = ast.parse(read(module)).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_are_absolute(module):
    assert not [name for name in imports(read(module)) if name.startswith(".")]


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_is_imported_only_where_it_lives(library):
    users = {m for m in MODULES if library in {name.split(".")[0] for name in imports(read(m))}}
    assert users
    assert not {m for m in users if not {m, room_of(m)} & HOMES[library]}


@pytest.mark.parametrize("module", sorted(NOUNS))
def test_nouns_need_little_but_the_standard_library(module):
    roots = {name.split(".")[0] for name in imports(read(module))}
    assert roots <= {*sys.stdlib_module_names, "mlflow_soup", "detect_secrets"}


def test_private_names_stay_in_their_module():
    for module in MODULES:
        for name in imports(read(module)):
            assert not (name.startswith("mlflow_soup.") and "._" in name), (module, name)


def test_the_command_line_starts_without_anything_heavy():
    program = (
        "import sys, mlflow_soup.cli\n"
        "heavy = {'mlflow', 'torch', 'transformers', 'lm_eval', 'numpy', 'scipy', 'sklearn',\n"
        "         'model_signing'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
