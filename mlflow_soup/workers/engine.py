"""What answers the requests of an evaluator under a mixture: this process, or a pool of workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.frozen import Answered
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.workers.worker import Mixer, Mixture, Reply


@dataclass(frozen=True)
class Answers:
    """All answers under one mixture, and the seconds that they took."""

    parts: tuple[Answered, ...]
    merge: float
    evaluate: float


class Engine(Protocol):
    """Where evaluations run."""

    @property
    def size(self) -> int:
        """The number of workers."""

    @property
    def most(self) -> int:
        """The number of evaluations that are worth to be known ahead."""

    def wants(self, name: str) -> bool:
        """Whether an evaluation may be expected: there is room, and nobody asked this before."""

    def expects(self, name: str) -> bool:
        """Whether an evaluation has begun, or waits."""

    def answer(self, name: str, evaluator: Evaluator, mixture: Mixture) -> Answers:
        """All answers under a mixture.

        Args:
            name: the digest of the weights and of how they are scored.
            evaluator: whose requests are answered.
            mixture: the weights.

        Raises:
            NonFiniteError: a weight, or a logit that text is generated from, is not finite.
            ObjectiveError: memory ran out, or workers ended.
            ParentError: a worker does not find a parent.
        """

    def expect(
        self, name: str, evaluator: Evaluator, mixture: Mixture, arrived: Callable[[], object]
    ) -> None:
        """Note an evaluation that will be asked for.

        Args:
            name: as for `answer`.
            evaluator: as for `answer`.
            mixture: as for `answer`.
            arrived: is called once `answer` need not wait, while `answer` waits for another.
        """

    def begin(self) -> None:
        """Give what is noted to idle workers."""

    def close(self) -> None:
        """End all workers."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Inline:
    """The engine of this process: its own live model, one evaluation after the other."""

    size = 1
    most = 0

    def __init__(self, live: LiveModel) -> None:
        self.mixer = Mixer(live)

    def answer(self, name: str, evaluator: Evaluator, mixture: Mixture) -> Answers:
        """As `Engine.answer`."""
        (portions,) = evaluator.lm.portions(1)
        with evaluator.faults():
            reply: Reply = self.mixer.answer(mixture, evaluator.lm, portions)
        return Answers((reply.answered,), reply.merge, reply.evaluate)

    def wants(self, name: str) -> bool:
        """As `Engine.wants`."""
        return False

    def expects(self, name: str) -> bool:
        """As `Engine.expects`."""
        return False

    def expect(
        self, name: str, evaluator: Evaluator, mixture: Mixture, arrived: Callable[[], object]
    ) -> None:
        """Nothing is idle while this process waits for itself."""

    def begin(self) -> None:
        """Nothing is noted."""

    def close(self) -> None:
        """There is nothing to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
