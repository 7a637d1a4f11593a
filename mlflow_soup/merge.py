"""Tensors and coefficients in, a tensor out: the one kernel that the search and the file share.

    out = Σ c_i·Θ_i,   c_i and every product and sum in fp32, one rounding to the parents' dtype

Products and sums are separate operations on purpose: `torch.lerp` and `addcmul` fuse them on some
CPUs and not on others, and then the registered file could not be made again bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlflow_soup.errors import ParentError


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """True when two tensors hold the same bytes; NaNs and signed zeros count as bytes."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.contiguous().reshape(-1).view(torch.uint8),
            second.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def mix(tensors: Sequence[Tensor], coefficients: Sequence[float], *, name: str = "") -> Tensor:
    """The weighted sum of one tensor over its parents (Liu et al. 2024, arXiv:2403.19390, eq. 1).

    A coefficient of 1 beside zeros gives that parent byte for byte, and so do parents that agree
    byte for byte (old Pythia's `masked_bias` is −inf: multiplied, it would become NaN).

    Args:
        tensors: K tensors of one shape (...) and dtype, oldest parent first. Not modified.
        coefficients: K merge weights c; they sum to 1.
        name: the tensor's name, for the error.

    Returns:
        A tensor (...) of the parents' dtype; one of `tensors` itself where nothing is to be mixed.

    Raises:
        ParentError: the parents disagree on a tensor that is not of floating point.
    """
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient == 1.0:
            return tensor
    first = tensors[0]
    if all(same_bytes(first, other) for other in tensors[1:]):
        return first
    if not first.is_floating_point():
        raise ParentError(
            f"parents differ in {name!r}, which is {first.dtype} and cannot be mixed",
            where="the parents' weights",
            fix="merge checkpoints of one training run; integer tensors must agree",
        )
    work = torch.float64 if first.dtype == torch.float64 else torch.float32
    parts = [
        tensor.to(work) * torch.tensor(coefficient, dtype=work)
        for tensor, coefficient in zip(tensors, coefficients, strict=True)
        if coefficient != 0.0  # 0·∞ is NaN
    ]
    out = parts[0]
    for part in parts[1:]:
        out += part
    return out.to(first.dtype)
