"""One request at a time in a process, and nothing of its owner's autologging in our runs."""

import contextlib
import threading
from collections.abc import Iterator

from mlflow.utils import autologging_utils  # private door

_TURN = threading.RLock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread works on a request, and pause autologging; also a decorator.

    Both belong to the process: the active experiment of MLflow, the environment, the random numbers
    and streams of the libraries, and MLflow's switch for autologging, which holds for all threads.
    """
    with _TURN:
        paused = autologging_utils._AUTOLOGGING_GLOBALLY_DISABLED
        autologging_utils._AUTOLOGGING_GLOBALLY_DISABLED = True
        try:
            yield
        finally:
            autologging_utils._AUTOLOGGING_GLOBALLY_DISABLED = paused
