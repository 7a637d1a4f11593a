"""Windows of a run on a real store: what is searched, what is merged, what is compared, tracked."""

import json
import re
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest

import mlflow_soup
import toy
from conftest import fill, register, use
from mlflow_soup import Spec, errors
from mlflow_soup.decision import pairing
from mlflow_soup.evaluation import evaluator
from mlflow_soup.records import Version
from mlflow_soup.registry import naming
from mlflow_soup.reporting import document
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import MANIFEST, parse_manifest
from mlflow_soup.workflows.bench import open_version
from mlflow_soup.workflows.study import run_study
from test_cli import command

NAME, COUNT, TOKENS = "run-llm", 7, 1000


@pytest.fixture(scope="session")
def trajectory(tmp_path_factory, trained, tasks):
    """A database with seven noisy checkpoints, each of which says how many tokens it has seen."""
    root = tmp_path_factory.mktemp("trajectory")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    client = mlflow.MlflowClient()
    client.create_experiment("soups", artifact_location=f"{root}/artifacts")
    mlflow.set_experiment("soups")
    seeds = range(1, COUNT + 1)
    # the first ones were saved before the model could do anything
    noise = {1: 6.0, 2: 5.0, 3: 3.0}
    models = [toy.noisy(trained, seed, noise.get(seed, 0.9)) for seed in seeds]
    folders = [toy.save(model, root / f"v{i}") for i, model in enumerate(models, start=1)]
    fill(client, folders, tasks, NAME)
    client.delete_registered_model_tag(NAME, "soup.trials")
    for number in seeds:
        client.set_model_version_tag(NAME, str(number), "tokens_seen", str(TOKENS * number))
    return root / "mlflow.db"


