"""What parents learnt from data: Fisher diagonals and Gram matrices, for `averaging`.

A live model takes a parent's weights in fp32 and reads the calibration text, window by window and
each alone: nothing is padded, and no batch size can be seen in the result. Sums grow in the file
that they are kept in, so that they cost page cache rather than memory, and a folder of such files
is a cache: what was measured once is not measured again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import mmap
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from mlflow_soup import averaging
from mlflow_soup.calibration import Calibration
from mlflow_soup.checkpoint import MIXED, Checkpoint
from mlflow_soup.durable import BLOCK, BUFFER, check_space, on_disk, staged
from mlflow_soup.errors import NonFiniteError, ObjectiveError, SpecError
from mlflow_soup.live import LiveModel
from mlflow_soup.merge import Scratch, is_finite

FLOOR = 1e-6  # of the mean Fisher information, so that what no parent uses is averaged
ESTIMATORS = ("empirical", "sampled")
_FORMAT = 1  # of the files; part of their name
_TENSORS, _ABOUT = "tensors.safetensors", "statistics.json"
_ROWS = 64  # positions whose labels are drawn together
Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """What was measured of one parent.

    Attributes:
        kind: `fisher` or `regmean`.
        places: name of a tensor on disk → key of its statistics; what has none is averaged.
        turned: names on disk that are [in, out], as GPT-2's.
        mean: of all Fisher information; 0 for `regmean`.
        tokens: read.
        notes: sentences about what was not measured.
        tensors: key → fp32 Fisher information of the tensor's shape, or Gram matrix [in, in];
            memory-mapped.
    """

    kind: str
    places: Mapping[str, str]
    turned: tuple[str, ...]
    mean: float
    tokens: int
    notes: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)


def measure(
    kind: str,
    live: LiveModel,
    parent: Checkpoint,
    digest: str,
    calibration: Calibration,
    folder: Path,
    *,
    estimator: str = "empirical",
    seed: int = 0,
) -> Statistics:
    """The statistics of a parent, from the cache if they were measured before.

    The live model is afterwards what it was, and its links hold.

    Args:
        kind: `fisher` or `regmean`.
        live: a model of the parent's architecture; what weights it has does not matter.
        parent: whose weights are to be averaged.
        digest: the parent's canonical one.
        calibration: the text.
        folder: the cache; made if it is not there. What is damaged in it is measured anew.
        estimator: of Fisher information: `empirical` takes the labels from the text; `sampled`
            draws them from the model at every position, the text before it given, so that the
            expectation is the model's true Fisher information.
        seed: of the draws; each window's depend on it and on the window alone.

    Raises:
        NonFiniteError: the weights gave NaN or infinity.
        ObjectiveError: there is no memory for it.
        ParentError: the parent holds different tensors where the model has one.
        SpecError: an unknown kind or estimator, or a folder that cannot be written.
        StoreError: the disk is full or fails.
    """
    if kind not in KINDS or estimator not in ESTIMATORS:
        raise SpecError(
            f"there are no {estimator} {kind} statistics",
            where="measure",
            fix=f"kinds: {', '.join(KINDS)}; estimators: {', '.join(ESTIMATORS)}",
        )
    recipe = {"estimator": estimator, "seed": seed * (estimator == "sampled")}
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    asked = [_FORMAT, digest, calibration.digest, recipe if kind == "fisher" else {}, versions]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    place = Path(folder, f"{kind}-{key[:32]}")
    known = _open(place)
    if known is not None:
        return known
    shutil.rmtree(place, ignore_errors=True)
    try:
        with (
            staged(place, where="the cache of statistics") as partial,
            _enough_memory(parent),
            live.holding(parent),
        ):
            about = KINDS[kind](live, parent, calibration, partial / _TENSORS, recipe)
            with on_disk(partial / _ABOUT):
                content = {"kind": kind, "tokens": calibration.tokens, "turned": [], "mean": 0.0}
                content |= about
                (partial / _ABOUT).write_text(json.dumps(content), encoding="utf-8")
    except SpecError:  # another was quicker, or it cannot be written there
        if _open(place) is None:
            raise
    measured = _open(place)
    assert measured is not None
    return measured


@contextlib.contextmanager
def _enough_memory(parent: Checkpoint) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ObjectiveError(
            f"no memory left to measure {parent.label}: {error}",
            where="--device",
            fix="measure on the CPU; it takes the model twice in fp32, one of them in page cache",
        ) from error


def blend(
    parents: Sequence[Statistics], *, scale: float = 0.9, ridge: float = 1e-6
) -> Callable[[str, Sequence[Tensor]], Tensor | None]:
    """How the parents are averaged by their statistics: a function for `soup.write`.

    Args:
        parents: their statistics, of one kind and one calibration, oldest first.
        scale: what RegMean leaves of the off-diagonals of Gram matrices.
        ridge: what it adds to their diagonals, in units of their mean.

    Returns:
        Name on disk and the parents' tensors → the soup's tensor; None where a parent has no
        statistics, for the plain mean.
    """
    floor = FLOOR * math.fsum(parent.mean for parent in parents) / len(parents)
    scratch = Scratch()

    def average(name: str, tensors: Sequence[Tensor]) -> Tensor | None:
        keys = [parent.places.get(name) for parent in parents]
        own = [p.tensors[key] for p, key in zip(parents, keys, strict=True) if key is not None]
        if len(own) < len(parents):
            return None
        if parents[0].kind == "fisher":
            return averaging.fisher(tensors, own, floor=floor, name=name, scratch=scratch)
        if name in parents[0].turned:
            turned = [tensor.T for tensor in tensors]
            return averaging.regmean(turned, own, scale=scale, ridge=ridge, name=name).T
        return averaging.regmean(tensors, own, scale=scale, ridge=ridge, name=name)

    return average


# -- Fisher information ----------------------------------------------------------------------------


def _fisher(
    live: LiveModel, parent: Checkpoint, calibration: Calibration, path: Path, recipe: Recipe
) -> dict[str, Any]:
    """Squared gradients of log p of each window, averaged: F = E (∂ log p / ∂Θ)²."""
    kept = _zeros(path, {name: parent.tensors[name].shape for name in live.places})
    sums = {name: _on(live, tensor) for name, tensor in kept.items()}
    parameters = live.model.state_dict()
    names: dict[int, list[str]] = {}  # tied parameters are one storage
    for name, place in live.places.items():
        names.setdefault(parameters[place.parameter].data_ptr(), []).append(name)

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None  # one is alive at a time
        assert gradient is not None
        for name in names[parameter.data_ptr()]:
            place = live.places[name]
            part = place.of({place.parameter: gradient.contiguous()})
            sums[name].view(-1).addcmul_(part, part)

    with contextlib.ExitStack() as hooks:
        for parameter in live.model.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(add).remove)
        for window in _windows(calibration, f"Fisher information of {parent.label}"):
            _backward(live.model, window, recipe)
    count = len(calibration.documents)
    totals = {name: _finish(kept[name], sums[name], count, parent, name) for name in kept}
    notes, still = _unused(live, parent), sum(total == 0.0 for total in totals.values())
    if still:
        notes.append(_count(still, "tensor", "without influence on the calibration text"))
    return {
        "places": {name: name for name in kept} | live.tied,
        "mean": math.fsum(totals.values()) / sum(tensor.numel() for tensor in kept.values()),
        "notes": notes,
    }


def _backward(model: nn.Module, window: Sequence[int], recipe: Recipe) -> None:
    """Back-propagate −log p of one window's labels: its own tokens, or drawn ones.

    The slope of −log p in the logits, softmax − onehot, takes the logits' place in memory: where
    the vocabulary is large, there is nothing larger.
    """
    ids = _ids(model, window)
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    slopes = logits.detach()[0]
    torch.softmax(slopes, -1, out=slopes)
    labels = ids[0, 1:]
    if recipe["estimator"] == "sampled":
        labels = _draw(slopes[:-1], window, recipe["seed"])
    slopes.scatter_add_(1, labels[:, None], slopes.new_full((len(labels), 1), -1.0))
    slopes[-1] = 0.0  # what follows the window is not known
    logits.backward(slopes[None])


def _draw(probabilities: Tensor, window: Sequence[int], seed: int) -> Tensor:
    """A label for each row of probabilities (T, V), shape (T,)."""
    key = hashlib.sha256(json.dumps([seed, window]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    shares = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    labels = []
    for start in range(0, len(shares), _ROWS):
        here = slice(start, start + _ROWS)
        below = probabilities[here].double().cumsum(-1)
        wanted = shares[here].to(below.device) * below[:, -1:]
        labels.append(torch.searchsorted(below, wanted, right=True)[:, 0])
    return torch.cat(labels).clamp(max=probabilities.shape[1] - 1)


# -- Gram matrices ---------------------------------------------------------------------------------


def _regmean(
    live: LiveModel, parent: Checkpoint, calibration: Calibration, path: Path, recipe: Recipe
) -> dict[str, Any]:
    """XᵀX of the inputs of every linear layer, divided by the tokens in them."""
    parameters = live.model.state_dict()
    users = Counter(p.data_ptr() for m in live.model.modules() for p in m.parameters(False))
    layers: dict[str, Any] = {
        name: module
        for name, module in live.model.named_modules()
        # a head tied to the embedding is two layers in one
        if isinstance(module, nn.Linear | Conv1D) and users[module.weight.data_ptr()] == 1
    }
    owner = _owners(live.model, layers, calibration.documents[0])
    kept = _zeros(path, {name: (_inputs(layers[name]),) * 2 for name in owner.values()})
    sums = {name: _on(live, tensor) for name, tensor in kept.items()}
    seen = Counter[str]()

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        sums[name].addmm_(rows.T, rows)
        seen[name] += len(rows)

    with _listening({name: layers[name] for name in kept}, add):
        for window in _windows(calibration, f"Gram matrices of {parent.label}"):
            _forward(live.model, window)
    for name in kept:
        _finish(kept[name], sums[name], seen[name] or 1, parent, f"the inputs of {name}")

    places: dict[str, str] = {}
    turned, without = [], Counter[tuple[str, str]]()
    of_weight = {layer.weight.data_ptr(): name for name, layer in layers.items()}
    for name, place in live.places.items():
        parameter = parameters[place.parameter]
        layer = of_weight.get(parameter.data_ptr())
        if layer is None:
            without[_NO_LAYER[min(parameter.ndim, 3)]] += 1
        elif not seen[owner[layer]]:
            without[_UNREACHED] += 1
        else:  # rows of a fused layer are solved for one by one, but not rows of a turned one
            assert isinstance(layers[layer], nn.Linear) or place.rows == _inputs(layers[layer])
            places[name] = owner[layer]
            turned += [name] if isinstance(layers[layer], Conv1D) else []
    notes = [_count(n, what, f"averaged: {why}") for (what, why), n in without.items()]
    short = {n: _inputs(layers[n]) for n, o in owner.items() if seen[o] < _inputs(layers[n])}
    if short:
        least = min(seen[owner[name]] for name in short)
        told = f"given fewer tokens than inputs ({least} for up to {max(short.values())})"
        notes.append(_count(len(short), "linear layer", told))
    return {"places": places, "turned": turned, "notes": [*_unused(live, parent), *notes]}


def _owners(model: nn.Module, layers: Mapping[str, Any], window: Sequence[int]) -> dict[str, str]:
    """Layer → the one whose Gram matrix it uses: the first that is given the same tensor."""
    owner = {name: name for name in layers}
    given: list[tuple[Tensor, int, str]] = []  # held, so that no other takes its place in memory

    def meet(name: str, inputs: Tensor) -> None:
        for tensor, version, first in given:
            if tensor is inputs and version == inputs._version:
                owner[name] = first
                return
        given.append((inputs, inputs._version, name))

    with _listening(layers, meet):
        _forward(model, window)
    return owner


@contextlib.contextmanager
def _listening(
    layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Have a function called with the name and the input of every layer."""
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                hear(name, (*args, *kwargs.values())[0])

            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _inputs(layer: Any) -> int:
    """How many inputs a linear layer has."""
    return int(layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])


