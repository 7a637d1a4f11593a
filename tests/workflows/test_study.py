"""The paper's pilot experiments on a real store: every number of a table is worked out again."""

import csv
import io
import json
import os
import signal
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from safetensors.torch import load_file

import forked
import mlflow_soup
import toy
from conftest import MODEL, use
from mlflow_soup import Spec, errors
from mlflow_soup.decision import pairing
from mlflow_soup.evaluation import evaluator
from mlflow_soup.records import Recipe, Trial
from mlflow_soup.registry import scores, tracking
from mlflow_soup.registry.store import Store
from mlflow_soup.reporting import tables
from mlflow_soup.request.spec import STUDIES
from mlflow_soup.search.recommend import recommend
from mlflow_soup.search.space import Space
from mlflow_soup.workflows import job, pilots
from mlflow_soup.workflows.study import run_study as study
from test_cli import command

REQUESTS = {
    "pairs": {"versions": "v1,v2,v3", "method": "greedy"},
    "count": {"last": 3, "method": "greedy"},
    "schedule": {"versions": "v1,v2,v3", "windows": "2,3,6", "powers": "1/2,1,2"},
    "landscape": {"pair": "v1,v2", "points": 9},
    "heldout": {"pair": "v1,v2", "points": 9, "fractions": "1/20,1/4,1"},
    "alpha": {"pair": "v1,v2", "alphas": "0,0.9", "trials": 4},
    "ood": {"pairs": "v1,v2", "methods": "bayesopt,uniform,fisher,best", "trials": 4},
    "methods": {"pairs": "v1,v2 v1,v3", "methods": "bayesopt,uniform,greedy"},
}
ACC, BPB = "toy_digits:acc", "toy_digits_bpb:bits_per_byte"


def registered(client):
    """All that the registry holds of the model."""
    model = client.get_registered_model(MODEL)
    versions = client.search_model_versions(f"name='{MODEL}'")
    kept = {v.version: (v.source, v.tags, v.aliases, v.description) for v in versions}
    return model.tags, model.aliases, kept


def all_runs(client, query=""):
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, query, max_results=5000)


def evaluated(client):
    """What was scored, not taken over: run id → what tells it from all others."""
    return {
        run.info.run_id: run.data.tags["soup.measured"]
        for run in all_runs(client)
        if "seconds/evaluate" in run.data.metrics
    }


def children(client, run_id):
    return all_runs(client, f"tags.`mlflow.parentRunId` = '{run_id}'")


def searches(client, report):
    """Name → key of each search of a study."""
    found = [r for r in children(client, report.run_id) if r.data.tags["soup.role"] == "search"]
    return {run.info.run_name: run.data.tags["soup.key"] for run in found}


def trials(client, key, folder):
    """Weights → score with its items, of each trial of a search in its order."""
    found = {}
    for run in all_runs(client, f"tags.`soup.key` = '{key}' and tags.`soup.role` = 'trial'"):
        items = run.data.tags.get("soup.items_run", run.info.run_id)
        score = scores.read(tracking.fetch(client, items, "items.parquet", folder)).mean
        assert score.value == run.data.metrics["dev/objective"]
        weights = tuple(json.loads(run.data.params["weights"]))
        found[int(run.data.tags["soup.number"])] = weights, score
    return dict(found[number] for number in sorted(found))


def read(report):
    """Its CSV."""
    return list(csv.DictReader(io.StringIO(tables.csv(report.result.table))))


def numbers(rows, column):
    return [float(row[column]) for row in rows]


def values(score):
    return np.array(score.items[0].values)


def against(ours, theirs):
    """Mean difference item by item and its 95 % interval."""
    difference = pairing.paired(ours, theirs)
    assert difference.value == pytest.approx(np.mean(values(ours) - values(theirs)), abs=1e-12)
    return difference.value, *pairing.interval(difference, 0.95)


def greedy(scores):
    """Greedy soup from the scores of uniform ones, the newest first among equals."""
    count = len(next(iter(scores)))

    def of(members):
        near = np.isin(range(count), members) / len(members)
        return next(s for lam, s in scores.items() if np.allclose(lam, near, atol=2e-4))

    order = sorted(range(count), key=lambda i: (of([i]).value, i), reverse=True)
    taken = order[:1]
    for newcomer in order[1:]:
        if of([*taken, newcomer]).value >= of(taken).value - 1e-12:
            taken = [*taken, newcomer]
    return of(taken)


@pytest.fixture(scope="module")
def told(finished, tmp_path_factory):
    """A store in which v1,v2 was merged and promoted before all studies; and what they told."""
    root = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        client = use(finished[0], root, patch)
        before = registered(client)
        reports = {name: study(name, Spec(**said)) for name, said in REQUESTS.items()}
        assert registered(client) == before  # see the test of that name
    return root, reports