@pytest.fixture
def client(trajectory, tmp_path, monkeypatch):
    return use(trajectory, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def searched(trajectory, tmp_path_factory):
    """The same database after a search of all seven."""
    root = tmp_path_factory.mktemp("searched")
    shutil.copy(trajectory, root / "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    mlflow.set_experiment("soups")
    return root / "mlflow.db", mlflow_soup.run(Spec(model=NAME, last=COUNT))


@pytest.fixture
def outcome(searched, tmp_path, monkeypatch):
    use(searched[0], tmp_path, monkeypatch)
    return searched[1]


def children(client, run_id, role):
    query = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`soup.role` = '{role}'"
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, query, max_results=1000)


def manifest_of(client, version):
    folder = open_version(client, version).parent.folder
    return parse_manifest(json.loads((folder / MANIFEST).read_text()))


# --- the main job


def test_more_than_four_versions_are_searched_as_a_schedule_of_at_most_ten(client, outcome):
    newest = (0.0,) * (COUNT - 1) + (1.0,)
    assert outcome.trials[0].recipe.lam == newest
    alone = [t for t in outcome.trials if max(t.recipe.lam) == 1.0]
    assert [t.recipe.lam for t in alone] == [newest]  # no other version is scored alone
    assert len(outcome.trials) <= 10
    run = client.get_run(outcome.run_id)
    duration, power = run.data.metrics["search/duration"], run.data.metrics["search/power"]
    assert 0 < duration <= COUNT * TOKENS
    # the weights, by the formula of the docs
    begin = COUNT * TOKENS - duration
    x = np.clip((TOKENS * np.arange(COUNT + 1) - begin) / duration, 0.0, 1.0)
    np.testing.assert_allclose(outcome.soup.recipe.lam, np.diff(x**power), atol=2e-4)


def test_the_document_tells_the_window_and_the_chance_of_the_gate(client, outcome):
    told, run = document.run(outcome), client.get_run(outcome.run_id)
    found = run.data.metrics
    assert told["window"]["duration"] == pytest.approx(found["search/duration"], abs=1e-6)
    assert told["window"]["power"] == pytest.approx(found["search/power"], abs=1e-6)
    assert told["window"]["time_tag"] == "tokens_seen"
    assert [chance["discordance"] for chance in told["power"]["chances"]] == [0.02, 0.05, 0.1]
    done = command("gate", "--power", "--model", NAME, "--format", "json")
    assert json.loads(done.stdout)["power"]["items"] == told["power"]["items"]


def test_only_versions_with_a_weight_are_parents_and_the_window_stays_on_record(client, outcome):
    soup = outcome.soup
    merged = [i + 1 for i, weight in enumerate(soup.recipe.lam) if weight]
    assert 1 < len(merged) < COUNT
    assert [parent.version.number for parent in soup.parents] == merged
    manifest = manifest_of(client, soup.version)
    assert [s.uri for s in manifest.sources] == [f"models:/{NAME}/{n}" for n in merged]
    assert sum(source.lam for source in manifest.sources) == pytest.approx(1.0)
    searched = [f"models:/{NAME}/{n}" for n in range(1, COUNT + 1)]
    assert manifest.search["versions"] == searched
    tags = client.get_model_version(NAME, str(soup.version.number)).tags
    assert tags["soup.parents"] == ",".join(map(str, merged))
    assert tags["soup.weights"] == naming.format_weights(soup.lam)


def test_the_soup_is_the_merge_of_these_parents_bit_for_bit(client, outcome, tmp_path):
    uris = [parent.version.uri for parent in outcome.soup.parents]
    weights = ",".join(f"{weight:g}" for weight in outcome.soup.lam)
    result = command("merge", *uris, "--weights", weights, "--out", str(tmp_path / "soup"))
    assert result.returncode == 0, result.stderr
    assert digest(find_checkpoint(tmp_path / "soup", "soup")) == outcome.soup.digest
    assert command("verify", outcome.soup.version.uri).returncode == 0


def test_the_gate_compares_a_few_parents_each_and_of_many_the_newest(client, outcome, tmp_path):
    against = {check.against for check in outcome.verdict.checks}
    parents = [parent.version for parent in outcome.soup.parents]
    assert len(against) == 1
    assert against <= set(parents)
    (ood,) = children(client, outcome.run_id, "ood")
    path = client.download_artifacts(ood.info.run_id, "evidence.json", str(tmp_path))
    scored = json.loads(Path(path).read_text())["roles"]
    examined = [r["version"] for role, r in scored.items() if role.startswith("parent")]
    if len(parents) <= 4:
        assert examined == [v.number for v in parents]
    else:
        assert examined == [COUNT]
        assert against == {Version(NAME, COUNT)}


def test_every_step_after_the_search_takes_the_soup(client, outcome):
    options = ("--model", NAME, "--version", f"v{outcome.soup.version.number}")
    assert command("evaluate", *options).returncode == 0
    gated = command("gate", *options)
    assert gated.returncode == (0 if outcome.verdict.passed else 3), gated.stderr
    assert command("doctor", "--model", NAME).returncode == 0


def test_the_same_request_again_evaluates_nothing_and_finds_its_soup(client, outcome, monkeypatch):
    monkeypatch.setattr(evaluator.Evaluator, "score", None)
    again = mlflow_soup.run(Spec(model=NAME, last=COUNT))
    assert again.soup == outcome.soup


def test_the_report_shows_the_window_and_marks_the_chosen_trial(client, outcome):
    run = client.get_run(outcome.run_id)
    note = run.data.tags["mlflow.note.content"]
    assert "The merged window is" in note
    assert "length of the window, tokens seen" in note
    chosen = [
        r.data.params["weights"]
        for r in children(client, outcome.run_id, "trial")
        if r.data.tags.get("soup.chosen") == "yes"
    ]
    assert chosen == [json.dumps(outcome.soup.recipe.lam)]
    assert run.data.metrics["search/lambda"] == outcome.soup.recipe.lam[-1]
    assert run.data.metrics["search/best"] == outcome.soup.held_out.value
    files = {f.path for f in client.list_artifacts(outcome.run_id)}
    assert {"landscape.png", "landscape.svg", "report.md"} <= files


def test_without_a_terminal_each_trial_prints_a_line(client):
    result = command("run", "--model", NAME, "--last", "6", "--ood-tasks", "")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("trial ")]
    assert lines[0].startswith("trial 1/10: newest alone scores 0.")
    for line in lines:
        assert re.search(r"(alone|p = \S+) scores \d\.\d{4}, best \d\.\d{4} at .*; \d+\.\d s", line)
    assert ", ends by " in lines[0]
    assert 3 < len(lines) <= 10
    again = command("run", "--model", NAME, "--last", "6", "--ood-tasks", "")
    told = [line for line in again.stderr.splitlines() if line.startswith("trial ")]
    measured = [line.rpartition("; ")[0] for line in lines]
    assert told == [f"{line}; scored by an earlier run" for line in measured]


