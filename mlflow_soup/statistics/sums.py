"""Sums in fp32, held in a memory-mapped safetensors file: they use page cache, not memory."""

import json
import math
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mlflow_soup.errors import NonFiniteError
from mlflow_soup.files.durable import check_space, on_disk
from mlflow_soup.files.writer import BLOCK, BUFFER
from mlflow_soup.weights.mix import Scratch, is_finite


class Sums(Mapping[str, Tensor]):
    """Sums by name, zeros at first, in a new safetensors file.

    On the CPU, adding to a tensor changes the file. On an accelerator the sums are kept on the
    device, and `finish` copies them to the file.

    Args:
        path: the file; must not exist.
        shapes: name → shape of the tensor.
        devices: name → the device on which the sum is computed.

    Raises:
        StoreError: the disk has no space for the file.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        devices: Mapping[str, torch.device],
    ) -> None:
        self._kept = _zeros(path, shapes)
        self._growing = {
            name: kept
            if devices[name].type == "cpu"
            else torch.zeros_like(kept, device=devices[name])
            for name, kept in self._kept.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._growing[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def finish(self, name: str, count: int, label: str) -> float:
        """Divide a sum by a count, write it to the file, and return the total of its elements.

        Args:
            name: the name of the sum.
            count: the divisor.
            label: the name of the parent, for the error.

        Raises:
            NonFiniteError: the sum holds NaN or infinity.
        """
        kept = self._kept[name]
        kept.copy_(self._growing[name].div_(count))
        if not is_finite(kept.view(-1), Scratch()):
            raise NonFiniteError(
                f"the statistics of {name} are not finite",
                where=label,
                fix="merge another version; this one gives NaN or infinity on the calibration text",
            )
        return float(kept.sum())


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of sums, memory-mapped read-only.

    Writing into one crashes the process.

    Raises:
        OSError, SafetensorError: the file cannot be read, or is damaged.
    """
    with safe_open(path, framework="np"), path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _laid_over(content, json.loads(content[8 : _data(content)]))


def _zeros(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensors of zeros, mapped from a new safetensors file; writing to them changes the file.

    Raises:
        StoreError: the disk has no space for the file.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    check_space(path.parent, 8 + len(text) + end)
    with on_disk(path), path.open("xb+") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # write all zeros: if the file were sparse and the disk became full, writing to the mapping
        # would crash the process
        for start in range(0, end, BUFFER):
            file.write(bytes(min(BUFFER, end - start)))
        file.flush()
        return _laid_over(mmap.mmap(file.fileno(), 0), header)


def _laid_over(content: mmap.mmap, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fp32 tensors of a mapped file."""
    data = _data(content)
    tensors = {}
    with warnings.catch_warnings():
        # torch warns about read-only buffers; those of `mapped` are read-only on purpose
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, info in header.items():
            begin, end = info["data_offsets"]
            flat = torch.frombuffer(
                content, dtype=torch.float32, count=(end - begin) // 4, offset=data + begin
            )
            tensors[name] = flat.view(info["shape"])
    return tensors


def _data(content: mmap.mmap) -> int:
    """The byte at which the data begin."""
    return 8 + int.from_bytes(content[:8], "little")
