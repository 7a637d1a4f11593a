import pytest
import yaml

import toy
from conftest import MODEL
from mlflow_soup import Spec
from mlflow_soup.errors import SpecError
from mlflow_soup.request.margins import parse_margins
from mlflow_soup.workflows.proof import settle_rules

STATED = "toy_digits:acc toy_spelling:exact_match,strict"


@pytest.mark.parametrize(
    "ours",
    [
        STATED,
        STATED.replace(" ", ","),
        f"{STATED},toy_letters",  # a task, though it follows a metric
        f"toy_letters:acc,{STATED}",
        "toy_spelling:exact_match,strict,toy_digits:acc",
    ],
)
def test_a_command_line_may_name_more_tasks_than_the_policy(client, ours):
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", STATED)
    spec = Spec(model=MODEL, pair="v1,v2", ood_tasks=ours)
    settled = settle_rules(client, spec, MODEL)
    assert settled.ood_tasks == ours
    # a task that nobody's policy names cannot make up for a loss on the others
    margins = parse_margins(settled.margin)
    terms = ("toy_digits:acc", "toy_spelling:exact_match,strict", "toy_letters:acc")
    first, second, more = (margins.group(term) for term in terms)
    assert first == second
    assert (more != first) == ("toy_letters" in ours)
    assert {margins.at(term) for term in terms} == {margins.at("toy_digits:acc")}


@pytest.mark.parametrize(
    "ours",
    [
        "toy_digits:acc",
        # the filter of one task is not that of another
        "toy_spelling:exact_match toy_digits:acc,strict",
        "toy_digits:acc,strict,toy_spelling:exact_match",
    ],
)
def test_a_command_line_may_not_name_other_tasks_than_the_policy(client, ours):
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", STATED)
    spec = Spec(model=MODEL, pair="v1,v2", ood_tasks=ours)
    with pytest.raises(SpecError, match="is looser than the policy of toy-llm") as refusal:
        settle_rules(client, spec, MODEL)
    assert ours in refusal.value.what
    assert STATED in refusal.value.what


def alone(tasks, folder, name):
    """A folder with the items of the toy tasks, and one task of this name."""
    toy.copy_tasks(tasks, folder)
    for path in folder.glob("*.yaml"):
        path.unlink()
    config = yaml.safe_load((tasks / "digits.yaml").read_text()) | {"task": name}
    (folder / "easy.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_pattern_of_the_policy_stands_for_the_tasks_of_its_own_folders(client, tasks, tmp_path):
    more = alone(tasks, tmp_path / "more", "toy_digits_easy")
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_digits*")
    plain = settle_rules(client, Spec(model=MODEL, pair="v1,v2"), MODEL)
    assert "alone" not in plain.margin
    spec = Spec(model=MODEL, pair="v1,v2", include_path=str(more))
    margins = parse_margins(settle_rules(client, spec, MODEL).margin)
    assert margins.group("toy_digits_easy:acc") == "toy_digits_easy:acc"
    assert margins.group("toy_digits:acc") == ""


def test_a_task_whose_name_cannot_stand_in_a_margin_is_refused(client, tasks, tmp_path):
    more = alone(tasks, tmp_path / "more", "toy=9")
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_digits")
    spec = Spec(model=MODEL, pair="v1,v2", ood_tasks="toy_digits,toy=9", include_path=str(more))
    with pytest.raises(SpecError, match="the name of the task 'toy=9' holds a character"):
        settle_rules(client, spec, MODEL)
