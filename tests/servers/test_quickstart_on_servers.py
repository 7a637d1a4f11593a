"""The quickstart's job on real servers: PostgreSQL, S3, and MLflow's server before them.

`proxied` is a server through which the files go; its clients have no key of S3. `direct` is one
whose clients write to S3 themselves. The same job on a file of SQLite says what must come out.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from mlflow.utils.file_utils import local_file_uri_to_path
from transformers import AutoModelForCausalLM

import forked
from conftest import start_server, stop_server
from mlflow_soup.registry import naming
from mlflow_soup.registry.store import Store
from services import S3, Postgres, free_port

pytestmark = pytest.mark.slow

JUDGED = (0, 3)  # after so little training, and against a champion, the gate may well refuse
# as `mlflow-soup quickstart`, with less training and fewer questions
QUICK = ("--steps", "26", "--items", "60", "--trials", "4")
MODEL, SOUP = "quickstart-llm", "models:/quickstart-llm/14"
RUN = ("run", "--model", MODEL, "--pair", "v12,v13", "--trials", "4")
KINDS = {  # kind of server → driver of its database, and its options
    "proxied": ("postgresql", ("--serve-artifacts", "--artifacts-destination", "s3://proxied/")),
    "direct": (
        "postgresql+psycopg2",
        ("--no-serve-artifacts", "--default-artifact-root", "s3://direct/root"),
    ),
}
ROOTS = {"proxied": "", "direct": "root/"}  # what the names of all objects begin with
# no key comes from the machine that the tests run on
NO_KEYS = {
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Place:
    """A store, and a folder in which commands for it run.

    Attributes:
        name: `sqlite`, or the kind of server.
        uri: the tracking URI.
        folder: the folder of the commands.
        keys: variables of the commands.
    """

    name: str
    uri: str
    folder: Path
    keys: Mapping[str, str]

    def environment(self, **more: str) -> dict[str, str]:
        left = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_S3"))}
        cache = {"MLFLOW_SOUP_CACHE": str(self.folder / "cache")}
        return {**left, **NO_KEYS, **cache, "MLFLOW_TRACKING_URI": self.uri, **self.keys, **more}

    def start(self, *words: str, **more: str) -> forked.Play:
        env = self.environment(**more)
        return forked.Play("mlflow_soup", *words, cwd=self.folder, env=env)

    def soup(self, *words: str, **more: str) -> "CompletedProcess[str]":
        """Run `mlflow-soup`; no secret and no traceback is in what it says."""
        return self.checked(self.start(*words, **more).finish(), **more)

    def checked(self, done: "CompletedProcess[str]", **more: str) -> "CompletedProcess[str]":
        assert "Traceback" not in done.stderr, done.stderr
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            if secret := {**self.keys, **more}.get(variable):
                assert secret not in done.stdout + done.stderr
        return done

    @cached_property
    def client(self) -> Store:
        return Store(tracking_uri=self.uri)

    def trials(self) -> list[str]:
        """The λ of each trial that was finished."""
        query = f"tags.`{naming.ROLE}` = 'trial' and status = 'FINISHED'"
        return sorted(run.data.params["lambda"] for run in self.client.search_runs(["0"], query))

    def soup_id(self) -> str:
        """The id of the soup's logged model."""
        source: str = self.client.get_model_version(MODEL, "14").source
        return source.rpartition("/")[2]

    def new_cache(self) -> dict[str, str]:
        """The variable of a cache that holds nothing."""
        return {"MLFLOW_SOUP_CACHE": str(self.folder / f"cache-{time.monotonic_ns()}")}


