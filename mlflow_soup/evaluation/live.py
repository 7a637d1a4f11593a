"""A transformers model in memory whose weights are any mix of open checkpoints.

The names and shapes that tensors have on disk are not always those of the model's parameters:
GPTNeoX's `embed_out` is `lm_head` in memory, and the experts of a mixture are fused into one
parameter. What is mixed is what is on disk, into the part of the parameter that it becomes; so the
live model has the bits that loading the written soup gives. Parents stay memory-mapped: they cost
page cache, not memory.
"""

import contextlib
import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.core_model_loading import revert_weight_conversion  # private door

from mlflow_soup.errors import NonFiniteError, ParentError, SpecError
from mlflow_soup.weights.checkpoint import MAY_BE_INFINITE, Checkpoint
from mlflow_soup.weights.mix import Scratch, add_up, all_same, same_bytes, terms


@dataclass(frozen=True)
class Place:
    """The part of a live parameter that a tensor on disk becomes: whole rows, one after another."""

    parameter: str
    first_row: int
    rows: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """That part, shape (n,); a view."""
        parameter = parameters[self.parameter]
        by_row = parameter.view(_rows(parameter), -1)
        return by_row[self.first_row : self.first_row + self.rows].view(-1)


def _rows(parameter: Tensor) -> int:
    """Vectors along the last dimension; the elements where there is but one dimension."""
    return math.prod(parameter.shape[:-1]) if parameter.ndim > 1 else parameter.numel()


@dataclass(frozen=True)
class Link:
    """One tensor of all parents, and where its mixture goes."""

    name: str
    live: Tensor  # shape (n,)
    parents: tuple[Tensor, ...]  # each of shape (n,)
    same: bool  # byte for byte, in all parents


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notes of libraries, which cannot be switched off one by one."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def not_finite(what: str, where: str) -> NonFiniteError:
    """What a search learns from a λ that no finite score can come of."""
    fix = "the merged weights overflow: narrow the search with --alpha, or merge in F32"
    return NonFiniteError(what, where=where, fix=fix)


