"""A tracking server or an artifact store that loses answers, goes away, or is full."""

import random
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from functools import partial

import mlflow
import pytest

import checker
import episodes
import proxy
from conftest import free_port, start_server, stop_server
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.registry import naming
from mlflow_soup.registry.register import register_soup
from mlflow_soup.registry.store import Store

pytestmark = pytest.mark.slow
RACERS, ROUNDS = 4, 100


@pytest.fixture
def served(place):
    """The store behind a real server, and that behind a proxy; artifacts are local folders."""
    port = free_port()
    with ExitStack() as stack:
        servers = [start_server(place.database, port, "--no-serve-artifacts")]
        stack.callback(lambda: stop_server(servers[-1]))
        between = proxy.Proxy(port)
        stack.callback(between.close)
        place.uri = between.uri
        yield between, servers, port


def patient(request, minutes):
    return [*request, f"--store-patience={minutes}"]


# --- answers that are lost


def faulty_creations(seed, share):
    """A plan in which that share of all requests that create something goes wrong."""
    chance = random.Random(seed)

    def plan(method, path):
        creates = method == "POST" and path.endswith(("/create", "/logged-models"))
        return chance.choice(proxy.FAULTS) if creates and chance.random() < share else None

    return plan


def test_who_races_through_lost_answers_has_one_version(served, place, figures):
    between, _, _ = served
    uri = place.uri
    mlflow.set_tracking_uri(uri)
    client = Store()
    client.create_registered_model("raced")
    experiment = client.get_experiment_by_name("soups").experiment_id
    folder = place.root / "soup"
    folder.mkdir()
    (folder / "weights").write_text("as good as any")
    runs = [client.create_run(experiment).info.run_id for _ in range(RACERS)]
    between.plan = faulty_creations(0, 0.4)
    start = episodes.fork.Barrier(RACERS)

    def race(number):
        mlflow.set_tracking_uri(uri)
        found = []
        for round_ in range(ROUNDS):
            start.wait(120)
            version = register_soup(
                Store(patience_s=60.0),
                folder,
                name="raced",
                run_id=runs[number],
                parents=[],
                tags={naming.REQUEST: f"request {round_}"},
                params={},
                description="",
                check=lambda tree: None,
            )
            found.append(version.number)
        return found

    began = time.monotonic()
    agreed = episodes.spread(race, range(RACERS), workers=RACERS)
    seconds = time.monotonic() - began
    between.plan = lambda method, path: None
    with checker.Database(place.database) as database:
        rows = database.rows(
            "SELECT t.value, v.version, m.status, m.lifecycle_stage FROM model_versions v "
            "JOIN model_version_tags t USING (name, version) LEFT JOIN logged_models m "
            "ON v.source = 'models:/' || m.model_id "
            "WHERE v.name = 'raced' AND t.key = 'soup.request' "
            "AND v.current_stage != 'Deleted_Internal'"
        )
        pending = database.rows("SELECT count(*) FROM logged_models WHERE status = 1")[0][0]
        made = database.rows("SELECT count(*) FROM model_versions WHERE name = 'raced'")[0][0]
    figures["racing registrations"] = {
        "racers": RACERS,
        "rounds": ROUNDS,
        "requests": dict(between.passed),
        "versions made": made,
        "versions left": len(rows),
        "rounds in which all agree": sum(len({*found}) == 1 for found in zip(*agreed, strict=True)),
        "versions whose files are READY": sum(row[2:] == (2, "active") for row in rows),
        "left PENDING": pending,
        "seconds": round(seconds),
    }
    assert sorted(row[0] for row in rows) == sorted(f"request {i}" for i in range(ROUNDS))
    assert {row[1] for row in rows} == {*agreed[0]}
    assert all(found == agreed[0] for found in agreed)
    assert {row[2:] for row in rows} == {(2, "active")}
    assert pending == 0


def test_a_search_through_a_store_that_fails_at_each_third_call(
    served, place, prepared, expected, figures
):
    between, _, _ = served
    chance = random.Random(1)
    between.plan = lambda method, path: (
        chance.choice(proxy.FAULTS) if chance.random() < 0.33 else None
    )
    code = episodes.run(place, patient(prepared.request, 5))
    figures["search through a failing store"] = {
        "requests": dict(between.passed),
        "exit code": code,
        "repeated evaluations": place.repeated(),
    }
    assert code == 0, place.said()
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


# --- a server that is away


def test_a_server_that_is_away_in_mid_search_costs_no_evaluation(
    served, place, prepared, expected, figures
):
    _, servers, port = served
    process = episodes.start(place, patient(prepared.request, 5), partial(episodes.slow, 8.0))
    episodes.wait_for(place, 2)
    began = time.monotonic()
    stop_server(servers[-1], signal.SIGKILL)
    before = place.evaluations()[1].total()
    time.sleep(60.0 - (time.monotonic() - began))
    meanwhile = place.evaluations()[1].total() - before
    servers.append(start_server(place.database, port, "--no-serve-artifacts"))
    away = time.monotonic() - began
    code = episodes.finish(process)
    figures["server away in mid-search"] = {
        "seconds": round(away),
        "evaluations meanwhile": meanwhile,
        "exit code": code,
        "repeated evaluations": place.repeated(),
    }
    assert code == 0, place.said()
    assert meanwhile >= 2
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


