"""Write a soup of several parents, tensor by tensor, or compare a soup with its parents.

The memory does not depend on the size of the model or the number of parents. The soup has the
shards, order and names of its newest parent. Its bytes do not depend on the number of threads.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from mlflow_soup.errors import ParentError
from mlflow_soup.files.writer import BLOCK, FileWriter, Sink
from mlflow_soup.records import Digests, Mismatch
from mlflow_soup.weights.checkpoint import MAY_BE_INFINITE, Checkpoint
from mlflow_soup.weights.digests import Digesting, canonical, check_may_be_infinite, threads
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.inherit import copy_the_rest
from mlflow_soup.weights.mix import Scratch, Term, add_up, bits, is_finite, same_bytes, terms

# tensor name, tensors of the parents → tensor of the soup, or None for the weighted sum
Blend = Callable[[str, Sequence[Tensor]], Tensor | None]


_COMPARED = 1 << 22  # elements that `compare` mixes at a time


@dataclass(frozen=True)
class Written:
    """A soup on disk, with its digests and those of its parents; None if they were not computed."""

    checkpoint: Checkpoint
    digests: Digests | None
    parents: tuple[Digests | None, ...]


def write(
    parents: Sequence[Checkpoint],
    lam: Sequence[float],
    folder: Path,
    *,
    digests: bool = True,
    blend: Blend | None = None,
) -> Written:
    """Write the soup Σ λ_i·Θ_i with the files, names and dtypes of its newest parent.

    The files of `inherit.BELONGS` are copied from the newest parent.

    Args:
        parents: the checkpoints, oldest first, already checked to be compatible.
        lam: merge weights λ, one per parent; they sum to 1.
        folder: the folder for the artifact tree; exists and is empty.
        digests: if True, compute the digests of the soup and the parents while writing.
        blend: computes some tensors in another way, with the parents' shape and dtype.

    Raises:
        ParentError: a parent holds a value that is not finite, an integer tensor that differs from
            the other parents, or a link; or it was changed in the meantime.
        StoreError: the disk is full or fails.
    """
    for parent in parents:  # if a file changed, its tensors may have moved
        parent.check_unchanged()
    donor = parents[-1]
    weights_folder = copy_the_rest(donor, folder)
    weights = [dict(parent.read()) for parent in parents]
    contents: dict[str, str] = {}
    files: dict[str, str] = {}
    scratch = Scratch()
    size = sum(stamp[0] for stamp in donor.stamps.values())
    bar = tqdm(total=size, desc="merge", unit="B", unit_scale=True, disable=None)
    with bar, threads() as pool:
        of_parents = [Digesting(parent, pool) for parent in parents if digests]
        for file, names in groupby(donor.tensors, key=lambda name: donor.tensors[name].file):
            hashing = {}
            with FileWriter(weights_folder / file, digest=digests) as writer:
                writer.put(_header(donor, file))
                for name in names:
                    tensors = [own[name].reshape(-1) for own in weights]
                    hashing[name] = hashlib.sha256()
                    sink = hashing[name].update if digests else None
                    parts = _parts(name, [own[name] for own in weights], lam, blend)
                    if not _stream(name, parts, writer, sink, scratch):
                        _refuse(parents, name, tensors, scratch)
                    bar.update(tensors[0].nbytes)
            contents |= {name: sha256.hexdigest() for name, sha256 in hashing.items()}
            if writer.sha256 is not None:
                files[file] = writer.sha256.hexdigest()
        measured = tuple(digesting.result() for digesting in of_parents)
    for parent in parents:
        parent.check_unchanged()
    made = find_checkpoint(folder, "the soup", with_tokenizer=False)
    own = Digests(canonical(donor.tensors, contents), contents, files) if digests else None
    return Written(made, own, measured or (None,) * len(parents))


def _parts(
    name: str, tensors: Sequence[Tensor], lam: Sequence[float], blend: Blend | None
) -> list[Term]:
    """The terms of the weighted sum for one tensor, flattened."""
    blended = blend(name, tensors) if blend else None
    if blended is not None:
        return [(blended.reshape(-1), 1.0)]
    return terms([tensor.reshape(-1) for tensor in tensors], lam, name=name)


def _stream(
    name: str,
    parts: Sequence[Term],
    writer: FileWriter,
    sink: Sink | None,
    scratch: Scratch,
) -> bool:
    """Mix one tensor into the writer's buffers, piece by piece; False if it is not finite."""
    first, done = parts[0][0], 0
    check = not name.endswith(MAY_BE_INFINITE)
    while done < len(first):
        out = writer.room(first.dtype, len(first) - done, sink)
        here = slice(done, done + len(out))
        if not add_up([(t[here], c) for t, c in parts], out, scratch=scratch, check=check):
            return False
        done += len(out)
    return True


