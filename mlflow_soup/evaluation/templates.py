"""Render the templates of tasks within limits of time and memory, each text once.

A task folder of unknown origin holds templates. A sandbox keeps a template from reaching Python's
objects, but a loop in it may have no end, and one expression can fill all memory. So a process of
its own renders them (`template_process`). It receives plain values only, whatever the data set
declares: no image, for instance, whose methods write files.

lm-eval asks for the same texts at every evaluation. `RENDERER` keeps them, and renders a template
for many documents in one request.
"""

import atexit
import builtins
import contextlib
import hashlib
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import jinja2.exceptions
import lm_eval.utils
import numpy as np
from jinja2.exceptions import SecurityError

from mlflow_soup.evaluation import template_process
from mlflow_soup.evaluation.template_process import FORMAT, MEMORY, Answer, receive, send

SECONDS = 10.0  # of processor time for a template, and
SECONDS_EACH = 0.02  # for each of its documents
CHARACTERS = 1 << 20  # of the texts of a request, and
CHARACTERS_EACH = 1 << 14  # for each of its documents, and
CHARACTERS_PER_BYTE = 4  # for each byte of its documents
_BATCH = 256  # documents
_BATCH_BYTES = 8 << 20
_MOST_KEPT = 1 << 29  # characters of texts, and
_KEPT_EACH = 1 << 7  # for each text
_NOT_PLAIN = object()
_SCALARS = frozenset((str, int, float, bool, type(None)))


def plain(value: Any) -> Any:
    """The value as str, int, float, bool, None, or lists and dicts of them.

    Dates and decimals become text. Anything else, such as an image, is left out of its dict or
    list.
    """
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        entries = ((str(key), plain(inner)) for key, inner in value.items())
        return {key: inner for key, inner in entries if inner is not _NOT_PLAIN}
    if isinstance(value, list | tuple):
        return [inner for inner in map(plain, value) if inner is not _NOT_PLAIN]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    for base in (str, int, float):  # of a subclass
        if isinstance(value, base):
            return base(value)
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else _NOT_PLAIN


class _Renderer:
    """The process that renders, started when it is first asked; one for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._others: subprocess.Popen[bytes] | None = None  # in a fork
        self._kept: dict[str, dict[bytes, str]] = {}  # template → document's digest → text
        self._size = 0  # characters that are kept
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._end)

    def start(self) -> None:
        """Start the process; it gets ready while the caller does other work."""
        with self._lock:
            self._process = self._process or _start()

    def render(self, template: str, document: Any) -> str:
        """The text of a template for a document, as lm-eval renders it.

        Raises:
            SecurityError: the template did what the sandbox forbids, or takes more time or memory
                than it may.
            Exception: what the template raised.
        """
        kept = self._kept.get(template, {})
        # a document of plain values is its own plain form; no other document has the same bytes
        with contextlib.suppress(ValueError):
            text = kept.get(_digest(marshal.dumps(document, FORMAT)))
            if text is not None:
                return text
        content = marshal.dumps(plain(document), FORMAT)
        key = _digest(content)
        text = kept.get(key)
        if text is None:
            [(text, kind, message)] = self._ask(template, [content])
            if text is None:
                raise _error(kind, message)
            self._keep(template, key, text)
        return text

    def _keep(self, template: str, key: bytes, text: str) -> None:
        self._size += len(text) + _KEPT_EACH
        if self._size > _MOST_KEPT:
            self._kept, self._size = {}, 0
        self._kept.setdefault(template, {})[key] = text

    def render_ahead(
        self, templates: Iterable[str], documents: Iterable[Mapping[str, Any]]
    ) -> None:
        """Render templates for many documents, and keep the texts.

        Raises:
            SecurityError: a template takes more time or memory than it may. `render` raises the
                other errors, each for its document.
        """
        contents = [marshal.dumps(plain(document), FORMAT) for document in documents]
        keyed = {_digest(content): content for content in contents}
        for template in templates:
            kept = set(self._kept.get(template, ()))
            for batch in _batches((k, c) for k, c in keyed.items() if k not in kept):
                answers = self._ask(template, list(batch.values()))
                for key, (text, _, _) in zip(batch, answers, strict=True):
                    if text is not None:
                        self._keep(template, key, text)

    def _ask(self, template: str, batch: list[bytes]) -> list[Answer]:
        room = CHARACTERS + CHARACTERS_EACH * len(batch)
        room += CHARACTERS_PER_BYTE * sum(map(len, batch))
        with self._lock:
            self._process = self._process or _start()
            requests, answers = self._process.stdin, self._process.stdout
            assert requests is not None
            assert answers is not None
            try:
                send(requests, (template, batch, room))
                requests.flush()
                return list(receive(answers))
            except BaseException as error:
                status = self._end()  # the next request must not read the answers to this one
                if isinstance(error, EOFError | BrokenPipeError):
                    raise _ended(status) from None
                raise

    def _end(self) -> int | None:
        """End the process; its exit status if it has ended already."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        process.communicate()
        return process.returncode

    def _forget(self) -> None:
        """In a fork: leave the process to the one that started it, and close none of its pipes."""
        self._others = self._process
        self._lock, self._process = threading.Lock(), None


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-s", template_process.__file__]
    return subprocess.Popen(
        [*command, str(SECONDS), str(SECONDS_EACH)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _batches(contents: Iterable[tuple[bytes, bytes]]) -> Iterator[dict[bytes, bytes]]:
    batch: dict[bytes, bytes] = {}
    size = 0
    for key, content in contents:
        batch[key] = content
        size += len(content)
        if len(batch) == _BATCH or size > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _error(kind: str, message: str) -> Exception:
    """The error that a template raised, in the process that asked."""
    if kind == "MemoryError":
        return SecurityError("a template makes a text that is too long")
    found = getattr(jinja2.exceptions, kind, getattr(builtins, kind, None))
    try:
        error = found(message) if found else None
    except TypeError:  # it takes more than a message
        error = None
    return error if isinstance(error, Exception) else RuntimeError(f"{kind}: {message}")


def _ended(status: int | None) -> Exception:
    """The error for a process that ended before it answered."""
    if status == -signal.SIGPROF:
        return SecurityError(
            f"a template takes more than {SECONDS:g} s of processor time, and {SECONDS_EACH:g} s "
            "for each document"
        )
    return SecurityError(
        f"a template ended the process that renders it (exit status {status}); it may take at most "
        f"{MEMORY >> 20} MiB of memory"
    )


RENDERER = _Renderer()
# lm-eval's own would run any code in a task's templates
# private door: lm_eval.utils.apply_template
lm_eval.utils.apply_template = RENDERER.render
