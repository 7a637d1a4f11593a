"""Readers for files of unknown origin: what they accept, what they refuse, and how fast."""

import json
import os
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

import strategies as s
from mlflow_soup.files.untrusted import (
    LARGEST_HEADER,
    MOST_TENSORS,
    Function,
    open_regular,
    parse_header,
    parse_json,
    parse_yaml,
    read_header,
    read_regular,
)
from mlflow_soup.weights.checkpoint import _WIDTHS


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def parse(content):
    """The header of a whole file, split off as `read_header` does."""
    length = int.from_bytes(content[:8], "little")
    return parse_header(content[8 : 8 + length], len(content) - 8 - length, _WIDTHS)


@given(tensors=s.tensor_sets())
def test_a_header_that_safetensors_writes_is_accepted(tensors):
    header = parse(save(tensors, {"format": "pt"}))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


WRONG = {
    "begins with a space": (b" {}", 0, "does not begin"),
    "not JSON": (b"{", 0, "Expecting"),
    "not UTF-8": (b'{"\xff": 1}', 0, "utf-8"),
    "text after it": (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}x', 4, "Extra"),
    "no tensors": ({}, 0, "holds no tensors"),
    "a list": (b'{"a":[]}', 0, "must have exactly dtype"),
    "a name twice": (b'{"a":1,"a":1}', 0, "twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', 0, "twice"),
    "an extra field": ({"a": {**entry(), "more": 1}}, 8, "must have exactly"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "must have exactly"),
    "a dtype that is not a string": ({"a": entry(dtype=3)}, 8, "is not a string"),
    "a shape of fractions": ({"a": entry(shape=(2.0,))}, 8, "number 2.0"),
    "a shape of booleans": ({"a": entry(shape=(True,))}, 8, "not a list of whole"),
    "a negative shape": ({"a": entry(shape=(-2,))}, 8, "number -2"),
    "minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "number -0"),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', 0, "number NaN"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", 0, "holds the number 9"),
    "an overflow that a 0 hides": ({"a": entry((1 << 40, 1 << 40, 0), (0, 0))}, 0, "too large"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8, "ends before"),
    "an end before the begin": ({"a": entry(offsets=(8, 0))}, 8, "ends before"),
    "a size that does not fit the shape": ({"a": entry(offsets=(0, 4))}, 4, "takes 4 bytes"),
    "a hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' begins at byte 12"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' begins at byte 4"),
    "bytes left over": ({"a": entry()}, 9, "take 8 bytes, but the file has 9"),
    "bytes missing": ({"a": entry()}, 7, "take 8 bytes, but the file has 7"),
    "a lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4, "utf"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, 8, "object of strings"),
    "100 dimensions": ({"a": entry((1,) * 100, (0, 4))}, 4, "has 100 dimensions"),
    "deep nesting": (b'{"a":' * 100_000, 0, "nested too deep"),
    "too many tensors": (
        {f"t{i}": entry((0,), (0, 0)) for i in range(MOST_TENSORS + 1)},
        0,
        "more than 20000",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_header_that_is_wrong_is_refused_with_a_reason(name):
    header, size, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        parse(packed(header, size))


def padded(filler, opening=b"[", closing=b"]"):
    """60 MB of JSON that repeats one value."""
    return opening + (filler + b",") * ((60 << 20) // len(filler + b",")) + filler + closing


MANY = {
    "empty lists": lambda: padded(b"[]"),
    "empty objects": lambda: padded(b"{}"),
    "lists in lists": lambda: padded(b"[[[[]]]]"),
    "numbers": lambda: padded(b"1"),
    "fields": lambda: padded(b'"a":[]', opening=b"{", closing=b"}"),
}


@pytest.mark.parametrize("case", MANY)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(case):
    content = MANY[case]()
    begin = time.process_time()
    with pytest.raises(ValueError, match="more than 4000000 commas and brackets"):
        parse_json(content)
    with pytest.raises(ValueError, match="more than 4000000 commas and brackets"):
        parse_header(b"{" + content, 0, _WIDTHS)
    assert time.process_time() - begin < 2


def test_the_json_of_a_large_tokenizer_is_accepted():
    vocabulary = {f"token{i}": i for i in range(500_000)}
    merges = [[f"to{i}", "ken"] for i in range(500_000)]
    tokenizer = {"added_tokens": [], "model": {"vocab": vocabulary, "merges": merges}}
    assert parse_json(json.dumps(tokenizer).encode()) == tokenizer


@given(
    tensors=s.tensor_sets(),
    changes=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=3),
)
def test_a_header_that_safetensors_rejects_is_rejected(tensors, changes):
    content = save(tensors)
    for place, inserted in changes:
        place %= len(content)
        content = content[:place] + inserted + content[place + len(inserted) // 2 :]
    try:
        header = parse(content)
    except ValueError:
        return
    if {value["dtype"] for key, value in header.items() if key != "__metadata__"} <= {*_WIDTHS}:
        try:
            deserialize(content)
        except SafetensorError as error:
            pytest.fail(f"{content!r}: {error}")


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    (tmp_path / "f").write_bytes((LARGEST_HEADER + 1).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="ends inside its header"):
        read_header(tmp_path / "f", _WIDTHS)
    with (tmp_path / "f").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="header is longer than 8388608 bytes"):
        read_header(tmp_path / "f", _WIDTHS)


def link(path):
    path.symlink_to("/etc/passwd")


def dangling(path):
    path.symlink_to("/no/such/file")


@pytest.mark.parametrize("make", [link, dangling, os.mkfifo, os.mkdir])
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path, make):
    make(tmp_path / "f")
    with pytest.raises(ValueError, match=r"it is (a link|not a regular file)"):
        open_regular(tmp_path / "f")


def test_a_hard_link_is_read_like_any_file(tmp_path):
    (tmp_path / "f").write_bytes(b"content")
    os.link(tmp_path / "f", tmp_path / "g")
    assert read_regular(tmp_path / "g", 7) == b"content"
    with pytest.raises(ValueError, match="longer than 6 bytes"):
        read_regular(tmp_path / "g", 6)


@pytest.mark.parametrize("nest", ['{"a":', "["])
@pytest.mark.parametrize("deep", [65, 900, 100_000])
def test_json_nested_too_deep_is_refused(nest, deep):
    closing = {"[": "]"}.get(nest, "}")
    assert parse_json(f"{nest * 64}1{closing * 64}".encode())
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(f"{nest * deep}1{closing * deep}".encode())


@pytest.mark.parametrize("nest", ["[", "{a: "])
@pytest.mark.parametrize("deep", [65, 900, 100_000])
def test_yaml_nested_too_deep_is_refused(nest, deep):
    closing = {"[": "]"}.get(nest, "}")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_yaml(f"{nest * deep}1{closing * deep}".encode())


def bomb(line):
    names = "abcdefghij"
    lines = ["a: &a {k: 1}"]
    lines += [line.format(n, ",".join(f"*{m}" for _ in range(9))) for m, n in pairwise(names)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb("{0}: &{0} [{1}]"), "has more than 100000 values"),
        (bomb("{0}: &{0} {{<<: [{1}]}}"), "has more than 100000 values"),
        (b"&a [*a]", "refers to itself"),
        (b"*a", "is undefined"),
        (b"a: !!python/object/apply:os.system ['touch canary']", "could not determine"),
        (b"a: !!python/name:os.system", "could not determine"),
        (b"a: !Ref b", "could not determine"),
        (b"a: [", "expected"),
        (b"!!bool maybe", "maybe"),
        (b"!!int ''", "."),
        (b"!!timestamp never", "."),
        (b"{[a]: b}", "unhashable"),
        (b"\xff\xfe\x00", "."),
    ],
)
def test_yaml_that_is_more_than_plain_values_is_refused_at_once(text, words):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert time.monotonic() - begin < 2


def test_yaml_functions_stay_names():
    assert parse_yaml(b"a: !function utils.run") == {"a": Function("utils.run")}
    assert isinstance(parse_yaml(b"!function utils.run"), Function)
    assert parse_yaml(b"base: &b {x: 1}\nown: {<<: *b, y: [1, 2.5, null]}") == {
        "base": {"x": 1},
        "own": {"x": 1, "y": [1, 2.5, None]},
    }
