"""Every parser, fed with anything: a value or one of our errors comes out, no traceback.

In the default tier a few hundred inputs each. In the slow tier minutes of them, and coverage-guided
fuzzing of the two formats that are read before any library sees them: a safetensors header, against
safetensors itself, and an index.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import strategies as s
import toy
from mlflow_soup import cli
from mlflow_soup.errors import SoupError, SpecError
from mlflow_soup.evaluation.suite import _split
from mlflow_soup.files.untrusted import parse_json, parse_yaml
from mlflow_soup.records import Version
from mlflow_soup.registry import family, naming
from mlflow_soup.request.names import (
    check_alias,
    check_name,
    parse_pair,
    parse_pairs,
    parse_target,
    parse_uri,
    parse_version,
    parse_versions,
)
from mlflow_soup.request.spec import Spec
from mlflow_soup.statistics import calibration
from mlflow_soup.weights.checkpoint import INDEX, SINGLE
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import format_manifest, parse_manifest
from mlflow_soup.weights.provenance import Origin
from mlflow_soup.workflows import verify

# other examples in every run
ANY = settings(suppress_health_check=[*HealthCheck], derandomize=False)
# pieces that get further into a parser than characters do
PIECES = ["v12", "@champion", ",", ":", "/", "models:/", "my-llm", "alias:", "stage:Production"]
PIECES += [
    "model:",
    "acc",
    "arc_easy",
    " ",
    "\n",
    "1/3",
    "nan",
    "-1",
    "1e999",
    "\ud800",
    "\x00",
    "9" * 30,
]
WORDS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)

TEXTS = {
    "a version": parse_version,
    "a URI": parse_uri,
    "a pair": parse_pair,
    "versions": parse_versions,
    "pairs": parse_pairs,
    "a target": parse_target,
    "an alias": lambda text: check_alias(text, "here"),
    "a name": check_name,
    "tasks": lambda text: _split(text, "--tasks"),
}


@pytest.mark.parametrize("name", TEXTS)
@ANY
@given(text=WORDS)
def test_text_is_read_or_refused(name, text):
    with contextlib.suppress(SpecError):
        TEXTS[name](text)


@ANY
@given(
    tags=st.dictionaries(st.sampled_from([f"soup.{name}" for name in Spec.__annotations__]), WORDS)
)
def test_policy_tags_are_read_or_refused(tags):
    with contextlib.suppress(SpecError):
        Spec(pair="v1,v2").settle(tags)


@ANY
@given(named=st.dictionaries(st.sampled_from(list(Spec.__annotations__)), VALUES | WORDS))
def test_a_spec_takes_or_refuses_anything(named):
    with contextlib.suppress(SpecError):
        Spec(**named)


def changed(manifests, change):
    """A manifest as it is written, with something else in one place."""
    content, (steps, value) = format_manifest(manifests), change
    at = content
    for step in steps:
        inner = at[sorted(at)[step % len(at)] if isinstance(at, dict) else step % len(at)]
        if not isinstance(inner, dict | list) or not inner:
            break
        at = inner
    at[sorted(at)[steps[-1] % len(at)] if isinstance(at, dict) else steps[-1] % len(at)] = value
    return content


CHANGES = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), VALUES)
MANIFESTS = VALUES | st.builds(changed, s.manifests(), CHANGES)


@ANY
@given(content=MANIFESTS)
def test_a_manifest_is_read_or_refused_in_the_documented_way(content):
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
        parse_manifest(content)


def written(path, content):
    path.write_bytes(content)
    return path


BYTES = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())


@ANY
@given(content=BYTES | MANIFESTS.map(lambda value: json.dumps(value).encode()))
def test_a_manifest_file_is_read_or_refused(tmp_path, content):
    written(tmp_path / "soup_manifest.json", content)
    with contextlib.suppress(SoupError):
        verify.read_manifest(Origin(tmp_path, "soup"))


@ANY
@given(
    tags=st.dictionaries(
        st.sampled_from([naming.PARENTS, naming.WEIGHTS, naming.LAMBDA, naming.GATE]), WORDS
    )
)
def test_tags_of_versions_are_told_or_are_a_problem(tags):
    member = family.read(Version("toy-llm", 3), tags)
    missing = {parent: family.Member(parent, family.MISSING) for parent, _ in member.parents}
    told = family.gather(member.version, {**missing, member.version: member})
    assert all((family.text(told), family.mermaid(told), json.dumps(family.graph(told))))


@ANY
@given(content=BYTES, suffix=st.sampled_from([".jsonl", ".txt"]))
def test_calibration_text_is_read_or_refused(tmp_path, content, suffix):
    with contextlib.suppress(SpecError):
        calibration.read_texts(written(tmp_path / f"text{suffix}", content))


YAML = BYTES | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode())
ODD = [
    "&a",
    "*a",
    "<<: ",
    "!!int",
    "!!bool",
    "!!timestamp",
    "!!omap",
    "!!set",
    "!!binary",
    "!x",
    "%",
    "? ",
]
ODD += [
    "- ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "|",
    ">",
    "'",
    '"',
    "\n",
    " ",
    "a",
    "1",
    "0x",
    "2020-13-45",
    "---",
]


@ANY
@given(
    content=YAML
    | st.lists(st.sampled_from(ODD), max_size=12).map(lambda odd: "".join(odd).encode())
)
def test_yaml_is_read_or_refused(content):
    with contextlib.suppress(ValueError):
        parse_yaml(content)


@ANY
@given(content=BYTES)
def test_json_is_read_or_refused(content):
    with contextlib.suppress(ValueError):
        parse_json(content)


KNOBS = st.dictionaries(
    st.sampled_from([*Spec.__annotations__, "pear"]), VALUES | WORDS, max_size=3
)


@ANY
@given(content=YAML | KNOBS.map(lambda knobs: yaml.safe_dump(knobs).encode()))
def test_the_file_of_a_request_is_read_or_refused(tmp_path, monkeypatch, content):
    # what is sound goes no further than this
    monkeypatch.setattr(
        cli, "_spec", lambda said: (_ for _ in ()).throw(SpecError("x", where="", fix=""))
    )
    path = written(tmp_path / "spec.yaml", content)
    done = CliRunner().invoke(cli.main, ["run", "--spec", str(path)])
    assert done.exit_code == 2, done.exception


@ANY
@given(content=BYTES, file=st.sampled_from([SINGLE, INDEX, "config.json", "tokenizer_config.json"]))
def test_a_checkpoint_is_opened_or_refused(tmp_path, content, file):
    folder = tmp_path / "bare"
    if not folder.exists():
        toy.bare(folder, {})
    before = (folder / file).read_bytes() if (folder / file).exists() else None
    written(folder / file, content)
    with contextlib.suppress(SoupError):
        find_checkpoint(folder, "v1")
    (folder / file).unlink()
    if before is not None:
        written(folder / file, before)


# ---- the slow tier

SECONDS = 60


@pytest.mark.slow
def test_texts_of_all_kinds_are_read_or_refused(capsys):
    draw, count, end = random.Random(0), 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(8)))
        for parse in TEXTS.values():
            count += 1
            with contextlib.suppress(SpecError):
                parse(text)
    with capsys.disabled():
        print(f"\ntexts: {count} inputs in {SECONDS} s")
    assert count > 10 * len(TEXTS)


FUZZER = """
import atheris, os, sys, time

