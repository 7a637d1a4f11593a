"""What the same command finds after it was cut short, and what it says when it cannot go on."""

import shutil
import tempfile
import threading
from pathlib import Path

import mlflow
import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

from conftest import MODEL, register
from mlflow_soup import Spec, errors
from mlflow_soup import run as run_soup
from mlflow_soup.evaluation import evaluator
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.registry import lease, tracking
from mlflow_soup.registry import register as registering
from mlflow_soup.registry.ledger import open_ledger
from mlflow_soup.registry.register import register_soup
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_soups, tags_of
from mlflow_soup.workflows import release

SCORE = evaluator.Evaluator.score
# a search without a gate, where it is not the gate that is cut short
SEARCH = {"pair": "v1,v2", "trials": 4, "ood_tasks": ""}


@pytest.fixture
def count(monkeypatch):
    """How often a λ was evaluated; `stop` raises at the n-th."""

    class Count:
        made = 0
        stop = 0
        error: BaseException = KeyboardInterrupt()

    def score(self, *parts):
        Count.made += 1
        if Count.made == Count.stop:
            raise Count.error
        return SCORE(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", score)
    return Count


def searches(client):
    return tracking.find_runs(client, {"soup.role": "search"})


def trials(client):
    return tracking.find_runs(client, {"soup.role": "trial"})


def test_the_journal_keeps_an_examination_until_its_run_has_ended(client, monkeypatch):
    """Only a run that has ended counts; who is killed before would measure all of it again."""
    ended = []

    def forget(*args):
        ended.append([run.info.status for run in tracking.find_runs(client, {"soup.role": "ood"})])
        kept(*args)

    kept = release.forget
    monkeypatch.setattr(release, "forget", forget)
    soup = run_soup(Spec(pair="v1,v2", method="uniform")).soup
    release.evaluate(Spec(version=soup.version.short, evidence="own"))
    assert ended == [["FINISHED"], ["FINISHED", "FINISHED"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (errors.ObjectiveError("no memory", where="here", fix="none"), "FAILED"),
    ],
)
def test_a_search_that_was_stopped_goes_on_in_the_same_run(client, count, error, status):
    count.stop, count.error = 3, error
    with pytest.raises(type(error)):
        run_soup(Spec(**SEARCH))
    (run,) = searches(client)
    assert run.info.status == status
    assert [t.info.status for t in trials(client)] == ["FINISHED"] * 2
    assert mlflow.active_run() is None
    count.stop = 0
    outcome = run_soup(Spec(**SEARCH))
    assert outcome.run_id == run.info.run_id
    assert client.get_run(outcome.run_id).info.status == "FINISHED"
    assert count.made == len(outcome.trials) + 1
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4


def test_another_request_begins_a_run_of_its_own_and_ends_what_was_left(client, count):
    count.stop = 3
    with pytest.raises(KeyboardInterrupt):
        run_soup(Spec(**SEARCH))
    (before,) = searches(client)
    client.update_run(before.info.run_id, status="RUNNING")  # as kill -9 leaves it
    orphan = client.begin_run(
        before.info.experiment_id, "0.9", {"mlflow.parentRunId": before.info.run_id}
    )
    outcome = run_soup(Spec(**SEARCH, margin=0.02))
    assert outcome.run_id != before.info.run_id
    left = client.get_run(before.info.run_id)
    assert left.info.status == "KILLED"
    assert left.data.tags["soup.orphaned_by"] == outcome.run_id
    assert client.get_run(orphan).info.status == "KILLED"
    assert count.made == len(outcome.trials) + 1  # what it had evaluated counts all the same


def test_a_run_that_mlflow_run_made_goes_on_where_another_stopped(client, count, monkeypatch):
    count.stop = 3
    with pytest.raises(KeyboardInterrupt):
        run_soup(Spec(**SEARCH))
    (before,) = searches(client)
    made = client.create_run(before.info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    outcome = run_soup(Spec(**SEARCH))
    assert outcome.run_id == made
    assert count.made == len(outcome.trials) + 1
    monkeypatch.setenv("MLFLOW_RUN_ID", made)  # mlflow run --run-id
    again = run_soup(Spec(**SEARCH))
    assert (again.run_id, again.soup.version) == (made, outcome.soup.version)
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    before = client.get_run(made)
    with pytest.raises(errors.SpecError, match=r"began with another request: cfg\.margin 0\.05"):
        run_soup(Spec(**SEARCH, margin=0.02))
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with pytest.raises(errors.SpecError, match=r"cfg\.limit not set, now 50"):
        run_soup(Spec(**SEARCH, limit=50))
    after = client.get_run(made)
    assert (after.info.status, after.data.tags) == ("RUNNING", before.data.tags)  # not ours to end


def test_a_run_that_somebody_else_began_keeps_its_name_its_description_and_its_end(
    client, merged, monkeypatch
):
    experiment = client.get_experiment_by_name("soups").experiment_id
    made = client.create_run(experiment, run_name="nightly").info.run_id
    client.set_tag(made, "mlflow.note.content", "The night of the third.")
    for _ in range(2):
        monkeypatch.setenv("MLFLOW_RUN_ID", made)
        assert run_soup(Spec(pair="v1,v2")).run_id == made
        run = client.get_run(made)
        assert (run.info.run_name, run.info.status) == ("nightly", "RUNNING")
        assert run.data.tags["mlflow.note.content"] == "The night of the third."
        assert run.data.tags["soup.gate"] == "passed"
    again = run_soup(Spec(pair="v1,v2"))  # nor is it ours to continue
    assert again.run_id != made
    assert client.get_run(made).info.status == "RUNNING"


def test_a_description_that_a_person_wrote_stays(client, merged):
    client.set_tag(merged.run_id, "mlflow.note.content", "Mine.")
    tracking.log(client, merged.run_id, description="ours")
    assert client.get_run(merged.run_id).data.tags["mlflow.note.content"] == "Mine."
    client.set_tag(merged.run_id, "mlflow.note.content", "")
    for text in ("ours", "ours again"):
        tracking.log(client, merged.run_id, description=text)
        assert client.get_run(merged.run_id).data.tags["mlflow.note.content"] == text


def test_a_search_run_that_a_person_deleted_is_no_dead_end(client, merged):
    client.delete_run(merged.run_id)
    again = run_soup(Spec(pair="v1,v2", promote="champion"))
    assert again.soup.version == merged.soup.version
    assert again.promoted == "alias champion → toy-llm v4"


def test_what_was_scored_out_of_domain_is_not_scored_again(client, monkeypatch):
    examined = []
    evaluate = evaluator.Evaluator.evaluate

    def stop(self, *parts):
        if self._suite.terms[0].name != "toy_letters":
            examined.append(self)
            if len(examined) == 3:
                raise KeyboardInterrupt
        return evaluate(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run_soup(Spec(pair="v1,v2", trials=4))
    assert run_soup(Spec(pair="v1,v2", trials=4)).verdict.passed
    assert len(examined) == 4  # soup and two parents, one of them twice
    journal = cache_folder() / "journal"
    assert [path for path in journal.rglob("*") if path.is_file()] == []


def test_a_disk_without_room_for_the_soup_is_said_before_anything(client, mount, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(mount("tmpfs", "size=64k")))
    with pytest.raises(errors.StoreError, match="MB are needed") as caught:
        run_soup(Spec(pair="v1,v2"))
    assert caught.value.exit_code == 6
    assert searches(client) == []


def test_an_upload_that_arrives_otherwise_becomes_no_version(client, monkeypatch):
    upload = Store.log_model_artifacts

    def spoil(self, model_id, folder):
        upload(self, model_id, folder)
        place = self.get_logged_model(model_id).artifact_location
        with open(f"{place}/model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")

    monkeypatch.setattr(Store, "log_model_artifacts", spoil)
    with pytest.raises(errors.StoreError, match="the uploaded soup holds other weights"):
        run_soup(Spec(**SEARCH))
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 3
    monkeypatch.undo()
    mlflow.set_tracking_uri(client.tracking_uri)


def test_an_upload_that_was_cut_short_is_made_again(client, monkeypatch):
    def stop(self, model_id, status):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finalize_logged_model", stop)
        with pytest.raises(KeyboardInterrupt):
            run_soup(Spec(**SEARCH))
    outcome = run_soup(Spec(**SEARCH))
    experiment = client.get_run(outcome.run_id).info.experiment_id
    states = [m.status for m in client.search_logged_models([experiment]) if m.name == "soup"]
    assert sorted(map(str, states)) == ["FAILED", "READY"]
    assert outcome.soup.version.number == 4


def test_two_threads_that_ask_for_the_same_at_once_get_one_soup(client, count):
    outcomes = []  # tests/registry/test_lease.py lets two processes ask
    threads = [
        threading.Thread(target=lambda: outcomes.append(run_soup(Spec(**SEARCH)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = outcomes
    assert first.soup.version == second.soup.version
    assert count.made == len(first.trials)
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4


def test_of_two_that_registered_the_lower_number_stays(
    client, merged, monkeypatch, tmp_path, checkpoints
):
    first = merged
    tags = tags_of(client, first.soup.version)
    folder = shutil.copytree(checkpoints[0], tmp_path / "soup")
    looks = iter([lambda *args: [], find_soups])  # it looked too early, and once more afterwards
    monkeypatch.setattr(registering, "find_soups", lambda *args: next(looks)(*args))
    version = register_soup(
        client,
        folder,
        name=MODEL,
        run_id=first.run_id,
        parents=[],
        tags=tags,
        params={},
        description="",
        check=lambda tree: None,
    )
    assert version == first.soup.version
    assert find_soups(client, MODEL, {"soup.request": tags["soup.request"]}) == [version]
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4


def test_numbers_that_are_not_finite_never_reach_mlflow(client):
    experiment = client.get_experiment_by_name("soups").experiment_id
    run_id = client.begin_run(experiment, "numbers", {})
    numbers = {"a": 1.0, "b": float("nan"), "c": float("inf"), "d": float("-inf")}
    tracking.log(client, run_id, metrics=[tracking.metric(k, v) for k, v in numbers.items()])
    assert client.get_run(run_id).data.metrics == {"a": 1.0}


def test_who_was_followed_meanwhile_stops(client, count, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    evaluated = threading.Event()

    def follow(self, *parts):
        book = open_ledger(client, MODEL)
        (series,) = book.series("lease/")
        book.append(series, 2, {"host": "elsewhere", "cache": "other"})
        evaluated.wait(1.0)
        return SCORE(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", follow)
    with pytest.raises(errors.OvertakenError):
        run_soup(Spec(**SEARCH))
    assert trials(client) == []  # whoever followed writes them


@pytest.mark.usefixtures("client", "merged")
def test_methods_share_what_was_scored(count):
    before = count.made
    run_soup(Spec(pair="v1,v2", method="uniform"))
    assert count.made == before


def test_a_lambda_that_failed_while_the_store_was_away_is_not_tried_again(client, monkeypatch):
    tried = []

    def fail(self, *parts):
        tried.append(self)
        if len(tried) == 3:
            raise errors.NonFiniteError("not finite", where="here", fix="none")
        return SCORE(self, *parts)

    def away(self, *args, **kwargs):
        raise errors.StoreError("away", where="there", fix="wait")

    monkeypatch.setattr(evaluator.Evaluator, "score", fail)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "begin_child", away)
        with pytest.raises(errors.StoreError):
            run_soup(Spec(**SEARCH))
    made = len(tried)
    outcome = run_soup(Spec(**SEARCH))
    assert len(tried) == made
    assert outcome.trials[2].held_out is None


def test_the_score_of_a_champion_that_was_kept_serves_a_search(client, count, monkeypatch):
    client.set_registered_model_alias(MODEL, "champion", "1")
    with monkeypatch.context() as patch:
        patch.setattr(release, "forget", lambda *args: None)  # killed before it could
        run_soup(Spec(pair="v2,v3", method="uniform"))
    before = count.made
    outcome = run_soup(Spec(pair="v1,v2", method="uniform"))
    assert outcome.soup.version.number == 5
    assert count.made == before + len(outcome.trials) - 2  # v1 was kept, v2 scored by a search


def test_parents_registered_meanwhile_do_not_matter(client, merged, checkpoints):
    register(client, checkpoints[2])
    assert run_soup(Spec(pair="v1,v2")).soup.version == merged.soup.version


def test_evidence_that_is_damaged_is_measured_anew_and_promotes_nothing(client):
    first = run_soup(Spec(pair="v1,v2", trials=4))
    (ood,) = tracking.find_runs(client, {"soup.role": "ood"})
    (file,) = Path(local_file_uri_to_path(ood.info.artifact_uri)).glob("parent-0.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    client.set_registered_model_alias(MODEL, "champion", "2")
    for step in (release.gate, release.promote):
        with pytest.raises(errors.GateError, match="are lost, damaged or unfinished"):
            step(Spec(version="v4", promote="champion"))
    again = run_soup(Spec(pair="v1,v2", trials=4, promote="champion"))
    assert again.soup.version == first.soup.version
    assert again.verdict.passed
    assert len(tracking.find_runs(client, {"soup.role": "ood"})) == 2


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("soup.parents", "banana"),
        ("soup.parents", "1,2/x"),
        ("soup.weights", "0.5,nan"),
        ("soup.weights", None),
        ("soup.lambda", "0.9"),
        ("soup.digest", "sha256:0"),
    ],
)
def test_tags_that_somebody_changed_are_named(client, outcome, tag, value):
    if value is None:
        client.delete_model_version_tag(MODEL, "4", tag)
    else:
        client.set_model_version_tag(MODEL, "4", tag, value)
    for step in (release.gate, release.promote):
        with pytest.raises(errors.MismatchError, match=f"tags: {tag} is"):
            step(Spec(version="v4", promote="live"))
