"""Parents that lie on the model's device, and are mixed there with the bits of the CPU.

The kernel is `mix.add_up` on every device: IEEE 754 leaves the bits of separate multiplications,
additions and roundings no choice. A device may break that rule, and take numbers near zero for
zero, or fuse two operations. So nothing is mixed on a device before `check_arithmetic` has compared
it with the CPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mlflow_soup.errors import SpecError, brief
from mlflow_soup.weights.mix import Scratch, Term, add_up, bits, terms

# elements that are mixed at once: fewer leave a GPU waiting for the next call, and two rows of more
# would leave its L2 cache
CHUNK = 1 << 22
_SAMPLE = 1 << 15  # values of each kind
_MOST = 8  # parents of a sample: more add nothing but further sums
_SHARES = (0.0, 1e-7, 0.3, 0.5, 0.7123, 1.0)
_WHERE = "--parents-in device"
_FIX = "keep the parents elsewhere: --parents-in memory, or mmap"


def check_arithmetic(device: torch.device, dtype: torch.dtype, live: torch.dtype, n: int) -> None:
    """Refuse a device that does not compute the bits of the CPU.

    Args:
        device: mixes tensors of a sample; the CPU mixes them, too.
        dtype: that of the parents.
        live: that of the parameter.
        n: the number of parents.

    Raises:
        SpecError: one value has other bits, or the device cannot compute with a dtype.
    """
    there = Scratch(CHUNK, device)

    def mixed(parts: Sequence[Term]) -> Tensor:
        out = torch.empty(len(parts[0][0]), dtype=live, device=device)
        add_up([(tensor.to(device), c) for tensor, c in parts], out, scratch=there)
        return out.cpu()

    kind = f"{dtype} into {live}"
    try:
        count, of = differing(dtype, live, n, mixed)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # a dtype that the device does not have
        what = f"{_name(device)} cannot mix {kind}: {brief(error)}"
        raise SpecError(what, where=_WHERE, fix=_FIX) from error
    if count:
        raise other_bits(device, f"{kind}, {count} of {of} values")


def other_bits(device: torch.device, what: str) -> SpecError:
    """The error for a device that does not compute the bits of the CPU."""
    words = f"{_name(device)} mixes other bits than the CPU: {what}"
    return SpecError(words, where=_WHERE, fix=_FIX)


def differing(
    dtype: torch.dtype, live: torch.dtype, n: int, mixed: Callable[[Sequence[Term]], Tensor]
) -> tuple[int, int]:
    """How many values of a sample some way to mix gives other bits than the kernel on the CPU.

    Args:
        dtype: that of the parents.
        live: that of the mixture.
        n: the number of parents.
        mixed: the way to mix; gets the terms on the CPU, and returns the mixture there.

    Returns:
        The number of values with other bits, and of all values.
    """
    parents, scratch, count, of = _sample(dtype, min(n, _MOST)), Scratch(), 0, 0
    for lam in _lams(len(parents)):
        parts = terms(parents, lam, same=None if 0.0 in lam else False)
        expected = torch.empty(len(parents[0]), dtype=live)
        add_up(parts, expected, scratch=scratch)
        count += int((bits(mixed(parts)) != bits(expected)).sum())
        of += len(expected)
    return count, of


def _lams(n: int) -> Iterator[tuple[float, ...]]:
    """Merge weights of every kind: one that is all, some that are nothing, equal and odd ones."""
    generator = torch.Generator().manual_seed(n)
    for share in _SHARES if n > 1 else (1.0,):
        drawn = torch.rand(max(n - 1, 1), generator=generator, dtype=torch.float64)
        others = ((1.0 - share) * drawn / drawn.sum()).tolist()
        yield (*others[: n - 1], share)
    if n > 1:
        yield (1.0 / n,) * n


def _sample(dtype: torch.dtype, n: int) -> list[Tensor]:
    """Values of n parents on which a sum can go wrong, each of shape (n,)."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    width = 8 * torch.empty(0, dtype=dtype).element_size()
    whole = bits(torch.empty(0, dtype=dtype)).dtype
    half = 1 << (width - 1)
    least = round(1.0 / info.eps)  # the bits of the smallest number that is not subnormal

    def drawn(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (_SAMPLE,), generator=generator, dtype=whole)

    def noise() -> Tensor:
        return torch.randn(_SAMPLE, generator=generator, dtype=torch.float64)

    trained, near = 0.02 * noise(), drawn(least, half - 2 * least)
    found = []
    for number in range(n):
        signs = drawn(0, 2).to(dtype) * 2 - 1
        kinds = (
            drawn(-half, half - 1).view(dtype),  # of every size
            drawn(0, 4 * least).view(dtype) * signs,  # subnormal, and a little larger
            (near + number).view(dtype),  # neighbours: their mean is a tie
            (trained + 0.0006 * noise()).to(dtype),  # checkpoints of a training
            info.max * signs,
            0.0 * signs,
        )
        values = torch.cat(kinds)
        found.append(torch.where(torch.isfinite(values), values, torch.ones_like(values)))
    return found


def check_room(needed: Mapping[torch.device, int], spare: Mapping[torch.device, int]) -> None:
    """Refuse parents that do not fit on a device.

    Args:
        needed: device → the bytes that parents and working memory take.
        spare: device → bytes of `cached` that the batches need again.

    Raises:
        SpecError: a device has less memory.
    """
    for device, size in needed.items():
        free = _free(device)
        if free is not None and size > free - spare[device]:
            raise too_little(
                f"they need {size / 1e9:.2f} GB on {_name(device)}, and "
                f"{max(0, free - spare[device]) / 1e9:.2f} GB are free beside the model and its "
                "batches"
            )


def too_little(words: str) -> SpecError:
    """The error for parents that do not fit on a device."""
    return SpecError(
        f"the parents do not fit beside the model: {words}",
        where=_WHERE,
        fix="use --parents-in memory; or leave more to them, with a smaller --batch-size, or with "
        "--device-map on more GPUs",
    )


def cached(device: torch.device) -> int:
    """The bytes of a device that torch holds, and no tensor uses: what the last batches took."""
    module = torch.get_device_module(device)
    if not hasattr(module, "memory_reserved"):
        return 0
    return int(module.memory_reserved(device) - module.memory_allocated(device))


def _free(device: torch.device) -> int | None:
    """The bytes of a device that tensors can take; None where nothing tells."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    return int(module.mem_get_info(device)[0]) + cached(device)


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def first_not_finite(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity.

    All sums are asked for before the first is waited for.
    """
    floats = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    totals = [tensor.sum(dtype=torch.float32) for _, tensor in floats]
    for (name, tensor), total in zip(floats, totals, strict=True):
        # a finite sum proves that all values are finite; if the sum overflows, look at each value
        if not math.isfinite(total) and not torch.isfinite(tensor).all():
            return name
    return None
