"""Which sequences of tokens are forwarded together, and what they share only once.

An `Input` is a sequence that goes through a model for all continuations that read its logits. A
`Part` becomes one batch. Its inputs may continue prefixes of one length that are forwarded before
them, each once: then nothing before a token is padding, and what is padded comes after all that is
read, so that no attention mask is needed.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Tokens = Sequence[int]

# prefixes are shared from here on: less is lost again in smaller matrices
WORTHWHILE = 0.8


@dataclass
class Input:
    """Tokens that are forwarded once, for every continuation asked of them.

    `data` has four bytes to a token, the highest first: compared as bytes they are in order.
    """

    data: bytes
    task: str
    asked: list[tuple[int, Tokens]] = field(default_factory=list)  # number, continuation

    def __len__(self) -> int:
        return len(self.data) // 4

    @property
    def rows(self) -> int:
        """How many of its last logits are read."""
        return max(len(continuation) for _, continuation in self.asked)

    @property
    def start(self) -> int:
        """The first position whose logits are read: what is before it may be shared."""
        return len(self) - self.rows

    def before(self, position: int) -> bytes:
        """The tokens up to a position, not included."""
        return self.data[: 4 * position]


def pack(tokens: Tokens) -> bytes:
    """Tokens as the `data` of an input."""
    return np.array(tokens, ">u4").tobytes()


def unpack(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The tokens again, shape (n,)."""
    return np.frombuffer(data, ">u4").astype(np.int64)


@dataclass(frozen=True)
class Part:
    """Inputs that become one batch, and how many of their first tokens come from prefixes."""

    inputs: Sequence[Input]
    shared: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the padded batch."""
        return len(self.inputs), max(map(len, self.inputs)) - self.shared

    @functools.cached_property
    def prefixes(self) -> tuple[bytes, ...]:
        """What the inputs begin with, each once."""
        if not self.shared:
            return ()
        return tuple(dict.fromkeys(one.before(self.shared) for one in self.inputs))


@dataclass(frozen=True)
class Limits:
    """What a batch may hold, and what it costs besides.

    Args:
        inputs: most sequences of a batch.
        tokens: most tokens, padding included.
        logits: most positions whose logits are computed; one sequence may exceed both.
        forward: what a forward costs beside its tokens, in tokens.
        selects: whether logits are computed only where they are read.
    """

    inputs: int
    tokens: int
    logits: int
    forward: float
    selects: bool


def divide(inputs: Sequence[Input], limits: Limits, *, shares: bool) -> list[Part]:
    """Batches of all inputs: those of a task on their own where sharing prefixes is worthwhile.

    Args:
        inputs: the longest first.
        limits: of each batch.
        shares: whether the model takes prefixes at all.
    """
    tasks = defaultdict(list)
    for one in inputs:
        tasks[one.task].append(one)
    shared = {task: _share(own, limits) if shares else [] for task, own in tasks.items()}
    rest = [one for one in inputs if not shared[one.task]]
    return [part for own in shared.values() for part in own] + _plain(rest, limits)


def _plain(inputs: Sequence[Input], limits: Limits) -> list[Part]:
    return [Part(chunk) for chunk in _chunks(inputs, limits, lambda _: 0)]


def _share(inputs: Sequence[Input], limits: Limits) -> list[Part]:
    """A task's batches on prefixes; none where they save too little.

    Either one prefix for all, as far as they agree, or in each batch what is before the choices.
    """
    least = min(one.start for one in inputs)
    first, last = (pick(one.before(least) for one in inputs) for pick in (min, max))
    common = next((i for i in range(least) if first[4 * i :][:4] != last[4 * i :][:4]), least)
    by_context = sorted(inputs, key=lambda one: (-one.start, one.data))
    ways = [
        [Part(chunk, common) for chunk in _chunks(inputs, limits, lambda _: common)],
        [
            Part(chunk, min(one.start for one in chunk))
            for chunk in _chunks(by_context, limits, lambda one: one.start)
        ],
    ]
    best = min(ways, key=lambda parts: _cost(parts, limits))
    enough = WORTHWHILE * _cost(_plain(inputs, limits), limits)
    return best if _cost(best, limits) <= enough else []


def _cost(parts: Sequence[Part], limits: Limits) -> float:
    """Tokens forwarded, and what forwards cost besides; a prefix is kept from batch to batch."""
    cost = 0.0
    known: tuple[bytes, ...] = ()
    for part in parts:
        rows, columns = part.size
        cost += rows * columns + limits.forward
        if part.prefixes not in ((), known):
            cost += len(part.prefixes) * part.shared + limits.forward
        known = part.prefixes
    return cost


def _chunks(
    inputs: Sequence[Input], limits: Limits, shared: Callable[[Input], int]
) -> Iterator[list[Input]]:
    """Inputs by the batch, in order, given how many of their tokens come from prefixes."""
    chunk: list[Input] = []
    width = logits = 0
    for one in inputs:
        own = len(one) - shared(one)
        read = one.rows if limits.selects else len(one)
        width, logits = max(width, own), logits + read
        if chunk and (
            len(chunk) == limits.inputs
            or (len(chunk) + 1) * width > limits.tokens
            or logits > limits.logits
        ):
            yield chunk
            chunk, width, logits = [], own, read
        chunk.append(one)
    if chunk:
        yield chunk