def _windows(calibration: Calibration, what: str) -> Iterable[Sequence[int]]:
    """The windows, with a bar where there is a terminal."""
    return tqdm(calibration.documents, what, unit="window", disable=None)


def _ids(model: nn.Module, window: Sequence[int]) -> Tensor:
    """A window as the model takes it, shape (1, T)."""
    return torch.tensor([window], device=next(model.parameters()).device)


@torch.no_grad()
def _forward(model: nn.Module, window: Sequence[int]) -> None:
    """Run the model for those who listen."""
    model(input_ids=_ids(model, window), use_cache=False)


# -- what has no statistics ------------------------------------------------------------------------

_NO_LAYER = {
    1: ("vector", "norms and biases have no Gram matrix"),
    2: ("matrix", "embeddings, heads tied to them and routers are no linear layers"),
    3: ("expert tensor", "the inputs of experts are not seen by linear layers"),
}
_UNREACHED = ("matrix", "no calibration text reached the layer")


def _unused(live: LiveModel, parent: Checkpoint) -> list[str]:
    """Whether there are weights on disk that the model was loaded without."""
    infos = parent.tensors.items()
    floats = [name for name, info in infos if info.dtype in MIXED and 0 not in info.shape]
    count = len({*floats} - {*live.places} - {*live.tied})
    return [_count(count, "tensor", "averaged: the model has no use for it")] if count else []


