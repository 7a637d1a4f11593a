"""The statistics of a parent on calibration text: Fisher diagonals or Gram matrices.

`passes` measures them and `averaging` uses them. They are cached in a folder, under a key made of
all that they depend on. So a repeated run, or a run with one more parent, measures only what is
new.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mlflow_soup.errors import ObjectiveError, SpecError, brief
from mlflow_soup.evaluation.compatibility import function_of
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.files.durable import on_disk, staged
from mlflow_soup.files.signing import sha256_of
from mlflow_soup.files.untrusted import LARGEST_JSON, parse_json, read_regular
from mlflow_soup.request.spec import ESTIMATORS
from mlflow_soup.statistics import averaging
from mlflow_soup.statistics.calibration import Calibration
from mlflow_soup.statistics.passes import KINDS
from mlflow_soup.statistics.sums import mapped
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.mix import Scratch

# in units of the mean Fisher information; it makes elements that no parent uses the plain mean
FLOOR = 1e-6
_FORMAT = 1  # version of the file format; part of the cache key
_TENSORS, _ABOUT = "tensors.safetensors", "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """The statistics of one parent.

    Attributes:
        kind: `fisher` or `regmean`.
        places: tensor name on disk → key of its statistics; tensors that are not in it are averaged
            plainly.
        turned: names on disk of matrices stored as [in, out], as in GPT-2.
        mean: the mean of all Fisher information; 0 for `regmean`.
        tokens: the number of tokens read.
        notes: sentences for people about tensors without statistics.
        tensors: key → Fisher information in the tensor's shape, or Gram matrix [in, in], in fp32;
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

    The live model gets the parent's weights for the measurement, and its own weights back
    afterwards.

    Args:
        kind: `fisher` or `regmean`.
        live: a model of the parent's architecture, with any weights.
        parent: the checkpoint to measure.
        digest: the parent's canonical digest.
        calibration: the text.
        folder: the cache; made if it does not exist. A damaged entry is measured again.
        estimator: for Fisher information: `empirical` takes the labels from the text; `sampled`
            draws a label from the model at each position, so that the expectation is the model's
            true Fisher information.
        seed: the seed of the draws; the draws of a window depend only on the seed and the window.

    Raises:
        NonFiniteError: the weights gave NaN or infinity.
        ObjectiveError: there is not enough memory.
        ParentError: the parent's tensors do not fit the model.
        SpecError: the kind or estimator is unknown, or the folder cannot be written.
        StoreError: the disk is full or fails.
    """
    if kind not in KINDS or estimator not in ESTIMATORS:
        raise SpecError(
            f"there are no {estimator} {kind} statistics",
            where="the arguments `kind` and `estimator` of `measure`",
            fix=f"choose a kind from {', '.join(KINDS)}, an estimator from {', '.join(ESTIMATORS)}",
        )
    recipe = {"estimator": estimator, "seed": seed * (estimator == "sampled")}
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    asked = [_FORMAT, digest, calibration.digest, recipe if kind == "fisher" else {}, versions]
    asked.append(function_of(parent.config))
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    place = Path(folder, f"{kind}-{key[:32]}")
    there = place.exists()  # asked first: another process may put it there in the meantime
    known = _open(place)
    if known is not None:
        return known
    if there:
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
                content |= about | {"sha256": sha256_of(partial / _TENSORS)}
                (partial / _ABOUT).write_text(json.dumps(content), encoding="utf-8")
    except SpecError:  # another process was faster, or the folder cannot be written
        if _open(place) is None:
            raise
    measured = _open(place)
    assert measured is not None
    return measured


def _open(place: Path) -> Statistics | None:
    """The statistics at a place in the cache; None if there are none or they are damaged."""
    try:
        about = parse_json(read_regular(place / _ABOUT, LARGEST_JSON))
        if sha256_of(place / _TENSORS) != about["sha256"]:
            return None
        tensors = mapped(place / _TENSORS)
        if not tensors.keys() >= {*about["places"].values()}:
            return None
        return Statistics(
            about["kind"],
            about["places"],
            tuple(about["turned"]),
            about["mean"],
            about["tokens"],
            tuple(about["notes"]),
            tensors,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


@contextlib.contextmanager
def _enough_memory(parent: Checkpoint) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ObjectiveError(
            f"there is not enough memory to measure {parent.label}: {brief(error)}",
            where="--device",
            fix="measure on the CPU, which needs memory for two copies of the model in fp32, one "
            "of them in the page cache",
        ) from error


def blend(
    parents: Sequence[Statistics], *, scale: float = 0.9, ridge: float = 1e-6
) -> Callable[[str, Sequence[Tensor]], Tensor | None]:
    """A function for `soup.write` that averages the parents with their statistics.

    Args:
        parents: the parents' statistics, of one kind and one calibration, oldest first.
        scale: RegMean's factor on the off-diagonal elements of Gram matrices.
        ridge: RegMean's addition to their diagonals, in units of the mean diagonal.

    Returns:
        A function: name on disk and tensors of the parents → tensor of the soup. It returns None,
        for the plain mean, if a parent has no statistics for the tensor.
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
