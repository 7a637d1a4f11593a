"""Averages that use statistics of the parents: Fisher-weighted averaging and RegMean.

`measure` gives the statistics. Both averages are computed as a plain value plus a correction by the
statistics. If the parents are equal, or the statistics are zero, the correction is exactly zero, so
rounding changes nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlflow_soup.errors import SpecError
from mlflow_soup.weights.mix import Scratch, terms

_BLOCK = 1024  # rows of a layer that are solved at a time


@torch.no_grad()
def fisher(
    tensors: Sequence[Tensor],
    fishers: Sequence[Tensor],
    *,
    floor: float,
    name: str = "",
    scratch: Scratch | None = None,
) -> Tensor:
    """The average weighted by Fisher information (Matena & Raffel 2022, arXiv:2111.09832).

        out = Σ w_i·Θ_i = Θ_n + Σ w_i·(Θ_i − Θ_n),   w_i = (F_i + floor) / Σ (F_j + floor)

    Computed element by element in fp32 (fp64 for F64), in separate operations, with one rounding to
    the parents' dtype. The result does not depend on chunks or threads. Elements that are equal in
    all parents do not change.

    Args:
        tensors: n tensors of one shape (...) and dtype. Not modified.
        fishers: n fp32 tensors of that shape, F ≥ 0; not modified. If all are 0, the result is the
            plain mean.
        floor: ≥ 0, in units of F; a larger floor brings the result closer to the plain mean.
        name: the tensor's name, for the error.
        scratch: working memory to reuse; nothing else is allocated but the result.

    Returns:
        A tensor (...) of the parents' dtype; one of `tensors` itself if all are equal.

    Raises:
        ParentError: the tensors are not floating-point, and differ.
    """
    if len(terms(tensors, _equal(tensors), name=name)) == 1:
        return tensors[0]
    *others, last = (
        [tensor.reshape(-1) for tensor in row] for row in zip(tensors, fishers, strict=True)
    )
    scratch, floor = scratch or Scratch(), max(floor, torch.finfo(torch.float32).tiny)
    out = torch.empty_like(last[0])
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    for start in range(0, len(out), scratch.chunk):
        here = slice(start, start + scratch.chunk)
        rows = [scratch.row(work, i, len(out[here])) for i in range(5)]
        newest, total, moved, weight, way = rows
        newest.copy_(last[0][here])
        total.copy_(last[1][here]).add_(floor)
        for _, information in others:
            total.add_(weight.copy_(information[here]).add_(floor))
        moved.zero_()
        for tensor, information in others:
            weight.copy_(information[here]).add_(floor).div_(total)
            moved.add_(way.copy_(tensor[here]).sub_(newest).mul_(weight))
        out[here].copy_(newest.add_(moved))
    return out.view(tensors[0].shape)


@torch.no_grad()
def regmean(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    *,
    scale: float = 0.9,
    ridge: float = 1e-6,
    name: str = "",
) -> Tensor:
    """The linear layer that fits the outputs of all parents, each on its own inputs (RegMean).

        W = W̄ + Σ (W_i − W̄)·G'_i · (Σ G'_i + ρ·I)⁻¹,   G' = scale·G + (1 − scale)·diag(G)

    with G = XᵀX / tokens, W̄ the plain mean and ρ = ridge · mean diagonal of Σ G'_i (Jin et al.
    2022, arXiv:2212.09849). The W̄ in front is our addition: weights that the inputs do not
    determine stay at the plain mean instead of shrinking to zero. Least squares by Cholesky in
    fp64. The memory is four matrices like G, a block of rows of W, and the result.

    Args:
        weights: n tensors [out, in] of one dtype, as in `nn.Linear`. Not modified.
        grams: n fp32 Gram matrices [in, in] of the layer's inputs. Not modified.
        scale: factor on the off-diagonal elements, in [0, 1].
        ridge: ≥ 0; must not be 0 if scale is 1 and there are fewer tokens than inputs.
        name: the tensor's name, for errors.

    Returns:
        A tensor [out, in] of the parents' dtype; one of `weights` itself if all are equal.

    Raises:
        ParentError: the tensors are not floating-point, and differ.
        SpecError: the inputs do not determine the layer, and `ridge` is too small.
    """
    if len(terms(weights, _equal(weights), name=name)) == 1:
        return weights[0]
    mixed = _shrunk(grams[0], scale)
    for gram in grams[1:]:
        mixed += _shrunk(gram, scale)
    least = mixed.diagonal().mean()
    # if all inputs are zero, any positive diagonal gives the plain mean
    mixed.diagonal().add_(ridge * least if least > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(mixed)
    del mixed
    if failed:
        raise SpecError(
            f"the inputs do not determine {name!r} at scale {scale} and ridge {ridge}",
            where="the calibration text",
            fix="give more calibration text, lower --regmean-scale, or raise the ridge",
        )
    out = torch.empty(weights[0].shape, dtype=weights[0].dtype)
    for start in range(0, len(out), _BLOCK):
        here = slice(start, start + _BLOCK)
        mean = torch.zeros_like(weights[0][here], dtype=torch.float64)
        for weight in weights:
            mean += weight[here]
        mean /= len(weights)
        moved = torch.zeros_like(mean)
        for weight, gram in zip(weights, grams, strict=True):
            moved += (weight[here].double() - mean) @ _shrunk(gram, scale)
        out[here] = torch.cholesky_solve(moved.T, lower).T + mean
    return out


def _equal(tensors: Sequence[Tensor]) -> list[float]:
    """The merge weights of the plain mean."""
    return [1 / len(tensors)] * len(tensors)


def _shrunk(gram: Tensor, scale: float) -> Tensor:
    """A copy of a Gram matrix in fp64, with its off-diagonal elements scaled."""
    shrunk = gram.to(torch.float64, copy=True)
    diagonal = shrunk.diagonal().clone()
    shrunk.mul_(scale).diagonal().copy_(diagonal)
    return shrunk
