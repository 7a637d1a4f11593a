"""The filter: what it never lets through, and what it leaves alone."""

import json
import logging
import os
import string
import threading
import time
import traceback
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from requests.exceptions import ConnectionError as ConnectionFailed
from sqlalchemy.exc import OperationalError

from mlflow_soup import errors
from mlflow_soup.errors import StoreError
from mlflow_soup.redaction import purge, redact, redact_record, redacting

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


@given(secret=secrets, before=prose, after=prose, encode=st.sampled_from(ENCODINGS))
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"])
def test_a_secret_of_the_environment_never_survives(name, secret, before, after, encode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        shown = redact(f"{before}{encode(secret)}{after}")
        assert redact(shown) == shown
    assert encode(secret) not in shown


@given(secret=secrets, before=prose, after=prose, encode=st.sampled_from(ENCODINGS))
def test_nor_does_a_password_of_a_uri_in_the_environment(secret, before, after, encode):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"mysql://alice:{quote(secret, safe='')}@host/db")
        assert encode(secret) not in redact(f"{before}{encode(secret)}{after}")


passwords = st.text(string.ascii_letters + string.digits + "!$%&*+-_~^|", min_size=6).map(
    lambda text: f"Zq7{text}"
)


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


BODY = "Zq7k3yOf8Base64" * 12
HEX = "9f86d081884c7d659a2feaa0c55ad015"
TOKENS = {
    "aws sts": f"ABIA{BODY[:16].upper()}",
    "anthropic": f"sk-ant-api03-{BODY[:80]}",
    "openai": f"sk-proj-{BODY[:48]}",
    "openai of old": f"sk-{BODY[:48]}",
    "google": f"AIza{BODY[:35]}",
    "google oauth": f"ya29.{BODY[:60]}",
    "azure": f"a1b8Q~{BODY[:34]}",
    "azure sas": f"https://a.blob.core.windows.net/c?sv=2024-01-01&sig={BODY[:40]}%3D",
    "slack": "xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx",
    "slack app": "xapp-1-A0123456789-1234567890123-" + HEX,
    "stripe": f"sk_live_{BODY[:24]}",
    "gitlab runner": f"glrt-{BODY[:20]}",
    "pypi": f"pypi-AgEIcHlwaS5vcmc{BODY[:80]}",
    "npm": f"npm_{BODY[:36]}",
    "docker": f"dckr_pat_{BODY[:27]}",
    "vault": f"hvs.{BODY[:90]}",
    "sendgrid": f"SG.{BODY[:22]}.{BODY[:43]}",
    "twilio": f"SK{HEX}",
    "discord": f"M{BODY[:23]}.{BODY[:6]}.{BODY[:27]}",
    "mailchimp": f"{HEX}-us12",
    "digital ocean": f"dop_v1_{HEX}{HEX}",
    "shopify": f"shpat_{HEX}",
    "groq": f"gsk_{BODY[:52]}",
    "nvidia": f"nvapi-{BODY[:64]}",
    "age": f"AGE-SECRET-KEY-1{BODY[:58].upper()}",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    "around", ["{}", "key {}, gone", "'{}'", "a\\n{}\\nb", "x={}&y", "[{}](#)"]
)
def test_the_tokens_of_vendors_are_hidden(token, around):
    shown = redact(around.format(token))
    assert token not in shown
    assert token.partition("?")[0][-12:] not in shown or "?" in token
    assert redact(shown) == shown


PEM = "\n".join(
    ["-----BEGIN {}PRIVATE KEY-----", BODY[:64], BODY[64:128], "-----END {}PRIVATE KEY-----"]
)


