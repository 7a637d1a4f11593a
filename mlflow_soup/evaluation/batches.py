"""Split token sequences into batches, and forward a prefix that several sequences share once.

An `Input` is a token sequence that goes through the model once, for all continuations that read
its logits. A `Part` becomes one batch. The inputs of a part may continue prefixes of one length.
The model forwards each prefix once, before the batch. Padding then only follows the positions whose
logits are read, so the batch needs no attention mask.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Tokens = Sequence[int]

# Share prefixes when the cost falls to this fraction or below. Smaller savings are lost again,
# because the matrices get smaller.
WORTHWHILE = 0.8


@dataclass
class Input:
    """Tokens that the model forwards once, for every continuation that is asked of them.

    `data` holds four bytes per token, the highest byte first, so that bytes sort as tokens do.
    """

    data: bytes
    task: str
    asked: list[tuple[int, Tokens]] = field(default_factory=list)  # (number, continuation)

    def __len__(self) -> int:
        return len(self.data) // 4

    @property
    def rows(self) -> int:
        """The number of logits that are read, counted from the end."""
        return max(len(continuation) for _, continuation in self.asked)

    @property
    def start(self) -> int:
        """The first position whose logits are read; the tokens before it may be shared."""
        return len(self) - self.rows

    def before(self, position: int) -> bytes:
        """The tokens before a position, as bytes."""
        return self.data[: 4 * position]


def pack(tokens: Tokens) -> bytes:
    """Convert tokens to the `data` of an input."""
    return np.array(tokens, ">u4").tobytes()


def unpack(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Convert `data` back to tokens, shape (n,)."""
    return np.frombuffer(data, ">u4").astype(np.int64)


@dataclass(frozen=True)
class Part:
    """Inputs of one batch, and the number of their first tokens that a shared prefix supplies."""

    inputs: Sequence[Input]
    shared: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the padded batch."""
        return len(self.inputs), max(map(len, self.inputs)) - self.shared

    @functools.cached_property
    def prefixes(self) -> tuple[bytes, ...]:
        """The distinct prefixes of the inputs."""
        if not self.shared:
            return ()
        return tuple(dict.fromkeys(one.before(self.shared) for one in self.inputs))


@dataclass(frozen=True)
class Limits:
    """The largest size of a batch, and the fixed cost of a forward pass.

    Args:
        inputs: the largest number of sequences in a batch.
        tokens: the largest number of tokens in a batch, padding included.
        logits: the largest number of positions whose logits are computed. A batch of one sequence
            may exceed `tokens` and `logits`.
        forward: the fixed cost of a forward pass, in tokens.
        selects: whether the model computes logits only at the positions that are read.
    """

    inputs: int
    tokens: int
    logits: int
    forward: float
    selects: bool


def divide(inputs: Sequence[Input], limits: Limits, *, shares: bool) -> list[Part]:
    """Divide all inputs into batches.

    A task gets batches of its own where sharing prefixes is worthwhile. All other inputs are
    batched together.

    Args:
        inputs: the inputs, the longest first.
        limits: the limits of each batch.
        shares: whether the model can continue prefixes.
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
    """The batches of a task with shared prefixes; an empty list where sharing saves too little.

    Two ways compete: one prefix for all inputs, as long as their common beginning; or, in each
    batch, the contexts before the choices as prefixes. The cheaper way wins.
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
    """The cost of batches in tokens: the tokens forwarded, and the fixed cost of each forward pass.

    Prefixes cost nothing again where the batch before had the same prefixes.
    """
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
    """Yield the inputs of each batch, in order.

    Args:
        inputs: the inputs to divide.
        limits: the limits of each batch.
        shared: gives the number of an input's first tokens that a prefix supplies.
    """
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
