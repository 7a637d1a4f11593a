"""The test set: items that neither the search nor the gate reads, scored once in the end."""

import csv
import dataclasses
import io
import json
import os
import typing
from pathlib import Path

import lm_eval
import mlflow
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from conftest import MODEL, register
from mlflow_soup import Spec, errors, records
from mlflow_soup import run as run_soup
from mlflow_soup.decision.pairing import interval
from mlflow_soup.evaluation import evaluator
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.registry import tracking
from mlflow_soup.reporting import tables
from mlflow_soup.workflows import release, study, testset

FRESH = "toy_fresh"
COUNT = 90  # items
KNOBS = ("test_tasks", "include_path")  # of a request with a test set


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, tasks) -> Path:
    """A folder with `toy_fresh`: as `toy_letters`, but of other items; and copies of both."""
    folder = tmp_path_factory.mktemp("fresh")
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": FRESH}
    data = folder / "fresh.jsonl"
    items = toy._choice_items(toy.LETTERS, COUNT, seed=11)
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    config["dataset_kwargs"] = {"data_files": {"validation": str(data)}}
    toy.write_task(folder / "fresh.yaml", config)
    for name in ("letters", "digits"):
        config = yaml.safe_load((tasks / f"{name}.yaml").read_text()) | {"task": f"copied_{name}"}
        toy.write_task(folder / f"{name}.yaml", config)
    return folder


@pytest.fixture
def asked(fresh) -> dict[str, object]:
    """A request with a test set."""
    return {"pair": "v1,v2", "test_tasks": FRESH, "include_path": str(fresh)}


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """The first task of each evaluation, in their order."""
    names: list[str] = []
    evaluate = evaluator.Evaluator.evaluate

    def note(self, *parts):
        names.append(self._suite.terms[0].name)
        return evaluate(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "evaluate", note)
    return names


def csv_of(report) -> str:
    return tables.csv(report.result.table)


def runs(client, role):
    return tracking.find_runs(client, {"soup.role": role})


def by_lm_eval(uri: str, folder: Path) -> np.ndarray:
    """Whether each item is right, as lm-eval itself says, by the order of the items."""
    path = mlflow.artifacts.download_artifacts(uri)
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={path},softmax_dtype=float32",
        tasks=[FRESH],
        task_manager=TaskManager(include_path=str(folder)),
        batch_size=32,
        device="cpu",
    )
    rows = sorted(found["samples"][FRESH], key=lambda row: row["doc_id"])
    return np.array([row["acc"] for row in rows])


def test_the_gain_is_the_mean_difference_of_lm_evals_own_values(client, asked, fresh):
    outcome = run_soup(Spec(**asked, promote="champion"))
    soup, old, new = (by_lm_eval(f"models:/{MODEL}/{n}", fresh) for n in (4, 1, 2))
    assert len(soup) == COUNT
    alone = {
        role: t.held_out.value for role, t in zip(("old", "new"), outcome.trials, strict=False)
    }
    better, other = (old, new) if alone["old"] > alone["new"] else (new, old)
    gain = (soup - better).mean()
    assert outcome.test_gain.value == pytest.approx(gain, abs=1e-12)
    assert outcome.test_gain.count == COUNT
    assert {r: t.score.value for r, t in outcome.tested.items()} == pytest.approx(
        {"soup": soup.mean(), "parent 0": old.mean(), "parent 1": new.mean()}, abs=1e-12
    )

    shown = client.get_run(outcome.run_id).data.metrics
    assert (
        shown["test/toy_fresh/acc"] == shown["test/objective"] == outcome.tested["soup"].score.value
    )
    assert shown["test/gain"] == pytest.approx(outcome.test_gain.value, abs=1e-6)
    assert shown["test/gain_stderr"] == pytest.approx(outcome.test_gain.stderr, abs=1e-6)
    assert shown["search/gain"] == outcome.gain.value  # of the held-out items, as before
    description = client.get_model_version(MODEL, "4").description
    for text in (outcome.summary, description):
        assert "took no part in the choice of the soup or in the gate" in text
        assert "optimistic" in text
        assert f"{gain:+.4f} (95 % interval" in text
        assert f"{(soup - other).mean():+.4f} (95 % interval" in text
    assert "## Test set: toy_fresh acc" in description

    found = client.search_logged_models([client.get_run(outcome.run_id).info.experiment_id])
    pages = {m.model_id: {x.key: x.value for x in m.metrics} for m in found if m.metrics}
    version = client.get_model_version(MODEL, "4").source.removeprefix("models:/")
    assert pages[version]["test/toy_fresh/acc"] == soup.mean()
    for parent, values in zip(outcome.soup.parents, (old, new), strict=True):
        assert pages[parent.model_id]["test/toy_fresh/acc"] == values.mean()


