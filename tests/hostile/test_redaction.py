"""The filter: what it never lets through, and what it leaves alone."""

import json
import logging
import string
import time
import traceback
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from requests.exceptions import ConnectionError as ConnectionFailed
from sqlalchemy.exc import OperationalError

from mlflow_soup import errors
from mlflow_soup.errors import StoreError
from mlflow_soup.redaction import purge, redact, redact_record, redacting

UNHURRIED = settings(deadline=None)  # the machine may be busy
PASSWORD = "hunter2-s3cret"
KEY_ID = "AKIAIOSFODNN7EXAMPLE"
VISIBLE = "".join(c for c in string.printable if not c.isspace())
# no words, which the environment's may be told from only by their length
secrets = st.text(VISIBLE + "äß€", min_size=6, max_size=40).map(lambda text: f"Zq7{text}")
prose = st.text(string.ascii_letters + string.digits + " .,:;/()[]{}'\"=@#%&?_-\n", max_size=60)
ENCODINGS = (
    str,
    quote,
    quote_plus,
    lambda s: quote(s, safe=""),
    lambda s: quote(s, safe="!$&'()*+,;="),
    lambda s: json.dumps(s)[1:-1],
    lambda s: repr(s)[1:-1],
    lambda s: ascii(s)[1:-1],
)


