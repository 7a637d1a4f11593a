"""Commands without their start: forks of one process that has imported everything.

A page has up to ten commands, and each would spend five seconds on the same imports. The commands
are otherwise real: each runs in a process of its own, with the caller's arguments, folder,
environment, input and output.

    python warm.py SOCKET        serves
    mlflow-soup …                a stub, written by `stubs`: asks the server for a fork
    python - < CODE              the same for a block of Python
"""

import json
import os
import signal
import socket
import stat
import sys
import traceback
from pathlib import Path

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
    """Write `mlflow-soup` and `python` into a folder for PATH; they ask the server at `path`."""
    folder.mkdir()
    for program in ("mlflow-soup", "python"):
        file = folder / program
        file.write_text(STUB.format(python=sys.executable, path=str(path), program=program))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return folder


def run(program: str, words: list[str]) -> int:
    """Run the command, or the Python program on standard input; its exit code."""
    from mlflow_soup.cli import main

    try:
        if program == "python":
            assert words == ["-"], words
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
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
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = run(program, words)
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(str(code).encode())


def serve(path: Path) -> None:
    """Import everything, then fork for each caller until the process is ended."""
    import mlflow.transformers
    import model_signing.signing
    import transformers

    from mlflow_soup.workflows import doctor, merge, release, run, study, verify

    assert all((mlflow, model_signing, doctor, merge, release, run, study, verify))
    assert transformers.AutoModelForCausalLM  # which is imported when it is asked for
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        while True:
            caller, _ = door.accept()
            child = os.fork()
            if child == 0:
                door.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(caller)
                os._exit(0)
            caller.close()


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    serve(Path(sys.argv[1]))
