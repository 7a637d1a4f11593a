"""Readers for files of unknown origin: plain files, JSON, YAML and the headers of safetensors.

A registry accepts whatever its users upload. Nothing here runs code, follows a link, waits for a
pipe, or uses more time and memory than the limits below allow. A refused file raises a ValueError
that gives the reason; the caller adds the name of the file.

Files with several hard links are accepted: a store may link files that are equal.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from io import BufferedReader
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 64  # nested levels of JSON and YAML; dimensions of a tensor
# commas and opening brackets of JSON, of which each value but the first needs one: the largest
# tokenizers, with 500 000 tokens and merges, have 2 million
MOST_MARKS = 4_000_000
MOST_NODES = 100_000  # YAML values, aliases expanded: nine lines can expand to billions of values
LARGEST_YAML = 1 << 20  # bytes
LARGEST_JSON = 16 << 20  # bytes of a record that mlflow-soup itself writes
LARGEST_HEADER = 8 << 20  # bytes of a safetensors header
MOST_TENSORS = 20_000  # in one file
_LARGEST_TENSOR = 1 << 56  # elements; their number of bits still fits into 64 bits

# what reading a file that is damaged, or that somebody else wrote, raises
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError),
    *(RecursionError, ArithmeticError),
)

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Function(str):
    """The name after `!function` in YAML; the function is not loaded or run."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which also knows `!function`."""


_Loader.add_constructor("!function", lambda _, node: Function(str(node.value)))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        ValueError: the path is a link, a folder, a pipe or a device.
        OSError: the file does not exist or may not be read.
    """
    if path.is_symlink():
        raise ValueError("it is a link")
    # the path may be replaced after the check: O_NOFOLLOW fails on a link, and O_NONBLOCK keeps
    # open() from waiting for a pipe
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file that has at most `most` of them.

    Raises:
        ValueError: it is not a regular file, or it is longer than `most` bytes.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most} bytes")
    return content


def read_hex(path: Path) -> str:
    """The hexadecimal number in a small file, which may be the name of a folder.

    Raises:
        ValueError: it is not a regular file, or holds anything else.
        OSError: the file cannot be read.
    """
    content = read_regular(path, 64).decode()
    if not re.fullmatch("[0-9a-f]+", content):
        raise ValueError("it is not a hexadecimal number")
    return content


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: the text is not JSON, has more than `MOST_MARKS` commas and brackets, or is
            nested deeper than `DEEPEST` levels.
    """
    value = _load_json(content)
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def check_marks(content: bytes) -> None:
    """Refuse JSON of too many values: 60 MB of empty lists would take half a minute and 2 GB.

    Raises:
        ValueError: the text has more than `MOST_MARKS` commas and brackets.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_MARKS:
        raise ValueError(f"it has more than {MOST_MARKS} commas and brackets")


def _load_json(content: bytes, **hooks: Any) -> Any:
    check_marks(content)
    try:
        return json.loads(content.decode(), **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse_yaml(content: bytes) -> Any:
    """The value of a YAML text: plain values, and a `Function` for each `!function`.

    Raises:
        ValueError: the text is not YAML, has a tag for any other object, is nested deeper than
            `DEEPEST` levels, contains itself, or has more than `MOST_NODES` values.
    """
    try:
        _check_events(content)
        return yaml.load(content, Loader=_Loader)  # a subclass of a safe loader
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_events(content: bytes) -> None:
    """Refuse YAML that must not be loaded: libyaml would crash the process on deep nesting."""
    sizes: dict[str, int] = {}  # anchor → number of nodes
    within: list[tuple[str | None, int]] = []  # open collections: anchor, number of nodes before
    nodes = 0
    for event in yaml.parse(content, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = within.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes or event.anchor in (anchor for anchor, _ in within):
                raise ValueError(f"the alias *{event.anchor} is undefined, or refers to itself")
            nodes += sizes[event.anchor]
        if len(within) > DEEPEST:
            raise ValueError("it is nested too deep")
        if nodes > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} values when its aliases are expanded")


def read_header(path: Path, widths: Mapping[str, int]) -> dict[str, Any]:
    """The header of a safetensors file; call this before any library opens the file.

    Args:
        path: the file.
        widths: dtype → bytes per element, as for `parse_header`.

    Raises:
        ValueError: as `parse_header`; or the header is missing or longer than `LARGEST_HEADER`.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("the file ends inside its header")
        if length > LARGEST_HEADER:
            raise ValueError(f"the header is longer than {LARGEST_HEADER} bytes")
        return parse_header(file.read(length), size - 8 - length, widths)


def parse_header(content: bytes, size: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """The header of a safetensors file, checked: the tensors cover each byte of data exactly once.

    The checks are stricter than those of safetensors: a header that safetensors rejects is rejected
    here too.

    Args:
        content: the header's JSON.
        size: the number of bytes after the header.
        widths: dtype → bytes per element; a tensor of any other dtype may have any size.

    Raises:
        ValueError: the header is wrong; the message names the wrong tensor.
    """
    if not content.startswith(b"{"):
        raise ValueError("the header does not begin with {")
    header: dict[str, Any] = _load_json(
        content,
        object_pairs_hook=_unique,
        parse_int=_natural,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the __metadata__ of the header is not an object of strings")
    # encode() raises a ValueError for a lone surrogate
    "".join((*header, *metadata, *metadata.values())).encode()
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not tensors:
        raise ValueError("the file holds no tensors")
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"the file holds more than {MOST_TENSORS} tensors")
    covered = 0
    spans = sorted((_span(name, entry, widths), name) for name, entry in tensors.items())
    for (begin, end), name in spans:
        if begin != covered:
            raise ValueError(
                f"{name!r} begins at byte {begin}, but the data before it end at byte {covered}"
            )
        covered = end
    if covered != size:
        raise ValueError(f"the tensors take {covered} bytes, but the file has {size} bytes of data")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header has a key twice")
    return found


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"the header holds the number {text[:20]}, negative or too large")
    return int(text)


def _refuse_number(text: str) -> int:
    raise ValueError(f"the header holds the number {text[:20]}, which is not a whole number")


def _span(name: str, entry: Any, widths: Mapping[str, int]) -> tuple[int, int]:
    """The first byte of a tensor's data, and the byte after the last."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name!r} is not a string")
    dtype.encode()  # raises a ValueError for a lone surrogate
    if not all(isinstance(n, list) and all(type(i) is int for i in n) for n in (shape, offsets)):
        raise ValueError(f"the shape or data_offsets of {name!r} is not a list of whole numbers")
    if len(shape) > DEEPEST:
        raise ValueError(f"{name!r} has {len(shape)} dimensions, but at most {DEEPEST} are allowed")
    # partial products from the left, as safetensors multiplies: a 0 at the end does not help
    if any(count > _LARGEST_TENSOR for count in accumulate(shape, mul)):
        raise ValueError(f"the shape of {name!r} is too large")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} ends before it begins")
    if dtype in widths and math.prod(shape) * widths[dtype] != offsets[1] - offsets[0]:
        raise ValueError(
            f"{name!r} takes {offsets[1] - offsets[0]} bytes, which does not fit {dtype} {shape}"
        )
    return offsets[0], offsets[1]
