"""The example with a longer trajectory: what it registers, and that it learns from nothing else."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

import forked

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "trajectory"
TINY = ["--model", "tiny", "--steps", "24", "--items", "16", "--packages", "networkx"]


@pytest.fixture(scope="module")
def text():
    """The module of the example that reads the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        import text

        yield text
        del sys.modules["text"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the example has run in a tiny size; and how to run it again."""
    folder = tmp_path_factory.mktemp("trajectory")
    left = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    uri = f"sqlite:///{folder}/mlflow.db"
    env = left | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_SOUP_CACHE": str(folder / "cache")}

    def run(*words):
        done = forked.play(str(EXAMPLE), *TINY, *words, cwd=folder, env=env)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    first = run()
    assert first.returncode == 0, first.stderr
    return folder, run, first


@pytest.fixture
def client(trained):
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{trained[0]}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield MlflowClient()
    mlflow.set_tracking_uri(before)


def versions(client, name):
    found = client.search_model_versions(f"name='{name}'")
    return {int(v.version): v.tags for v in found}


def tensors(client, name, number):
    folder = mlflow.artifacts.download_artifacts(f"models:/{name}/{number}")
    return load_file(Path(folder) / "model.safetensors")


def digest(client, name, number):
    parts = sorted(tensors(client, name, number).items())
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in parts)).hexdigest()


def test_it_registers_24_checkpoints_that_have_seen_more_and_more(trained, client):
    found = versions(client, "tiny")
    assert sorted(found) == list(range(1, 25))
    seen = [int(found[n]["tokens_seen"]) for n in sorted(found)]
    assert seen == [1024 * n for n in range(1, 25)]


def test_the_twins_have_seen_as_much_as_a_checkpoint_and_are_others(trained, client):
    twins, found = versions(client, "tiny-annealed"), versions(client, "tiny")
    origins = {n: int(tags["annealed_from"].rpartition("/")[2]) for n, tags in twins.items()}
    assert origins == {1: 8, 2: 14, 3: 20}
    for twin, origin in origins.items():
        assert twins[twin]["tokens_seen"] == found[origin + 4]["tokens_seen"]
        there = digest(client, "tiny-annealed", twin)
        assert there not in (digest(client, "tiny", n) for n in (origin, origin + 4))


def test_an_annealed_twin_moves_less_than_the_run_that_went_on(trained, client):
    def moved(name, number):
        before, after = tensors(client, "tiny", 20), tensors(client, name, number)
        return sum(float((after[k] - before[k]).square().sum()) for k in before)

    assert 0 < moved("tiny-annealed", 3) < moved("tiny", 24)


def test_the_policy_is_left_with_the_model_and_its_tasks_have_their_items(trained, client):
    policy = client.get_registered_model("tiny").tags
    names = [policy[f"soup.{kind}tasks"].removesuffix(":acc") for kind in ("", "ood_", "test_")]
    assert names == ["trajectory_prose", "trajectory_stdlib", "trajectory_test"]
    rows = {}
    for name in names:
        lines = (Path(policy["soup.include_path"]) / f"{name}.jsonl").read_text().splitlines()
        rows[name] = {json.loads(line)["passage"] for line in lines}
        assert len(rows[name]) == 16
    assert not rows["trajectory_prose"] & rows["trajectory_test"]


def test_a_second_call_trains_nothing(trained, client):
    _, run, _ = trained
    before = len(client.search_runs(["0"]))
    again = run()
    assert again.returncode == 0
    assert "nothing to train" in again.stdout
    assert len(client.search_runs(["0"])) == before
    assert len(versions(client, "tiny")) == 24


def test_an_interrupted_run_goes_on_to_the_same_versions(trained, client, text, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import pretrain

    small = replace(pretrain.Settings(), steps_between=1, annealed_over=1)
    whole = replace(small, checkpoints=4, annealed=(1, 3))
    short = replace(small, checkpoints=2, annealed=(1,))
    documents, pins = text.read(["networkx"]), tuple(text.versions(["networkx"]))

    def train(name, settings):
        return pretrain.train(pretrain.Plan(name, settings, 0, pins), documents, "0")

    assert "2 versions of cut and 1 of cut-annealed are new" in train("cut", short)
    assert "2 versions of cut and 1 of cut-annealed are new" in train("cut", whole)
    assert "4 versions of whole and 2 of whole-annealed are new" in train("whole", whole)
    for name, number in (("", 2), ("", 3), ("", 4), ("-annealed", 1), ("-annealed", 2)):
        assert digest(client, f"cut{name}", number) == digest(client, f"whole{name}", number)


def test_another_seed_does_not_mix_with_it(trained):
    _, run, _ = trained
    other = run("--seed", "1")
    assert other.returncode == 2
    assert "is not from this pretraining" in other.stderr


def test_nothing_that_is_evaluated_on_is_in_the_training_text(text):
    documents = text.read(["networkx"])
    by_use = {use: [d for d in documents if d.use is use] for use in text.Use}
    assert all(by_use.values())
    assert len({d.name for d in documents}) == len(documents)
    trained = {p for d in by_use[text.Use.TRAIN] for p in d.prose}
    rows = {row for p in trained for row in text.in_a_row(p)}
    for use in (text.Use.HELD_OUT, text.Use.TEST):
        paragraphs = [p for d in by_use[use] for p in d.prose]
        assert not trained.intersection(paragraphs)
        assert rows.isdisjoint(row for p in paragraphs for row in text.in_a_row(p))
    assert text.read(["networkx"]) == documents


def test_a_package_that_is_not_installed_is_named(trained):
    _, run, _ = trained
    refused = run("--packages", "no-such-package")
    assert refused.returncode == 2
    assert "no-such-package is not installed" in refused.stderr


@pytest.fixture
def schedules(monkeypatch):
    """The benchmarks' module of merge weights and records."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import schedules

    return schedules


def test_schedules_give_the_weights_of_means_that_teams_know(schedules):
    times = [1000 * n for n in range(1, 7)]
    mean, newest = schedules.decayed(times, 4000, 1), schedules.decayed(times, 1000, 3)
    np.testing.assert_allclose(mean, [0, 0, 0.25, 0.25, 0.25, 0.25])
    np.testing.assert_allclose(newest, [0, 0, 0, 0, 0, 1])
    growing = schedules.SCHEMES["WMA"](times, 4000)  # 1, 3, 5, 7 of 16
    np.testing.assert_allclose(growing, [0, 0, 1 / 16, 3 / 16, 5 / 16, 7 / 16])
    ema = schedules.SCHEMES["EMA"](times, 3000)
    np.testing.assert_allclose(ema, np.array([0, 0, 0, 0.49, 0.7, 1]) / 2.19)
    # half a gap before the older version: x is 1/3 and 1
    np.testing.assert_allclose(schedules.decayed(times, 1500, 2)[-2:], [1 / 9, 8 / 9])
    for scheme in schedules.SCHEMES.values():
        assert scheme(times, 6000).sum() == pytest.approx(1)


def test_a_window_of_unequal_gaps_weighs_by_tokens(schedules):
    np.testing.assert_allclose(schedules.decayed([1000, 3000, 4000], 3000, 1), [0, 2 / 3, 1 / 3])


def test_a_record_is_read_as_it_was_written_to_the_step(schedules, tmp_path):
    rng = np.random.default_rng(0)
    cells = schedules.grid(3)
    weights = [schedules.decayed([1, 2, 3], *cell).tolist() for cell in cells]
    likelihoods = -10 * rng.random((7, 4, len(cells)))
    gold = rng.integers(4, size=7)
    schedules.save(tmp_path / "x.npz", cells, weights, {"held_out": (likelihoods, gold)})
    read = schedules.load(tmp_path / "x.npz")
    assert abs(read["held_out"] - likelihoods).max() <= schedules.STEP / 2 + 1e-9
    np.testing.assert_array_equal(read["held_out_gold"], gold)
    np.testing.assert_array_equal(read["weights"], weights)