def test_a_server_that_does_not_come_back_is_exit_code_6_and_nothing_is_lost(
    served, place, prepared, expected, figures
):
    _, servers, port = served
    process = episodes.start(place, patient(prepared.request, 0.1), partial(episodes.slow, 1.0))
    episodes.wait_for(place, 2)
    stop_server(servers[-1], signal.SIGKILL)
    code = episodes.finish(process)
    kept = len(list((place.cache / "journal").rglob("*.parquet")))
    said = place.said()
    servers.append(start_server(place.database, port, "--no-serve-artifacts"))
    again = episodes.run(place, prepared.request)
    figures["server gone for good"] = {
        "exit code": code,
        "in the journal": kept,
        "exit code of the same command later": again,
        "repeated evaluations": place.repeated(),
    }
    assert code == 6, said
    assert "run the same command again" in said
    assert kept >= 2
    assert again == 0, place.said()
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


# --- an artifact store that is away


@pytest.fixture
def bucket(tmp_path):
    """A store that speaks S3, behind a proxy; the URI of a folder there, and its proxy."""
    pytest.importorskip("moto")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    between = proxy.Proxy(port)
    try:
        for _ in range(240):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/soups", method="PUT")
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield "s3://soups/all", between
    finally:
        between.close()
        process.terminate()
        process.wait(30)


@pytest.fixture
def kept_remotely(bucket, place):
    """The environment in which new artifacts go to the bucket."""
    uri, between = bucket
    with checker.Database(place.database) as database:
        database.rows("UPDATE experiments SET artifact_location = ? WHERE name = 'soups'", uri)
        database.commit()
    return {
        "MLFLOW_S3_ENDPOINT_URL": between.uri,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def fetch_all(place, environment):
    """Bring the artifacts of the bucket where the checker looks for them."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="soups", Prefix="all/"):
        for found in page.get("Contents", []):
            path = place.artifacts / found["Key"].removeprefix("all/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file("soups", found["Key"], str(path))
    with checker.Database(place.database) as database:
        for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location")):
            database.rows(
                f"UPDATE {table} SET {column} = replace({column}, 's3://soups/all', ?)",
                str(place.artifacts),
            )
        database.commit()


def test_an_artifact_store_that_is_away_in_mid_search_costs_no_evaluation(
    bucket, kept_remotely, place, prepared, expected, figures
):
    _, between = bucket
    process = episodes.start(
        place, patient(prepared.request, 5), partial(episodes.slow, 3.0), environment=kept_remotely
    )
    episodes.wait_for(place, 2)
    before = place.evaluations()[1].total()
    with between.away():
        time.sleep(20.0)
        meanwhile = place.evaluations()[1].total() - before
    code = episodes.finish(process)
    figures["S3 away in mid-search"] = {
        "seconds": 20,
        "evaluations meanwhile": meanwhile,
        "exit code": code,
        "repeated evaluations": place.repeated(),
    }
    assert code == 0, place.said()
    fetch_all(place, kept_remotely)
    assert meanwhile >= 2
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


def test_an_artifact_store_that_stays_away_is_exit_code_6_and_nothing_is_lost(
    bucket, kept_remotely, place, prepared, expected, figures
):
    _, between = bucket
    process = episodes.start(
        place,
        patient(prepared.request, 0.1),
        partial(episodes.slow, 1.0),
        environment=kept_remotely,
    )
    episodes.wait_for(place, 2)
    with between.away():
        code = episodes.finish(process)
    said = place.said()
    again = episodes.finish(episodes.start(place, prepared.request, environment=kept_remotely))
    figures["S3 gone for good"] = {
        "exit code": code,
        "exit code of the same command later": again,
        "repeated evaluations": place.repeated(),
    }
    assert code == 6, said
    assert again == 0, place.said()
    fetch_all(place, kept_remotely)
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


# --- disks that are full


def fill(folder):
    """Leave no room on a file system."""
    with (folder / "ballast").open("wb", 0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def fill_after(folder, evaluations):
    """Leave no room once so many have ended; what the last of them said was kept before."""
    evaluate, ended = Evaluator.evaluate, [0]

    def evaluate_until(self, *parts):
        if ended[0] == evaluations:
            fill(folder)
        ended[0] += 1
        return evaluate(self, *parts)

    Evaluator.evaluate = evaluate_until


@pytest.mark.parametrize("evaluations", [2, 5])
@pytest.mark.parametrize("what", ["artifacts", "cache", "temporary", "database"])
def test_a_disk_that_is_full_in_mid_search_is_exit_code_6_and_nothing_is_lost(
    mount, tmp_path, prepared, expected, figures, what, evaluations
):
    disk = mount("tmpfs", "size=96m")
    place = episodes.make_place(prepared, tmp_path / "place", **{what: disk})
    code = episodes.run(place, prepared.request, partial(fill_after, disk, evaluations))
    said = place.said()
    found = checker.unverified(place.database)
    (disk / "ballast").unlink()
    again = episodes.run(place, prepared.request)
    figures[f"disk of {what} full after {evaluations} evaluations"] = {
        "exit code": code,
        "exit code of the same command with room": again,
        "repeated evaluations": place.repeated(),
    }
    assert code == 6, said
    assert found == []
    assert "space" in said or "needed" in said
    assert again == 0, place.said()
    assert checker.problems(place.database, expected) == []
    # where the journal has no room, what was just being evaluated cannot be kept
    assert place.repeated() <= (what == "cache")
