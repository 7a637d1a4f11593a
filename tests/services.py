"""Real servers on loopback: PostgreSQL and S3, started by the scripts of `examples/deployment`.

They keep everything in a folder of their own. A user without rights runs them, for PostgreSQL
refuses root. Where Debian's packages are missing, the test is skipped.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest

ROOT = Path(__file__).parents[1]
DEPLOYMENT = ROOT / "examples" / "deployment"
README = (DEPLOYMENT / "README.md").read_text(encoding="utf-8")
(PACKAGES,) = re.findall(r"^apt-get install .*$", README, re.M)
CEPH = ("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
NOBODY = {"user": "nobody", "group": "nogroup", "extra_groups": ()}
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def without_rights() -> Mapping[str, Any]:
    """Arguments of `Popen` for a user without rights: nobody, or who we are if that is not root."""
    return NOBODY if os.getuid() == 0 else {}


def skip_unless(installed: bool) -> None:
    """Skip the test where Debian's packages are missing."""
    if not installed:
        pytest.skip(f"this test needs servers: {PACKAGES}")


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of the user without rights; gone in the end, with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix="soup-servers-"))
    try:
        if os.getuid() == 0:
            shutil.chown(path, NOBODY["user"], NOBODY["group"])
        yield path
    finally:
        shutil.rmtree(path)


class Service:
    """A script that runs in the foreground, in a process group of its own.

    Args:
        script: of `examples/deployment`.
        folder: a folder of the user without rights; the script works on a copy of the example.
        settings: the variables that the script reads.
        stop: the signal that ends it.
        ready: whether it answers.
    """

    def __init__(
        self,
        script: str,
        folder: Path,
        settings: Mapping[str, str],
        stop: int,
        ready: Callable[[], bool],
    ) -> None:
        self._folder, self._stop, self._ready = folder, stop, ready
        self._script = copy_of_deployment(folder) / script
        self._log = folder / f"{script}.log"
        self._settings = {"PATH": os.environ["PATH"], "DATA": str(folder), **settings}
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", str(self._script)],
                cwd=self._folder,
                env=self._settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **without_rights(),
            )
        end = time.monotonic() + PATIENCE_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{self._script.name} did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """End it and all that it started at once, as a power cut does."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def stop(self) -> None:
        """End it as its page says; nothing of it is left."""
        self._process.send_signal(self._stop)
        try:
            self._process.wait(60)
        finally:
            self.kill()


def copy_of_deployment(folder: Path) -> Path:
    """The example, where the user without rights may read it."""
    return Path(shutil.copytree(DEPLOYMENT, folder / "deployment", dirs_exist_ok=True))


@dataclass
class Postgres:
    """A PostgreSQL server.

    Attributes:
        at: user, password and address, as in an URI.
    """

    at: str

    def create(self, name: str) -> str:
        """Make a database; the URI of it without the driver's name."""
        with closing(psycopg2.connect(f"postgresql://{self.at}/postgres")) as connection:
            connection.autocommit = True
            connection.cursor().execute(f'CREATE DATABASE "{name}"')
        return f"{self.at}/{name}"

    def answers(self) -> bool:
        try:
            psycopg2.connect(f"postgresql://{self.at}/postgres").close()
        except psycopg2.OperationalError:
            return False
        return True


@contextmanager
def postgresql() -> Iterator[Postgres]:
    """A PostgreSQL server of one's own."""
    skip_unless(any(Path("/usr/lib/postgresql").glob("*/bin/postgres")))
    port, password = free_port(), secrets.token_hex(8)
    server = Postgres(f"mlflow:{password}@127.0.0.1:{port}")
    settings = {"PGPORT": str(port), "PGPASSWORD": password}
    with folder() as data:
        service = Service("postgresql.sh", data, settings, signal.SIGINT, server.answers)
        try:
            yield server
        finally:
            service.stop()


class S3:
    """A Ceph gateway.

    Attributes:
        uri: its address.
        keys: the variables by which clients know where it is, and may use it.
        service: the script that runs.
    """

    def __init__(self, data: Path) -> None:
        self._port, mon = free_port(), free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.keys = {
            "AWS_ACCESS_KEY_ID": secrets.token_hex(8),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": self.uri,
        }
        ports = {"S3_PORT": str(self._port), "MON_PORT": str(mon), "LISTEN": "127.0.0.1"}
        settings = {**self.keys, **ports, "S3_GB": "6"}
        self.service = Service("s3.sh", data, settings, signal.SIGTERM, self._answers)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), 1).close()
        except OSError:
            return False
        return True

    @cached_property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.uri,
            aws_access_key_id=self.keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.keys["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def objects(self, bucket: str) -> dict[str, str]:
        """The name of each object → a digest of its bytes."""
        found = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {o["Key"]: o["ETag"] for page in found for o in page.get("Contents", ())}

    def read(self, bucket: str, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content


@contextmanager
def ceph() -> Iterator[S3]:
    """A Ceph cluster of one's own, whose gateway speaks S3."""
    skip_unless(all(map(shutil.which, CEPH)))
    with folder() as data:
        server = S3(data)
        try:
            yield server
        finally:
            server.service.stop()