# --- fixed rules


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        ({"method": "wma"}, [1, 3, 5, 7, 9]),
        ({"method": "ema", "ema": 0.5}, [1, 2, 4, 8, 16]),
        ({"method": "wsm"}, [1, 1, 1, 1, 1]),
        ({"method": "wsm", "decay": "2"}, [1, 3, 5, 7, 9]),
        ({"method": "wsm", "decay": "minus-sqrt"}, np.diff(np.sqrt(range(6)))),
    ],
)
def test_a_fixed_rule_scores_the_newest_and_its_merge(client, said, weights):
    outcome = mlflow_soup.run(Spec(model=NAME, last=5, ood_tasks="", **said))
    assert len(outcome.trials) == 2
    wanted = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(outcome.soup.recipe.lam, wanted, atol=2e-4)
    assert outcome.gain.count == 100  # against the newest alone


def test_power_one_is_the_plain_average_bit_for_bit(client):
    two = [
        mlflow_soup.run(Spec(model=NAME, last=6, ood_tasks="", method=method))
        for method in ("uniform", "wsm")
    ]
    assert two[0].soup.recipe == two[1].soup.recipe
    assert two[0].soup.digest == two[1].soup.digest


def test_unequal_times_change_the_weights(client):
    client.set_model_version_tag(NAME, "7", "tokens_seen", str(9 * TOKENS))
    outcome = mlflow_soup.run(Spec(model=NAME, last=5, ood_tasks="", method="wsm"))
    np.testing.assert_allclose(np.array(outcome.soup.recipe.lam) * 7, [1, 1, 1, 1, 3], atol=2e-3)


def test_without_times_the_order_counts_and_the_report_says_so(client):
    outcome = mlflow_soup.run(
        Spec(model=NAME, last=5, ood_tasks="", method="wma", time_tag="nobody")
    )
    assert "No version has the tag" in outcome.summary
    np.testing.assert_allclose(np.array(outcome.soup.recipe.lam) * 25, [1, 3, 5, 7, 9], atol=3e-3)


@pytest.mark.parametrize(("tag", "words"), [(None, "missing"), ("many", "'many'"), ("1", "'1'")])
def test_times_that_tell_no_order_are_refused(client, tag, words):
    if tag is None:
        client.delete_model_version_tag(NAME, "5", "tokens_seen")
    else:
        client.set_model_version_tag(NAME, "5", "tokens_seen", tag)
    with pytest.raises(errors.SpecError, match=f"tokens_seen of {NAME} v5 is {words}"):
        mlflow_soup.run(Spec(model=NAME, last=5))


def test_a_schedule_is_refused_where_the_method_knows_none(client):
    with pytest.raises(errors.SpecError, match="greedy does not know schedules"):
        mlflow_soup.run(Spec(model=NAME, last=5, method="greedy", space="schedule"))


def test_the_policy_asks_for_schedules_only_where_a_method_knows_them(client, caplog):
    client.set_registered_model_tag(NAME, "soup.space", "schedule")
    client.set_registered_model_tag(NAME, "soup.decay", "cosine")
    outcome = mlflow_soup.run(Spec(model=NAME, last=3, method="uniform", ood_tasks="", ema=0.5))
    assert len(outcome.trials) == 4  # with each parent alone
    told = [line for line in caplog.messages if "changes nothing" in line]
    assert told == ["--ema changes nothing for the method uniform; it is for ema"]
    report = run_study("methods", Spec(model=NAME, pairs="v6,v7", methods="bayesopt,wma,uniform"))
    assert {row[1] for row in report.result.table.rows} >= {"bayesopt", "wma", "uniform"}
    pairs = run_study("pairs", Spec(model=NAME, last=3, method="bayesopt", trials=4))
    assert len(pairs.result.table.rows) == 3


@pytest.mark.parametrize("said", [{"windows": "4,6"}, {"windows": "2,2.5"}])
def test_a_study_of_windows_that_do_not_fit_is_refused(client, said):
    with pytest.raises(errors.SpecError, match="window"):
        run_study("schedule", Spec(model=NAME, last=3, **said))


