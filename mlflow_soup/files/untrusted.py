"""What others wrote, read without trusting it: files, JSON, YAML and headers of safetensors.

A registry takes anything that anybody uploads. Nothing here runs code, follows a link, waits for a
pipe, or takes more time and memory than its limits allow. What is refused is a ValueError that says
why; whoever reads the file says which it was.

A file with several hard links is as good as any: a store may well link equal files.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

import yaml

DEEPEST = 64  # levels of JSON and YAML
MOST_NODES = 100_000  # of YAML, with what its aliases stand for: nine lines can stand for billions
LARGEST_YAML = 1 << 20
LARGEST_HEADER = 8 << 20  # of safetensors
MOST_TENSORS = 20_000  # in one file
_LARGEST_TENSOR = 1 << 56  # elements: so many bits still are a 64-bit number

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Function(str):
    """What stands after `!function` in YAML: the name of code, and nothing that was run."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, to which `!function` is known."""


_Loader.add_constructor("!function", lambda _, node: Function(str(node.value)))


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open to be read; the name itself is no link.

    Raises:
        ValueError: it is a link, a folder, a pipe or a device.
        OSError: it is not there, or closed to us.
    """
    if path.is_symlink():
        raise ValueError("it is a link")
    # should it become a link or a pipe meanwhile, the one fails and the other does not wait
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: it is none, or longer than `most`.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """The value in JSON, in UTF-8.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        value = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def parse_yaml(content: bytes) -> Any:
    """The value in YAML: plain ones only, and `Function` where it says `!function`.

    Raises:
        ValueError: it is none, it asks for other objects, is nested too deep, holds itself, or
            stands for more than it says.
    """
    try:
        _check_events(content)
        return yaml.load(content, Loader=_Loader)  # a safe one
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_events(content: bytes) -> None:
    """Refuse what cannot be composed: libyaml ends the process where it is nested too deep."""
    sizes: dict[str, int] = {}  # by anchor: nodes
    within: list[tuple[str | None, int]] = []  # anchor, and nodes before it
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
                raise ValueError(f"*{event.anchor} stands for nothing, or for itself")
            nodes += sizes[event.anchor]
        if len(within) > DEEPEST:
            raise ValueError("it is nested too deep")
        if nodes > MOST_NODES:
            raise ValueError(f"it stands for more than {MOST_NODES} values")


def read_header(path: Path, widths: Mapping[str, int]) -> dict[str, Any]:
    """What a safetensors file begins with, checked before anything else opens the file.

    Raises:
        ValueError: as of `parse_header`; or there is no header, or too long a one.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it ends within its header")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header is longer than {LARGEST_HEADER} bytes")
        return parse_header(file.read(length), size - 8 - length, widths)


def parse_header(content: bytes, size: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """The header of a safetensors file whose tensors cover all of its data, each byte once.

    It is stricter than safetensors: what that rejects is rejected here.

    Args:
        content: the JSON.
        size: how many bytes come after it.
        widths: dtype → bytes of an element; a tensor of another dtype may have any size.

    Raises:
        ValueError: it is no such header; the tensor that is amiss is named.
    """
    if not content.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    try:
        header: dict[str, Any] = json.loads(
            content.decode(),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    "".join((*header, *metadata, *metadata.values())).encode()  # no lone surrogates
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if not tensors:
        raise ValueError("it holds no tensors")
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"it holds more than {MOST_TENSORS} tensors")
    covered = 0
    spans = sorted((_span(name, entry, widths), name) for name, entry in tensors.items())
    for (begin, end), name in spans:
        if begin != covered:
            raise ValueError(f"{name!r} begins at {begin}, and what is before it ends at {covered}")
        covered = end
    if covered != size:
        raise ValueError(f"its tensors take {covered} bytes, and there are {size}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header says something twice")
    return found


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"its header holds the number {text[:20]}")
    return int(text)


def _refuse_number(text: str) -> int:
    raise ValueError(f"its header holds the number {text[:20]}")


def _span(name: str, entry: Any, widths: Mapping[str, int]) -> tuple[int, int]:
    """Where a tensor's data begin and end."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has not dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of {name!r} is no text")
    dtype.encode()
    if not all(isinstance(n, list) and all(type(i) is int for i in n) for n in (shape, offsets)):
        raise ValueError(f"the shape or the data_offsets of {name!r} are no list of whole numbers")
    # from the left, as safetensors multiplies: a last 0 makes up for nothing
    if any(count > _LARGEST_TENSOR for count in accumulate(shape, mul)):
        raise ValueError(f"the shape of {name!r} is too large")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} ends before it begins")
    if dtype in widths and math.prod(shape) * widths[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r} takes {offsets[1] - offsets[0]} bytes, {dtype} {shape} do not")
    return offsets[0], offsets[1]
