"""Commands without their start: forks of one process that has imported everything.

A page has up to ten commands, and each would spend ten seconds on the same imports. The commands
are otherwise real: each runs in a process of its own, with the caller's arguments, folder,
environment, input and output.

    mlflow-soup …           a stub, written by `stubs`: asks the server for a fork
    warm-mlflow …           the same for MLflow's command
    python - < CODE         the same for a block of Python, or for python -c CODE
"""

import contextlib
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import forked

STUB = """#!{python} -ISB
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(request.encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(8) or 1))
"""


def stubs(folder: Path, path: Path) -> Path:
    """Write the stubs into a folder for PATH; they ask the server at `path`."""
    folder.mkdir()
    for program in ("mlflow-soup", "warm-mlflow", "python"):
        file = folder / program
        file.write_text(STUB.format(python=sys.executable, path=str(path), program=program))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return folder


def run(program: str, words: list[str]) -> int:
    """Run the command, or the Python program that is given; its exit code."""
    from mlflow.cli import cli

    from mlflow_soup.cli import main

    try:
        if program == "python":
            option, *given = words
            assert option == "-c" if given else option == "-", words
            code = given[0] if given else sys.stdin.read()
            assert code.strip()  # which would pass whatever the page says
            exec(compile(code, "<stdin>", "exec"), {"__name__": "__main__"})
        elif program == "warm-mlflow":
            cli(words, prog_name="mlflow")
        else:
            main(words, prog_name=program)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(caller: socket.socket) -> None:
    """Become the process that a caller asked for."""
    _, descriptors, *_ = socket.recv_fds(caller, 1, 3)
    with caller.makefile("r", encoding="utf-8") as request:
        program, words, folder, environment = json.load(request)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has put another in its place
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = run(program, words)
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(str(code).encode())


def serve(path: Path) -> None:
    """Fork for each caller until the process, which has imported everything, is ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{path}-")
        door.listen()
        os.rename(f"{path}-", path)  # who sees it may connect
        while True:
            caller, _ = door.accept()
            child = os.fork()
            if child == 0:
                door.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(caller)
                os._exit(0)
            caller.close()


@contextlib.contextmanager
def programs() -> Iterator[Path]:
    """A folder for PATH in which the commands start at once."""
    # not pytest's folder: the path of a socket has 104 characters at most
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = forked.warm().Process(target=serve, args=(root / "socket",))
        server.start()
        try:
            while not (root / "socket").exists():
                assert server.is_alive()
                time.sleep(0.1)
            yield stubs(root / "bin", root / "socket")
        finally:
            server.terminate()
            server.join()