def test_a_schedule_that_keeps_the_newest_alone_can_be_registered_as_a_copy(
    client, trained, tmp_path
):
    for number, noise in ((8, 900.0), (9, 0.5)):  # each merge with v8 knows nothing
        model = toy.noisy(trained, number, noise)
        register(client, toy.save(model, tmp_path / f"v{number}"), NAME)
    said = {"versions": "v8,v9", "space": "schedule", "time_tag": "none", "ood_tasks": ""}
    outcome = mlflow_soup.run(Spec(model=NAME, trials=4, **said))
    assert outcome.soup.version == Version(NAME, 9)
    assert not outcome.soup.registered
    copied = mlflow_soup.run(Spec(model=NAME, trials=4, register_copies=True, **said))
    assert copied.soup.registered
    assert copied.soup.lam == (1.0,)
    assert [s.uri for s in manifest_of(client, copied.soup.version).sources] == [
        f"models:/{NAME}/9"
    ]
    assert command("verify", copied.soup.version.uri).returncode == 0
    again = mlflow_soup.run(Spec(model=NAME, trials=4, register_copies=True, **said))
    assert again.soup.version == copied.soup.version


def test_every_parent_of_a_soup_without_a_schedule_is_a_rival_whatever_is_stored(client):
    outcome = mlflow_soup.run(Spec(model=NAME, last=5, method="uniform"))
    options = ("--model", NAME, "--version", f"v{outcome.soup.version.number}")
    elsewhere = ("--experiment", "soups", "--evidence", "own")
    assert command("evaluate", *options).returncode == 0
    gated = command("gate", *options, *elsewhere)
    assert gated.returncode == (0 if outcome.verdict.passed else 3), gated.stderr
    runs = client.search_runs(
        [e.experiment_id for e in client.search_experiments()],
        "tags.`soup.role` = 'ood'",
        order_by=["attributes.start_time DESC"],
    )
    for run in runs[:2]:
        path = client.download_artifacts(run.info.run_id, "evidence.json")
        roles = json.loads(Path(path).read_text())["roles"]
        assert len([role for role in roles if role.startswith("parent")]) == 5


def test_the_simplex_of_many_versions_can_still_be_asked_for(client):
    spec = Spec(model=NAME, last=5, ood_tasks="", space="simplex", trials=7)
    outcome = mlflow_soup.run(spec)
    assert [t.recipe.lam for t in outcome.trials[:5]] == [tuple(row) for row in np.eye(5)]


# --- track


def track(**said):
    from mlflow_soup.workflows.track import track as workflow

    return workflow(Spec(model=NAME, **said))


def curve(client, run_id, key):
    return {m.step: m.value for m in client.get_metric_history(run_id, key)}


