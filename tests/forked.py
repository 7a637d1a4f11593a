"""Processes forked from one that has imported what is heavy, and has done nothing else.

Importing MLflow, torch and lm-eval takes a process up to ten seconds. A program that is played here
has an environment, a folder and standard streams of its own, as a started one has.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

context = multiprocessing.get_context("forkserver")


def warm() -> ForkServerContext:
    """The context, once the process to be forked has begun its imports."""
    context.set_forkserver_preload(["heavy"])  # the package names another one, for its workers
    with pytest.MonkeyPatch.context() as patch:
        # before Python 3.12 it does not take over the path of this process
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _play(program: str, words: tuple[str, ...], cwd: str, env: dict[str, str], out: str) -> None:
    assert "heavy" in sys.modules  # a failure to import it is not said
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [program, *words]
    if os.path.exists(program):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Play:
    """A program that runs; of `subprocess.Popen` it has what the tests use."""

    def __init__(
        self,
        program: str,
        *words: str,
        cwd: str | Path = ".",
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self._out = tempfile.TemporaryDirectory()
        args = (program, words, str(Path(cwd).absolute()), dict(env), self._out.name)
        self._process = warm().Process(target=_play, args=args)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def said(self, stream: str = "stdout") -> str:
        """What it has written so far."""
        path = Path(self._out.name, stream)
        return path.read_text() if path.exists() else ""

    def finish(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Its exit code, and all it has said."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError("the program did not end")
        said = [Path(self._out.name, name).read_text() for name in ("stdout", "stderr")]
        self._out.cleanup()
        return subprocess.CompletedProcess([], self._process.exitcode, *said)


def play(
    program: str, *words: str, cwd: str | Path = ".", env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a module, or a file or folder, to its end: what `subprocess.run` would give."""
    return Play(program, *words, cwd=cwd, env=env).finish()
