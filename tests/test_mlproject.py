import tomllib
from pathlib import Path

import yaml
from click.testing import CliRunner

from mlflow_soup.cli import main

ROOT = Path(__file__).parent.parent
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())


def test_entry_points_are_the_commands():
    commands = {"main" if name == "run" else name for name in main.commands}
    assert set(PROJECT["entry_points"]) == commands | {"quickstart"}


def test_every_parameter_is_an_option_and_is_passed_on():
    for name, entry in PROJECT["entry_points"].items():
        if name == "quickstart":
            continue
        words = entry["command"].split()
        assert words[0] == "mlflow-soup"
        options = {option.name for option in main.commands[words[1]].params}
        for parameter in entry["parameters"]:
            assert parameter in options
            # unquoted and with `=`: MLflow quotes the value, and it may begin with a dash
            assert f"--{parameter}={{{parameter}}}" in words


def test_what_is_left_out_is_not_said():
    done = CliRunner().invoke(main, ["run", "--model=", "--pair="])
    assert done.exit_code == 2
    assert "no pair was named" in done.stderr


def test_conda_pins_an_exact_python_and_the_tested_set():
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    python, _, pip = environment["dependencies"]
    assert python.count(".") == 2
    assert set(pip["pip"]) == {"--constraint constraints.txt", "mlflow", "."}


def test_the_tested_set_pins_everything_we_depend_on():
    pinned = {
        line.split("==")[0].replace("_", "-").lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("<")[0].strip()
        assert name.replace("_", "-").lower() in pinned
