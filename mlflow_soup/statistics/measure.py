"""What parents learnt from data: Fisher diagonals and Gram matrices, for `averaging`.

They are measured by `passes` and kept in a folder, by what they depend on: what was measured once
is not measured again, when a third parent comes or a run is repeated.
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

from mlflow_soup.errors import ObjectiveError, SpecError
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.files.durable import on_disk, staged
from mlflow_soup.request.spec import ESTIMATORS
from mlflow_soup.statistics import averaging
from mlflow_soup.statistics.calibration import Calibration
from mlflow_soup.statistics.passes import KINDS
from mlflow_soup.statistics.sums import mapped
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.compatibility import function_of
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.mix import Scratch

FLOOR = 1e-6  # of the mean Fisher information, so that what no parent uses is averaged
_FORMAT = 1  # of the files; part of their name
_TENSORS, _ABOUT = "tensors.safetensors", "statistics.json"


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
    asked.append(function_of(parent.config))
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
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
                content |= about | {"sha256": of_file(partial / _TENSORS)}
                (partial / _ABOUT).write_text(json.dumps(content), encoding="utf-8")
    except SpecError:  # another was quicker, or it cannot be written there
        if _open(place) is None:
            raise
    measured = _open(place)
    assert measured is not None
    return measured


def _open(place: Path) -> Statistics | None:
    """What lies in the cache; None if nothing does, or it is damaged."""
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        if of_file(place / _TENSORS) != about["sha256"]:
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