@pytest.mark.parametrize("kind", ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "])
@pytest.mark.parametrize("encode", [str, json.dumps, repr, quote_plus, lambda s: s[:110]])
def test_private_keys_are_hidden_also_by_their_lines(monkeypatch, kind, encode):
    pem = PEM.format(kind, kind)
    assert BODY[:20] not in redact(f"loading {pem} failed")
    assert BODY[:20] not in redact(f"loading {pem[:90]}")
    monkeypatch.setenv("SERVER_PEM", pem)
    assert BODY[:20] not in redact(f"loading {encode(pem)} failed")
    assert BODY[64:84] not in redact(f"line 3 is {BODY[64:128]!r}")


@pytest.mark.parametrize(
    "line",
    [
        "machine host login alice password {}",
        "machine host\n  login alice\n  password {}\n",
        "default login alice password {}",
        "machine host login alice account x password {}",
        "machine host password {} login alice",
        "bad line 'machine host login alice password {}'",
        "b'machine host\\n login alice\\n password {}\\n'",
        "password {}",
    ],
)
def test_lines_of_netrc_are_hidden(monkeypatch, line):
    assert "hunter2" not in redact(line.format("hunter2-s3cret"))
    monkeypatch.setenv("NETRC_CONTENT", line.format("hunter2-s3cret"))
    assert "hunter2" not in redact("refused: hunter2-s3cret") or line[0] == "b"


@pytest.mark.parametrize(
    "text",
    [
        'Invalid bucket name "alice:{}@bucket": Bucket name must match the regex',
        'Invalid bucket name "alice:{}": Bucket name must match the regex',
        'Invalid bucket name "{}@bucket": Bucket name must match',
        "cannot resolve 'alice:{}@host'",
        'no host "alice:{}@host.example"',
        "password: {}",
        "X-Api-Key: {}",
        "PRIVATE-TOKEN: {}",
        "Cookie: session={}; a=b",
        "{{'Set-Cookie': 'session={}; Path=/'}}",
        "//registry.npmjs.org/:_authToken={}",
        "SharedAccessSignature={}",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey={};EndpointSuffix=b",
        "user=alice pass={}",
    ],
)
def test_secrets_are_known_by_more_places(text):
    shown = redact(text.format("hunter2-s3cret"))
    assert "hunter2" not in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "name",
    [
        *("GITHUB_PAT", "AZURE_DEVOPS_EXT_PAT", "MYSQL_PWD", "PGPASSWORD", "DB_PASS", "SMTP_PW"),
        *("STRIPE_KEY_LIVE", "API_KEYS", "OPENAI_KEY_2", "OPENAI_API_KEY", "NPM_AUTH", "A_JWT"),
        *("SESSION_COOKIE", "SLACK_WEBHOOK", "DB_CONN_STRING", "AZURE_CONNECTION_STRING"),
        *("PASSPHRASE", "SSH_PASSCODE", "GCP_CREDS", "ENCRYPTION_SALT", "WIFI_PSK", "STORAGE_SAS"),
        *("API_TOKENS", "HF_TOKEN", "CI_JOB_TOKEN", "CLIENT_SECRET", "aws_session_token"),
    ],
)
def test_many_names_of_variables_hold_secrets(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2-s3cret")
    assert redact("at hunter2-s3cret") == "at …"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_AUTH", "databricks"),
        ("MAX_TOKENS", "131072"),
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("KEYBOARD_LAYOUT", "us-intl1"),
        ("SSH_KEY_PATH", "models/v12"),
        ("S3_KEY_PREFIX", "models/v12"),
        ("OLDPWD", "/gone/models/v12"),
        ("GIT_AUTHOR_NAME", "toy-llm v12"),
        ("MONKEY_PATCH_LEVEL", "toy-llm-12"),
        ("WEBHOOK_STATE", "disabled"),
        ("SHARE_PATTERN", "toy-llm-12"),
        ("PIN", "40960"),
        ("APIKEY_FILE", "models/v12"),
    ],
)
def test_other_names_hold_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"at {value}.") == f"at {value}."


digits = st.text("0123456789abcdef", min_size=32, max_size=64)


@given(
    digest=digits,
    number=st.integers(0, 10**13),
    share=st.floats(0, 1),
    name=st.from_regex(r"[a-z]{2,12}(-[a-z]{2,12}){0,3}-v?[0-9]{1,3}", fullmatch=True),
)
def test_digests_runs_versions_and_weights_are_left_alone(digest, number, share, name):
    for text in (
        f"{number}:{digest}",
        f"sha256:{digest}, run {digest[:32]}, m-{digest[:32]}",
        f"models:/{name}/{number % 100} and models:/{name}@champion",
        f"image {name}:v{number % 9}@sha256:{digest}",
        f"λ = {share!r} · {name}, --allow-task-code {digest}",
        f"soup.key={digest} cfg.seed {number}",
        f"s3://{name}/{number}/{digest[:32]}/artifacts/model.safetensors",
        f"task {name}:acc_norm,none at {share:.4f}",
        f"{{'weights': [{share!r}], 'digest': '{digest}'}}",
    ):
        assert redact(text) == text


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
    "unit",
    [
        *("://", "://a:", "eyJaaaaaaaa", "password='", 'token": "', "bearer ", "://u:p@h?a=b,"),
        *(
            "-----BEGIN PRIVATE KEY-----",
            "-----BEGIN A ",
            "machine a ",
            "password a\n",
            "cookie: a",
        ),
        *("sk-ant-", "AIza", "SK0", 'bucket name "', "'a:", "password: a1", "xoxb-1-", "AC", "M"),
    ],
)
def test_no_text_takes_long(unit):
    text = unit * (100_000 // len(unit))
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 10.0  # a second or less; a minute, were it quadratic


def test_variables_may_change_while_a_text_is_redacted():
    """As they do when another thread asks MLflow for something."""
    names = [f"MLFLOW_SOUP_TEST_{number}" for number in range(200)]
    done = threading.Event()

    def change():
        while not done.is_set():
            for name in names:
                os.environ[name] = "x"
            for name in names:
                del os.environ[name]

    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(200):
            assert redact("nothing to hide") == "nothing to hide"
    finally:
        done.set()
        other.join()


def test_passwords_in_uris_are_not_repeated():
    text = "API request to http://user:hunter2@host:5000/api failed"
    assert redact(text) == "API request to http://host:5000/api failed"
    assert redact("postgresql://u:p@ss@host/db") == "postgresql://host/db"
    assert "hunter2" not in redact("mysql://host/db?password=hunter2 gone")
    shown = str(errors.StoreError("at http://u:hunter2@h", where="w", fix="f"))
    assert "hunter2" not in shown
