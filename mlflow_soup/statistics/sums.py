"""Sums in fp32 that grow in the safetensors file they are kept in: page cache, not memory."""

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
    """Tensors of zeros in a new file; what is added to them is in the file.

    On an accelerator they grow there, and come to the file when they are finished.

    Args:
        path: must not exist.
        shapes: of the tensors, by name.
        device: where they grow.

    Raises:
        StoreError: the disk has no room for them.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Sequence[int]], device: torch.device
    ) -> None:
        self._kept = _zeros(path, shapes)
        self._growing = self._kept
        if device.type != "cpu":
            self._growing = {n: torch.zeros_like(t, device=device) for n, t in self._kept.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._growing[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def finish(self, name: str, count: int, label: str) -> float:
        """Divide a sum by a count; the sum of its elements.

        Raises:
            NonFiniteError: it holds NaN or infinity, which is the fault of `label`.
        """
        kept = self._kept[name]
        kept.copy_(self._growing[name].div_(count))
        if not is_finite(kept.view(-1), Scratch()):
            raise NonFiniteError(
                f"the statistics of {name} are not finite",
                where=label,
                fix="merge another version; this one gives NaN on the calibration text",
            )
        return float(kept.sum())


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file, memory-mapped: never write into one.

    Raises:
        OSError, SafetensorError: it cannot be read, or is damaged.
    """
    with safe_open(path, framework="np"), path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _laid_over(content, json.loads(content[8 : _data(content)]))


def _zeros(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Zeros in a new safetensors file: what is written into them is written into the file.

    Raises:
        StoreError: the disk has no room for them.
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
        # not only sized: on a disk that fills later, memory laid over it ends the process
        for start in range(0, end, BUFFER):
            file.write(bytes(min(BUFFER, end - start)))
        file.flush()
        return _laid_over(mmap.mmap(file.fileno(), 0), header)


def _laid_over(content: mmap.mmap, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors over the bytes of a mapped file, all fp32."""
    data = _data(content)
    tensors = {}
    with warnings.catch_warnings():
        # torch says which cannot be written to; that is as it should be
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, info in header.items():
            begin, end = info["data_offsets"]
            flat = torch.frombuffer(
                content, dtype=torch.float32, count=(end - begin) // 4, offset=data + begin
            )
            tensors[name] = flat.view(info["shape"])
    return tensors


def _data(content: mmap.mmap) -> int:
    """Where the data begin."""
    return 8 + int.from_bytes(content[:8], "little")