def test_a_finished_request_is_only_tested_when_test_tasks_are_added(
    client, outcome, asked, scored
):
    """The search keeps its key, the soup its version, and the gate its verdict."""
    before = {role: [r.info.run_id for r in runs(client, role)] for role in ("trial", "ood")}
    tested = run_soup(Spec(**asked, promote="alias:champion"))
    assert scored == [FRESH] * 3
    after = {role: [r.info.run_id for r in runs(client, role)] for role in ("trial", "ood")}
    assert after == before
    assert tested.soup.version == outcome.soup.version
    assert tested.soup.recipe == outcome.soup.recipe
    assert tested.trials == outcome.trials
    assert tested.verdict == outcome.verdict
    assert tested.gain == outcome.gain
    assert outcome.tested == {}
    keys = {run.data.tags["soup.key"] for run in runs(client, "search")}
    requests = {run.data.tags["soup.request"] for run in runs(client, "search")}
    assert len(keys) == len(requests) == 1

    again = run_soup(Spec(**asked, promote="alias:champion"))
    assert scored == [FRESH] * 3  # nothing anew
    assert again.tested == tested.tested
    assert again.test_gain == tested.test_gain
    assert len(runs(client, "test")) == 3
    # the gate does not look at it either, nor does a later evaluation
    assert release.gate(Spec(version="v4")).verdict == outcome.verdict
    client.set_registered_model_tag(MODEL, "soup.test_tasks", FRESH)
    policy = client.get_registered_model(MODEL).tags["soup.include_path"]
    both = os.pathsep.join([policy, str(asked["include_path"])])
    client.set_registered_model_tag(MODEL, "soup.include_path", both)
    release.evaluate(Spec(version="v4"))
    assert scored.count(FRESH) == 3
    assert release.gate(Spec(version="v4")).verdict == outcome.verdict
    assert run_soup(Spec(pair="v1,v2")).tested == tested.tested  # the tag asks for it


def test_nothing_of_the_test_set_is_scored_before_the_alias_has_moved(client, asked, monkeypatch):
    score, seen = testset.score_once, []

    def look(*args, **options):
        version = client.get_model_version(MODEL, "4")
        seen.append((version.tags["soup.gate"], version.aliases))
        assert runs(client, "test") == []
        return score(*args, **options)

    monkeypatch.setattr("mlflow_soup.workflows.run.score_once", look)
    run_soup(Spec(**asked, trials=4, promote="champion"))
    assert seen == [("passed", ["champion"])]


def test_what_was_tested_before_a_crash_is_not_tested_again(client, asked, scored, monkeypatch):
    request = asked | {"trials": 4, "ood_tasks": ""}
    log = testset.log_test

    def stop(*args, **options):
        if len(runs(client, "test")) == stop.at:
            raise KeyboardInterrupt  # the score is in the journal, its run is not finished
        log(*args, **options)

    monkeypatch.setattr(testset, "log_test", stop)
    for stop.at in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_soup(Spec(**request))
    stop.at = 0
    outcome = run_soup(Spec(**request))
    assert scored.count(FRESH) == len(outcome.tested) == 3
    assert scored.count("toy_letters") == len(outcome.trials)
    assert len([r for r in runs(client, "test") if r.info.status == "FINISHED"]) == 3
    journal = cache_folder() / "journal"
    assert [path for path in journal.rglob("*") if path.is_file()] == []


def test_without_out_of_domain_tasks_the_champion_is_tested_too(client, asked, trained, tmp_path):
    config = GPTNeoXConfig(**{**trained.config.to_dict(), "num_hidden_layers": 1})
    number = register(client, toy.save(GPTNeoXForCausalLM(config), tmp_path / "small"))
    client.set_registered_model_alias(MODEL, "champion", str(number))
    outcome = run_soup(Spec(**asked, method="uniform", ood_tasks=""))
    assert outcome.verdict is None
    assert list(outcome.tested) == ["soup", "parent 0", "parent 1", "champion 0"]
    champion = outcome.tested["champion 0"]
    assert champion.version.number == number
    gain = outcome.tested["soup"].score.value - champion.score.value
    assert gain > 0.2  # it is untrained
    assert f"soup against toy-llm v{number}, the champion: {gain:+.4f}" in outcome.summary
    # a soup of other parents finds the scores of models that were tested
    before = len(runs(client, "test"))
    other = asked | {"pair": "v2,v3"}
    again = run_soup(Spec(**other, method="uniform", ood_tasks=""))
    assert again.tested["champion 0"] == champion
    assert again.tested["parent 0"] == outcome.tested["parent 1"]
    assert len(runs(client, "test")) == before + 2  # the new soup, and v3


def test_where_no_soup_was_registered_nothing_is_tested(client, asked, scored):
    outcome = run_soup(Spec(**asked, method="best", ood_tasks=""))
    assert not outcome.soup.registered
    assert FRESH not in scored
    assert outcome.tested == {}
    assert outcome.test_gain is None
    assert "The test set was not scored: there is no new version." in outcome.summary


