"""Workers on a Ray cluster: the digits of one process, and what is lost is done again."""

import contextlib
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from conftest import MODEL, use
from mlflow_soup import Spec, errors, run
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.records import Version
from mlflow_soup.request.names import parse_workers
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers import cluster
from mlflow_soup.workers.engine import Inline
from mlflow_soup.workers.open import open_engine
from mlflow_soup.workers.pool import Pool
from mlflow_soup.workers.worker import Mixture
from mlflow_soup.workflows.bench import mixture_of, open_version
from mlflow_soup.workflows.study import run_study

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")


def below(*names):
    """The processes below this one whose command begins with, or ends in, one of the names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            first = process.cmdline()[:1]
            if any(word.startswith(names) or word.endswith(names) for word in first):
                found.append(process)
    return found


def ended(within=15.0):
    """Whether no process of Ray is left."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not below("raylet", "gcs_server", "ray::"):
            return True
        time.sleep(0.5)
    return False


def test_a_cluster_of_this_machine_gives_the_digits_of_one_process(client, capfd):
    inline = run(Spec(pair="v1,v2", evidence="own"))
    capfd.readouterr()
    actors = run(Spec(pair="v1,v2", workers="ray:2", evidence="own"))
    assert [(t.recipe, repr(t.held_out)) for t in actors.trials] == [
        (t.recipe, repr(t.held_out)) for t in inline.trials
    ]
    assert actors.soup.digest == inline.soup.digest
    said = capfd.readouterr()
    assert said.out == ""
    assert "raylet" not in said.err
    assert ended()


@pytest.fixture(scope="module")
def joined():
    """A cluster of this machine that the caller of the package has joined."""
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    "do",
    [
        lambda w: run(Spec(pair="v1,v2", acquisition="gp-hedge", trials=6, workers=w)),
        lambda w: run(Spec(versions="v1,v2,v3", trials=7, workers=w)),
        lambda w: run_study("pairs", Spec(versions="v1,v2,v3", workers=w)),
        lambda w: run_study("landscape", Spec(pair="v1,v2", points=5, workers=w)),
    ],
    ids=["gp-hedge", "three parents", "pairs", "landscape"],
)
def test_all_searches_and_studies_are_those_of_one_process(
    filled, tmp_path, monkeypatch, joined, do
):
    found = []
    for workers in ("", "ray:2"):
        folder = tmp_path / f"w{workers}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            use(filled, folder, patch)
            made = do(workers)
        assert ray.is_initialized()  # whoever joined it leaves it
        if hasattr(made, "result"):
            found.append((made.result.table, made.result.notes))
        else:
            trials = [(t.number, t.recipe, repr(t.held_out)) for t in made.trials]
            found.append((trials, made.soup.digest))
    assert found[0] == found[1]


@pytest.fixture
def nodes(monkeypatch):
    """A standing cluster of two nodes on this machine; its `add` and `remove` change it."""
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")
    standing = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    standing.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", standing.address)
    yield standing
    ray.shutdown()
    standing.shutdown()


def test_nothing_is_lost_or_counted_twice_when_actors_and_a_node_go(
    filled, tmp_path, monkeypatch, nodes, figures, capfd
):
    count, kills = 600, 10
    spec = {"pair": "v1,v2", "method": "grid", "trials": count, "alpha": 0.0}
    stores = {name: tmp_path / name for name in ("inline", "cluster")}
    for folder in stores.values():
        folder.mkdir()
    with monkeypatch.context() as patch:
        use(filled, stores["inline"], patch)
        inline = run(Spec(**spec))
    client = use(filled, stores["cluster"], monkeypatch)
    draw = random.Random(0)
    when = sorted(draw.sample(range(20, count - 20), kills + 1))
    lost = when.pop(kills // 2)
    answer, asked, killed, changed = Pool.answer, [], [], []

    def kill():
        if alive := below("ray::Remote"):
            victim = draw.choice(alive)
            victim.kill()
            killed.append(victim.pid)

    def change():
        nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
        nodes.add_node(num_cpus=1)
        changed.append(1)

    def disturbed(self, *args):
        asked.append(args[0])
        if len(asked) in when:
            threading.Timer(draw.uniform(0.0, 0.3), kill).start()
        if len(asked) == lost:  # in this thread: Ray sets signal handlers
            change()
        return answer(self, *args)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "answer", disturbed)
        outcome = run(Spec(**spec, workers="ray:2"))
    said = capfd.readouterr()
    assert said.out == ""
    assert "raylet" not in said.err
    ours = [(t.number, t.recipe, repr(t.held_out)) for t in outcome.trials]
    assert ours == [(t.number, t.recipe, repr(t.held_out)) for t in inline.trials]
    assert outcome.soup.digest == inline.soup.digest
    ids = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(ids, "tags.`soup.role` = 'trial'", max_results=5000)
    numbers = {run.data.tags["soup.number"] for run in runs}
    figures["two nodes"] = counted = {
        "evaluations": len(ours),
        "actors killed": len(killed),
        "nodes lost": len(changed),
        "lost": count - len(numbers),
        "twice": len(runs) - len(numbers),
    }
    assert counted["lost"] == counted["twice"] == 0
    assert len(killed) >= kills - 2  # one may be drawn while no actor lives
    assert changed


def test_more_workers_than_the_cluster_has_room_for_are_refused(parents_of, nodes):
    inline, donor = parents_of
    with pytest.raises(errors.SpecError, match="has 2 free processors, fewer than 3 workers"):
        open_engine(inline, donor, parse_workers("ray:3"), patience=60.0)


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("127.0.0.1:1", errors.StoreError, "cannot be joined: .*refused"),
        ("ray://head:10001", errors.SpecError, "RAY_ADDRESS=ray://head:10001 cannot be read"),
        ("head", errors.SpecError, "RAY_ADDRESS=head cannot be read"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(parents_of, monkeypatch, address, kind, words):
    monkeypatch.setenv("RAY_ADDRESS", address)
    inline, donor = parents_of
    with pytest.raises(kind, match=words):
        open_engine(inline, donor, parse_workers("ray:1"), patience=60.0)


@pytest.fixture(scope="module")
def parents_of(checkpoints):
    found = find_checkpoint(checkpoints[0], "v1")
    return Inline(LiveModel(found)), Mixture((found,), (digest(found),), (1.0,))


def test_a_node_pulls_what_it_lacks_and_compares_it(client, tmp_path):
    version = Version(MODEL, 1)
    opened = open_version(client, version)
    source = mixture_of([opened]).sources()[0]
    elsewhere = replace(source, root=tmp_path / "not here")
    assert digest(cluster.find_or_pull(elsewhere)) == source.digest
    with pytest.raises(errors.ParentError, match="gets other weights for models:/toy-llm/1"):
        cluster.find_or_pull(replace(elsewhere, digest="sha256:0"))
