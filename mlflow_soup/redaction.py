"""One filter for secrets, before anything is shown, logged, raised or stored.

Three things are known of a secret, from sure to likely: its value, where an environment variable
holds it; its place, as in `://user:password@` or `password=…`; its looks, as of an AWS key's id.
"""

import contextlib
import html
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

GONE = "…"
_CLOSERS = ",.:)]}'\"\\`"  # what follows a value in prose, Markdown, JSON and Python

# of environment variables; TOKENIZERS_PARALLELISM and MAX_TOKENS are none
_SECRET_NAME = re.compile(
    r"PASSW|PASSPHRASE|PASS$|SECRET|CREDENTIAL|TOKEN(?!I|S)|KEY(_?ID)?$", re.IGNORECASE
)
# of passwords with a slash, too, which SQLAlchemy takes; `host:5000/a@b` has a port.
# Lengths are bounded: a hostile text of nothing but :// would take minutes
_USER = re.compile(
    r"""://(?: (?P<plain> [^/?#\s"<>]{0,999} )
             | (?P<odd> [^/?#\s@:\[]{0,99} : (?!\d+[/?#]) [^\s@"<>]{0,999} ) )@""",
    re.X,
)
# what follows a # is no query: the UI's links keep theirs
_QUERY = re.compile(r"""(?P<head>://[^\s?#"<>]{0,1999}\?)(?P<bare>[^\s"<>]+)""")
_PAIR = re.compile(
    r"""(?P<head> (?: passw(?:or)?d | passphrase | pwd | secret | token | credentials?
                    | amz-signature | (?<=[?&]) sig(?:nature)?
                    | (?:api|access|account|secret|private) [_-]?key (?:[_-]?id)? )
            (?: \s?=(?!=)\s? | (?P<named> \\?["'] \s*[:=]\s* ) ) )
        (?: (?P<quote> \\?["'] ) (?P<quoted> (?: \\. | [^\\\n] )*? ) (?P=quote)
          | (?(named) (?!) | (?P<bare> [^\s&;]+ ) ) )""",
    re.X | re.I,
)
_HEADER = re.compile(
    r"""(authorization ["']? \s*[:=]\s* b?["']?)
        (?: bearer | basic | digest | token | aws4-hmac-sha256 ) \s+ [^"'\r\n]+""",
    re.X | re.I,
)
_BEARER = re.compile(r"\b(bearer|basic)(\s+)(?=\S*\d)[\w.~+/=-]{16,}", re.I)
_LOOKS = re.compile(
    r"""(?:AKIA|ASIA)[A-Z0-9]{12,}                          # AWS
      | hf_[A-Za-z0-9]{16,}                                 # Hugging Face
      | gh[opsur]_[A-Za-z0-9]{16,} | github_pat_\w{20,}     # GitHub
      | glpat-[\w-]{16,}                                    # GitLab
      | dapi[0-9a-f]{16,}(?:-\d)?                           # Databricks
      | eyJ[\w-]{8,999}\.[\w-]{8,}\.[\w-]*                  # JSON web tokens""",
    re.X,
)


def redact(text: str) -> str:
    """The text without secrets: their values, and what has the place or the looks of one.

    Of URIs, user names, passwords and queries go; what follows a # stays. `redact(redact(text))` is
    `redact(text)`.
    """
    known = _known(_held())
    before = None
    while text != before:
        before = text
        if known is not None:
            text = known.sub(GONE, text)
        text = _USER.sub("://", text)
        text = _QUERY.sub(_hide, text)
        text = _PAIR.sub(_hide, text)
        text = _HEADER.sub(rf"\1{GONE}", text)
        text = _BEARER.sub(rf"\1\2{GONE}", text)
        text = _LOOKS.sub(GONE, text)
    return text


def _hide(match: re.Match[str]) -> str:
    """A value hidden, but not what closes the sentence or the bracket that it stands in."""
    groups = match.groupdict()
    if groups["bare"] is not None:
        value = groups["bare"].rstrip(_CLOSERS)
        rest = groups["bare"][len(value) :]
        return f"{groups['head']}{GONE}{rest}" if value else match[0]
    mark = groups["quote"]
    return f"{groups['head']}{mark}{GONE}{mark}" if groups["quoted"] else match[0]


def _held() -> frozenset[str]:
    """The secrets that the environment holds, as they are there and percent-decoded.

    Words too short or too common to be told from others are left out: a password `mlflow` would
    blank every mention of MLflow's tags.
    """
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _is_file(value):
            found.add(value.strip())
        if "://" in value:
            for match in _USER.finditer(value):
                userinfo = match["plain"] or match["odd"] or ""
                found.add(userinfo.partition(":")[2])
        if "=" in value:
            for match in _PAIR.finditer(value):
                found.add(match["quoted"] or match["bare"] or "")
    found |= {unquote(value) for value in found}
    return frozenset(v for v in found if len(v) >= (8 if v.isalpha() else 6) and GONE not in v)