def _count(count: int, what: str, happened: str) -> str:
    """`1 matrix was averaged: …`, `2 matrices were averaged: …`."""
    many = what.removesuffix("x") + ("ces" if what.endswith("x") else "s")
    return f"{count} {what if count == 1 else many} {'was' if count == 1 else 'were'} {happened}."


# -- files -----------------------------------------------------------------------------------------


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


def _laid_over(mapped: mmap.mmap, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors over the bytes of a mapped file, all fp32."""
    data = 8 + int.from_bytes(mapped[:8], "little")
    tensors = {}
    with warnings.catch_warnings():
        # torch says which cannot be written to; that is as it should be
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, info in header.items():
            begin, end = info["data_offsets"]
            flat = torch.frombuffer(
                mapped, dtype=torch.float32, count=(end - begin) // 4, offset=data + begin
            )
            tensors[name] = flat.view(info["shape"])
    return tensors


def _open(place: Path) -> Statistics | None:
    """What lies in the cache; None if nothing does, or it is damaged."""
    path = place / _TENSORS
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        with safe_open(path, framework="np") as whole, path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            names = set(whole.keys())
        if not names.issuperset(about["places"].values()):
            return None
        header = json.loads(mapped[8 : 8 + int.from_bytes(mapped[:8], "little")])
        return Statistics(
            about["kind"],
            about["places"],
            tuple(about["turned"]),
            about["mean"],
            about["tokens"],
            tuple(about["notes"]),
            _laid_over(mapped, header),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _on(live: LiveModel, kept: Tensor) -> Tensor:
    """Where a sum grows: in its file, unless the model is on an accelerator."""
    device = live.model.device
    return kept if device.type == "cpu" else torch.zeros_like(kept, device=device)


def _finish(kept: Tensor, grown: Tensor, count: int, parent: Checkpoint, name: str) -> float:
    """Divide a sum, put it into its file; the sum of its elements.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    kept.copy_(grown.div_(count))
    if not is_finite(kept.view(-1), Scratch()):
        raise NonFiniteError(
            f"the statistics of {name} are not finite",
            where=parent.label,
            fix="merge another version; this one's outputs are not finite on the calibration text",
        )
    return float(kept.sum())


KINDS = {"fisher": _fisher, "regmean": _regmean}