@dataclass
class Served(Place):
    """A place on a real server; `name` is that of its bucket.

    Attributes:
        s3: where its files are.
    """

    s3: S3

    @cached_property
    def prefix(self) -> str:
        """What the names of the soup's objects begin with."""
        return f"{ROOTS[self.name]}0/models/{self.soup_id()}/artifacts/"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A file of SQLite in which the quickstart has run."""
    folder = tmp_path_factory.mktemp("sqlite")
    place = Place("sqlite", f"sqlite:///{folder}/mlflow.db", folder, {})
    done = place.soup("quickstart", *QUICK)
    assert done.returncode in JUDGED, done.stderr
    return place


def serve(name: str, postgres: Postgres, s3: S3, folder: Path) -> Iterator[Served]:
    """A server on PostgreSQL and S3, on which the quickstart has run."""
    driver, options = KINDS[name]
    s3.client.create_bucket(Bucket=name)
    port, uri = free_port(), f"{driver}://{postgres.create(name)}"
    process = start_server(folder / "unused.db", port, *options, uri=uri, env=s3.keys)
    try:
        keys = s3.keys if name == "direct" else {}
        place = Served(name, f"http://127.0.0.1:{port}", folder, keys, s3)
        done = place.soup("quickstart", *QUICK)
        assert done.returncode in JUDGED, done.stderr
        assert f"registered as {SOUP}" in done.stdout
        # so wide that the gate passes the soup, for there is no champion yet
        place.client.set_registered_model_tag(MODEL, "soup.margin", "0.5")
        promoted = place.soup(*RUN, "--promote", "alias:champion")
        assert promoted.returncode == 0, promoted.stderr
        assert f"promoted: alias champion → {MODEL} v14" in promoted.stdout
        yield place
    finally:
        stop_server(process)


@pytest.fixture(scope="module")
def proxied(
    postgres: Postgres, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    yield from serve("proxied", postgres, s3, tmp_path_factory.mktemp("proxied"))


@pytest.fixture(scope="module")
def direct(
    postgres: Postgres, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    yield from serve("direct", postgres, s3, tmp_path_factory.mktemp("direct"))


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest) -> Served:
    """Each kind of server, one after the other."""
    found: Served = request.getfixturevalue(request.param)
    return found


def check_objects(place: Served) -> None:
    """Each object in S3 belongs to a run, or to a model that is complete; no upload is open."""
    assert not place.s3.client.list_multipart_uploads(Bucket=place.name).get("Uploads")
    models = place.client.search_logged_models(["0"], max_results=50)
    ready = {model.model_id for model in models if model.status == "READY"}
    runs = {run.info.run_id for run in place.client.search_runs(["0"], max_results=500)}
    for key in place.s3.objects(place.name):
        kind, name, *_ = key.removeprefix(f"{ROOTS[place.name]}0/").split("/")
        assert name in ready if kind == "models" else kind in runs, key


def test_the_soup_is_that_of_a_file_of_sqlite(expected: Place, served: Served) -> None:
    soups = [place.client.get_model_version(MODEL, "14").tags for place in (expected, served)]
    for tag in (naming.DIGEST, naming.LAMBDA, naming.PARENTS):
        assert soups[0][tag] == soups[1][tag]
    assert expected.trials() == served.trials()


def test_the_champion_is_verified_explained_and_exported(served: Served) -> None:
    fresh, champion = served.new_cache(), f"models:/{MODEL}@champion"
    verified = served.soup("verify", champion, "--promoted", **fresh)
    assert verified.returncode == 0, verified.stdout
    family = served.soup("lineage", champion)
    assert family.returncode == 0, family.stderr
    assert re.findall(r"v(\d+)", family.stdout)[:3] == ["14", "12", "13"]
    out = served.folder / "exported"
    exported = served.soup("export", champion, "--out", str(out), **fresh)
    assert exported.returncode == 0, exported.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_bucket_holds_the_bytes_of_the_soup_and_nothing_half_written(
    expected: Place, served: Served
) -> None:
    logged = expected.client.get_logged_model(expected.soup_id())
    folder = Path(local_file_uri_to_path(logged.artifact_location))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    assert any(name.endswith(".safetensors") for name in files)
    for name, path in files.items():
        held = served.s3.read(served.name, served.prefix + name)
        assert held == path.read_bytes() or name == "soup_manifest.json", name
    keys = served.s3.objects(served.name)
    assert {key for key in keys if key.startswith(served.prefix)} == {
        served.prefix + name for name in files
    }
    check_objects(served)


def test_the_same_job_again_finds_everything_and_changes_nothing(served: Served) -> None:
    before, trials = served.s3.objects(served.name), served.trials()
    done = served.soup(*RUN, "--promote", "alias:champion", **served.new_cache())
    assert done.returncode == 0, done.stderr
    assert f"an earlier run registered it as {SOUP}" in done.stdout
    after = served.s3.objects(served.name)
    assert before.items() <= after.items()
    assert not any("/models/" in key for key in after.keys() - before.keys())
    assert served.trials() == trials


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_stage_is_moved_and_what_it_replaces_is_archived(served: Served) -> None:
    """With psycopg 3, which the proxied server has, MLflow itself cannot do it: mlflow#24592."""
    client = served.client
    client.transition_model_version_stage(MODEL, "13", "Production", False)
    words = ("promote", "--model", MODEL, "--version", "v14", "--promote", "stage:Production")
    done = served.soup(*words)
    assert done.returncode == 0, done.stderr
    stages = {int(v.version): v.current_stage for v in client.search_model_versions()}
    assert (stages[13], stages[14]) == ("Archived", "Production")


# --- S3 holds something else, or refuses


@pytest.fixture
def weights(served: Served) -> Iterator[str]:
    """The name of the object that holds the soup's weights; it is mended in the end."""
    found = served.s3.objects(served.name)
    (key,) = (k for k in found if k.startswith(served.prefix) and k.endswith(".safetensors"))
    content = served.s3.read(served.name, key)
    yield key
    served.s3.client.put_object(Bucket=served.name, Key=key, Body=content)


