"""The example of a deployment: its plain commands run as they stand there, without rights.

Docker is not there. What the compose file says is compared with the plain commands.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from conftest import free_port
from services import DEPLOYMENT, PACKAGES, README, ROOT, folder, skip_unless, without_rights

COMPOSE = DEPLOYMENT / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
ROOTS, INSTALL, SETTINGS, START, USERS, CLIENT, FIRST, PROMOTER, BACKUP = re.findall(
    r"```bash\n(.*?)```", README, re.S
)
SECRET = re.compile(r"^(\w+)=\$\(openssl", re.M)
QUICK = "--steps 26 --items 60 --trials 4"


# --- what the compose file says


def settings() -> set[str]:
    """The names of all settings."""
    return set(re.findall(r"^([A-Z0-9_]+)=", SETTINGS, re.M))


def asked_for(script: str) -> set[str]:
    """The variables that a script refuses to be without."""
    return set(re.findall(r"\$\{(\w+):\?\}", (DEPLOYMENT / script).read_text()))


def validate(path: Path) -> int:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, path], capture_output=True, check=False).returncode


def test_the_compose_file_has_the_form_of_one(tmp_path: Path) -> None:
    assert validate(COMPOSE) == 0
    (tmp_path / "wrong.yaml").write_text(COMPOSE.read_text().replace("ports:", "port:"))
    assert validate(tmp_path / "wrong.yaml") == 1


def test_both_ways_read_the_same_settings_and_none_has_a_default() -> None:
    text = COMPOSE.read_text()
    read = set(re.findall(r"\$\{(\w+):\?\}", text))
    assert text.count("${") == len(re.findall(r"\$\{\w+:\?\}", text))
    assert read == settings()
    assert len(SECRET.findall(SETTINGS)) == 5
    for name in settings():
        assert f"{name}=" in SETTINGS
        assert name in SECRET.findall(SETTINGS) or f"`{name}`" in README


@pytest.mark.parametrize("name", ["s3", "tracking"])
def test_a_container_runs_the_script_with_all_that_it_asks_for(name: str) -> None:
    service = SERVICES[name]
    assert service["command"] == ["bash", f"/srv/{name}.sh"]
    assert asked_for(f"{name}.sh") <= set(service["environment"])


def test_the_database_of_the_container_is_that_of_the_script() -> None:
    script = (DEPLOYMENT / "postgresql.sh").read_text()
    service = SERVICES["postgresql"]
    assert f"--username {service['environment']['POSTGRES_USER']} " in script
    assert "--single" in script
    assert "< databases.sql" in script
    assert any(v.startswith("./databases.sql:/docker-entry") for v in service["volumes"])
    assert f"PGUSER={service['environment']['POSTGRES_USER']}" in (
        (DEPLOYMENT / "tracking.sh").read_text()
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_healthy_when_the_plain_command_says_so(name: str) -> None:
    kind, check = SERVICES[name]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    assert check.replace("$$", "$") in (DEPLOYMENT / "servers.sh").read_text()


def test_all_versions_are_those_of_our_tests() -> None:
    tested = (ROOT / "constraints.txt").read_text()
    for pin in re.findall(r"^[a-z].*$", (DEPLOYMENT / "requirements.txt").read_text(), re.M):
        assert re.search(rf"^{re.escape(pin.replace('[auth]', ''))}$", tested, re.M), pin
    images = [s["image"] for s in SERVICES.values() if "build" not in s]
    images += re.findall(r"FROM (\S+)", SERVICES["tracking"]["build"]["dockerfile_inline"])
    for image in images:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-|$)", image), image


def test_the_packages_are_those_that_the_slow_tests_need() -> None:
    assert PACKAGES in ROOTS
    assert PACKAGES.split(maxsplit=4)[4] in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd")
def test_the_unit_of_systemd_has_no_mistake(tmp_path: Path) -> None:
    text = (DEPLOYMENT / "servers.service").read_text()
    unit = tmp_path / "servers.service"
    unit.write_text(text.replace("/srv/soup/servers.sh", str(DEPLOYMENT / "servers.sh")))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- the plain commands


def without(*begins: str) -> dict[str, str]:
    """Our environment without variables that begin so."""
    return {k: v for k, v in os.environ.items() if not k.startswith(begins)}


def bash(block: str, **how: object) -> "subprocess.CompletedProcess[str]":
    """Run a block; what it said."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        ["bash", "-euo", "pipefail", "-c", block],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **how,
    )