@pytest.mark.parametrize(
    ("said", "what", "options"),
    [
        (
            {"test_tasks": "toy_letters"},
            "held-out and test tasks overlap: toy_letters",
            "--tasks and --test-tasks",
        ),
        (
            {"test_tasks": f"{FRESH},toy_digits"},
            "out-of-domain and test tasks overlap: toy_digits",
            "--ood-tasks and --test-tasks",
        ),
        (
            {"tasks": "toy_digits"},
            "held-out and out-of-domain tasks overlap: toy_digits",
            "--tasks and --ood-tasks",
        ),
        (
            {"test_tasks": "copied_letters"},
            "100 documents are in both held-out and test tasks, the first in toy_letters",
            "--tasks and --test-tasks",
        ),
        (
            {"test_tasks": "copied_digits"},
            "100 documents are in both out-of-domain and test tasks, the first in toy_digits and",
            "--ood-tasks and --test-tasks",
        ),
        (
            {"tasks": "copied_digits"},
            "100 documents are in both held-out and out-of-domain tasks, the first in",
            "--tasks and --ood-tasks",
        ),
    ],
)
def test_no_two_sets_share_a_task_or_a_document(client, asked, said, what, options):
    with pytest.raises(errors.SpecError) as caught:
        run_soup(Spec(**asked | said))
    assert what in caught.value.what
    assert caught.value.where.startswith(options)
    assert runs(client, "search") == []


def test_the_text_for_statistics_holds_no_item_of_the_test_set(client, asked, tmp_path):
    text = tmp_path / "text.txt"
    item = toy._choice_items(toy.LETTERS, COUNT, seed=11)[3]
    right = item["choices"][item["answer"]]
    text.write_text(f"abc abc abc\n\n{item['question']} {right}\n\n" + "dig dig dig\n\n" * 50)
    with pytest.raises(errors.SpecError, match="contains 1 test items"):
        run_soup(Spec(**asked, method="fisher", calibration=text))


def test_the_study_of_methods_shows_the_gain_on_the_test_set(client, asked, scored):
    request = {"pairs": "v1,v2", "methods": "uniform,best", "trials": 4}
    plain = study.run_study("methods", Spec(**request))
    report = study.run_study("methods", Spec(**request, **{k: asked[k] for k in KNOBS}))
    assert scored.count(FRESH) == 3  # the parents and their average; `best` is a parent
    outcome = run_soup(Spec(**asked, method="uniform", ood_tasks=""))
    tested = {role: one.score.value for role, one in outcome.tested.items()}
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(csv_of(report)))}
    assert [float(rows[m]["test"]) for m in ("v1 alone", "v2 alone", "uniform")] == [
        tested["parent 0"],
        tested["parent 1"],
        tested["soup"],
    ]
    assert float(rows["uniform"]["Δ test"]) == outcome.test_gain.value
    low, high = interval(outcome.test_gain, 0.95)
    assert (float(rows["uniform"]["test low"]), float(rows["uniform"]["test high"])) == (low, high)
    assert (rows["v1 alone"]["Δ test"], float(rows["best"]["Δ test"])) == ("", 0.0)
    assert "No method read the test items" in report.summary
    # nothing else in the table changes
    more = {"test", "Δ test", "test low", "test high"}
    for before in csv.DictReader(io.StringIO(csv_of(plain))):
        assert before == {k: v for k, v in rows[before["model"]].items() if k not in more}
    # other studies have no test set, whatever the model's tag says
    client.set_registered_model_tag(MODEL, "soup.test_tasks", "toy_gone")
    other = study.run_study("landscape", Spec(pair="v1,v2", points=4))
    assert "cfg.test_tasks" not in client.get_run(other.run_id).data.params


def test_an_evaluation_does_not_take_the_test_set_from_the_search(client, asked, scored, caplog):
    client.delete_registered_model_tag(MODEL, "soup.tasks")
    search = asked | {"tasks": "toy_letters", "method": "uniform", "ood_tasks": "", "limit": 20}
    outcome = run_soup(Spec(**search))
    assert outcome.test_gain.count == 20  # as all scores of this run
    before = scored.count(FRESH)
    release.evaluate(Spec(version="v4"))
    assert scored.count(FRESH) == before == 3
    assert "--tasks toy_letters" in caplog.text
    assert "--test-tasks" not in caplog.text


def reached(record) -> set[type]:
    """The records that a record can hold, itself included."""
    found, left = set(), [record]
    while left:
        one = left.pop()
        if dataclasses.is_dataclass(one) and one not in found:
            found.add(one)
            left += typing.get_type_hints(one).values()
        left += typing.get_args(one)
    return found


def test_no_record_that_the_search_or_the_gate_reads_can_hold_a_test_score():
    assert records.Unbiased in reached(records.Outcome)
    read = (records.Trial, records.Found, records.Examination, records.Rules, records.Verdict)
    for record in read:
        assert records.Unbiased not in reached(record)
    assert records.Score in reached(records.Trial) & reached(records.Examination)
