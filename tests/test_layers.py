"""The shape of the house: who may import whom, and where the heavy libraries live."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_soup

PACKAGE = Path(mlflow_soup.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

NOUNS = ("redaction", "errors", "records")
# each may import those to its left
PURE = (
    "merge",
    "averaging",
    "space",
    "kriging",
    "landscape",
    "surrogate",
    "acquisition",
    "search",
    "gate",
    "lineage",
    "naming",
    "spec",
    "methods",
    "family",
    "report",
    "geometry",
    "tables",
    "charts",
    "batches",
)
# none may import another, but for these
EDGES = {
    "untrusted": set(),
    "checkpoint": {"untrusted"},
    "digests": {"checkpoint"},
    "compatibility": {"checkpoint", "digests"},
    "distance": {"checkpoint"},
    "durable": set(),
    "soup": {"untrusted", "checkpoint", "digests", "durable"},
    "live": {"checkpoint"},
    "calibration": {"live"},
    "sums": {"durable"},
    "passes": {"checkpoint", "live", "calibration", "sums"},
    "statistics": {
        *("checkpoint", "compatibility", "digests", "durable"),
        *("live", "calibration", "sums", "passes"),
    },
    "scores": set(),
    "journal": {"durable", "scores"},
    "store": set(),
    "tracking": {"scores", "store"},
    "ledger": {"store"},
    "lease": {"durable", "ledger", "store"},
    "registry": {"durable", "store"},
    "promotion": {"ledger", "registry", "store"},
    "task_folders": {"untrusted"},
    "suite": {"live", "task_folders"},
    "prepared": set(),
    "objective": {"compatibility", "live", "suite", "prepared"},
}
REST = (
    "provenance",
    "verification",
    "bench",
    "job",
    "trials",
    "release",
    "pipeline",
    "doctor",
    "pilots",
    "comparison",
    "study",
    "__init__",
    "cli",
    "__main__",
)

ALLOWED = {"redaction": set(), "errors": {"redaction"}, "records": set()}
ALLOWED |= {name: {*NOUNS, *PURE[:i]} for i, name in enumerate(PURE)}
ALLOWED |= {name: {*NOUNS, *PURE, *siblings} for name, siblings in EDGES.items()}
ALLOWED |= {name: {*NOUNS, *PURE, *EDGES, *REST[:i]} for i, name in enumerate(REST)}

HOMES = {
    "mlflow": {"store", "tracking", "ledger", "registry", "trials", "doctor"},
    "lm_eval": {"task_folders", "suite", "prepared", "objective"},
    "transformers": {"live", "passes"},
    "safetensors": {"checkpoint", "sums", "statistics"},
    "torch": {
        *("merge", "averaging", "checkpoint", "digests", "distance", "durable", "soup", "live"),
        *("sums", "passes", "statistics", "prepared", "objective"),
    },
    "click": {"cli"},
}


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
        package, *rest = name.split(".")
        if package == "mlflow_soup":
            yield rest[0] if rest and rest[0] in MODULES else "__init__"


def read(module):
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def test_the_walk_sees_every_way_to_import():
    source = (
        "import torch.nn as nn\n"
        "from mlflow_soup import gate, run\n"
        "def late():\n"
        "    from mlflow_soup.space import Space\n"
        "    import mlflow_soup.search\n"
    )
    assert "torch.nn" in imports(source)
    assert sorted(siblings(source)) == ["__init__", "gate", "search", "space"]


def test_every_module_has_its_place():
    assert set(ALLOWED) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert set(siblings(read(module))) <= ALLOWED[module]


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module):
    assert not [name for name in imports(read(module)) if name.startswith(".")]


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_is_imported_only_where_it_lives(library):
    users = {m for m in MODULES if library in {name.split(".")[0] for name in imports(read(m))}}
    assert users
    assert users <= HOMES[library]


@pytest.mark.parametrize("module", NOUNS)
def test_nouns_need_the_standard_library_only(module):
    roots = {name.split(".")[0] for name in imports(read(module))}
    assert roots <= {*sys.stdlib_module_names, "mlflow_soup"}


def test_the_command_line_starts_without_anything_heavy():
    program = (
        "import sys, mlflow_soup.cli\n"
        "heavy = {'mlflow', 'torch', 'transformers', 'lm_eval', 'numpy', 'scipy', 'sklearn'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
