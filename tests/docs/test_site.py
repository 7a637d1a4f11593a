"""The site builds, and its tables say what the code says."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mlflow_soup import errors
from mlflow_soup.cli import main
from mlflow_soup.registry import naming
from mlflow_soup.request import knobs
from mlflow_soup.request.spec import METHODS, STUDIES, Spec
from mlflow_soup.search.belief import CHOICES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def words(site: Path, page: str) -> str:
    """A page without its tags."""
    html = (site / page / "index.html").read_text(encoding="utf-8")
    return re.sub(r"<[^>]+>", "", html)


def test_every_request_for_a_table_was_answered(site):
    for page in site.rglob("*.html"):
        assert "generate:" not in page.read_text(encoding="utf-8"), page


def test_every_command_and_option_is_in_the_reference(site):
    page = words(site, "reference/cli")
    studies = main.commands["study"].commands
    for name, command in {**main.commands, **studies}.items():
        assert f"mlflow-soup {'study ' if name in studies else ''}{name}" in page
        for param in command.params:
            if param.param_type_name == "option":
                assert param.opts[0] in page


def test_every_knob_is_in_the_reference_with_its_tag(site):
    page = words(site, "reference/knobs")
    for knob in fields(Spec):
        assert knobs.option(knob) in page
        assert (f"soup.{knob.name}" in page) == knob.metadata["policy"] or knob.name == "method"


def test_every_name_in_mlflow_is_in_the_reference(site):
    page = words(site, "reference/names")
    names = [v for n, v in vars(naming).items() if n.isupper() and isinstance(v, str)]
    assert len(names) > 30
    for name in names:
        assert name in page


def test_every_exit_code_and_exception_is_in_the_reference(site):
    page = words(site, "reference/exit-codes")
    text = (DOCS / "reference" / "exit-codes.md").read_text(encoding="utf-8")
    types = [error for error in vars(errors).values() if isinstance(error, type)]
    found = [error for error in types if issubclass(error, errors.SoupError)]
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", text, re.MULTILINE)}
    assert listed == {error.exit_code for error in found} | {0}
    for error in found:
        assert error.__name__ in page


def test_every_method_acquisition_and_study_is_in_the_reference(site):
    page = words(site, "reference/methods")
    text = (DOCS / "reference" / "methods.md").read_text(encoding="utf-8")
    for name in CHOICES:
        assert f"| `{name}` |" in text
    for name in (*METHODS, *(f"mlflow-soup study {study}" for study in STUDIES)):
        assert name in page


def test_what_the_pages_name_exists():
    options = {"--help", "--format"} | {knobs.option(knob) for knob in fields(Spec)}
    commands = [*main.commands.values(), *main.commands["study"].commands.values()]
    options |= {option for c in commands for p in c.params for option in p.opts}
    tags = {v for n, v in vars(naming).items() if n.isupper() and isinstance(v, str)}
    tags |= {f"soup.{knob.name}" for knob in fields(Spec) if knob.metadata["policy"]}
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"`(soup\.[a-z_]+)`", text)) <= tags, page
        lines = re.findall(r"mlflow-soup [a-z]+ [^`\n]*", text.replace("\\\n", " "))
        named = {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)}
        assert named <= options, page
