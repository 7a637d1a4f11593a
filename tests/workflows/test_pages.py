"""What MLflow's pages of a finished run hold, as its API tells them."""

import json
import urllib.parse

import pytest

from conftest import MODEL
from mlflow_soup import Spec
from mlflow_soup.registry.descriptions import LIMIT, describe_model
from mlflow_soup.registry.store import Store
from mlflow_soup.workflows import release
from mlflow_soup.workflows.portrait import portray

ANSWERS = ["Chosen: λ = ", "Gate: passed (margin 0.05", "Promoted: alias champion → toy-llm v4, 2"]


def first_lines(text):
    return text.split("\n\n")[0].split("  \n")


def note(client, run_id):
    return client.get_run(run_id).data.tags["mlflow.note.content"]


def test_run_and_version_begin_with_the_answers(client, outcome):
    description = client.get_model_version(MODEL, "4").description
    for text in (description, note(client, outcome.run_id)):
        lines = first_lines(text)
        assert [said in line for said, line in zip(ANSWERS, lines, strict=True)] == [True] * 3
        assert " over v" in lines[0]


def test_the_gates_run_is_described(client, outcome):
    text = note(client, outcome.examination.run_id)
    assert text.startswith("Gate: passed (margin 0.05")
    assert "| check | against |" in text


def test_a_version_has_few_tags(client, outcome):
    tags = client.get_model_version(MODEL, "4").tags
    said = {"parents", "lambda", "weights", "method", "gate", "promoted_to", "promotions"}
    finds = {"key", "request", "digest", "gate_run_id"}
    assert {name.removeprefix("soup.") for name in tags} == said | finds


def test_a_later_promotion_is_told(client, outcome):
    release.promote(Spec(version="v4", promote="alias:live"))
    lines = first_lines(client.get_model_version(MODEL, "4").description)
    assert lines[2].startswith("Promoted: alias live → toy-llm v4, 2")
    text = client.get_registered_model(MODEL).description
    assert "Live: [toy-llm v4](#/models/toy-llm/versions/4), a soup of toy-llm v1 and" in text


def test_a_copy_tells_its_own_promotion(client, outcome):
    client.create_registered_model("prod", tags=client.get_registered_model(MODEL).tags)
    release.promote(Spec(version="v4", promote="model:prod@live"))
    text = client.get_model_version("prod", "1").description
    assert text.startswith("Copy of [toy-llm v4]")
    assert "Promoted: prod@live → prod v1, 2" in text


def test_the_model_tells_what_it_is_its_policy_and_its_champion(client, outcome):
    text = client.get_registered_model(MODEL).description
    assert text.startswith("Checkpoints of a language model, and soups")
    assert "Champion: [toy-llm v4](#/models/toy-llm/versions/4), a soup of toy-llm v1 and" in text
    assert ", since 2" in text
    assert "- The search for a soup scores `toy_letters`" in text


def test_a_description_of_ours_is_renewed(client, outcome):
    client.set_registered_model_tag(MODEL, "soup.tasks", "a`b\nc")
    portray(client, MODEL)
    assert "scores `a'b c`" in client.get_registered_model(MODEL).description


def test_the_words_of_others_about_a_model_are_kept(client, outcome):
    client.update_registered_model(MODEL, "Ask Kim.")
    assert not describe_model(client, MODEL, "ours")
    portray(client, MODEL)
    assert client.get_registered_model(MODEL).description == "Ask Kim."
    client.update_registered_model(MODEL, " ")
    assert describe_model(client, MODEL, "ours")


@pytest.mark.parametrize(
    "edit", [lambda text: f"Ask Kim.\n\n{text}", lambda text: f"{text}\n\nAsk Kim."]
)
def test_our_words_with_those_of_others_are_theirs(client, outcome, edit):
    text = edit(client.get_registered_model(MODEL).description)
    client.update_registered_model(MODEL, text)
    portray(client, MODEL)
    assert client.get_registered_model(MODEL).description == text


def test_of_two_that_describe_a_model_at_once_neither_takes_the_other_for_a_stranger(
    client, outcome, monkeypatch
):
    update = Store.update_registered_model

    def late(self, name, text):
        monkeypatch.setattr(Store, "update_registered_model", update)
        assert describe_model(client, name, "of the other")  # between our look and our writing
        return update(self, name, text)

    monkeypatch.setattr(Store, "update_registered_model", late, raising=False)
    assert describe_model(client, MODEL, "x" * 2 * LIMIT)
    text = client.get_registered_model(MODEL).description
    assert (text[:2], len(text)) == ("xx", LIMIT)
    assert describe_model(client, MODEL, "of the next")
    assert client.get_registered_model(MODEL).description.startswith("of the next\n")


def test_the_view_of_the_trials_shows_only_what_was_asked(client, outcome):
    page = next(line for line in outcome.summary.splitlines() if line.startswith("all λ"))
    key = urllib.parse.parse_qs(page)["viewStateShareKey"][0]
    run = client.get_run(outcome.run_id)
    tags = client.get_experiment(run.info.experiment_id).tags
    state = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    assert state["selectedColumns"] == [
        "params.`lambda`",
        "metrics.`dev/objective`",
        "tags.`soup.chosen`",
    ]
    drawn = [chart for chart in state["compareRunCharts"] if not chart["deleted"]]
    assert [(c["type"], c["xaxis"]["key"], c["yaxis"]["key"]) for c in drawn] == [
        ("SCATTER", "lambda", "dev/objective")
    ]
    trials = client.search_runs([run.info.experiment_id], "tags.`soup.role` = 'trial'")
    hidden = {c["metricKey"] for c in state["compareRunCharts"] if c["deleted"]}
    assert {name for trial in trials for name in trial.data.metrics} <= hidden
    chosen = [trial for trial in trials if trial.data.tags.get("soup.chosen")]
    assert [trial.info.run_name.endswith(" (chosen)") for trial in chosen] == [True]