def _load(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint, every weight accounted for."""
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.weights),
                dtype="auto",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # a config can make its model's code raise anything
        raise _unloadable(checkpoint, "AutoModelForCausalLM", error) from error
    model, info = loaded
    # missing weights would be initialised at random, with only a warning
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ParentError(
                f"{checkpoint.label} has {problem.replace('_', ' ')}: {sorted(info[problem])[:5]}",
                where=str(checkpoint.weights),
                fix="register the checkpoint again, as save_pretrained writes it",
            )
    return model


def _unloadable(checkpoint: Checkpoint, loader: str, error: Exception) -> ParentError:
    return ParentError(
        f"transformers cannot load {checkpoint.label}: {error}",
        where=str(checkpoint.weights),
        fix=f"register a checkpoint that {loader}.from_pretrained loads",
    )


def _locate(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Place], dict[str, str]]:
    """Where each tensor on disk is in memory, in the terms of the transformers that loaded it.

    transformers is asked to undo its renaming and fusing on a model whose every row holds nothing
    but its number, twice: some versions drop a dimension of one. The answer is then compared with
    the loaded weights, byte by byte: it comes out of the inner workings of transformers, and a
    wrong soup is worse than no soup.

    Returns:
        Name on disk → its place; and for names that share a place with another, as a head does that
        was saved beside the embedding it is tied to, that other.

    Raises:
        ParentError: some weight is not made of whole rows of tensors on disk.
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
    # tied parameters are one storage under several names: written once
    left = {parameter.data_ptr(): _rows(parameter) for parameter in parameters.values()}
    taken: dict[tuple[int, int], str] = {}
    for name, tensor in checkpoint.read():
        row_numbers = on_disk.get(name)  # transformers has no use for old Pythia's buffers
        if row_numbers is None or not tensor.numel() or not _in_order(row_numbers, tensor):
            continue
        first, rows = int(row_numbers.flatten()[0]), _rows(tensor)
        owner = bisect_right(starts, first) - 1
        place = Place(names[owner], first - starts[owner], rows)
        live, storage = place.of(parameters), parameters[place.parameter].data_ptr()
        # a head saved beside its embedding may hold something else, which transformers overlooks
        if not same_bytes(live, tensor.reshape(-1).to(live.dtype)):
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
    """True when these are the rows of the tensor, one after another: neither turned nor mixed."""
    rows, width = _rows(tensor), 2 if tensor.ndim > 1 else 1
    shape = (*tensor.shape[:-1], 2) if tensor.ndim > 1 else tensor.shape
    if row_numbers.numel() != rows * width or (rows > 1 and row_numbers.shape != shape):
        return False
    flat = row_numbers.flatten()
    expected = torch.arange(rows).repeat_interleave(width)
    return torch.equal(flat, expected + flat[0])


def _rearranged(checkpoint: Checkpoint, detail: str) -> ParentError:
    return ParentError(
        f"transformers {transformers_version} loads {checkpoint.label} in a way that cannot be "
        f"followed: {detail}",
        where=str(checkpoint.weights),
        fix="report it with the model's architecture: weights that are transposed or interleaved "
        "on loading are not supported",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"there is no device {name!r}: {str(error).splitlines()[0]}",
            where="--device",
            fix="cpu, cuda, cuda:1 …; auto takes a GPU if there is one",
        ) from error


class LiveModel:
    """The one model that evaluations run on.

    Args:
        checkpoint: whose architecture and tokenizer it takes.
        device: `cpu`, `cuda`, …; `auto` takes a GPU if there is one.

    Attributes:
        model: as transformers has it.
        tokenizer: the checkpoint's.
        places: name on disk → the part of a parameter that this tensor becomes; none for buffers
            of old checkpoints that transformers leaves alone.
        tied: name on disk → the name of another tensor there that has the same place.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto") -> None:
        model = _load(checkpoint)
        self.places, self.tied = _locate(model, checkpoint)
        self.config = checkpoint.config
        self.model = model.to(_device(device)).eval()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(checkpoint.tokenizer), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise _unloadable(checkpoint, "AutoTokenizer", error) from error
        self._scratch = Scratch()

    def link(self, parents: Sequence[Checkpoint], *, resident: bool = False) -> list[Link]:
        """Connect the parameters with parents, for `set_weights` to mix any number of times.

        Args:
            parents: oldest first, compatible with the checkpoint the model was loaded from.
            resident: read them into memory now, for disks that are slow to read again.

        Links hold as long as the model stays on its device and keeps its dtype.

        Raises:
            ParentError: a parent holds different tensors where the model has one.
        """
        parameters = self.model.state_dict()
        weights = [dict(parent.read()) for parent in parents]
        for parent, own in zip(parents, weights, strict=True):
            for name, other in self.tied.items():
                if not same_bytes(own[name], own[other]):
                    raise ParentError(
                        f"{name!r} and {other!r} of {parent.label} differ, and the model ties them",
                        where=str(parent.weights),
                        fix="merge checkpoints that save one of them, or agree in both",
                    )
        links = []
        for name, place in self.places.items():
            tensors = tuple(own[name].reshape(-1) for own in weights)
            same = all_same(tensors)
            if resident:
                tensors = tuple(tensor.clone() for tensor in tensors)
            links.append(Link(name, place.of(parameters), tensors, same))
        return links

    def set_weights(self, links: Sequence[Link], lam: Sequence[float]) -> None:
        """Write Σ λ_i·Θ_i into the model, always from the parents: moving from λ to λ' drifts.

        Raises:
            NonFiniteError: a value is NaN or infinite; the model is left half switched.
        """
        for link in links:
            parts = terms(link.parents, lam, same=link.same, name=link.name)
            check = not link.name.endswith(MAY_BE_INFINITE)
            if not add_up(parts, link.live, scratch=self._scratch, check=check):
                raise not_finite(f"{link.name!r} of the mixture is not finite", f"weights {lam}")
        self.model.eval()

    @contextlib.contextmanager
    def holding(self, parent: Checkpoint) -> Iterator[None]:
        """The model is `parent` in fp32 meanwhile, without gradients yet but ready to take them.

        Afterwards it is what it was, bit for bit, and links hold: its parameters lend their names
        to other memory, as much as the model takes in fp32.

        Raises:
            ParentError: the parent holds different tensors where the model has one.
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
                tensor.grad = None  # of another dtype, it would not fit
                tensor.data = content
                tensor.requires_grad_(required).grad = gradient
