"""Whole commands with workers: equal trials, scores and soups in every digit."""

import json

import pytest
from click.testing import CliRunner

import forked
from conftest import MODEL, use
from mlflow_soup import Spec, run
from mlflow_soup.cli import main
from mlflow_soup.workers.engine import Inline
from mlflow_soup.workers.pool import Pool
from mlflow_soup.workflows.study import run_study

REQUESTS = {
    "a pair": {"pair": "v1,v2", "trials": 6},
    "gp-hedge": {"pair": "v1,v2", "acquisition": "gp-hedge", "trials": 6},
    "three parents": {"versions": "v1,v2,v3", "trials": 7},
    "a grid": {"pair": "v1,v2", "method": "grid", "trials": 7},
    "a schedule": {"versions": "v1,v2,v3", "space": "schedule", "trials": 6},
    "fisher": {"pair": "v1,v2", "method": "fisher"},
}


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """Workers and commands are forked from one process; it must be the one with all imports."""
    forked.warm()


@pytest.fixture
def twice(filled, tmp_path, monkeypatch):
    """Do something in two equal stores, inline and with two workers."""

    def twice(do):
        found = []
        for workers in ("", "2"):
            folder = tmp_path / f"w{workers}"
            folder.mkdir()
            with monkeypatch.context() as patch:
                client = use(filled, folder, patch)
                found.append(do(client, workers))
        return found

    return twice


def trials(outcome):
    return [(t.number, t.recipe, repr(t.held_out)) for t in outcome.trials]


@pytest.mark.parametrize(
    "name",
    [name if name == "a pair" else pytest.param(name, marks=pytest.mark.slow) for name in REQUESTS],
)
def test_a_search_with_workers_is_that_of_one_process(twice, name):
    inline, pooled = twice(lambda client, w: run(Spec(**REQUESTS[name], workers=w)))
    assert trials(pooled) == trials(inline)
    assert pooled.soup.digest == inline.soup.digest
    assert repr(pooled.examination.roles) == repr(inline.examination.roles)
    assert pooled.verdict == inline.verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [{"tasks": "toy_letters,toy_spelling"}, {"evaluator": "lm-eval"}],
    ids=["generated", "lm-eval"],
)
def test_where_batches_cannot_be_cut_two_lambdas_are_scored_at_once(
    twice, monkeypatch, asked, figures
):
    beside, begun = Pool.expect, []

    def expect(self, name, *words):
        begun.append(name)
        return beside(self, name, *words)

    def search(client, workers):
        client.delete_registered_model_tag(MODEL, "soup.ood_tasks")  # of the same documents
        return run(Spec(pair="v1,v2", trials=8, stop=0.0, workers=workers, **asked))

    monkeypatch.setattr(Pool, "expect", expect)
    inline, pooled = twice(search)
    assert len({*begun}) >= 4  # more than is known at the start
    alone, scored = ({t.recipe: repr(t.held_out) for t in o.trials} for o in (inline, pooled))
    assert len(scored) == len(pooled.trials) == 8
    both = scored.keys() & alone.keys()
    assert len(both) >= 3  # both parents and the uniform soup, at least
    assert {r: scored[r] for r in both} == {r: alone[r] for r in both}
    figures[f"two at once, {asked}"] = {
        "of the same λ": len(both),
        "best": max(t.held_out.value for t in inline.trials),
        "best, two at once": max(t.held_out.value for t in pooled.trials),
    }


@pytest.mark.parametrize(
    ("study", "spec"),
    [
        ("pairs", {"versions": "v1,v2,v3"}),
        pytest.param("landscape", {"pair": "v1,v2", "points": 5}, marks=pytest.mark.slow),
        pytest.param(
            "methods",
            {"pairs": "v1,v2", "methods": "bayesopt,uniform,greedy,best", "trials": 5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_study_with_workers_is_that_of_one_process(twice, study, spec):
    inline, pooled = twice(lambda client, w: run_study(study, Spec(**spec, workers=w)))
    assert pooled.result.table == inline.result.table
    assert pooled.result.notes == inline.result.notes


def test_an_interrupted_search_continues_with_another_number_of_workers(client, monkeypatch):
    asked, kept = [], 4
    answer, alone = Pool.answer, Inline.answer

    def interrupted(self, name, *words):
        asked.append(name)
        if len(asked) > kept:
            raise KeyboardInterrupt
        return answer(self, name, *words)

    monkeypatch.setattr(Pool, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(Spec(pair="v1,v2", workers="2"))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (search,) = [r for r in runs if r.data.tags.get("soup.role") == "search"]
    asked.clear()

    def counted(self, name, evaluator, mixture):
        asked.append(evaluator.fingerprint)
        return alone(self, name, evaluator, mixture)

    monkeypatch.setattr(Inline, "answer", counted)
    outcome = run(Spec(pair="v1,v2"))
    assert outcome.run_id == search.info.run_id
    assert 0 < asked.count(asked[0]) <= len(outcome.trials) - kept


def test_the_commands_take_workers(client):
    said = forked.play(
        "mlflow_soup", "run", "--pair", "v1,v2", "--workers", "2", "--format", "json"
    )
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["version"]["name"] == MODEL
    for words, code, what in (
        (["--workers", "two"], 2, "--workers 'two' is no number of workers"),
        (["--workers", "4096"], 2, "4096 workers are more than the "),
        (["--workers", "0"], 2, "--workers '0' is no number of workers"),
        (["--workers", "2", "--worker-patience", "-1"], 2, "worker-patience"),
        (["--workers", "2", "--device-map", "auto"], 2, "spreads takes no workers"),
    ):
        done = CliRunner().invoke(main, ["run", "--pair", "v1,v2", *words])
        assert done.exit_code == code
        assert what in done.stderr
