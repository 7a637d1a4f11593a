"""How the result of a command leaves it: words on stdout, or one JSON document, or both.

`--format json` prints the document in place of the words. `--output FILE` writes it to a file
beside them. Failures are documents too. docs/reference/json.md describes them.
"""

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

import click
import cloup

from mlflow_soup.errors import SoupError, SpecError, StoreError, brief
from mlflow_soup.files.durable import check_writable, replace
from mlflow_soup.redaction import redact

SCHEMA = 1  # another number if a key goes, or means something else


def options(**more: str) -> Callable[[Any], Any]:
    """The options `--format` and `--output`.

    Args:
        more: further formats of the command, each with words for `--help`.
    """
    others = "".join(f"; {form}: {words}" for form, words in more.items())
    form = cloup.option(
        "--format",
        "form",
        type=click.Choice(["text", "json", *more]),
        default="text",
        help="text: words for people; json: one JSON document on stdout, also of a failure, and "
        f"all else on stderr{others}.  [default: text]",
    )
    file = cloup.option(
        "--output",
        default="",
        metavar="FILE",
        help="Also write the JSON document to this file. Its folder must exist.",
    )
    return lambda function: form(file(function))


class Answering(cloup.Command):
    """A command with `--format` and `--output`; it is called without them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options, and open the answer before the command begins."""
        words = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except (click.UsageError, SoupError):
            ctx.params = _read(ctx, words)
            with contextlib.suppress(SpecError):  # the other error came first
                self._open(ctx)
            raise
        if not ctx.resilient_parsing:
            self._open(ctx)
        return rest

    def _open(self, ctx: click.Context) -> None:
        form, file = ctx.params.pop("form"), ctx.params.pop("output")
        answer = ctx.find_object(Answer)
        assert answer is not None
        answer.open(_name(ctx), form or "text", file or "")


def _name(ctx: click.Context) -> str:
    """The command as it is called, `study pairs`."""
    before = _name(ctx.parent) if ctx.parent is not None and ctx.parent.parent is not None else ""
    return f"{before} {ctx.info_name}".strip()


def _read(ctx: click.Context, words: list[str]) -> dict[str, Any]:
    """`--format` and `--output` of a command line that cannot be read as a whole."""
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    own = [param for param in ctx.command.params if param.name in ("form", "output")]
    bare = click.Command(None, settings, params=own, add_help_option=False)
    return bare.make_context(None, words, parent=ctx, resilient_parsing=True).params


class Answer:
    """What a command says, in the format that was asked for."""

    def __init__(self) -> None:
        self._command, self._form = "", "text"
        self._file: Path | None = None
        self._given = False
        self._aside = contextlib.ExitStack()

    def open(self, command: str, form: str, file: str) -> None:
        """Begin to answer. A file of an earlier call is removed, so that nobody reads it.

        Args:
            command: the command, `run` or `study pairs`.
            form: `text`, `json`, or another format that the command prints itself.
            file: where the document goes, too; empty for nowhere.

        Raises:
            SpecError: the file cannot be written.
        """
        self._command, self._form = command, form
        if form == "json":
            self._aside.enter_context(_stdout_to_stderr())
        if file:
            path = Path(os.path.abspath(file))
            _clear(path)
            self._file = path

    @property
    def form(self) -> str:
        """The format of stdout."""
        return self._form

    def say(self, words: str) -> None:
        """Print words for people, unless stdout is for a JSON document."""
        if self._form != "json":
            click.echo(redact(words))

    def give(self, document: Mapping[str, Any], exit_code: int = 0) -> NoReturn:
        """End the command with its document, and its exit code.

        Raises:
            StoreError: the file cannot be written, because the disk is full or fails.
            click.exceptions.Exit: always, otherwise.
        """
        content = self._content({"error": None, **document}, exit_code)
        if self._file is not None:
            file, self._file = self._file, None
            _write(file, content)
        self._print(content)
        click.get_current_context().exit(exit_code)

    def fail(
        self, error: Mapping[str, str], exit_code: int, more: Mapping[str, Any] | None = None
    ) -> None:
        """Write the document of a failure; its words are the caller's.

        Args:
            error: kind, what, fix, and where if it is known.
            exit_code: the exit code of the command.
            more: other keys of the document.
        """
        if self._given or not self._command:
            return
        known = {"where": f"mlflow-soup {self._command}", **error}
        told = {key: known[key] for key in ("kind", "what", "where", "fix")}
        content = self._content({"error": told, **(more or {})}, exit_code)
        if self._file is not None:
            try:
                _write(self._file, content)
            except StoreError as failed:
                click.echo(f"error: {failed}", err=True)
        self._print(content)

    def _content(self, document: Mapping[str, Any], exit_code: int) -> bytes:
        head = {"schema": SCHEMA, "command": self._command, "exit_code": exit_code}
        tree = plain({**head, **document})
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    def _print(self, content: bytes) -> None:
        self._given = True
        self._aside.close()
        if self._form == "json":
            click.echo(content, nl=False)


def failure(error: Exception) -> dict[str, str]:
    """An error as kind, what and fix, and where if it says so."""
    if isinstance(error, SoupError):
        kind, what = type(error).__name__, error.what
        return {"kind": kind, "what": what, "where": error.where, "fix": error.fix}
    if isinstance(error, click.ClickException):
        fix = "call the command with --help"
        return {"kind": "UsageError", "what": error.format_message(), "fix": fix}
    fix = "this is a defect of mlflow-soup: report it with the traceback on stderr"
    return {"kind": "Defect", "what": brief(error), "fix": fix}


def interrupted(signum: int) -> dict[str, str]:
    """The same for a command that a signal ended."""
    fix = "run the same command again: it continues where it stopped"
    return {"kind": "Interrupted", "what": f"interrupted by signal {signum}", "fix": fix}


def plain(value: Any) -> Any:
    """The value as JSON has it, without secrets; a number that is not finite becomes None.

    Raises:
        TypeError: JSON has no such value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):  # NumPy's are registered there
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {redact(str(key)): plain(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [plain(its) for its in value]
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr whatever is printed: by Python, by libraries in C, by other programs."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            out, err = stdout.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or no file of the system
            yield
            return
        stdout.flush()
        saved = os.dup(out)
        try:
            os.dup2(err, out)
            yield
        finally:
            os.dup2(saved, out)
            os.close(saved)


def _clear(file: Path) -> None:
    """Remove the file of an earlier call, and prove that a new one can be written in its place.

    Raises:
        SpecError: it is no file, or it cannot be written or removed.
    """
    where = f"--output {file}"
    try:
        found = file.lstat() if os.path.lexists(file) else None
    except OSError as error:
        raise _unwritable(where, error.strerror or "") from error
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise _unwritable(where, "it is a folder, a link or a device, and not a file")
    if not file.parent.is_dir():
        raise _unwritable(where, f"there is no folder {file.parent}")
    check_writable(file.parent, where)
    try:
        _write(file, b"")  # also finds a name that is too long, and a disk that is full
        file.unlink()
    except (OSError, StoreError) as error:
        why = error.what if isinstance(error, StoreError) else error.strerror
        raise _unwritable(where, str(why)) from error


def _unwritable(where: str, why: str) -> SpecError:
    return SpecError(
        f"the output cannot be written: {why}",
        where=where,
        fix="name a file in a folder that exists and that you may write to",
    )


def _write(file: Path, content: bytes) -> None:
    replace(file, lambda partial: partial.write_bytes(content))
