"""One filter that text passes before it is shown, logged, raised or stored.

It escapes what a terminal obeys or does not show, because others write names. And it removes
secrets. It finds a secret in three ways, from certain to likely: by its value, if an environment
variable holds it; by its place, as in `://user:password@` or `password=…`; by its looks, as for the
ID of an AWS key.
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
import unicodedata
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

GONE = "…"
_CLOSERS = ",.:)]}'\"\\`"  # characters that follow a value in prose, Markdown, JSON and Python

# names of environment variables that hold secrets; not TOKENIZERS_PARALLELISM, MAX_TOKENS or PWD
_SECRET_NAME = re.compile(
    r"""PASSW | PASSPHRASE | PASSCODE | PASS$ | _PWD | SECRET | CREDENTIAL | TOKEN(?!I|S)
      | (?:API|ACCESS|AUTH|BEARER)_?TOKENS
      | KEY(?:S|_?ID)?(?:_?\d+)?$""",
    re.X | re.I,
)
# names that mean something else as often; only values with a digit count
_LIKELY_NAME = re.compile(
    r"""(?:^|_|API|ACCESS)KEY_(?!FILE|PATH|DIR|NAME|TYPE|PREFIX|RING|SIZE|MAP|ALG)
      | CONN(?:ECTION)?_?STR | COOKIE | WEBHOOK
      | (?:^|_)(?:AUTH|BEARER|CERT|CREDS?|DSN|JWT|OTP|PASS|PAT|PIN|PSK|PW|SALT|SAS)(?:$|_)""",
    re.X | re.I,
)
_PEM = re.compile(  # to its end, to the next one, or to the end of the text
    r"""-----BEGIN\s(?:[A-Z0-9]+\s)*PRIVATE\sKEY (?:(?!-----BEGIN\s)[\s\S])*?
        (?: -----END\s[A-Z0-9\s]{0,60}----- | (?=-----BEGIN\s) | \Z )""",
    re.X,
)
_GAP = r"(?:\s|\\[nrt]){1,99}"
_NETRC = re.compile(
    rf"""((?: \b(?:machine|login|account){_GAP}[^\s\\]{{1,999}}{_GAP} | ^\s{{0,99}} )
          password{_GAP} ) [^\s\\"']+ (?= ["']?$ | {_GAP} )""",
    re.X | re.M,
)
# what is left of a location whose :// a library has cut off
_LOCATION = re.compile(
    r"""(bucket\sname\s["'])[^"'\n]{0,999}[:@][^"'\n]{0,999}(?=["'])
      | (["'])[^\s"'/:@]{0,999}:[^\s"'/@]{1,999}@(?=[\w.-]{1,999}\2)""",
    re.X,
)
# `odd` finds passwords with a slash, which SQLAlchemy accepts; the `:5000` of `host:5000/a@b` is a
# port. Lengths are bounded: without a bound, a hostile text of many :// would take minutes.
_USER = re.compile(
    r"""://(?: (?P<plain> [^/?#\s"<>]{0,999} )
             | (?P<odd> [^/?#\s@:\[]{0,99} : (?!\d+[/?#]) [^\s@"<>]{0,999} ) )@""",
    re.X,
)
# text after a # is not a query: it stays, because MLflow's UI uses it in links
_QUERY = re.compile(r"""(?P<head>://[^\s?#"<>]{0,1999}\?)(?P<bare>[^\s"<>]+)""")
_PAIR = re.compile(
    r"""(?P<head> (?: passw(?:or)?d | passphrase | passcode | pwd | secret | token | credentials?
                    | (?<![a-z]) (?:pass|pw|auth|jwt|sas) | cookie | sharedaccesssignature
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
# as a header or in YAML; with a digit, which the next word of a sentence has not
_COLON = re.compile(
    r"""((?: passw(?:or)?d | passphrase | (?:secret|private|api|access|auth)[_-]?(?:key|token)
           | [_-]secret | [_-]token) \s?:\s? ) (?=\S*\d) [^\s"'<|][^\s"']{7,}""",
    re.X | re.I,
)
_COOKIE = re.compile(r"(\b(?:set-)?cookie['\"]?\s?:\s?['\"]?)[^\s=]{1,99}=[^\"'\r\n]+", re.I)
_BEARER = re.compile(r"\b(bearer|basic)(\s+)(?=\S*\d)[\w.~+/=-]{16,}", re.I)
# what detect-secrets does not know yet, or finds in time that grows with the square of the length
_LOOKS = re.compile(
    r"""hf_[A-Za-z0-9]{16,} | api_org_[A-Za-z0-9]{16,}      # Hugging Face
      | gh[opsur]_[A-Za-z0-9]{16,} | github_pat_\w{20,}     # GitHub
      | dapi[0-9a-f]{16,}(?:-\d)?                           # Databricks
      | eyJ[\w-]{8,999}\.[\w-]{8,}\.[\w-]*                  # JSON web tokens
      | (?:(?<![A-Za-z0-9])|(?<=\\[nrt]))sk-(?:(?:ant|proj|svcacct|admin|or|lf)-[\w-]{16,}
          | [A-Za-z0-9]{20,})                               # OpenAI, Anthropic and alike
      | AIza[\w-]{35} | ya29\.[\w-]{20,} | GOCSPX-[\w-]{20,}  # Google
      | [\w~.-]{3}8Q~[\w~.-]{31,}                          # Azure
      | xapp-\d-[\w-]{20,} | xoxe[.-][\w.-]{20,}           # Slack
      | hv[sbr]\.[\w-]{20,} | dop_v1_[0-9a-f]{20,}         # Vault, DigitalOcean
      | npm_[A-Za-z0-9]{30,} | dckr_pat_[\w-]{16,}         # npm, Docker
      | (?:gsk|lin_api|nvapi|pplx|xai|wandb_v\d)[_-][A-Za-z0-9]{20,}[\w-]*
      | [rs]k_test_[0-9A-Za-z]{16,} | whsec_[\w+/=]{20,}    # Stripe
      | shp(?:at|ca|pa|ss)_[0-9a-fA-F]{20,}                 # Shopify
      | AGE-SECRET-KEY-1[0-9A-Z]{20,}""",
    re.X,
)


@lru_cache(maxsize=1)
def _vendors() -> tuple[re.Pattern[str], ...]:
    """What the keys of vendors look like: the rows of detect-secrets that no digest looks like.

    It is imported late, because it imports requests.
    """
    from detect_secrets.plugins import (
        aws,
        discord,
        gitlab_token,
        mailchimp,
        pypi_token,
        sendgrid,
        slack,
        square_oauth,
        stripe,
        twilio,
    )

    rows = [
        *aws.AWSKeyDetector.denylist[:1],  # the others are hidden by their place
        *discord.DiscordBotTokenDetector.denylist,
        *gitlab_token.GitLabTokenDetector.denylist,
        *mailchimp.MailchimpDetector.denylist,
        *pypi_token.PypiTokenDetector.denylist,
        *sendgrid.SendGridDetector.denylist,
        *slack.SlackDetector.denylist,
        *square_oauth.SquareOAuthDetector.denylist,
        *stripe.StripeDetector.denylist,
        *twilio.TwilioKeyDetector.denylist,
    ]
    return (_LOOKS, *rows)


# categories of Unicode: control, format (as the marks that turn the direction of writing),
# surrogates, separators of lines and paragraphs
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SPECIAL = re.compile(r"[^ -~\n\t]")


def redact(text: str) -> str:
    """The text with each secret replaced, and with what is not seen escaped as in Python.

    Secrets are found by their value, their place or their looks. In URIs, user names, passwords and
    queries are removed; the part after a # stays. Line feeds and tabs stay.
    `redact(redact(text))` equals `redact(text)`.
    """
    return _without_secrets(_SPECIAL.sub(_escaped, text))


def redact_line(text: str) -> str:
    """The same in one line: a name cannot add lines to it."""
    return redact(text).replace("\n", "\\n")


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    return repr(letter)[1:-1] if unicodedata.category(letter) in _UNSEEN else letter


def _without_secrets(text: str) -> str:
    known = _known(_held())
    before = None
    while text != before:
        before = text
        if known is not None:
            text = known.sub(GONE, text)
        text = _PEM.sub(GONE, text)
        text = _USER.sub("://", text)
        text = _QUERY.sub(_hide, text)
        text = _PAIR.sub(_hide, text)
        text = _HEADER.sub(rf"\1{GONE}", text)
        text = _BEARER.sub(rf"\1\2{GONE}", text)
        text = _COLON.sub(rf"\1{GONE}", text)
        text = _COOKIE.sub(rf"\1{GONE}", text)
        text = _NETRC.sub(rf"\1{GONE}", text)
        text = _LOCATION.sub(lambda match: f"{match[1] or match[2]}{GONE}", text)
        for looks in _vendors():
            text = looks.sub(GONE, text)
    return text


def _hide(match: re.Match[str]) -> str:
    """The match with its value hidden; punctuation and brackets after the value stay."""
    groups = match.groupdict()
    if groups["bare"] is not None:
        value = groups["bare"].rstrip(_CLOSERS)
        rest = groups["bare"][len(value) :]
        return f"{groups['head']}{GONE}{rest}" if value else match[0]
    mark = groups["quote"]
    return f"{groups['head']}{mark}{GONE}{mark}" if groups["quoted"] else match[0]


def _held() -> frozenset[str]:
    """The secrets in the environment variables, as they are and percent-decoded, and their parts.

    Short values and short plain words are left out: the password `mlflow` would hide every mention
    of MLflow.
    """
    found: set[str] = set()
    for name in list(os.environ):  # in one step: other threads change variables meanwhile
        value = os.environ.get(name, "")
        found |= _inside(value)
        if _is_secret(name, value) and not _is_file(value):
            found |= {value.strip(), *_parts(value)}
    found |= {unquote(value) for value in found}
    return frozenset(v for v in found if len(v) >= (8 if v.isalpha() else 6) and GONE not in v)


@lru_cache(maxsize=1024)  # a job asks hundreds of times
def _is_secret(name: str, value: str) -> bool:
    """Whether a variable of this name holds a secret, or the path of a file that does."""
    digit = any(map(str.isdecimal, value))
    named = _SECRET_NAME.search(name) or (digit and _LIKELY_NAME.search(name))
    return bool(named) and not (value.isdecimal() and len(value) < 8)


@lru_cache(maxsize=1024)
def _inside(value: str) -> frozenset[str]:
    """The secrets within the value of a variable, by their place in it."""
    found = set()
    for block in _PEM.findall(value):
        found |= {block, *_parts(block)}
    for line in _NETRC.finditer(value):
        found.add(line[0][len(line[1]) :])
    if "://" in value:
        for match in _USER.finditer(value):
            user, colon, password = (match["plain"] or match["odd"] or "").partition(":")
            found.add(password if colon else user if len(user) >= 16 else "")
    if "=" in value or ":" in value:
        for match in _PAIR.finditer(value):
            found.add(match["quoted"] or match["bare"] or "")
    return frozenset(found)


def _parts(value: str) -> list[str]:
    """The lines of a value of many, since an error may quote one; not those that frame a PEM."""
    lines = re.split(r"\s*(?:\n|\\n)\s*", value.strip())
    return [line for line in lines if len(line) >= 16 and "-----" not in line] if lines[1:] else []


def _is_file(value: str) -> bool:
    """True if the value is the path of a file (which may hold a secret), not a secret itself."""
    return os.path.isabs(value) and os.path.exists(value)


@lru_cache(maxsize=8)
def _known(secrets: frozenset[str]) -> re.Pattern[str] | None:
    """A pattern that finds the secrets in any quoting or encoding; longer secrets first."""
    if not secrets:
        return None
    ordered = sorted(secrets, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join("".join(map(_forms, secret)) for secret in ordered))


@lru_cache(maxsize=1024)
def _forms(letter: str) -> str:
    """A pattern for one letter: plain, or as written in URIs, JSON, Python's `repr` and HTML."""
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
    """Redact an exception that leaves the block, with its chained ones; also a decorator."""
    try:
        yield
    except BaseException as error:
        clean = purge(error)
        if clean is error:
            raise
        raise clean from clean.__cause__  # not from `error`, which holds the secret


def purge(error: BaseException) -> BaseException:
    """Redact an exception and its chained exceptions in place; types and tracebacks stay.

    Returns:
        The same exception; if it cannot be changed, a new `Exception` with the redacted message.
    """
    return _purge(error, {})


# attributes that traceback prints but that are not in an exception's __dict__
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
    """The value with its texts redacted; a value of an unknown type is returned unchanged."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, bytes):
        text = _without_secrets(value.decode(errors="surrogateescape"))
        return text.encode(errors="surrogateescape")
    if isinstance(value, BaseException):
        return _purge(value, done)
    if type(value) in (tuple, list) and depth:
        return type(value)(_clean(item, done, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return {k: _clean(item, done, depth - 1) for k, item in value.items()}
    return value


def redact_record(record: logging.LogRecord) -> bool:
    """Redact a log record and its exception; always True, so that it is also a `logging` filter."""
    words = redact_line if record.name == "mlflow_soup" else redact
    try:
        record.msg, record.args = words(record.getMessage()), None
    except Exception:  # a wrong format; logging reports it later and prints it
        record.msg, record.args = words(f"{record.msg} {record.args}"), None
    if record.exc_info and record.exc_info[0] is not None:
        if issubclass(record.exc_info[0], KeyboardInterrupt | SystemExit):
            record.exc_info = None  # a signal, which is no fault
        else:
            trace = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = redact(trace).rstrip("\n")
    if record.stack_info:
        record.stack_info = redact(record.stack_info)
    return True


_make_record = logging.getLogRecordFactory()
_format_warning = warnings.formatwarning


def guard_process() -> None:
    """Redact all log lines, warnings and tracebacks of this process, from any library.

    Only commands call it: a library must not change the logging of its host.
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
    """Print the exception that a thread or a destructor raised."""
    if not issubclass(failed.exc_type, SystemExit):  # SystemExit ends a thread silently
        _print_exception(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _print_exception(kind: Any, error: Any, trace: Any) -> None:
    if sys.stderr is not None:
        lines = traceback.format_exception(kind, error, trace)
        print(redact("".join(lines)), end="", file=sys.stderr)
