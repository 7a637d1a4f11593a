"""The weighted sum of tensors. The search and the written file use this one kernel.

    out = Σ c_i·Θ_i,   c_i and every product and sum in fp32, one rounding to the parents' dtype

Tensors of fp64 are summed in fp64. Products and sums are separate operations on purpose:
`torch.lerp` and `addcmul` fuse them on some CPUs only, so the registered file could not be
reproduced bit for bit on another CPU. The sum is computed in chunks that fit the cache; the result
does not depend on the size of the chunks or the number of threads.

The tensors of a sum may lie on any one device. `evaluation.resident` compares the bits of another
device with those of the CPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlflow_soup.errors import ParentError

# elements per thread: a row of half a megabyte in fp32; two rows fit an L2 cache
CHUNK = 1 << 17
Term = tuple[Tensor, float]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GLANCE = 4096  # elements compared first: trained tensors differ in the first few


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor's elements as integers, shape (n,); a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """True if two tensors hold the same bytes; NaNs and signed zeros are compared as bytes."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    a, b = bits(first), bits(second)
    return torch.equal(a[:_GLANCE], b[:_GLANCE]) and torch.equal(a, b)


def all_same(tensors: Sequence[Tensor]) -> bool:
    """True if all tensors hold the same bytes."""
    return all(same_bytes(tensors[0], other) for other in tensors[1:])


class Scratch:
    """The kernel's working memory, allocated once and reused for every chunk of every tensor.

    Args:
        chunk: the number of elements per chunk; by default `CHUNK` per thread of torch.
        device: where the tensors lie that are summed.
    """

    def __init__(self, chunk: int | None = None, device: torch.device | str = "cpu") -> None:
        self.chunk = chunk or CHUNK * torch.get_num_threads()
        self._device = device
        self._rows: dict[tuple[torch.dtype, int], Tensor] = {}

    def row(self, dtype: torch.dtype, number: int, length: int) -> Tensor:
        """The first `length` elements of a row, not initialised."""
        row = self._rows.get((dtype, number))
        if row is None:
            row = self._rows[dtype, number] = torch.empty(
                self.chunk, dtype=dtype, device=self._device
            )
        return row[:length]


def terms(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    same: bool | None = None,
    name: str = "",
) -> list[Term]:
    """The terms of the weighted sum: one tensor with weight 1 if there is nothing to mix.

    Tensors with the coefficient 0 are left out: old Pythia's `masked_bias` is −inf, and 0·(−inf)
    would be NaN. If one tensor is left, or if all tensors that are left hold the same bytes, the
    sum is that tensor, byte for byte.

    Args:
        tensors: K tensors of one shape (...) and dtype, oldest parent first.
        coefficients: K merge weights c ≥ 0; they sum to 1.
        same: the result of `all_same(tensors)`, if it is known already.
        name: the tensor's name, for the error.

    Raises:
        ParentError: the tensors are not floating-point, and differ.
    """
    parts = [(t, c) for t, c in zip(tensors, coefficients, strict=True) if c != 0.0]
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts
    if not same and (same is None or len(parts) < len(tensors)):
        same = all_same([tensor for tensor, _ in parts])
    if same:
        return [(parts[0][0], 1.0)]
    if not parts[0][0].is_floating_point():
        raise ParentError(
            f"the parents differ in {name!r}, which is {parts[0][0].dtype} and cannot be mixed",
            where="the parents' weights",
            fix="merge checkpoints of one training run, whose integer tensors are equal; quantised "
            "weights cannot be merged",
        )
    return parts


@torch.no_grad()
def add_up(parts: Sequence[Term], out: Tensor, *, scratch: Scratch, check: bool = False) -> bool:
    """Write Σ c·Θ into `out`; no memory is allocated once the scratch rows exist.

    Args:
        parts: contiguous tensors, each of shape (n,), with their coefficients.
        out: shape (n,). If its dtype or device differs from that of the tensors, the sum is rounded
            to the tensors' dtype first and converted afterwards, as if it were loaded from a file.
        scratch: working memory, on the device of the tensors.
        check: if True, look for values that are not finite.

    Returns:
        False if `check` found NaN or infinity, else True.
    """
    first, lead = parts[0]
    copied = len(parts) == 1 and lead == 1.0
    work = torch.float64 if first.dtype == torch.float64 else torch.float32
    check = check and first.is_floating_point()
    alike = (out.dtype, out.device) == (first.dtype, first.device)
    for start in range(0, first.numel(), scratch.chunk):
        here = slice(start, start + scratch.chunk)
        target, total = out[here], first[here]
        if not copied:
            total = _product(total, lead, scratch.row(work, 0, len(total)))
            for tensor, coefficient in parts[1:]:
                row = scratch.row(work, 1, len(total))
                total.add_(_product(tensor[here], coefficient, row))
        if not copied and not alike:
            target.copy_(scratch.row(first.dtype, 2, len(total)).copy_(total))
        else:
            target.copy_(total)
        if check:
            row = scratch.row(work, 0, len(total)).copy_(total) if copied else total
            if not _all_finite(row, target):
                return False
    return True


@torch.no_grad()
def is_finite(tensor: Tensor, scratch: Scratch) -> bool:
    """True if a tensor of shape (n,) holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    parts = (tensor[i : i + scratch.chunk] for i in range(0, len(tensor), scratch.chunk))
    return all(_all_finite(scratch.row(work, 0, len(p)).copy_(p), p) for p in parts)


def _all_finite(row: Tensor, values: Tensor) -> bool:
    """True if all values are finite; the row holds the same values in working precision."""
    # a finite sum proves that all values are finite; if the sum overflows, look at each value
    return math.isfinite(row.sum()) or bool(torch.isfinite(values).all())


def _product(tensor: Tensor, coefficient: float, row: Tensor) -> Tensor:
    """c·Θ in the precision of the row, written into the row."""
    if tensor.dtype == row.dtype:
        return torch.mul(tensor, coefficient, out=row)
    return row.copy_(tensor).mul_(coefficient)


def mix(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    name: str = "",
    scratch: Scratch | None = None,
) -> Tensor:
    """The weighted sum of one tensor of all parents (Liu et al. 2024, arXiv:2403.19390, eq. 1).

    This is for tensors in memory. Files and live models use `terms` and `add_up` directly.

    Args:
        tensors: K tensors of one shape (...) and dtype, oldest parent first. Not modified.
        coefficients: K merge weights c; they sum to 1.
        name: the tensor's name, for the error.
        scratch: working memory to reuse.

    Returns:
        A tensor (...) of the parents' dtype; one of `tensors` itself if there is nothing to mix
        (see `terms`).

    Raises:
        ParentError: the tensors are not floating-point, and differ.
    """
    parts = terms(tensors, coefficients, name=name)
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    out = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    flat = [(tensor.reshape(-1), coefficient) for tensor, coefficient in parts]
    add_up(flat, out.view(-1), scratch=scratch or Scratch())
    return out