def counted(monkeypatch):
    """The number of evaluations from now on, in a list of one."""
    count, score = [0], evaluator.Evaluator.score

    def counting(self, *parts):
        count[0] += 1
        return score(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", counting)
    return count


def test_track_scores_each_checkpoint_and_the_window_that_ends_there(client):
    report = track(window=3)
    steps = [TOKENS * number for number in range(1, COUNT + 1)]
    raw, merged = (curve(client, report.run_id, f"{c}/toy_letters/acc") for c in ("raw", "merged"))
    assert [*raw] == steps
    assert [*merged] == steps[1:]  # before the second checkpoint nothing can be merged
    same = mlflow_soup.run(Spec(model=NAME, last=3, method="uniform", ood_tasks=""))
    assert merged[steps[-1]] == same.soup.held_out.value
    assert raw[steps[-1]] == same.trials[2].held_out.value
    rows = {row[0]: row for row in report.result.table.rows}
    assert rows[f"v{COUNT}"][2:4] == (raw[steps[-1]], merged[steps[-1]])
    difference = pairing.paired(same.soup.held_out, same.trials[2].held_out)
    told = (difference.value, *pairing.interval(difference, 0.95))
    assert rows[f"v{COUNT}"][4:] == pytest.approx(told)
    assert len(client.search_model_versions(f"name='{NAME}'")) == COUNT + 1  # that of `run`


def test_track_again_evaluates_only_what_is_new(client, tmp_path, trained, monkeypatch):
    first, count = track(window=3), counted(monkeypatch)
    assert track(window=3).run_id == first.run_id
    assert count == [0]
    register(client, toy.save(toy.noisy(trained, 8, 0.9), tmp_path / "v8"), NAME)
    client.set_model_version_tag(NAME, "8", "tokens_seen", str(8 * TOKENS))
    report = track(window=3)
    assert report.run_id == first.run_id
    assert count == [2]
    assert [*curve(client, report.run_id, "raw/objective")][-1] == 8 * TOKENS


def test_the_windows_of_the_last_checkpoints_reach_back_to_older_ones(client, monkeypatch, capsys):
    count = counted(monkeypatch)
    capsys.readouterr()
    few = track(window=3, last=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if ", merged " in line]
    assert [line.split(": raw ")[0] for line in lines] == [
        f"v{COUNT - 1} (1/2)",
        f"v{COUNT} (2/2)",
    ]
    assert ["ends by" in line for line in lines] == [True, False]
    assert [row[0] for row in few.result.table.rows] == [f"v{COUNT - 1}", f"v{COUNT}"]
    assert count == [4]
    every = {row[0]: row for row in track(window=3).result.table.rows}
    assert [*few.result.table.rows] == [every[f"v{COUNT - 1}"], every[f"v{COUNT}"]]


def test_the_last_checkpoints_are_tracked_though_older_ones_are_of_another_run(client):
    client.set_model_version_tag(NAME, "1", "tokens_seen", str(9 * TOKENS))  # of the run before
    client.delete_model_version_tag(NAME, "2", "tokens_seen")
    rows = track(window=5, last=2).result.table.rows
    assert [row[1] for row in rows] == [(COUNT - 1) * TOKENS, COUNT * TOKENS]


def test_a_tag_that_the_user_names_and_no_version_has_is_told_at_once(client, caplog):
    track(window=2, last=2, time_tag="nosuch")
    mlflow_soup.run(Spec(model=NAME, last=2, method="wma", ood_tasks="", time_tag="nosuch"))
    words = "no version has the tag nosuch, so they count as equally spaced"
    assert [r.getMessage() for r in caplog.records].count(words) == 2


def test_track_takes_over_what_searches_have_scored(client, outcome, monkeypatch):
    count = counted(monkeypatch)
    report = track()  # the schedule that the search chose
    assert "as a search chose" in report.summary
    merged = curve(client, report.run_id, "merged/objective")
    assert merged[COUNT * TOKENS] == outcome.soup.held_out.value
    assert count == [2 * COUNT - 1 - 2]  # the newest alone and its window are known


@pytest.mark.parametrize(
    "numbers", [{"power": -1.0, "duration": 3e3}, {"power": 1.0, "duration": -5.0}, {"power": 1.0}]
)
def test_track_passes_over_a_schedule_that_no_search_could_choose(client, numbers):
    with mlflow.start_run(tags={"soup.role": "search", "soup.model": NAME}):
        mlflow.set_tag("soup.time_tag", "tokens_seen")
        mlflow.log_metrics({f"search/{key}": value for key, value in numbers.items()})
    assert "the last 5 checkpoints, decay linear" in track(last=3).summary


def test_track_keeps_its_window_when_a_later_search_chooses_another(client, outcome, monkeypatch):
    first = track()
    with mlflow.start_run(tags={"soup.role": "search", "soup.model": NAME}):
        mlflow.set_tag("soup.time_tag", "tokens_seen")
        mlflow.log_metrics({"search/duration": 2.0 * TOKENS, "search/power": 1.0})
    count = counted(monkeypatch)
    again = track()
    assert again.run_id == first.run_id
    assert count == [0]


def test_times_that_are_no_steps_leave_the_versions_as_steps(client):
    for number in range(1, COUNT + 1):
        client.set_model_version_tag(NAME, str(number), "epoch", str(number / 10))
    report = track(time_tag="epoch", window=2, last=3)
    assert [*curve(client, report.run_id, "raw/objective")] == [5, 6, 7]


@pytest.mark.parametrize("after", [1, 4])
def test_track_cut_short_anywhere_continues(client, monkeypatch, after):
    score, done = evaluator.Evaluator.score, []

    def dies(self, *parts):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return score(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            track(window=2)
    count = counted(monkeypatch)
    report = track(window=2)
    assert count == [2 * COUNT - 1 - after]
    assert len(curve(client, report.run_id, "merged/objective")) == COUNT - 1
    runs = children(client, report.run_id, "look")
    finished = [r for r in runs if r.info.status == "FINISHED"]
    assert len(finished) == 2 * COUNT - 1


def test_the_command_line_tracks_and_writes_copies(client, tmp_path):
    words = ("--last", "3", "--out", str(tmp_path / "copies"), "--experiment", "not made yet")
    result = command("track", "--model", NAME, *words)
    assert result.returncode == 0, result.stderr
    assert f"Checkpoints of {NAME}, raw and merged" in result.stdout
    assert {p.name for p in (tmp_path / "copies").iterdir()} == {
        "track.csv",
        "track.md",
        "track.png",
    }
