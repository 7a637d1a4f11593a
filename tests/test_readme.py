"""The README is the door: what it says is true."""

import re
from dataclasses import fields
from pathlib import Path

from click.testing import CliRunner

from mlflow_soup import errors
from mlflow_soup.cli import main
from mlflow_soup.registry import naming as lineage
from mlflow_soup.request.spec import METHODS, Spec
from mlflow_soup.search.belief import CHOICES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STUDIES = main.commands["study"].commands
COMMANDS = [*main.commands.values(), *STUDIES.values()]
OPTIONS = {option for c in COMMANDS for p in c.params for option in p.opts}


def test_every_command_is_documented_and_has_help():
    for name in main.commands:
        assert f"mlflow-soup {name}" in README
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert len(done.output.splitlines()) > 5


def test_every_option_it_names_exists():
    of_ours = re.findall(r"mlflow-soup [a-z]+ [^`\n]*(?:\\\n[^`\n]*)*", README)
    named = {option for line in of_ours for option in re.findall(r"--[a-z][a-z-]+", line)}
    named |= set(re.findall(r"`(--[a-z][a-z-]+)", README))
    assert len(named) > 8
    assert named <= OPTIONS


def test_every_study_is_documented_with_options_that_it_has():
    for name, command in STUDIES.items():
        (line,) = re.findall(rf"mlflow-soup study {name}( [^`]*)`", README)
        options = {option for p in command.params for option in p.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options


def test_every_method_is_in_its_table():
    for name in METHODS:
        assert f"| `{name}` |" in README


def test_every_acquisition_is_in_its_table():
    for name in CHOICES:
        assert f"| `{name}` |" in README


def test_every_tag_it_names_is_one():
    known = {v for n, v in vars(lineage).items() if n.isupper() and isinstance(v, str)}
    known |= {f"soup.{f.name}" for f in fields(Spec) if f.metadata["policy"]}
    named = set(re.findall(r"`(soup\.[a-z_]+)", README))
    assert len(named) > 8
    assert named <= known


def test_its_exit_codes_are_those_of_the_errors():
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type)}
    table = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    assert table == codes | {0}


def test_ci_runs_what_it_tells_a_newcomer_to_run():
    steps = (ROOT / ".ci" / "run").read_text()
    commands = [line.strip() for line in README.splitlines() if "python3 -m venv" in line]
    assert len(commands) == 2  # the main job and the tests
    for command in commands:
        for step in command.split(" && "):
            assert step in steps


def test_the_files_it_links_to_exist():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        assert (ROOT / target).exists()


def test_the_tested_set_is_what_it_installs():
    assert README.count("-c constraints.txt") == 2
