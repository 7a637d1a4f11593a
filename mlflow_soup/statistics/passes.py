"""The passes over the calibration text: sums of squared gradients, or of the inputs of layers.

Each window is a batch of its own. So nothing is padded, and the result depends on no batch size.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D  # private door

from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.statistics.calibration import Calibration
from mlflow_soup.statistics.sums import Sums
from mlflow_soup.weights.checkpoint import MIXED, Checkpoint

_ROWS = 64  # positions whose labels are drawn at a time
Recipe = Mapping[str, Any]


# -- Fisher information ----------------------------------------------------------------------------


def fisher(
    live: LiveModel, parent: Checkpoint, calibration: Calibration, path: Path, recipe: Recipe
) -> dict[str, Any]:
    """Write the mean squared gradients of log p of the windows, F = E (∂ log p / ∂Θ)².

    Args:
        live: the model, with the parent's weights.
        parent: the checkpoint.
        calibration: the windows.
        path: the file for the sums; must not exist.
        recipe: the estimator and the seed.

    Returns:
        The fields `places`, `mean` and `notes` of `Statistics`.
    """
    shapes = {name: parent.tensors[name].shape for name in live.places}
    parameters = live.model.state_dict()
    devices = {name: parameters[place.parameter].device for name, place in live.places.items()}
    sums = Sums(path, shapes, devices)
    names: dict[int, list[str]] = {}  # storage → names on disk; tied parameters share a storage
    for name, place in live.places.items():
        names.setdefault(parameters[place.parameter].data_ptr(), []).append(name)

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None  # keep one gradient in memory at a time
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
    totals = {name: sums.finish(name, count, parent.label) for name in sums}
    notes, still = _unused(live, parent), sum(total == 0.0 for total in totals.values())
    if still:
        notes.append(
            _count(still, "tensor", "without influence on the likelihood of the calibration text")
        )
    return {
        "places": {name: name for name in sums} | live.tied,
        "mean": math.fsum(totals.values()) / sum(tensor.numel() for tensor in sums.values()),
        "notes": notes,
    }


def _backward(model: nn.Module, window: Sequence[int], recipe: Recipe) -> None:
    """Back-propagate −log p of one window's labels: its own tokens, or drawn ones.

    The gradient of −log p in the logits, softmax − onehot, overwrites the logits: with a large
    vocabulary they are the largest tensor.
    """
    ids = _ids(model, window)
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    slopes = logits.detach()[0]
    slopes.sub_(slopes.amax(-1, keepdim=True)).exp_()
    slopes.div_(slopes.sum(-1, keepdim=True))
    labels = ids[0, 1:]
    if recipe["estimator"] == "sampled":
        labels = _draw(slopes[:-1], window, recipe["seed"])
    slopes.scatter_add_(1, labels[:, None], slopes.new_full((len(labels), 1), -1.0))
    slopes[-1] = 0.0  # the token after the window is not known
    logits.backward(slopes[None])


def _draw(probabilities: Tensor, window: Sequence[int], seed: int) -> Tensor:
    """Draw a label from each row of probabilities (T, V); shape (T,)."""
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


def regmean(
    live: LiveModel, parent: Checkpoint, calibration: Calibration, path: Path, recipe: Recipe
) -> dict[str, Any]:
    """Write XᵀX / tokens for the inputs X of every linear layer.

    Args:
        live: the model, with the parent's weights.
        parent: the checkpoint.
        calibration: the windows.
        path: the file for the sums; must not exist.
        recipe: not used.

    Returns:
        The fields `places`, `turned` and `notes` of `Statistics`.
    """
    parameters = live.model.state_dict()
    users = Counter(p.data_ptr() for m in live.model.modules() for p in m.parameters(False))
    layers: dict[str, Any] = {
        name: module
        for name, module in live.model.named_modules()
        # a head that is tied to the embedding is left out: its weights serve two layers
        if isinstance(module, nn.Linear | Conv1D) and users[module.weight.data_ptr()] == 1
    }
    owner = _owners(live.model, layers, calibration.documents[0])
    shapes = {name: (_inputs(layers[name]),) * 2 for name in owner.values()}
    sums = Sums(path, shapes, {name: layers[name].weight.device for name in shapes})
    seen = Counter[str]()

    def add(name: str, inputs: Tensor) -> None:
        # with a device map, the input may come from another device
        rows = inputs.reshape(-1, inputs.shape[-1]).to(sums[name].device)
        sums[name].addmm_(rows.T, rows)
        seen[name] += len(rows)

    with _listening({name: layers[name] for name in sums}, add):
        for window in _windows(calibration, f"Gram matrices of {parent.label}"):
            _forward(live.model, window)
    for name in sums:
        sums.finish(name, seen[name] or 1, parent.label)

    places: dict[str, str] = {}
    turned, without = [], Counter[tuple[str, str]]()
    of_weight = {layer.weight.data_ptr(): name for name, layer in layers.items()}
    for name, place in live.places.items():
        parameter = parameters[place.parameter]
        layer = of_weight.get(parameter.data_ptr())
        if layer is None:
            without[_NO_LAYER[min(max(parameter.ndim, 1), 3)]] += 1
        elif not seen[owner[layer]]:
            without[_UNCALLED] += 1
        else:  # a tensor may be some rows of a fused layer, but not of a layer stored [in, out]
            assert isinstance(layers[layer], nn.Linear) or place.rows == _inputs(layers[layer])
            places[name] = owner[layer]
            turned += [name] if isinstance(layers[layer], Conv1D) else []
    notes = [_count(n, what, f"averaged: {why}") for (what, why), n in without.items()]
    short = {n: _inputs(layers[n]) for n, o in owner.items() if 0 < seen[o] < _inputs(layers[n])}
    if short:
        least = min(seen[owner[name]] for name in short)
        told = (
            f"given fewer tokens than inputs ({least} tokens, up to {max(short.values())} inputs)"
        )
        notes.append(_count(len(short), "linear layer", told))
    return {"places": places, "turned": turned, "notes": [*_unused(live, parent), *notes]}


def _owners(model: nn.Module, layers: Mapping[str, Any], window: Sequence[int]) -> dict[str, str]:
    """Layer → the layer whose Gram matrix it uses: the first one with the same input tensor."""
    owner = {name: name for name in layers}
    calls = Counter[str]()
    given: list[tuple[Tensor, int, str]] = []  # keeps the tensors alive, so that none is reused

    def meet(name: str, inputs: Tensor) -> None:
        calls[name] += 1
        for tensor, version, first in given:
            # private door: torch.Tensor._version
            if tensor is inputs and version == inputs._version:
                owner[name] = first
                return
        given.append((inputs, inputs._version, name))

    with _listening(layers, meet):
        _forward(model, window)
    # a layer that is called more than once also has other inputs
    return {n: first if calls[n] == calls[first] == 1 else n for n, first in owner.items()}


@contextlib.contextmanager
def _listening(
    layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `hear` with the name and the input of each layer, whenever the layer is called."""
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                hear(name, (*args, *kwargs.values())[0])

            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _inputs(layer: Any) -> int:
    """The number of inputs of a linear layer."""
    return int(layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])