class Machine:
    """A machine with Debian's packages, and the folder of the user without rights on it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        environ = without("PYTHON", "VIRTUAL_ENV", "MLFLOW", "AWS", "HF_")
        self._how = {
            "cwd": place,
            "env": {**environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(place)},
            **without_rights(),
        }

    def do(self, block: str) -> str:
        done = bash(block, **self._how)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> None:
        """Start the servers; they are ready."""
        self._servers = subprocess.Popen(
            ["bash", "-c", f"exec {START}"], stdout=subprocess.PIPE, text=True, **self._how
        )
        assert self._servers.stdout is not None
        said = self._servers.stdout.readline()
        assert said.startswith("ready: http://127.0.0.1:"), self.logs()

    def logs(self) -> str:
        return "".join(path.read_text() for path in (self.place / "data" / "log").glob("*.log"))

    def running(self) -> dict[int, str]:
        """The processes that know our folder, with their words."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"DATA={self.place}/".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def stop(self) -> None:
        """Stop the servers; nothing of them is left."""
        self._servers.send_signal(signal.SIGTERM)
        assert self._servers.wait(120) == 0, self.logs()
        assert not self.running()

    def end(self) -> None:
        """Kill what is left after a failure."""
        for number in self.running():
            os.kill(number, signal.SIGKILL)


@pytest.fixture
def machine() -> Iterator[Machine]:
    packages = shlex.split(PACKAGES)[4:]
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}", *packages]
    try:
        skip_unless(subprocess.run(query, capture_output=True, check=False).returncode == 0)
    except FileNotFoundError:
        pytest.skip("this is not Debian")
    with folder() as place:
        shutil.copytree(DEPLOYMENT, place, dirs_exist_ok=True)
        machine = Machine(place)
        try:
            yield machine
        finally:
            machine.end()


def settled(port: Mapping[str, int]) -> str:
    """The block that makes the settings, for this machine."""
    block = SETTINGS.replace("$(hostname --fqdn)", "127.0.0.1").replace("S3_GB=100", "S3_GB=6")
    for name, number in port.items():
        block = re.sub(rf"^{name}=\d+$", f"{name}={number}", block, flags=re.M)
    return block


def as_user(block: str, name: str, password: str, port: int) -> str:
    """A block of a client, with what it leaves open."""
    block = block.replace("http://soup.example.com:5000", f"http://127.0.0.1:{port}")
    block = re.sub(r"(MLFLOW_TRACKING_USERNAME)=\w+", rf"\1={name}", block)
    return block.replace("PASSWORD=…", f"PASSWORD={password}")


@pytest.mark.slow
def test_a_team_that_starts_from_nothing_has_servers_users_a_soup_and_a_backup(
    machine: Machine, programs: Path, tmp_path: Path
) -> None:
    names = ("TRACKING_PORT", "S3_PORT", "PGPORT", "MON_PORT")
    port = {name: free_port() for name in names}
    machine.do(INSTALL)
    machine.do(settled(port))
    assert (machine.place / ".env").stat().st_mode & 0o777 == 0o600
    values = dict(re.findall(r"^(\w+)=(.*)$", (machine.place / ".env").read_text(), re.M))
    secrets = [values[name] for name in SECRET.findall(SETTINGS)]
    assert len(set(secrets)) == 5
    assert min(map(len, secrets)) >= 20
    machine.start()
    passwords = dict(line.split() for line in machine.do(USERS).splitlines())
    assert set(passwords) == {"searcher", "promoter"}

    path = os.pathsep.join((str(programs), os.environ["PATH"]))
    environ = without("AWS", "MLFLOW_S3", "MLFLOW_TRACKING", "MLFLOW_EXP")
    environ |= {"PATH": path, "MLFLOW_SOUP_CACHE": str(tmp_path / "cache")}

    def client(name: str, block: str) -> "subprocess.CompletedProcess[str]":
        block = as_user(CLIENT + block, name, passwords[name], port["TRACKING_PORT"])
        done = bash(block, cwd=tmp_path, env=environ)
        assert "Traceback" not in done.stderr, done.stderr
        assert not any(s in done.stdout + done.stderr for s in [*secrets, *passwords.values()])
        return done

    quick = FIRST.replace("quickstart", f"quickstart {QUICK}", 1)
    searched = client("searcher", quick)
    assert "registered as models:/my-llm/14" in searched.stdout, searched.stderr
    # with so few questions nobody can be sure
    promoted = client("promoter", PROMOTER.replace('"margin": "0.01"', '"margin": "0.5"'))
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert "models:/prod@champion: verified" in promoted.stdout

    request = PROMOTER.partition("PYTHON\nrequest=")[2]
    again = re.sub(r"^mlflow-soup (?!promote).*\n", "", f"request={request}", flags=re.M)
    refused = client("searcher", again)
    assert refused.returncode == 7, refused.stdout + refused.stderr
    assert "prod" in refused.stderr

    said = machine.logs() + "".join(machine.running().values())
    assert not any(secret in said for secret in [*secrets, *passwords.values()])
    machine.stop()
    machine.do(BACKUP.replace("../", ""))
    shutil.rmtree(machine.place / "data")
    (machine.place / ".env").unlink()
    machine.do("tar --extract --file backup.tar.gz")
    machine.start()
    environ["MLFLOW_SOUP_CACHE"] = str(tmp_path / "empty")
    held = client("promoter", "mlflow-soup verify models:/prod@champion --promoted\n")
    assert held.returncode == 0, held.stdout + held.stderr
    machine.stop()
