"""A worker: a live model that takes mixtures of checkpoints, and answers frozen requests with them.

All engines use it. What it is sent says where the parents are and what they hold, never the
tensors, and what it returns are answers, never scores: the driver alone aggregates and records.
"""

import hashlib
import pickle
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path

import torch

from mlflow_soup.errors import ParentError
from mlflow_soup.evaluation.frozen import Answered, FrozenLM, Portion
from mlflow_soup.evaluation.live import Link, LiveModel, hardware
from mlflow_soup.evaluation.prepared import open_lm
from mlflow_soup.weights.checkpoint import Checkpoint, Stamp
from mlflow_soup.weights.find import find_checkpoint

PROBE = (2, 64)  # sequences and tokens whose logits tell whether two workers compute the same bits


@dataclass(frozen=True)
class Source:
    """A parent, as a worker finds it.

    Attributes:
        uri: the registered version, `models:/my-llm/12`.
        digest: the digest of its tensors.
        root: its artifact tree on the driver's machine.
        stamps: weight file → its stamp there.
    """

    uri: str
    digest: str
    root: Path
    stamps: tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True)
class Mixture:
    """Open checkpoints and their merge weights, oldest first.

    Attributes:
        checkpoints: the checkpoints.
        digests: the digest of each checkpoint's tensors.
        lam: the merge weights λ.
        where: where the checkpoints are kept between two mixtures, as `LiveModel.link` says.
    """

    checkpoints: tuple[Checkpoint, ...]
    digests: tuple[str, ...]
    lam: tuple[float, ...]
    where: str = "mmap"

    def sources(self) -> tuple[Source, ...]:
        """The checkpoints, as a worker finds them."""
        pairs = zip(self.checkpoints, self.digests, strict=True)
        return tuple(
            Source(one.label, digest, one.root, tuple(sorted(one.stamps.items())))
            for one, digest in pairs
        )


@dataclass(frozen=True)
class Request:
    """What one worker is asked to answer.

    Attributes:
        evaluator: the fingerprint of the evaluator whose requests are answered.
        sources: the parents, oldest first.
        lam: their merge weights λ.
        where: where they are kept.
        portions: which requests.
        frozen: the pickled requests; empty if the worker has them already.
    """

    evaluator: str
    sources: tuple[Source, ...]
    lam: tuple[float, ...]
    where: str
    portions: tuple[Portion, ...]
    frozen: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What one worker answered, and the seconds that the merge and the forward passes took."""

    answered: Answered
    merge: float
    evaluate: float


@dataclass(frozen=True)
class Start:
    """How a worker starts.

    Attributes:
        donor: gives the architecture, the tokenizer and the weights of the probe.
        device: `cpu`, `cuda`, `cuda:1` …
        threads: of torch on the CPU.
    """

    donor: Source
    device: str
    threads: int


@dataclass(frozen=True)
class Admission:
    """What decides whether the answers of a worker are those of another.

    Attributes:
        environment: versions and hardware.
        bits: the digest of the logits of a probe.
    """

    environment: dict[str, str]
    bits: str


class Mixer:
    """A live model that takes one mixture after the other, and keeps the links of the last."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self._linked: tuple[tuple[str, ...], list[Link]] = ((), [])
        self._lam: tuple[float, ...] = ()  # what the model holds of what is linked; empty: unknown

    def mix(self, mixture: Mixture) -> None:
        """Give the model the weights Σ λ_i·Θ_i, unless it has them.

        Raises:
            NonFiniteError: a value is not finite.
            ParentError: two tensors of a parent differ, but the model ties them.
        """
        key = (mixture.where, *mixture.digests)
        if self._linked[0] != key:
            self._linked, self._lam = ((), []), ()  # frees what is in memory first
            self._linked = (key, self.live.link(mixture.checkpoints, where=mixture.where))
        if self._lam != mixture.lam:
            self._lam = ()
            self.live.set_weights(self._linked[1], mixture.lam)
            self._lam = mixture.lam

    def answer(self, mixture: Mixture, lm: FrozenLM, portions: Sequence[Portion]) -> Reply:
        """What the model answers to portions under a mixture.

        Raises:
            NonFiniteError, ObjectiveError, ParentError, SpecError: as `mix` and
                `FrozenLM.forward`.
        """
        begin = time.monotonic()
        self.mix(mixture)
        merged = time.monotonic()
        answered = lm.forward(portions)
        return Reply(answered, merged - begin, time.monotonic() - merged)


def admission_of(mixer: Mixer, donor: Mixture) -> Admission:
    """What decides whether two workers give the same answers.

    Args:
        mixer: a worker's model.
        donor: one checkpoint with weight 1, the same for all workers.
    """
    mixer.mix(donor)
    model, device = mixer.live.model, mixer.live.model.device
    config = model.config.get_text_config()
    rows, width = PROBE
    width = min(width, int(getattr(config, "max_position_embeddings", width) or width))
    tokens = torch.arange(rows * width, device=device).view(rows, width) % int(config.vocab_size)
    with torch.no_grad():
        logits = model(tokens).logits.contiguous().cpu()
    names = ("mlflow-soup", "torch", "transformers", "lm_eval")
    environment = {name: version_of(name) for name in names}
    environment |= {"python": platform.python_version(), "dtype": str(model.dtype)}
    environment |= {"device": device.type, "hardware": hardware(device)}
    bits = logits.view(-1).view(torch.uint8).numpy()
    return Admission(environment, hashlib.sha256(bits).hexdigest())


def find_here(source: Source) -> Checkpoint:
    """A parent that the driver opened, on the same machine or a shared disk.

    Raises:
        ParentError: the folder is missing here, or holds other files by now.
    """
    if source.root.is_dir():
        found = find_checkpoint(source.root, source.uri)
        if tuple(sorted(found.stamps.items())) == source.stamps:
            return found
    raise ParentError(
        f"a worker does not find the files of {source.uri} that the search began with",
        where=str(source.root),
        fix="do not change the artifacts of a version; run the same command again",
    )


class Worker:
    """A model of its own, for one engine.

    Args:
        start: how it starts.
        find: source → its checkpoint on this machine.
    """

    def __init__(self, start: Start, find: Callable[[Source], Checkpoint] = find_here) -> None:
        torch.set_num_threads(start.threads)
        self._find = find
        self._open: dict[Source, Checkpoint] = {}
        donor = self._mixture((start.donor,), (1.0,), "mmap")
        self._mixer = Mixer(LiveModel(donor.checkpoints[0], start.device))
        self.admission = admission_of(self._mixer, donor)
        self._lms: dict[str, FrozenLM] = {}

    def answer(self, request: Request) -> Reply:
        """What the model answers.

        Raises:
            NonFiniteError, ObjectiveError, ParentError, SpecError: as `Mixer.answer`.
        """
        if request.frozen:  # from the driver, who may run code here anyway
            self._lms[request.evaluator] = open_lm(self._mixer.live, pickle.loads(request.frozen))
        mixture = self._mixture(request.sources, request.lam, request.where)
        return self._mixer.answer(mixture, self._lms[request.evaluator], request.portions)

    def _mixture(self, sources: Sequence[Source], lam: tuple[float, ...], where: str) -> Mixture:
        for source in sources:
            if source not in self._open:
                self._open[source] = self._find(source)
        found = tuple(self._open[source] for source in sources)
        return Mixture(found, tuple(source.digest for source in sources), lam, where)