def _windows(calibration: Calibration, what: str) -> Iterable[Sequence[int]]:
    """The windows, with a progress bar if there is a terminal."""
    return tqdm(calibration.documents, what, unit="window", disable=None)


def _ids(model: nn.Module, window: Sequence[int]) -> Tensor:
    """A window as a batch for the model, shape (1, T)."""
    return torch.tensor([window], device=next(model.parameters()).device)


@torch.no_grad()
def _forward(model: nn.Module, window: Sequence[int]) -> None:
    """Run the model on a window; only the hooks of its layers use the result."""
    model(input_ids=_ids(model, window), use_cache=False)


# -- tensors without statistics --------------------------------------------------------------------

_NO_LAYER = {
    1: ("vector", "norms and biases have no Gram matrix"),
    2: ("matrix", "embeddings, tied heads and routers are not treated as linear layers"),
    3: ("3-D tensor", "experts and convolutions are not treated as linear layers"),
}
_UNCALLED = ("matrix", "the calibration text did not reach the layer")


def _unused(live: LiveModel, parent: Checkpoint) -> list[str]:
    """A note if the checkpoint has tensors that the model does not use; else an empty list."""
    infos = parent.tensors.items()
    floats = [name for name, info in infos if info.dtype in MIXED and 0 not in info.shape]
    count = len({*floats} - {*live.places} - {*live.tied})
    return [_count(count, "tensor", "averaged: not used by the model")] if count else []


def _count(count: int, what: str, happened: str) -> str:
    """A sentence, `1 matrix was averaged: …` or `2 matrices were averaged: …`."""
    many = what.removesuffix("x") + ("ces" if what.endswith("x") else "s")
    return f"{count} {what if count == 1 else many} {'was' if count == 1 else 'were'} {happened}."


KINDS = {"fisher": fisher, "regmean": regmean}
