# ruff: noqa: E402 (what comes before an import is for that import)
import contextlib
import gc
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# before anything heavy is imported, and for every process a test starts
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    OMP_NUM_THREADS="1",  # models of a few thousand parameters are slower on two threads
)

gc.disable()  # as the commands do: looking for garbage takes as long as importing torch

import mlflow
import pytest
import sqlalchemy
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, settings
from mlflow import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

import mlflow_soup
import services
import toy
from mlflow_soup import Outcome, Spec
from mlflow_soup.files.cache import CACHE_ENV
from mlflow_soup.records import Version
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import model_id
from services import free_port as free_port

gc.freeze()
gc.enable()
gc.set_threshold(5_000, 50, 1_000)  # what tests import takes 0.4 s to look through, once in 6 s

if TYPE_CHECKING:  # they import this module
    import checker
    import episodes

torch.set_num_threads(1)
# the machine may be busy; and no run is refused for an example that the one before did not have
unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("unhurried", derandomize=True, **unhurried)
settings.register_profile(
    "searching", derandomize=False, **unhurried
)  # pytest --hypothesis-profile searching
settings.load_profile("unhurried")

MODEL = "toy-llm"
# they take minutes each: begun first, so that no worker is left with one when all else is done
COSTLY = (
    *("docs/test_code_blocks.py", "workflows/test_run.py", "workflows/test_study.py"),
    *("workers/test_same.py", "workers/test_pool.py", "workers/test_driver.py"),
    *("workflows/test_watch.py", "workflows/test_windows.py"),
    *("examples/test_actions.py", "examples/test_receiver.py"),
    *("workflows/test_trials.py", "faults/test_resume.py", "hostile/test_forged.py"),
    *("faults/test_faults.py", "hostile/test_secrets.py", "test_quickstart.py", "test_cli.py"),
    *("workflows/test_signed.py", "search/test_ask.py", "hostile/test_hostile.py"),
    *("workflows/test_job.py", "workflows/test_doctor.py", "hostile/test_task_folders.py"),
    *(
        "workflows/test_export.py",
        "test_mlproject.py",
        "registry/test_lease.py",
        "registry/test_versions.py",
    ),
)
DRIVERS = ("postgresql", "postgresql+psycopg2")  # with SQLAlchemy 2.1 the first is psycopg 3
FIGURES = pytest.StashKey[dict[str, object]]()


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _do_not_wait_for_the_disk(connection: object, _: object) -> None:
    """Commit without fsync: a killed process loses nothing so, and no test cuts the power."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}
    if not hasattr(config, "workerinput"):  # the workers share their parent's
        cache = tempfile.TemporaryDirectory()  # not the user's
        config.add_cleanup(cache.cleanup)
        os.environ[CACHE_ENV] = cache.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(COSTLY)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the slow tests counted; as JSON too, where a variable names a file."""
    figures = terminalreporter.config.stash[FIGURES]
    for what, counted in figures.items():
        terminalreporter.write_line(f"{what}: {json.dumps(counted)}")
    if figures and (file := os.environ.get("MLFLOW_SOUP_FIGURES")):
        Path(file).write_text(json.dumps(figures, indent=2))


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> dict[str, object]:
    """What → what was counted; printed in the end."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def trained():
    return toy.train(120)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    return toy.write_tasks(tmp_path_factory.mktemp("tasks"), count=100)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, trained) -> list[Path]:
    """Folders of three checkpoints: two noisy ones, and the second gone blind to digits."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = [
        toy.noisy(trained, 1, 0.9),
        toy.noisy(trained, 2, 0.9),
        toy.damage_digits(toy.noisy(trained, 2, 0.9)),
    ]
    return [toy.save(model, root / f"v{i}") for i, model in enumerate(models, start=1)]


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A copy of the first checkpoint, for a test to spoil."""
    return shutil.copytree(checkpoints[0], tmp_path / "spoilt")


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[[str, str], Path]]:
    """Mounts a file system of memory; skips the test where nobody may."""
    mounted = []

    def mount(kind: str, options: str = "defaults") -> Path:
        folder = tmp_path / f"{kind}{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", kind, "-o", options, kind, folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting is not permitted here: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def register(client: MlflowClient, folder: Path, name: str = MODEL) -> int:
    """A checkpoint folder as a new version, the way a training loop does it."""
    logged = mlflow.initialize_logged_model(name="checkpoint")
    client.log_model_artifacts(logged.model_id, str(folder))
    mlflow.finalize_logged_model(logged.model_id, "READY")
    created = client.create_model_version(
        name, f"models:/{logged.model_id}", model_id=logged.model_id
    )
    return int(created.version)


def fill(client: MlflowClient, checkpoints: list[Path], tasks: Path, name: str = MODEL) -> None:
    """A registered model with a policy, and a version for each checkpoint."""
    policy = {
        "soup.tasks": "toy_letters",
        "soup.ood_tasks": "toy_digits,toy_digits_bpb:bits_per_byte",
        "soup.margin": "0.05",
        "soup.include_path": str(tasks),
        "soup.trials": "6",
    }
    client.create_registered_model(name, tags=policy)
    for folder in checkpoints:
        register(client, folder, name)


@pytest.fixture(scope="session")
def filled(tmp_path_factory, checkpoints, tasks) -> Path:
    """A database that every test gets a copy of: making one takes MLflow ten seconds."""
    from mlflow_soup.evaluation.library import library

    library()  # now, while the cache is that of all workers: one of them makes it for the other
    root = tmp_path_factory.mktemp("store")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    client = MlflowClient()
    client.create_experiment("soups", artifact_location=f"{root}/artifacts")
    mlflow.set_experiment("soups")
    fill(client, checkpoints, tasks)
    return root / "mlflow.db"


@pytest.fixture(scope="session")
def finished(filled, tmp_path_factory) -> tuple[Path, Outcome]:
    """A copy of that database in which v1,v2 were merged and promoted."""
    spec = Spec(pair="v1,v2", promote="alias:champion")
    return _run(spec, filled, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def examined(filled, tmp_path_factory) -> tuple[Path, Outcome]:
    """A copy of that database in which v1,v2 were merged, and passed the gate."""
    return _run(Spec(pair="v1,v2"), filled, tmp_path_factory.mktemp("examined"))


def _run(spec: Spec, filled: Path, folder: Path) -> tuple[Path, Outcome]:
    database = folder / "mlflow.db"
    shutil.copy(filled, database)
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    mlflow.set_experiment("soups")
    return database, mlflow_soup.run(spec)


@pytest.fixture(autouse=True)
def _registry_of_its_own() -> Iterator[None]:
    """No test works on the registry of another: MLflow leaves it in the environment, too."""
    os.environ.pop("MLFLOW_REGISTRY_URI", None)
    yield
    mlflow.set_registry_uri("")
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


@pytest.fixture
def client(filled, tmp_path, monkeypatch) -> MlflowClient:
    """A real store of its own with `toy-llm` versions 1 to 3."""
    return use(filled, tmp_path, monkeypatch)


@pytest.fixture
def outcome(finished, client, tmp_path, monkeypatch) -> Outcome:
    """What the main job returned; `client` then sees the store as it left it."""
    database, returned = finished
    use(database, tmp_path, monkeypatch)
    return returned


@pytest.fixture
def merged(examined, client, tmp_path, monkeypatch) -> Outcome:
    """The same for the job without a promotion; its artifacts are shared, and not to be spoilt."""
    database, returned = examined
    use(database, tmp_path, monkeypatch)
    return returned


def use(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Work on a copy of a database. Artifacts are shared, but nobody overwrites any."""
    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_SOUP_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("soups")
    return Store()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Files of a private and a public key, which belong to the gate."""
    return make_keys(tmp_path, "gate")


def make_keys(folder: Path, name: str, key: Any = None) -> tuple[Path, Path]:
    """Files of a private and a public key in PEM; of a new key on P-256 if none is given."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, info))
    return private, public