from safetensors import deserialize

with atheris.instrument_imports(include=["mlflow_soup.files.untrusted"]):
    from mlflow_soup.files import untrusted

from mlflow_soup.weights.checkpoint import _WIDTHS

count = accepted = 0

def header(content):
    global count, accepted
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        return
    count += 1
    try:
        found = untrusted.parse_header(content[8 : 8 + length], len(content) - 8 - length, _WIDTHS)
    except ValueError:
        return
    if {v["dtype"] for k, v in found.items() if k != "__metadata__"} <= _WIDTHS.keys():
        accepted += 1
        deserialize(content)  # raises where it rejects

def index(content):
    global count, accepted
    count += 1
    for parse in (untrusted.parse_json, untrusted.parse_yaml):
        try:
            parse(content)
            accepted += 1
        except ValueError:
            pass

def wrapped(content):
    # most inputs are no file: take them for a header of the right length, too
    size = 24 if len(content) % 2 else 0
    header(len(content).to_bytes(8, "little") + content + bytes(size))
    header(content)

target = {"header": wrapped, "index": index}[sys.argv.pop(1)]
end = time.monotonic() + float(sys.argv.pop(1))

def timed(content):
    target(content)
    if time.monotonic() > end:  # libFuzzer ends without a word from Python
        print("INPUTS", count, accepted, flush=True)
        os._exit(0)

atheris.Setup(sys.argv, timed)
atheris.Fuzz()
"""


def seeds(folder):
    """Files to begin with: two tensors, empty ones, metadata; an index."""
    folder.mkdir()
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    empty = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    for i, content in enumerate(
        [
            {"a": entry},
            {"__metadata__": {"format": "pt"}, "a": entry, "b": empty},
            {"weight_map": {"a": SINGLE, "b": "../x"}, "metadata": {"total_size": 24}},
        ]
    ):
        text = json.dumps(content).encode()
        (folder / f"{i}").write_bytes(text)
        (folder / f"{i}.file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", ["header", "index"])
def test_a_minute_of_guided_fuzzing_finds_nothing(tmp_path, capsys, what):
    pytest.importorskip(
        "atheris", reason="no wheel for this Python: pip install 'mlflow-soup[fuzz]'"
    )
    (tmp_path / "fuzzer.py").write_text(FUZZER)
    words = tmp_path / "words"
    words.write_text(
        "\n".join(
            f'"{word}"' for word in ("dtype", "shape", "data_offsets", "F32", "__metadata__", "-0")
        )
    )
    command = [sys.executable, str(tmp_path / "fuzzer.py"), what, str(SECONDS)]
    command += [str(seeds(tmp_path / "seeds")), "-max_len=400", f"-dict={words}"]
    command += [f"-artifact_prefix={tmp_path}/"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    _, count, accepted = done.stdout[done.stdout.index("INPUTS") :].split()[:3]
    with capsys.disabled():
        print(f"\n{what}: {count} inputs in {SECONDS} s, {accepted} accepted")
    assert int(count) > 1000
    assert int(accepted) > 100
