"""A pool of workers: which of them answers what, and what happens when one ends.

The pool holds a queue of evaluations, each named by the digest of what is measured, so that nothing
in flight is asked twice. If as many wait as there are workers, each gets an evaluation of its own;
else the batches of each are cut, so that all workers have a share. Both give the answers that one
worker gives.

Evaluations are pure, so one whose worker ended is given to another. All is done by the thread that
waits: the pool has no state that another thread changes.
"""

import contextlib
import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from mlflow_soup.errors import SoupError, WorkerError, brief
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.frozen import Portion
from mlflow_soup.workers.engine import Answers, Engine
from mlflow_soup.workers.worker import Admission, Mixture, Reply, Request

logger = logging.getLogger("mlflow_soup")
STARTS = 3  # failed starts of one worker, one after the other, before its place stays empty
DEATHS = 2  # workers that may end while they answer one request
GLANCE = 1.0  # seconds between two looks at the clock while workers answer
LONG = 60.0  # seconds after which people hear of a worker that has not started
_MEMORY = (
    "look at the memory of the machine: each worker holds the model once; use fewer workers or a "
    "smaller --batch-size"
)


class Handle(Protocol):
    """One worker, wherever it runs."""

    words: str  # what it is and where, for people
    waits: str  # what to look at if it does not start

    def admit(self) -> Future[Admission]:
        """Start the worker, and tell what decides whether it may take part."""

    def answer(self, request: Request) -> Future[Reply]:
        """Let the worker answer a request."""

    def loss(self, error: BaseException) -> str:
        """How the worker ended, if an error of a future says so; else empty."""

    def kill(self) -> None:
        """End the worker, whatever it does."""


@dataclass
class _Task:
    """An evaluation, and what has been answered of it."""

    name: str
    evaluator: Evaluator
    mixture: Mixture
    arrived: Callable[[], object] | None = None
    shares: list[tuple[Portion, ...]] = field(default_factory=list)  # empty until it is divided
    replies: dict[int, Reply] = field(default_factory=dict)  # number of a share → its answers
    deaths: dict[int, int] = field(default_factory=dict)  # number of a share → workers lost to it
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or 0 < len(self.shares) == len(self.replies)


@dataclass
class _Place:
    """A place for a worker: the worker that has it now, and what it does."""

    start: Callable[[], Handle]
    handle: Handle | None = None
    future: Future[Any] | None = None  # what it is doing; None if it is idle
    since: float = 0.0
    share: tuple[_Task, int] | None = None  # what it answers; None while it starts
    holds: set[str] = field(default_factory=set)  # evaluators whose requests it has
    failures: int = 0  # starts that failed, one after the other
    told: bool = False  # whether people heard that it takes long to start