def _header(donor: Checkpoint, file: str) -> bytes:
    """The header of the donor's file, with the one metadata key that loaders require.

    It is padded with spaces, which safetensors allows, so that the data begin at a whole block.
    """
    tensors = {name: info for name, info in donor.header(file).items() if name != "__metadata__"}
    header = {"__metadata__": {"format": "pt"}} | tensors
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def _refuse(
    parents: Sequence[Checkpoint], name: str, tensors: Sequence[Tensor], scratch: Scratch
) -> NoReturn:
    """Raise the error for a soup's tensor that is not finite, and name the parent at fault."""
    for parent, tensor in zip(parents, tensors, strict=True):
        if not is_finite(tensor, scratch):
            check_may_be_infinite(parent, name)
    raise ParentError(
        f"a value in {name!r} of the soup exceeds the largest number of its dtype",
        where=" and ".join(parent.label for parent in parents),
        fix="merge other versions; the values of these are at the limit of their dtype",
    )


def compare(
    parents: Sequence[Checkpoint],
    lam: Sequence[float],
    soup: Checkpoint,
    *,
    blend: Blend | None = None,
) -> Iterator[Mismatch]:
    """Mix the parents again, and yield each tensor of the soup that differs from the result.

    Args:
        parents: the checkpoints, oldest first, already checked to be compatible.
        lam: merge weights λ, one per parent.
        soup: the soup to compare.
        blend: the `blend` that `write` was given.
    """
    weights = [dict(parent.read()) for parent in parents]
    stored = dict(soup.read())
    expected = parents[-1].tensors
    scratch = Scratch()
    for name in tqdm(sorted({*expected, *stored}), "merge again", unit="tensor", disable=None):
        ours, theirs = expected.get(name), soup.tensors.get(name)
        if str(ours) != str(theirs):  # compares dtype and shape; the file may differ
            yield Mismatch(name, 0, (), str(ours or "absent"), str(theirs or "absent"))
            continue
        parts = _parts(name, [own[name] for own in weights], lam, blend)
        count, first = 0, None
        found = stored[name].reshape(-1)
        for start in range(0, len(found), _COMPARED):
            here = slice(start, start + _COMPARED)
            again = torch.empty_like(found[here])
            add_up([(tensor[here], c) for tensor, c in parts], again, scratch=scratch)
            if same_bytes(again, found[here]):
                continue
            ours_bits, theirs_bits = bits(again), bits(found[here])
            at = (ours_bits != theirs_bits).nonzero()[:, 0]
            count += len(at)
            if first is None:
                place = torch.unravel_index(at[0] + start, stored[name].shape)
                index = tuple(int(i) for i in place)
                first = (index, _hex(ours_bits[at[0]]), _hex(theirs_bits[at[0]]))
        if first is not None:
            yield Mismatch(name, count, *first)


def _hex(value: Tensor) -> str:
    """The bits of one element, as a hexadecimal number."""
    width = value.element_size()
    return f"0x{int(value) & ((1 << 8 * width) - 1):0{2 * width}x}"
