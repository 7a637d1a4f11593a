"""Keep one transformers model in memory and set its weights to any mix of open checkpoints.

The names and shapes of tensors on disk can differ from those of the model's parameters: GPTNeoX's
`embed_out` is `lm_head` in memory, and transformers fuses the experts of a mixture-of-experts model
into one parameter. This module mixes the tensors as they are on disk, and writes each result into
the part of the parameter that the tensor becomes. So the live model has the same bits as a model
that is loaded from the written soup. Parents stay memory-mapped: they use page cache, not memory.
Or they lie on the model's device, see `resident`.
"""

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import __version__ as transformers_version
from transformers.core_model_loading import revert_weight_conversion  # private door

from mlflow_soup.errors import NonFiniteError, ParentError, SpecError, brief
from mlflow_soup.evaluation import resident
from mlflow_soup.evaluation.device_map import asked_device, check_reachable, placement, read_map
from mlflow_soup.evaluation.loading import load_model, load_tokenizer, try_loading
from mlflow_soup.weights.checkpoint import MAY_BE_INFINITE, Checkpoint
from mlflow_soup.weights.mix import Scratch, add_up, all_same, same_bytes, terms

# elements that are compared when parents lie on a device: of all tensors, and of each at least
_COMPARED, _LEAST_COMPARED = 1 << 26, 1 << 12


@dataclass(frozen=True)
class Place:
    """The part of a live parameter that a tensor on disk becomes: a run of whole rows."""

    parameter: str
    first_row: int
    rows: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """A view of this part of the parameter, shape (n,)."""
        parameter = parameters[self.parameter]
        by_row = parameter.view(_rows(parameter), -1)
        return by_row[self.first_row : self.first_row + self.rows].view(-1)


def _rows(parameter: Tensor) -> int:
    """The number of vectors along the last dimension; of elements if there is one dimension."""
    return math.prod(parameter.shape[:-1]) if parameter.ndim > 1 else parameter.numel()


@dataclass(frozen=True)
class Link:
    """One tensor of all parents, and the part of the live model that takes its mixture."""

    name: str
    live: Tensor  # shape (n,)
    parents: tuple[Tensor, ...]  # each of shape (n,)
    same: bool  # True when all parents have the same bytes
    on_device: bool = False  # True when the parents lie where `live` does, and are mixed there


def not_finite(what: str, where: str) -> NonFiniteError:
    """The error that tells a search that a λ has no finite score."""
    fix = (
        "raise --alpha, so that λ stays near the newest version; or register the parents in F32 or "
        "BF16, which hold larger numbers than F16"
    )
    return NonFiniteError(what, where=where, fix=fix)


def _not_finite(name: str, lam: Sequence[float]) -> NonFiniteError:
    return not_finite(f"{name!r} of the mixture is not finite", f"λ = {lam}")


def _moved(link: Link) -> Link:
    """The link with copies of its parents on the device of the model."""
    device = link.live.device
    if link.same:  # one copy is enough
        tensors = (link.parents[0].to(device, copy=True),) * len(link.parents)
    else:
        tensors = tuple(tensor.to(device, copy=True) for tensor in link.parents)
    return replace(link, parents=tensors, on_device=True)


def _locate(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Place], dict[str, str]]:
    """Find where each tensor on disk is in memory, with the installed version of transformers.

    transformers undoes its renaming and fusing on a copy of the weights in which every row holds
    only its own number. A row holds the number twice, because some versions of transformers drop a
    dimension of size one. The places found are then compared with the loaded weights, byte by byte:
    they come from internals of transformers, and a wrong soup is worse than no soup.

    Returns:
        The place of each name on disk; and, for a name whose place another name has already (a head
        saved beside the embedding it is tied to), that other name.

    Raises:
        ParentError: a weight in memory does not consist of whole rows of tensors on disk.
    """
    parameters = {name: p for name, p in model.state_dict().items() if p.numel()}
    numbers, starts, count = {}, [], 0
    for name, parameter in parameters.items():
        rows = _rows(parameter)
        in_order = torch.arange(count, count + rows)
        numbers[name] = in_order
        if parameter.ndim > 1:
            numbers[name] = in_order[:, None].repeat(1, 2).view(*parameter.shape[:-1], 2)
        starts.append(count)
        count += rows
    try:
        on_disk = revert_weight_conversion(model, dict(numbers))
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise _rearranged(checkpoint, str(error)) from error

    names = list(parameters)
    places: dict[str, Place] = {}
    tied: dict[str, str] = {}
    # tied parameters are one storage under several names; it is written once
    left = {parameter.data_ptr(): _rows(parameter) for parameter in parameters.values()}
    taken: dict[tuple[int, int], str] = {}
    for name, tensor in checkpoint.read():
        # a model may be saved without the prefix of its base, as GPT-2 is published
        row_numbers = on_disk.get(name, on_disk.get(f"{model.base_model_prefix}.{name}"))
        # None for what transformers does not use, such as the buffers of old Pythia checkpoints
        if row_numbers is None or not tensor.numel() or not _in_order(row_numbers, tensor):
            continue
        first, rows = int(row_numbers.flatten()[0]), _rows(tensor)
        owner = bisect_right(starts, first) - 1
        place = Place(names[owner], first - starts[owner], rows)
        live, storage = place.of(parameters), parameters[place.parameter].data_ptr()
        # a head saved beside its tied embedding may differ from it; transformers does not check
        if not same_bytes(live.cpu(), tensor.reshape(-1).to(live.dtype)):
            continue
        if (storage, place.first_row) in taken:
            tied[name] = taken[storage, place.first_row]
        else:
            places[name] = place
            taken[storage, place.first_row] = name
            left[storage] -= rows
    missing = [name for name, parameter in parameters.items() if left[parameter.data_ptr()]]
    if missing:
        raise _rearranged(checkpoint, ", ".join(missing[:5]))
    return places, tied