@UNHURRIED
@given(secret=secrets, before=prose, after=prose, encode=st.sampled_from(ENCODINGS))
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"])
def test_a_secret_of_the_environment_never_survives(name, secret, before, after, encode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        shown = redact(f"{before}{encode(secret)}{after}")
        assert redact(shown) == shown
    assert encode(secret) not in shown


@UNHURRIED
@given(secret=secrets, before=prose, after=prose, encode=st.sampled_from(ENCODINGS))
def test_nor_does_a_password_of_a_uri_in_the_environment(secret, before, after, encode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"mysql://alice:{quote(secret, safe='')}@host/db")
        assert encode(secret) not in redact(f"{before}{encode(secret)}{after}")


passwords = st.text(string.ascii_letters + string.digits + "!$%&*+-_~^|", min_size=6).map(
    lambda text: f"Zq7{text}"
)


@UNHURRIED
@given(secret=passwords, before=prose, after=prose)
@pytest.mark.parametrize(
    "place",
    [
        "http://alice:{}@host:5000/api",
        "postgresql+psycopg2://alice:a/{}@host/db",
        "https://{}@host",
        "mysql://host/db?password={}",
        "https://bucket.s3.amazonaws.com/key?X-Amz-Signature={}",
        "password='{}'",
        '{{"token": "{}"}}',
        "aws_secret_access_key={} ",
        "Authorization: Bearer {}",
        "Authorization: Basic {}",
    ],
)
def test_a_secret_is_known_by_its_place(place, secret, before, after):
    if "=" in place[-4:]:
        secret = secret.replace("&", "_")  # ends it
    # what precedes must not open a quotation that ends within
    planted = before.replace('"', "").replace("'", "") + " " + place.format(secret) + " " + after
    assert secret not in redact(planted)


@pytest.mark.parametrize(
    "secret",
    [
        KEY_ID,
        "ASIAIOSFODNN7EXAMPLE",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "dapi0123456789abcdef0123456789abcdef-2",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl",
    ],
)
def test_a_secret_is_known_by_its_looks(secret):
    assert redact(f"key {secret}, or '{secret}'\\n{secret}") == "key …, or '…'\\n…"


@UNHURRIED
@given(text=st.text() | prose)
def test_what_is_redacted_stays_as_it_is(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "models:/my-llm@champion",
        "models:/my-llm/14 and models:/my-llm@champion, http://host:5000/path@version",
        "http://127.0.0.1:5000/#/experiments/1/runs/0ab?workflowType=machine_learning&a=b",
        "[toy-llm v1](#/models/toy-llm/versions/1), [all λ](#/experiments/1/runs?compareRuns=1)",
        "[paper](https://arxiv.org/abs/2403.19390).",
        "mlflow ui --backend-store-uri sqlite:////tmp/mlflow.db",
        "file:///home/alice@work/checkpoint",
        "s3://bucket/key@2/model.safetensors",
        "fisher read 4096 tokens of the held-out items",
        "eos_token: </s>, max_new_tokens=32",
        "wrong password: the token is refused; Basic authentication; set AWS_SECRET_ACCESS_KEY",
        "soup.key is 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_harmless_text_is_left_alone(text):
    assert redact(text) == text


@UNHURRIED
@given(text=st.text(string.ascii_letters + string.digits + " .,:;()/_-'\n"))
def test_prose_is_left_alone_but_for_what_looks_like_a_key(text):
    if "://" not in text and "bearer" not in text.lower() and "basic" not in text.lower():
        assert redact(text) == text


def test_brackets_and_full_stops_around_a_secret_stay():
    assert redact("see [x](https://h/y?a=b).") == "see [x](https://h/y?…)."
    assert redact("connect(password='a b', user='c')") == "connect(password='…', user='c')"
    assert redact("f(password=abc)") == "f(password=…)"
    assert redact("Key=a;AccountKey=xyz==;End=1") == "Key=a;AccountKey=…;End=1"


def test_ordinary_words_and_paths_in_secret_variables_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("DB_PASSWORD", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@host/mlflow")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    text = f"mlflow-soup: {tmp_path} disabled"
    assert redact(text) == text


@pytest.mark.parametrize("secret", ["/Zq7+k3y/of8base64=", "notes-2024"])
def test_a_secret_that_only_resembles_a_path_is_hidden(monkeypatch, tmp_path, secret):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes-2024").touch()  # a password may be the name of a file here
    monkeypatch.setenv("A_PASSWORD", secret)
    assert redact(f"refused: {secret}") == "refused: …"


def chained():
    """A SoupError over MLflow's, over requests', over SQLAlchemy's; each of them with secrets."""
    try:
        try:
            try:
                parameters = {"value": PASSWORD, "nested": [{"key": KEY_ID}]}
                try:
                    raise KeyError(PASSWORD)
                except KeyError as error:
                    error.add_note(f"with {PASSWORD}")
                    raise OperationalError(f"SET x = '{PASSWORD}'", parameters, error) from error
            except OperationalError as error:
                raise ConnectionFailed(OSError(5, PASSWORD, f"/x/{PASSWORD}")) from error
        except ConnectionFailed:
            raise MlflowException(f"no http://u:{PASSWORD}@host, {KEY_ID}")  # noqa: B904
    except MlflowException as error:
        raise StoreError(f"gone: {error}", where="here", fix="none") from error


def test_an_error_is_redacted_with_all_that_it_chains_and_keeps_its_types(monkeypatch):
    monkeypatch.setenv("A_PASSWORD", PASSWORD)
    with pytest.raises(StoreError) as caught, redacting():
        chained()
    shown = "".join(traceback.format_exception(caught.value))
    # the lines of this file that plant them are shown, too, but not the values
    assert PASSWORD not in shown
    assert KEY_ID not in shown
    links = []
    error = caught.value
    while error is not None:
        links.append(type(error))
        error = error.__cause__ or error.__context__
    assert links == [StoreError, MlflowException, ConnectionFailed, OperationalError, KeyError]
    assert "in chained" in shown


class Stubborn(Exception):
    """Says what it was told, wherever that is kept."""

    __slots__ = ("_told",)

    def __init__(self, told):
        super().__init__()
        self._told = lambda: told

    def __str__(self):
        return self._told()


def test_an_exception_that_cannot_be_changed_is_replaced_by_its_words(monkeypatch):
    monkeypatch.setenv("A_PASSWORD", PASSWORD)
    with pytest.raises(Exception, match="Stubborn: told …") as caught, redacting():
        raise Stubborn(f"told {PASSWORD}")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError, match="no") as caught, redacting():
        raise ValueError("no") from Stubborn(f"told {PASSWORD}")
    assert str(caught.value.__cause__).endswith("Stubborn: told …")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_exceptions_in_a_circle_or_a_group_are_redacted():
    one, two = ValueError(KEY_ID), KeyError(KEY_ID)
    one.__context__, two.__context__ = two, one
    group = ExceptionGroup(f"all {KEY_ID}", [one, two])
    assert KEY_ID not in "".join(traceback.format_exception(purge(group)))


def test_what_holds_no_secret_is_not_touched():
    inner = [object()]
    error = ValueError("plain", inner, 3)
    assert purge(error) is error
    assert error.args == ("plain", inner, 3)


def test_our_logger_is_redacted_in_any_host(caplog):
    logging.getLogger("mlflow_soup").warning("at %s with %s", "http://u:pw@host", KEY_ID)
    assert caplog.messages == ["at http://host with …"]


def test_a_record_with_an_exception_or_a_wrong_format_is_redacted():
    try:
        raise ValueError(KEY_ID)
    except ValueError as error:
        about = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "%s", (KEY_ID,), about)
    redact_record(record)
    shown = logging.Formatter().format(record)
    assert shown.startswith("…\nTraceback")
    assert KEY_ID not in shown
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "%d %d", (KEY_ID,), None)
    redact_record(record)
    assert KEY_ID not in logging.Formatter().format(record)


@pytest.mark.parametrize(
    "unit", ["://", "://a:", "eyJaaaaaaaa", "password='", 'token": "', "bearer ", "://u:p@h?a=b,"]
)
def test_no_text_takes_long(unit):
    text = unit * (200_000 // len(unit))
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 20.0  # a second or two; minutes, were it quadratic


def test_passwords_in_uris_are_not_repeated():
    text = "API request to http://user:hunter2@host:5000/api failed"
    assert redact(text) == "API request to http://host:5000/api failed"
    assert redact("postgresql://u:p@ss@host/db") == "postgresql://host/db"
    assert "hunter2" not in redact("mysql://host/db?password=hunter2 gone")
    shown = str(errors.StoreError("at http://u:hunter2@h", where="w", fix="f"))
    assert "hunter2" not in shown
