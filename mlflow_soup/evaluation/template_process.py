"""The process that renders templates; `mlflow_soup.evaluation.templates` starts it and asks it.

It is run as a script of its own, with the standard library and Jinja only: nothing of value is in
its memory or environment. It can write no file, and the system ends it when a template takes more
processor time or memory than its limits.

Its arguments are the seconds of processor time for a template, and those for each of its documents.
A request and an answer are values in the format of `marshal`, each after its length in 4 bytes.
A request is (template, documents, number of characters), each document in the same format. The
answer has an entry per document: (text, "", ""), or (None, name of the error's type, message).
"""

import functools
import marshal
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

FORMAT = 2  # of marshal: equal values have equal bytes
MEMORY = 1 << 30  # bytes

Answer = tuple[str | None, str, str]


def regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """lm-eval's filter of this name."""
    return re.sub(pattern, repl, string, count=count)


def environment() -> ImmutableSandboxedEnvironment:
    """lm-eval's environment as a sandbox: a template sees and changes only what it is given."""
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = regex_replace
    return sandbox


def receive(stream: IO[bytes]) -> Any:
    """The next value; EOFError when there is none."""
    length = int.from_bytes(stream.read(4), "little")
    content = stream.read(length)
    if not length or len(content) < length:
        raise EOFError
    return marshal.loads(content)


def send(stream: IO[bytes], value: Any) -> None:
    """Write a value, without flushing the stream."""
    content = marshal.dumps(value, FORMAT)
    stream.write(len(content).to_bytes(4, "little") + content)


def lower(limit: int, most: int) -> None:
    """Lower one of the `resource` limits of this process; a lower one stays."""
    hard = resource.getrlimit(limit)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (most, most))


class _Renderer:
    """Renders templates, and counts what each has taken so far."""

    def __init__(self, seconds: float, seconds_each: float) -> None:
        self._seconds, self._seconds_each = seconds, seconds_each
        self._compiled = functools.lru_cache(maxsize=1024)(environment().from_string)
        self._left: dict[str, float] = {}  # template → seconds

    def render(self, template: str, documents: list[bytes], room: int) -> Iterator[Answer]:
        begin = time.process_time()
        left = self._left.pop(template, self._seconds) + self._seconds_each * len(documents)
        # the signal's default ends the process, even within a regular expression
        signal.setitimer(signal.ITIMER_PROF, left)
        for document in documents:
            answer = self._render_one(template, document)
            room -= len(answer[0] or answer[2])
            yield answer if room >= 0 else (None, "MemoryError", "")
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._left[template] = max(left - (time.process_time() - begin), 0.0)

    def _render_one(self, template: str, document: bytes) -> Answer:
        try:
            return self._compiled(template).render(**marshal.loads(document)), "", ""
        except Exception as error:  # a template can raise anything
            return None, type(error).__name__, str(error)


def main() -> None:
    """Answer requests until the input ends."""
    lower(resource.RLIMIT_AS, MEMORY)
    lower(resource.RLIMIT_FSIZE, 0)
    lower(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    renderer = _Renderer(*map(float, sys.argv[1:]))
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        send(sys.stdout.buffer, list(renderer.render(*request)))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
