"""Which part of a model lies on which device, for models that are larger than one GPU.

transformers and accelerate place the parts and move the activations between them. The weights must
stay reachable: what they offload to the CPU or the disk, or cut across devices, cannot be mixed in
place.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mlflow_soup.errors import SpecError, brief
from mlflow_soup.evaluation.loading import skeleton
from mlflow_soup.request.spec import DEVICE_MAPS
from mlflow_soup.weights.checkpoint import Checkpoint, shorten

Map = dict[str, str | int]
_WHERE = "--device-map"
_OFFLOADED = (
    "give the GPUs room for the whole model: free their memory, use more of them, or choose "
    "another map; without a GPU large enough, leave --device-map out and say --device cpu"
)


def read_map(asked: str, checkpoint: Checkpoint) -> str | Map:
    """What `from_pretrained` takes as its device map, checked before anything is loaded.

    Args:
        asked: one of `DEVICE_MAPS`, or a JSON file: name of a module → device.
        checkpoint: whose architecture the file is for.

    Raises:
        SpecError: the file is no such map, or does not fit the architecture.
        ParentError: transformers does not build the architecture.
    """
    if asked in DEVICE_MAPS:
        return asked
    try:
        found = json.loads(Path(asked).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(asked, f"it is not JSON: {brief(error)}") from error
    if not isinstance(found, dict) or not found:
        raise _refused(asked, "it is no object with names of modules")
    for name, device in found.items():
        if type(device) not in (str, int):
            raise _refused(asked, f"{name!r} has the device {json.dumps(device)}")
    _check_devices(asked, found)
    _check_names(asked, found, skeleton(checkpoint))
    return found


def _check_devices(asked: str, found: Map) -> None:
    kinds = {}
    for name, device in found.items():
        if device in ("disk", "meta"):
            raise SpecError(
                f"{name!r} is to lie on {device}, where its weights cannot be mixed",
                where=f"{_WHERE} {asked}",
                fix=_OFFLOADED,
            )
        kinds[device_of(device, f"{_WHERE} {asked}").type] = name
    if len(kinds) > 1:  # accelerate offloads what lies on the CPU then
        what = ", ".join(f"{name!r} on {kind}" for kind, name in kinds.items())
        raise SpecError(
            f"the map has parts on different kinds of devices: {what}; accelerate would offload "
            "those on the CPU, and their weights could not be mixed",
            where=f"{_WHERE} {asked}",
            fix=_OFFLOADED,
        )


def _check_names(asked: str, found: Map, model: Any) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    known = {name for name, _ in model.named_modules()} | tensors.keys()
    if unknown := [name for name in found if name not in known]:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        what = f"the model has no module {', '.join(map(repr, shorten(unknown, 3)))}{hint}"
        raise _refused(asked, what)
    owners = {name: _owner(name, found) for name in tensors}
    if missing := [name for name, owner in owners.items() if owner is None]:
        raise _refused(asked, f"it has no device for {', '.join(map(repr, shorten(missing, 3)))}")
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(id(tensor), name)
        here, there = (torch.device(found[owners[each] or ""]) for each in (name, other))
        if here != there:
            raise _refused(asked, f"{other!r} and {name!r} are one tensor, but have two devices")


def _owner(name: str, found: Mapping[str, object]) -> str | None:
    """The entry that decides where a tensor lies: the longest one that it is in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next((prefix for prefix in prefixes if prefix in found), None)


def _refused(asked: str, what: str) -> SpecError:
    return SpecError(
        f"the device map cannot be used: {what}",
        where=f"{_WHERE} {asked}",
        fix='give a JSON object that has all modules of the model, such as {"model": 0, '
        f'"lm_head": 1}}; or one of {", ".join(DEVICE_MAPS)}',
    )


def asked_device(asked: str) -> torch.device:
    """The device that `--device` asks for; `auto` takes a GPU if there is one.

    Raises:
        SpecError: there is no such device.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return device_of(asked, "--device")


def device_of(name: str | int, where: str) -> torch.device:
    """The device of a name, or of the number of a GPU.

    Raises:
        SpecError: there is no such device.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"device {name!r} is not available: {str(error).splitlines()[0]}",
            where=where,
            fix="choose cpu, cuda, cuda:1 …, or auto, which takes a GPU if there is one",
        ) from error


def check_reachable(model: Any) -> None:
    """Refuse a loaded model with a weight that is not in memory as a whole.

    Raises:
        SpecError: a weight is offloaded, or cut across devices.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise offloaded(f"{name!r} would be offloaded to the CPU or the disk")
        if hasattr(tensor, "device_mesh"):  # a DTensor
            raise SpecError(
                f"{name!r} is cut across devices (tensor parallel), and cannot be mixed in place",
                where="the config of the model, or torchrun",
                fix="start mlflow-soup without torchrun; --device-map puts whole layers on each "
                "GPU",
            )


def offloaded(what: str) -> SpecError:
    """The error for a map that leaves weights where they cannot be mixed."""
    words = f"the model does not fit on the devices of the map: {what}, where weights cannot be "
    return SpecError(f"{words}mixed", where=_WHERE, fix=_OFFLOADED)


def placement(model: Any) -> str:
    """Where a loaded model lies, exactly: each device with the first weight of every run on it."""
    runs = groupby(model.named_parameters(), key=lambda named: str(named[1].device))
    return ", ".join(f"{device} from {next(run)[0]}" for device, run in runs)