def _in_order(row_numbers: Tensor, tensor: Tensor) -> bool:
    """True when these are the tensor's rows in their order: not transposed, not interleaved."""
    rows, width = _rows(tensor), 2 if tensor.ndim > 1 else 1
    shape = (*tensor.shape[:-1], 2) if tensor.ndim > 1 else tensor.shape
    if row_numbers.numel() != rows * width or (rows > 1 and row_numbers.shape != shape):
        return False
    flat = row_numbers.flatten()
    expected = torch.arange(rows).repeat_interleave(width)
    return torch.equal(flat, expected + flat[0])


def _rearranged(checkpoint: Checkpoint, detail: str) -> ParentError:
    return ParentError(
        f"mlflow-soup cannot match the weights of {checkpoint.label} on disk with those that "
        f"transformers {transformers_version} loads: {detail}",
        where=str(checkpoint.weights),
        fix="merge another architecture, and report this one: mlflow-soup does not support weights "
        "that transformers transposes or interleaves when it loads them",
    )


def hardware(device: torch.device) -> str:
    """What computes on a device: a GPU's name, or the instructions and threads of torch on a CPU.

    Others give other last digits of the same log-likelihood.
    """
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


class LiveModel:
    """The model that all evaluations run on.

    Args:
        checkpoint: gives the architecture, the tokenizer and the first weights.
        device: `cpu`, `cuda`, …; `auto` takes a GPU if there is one.
        device_map: in place of a device, one of `DEVICE_MAPS` or a JSON file; see `read_map`.

    Attributes:
        model: the transformers model.
        placement: with a device map, which devices have which weights; else empty.
        tokenizer: the checkpoint's tokenizer.
        config: the checkpoint's config.
        places: name on disk → the part of a parameter that this tensor becomes. Tensors that
            transformers does not use are not in it.
        tied: name on disk → the name of another tensor on disk that has the same place.

    Raises:
        ParentError: transformers cannot load the checkpoint, or its weights cannot be located.
        SpecError: a device is not available or too small, or the device map cannot be used.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str = "auto", *, device_map: str = ""
    ) -> None:
        try_loading(checkpoint)
        try:
            model = load_model(checkpoint, read_map(device_map, checkpoint) if device_map else None)
            check_reachable(model)
            self.places, self.tied = _locate(model, checkpoint)
            self.model = (model if device_map else model.to(asked_device(device))).eval()
        except torch.OutOfMemoryError as error:
            raise SpecError(
                f"the model does not fit on its device: {brief(error)}",
                where="--device-map" if device_map else "--device",
                fix="free memory of the GPU, or spread the model over more of them: --device-map "
                "auto",
            ) from error
        self.config = checkpoint.config
        self.placement = placement(self.model) if device_map else ""
        self.tokenizer = load_tokenizer(checkpoint)
        self._scratch = Scratch()
        self._scratch_on: dict[torch.device, Scratch] = {}
        self._of_batches: dict[torch.device, int] = {}  # bytes that torch held before any parent

    def link(self, parents: Sequence[Checkpoint], *, where: str = "mmap") -> list[Link]:
        """Link the model's parameters to parents, so that `set_weights` can mix them repeatedly.

        The links are valid as long as the model stays on its device and keeps its dtype.

        Args:
            parents: the parents, oldest first, compatible with the checkpoint of this model.
            where: `mmap` leaves the parents in their files, `memory` reads them now, for slow
                disks. `device` copies them to the model's device and compares the bits of a mixture
                with the CPU; the model holds that mixture then.

        Raises:
            ParentError: two tensors of a parent differ, but the model ties them.
            SpecError: the parents do not fit on the device, or it computes other bits.
        """
        parameters = self.model.state_dict()
        weights = [dict(parent.read()) for parent in parents]
        for parent, own in zip(parents, weights, strict=True):
            for name, other in self.tied.items():
                if not same_bytes(own[name], own[other]):
                    raise ParentError(
                        f"{name!r} and {other!r} of {parent.label} differ, but the model uses one "
                        "tensor for both (tied weights)",
                        where=str(parent.weights),
                        fix="leave this version out, or register it again with equal tensors or "
                        "only one of them",
                    )
        links = []
        for name, place in self.places.items():
            tensors = tuple(own[name].reshape(-1) for own in weights)
            same = all_same(tensors)
            if where == "memory":
                tensors = tuple(tensor.clone() for tensor in tensors)
            links.append(Link(name, place.of(parameters), tensors, same))
        return self._move(links) if where == "device" and links else links

    def _move(self, links: Sequence[Link]) -> list[Link]:
        """The links with the parents on the model's device, which has proved its bits."""
        needed: dict[torch.device, int] = {}
        kinds = set()
        for link in links:
            first, device = link.parents[0], link.live.device
            copies = 1 if link.same else len(link.parents)
            needed[device] = needed.get(device, 0) + copies * first.nbytes
            if first.is_floating_point() and not link.same:
                kinds.add((device, first.dtype, link.live.dtype))
        for device in needed:
            self._scratch_on.setdefault(device, Scratch(resident.CHUNK, device))
            self._of_batches.setdefault(device, resident.cached(device))
            needed[device] += 3 * 8 * resident.CHUNK  # rows in double precision at most
        resident.check_room(needed, self._of_batches)
        try:
            for device, dtype, live in sorted(kinds, key=str):
                resident.check_arithmetic(device, dtype, live, len(links[0].parents))
            moved = [_moved(link) for link in links]
            self._compare(moved, links)
        except torch.OutOfMemoryError as error:
            raise resident.too_little(brief(error)) from error
        return moved

    def _compare(self, moved: Sequence[Link], links: Sequence[Link]) -> None:
        """Mix the parents on the device, and compare a part of each tensor with the CPU."""
        rising = range(1, len(links[0].parents) + 1)
        lam = [number / sum(rising) for number in rising]
        for link in moved:
            self._write(link, lam)
        length = max(_LEAST_COMPARED, _COMPARED // len(links))
        for link in links:
            begin = max(0, link.live.numel() - length) // 2
            here = slice(begin, begin + length)
            found = link.live[here].cpu()
            expected = torch.empty_like(found)
            parts = terms([t[here] for t in link.parents], lam, same=link.same, name=link.name)
            add_up(parts, expected, scratch=self._scratch)
            if not same_bytes(found, expected):
                raise resident.other_bits(link.live.device, f"{link.name!r} of the parents")

    def set_weights(self, links: Sequence[Link], lam: Sequence[float]) -> None:
        """Write Σ λ_i·Θ_i into the model, computed from the parents.

        It never updates the weights of the λ before: rounding errors would add up.

        Args:
            links: the result of `link`.
            lam: merge weights λ, one per parent, oldest first.

        Raises:
            NonFiniteError: a value is NaN or infinite. Some tensors of the model then have the new
                weights, the others the old ones.
        """
        later = []
        for link in links:
            check = not link.name.endswith(MAY_BE_INFINITE)
            if check and link.on_device:
                later.append((link.name, link.live))
            if not self._write(link, lam, check=check and not link.on_device):
                raise _not_finite(link.name, lam)
        if name := resident.first_not_finite(later):
            raise _not_finite(name, lam)
        self.model.eval()

    def _write(self, link: Link, lam: Sequence[float], *, check: bool = False) -> bool:
        """Write one mixture; False if `check` found NaN or infinity in it."""
        parts = terms(link.parents, lam, same=link.same, name=link.name)
        scratch = self._scratch_on[link.live.device] if link.on_device else self._scratch
        return add_up(parts, link.live, scratch=scratch, check=check)

    @contextlib.contextmanager
    def holding(self, parent: Checkpoint) -> Iterator[None]:
        """Inside the context, the model is `parent` in fp32 and can take gradients.

        The parameters point to other memory meanwhile, as much as the model takes in fp32.
        Afterwards they point to the old memory again: the model is the same bit for bit, and links
        stay valid.

        Raises:
            ParentError: two tensors of the parent differ, but the model ties them.
        """
        every = (*self.model.parameters(), *self.model.buffers())
        tensors = [tensor for tensor in every if tensor.is_floating_point()]
        before = [(t, t.data, t.grad, t.requires_grad) for t in tensors]
        try:
            for tensor in tensors:
                tensor.grad = None
                tensor.data = tensor.data.to(torch.float32, copy=True)
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            self.set_weights(self.link([parent]), (1.0,))
            yield
        finally:
            for tensor, content, gradient, required in before:
                tensor.grad = None  # a gradient of another dtype would not fit
                tensor.data = content
                tensor.requires_grad_(required).grad = gradient