@pytest.fixture
def edit() -> Iterator[Callable[[Path, bytes], None]]:
    """Changes a file of the artifact store, which other tests share; undone in the end."""
    before: dict[Path, bytes | None] = {}

    def edit(path: Path, content: bytes) -> None:
        before.setdefault(path, path.read_bytes() if path.exists() else None)
        path.write_bytes(content)

    yield edit
    for path, content in before.items():
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)


def folder_of(client: Store, version: Version) -> Path:
    """The files of a version in a local store."""
    location = client.get_logged_model(model_id(client, version)).artifact_location
    return Path(local_file_uri_to_path(location))


def start_server(
    database: Path,
    port: int,
    *artifacts: str,
    uri: str = "",
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """A real `mlflow server` on loopback, once it answers; in a process group of its own.

    Its database is a file of SQLite, or that at `uri`. `env` has more variables for it.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", *artifacts]
    command += ["--backend-store-uri", uri or f"sqlite:///{database}"]
    process = subprocess.Popen(
        command,
        cwd=database.parent,
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300  # a busy machine without byte code
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return process
        except OSError:
            time.sleep(0.5)
    stop_server(process)
    pytest.fail(f"mlflow server did not start; its exit code: {process.returncode}")


def stop_server(process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> None:
    """End a server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    process.wait(120)


@pytest.fixture(scope="session")
def postgres() -> Iterator[services.Postgres]:
    """A PostgreSQL on loopback."""
    with services.postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[services.S3]:
    """A Ceph gateway on loopback, which speaks S3."""
    with services.ceph() as server:
        yield server


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory) -> Path:
    """Where the server keeps its database and artifacts."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(server_folder) -> Iterator[str]:
    """A real `mlflow server` on loopback; its URI."""
    port = free_port()
    artifacts = ("--artifacts-destination", str(server_folder / "artifacts"))
    process = start_server(server_folder / "mlflow.db", port, *artifacts)
    yield f"http://127.0.0.1:{port}"
    stop_server(process)


@pytest.fixture
def server_client(server, tmp_path, monkeypatch) -> MlflowClient:
    """A client of the server, whose store is shared by all tests that use it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_SOUP_CACHE", str(tmp_path / "cache"))
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment("soups")
    return Store()


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A folder for PATH in which `mlflow-soup` starts at once."""
    import warm

    with warm.programs() as folder:
        yield folder


@pytest.fixture(scope="session")
def prepared() -> Iterator["episodes.Store"]:
    """A store whose copies are searched again and again, and disturbed."""
    import episodes

    with episodes.swept(episodes.room()) as root:
        yield episodes.prepare(root)


@pytest.fixture(scope="session")
def expected(prepared: "episodes.Store") -> "checker.Left":
    """What a search leaves there that nobody disturbs."""
    import checker
    import episodes

    with episodes.swept(prepared.database.parent / "expected") as root:
        place = episodes.make_place(prepared, root)
        assert episodes.run(place, prepared.request) == 0, place.said()
        assert checker.problems(place.database) == []
        return checker.look(place.database)


@pytest.fixture
def place(prepared: "episodes.Store", tmp_path: Path) -> "episodes.Place":
    """A copy of that store, for one test."""
    import episodes

    return episodes.make_place(prepared, tmp_path / "place")
