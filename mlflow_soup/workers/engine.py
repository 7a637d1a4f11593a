"""What answers the requests of an evaluator under a mixture: this process, or a pool of workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

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


class Engine(ABC):
    """Where evaluations run. By default, none begins before it is asked for."""

    @property
    def size(self) -> int:
        """The number of workers."""
        return 1

    @property
    def most(self) -> int:
        """The number of evaluations that it helps to know ahead."""
        return 0

    @abstractmethod
    def answer(self, name: str, evaluator: Evaluator, mixture: Mixture) -> Answers:
        """All answers under a mixture.

        Args:
            name: the digest of the weights and of how they are scored.
            evaluator: whose requests are answered.
            mixture: the weights.

        Raises:
            NonFiniteError: a weight, or a logit that text is generated from, is not finite.
            ObjectiveError: memory ran out.
            WorkerError: workers ended, or none can take part.
            ParentError: a worker does not find a parent.
        """

    def offer(self, name: str) -> bool:
        """Offer an evaluation to `expect`: True if there is room and it was not offered before."""
        return False

    def expects(self, name: str) -> bool:
        """Whether an evaluation has begun, or waits."""
        return False

    def expect(  # noqa: B027  # what is noted needs no place in an engine that does nothing ahead
        self, name: str, evaluator: Evaluator, mixture: Mixture, arrived: Callable[[], object]
    ) -> None:
        """Note an evaluation that will be asked for.

        Args:
            name: as for `answer`.
            evaluator: as for `answer`.
            mixture: as for `answer`.
            arrived: is called once `answer` need not wait, while `answer` waits for another; if it
                raises a `SoupError`, `answer` raises it where this evaluation is asked for.
        """

    def begin(self) -> None:  # noqa: B027  # an engine may have nothing to give
        """Give what is noted to idle workers."""

    def close(self) -> None:  # noqa: B027
        """End all workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Inline(Engine):
    """The engine of this process: its own live model, one evaluation after the other."""

    def __init__(self, live: LiveModel) -> None:
        self.mixer = Mixer(live)

    def answer(self, name: str, evaluator: Evaluator, mixture: Mixture) -> Answers:
        """As `Engine.answer`."""
        (portions,) = evaluator.lm.portions(1)
        reply: Reply = self.mixer.answer(mixture, evaluator.lm, portions)
        return Answers((reply.answered,), reply.merge, reply.evaluate)
