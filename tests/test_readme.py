"""The README is the door: what it says is true, and the rest is behind it."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlflow_soup.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOORS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
COMMANDS = [*main.commands.values(), *main.commands["study"].commands.values()]
OPTIONS = {option for c in COMMANDS for p in c.params for option in p.opts}


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_command_is_in_its_table_and_has_help():
    table = set(re.findall(r"^\| `mlflow-soup ([a-z]+)` \|", README, re.MULTILINE))
    assert table == set(main.commands)
    for name in main.commands:
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert len(done.output.splitlines()) > 5


def test_every_option_it_names_exists():
    lines = re.findall(r"mlflow-soup [a-z]+ [^`\n]*", README.replace("\\\n", " "))
    named = {option for line in lines for option in re.findall(r"--[a-z][a-z-]+", line)}
    assert len(named) > 4
    assert named <= OPTIONS


def test_ci_runs_what_it_tells_a_newcomer_to_run():
    steps = (ROOT / ".ci" / "run").read_text()
    commands = [line.strip() for line in README.splitlines() if "python3 -m venv" in line]
    assert len(commands) == 2  # the main job and the tests
    for command in commands:
        for step in command.split(" && "):
            assert step in steps


def test_the_tested_set_is_what_it_installs():
    assert README.count("-c constraints.txt") == 2


@pytest.mark.parametrize("door", DOORS)
def test_the_files_a_door_links_to_exist(door):
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / door).read_text("utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("door", DOORS[1:])
def test_every_room_has_a_place_on_the_map(door):
    text = (ROOT / door).read_text(encoding="utf-8")
    for room in (ROOT / "mlflow_soup").glob("*/__init__.py"):
        assert re.search(rf"\b{room.parent.name}\b", text), room.parent.name


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()))
def test_a_picture_is_small_and_shown(picture):
    assert picture.stat().st_size < 200_000
    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))]
    assert any(f"images/{picture.name})" in page for page in pages)
