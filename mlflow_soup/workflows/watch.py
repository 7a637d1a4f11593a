"""Do what the registry's policy says when a checkpoint arrives.

look → [ wait ] → for each checkpoint, by number: for each line of the tag: do it → note it

Each checkpoint is handled, in the order of the version numbers, also if several arrived while one
was worked on: `--last 2` are then the two newest versions at the number that is handled, and not
those that came after it. So the result does not depend on when the watch looked. The lines are
those that the tag holds when the work on a version begins.

A line that fails is told, and the next one is done. Only two things hold the order up, because
nobody should have to register checkpoints again: a tag that cannot be followed, until somebody
mends it; and a store that is away. If only one version's files are away, it is given up after
`MOST_TRIES`; so is a version on which the process dies again and again.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlflow_soup.errors import SoupError, SpecError, StoreError
from mlflow_soup.redaction import redact_line, redacting
from mlflow_soup.registry import arrivals, lease, naming, tracking, webhooks
from mlflow_soup.registry.arrivals import Progress
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.store import Store, connect
from mlflow_soup.registry.versions import find_model, find_registered, resolve
from mlflow_soup.request.names import parse_version
from mlflow_soup.request.orders import Order
from mlflow_soup.request.spec import Spec
from mlflow_soup.workflows.run import check_promotion, run
from mlflow_soup.workflows.track import track

logger = logging.getLogger("mlflow_soup")
# the text of the tag, and the model → its lines, checked
Reader = Callable[[str, str], Sequence[Order]]
# what one line did, in words, and its exit code
Done = tuple[str, int]
MOST_TRIES = 5  # of a line whose files are away, or that ends the process
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 900.0  # after a store that was away
_MOST_SAID = 1000  # warnings that are remembered
_SAID_EACH_TIME = {"watch", "store", "lease", "webhooks"}  # modules
_GAP_S = 0.2  # between two looks: deliveries come in bursts


def _run(spec: Spec) -> Done:
    """The main job, and its outcome in a line."""
    outcome = run(spec)
    soup = outcome.soup
    words = [soup.version.uri if soup.registered else f"no soup is better than {soup.version}"]
    if outcome.verdict is not None:
        words.append(f"gate {'passed' if outcome.verdict.passed else 'REFUSED'}")
    if outcome.promoted:
        words.append(f"promoted: {outcome.promoted}")
    elif outcome.target:
        words.append(f"nothing was promoted to {outcome.target}")
    return ", ".join(words), outcome.exit_code


def _track(spec: Spec) -> Done:
    """The curves of the run, and what the newest point says."""
    result = track(spec).result
    return " ".join(result.notes[1:2]) or result.title, 0


# a command of `request.orders.COMMANDS` → what it does
ACTIONS: Mapping[str, Callable[[Spec], Done]] = {"run": _run, "track": _track}


@redacting()
def watch(
    spec: Spec,
    read: Reader,
    say: Callable[[str], None],
    *,
    poll_s: float = 30.0,
    listen: str = "",
    since: str = "",
    once: bool = False,
) -> int:
    """Handle each checkpoint that arrives, until a signal ends the process.

    One process at a time watches a model; another one waits for it. At the first start, the newest
    checkpoint that is there is handled, too.

    Args:
        spec: the model, and the knobs that the tag cannot set.
        read: reads the tag's text; raises a SpecError if it cannot be followed.
        say: prints a line for each version and line of the tag.
        poll_s: seconds between two looks at the registry.
        listen: HOST:PORT on which MLflow's webhooks wake the process; empty for polling alone.
        since: the version to begin with at the first start; empty for the newest.
        once: handle what is there, and return.

    Returns:
        The first exit code of a line that is not 0; 0 if there is none.

    Raises:
        SpecError: the request, or the tag at the start, is wrong; nothing was touched.
        ParentError: there is no such model, or it is gone.
        OvertakenError: another process took over.
        StoreError: the store does not answer at the start, or with `once`.
    """
    os.environ.pop(tracking.RUN_ENV, None)  # that of `mlflow run` is not the run of a search
    if not 0.05 <= poll_s <= 86_400.0:
        raise SpecError(
            f"--poll {poll_s:g} is out of range",
            where="--poll",
            fix="give the seconds between two looks, from 0.05 to 86400",
        )
    secret = webhooks.secret_of_environment() if listen else b""
    client = connect(60.0 * spec.store_patience)
    name = find_model(client, spec.model, [])
    text = arrivals.watched(client, name).tags.get(naming.ON_VERSION, "")
    own = {knob: getattr(spec, knob) for knob in spec.named} | {"model": name}
    for order in read(text, name):
        if order.command == "run":
            check_promotion(order.spec(own, 1))
    first = resolve(client, name, parse_version(since, "--since")).number if since else 0
    wake = threading.Event()

    def tell(words: str) -> None:
        say(redact_line(words))

    key = naming.key_of({"watch": name})
    with contextlib.ExitStack() as stack:
        stack.enter_context(_saying_once())
        check = stack.enter_context(lease.hold(client, name, key, lease_folder()))
        watcher = _Watcher(client, name, own, read, tell, check, first)
        if listen:
            place = stack.enter_context(webhooks.listening(listen, secret, wake.set))
            tell(f"{name}: listening on {place}")
        if not once:
            tell(f"{name}: watched; {naming.ON_VERSION}: {' '.join(text.split())}")
        pause_s = _FIRST_PAUSE_S
        while True:
            wake.clear()
            wait_s = poll_s
            try:
                watcher.work_off(patient=not once)
                pause_s = _FIRST_PAUSE_S
            except StoreError as error:
                if once:
                    raise
                wait_s = max(poll_s, pause_s)
                logger.warning("%s; the watch goes on in %.0f s", one_line(error), wait_s)
                pause_s = min(2.0 * pause_s, _LONGEST_PAUSE_S)
            if once:
                return watcher.code
            wake.wait(wait_s)
            time.sleep(_GAP_S)


@contextlib.contextmanager
def _saying_once() -> Iterator[None]:
    """Leave out warnings that were said before: `run` tells the gate's power at each version.

    What the watch itself says is said each time, and so is what is said of stores and leases.
    """
    said = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        words = record.getMessage()
        if record.module in _SAID_EACH_TIME:
            return True
        if len(said) >= _MOST_SAID:
            said.clear()
        new = words not in said
        said.add(words)
        return new

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def one_line(error: SoupError) -> str:
    """What an error says, in one line."""
    what = "; ".join(line.strip() for line in error.what.splitlines() if line.strip())
    return f"{what} (where: {error.where}; fix: {error.fix})"


@dataclass
class _Watcher:
    """What a watch knows while it runs.

    Attributes:
        client: the store's client.
        name: the registered model.
        own: the knobs of the command line, and the model.
        read: reads the tag.
        say: prints a line.
        check: raises if another process took over.
        first: the version to begin with at the first start; 0 for the newest.
        code: the first exit code of a line that is not 0.
        told: the text of the tag that could not be followed, and was told.
    """

    client: Store
    name: str
    own: Mapping[str, object]
    read: Reader
    say: Callable[[str], None]
    check: Callable[[], None]
    first: int
    code: int = 0
    told: str = ""

    def work_off(self, *, patient: bool) -> None:
        """Handle all checkpoints that are waiting.

        Args:
            patient: whether a tag that cannot be followed is waited for.
        """
        while self._handle_next(patient):
            pass

    def _handle_next(self, patient: bool) -> bool:
        """Handle the oldest checkpoint that is waiting; False if there is none."""
        self.check()
        model = arrivals.watched(self.client, self.name)
        path = arrivals.progress_file(model)
        progress = arrivals.read(path)
        if progress is None:
            progress = Progress(self._before_first())
            arrivals.write(path, progress)
        waiting = arrivals.checkpoints(self.client, self.name, above=progress.handled)
        if not waiting:
            return False
        number = waiting[0]
        if progress.version != number:
            progress = Progress(progress.handled, number)
        # read after the version was seen: a tag that was set before it holds for it
        text = arrivals.watched(self.client, self.name).tags.get(naming.ON_VERSION, "")
        if not text.strip():
            self._tell(number, f"there is no tag {naming.ON_VERSION}, so nothing is done")
        else:
            try:
                lines = self.read(text, self.name)
            except SpecError as error:
                if not patient:
                    raise
                if text != self.told:
                    self._tell(number, f"waits: {one_line(error)}")
                self.told = text
                return False
            self.told = ""
            for order in lines:
                if order.line not in progress.done:
                    self._do(order, number, lambda p: arrivals.write(path, p), progress)
                    progress = replace(progress, done=(*progress.done, order.line), tries=0)
                    arrivals.write(path, progress)
        arrivals.write(path, Progress(number))
        return True

    def _before_first(self) -> int:
        """The number before the first version that is handled here."""
        if self.first:
            return self.first - 1
        there = arrivals.checkpoints(self.client, self.name)
        return there[-1] - 1 if there else 0

    def _tell(self, number: int, words: str) -> None:
        self.say(f"{self.name} v{number}: {words}")

    def _do(
        self, order: Order, number: int, note: Callable[[Progress], None], progress: Progress
    ) -> None:
        """Do one line for a version, and tell what came of it.

        Args:
            order: the line.
            number: the version.
            note: writes the progress.
            progress: that before this line.
        """
        if progress.tries >= MOST_TRIES:
            self._tell(number, f"{order.line}: given up after {progress.tries} tries")
            self.code = self.code or 1
            return
        note(replace(progress, tries=progress.tries + 1))
        try:
            words, code = self._act(order, number)
        except StoreError:
            if not self._answers():
                note(progress)
            raise
        except SoupError as error:
            words, code = f"failed ({error.exit_code}): {one_line(error)}", error.exit_code
        except BaseException as stop:
            if not isinstance(stop, Exception):  # a signal is no failure of the version
                note(progress)
            raise
        self._tell(number, f"{order.line}: {words}")
        self.code = self.code or code

    def _act(self, order: Order, number: int) -> Done:
        """What a line says, for a version."""
        versions: list[int] = []
        if order.last:
            versions = arrivals.checkpoints(self.client, self.name, until=number)[-order.last :]
            if versions[-1:] != [number]:
                return "nothing is done: somebody has deleted the version", 0
            if len(versions) < order.last:
                return f"nothing is done yet: there are {len(versions)} checkpoints", 0
        return ACTIONS[order.command](order.spec(self.own, number, versions))

    def _answers(self) -> bool:
        """Whether the registry answers: then only the files of a version are away, or a disk."""
        try:
            find_registered(self.client.hasty, self.name)
        except StoreError:
            return False
        return True
