"""What the policy may say is done when a checkpoint arrives."""

import os
from dataclasses import fields

import pytest

from mlflow_soup.cli import main, read_orders
from mlflow_soup.errors import SpecError
from mlflow_soup.request import orders
from mlflow_soup.request.spec import Spec
from mlflow_soup.workflows.watch import ACTIONS

MODEL = "my-llm"


def test_a_tag_holds_lines_of_commands():
    text = (
        "run --last 6 ;\n run --pair @best,new --promote=champion; run --last=2 --ood_tasks 'a;b'"
    )
    first, second, third = read_orders(text, MODEL)
    assert (first.line, first.command, first.last) == ("run --last 6", "run", 6)
    assert second.named == {"pair": "@best,new", "promote": "champion"}
    assert third.named == {"last": 2, "ood_tasks": "a;b"}


def test_a_line_is_a_request_for_the_version_that_arrived():
    first, second, third = read_orders(
        "run --last 3 --trials 9; run --pair @best,new; run --versions v1,@best,new", MODEL
    )
    spec = first.spec({"model": MODEL, "seed": 7}, 12, [8, 11, 12])
    assert (spec.versions, spec.last, spec.trials, spec.seed) == ("v8,v11,v12", None, 9, 7)
    assert spec.named == {"model", "versions", "trials", "seed"}
    assert second.spec({"model": MODEL}, 12).pair == "@best,v12"
    assert third.spec({"model": MODEL}, 12).versions == "v1,@best,v12"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is missing or empty"),
        (" ;\n; ", "it is missing or empty"),
        ("; ".join(["run --last 2"] * 9), "it holds 9 command lines"),
        ("run --last 2 'x", "a quote is not closed"),
        ("sh -c true", "'sh' is not a command that it may name"),
        ("promote --version v1", "'promote' is not a command that it may name"),
        ("watch --once", "'watch' is not a command that it may name"),
        ("run", "names no versions"),
        ("run --pair v1,v2", "does not merge the version that arrives"),
        ("run --pair @best,newer", "does not merge the version that arrives"),
        ("run --last 2 --pair @best,new", "2 options say which versions"),
        ("run --pair a,b,new", "'a' is not a version"),
        ("run --lst 2", "No such option"),
        ("run --last two", "'two' is not a valid integer"),
        ("run --last 1", "--last 1 is out of range"),
        ("run --last 2 --alpha 2", "--alpha 2.0 is out of range"),
        ("run --last 2 --method any", "is not one of 'bayesopt'"),
        ("run --last 2 --tasks /etc/passwd.yaml", "names a file of tasks"),
        ("run --last 2 --ood-tasks 'arc_easy,own.yaml:acc'", "names a file of tasks"),
        ("run --last 2 --test-tasks ../*", "names a file of tasks"),
        ("run --last 2 more", "unexpected extra argument"),
        ("run --last 2 --help", "No such option"),
        ("run --last 2 --promote stage:Live", "'Live' is not a stage"),
        ("run --last 2 --promote model:prod@champion", "promotes into another registered model"),
    ],
)
def test_a_tag_that_cannot_be_followed_is_named_in_the_error(text, said):
    with pytest.raises(SpecError, match=r"tag soup\.on_version cannot be followed: ") as caught:
        read_orders(text, MODEL)
    assert said in caught.value.what


@pytest.mark.parametrize(
    "words",
    [
        "--spec /etc/passwd",
        "--output /etc/passwd",
        "--format json",
        "--model other",
        "--include-path /",
        "--include_path=/",
        "--calibration /etc/passwd",
        "--public-key /etc/passwd",
        "--allow-task-code " + "0" * 64,
        "--evidence own",
        "--experiment other",
        "--device cuda",
        "--store-patience 0",
        "--limit 3",
        "--seed 3",
    ],
)
def test_what_is_the_watchers_alone_no_tag_can_set(words):
    with pytest.raises(SpecError, match="no tag can set") as caught:
        read_orders(f"run --last 2 {words}", MODEL)
    assert words.partition("=")[0].split()[0].replace("_", "-") in caught.value.what


def test_a_tag_can_set_what_a_policy_tag_can_and_no_path():
    for knob in fields(Spec):
        if orders.may_stand(knob) and knob.name not in ("pair", "versions", "last", "pairs"):
            assert knob.metadata["policy"] or knob.name == "promote"
            assert os.PathLike not in knob.metadata["parts"]


def test_each_knob_of_a_command_belongs_to_the_tag_or_to_the_watch():
    for knob in fields(Spec):
        of = knob.metadata["commands"]
        if of & orders.COMMANDS.keys():
            assert orders.may_stand(knob) != ("watch" in of), knob.name


def test_each_command_that_a_tag_can_name_is_done():
    assert ACTIONS.keys() == orders.COMMANDS.keys() & main.commands.keys()