@pytest.fixture
def reports(told, tmp_path, monkeypatch):
    """What all studies told; `mlflow` then sees a copy of the store as they left it."""
    root, returned = told
    use(root / "mlflow.db", tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_SOUP_CACHE", str(root / "cache"))
    return returned


@pytest.fixture
def store(reports) -> Store:
    return Store()


@pytest.fixture(scope="module")
def measure(told):
    """Scores weights of versions again, by a bench of its own: held-out, and each OOD task."""
    root, _ = told
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SOUP_CACHE", str(root / "cache"))
        mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
        spec = Spec(model=MODEL, versions="v1,v2,v3")
        client, model, spec = job.settle(spec, spec.parents)
        session, (versions,) = job.open_session(client, model, spec, [spec.parents], "")

    def measure(weights):
        parents = [session.opened[versions[int(v[1:]) - 1]].checkpoint for v in weights]
        session.bench.live.set_weights(session.bench.live.link(parents), list(weights.values()))
        outside = {name: s.metrics[0].value for name, s in session.bench.ood.evaluate()}
        return session.bench.held_out.score().value, *outside.values()

    return measure


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_a_run_with_table_figure_and_words(store, reports, name, tmp_path):
    report = reports[name]
    run = store.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["soup.role"] == "study"
    assert run.data.tags["soup.method"] == name
    for option, said in REQUESTS[name].items():
        assert run.data.params[f"cfg.{option}"] == str(said)
    assert run.data.params["cfg.tasks"] == "toy_letters"  # the policy's

    folder = Path(store.download_artifacts(report.run_id, "", str(tmp_path)))
    assert {file.name for file in folder.iterdir() if file.stem == name} == {
        f"{name}.csv",
        f"{name}.md",
        f"{name}.png",
    }
    assert (folder / f"{name}.csv").read_text() == tables.csv(report.result.table)
    page = (folder / f"{name}.md").read_text()
    assert run.data.tags["mlflow.note.content"] == page
    assert tables.markdown(report.result.table) in page
    for note in report.result.notes:
        assert f"- {note}" in page
        assert note in report.summary
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert tables.text(report.result.table) in report.summary
    assert f"/runs/{report.run_id}" in report.summary
    assert "-0.0000" not in report.summary

    below = children(store, report.run_id)
    assert below
    assert {child.info.status for child in below} == {"FINISHED"}


def test_no_study_registers_anything(finished, store):
    after = registered(store)
    versions = {v.version for v in store.search_model_versions(f"name='{MODEL}'")}
    assert versions == {1, 2, 3, 4}
    assert {name: int(number) for name, number in after[1].items()} == {"champion": 4}
    experiment = store.get_experiment_by_name("soups").experiment_id
    assert len(store.search_logged_models([experiment])) == 4


@pytest.mark.parametrize("name", STUDIES)
def test_the_same_study_again_evaluates_nothing(store, reports, name):
    before = evaluated(store)
    again = study(name, Spec(**REQUESTS[name]))
    assert again.run_id != reports[name].run_id
    assert evaluated(store) == before
    assert tables.csv(again.result.table) == tables.csv(reports[name].result.table)
    assert again.result.notes == reports[name].result.notes


def test_windows_are_the_merges_by_their_decay(reports):
    rows = {(int(r["checkpoints"]), r["p"]): r for r in read(reports["schedule"])}
    assert {*rows} == {(k, p) for k in (2, 3) for p in ("0.5", "1", "2")}  # there are three
    best = max(float(row["score"]) for row in rows.values())
    first = read(reports["schedule"])[0]
    assert float(first["score"]) == best
    (note, *others) = reports["schedule"].result.notes
    assert f"window of {first['checkpoints']} checkpoints with p = {first['p']}" in note
    assert any(words.startswith("Against the best pair (2 checkpoints") for words in others)
    assert any(words.startswith("Against the best plain average") for words in others)


def test_the_windows_scores_are_those_of_these_weights(store, reports):
    found = {
        tuple(json.loads(run.data.params["weights"])): run.data.metrics["dev/objective"]
        for run in children(store, reports["schedule"].run_id)
    }
    rows = {(r["checkpoints"], r["p"]): float(r["score"]) for r in read(reports["schedule"])}
    thirds = (0.3333, 0.3333, 0.3334)
    for cell, weights in {
        ("2", "1"): (0.0, 0.5, 0.5),
        ("2", "2"): (0.0, 0.25, 0.75),
        ("2", "0.5"): (0.0, 0.7071, 0.2929),
        ("3", "1"): thirds,
        ("3", "2"): (0.1111, 0.3333, 0.5556),
    }.items():
        assert rows[cell] == found[weights], cell
    newest = found[0.0, 0.0, 1.0]
    for row in read(reports["schedule"]):
        assert float(row["Δ newest version"]) == pytest.approx(float(row["score"]) - newest)


def test_nothing_is_ever_scored_twice(store):
    measured = [*evaluated(store).values()]
    assert len(measured) == len({*measured})


def test_pairs_are_greedy_soups_and_their_gains_are_paired(
    store, reports, measure, checkpoints, tmp_path
):
    rows = read(reports["pairs"])
    keys = searches(store, reports["pairs"])
    assert {*keys} == {f"greedy of {pair}" for pair in ("v1,v2", "v1,v3", "v2,v3")}
    alone = {v: measure({v: 1.0})[0] for v in ("v1", "v2", "v3")}
    tensors = [load_file(folder / "model.safetensors") for folder in checkpoints]
    for row in rows:
        older, newer = row["older"], row["newer"]
        scores = trials(store, keys[f"greedy of {older},{newer}"], tmp_path)
        assert [float(row["older alone"]), float(row["newer alone"])] == [
            alone[older],
            alone[newer],
        ]
        assert (scores[1.0, 0.0].value, scores[0.0, 1.0].value) == (alone[older], alone[newer])
        soup = greedy(scores)
        best = scores[1.0, 0.0] if alone[older] > alone[newer] else scores[0.0, 1.0]
        assert scores[1.0 - float(row["λ"]), float(row["λ"])] == soup
        assert float(row["soup"]) == soup.value
        gain = [float(row[column]) for column in ("Δ better parent", "low", "high")]
        assert gain == pytest.approx(against(soup, best))
        i, j = int(older[1]) - 1, int(newer[1]) - 1
        assert int(row["apart"]) == j - i
        apart = sum((tensors[j][n] - t).double().square().sum() for n, t in tensors[i].items())
        norm = sum(t.double().square().sum() for t in tensors[i].values())
        assert float(row["relative L2"]) == pytest.approx(float((apart / norm) ** 0.5), rel=1e-5)
    assert numbers(rows, "soup") == sorted(numbers(rows, "soup"), reverse=True)

    notes = reports["pairs"].result.notes
    assert notes[0].startswith(f"Recommended: {rows[0]['older']},{rows[0]['newer']}, ")
    for apart in (1, 2):
        gains = [float(row["Δ better parent"]) for row in rows if row["apart"] == str(apart)]
        said = f"{apart} apart: the average gain is {np.mean(gains):+.4f}; "
        said += f"{sum(gain > 1e-12 for gain in gains)} of {len(gains)} pairs gain."
        assert said in notes


def test_count_adds_one_older_version_at_a_time(store, reports, tmp_path):
    rows = read(reports["count"])
    assert [(row["parents"], row["versions"]) for row in rows] == [
        ("2", "v2,v3"),
        ("3", "v1,v2,v3"),  # v4 is a soup, and none of the last three
    ]
    keys, soups = searches(store, reports["count"]), []
    for row in rows:
        scores = trials(store, keys[f"greedy of {row['versions']}"], tmp_path)
        soup = greedy(scores)
        assert float(row["soup"]) == soup.value
        assert int(row["evaluations"]) == len(scores)
        parents = {i: s for w, s in scores.items() for i in range(len(w)) if w[i] == 1.0}
        best = max(parents, key=lambda i: (parents[i].value, i))
        assert row["best parent"] == row["versions"].split(",")[best]
        gain = [float(row[column]) for column in ("Δ best parent", "low", "high")]
        assert gain == pytest.approx(against(soup, parents[best]))
        soups.append(soup)
    value, low, high = against(soups[1], soups[0])
    assert (
        f"3 instead of 2 parents: {value:+.4f} (95 % interval {low:+.4f} to {high:+.4f})."
        in reports["count"].result.notes
    )


def test_a_landscape_is_measured_from_one_parent_to_the_other(store, reports, measure, tmp_path):
    rows = read(reports["landscape"])
    (key,) = searches(store, reports["landscape"]).values()
    scores = {lam: score for (_, lam), score in trials(store, key, tmp_path).items()}
    lam, ours = numbers(rows, "λ"), numbers(rows, "score")
    assert lam == sorted(scores)
    np.testing.assert_allclose(lam, np.linspace(0.0, 1.0, 9), atol=1e-4)
    assert ours == [scores[weight].value for weight in lam]
    assert ours[2] == measure({"v1": 0.75, "v2": 0.25})[0]
    better = max((scores[1.0], scores[0.0]), key=lambda score: score.value)
    for row in rows:
        band = [float(row[column]) for column in ("Δ better parent", "low", "high")]
        assert band == pytest.approx(against(scores[float(row["λ"])], better))
    inside = rows[1:-1]
    won = sum(gain > 1e-12 for gain in numbers(inside, "Δ better parent"))
    sure = sum(low > 0.0 for low in numbers(inside, "low"))
    name = "v1" if better is scores[0.0] else "v2"
    share, highest, _ = reports["landscape"].result.notes
    assert share == (
        f"{100 * won / 9:.0f} % of λ from 0 to 1 ({won} of 9) beat the better parent, {name}; "
        f"{sure} of them with 95 % confidence each."
    )
    assert f"λ = {lam[int(np.argmax(ours))]:g} scores highest:" in highest


def test_shares_of_the_items_are_nested_and_scored_on_what_was_drawn(store, reports, tmp_path):
    (key,) = searches(store, reports["heldout"]).values()
    score = trials(store, key, tmp_path)[0.5, 0.5]
    of = dict(zip(score.items[0].ids, score.items[0].values, strict=True))
    for seed in range(3):
        drawn = {share: pilots._part(score, share, seed) for share in (0.05, 0.25, 0.5, 1.0)}
        kept = {share: part.items[0].ids for share, part in drawn.items()}
        assert {share: len(ids) for share, ids in kept.items()} == {
            0.05: 5,
            0.25: 25,
            0.5: 50,
            1.0: 100,
        }
        assert {*kept[0.05]} < {*kept[0.25]} < {*kept[0.5]} < {*kept[1.0]}
        for share, part in drawn.items():
            assert part.value == pytest.approx(np.mean([of[i] for i in kept[share]]))
            assert part.items[0].values == tuple(of[i] for i in kept[share])
    assert pilots._part(score, 0.05, 0) != pilots._part(score, 0.05, 1)


def test_what_shares_choose_is_what_a_search_would_recommend(store, reports, measure, tmp_path):
    (key,) = searches(store, reports["heldout"]).values()
    scores = dict(sorted(trials(store, key, tmp_path).items(), key=lambda item: item[0][-1]))

    def choose(share, seed):
        seen = [
            Trial(i, Recipe("linear", lam), pilots._part(score, share, seed))
            for i, (lam, score) in enumerate(scores.items())
        ]
        return recommend(Space.pair(0.0), seen, measured=True).lam

    rows = read(reports["heldout"])
    assert numbers(rows, "share") == [0.05, 0.25, 1.0]
    assert numbers(rows, "items") == [5, 25, 100]
    for row in rows:
        share = float(row["share"])
        draws = [choose(share, seed) for seed in range(10)]
        first = draws[0]
        assert float(row["λ"]) == first[-1]
        part = pilots._part(scores[first], share, 0)
        assert float(row["score on the share"]) == pytest.approx(part.value)
        held_out, *outside = measure(dict(zip(("v1", "v2"), first, strict=True)))
        assert float(row["score on all"]) == held_out
        assert [float(row[ACC]), float(row[BPB])] == outside
        lam = [weights[-1] for weights in draws]
        assert float(row["median λ of 10 draws"]) == np.median(lam)
        assert float(row["s.d. of λ"]) == pytest.approx(np.std(lam))
        full = np.mean([scores[weights].value for weights in draws])
        assert float(row["mean score on all"]) == pytest.approx(full)
        below = max(score.value for score in scores.values()) - full
        assert any(
            note.startswith(f"Share {share:g}: ") and f" {below:z.4f} below" in note
            for note in reports["heldout"].result.notes
        )
    everything = [Trial(i, Recipe("linear", w), s) for i, (w, s) in enumerate(scores.items())]
    recommended = recommend(Space.pair(0.0), everything, measured=True)
    assert float(rows[-1]["λ"]) == recommended.lam[-1]
    assert float(rows[-1]["s.d. of λ"]) == 0.0
    assert float(rows[0]["median λ of 10 draws"]) == 0.5  # five items tell no λ from the average


def test_alpha_searches_each_space_within_its_bounds(store, reports, tmp_path):
    rows, keys = read(reports["alpha"]), searches(store, reports["alpha"])
    assert [row["α"] for row in rows] == ["0", "0.9"]
    for row in rows:
        alpha, lam = float(row["α"]), float(row["λ"])
        scores = trials(store, keys[f"[{alpha:g}, 1]"], tmp_path)
        assert int(row["evaluations"]) == len(scores) <= 4
        assert lam >= alpha
        inside = [w for w in scores if w not in ((1.0, 0.0), (0.5, 0.5))]  # always measured
        assert all(w[-1] >= alpha for w in inside)
        seen = [Trial(i, Recipe("linear", w), s) for i, (w, s) in enumerate(scores.items())]
        chosen = recommend(Space.pair(alpha), seen, measured=True)
        assert lam == chosen.lam[-1]
        assert float(row["soup"]) == scores[chosen.lam].value
        best = max(scores[1.0, 0.0], scores[0.0, 1.0], key=lambda score: score.value)
        gain = [float(row[column]) for column in ("Δ better parent", "low", "high")]
        assert gain == pytest.approx(against(scores[chosen.lam], best))


def test_ood_compares_what_was_found_on_a_task_with_what_was_not(store, reports, measure, tmp_path):
    rows, keys = read(reports["ood"]), searches(store, reports["ood"])
    by = {row["method"]: row for row in rows}
    assert {row["pair"] for row in rows} == {"v1,v2"}
    assert [*by] == ["bayesopt", "uniform", "fisher", "best"]
    for row in rows:
        gaps = []
        for task in (ACC, BPB):
            inside, outside = float(row[f"{task} IND"]), float(row[f"{task} OOD"])
            gaps.append(abs(inside - outside))
            assert float(row[f"{task} |Δ|"]) == gaps[-1]
        assert float(row["total |Δ|"]) == pytest.approx(sum(gaps))
        note = f"{row['method']}: total |IND − OOD| {sum(gaps):.4f}."
        assert note in reports["ood"].result.notes

    def pairs_of(method, kind):
        return [float(by[method][f"{task} {kind}"]) for task in (ACC, BPB)]

    uniform = [*measure({"v1": 0.5, "v2": 0.5})[1:]]
    assert pairs_of("uniform", "IND") == pairs_of("uniform", "OOD") == uniform
    assert float(by["uniform"]["total |Δ|"]) == 0.0

    parents = [measure({v: 1.0}) for v in ("v1", "v2")]
    best = max(parents)
    assert pairs_of("best", "OOD") == [*best[1:]]  # by held-out score
    assert pairs_of("best", "IND") == [max(p[1] for p in parents), min(p[2] for p in parents)]

    held_out = trials(store, keys["bayesopt of v1,v2"], tmp_path)
    seen = [Trial(i, Recipe("linear", w), s) for i, (w, s) in enumerate(held_out.items())]
    lam = recommend(Space.pair(0.5), seen, measured=True).lam
    assert pairs_of("bayesopt", "OOD") == [*measure(dict(zip(("v1", "v2"), lam, strict=True)))[1:]]
    for task, shown in zip((ACC, BPB), pairs_of("bayesopt", "IND"), strict=True):
        found = trials(store, keys[f"bayesopt of v1,v2 on {task}"], tmp_path)
        assert shown in [score.metrics[0].value for score in found.values()]
    assert "no evidence for a gate" in reports["ood"].result.notes[-1]


def test_methods_shows_what_the_main_job_shows_and_the_best_in_bold(
    store, finished, reports, measure, tmp_path
):
    rows, keys = read(reports["methods"]), searches(store, reports["methods"])
    by = {(row["pair"], row["model"]): row for row in rows}
    tasks_of = ("held-out", "toy_digits/acc", "toy_digits_bpb/bits_per_byte")

    def shown(*key):
        return [float(by[key][column]) for column in tasks_of]

    # its search is that of the study; test_run.py compares its numbers with the `lm_eval` command
    ours, theirs = shown("v1,v2", "bayesopt"), store.get_run(finished[1].run_id).data.metrics
    assert ours == [
        *(theirs["dev/toy_letters/acc"], theirs["ood/toy_digits/acc"]),
        theirs["ood/toy_digits_bpb/bits_per_byte"],
    ]
    assert float(by["v1,v2", "bayesopt"]["λ"]) == finished[1].soup.recipe.lam[-1]

    for pair in ("v1,v2", "v1,v3"):
        older, newer = pair.split(",")
        for version in (older, newer):
            assert shown(pair, f"{version} alone") == [*measure({version: 1.0})]
            assert by[pair, f"{version} alone"]["Δ better parent"] == ""
        assert shown(pair, "uniform") == [*measure({older: 0.5, newer: 0.5})]
        parents = [shown(pair, f"{version} alone")[0] for version in (older, newer)]
        for method in ("bayesopt", "uniform", "greedy"):
            scores = trials(store, keys[f"{method} of {pair}"], tmp_path)
            row = by[pair, method]
            soup = scores[1.0 - float(row["λ"]), float(row["λ"])]
            best = scores[1.0, 0.0] if parents[0] > parents[1] else scores[0.0, 1.0]
            assert float(row["held-out"]) == soup.value
            gain = [float(row[column]) for column in ("Δ better parent", "low", "high")]
            assert gain == pytest.approx(against(soup, best))
            assert int(row["evaluations"]) == len(scores)

    page = tables.markdown(reports["methods"].result.table).splitlines()
    columns = [cell.strip() for cell in page[0].strip("|").split("|")]
    bold = [[cell.strip() for cell in line.strip("|").split("|")] for line in page[2:]]
    for column, of in zip(tasks_of, (max, max, min), strict=True):
        for pair in ("v1,v2", "v1,v3"):
            best = of(round(float(row[column]), 4) for row in rows if row["pair"] == pair)
            for row, cells in zip(rows, bold, strict=True):
                if row["pair"] == pair:
                    number = round(float(row[column]), 4)
                    words = f"{number:.4f}"
                    expected = f"**{words}**" if number == best else words
                    assert cells[columns.index(column)] == expected


def test_a_study_takes_over_what_the_main_job_scored(outcome, client):
    before = evaluated(client)
    # the search of the main job, as it was
    report = study("alpha", Spec(pair="v1,v2", alphas="0.5"))
    assert evaluated(client) == before
    (row,) = read(report)
    assert float(row["λ"]) == outcome.soup.recipe.lam[-1]
    assert float(row["soup"]) == outcome.soup.held_out.value
    # and what it has in common with another one: both parents and their middle
    study("landscape", Spec(pair="v1,v2", points=5))
    common = {0.0, 0.25, 0.5, 0.75, 1.0} & {trial.recipe.lam[-1] for trial in outcome.trials}
    assert len(common) >= 3
    assert len(evaluated(client)) - len(before) == 5 - len(common)


def test_the_main_job_takes_over_what_a_study_scored(store):
    before = evaluated(store)
    outcome = mlflow_soup.run(Spec(pair="v1,v3", ood_tasks=""))
    assert evaluated(store) == before
    assert outcome.soup.version.number == 5


@pytest.mark.parametrize(("name", "after"), [("pairs", 3), ("heldout", 10), ("alpha", 4)])
def test_a_study_cut_short_goes_on_to_the_same_table(client, told, monkeypatch, name, after):
    score = evaluator.Evaluator.score
    calls = []

    def interrupted(self, *parts):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(self)
        return score(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(name, Spec(**REQUESTS[name]))
    monkeypatch.setattr(evaluator.Evaluator, "score", score)
    before = evaluated(client)
    assert len(before) == after
    assert not all_runs(client, "attributes.status = 'RUNNING'")
    report = study(name, Spec(**REQUESTS[name]))
    assert tables.csv(report.result.table) == tables.csv(told[1][name].result.table)
    both = evaluated(client)
    assert before.items() < both.items()
    assert len({*both.values()}) == len(both)


def test_a_study_that_is_terminated_goes_on_when_it_is_called_again(client, told):
    words = ["study", "landscape", "--pair", "v1,v2", "--points", "33"]
    process = forked.Play("mlflow_soup", *words)

    def scored():  # those that are being written have no tags yet
        ended = all_runs(client, "attributes.status = 'FINISHED'")
        return sum("seconds/evaluate" in run.data.metrics for run in ended)

    while scored() < 3 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    done = process.finish(60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    before = evaluated(client)
    assert 3 <= len(before) < 33
    assert not all_runs(client, "attributes.status = 'RUNNING'")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    both = evaluated(client)
    assert len(both) == len({*both.values()}) == 33
    (run,) = all_runs(client, "tags.`soup.role` = 'study' and attributes.status = 'FINISHED'")
    ours = client.download_artifacts(run.info.run_id, "landscape.csv")
    score = {row["λ"]: row["score"] for row in csv.DictReader(Path(ours).read_text().splitlines())}
    for row in read(told[1]["landscape"]):
        assert score[row["λ"]] == row["score"]  # eighths are among the 32nds


def test_no_choice_depends_on_out_of_domain_items(store, reports, tasks, tmp_path):
    other = toy.copy_tasks(tasks, tmp_path / "other")
    items = [json.loads(line) for line in (other / "digits.jsonl").read_text().splitlines()]
    wrong = [item | {"answer": (item["answer"] + 1) % 4} for item in items]
    (other / "digits.jsonl").write_text("".join(json.dumps(item) + "\n" for item in wrong))
    (other / "text.jsonl").write_text('{"text": "000 111 222"}\n' * 5)

    before = {*evaluated(store)}
    folders = f"{tasks}{os.pathsep}{other}"  # what the later defines anew counts
    store.set_registered_model_tag(MODEL, "soup.include_path", folders)
    for name in ("heldout", "methods"):
        report = study(name, Spec(**REQUESTS[name]))
        assert searches(store, report) == searches(store, reports[name])
        ours, theirs = read(report), read(reports[name])
        outside = {column for column in ours[0] if column.startswith("toy_digits")}
        assert len(outside) == 2
        for column in {*ours[0]} - outside:
            assert [row[column] for row in ours] == [row[column] for row in theirs]
        for column in outside:
            assert [row[column] for row in ours] != [row[column] for row in theirs]
    new = {*evaluated(store)} - before
    assert new
    assert {store.get_run(run_id).data.tags["soup.role"] for run_id in new} == {"look"}


def methods_of(client, report):
    found = [r for r in children(client, report.run_id) if r.data.tags["soup.role"] == "search"]
    return {run.data.tags["soup.method"] for run in found}


@pytest.mark.parametrize("name", ["pairs", "count"])
def test_pairs_and_count_are_plain_averages_where_no_method_is_named(store, reports, name):
    assert methods_of(store, reports[name]) == {"greedy"}  # as it was asked for
    report = study(name, Spec(versions="v1,v2,v3"))
    assert methods_of(store, report) == {"uniform"}
    assert report.result.title.endswith("by uniform")
    for row in read(report):
        assert len({*row["λ"].replace("0.3334", "0.3333").split(", ")}) == 1


def test_a_lambda_without_a_finite_score_is_left_out(client, monkeypatch):
    score = evaluator.Evaluator.score
    calls = []

    def fail(self, *parts):
        calls.append(self)
        if len(calls) == 4:
            raise errors.NonFiniteError("not finite", where="here", fix="none")
        return score(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", fail)
    report = study("landscape", Spec(pair="v1,v2", points=5, limit=40))
    lam = numbers(read(report), "λ")
    assert (lam[0], lam[-1], len(lam)) == (0.0, 1.0, 4)
    assert "(2 of 4)" in report.result.notes[0]


@pytest.mark.parametrize("name", ["landscape", "heldout", "pairs"])
def test_a_parent_without_a_finite_score_is_said_by_name(client, monkeypatch, name):
    def fail(self, *parts):
        raise errors.NonFiniteError("not finite", where="here", fix="none")

    monkeypatch.setattr(evaluator.Evaluator, "score", fail)
    with pytest.raises(errors.ObjectiveError, match="toy-llm v1 has no finite score"):
        study(name, Spec(**REQUESTS[name]))


NO_VERSIONS = [
    ([name], 2, f"where: --{option}", f"--{option} ")
    for name, option in {
        "pairs": "versions",
        "count": "versions",
        "landscape": "pair",
        "heldout": "pair",
        "alpha": "pair",
        "ood": "pairs",
        "methods": "pairs",
    }.items()
]
WRONG = [
    *NO_VERSIONS,
    (["methods", "--pairs", "v1"], 2, "--pairs", "a space between pairs"),
    (["ood", "--pairs", "v1,v2 v3"], 2, "--pairs", "a space between pairs"),
    (["landscape", "--pair", "v1,v2,v3"], 2, "--pair", "name the older version, then the newer"),
    (["count", "--versions", "v1"], 2, "--versions", "name the versions by age"),
    (["pairs", "--last", "1"], 2, "--last", "a whole number, 2 or more"),
    (["pairs", "--versions", "v1,v2", "--last", "2"], 2, "--versions and --last", "keep only one"),
    (["methods", "--pairs", "v1,v2", "--methods", "ours"], 2, "--methods", "regmean"),
    (
        ["ood", "--pairs", "v1,v2", "--methods", "uniform,uniform"],
        2,
        "--methods",
        "each method once",
    ),
    (["pairs", "--last", "3", "--method", "ours"], 2, "--method", "greedy"),
    (["landscape", "--pair", "v1,v2", "--points", "3"], 2, "--points", "a whole number from 4"),
    (["landscape", "--pair", "v1,v2", "--points", "20000"], 2, "--points", "from 4 to 10001"),
    (["heldout", "--pair", "v1,v2", "--fractions", "0"], 2, "--fractions", "from 0.001 to 1"),
    (["heldout", "--pair", "v1,v2", "--fractions", "2"], 2, "--fractions", "from 0.001 to 1"),
    (["heldout", "--pair", "v1,v2", "--fractions", "half"], 2, "--fractions", "from 0.001 to 1"),
    (["alpha", "--pair", "v1,v2", "--alphas", "1"], 2, "--alphas", "from 0 to 0.999"),
    (
        ["alpha", "--pair", "v1,v2", "--alphas", "0.999", "--trials", "40"],
        2,
        "different λ",
        "lower",
    ),
    (["count", "--last", "3", "--method", "grid", "--trials", "4"], 2, "--trials", "at least 5"),
    (["pairs", "--versions", "v1,v1"], 2, "--versions", "name each version once"),
    (["alpha", "--pair", "v2,v2"], 2, "--pair", "name each version once"),
    (["methods", "--pairs", "v1,v2 v2,v2"], 2, "--pairs", "name each version once"),
    (["landscape", "--pair", "@live,v2"], 2, "--pair", "name each version once"),
    (["landscape", "--pair", "v1,v9"], 4, "toy-llm has no v9", "its versions: 1, 2, 3"),
    (["methods", "--pairs", "v1,v2 v1,v9"], 4, "toy-llm has no v9", "its versions: 1, 2, 3"),
    (["pairs", "--last", "4"], 2, "toy-llm has only 3 versions", "--last 3"),
    (["heldout", "--pair", "v1,v2", "--out", "taken/deep"], 2, "--out", "may write to"),
    (["pairs", "--last", "3", "--out", "taken"], 2, "--out", "may write to"),
    (["pairs", "--last", "3", "--out", "/proc/soup"], 2, "--out", "may write to"),
    (["landscape", "--pair", "v1,v2", "--pairs", "v1,v2"], 2, "No such option", ""),
]


@pytest.mark.parametrize(("words", "code", "what", "fix"), WRONG)
def test_a_wrong_study_is_refused_before_anything_is_touched(
    client, tmp_path, words, code, what, fix
):
    client.set_registered_model_alias(MODEL, "live", "2")
    (tmp_path / "taken").write_text("")
    done = command("study", *words)
    assert done.returncode == code, done.stderr
    assert what in done.stderr
    assert fix in (done.stderr.partition("fix:")[2] or done.stderr)  # click has no fix
    assert "Traceback" not in done.stderr
    assert all_runs(client) == []
    assert (tmp_path / "taken").read_text() == ""


def test_without_out_of_domain_tasks_there_is_no_study_of_them(client):
    client.delete_registered_model_tag(MODEL, "soup.ood_tasks")
    done = command("study", "ood", "--pairs", "v1,v2")
    assert done.returncode == 2
    assert "where: --ood-tasks" in done.stderr
    assert "fix: name tasks from another domain: --ood-tasks" in done.stderr
    assert all_runs(client) == []
    few = {
        "heldout": {"pair": "v1,v2", "points": 5, "fractions": "1/4,1"},
        "methods": {"pairs": "v1,v2", "methods": "uniform"},
    }
    for name, said in few.items():  # these have columns less
        report = study(name, Spec(**said, limit=20))
        assert not [column for column in report.result.table.columns if "digits" in column]


@pytest.mark.parametrize("name", ["pairs", "count", "landscape", "alpha"])
def test_a_study_without_the_option_loads_no_out_of_domain_tasks(client, name):
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "toy_gone")
    report = study(name, Spec(**REQUESTS[name] | {"limit": 20}))
    assert "cfg.ood_tasks" not in client.get_run(report.run_id).data.params


def test_no_study_calibrates_on_out_of_domain_items(client, tasks):
    text = str(tasks / "text.jsonl")
    with pytest.raises(errors.SpecError, match="contains 43 out-of-domain items"):
        study("pairs", Spec(versions="v1,v2", method="fisher", calibration=text))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("best", {"pair": "v1,v2"}),
        ("landscape", {"versions": "v1,v2,v3"}),
        ("heldout", {"last": 3}),
        ("alpha", {"versions": "v1,v2,v3"}),
        ("methods", {"pairs": "v1,v2", "last": 3}),
    ],
)
def test_a_program_that_names_the_wrong_things_is_told_so(client, name, said):
    with pytest.raises(errors.SpecError):
        study(name, Spec(**said))
    assert all_runs(client) == []


def test_help_asks_the_questions_that_studies_answer():
    done = command("study", "--help")
    assert done.returncode == 0
    for name, question in STUDIES.items():
        assert f"  {name} " in done.stdout
        assert question.partition("?")[0] + "?" in done.stdout
        own = command("study", name, "--help")
        assert own.returncode == 0
        assert question.partition("?")[0] in own.stdout
        assert "--out" in own.stdout
        assert "--promote" not in own.stdout


def test_the_command_prints_the_table_and_writes_three_files(store, reports, tmp_path):
    words = ("--pair", "v1,v2", "--points", "9", "--out", "deep/papers")
    for _ in range(2):  # over what is there
        done = command("study", "landscape", *words)
        assert done.returncode == 0, done.stderr
    report = reports["landscape"]
    title, about, table = done.stdout.split("\n", 2)
    assert title == "Landscape of v1,v2"
    assert about.startswith("Model toy-llm; held-out: toy_letters:acc. ")
    assert table.startswith(f"{tables.text(report.result.table)}\n")
    for note in report.result.notes:
        assert note in done.stdout
    assert "run: http" in done.stdout
    assert "to open it, run: mlflow ui --backend-store-uri sqlite:///" in done.stdout
    assert "files: deep/papers/landscape.csv, .md and .png" in done.stdout
    folder = tmp_path / "deep" / "papers"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {*files} == {"landscape.csv", "landscape.md", "landscape.png"}
    assert files["landscape.csv"].decode() == tables.csv(report.result.table)
    assert tables.markdown(report.result.table) in files["landscape.md"].decode()
    assert files["landscape.png"].startswith(b"\x89PNG")


def test_python_has_it_by_name_like_the_main_job():
    assert mlflow_soup.run_study is study
    for name in mlflow_soup.__all__:
        assert getattr(mlflow_soup, name) is not None
