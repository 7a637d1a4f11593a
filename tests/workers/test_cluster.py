"""Workers on a Ray cluster: the digits of one process, and what is lost is done again."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import MODEL, use
from mlflow_soup import Spec, errors, run
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.records import Version
from mlflow_soup.request.names import parse_workers
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers import cluster
from mlflow_soup.workers.choose import open_engine
from mlflow_soup.workers.engine import Inline
from mlflow_soup.workers.worker import Mixture
from mlflow_soup.workflows.bench import mixture_of, open_version

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="pip install -e '.[ray]'")


def ended(within=15.0):
    """Whether no process of Ray is left."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not subprocess.run(
            ["pgrep", "-f", "raylet/raylet|gcs_server"], capture_output=True
        ).stdout:
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


def actors():
    found = subprocess.run(["pgrep", "-f", "ray::Remote"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_nothing_is_lost_or_counted_twice_when_actors_and_a_node_go(
    filled, tmp_path, monkeypatch, nodes, figures
):
    spec = {"pair": "v1,v2", "method": "grid", "trials": 600, "alpha": 0.0}
    stores = {name: tmp_path / name for name in ("inline", "cluster")}
    for folder in stores.values():
        folder.mkdir()
    with monkeypatch.context() as patch:
        use(filled, stores["inline"], patch)
        inline = run(Spec(**spec))
    client = use(filled, stores["cluster"], monkeypatch)
    ends, killed, draw = threading.Event(), [], random.Random(0)

    def disturb():
        lost = False
        while not ends.wait(draw.uniform(2.0, 8.0)) and len(killed) < 10:
            if len(killed) == 5 and not lost:
                lost = True
                nodes.remove_node(nodes.list_all_nodes[-1], allow_graceful=False)
                nodes.add_node(num_cpus=1)
            if alive := actors():
                killed.append(draw.choice(alive))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        outcome = run(Spec(**spec, workers="ray:2"))
    finally:
        ends.set()
        thread.join()
    ours = [(t.number, t.recipe, repr(t.held_out)) for t in outcome.trials]
    assert ours == [(t.number, t.recipe, repr(t.held_out)) for t in inline.trials]
    assert outcome.soup.digest == inline.soup.digest
    ids = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(ids, "tags.`soup.role` = 'trial'", max_results=5000)
    assert len(runs) == len(ours) == len({t.run_id for t in outcome.trials})
    assert len(killed) == 10
    figures["two nodes"] = {
        "evaluations": len(ours),
        "actors killed": len(killed),
        "nodes lost": 1,
        "lost": 0,
        "twice": 0,
    }


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