def _is_file(value: str) -> bool:
    """Whether a variable holds where a secret is, and not the secret."""
    return os.path.isabs(value) and os.path.exists(value)


@lru_cache(maxsize=8)
def _known(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """Finds the secrets however they are quoted or encoded; longer ones first."""
    if not secrets:
        return None
    ordered = sorted(secrets, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join("".join(map(_forms, secret)) for secret in ordered))


@lru_cache(maxsize=1024)
def _forms(letter: str) -> str:
    """A letter as it is, and as it stands in URIs, JSON, Python's `repr` and HTML."""
    if letter.isascii() and letter.isalnum():
        return letter
    encoded = quote(letter, safe="", errors="surrogatepass")
    forms = {
        *(letter, encoded, encoded.lower(), f"\\{letter}", html.escape(letter)),
        *(json.dumps(letter)[1:-1], repr(letter)[1:-1], ascii(letter)[1:-1]),
        *("".join(f"%{byte:02X}" for byte in letter.encode(errors="surrogatepass")),),
        *("+" if letter == " " else letter,),
    }
    return f"(?:{'|'.join(re.escape(form) for form in sorted(forms, key=len, reverse=True))})"


@contextlib.contextmanager
def redacting() -> Iterator[None]:
    """Redact what leaves as an exception, with all that it chains; also a decorator."""
    try:
        yield
    except BaseException as error:
        clean = purge(error)
        if clean is error:
            raise
        raise clean from clean.__cause__  # and not from what it stands for


def purge(error: BaseException) -> BaseException:
    """Redact an exception and all that it chains, in place: types and tracebacks stay.

    Returns:
        The exception; for one that cannot be changed, an `Exception` with its redacted words.
    """
    return _purge(error, {})


# what traceback prints and is no entry of an exception's __dict__
_SLOTS = ("filename", "filename2", "strerror", "msg", "text", "reason", "code", "name", "path")


def _purge(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    if id(error) in done:
        return done[id(error)]
    done[id(error)] = error
    with contextlib.suppress(AttributeError, TypeError):
        error.args = _clean(error.args, done)
    for name in (*getattr(error, "__dict__", ()), *_SLOTS):
        with contextlib.suppress(Exception):  # a property may raise anything
            value = getattr(error, name)
            clean = _clean(value, done)
            if clean is not value and clean != value:
                setattr(error, name, clean)
    cause, context, hidden = error.__cause__, error.__context__, error.__suppress_context__
    cause = _purge(cause, done) if cause is not None else None
    context = _purge(context, done) if context is not None else None
    members = getattr(error, "exceptions", ()) if isinstance(error, BaseExceptionGroup) else ()
    kept = [_purge(member, done) is member for member in members]
    words = "".join(traceback.format_exception_only(error)).strip()
    if redact(words) != words or not all(kept):
        clean = done[id(error)] = Exception(redact(words)).with_traceback(error.__traceback__)
        clean.__cause__ = cause if cause is not None or hidden else context
        return clean
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, hidden
    return error


def _clean(value: Any, done: dict[int, BaseException], depth: int = 4) -> Any:
    """A value redacted; what is none of the usual kinds is returned as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, bytes):
        return redact(value.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    if isinstance(value, BaseException):
        return _purge(value, done)
    if type(value) in (tuple, list) and depth:
        return type(value)(_clean(item, done, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return {k: _clean(item, done, depth - 1) for k, item in value.items()}
    return value


def redact_record(record: logging.LogRecord) -> bool:
    """Redact a log record, its exception included; as a `logging` filter it lets all pass."""
    try:
        record.msg, record.args = redact(record.getMessage()), None
    except Exception:  # logging tells of a wrong format itself, and shows it
        record.msg, record.args = redact(f"{record.msg} {record.args}"), None
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip("\n")
    if record.stack_info:
        record.stack_info = redact(record.stack_info)
    return True


_make_record = logging.getLogRecordFactory()
_format_warning = warnings.formatwarning


def guard_process() -> None:
    """Redact this process's log lines, warnings and tracebacks, whichever library they come from.

    For a command: a library leaves its host's logging alone.
    """
    logging.setLogRecordFactory(_redacted_record)
    warnings.formatwarning = _redacted_warning
    sys.excepthook = _print_exception
    threading.excepthook = _print_failed
    sys.unraisablehook = _print_failed


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _make_record(*args, **kwargs)
    redact_record(record)
    return record


def _redacted_warning(*args: Any, **kwargs: Any) -> str:
    return redact(_format_warning(*args, **kwargs))


def _print_failed(failed: Any) -> None:
    """What a thread or a destructor raised."""
    if not issubclass(failed.exc_type, SystemExit):  # a thread just ends by it
        _print_exception(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _print_exception(kind: Any, error: Any, trace: Any) -> None:
    if sys.stderr is not None:
        lines = traceback.format_exception(kind, error, trace)
        print(redact("".join(lines)), end="", file=sys.stderr)