class Pool(Engine):
    """Workers that share the evaluations of one driver.

    Args:
        starts: starts a worker, one function for each.
        own: what each worker must agree with, computed by the driver when it is needed.
        patience: seconds after which a worker that has not answered counts as gone.
        leave: is called once all workers have ended.
    """

    def __init__(
        self,
        starts: Sequence[Callable[[], Handle]],
        own: Callable[[], Admission],
        patience: float,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._leave = leave
        self._bar: tqdm[Any] | None = None  # how many workers have started
        self._places = [_Place(start) for start in starts]
        self._own, self._patience = own, patience
        self._expected: Admission | None = None
        self._refusal: SoupError | None = None  # why no worker is left
        self._tasks: dict[str, _Task] = {}
        self._offered: set[str] = set()
        self._waiting: deque[_Task] = deque()  # not divided yet
        self._queue: deque[tuple[_Task, int]] = deque()  # shares that no worker has yet
        self._frozen: dict[str, bytes] = {}  # fingerprint of an evaluator → its pickled requests

    @property
    def size(self) -> int:
        """As `Engine.size`; places that stay empty do not count."""
        return len(self._places)

    @property
    def most(self) -> int:
        """As `Engine.most`: while each worker has one evaluation, as many more wait."""
        return 2 * self.size

    def offer(self, name: str) -> bool:
        """As `Engine.offer`."""
        if name in self._offered or len(self._tasks) >= self.most:
            return False
        self._offered.add(name)
        return True

    def expects(self, name: str) -> bool:
        """As `Engine.expects`."""
        return name in self._tasks

    def close(self) -> None:
        """End all workers."""
        if self._bar is not None:
            self._bar.close()
        with contextlib.ExitStack() as ends:  # one that fails leaves none of the others out
            ends.callback(self._leave)
            for place in self._places:
                if place.handle is not None:
                    ends.callback(place.handle.kill)
                place.handle = place.future = place.share = None
        self._tasks.clear()
        self._waiting.clear()
        self._queue.clear()

    def expect(
        self, name: str, evaluator: Evaluator, mixture: Mixture, arrived: Callable[[], object]
    ) -> None:
        """As `Engine.expect`."""
        if name not in self._tasks:
            self._add(_Task(name, evaluator, mixture, arrived))

    def answer(self, name: str, evaluator: Evaluator, mixture: Mixture) -> Answers:
        """As `Engine.answer`.

        Raises:
            WorkerError: the request ended two workers, or no worker can be started.
        """
        if name not in self._tasks:
            self._add(_Task(name, evaluator, mixture))
        task = self._tasks[name]
        task.arrived = None  # somebody waits for it
        if task in self._waiting:
            self._waiting.remove(task)
            self._waiting.appendleft(task)
        while not task.done:
            if self._refusal is not None:
                raise self._refusal
            self.begin()
            self._look()
        self.begin()  # the others need not wait until this answer is recorded
        del self._tasks[name]
        if task.error is not None:
            raise task.error
        replies = task.replies.values()
        return Answers(
            tuple(reply.answered for reply in replies),
            max(reply.merge for reply in replies),
            max(reply.evaluate for reply in replies),
        )

    def _add(self, task: _Task) -> None:
        self._tasks[task.name] = task
        self._waiting.append(task)

    # ---- giving

    def begin(self) -> None:
        """As `Engine.begin`; workers that are missing are started."""
        if self._bar is None:
            desc = "workers that have started"
            self._bar = tqdm(desc=desc, total=self.size, unit="worker", leave=False, disable=None)
        for place in self._places:
            if place.future is not None:
                continue
            if place.handle is None:
                place.handle = place.start()
                place.holds.clear()
                self._begin(place, place.handle.admit(), None)
            elif share := self._next():
                self._begin(place, place.handle.answer(self._request(place, *share)), share)

    def _begin(self, place: _Place, future: Future[Any], share: tuple[_Task, int] | None) -> None:
        place.future, place.share, place.since = future, share, time.monotonic()
        place.told = False

    def _next(self) -> tuple[_Task, int] | None:
        """The next share; evaluations that are fewer than the workers are cut for all of these."""
        while not self._queue and self._waiting:
            count = max(1, self.size // len(self._waiting))
            task = self._waiting.popleft()
            task.shares = task.evaluator.lm.portions(count)
            self._queue.extend((task, number) for number in range(len(task.shares)))
        while self._queue:
            task, number = self._queue.popleft()
            if task.error is None:
                return task, number
        return None

    def _request(self, place: _Place, task: _Task, number: int) -> Request:
        fingerprint, frozen = task.evaluator.fingerprint, b""
        if fingerprint not in place.holds:
            if fingerprint not in self._frozen:
                self._frozen[fingerprint] = pickle.dumps(task.evaluator.lm.freeze())
            frozen = self._frozen[fingerprint]
            place.holds.add(fingerprint)
        mixture = task.mixture
        about = (mixture.sources(), mixture.lam, mixture.where, task.shares[number])
        return Request(fingerprint, *about, frozen)

    # ---- looking

    def _look(self) -> None:
        """Wait until a worker has something to say, and take it."""
        busy = [place.future for place in self._places if place.future is not None]
        wait(busy, timeout=GLANCE, return_when=FIRST_COMPLETED)
        finished = []
        for place in [*self._places]:
            if place.future is None:
                continue
            waited = time.monotonic() - place.since
            if place.future.done():
                finished += self._take(place, place.future)
            elif waited > self._patience:
                self._time_out(place)
            elif place.share is None and waited > LONG and not place.told:
                place.told = True
                assert place.handle is not None
                logger.warning("%s has not started yet: %s", place.handle.words, place.handle.waits)
        for task in finished:
            self._hand_over(task)

    def _hand_over(self, task: _Task) -> None:
        """Let whoever expects an evaluation have it; an error is for whoever asks for it."""
        if task.arrived is None or not task.done or task.error is not None:
            return
        arrived, task.arrived = task.arrived, None  # its last two shares may come at once
        try:
            arrived()
        except SoupError as error:
            task.error = error
            self._tasks[task.name] = task  # `answer`, which `arrived` called, has dropped it

    def _take(self, place: _Place, future: Future[Any]) -> list[_Task]:
        """Take what a worker says; the evaluations that it may have finished."""
        assert place.handle is not None
        error = future.exception()
        if error is not None and (how := place.handle.loss(error)):
            self._lose(place, how, _MEMORY)
            return []
        share, place.future, place.share = place.share, None, None
        if share is None:
            try:
                if error is not None:
                    raise _translated(error, place.handle.words)
                self._admit(place.handle, future.result())
                place.failures = 0
                self._show_start()
            except SoupError as refusal:
                self._drop(place, refusal)
            return []
        task, number = share
        if error is None:
            task.replies[number] = future.result()
        else:
            place.holds.discard(task.evaluator.fingerprint)  # it may not have understood them
            task.error = task.error or _translated(error, place.handle.words)
        return [task]

    def _show_start(self) -> None:
        """Count a worker on the progress bar, which is gone once all have started."""
        if self._bar is not None:
            self._bar.update()
            if self._bar.n >= self.size:
                self._bar.close()

    def _admit(self, handle: Handle, admission: Admission) -> None:
        """Refuse a worker whose answers may differ from the driver's.

        Raises:
            WorkerError: they may.
        """
        if self._expected is None:
            self._expected = self._own()
        if admission == self._expected:
            return
        ours, theirs = self._expected.environment, admission.environment
        odd = [f"{k} {theirs[k]} instead of {ours[k]}" for k in ours if theirs[k] != ours[k]]
        raise WorkerError(
            f"{handle.words} does not compute as this process does: "
            + (", ".join(odd) or "the same weights give other logits there"),
            where="--workers",
            fix="use machines with the same hardware and the same installed versions: other last "
            "digits of the scores would decide which λ is chosen",
        )

    def _drop(self, place: _Place, why: SoupError) -> None:
        """Do without a worker.

        Raises:
            SoupError: it was the last.
        """
        if place.handle is not None:
            place.handle.kill()
        self._places.remove(place)
        if not self._places:
            self._refusal = why
            raise why
        logger.warning("%s; the other workers go on without it", why.what)

    def _time_out(self, place: _Place) -> None:
        """Do without a worker that does not start, or give to another what it does not answer.

        Raises:
            WorkerError: no worker starts.
        """
        assert place.handle is not None
        minutes = f"{self._patience / 60:g} minutes (--worker-patience)"
        if place.share is None:
            refusal = WorkerError(
                f"{place.handle.words} has not started within {minutes}",
                where="--workers",
                fix=place.handle.waits,
            )
            self._drop(place, refusal)
        else:
            fix = "raise --worker-patience if an evaluation takes that long"
            self._lose(place, f"has not answered for {minutes}", fix)

    def _lose(self, place: _Place, why: str, fix: str) -> None:
        """Empty the place of a worker that is lost, and give what it did to another.

        Raises:
            WorkerError: no worker starts.
        """
        assert place.handle is not None
        words, share = place.handle.words, place.share
        place.handle.kill()
        place.handle = place.future = place.share = None
        if share is None:
            place.failures += 1
            if place.failures == STARTS:
                what = f"{words} {why} while it started, {STARTS} times"
                self._drop(place, WorkerError(what, where="--workers", fix=fix))
            return
        task, number = share
        task.deaths[number] = task.deaths.get(number, 0) + 1
        if task.error is None and task.deaths[number] < DEATHS:
            taken = "another takes over what it was doing, and a new one starts"
            logger.warning("%s %s; %s", words, why, taken)
            self._queue.appendleft(share)
        elif task.error is None:
            lam = ", ".join(f"{weight:g}" for weight in task.mixture.lam)
            task.error = WorkerError(
                f"{DEATHS} workers were lost while they scored λ = {lam}; the last {why}",
                where=f"{words}; {', '.join(one.label for one in task.mixture.checkpoints)}",
                fix=fix,
            )


def _translated(error: BaseException, words: str) -> SoupError:
    """An error of a worker, as this package words it; without the stack of another process."""
    if isinstance(error, SoupError):
        return error
    return WorkerError(
        f"a worker failed: {brief(error)}",
        where=words,
        fix="run the same command again; without --workers, to see where it fails",
    )