def check_refused(served: Served, words: str) -> None:
    """The soup is neither verified nor promoted nor exported, be it in the cache or not."""
    out = served.folder / "refused"
    for command in (
        ("verify", SOUP),
        ("promote", "--model", MODEL, "--version", "v14", "--promote", "alias:live"),
        ("export", SOUP, "--out", str(out)),
    ):
        for cache in ({}, served.new_cache()):
            done = served.soup(*command, **cache)
            assert done.returncode in (3, 4), (command, done)
            assert words in done.stdout + done.stderr
    assert not out.exists()
    assert "live" not in served.client.get_registered_model(MODEL).aliases


def test_an_object_that_somebody_changed_is_refused(served: Served, weights: str) -> None:
    content = served.s3.read(served.name, weights)
    changed = content[:-1] + bytes([content[-1] ^ 1])
    served.s3.client.put_object(Bucket=served.name, Key=weights, Body=changed)
    check_refused(served, "weight is changed")


def test_an_object_that_somebody_deleted_is_missed(served: Served, weights: str) -> None:
    served.s3.client.delete_object(Bucket=served.name, Key=weights)
    check_refused(served, "has 0 folders with config.json and *.safetensors")


WRONG_KEYS = {
    "none": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentialsError"),
    "of nobody": (
        {"AWS_ACCESS_KEY_ID": "AKIAWRONG", "AWS_SECRET_ACCESS_KEY": "wrong-s3cret"},
        "InvalidAccessKeyId",
    ),
    "with a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong-s3cret"}, "SignatureDoesNotMatch"),
}


@pytest.mark.parametrize("keys", WRONG_KEYS)
def test_a_client_whose_keys_s3_refuses_is_told_so(direct: Served, keys: str) -> None:
    variables, said = WRONG_KEYS[keys]
    for command in (("verify", SOUP), ("run", "--model", MODEL, "--pair", "v10,v11")):
        done = direct.soup(*command, **variables, **direct.new_cache())
        assert done.returncode == 6, done.stderr
        assert said in done.stderr
        assert "check the artifact store and its credentials" in done.stderr
        assert "MLFLOW_TRACKING_USERNAME" not in done.stderr


def test_a_client_that_cannot_reach_s3_downloads_through_the_server(proxied: Served) -> None:
    port = proxied.uri.rpartition(":")[2]
    blocked = {  # all addresses but that of the server
        "MLFLOW_TRACKING_URI": f"http://localhost:{port}",
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": f"localhost:{port}",
    }
    through = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false"}
    done = proxied.soup("verify", SOUP, **blocked, **through, **proxied.new_cache())
    assert done.returncode == 0, done.stdout + done.stderr


# --- S3 is away


TRIAL = re.compile(r"^trial \d/6: λ = (\S+) scores .*; ([\d.]+) s", re.M)


def search_until_s3_is_away(served: Served, pair: str, minutes: str) -> forked.Play:
    """A search that runs; S3 went away after its second trial."""
    before = items(served)
    words = ("run", "--model", MODEL, "--pair", pair, "--trials", "6", "--store-patience", minutes)
    process = served.start(*words)
    while items(served) < before + 2:
        assert process.poll() is None, process.finish()
        time.sleep(0.05)
    served.s3.service.kill()
    return process


def items(served: Served) -> int:
    """How many trials have left their answers in S3."""
    return sum(key.endswith("items.parquet") for key in served.s3.objects(served.name))


def test_s3_that_is_away_in_mid_search_costs_no_evaluation(served: Served) -> None:
    process = search_until_s3_is_away(served, "v10,v11", "5")
    time.sleep(3)
    served.s3.service.start()
    done = served.checked(process.finish())
    assert done.returncode in JUDGED, done.stderr
    assert "registered as models:/" in done.stdout
    lams = [lam for lam, _ in TRIAL.findall(done.stderr)]
    assert len(lams) == len({*lams}) > 2
    check_objects(served)


def test_s3_that_stays_away_is_exit_code_6_and_the_same_command_continues(served: Served) -> None:
    process = search_until_s3_is_away(served, "v8,v9", "0.05")
    done = served.checked(process.finish())
    served.s3.service.start()
    assert done.returncode == 6, done.stderr
    assert "run the same command again: it continues" in done.stderr
    scored = {lam for lam, _ in TRIAL.findall(done.stderr)}
    assert len(scored) >= 2
    again = served.soup("run", "--model", MODEL, "--pair", "v8,v9", "--trials", "6")
    assert again.returncode in JUDGED, again.stderr
    assert "registered as models:/" in again.stdout
    assert all(float(s) == 0 for lam, s in TRIAL.findall(again.stderr) if lam in scored)
    check_objects(served)
