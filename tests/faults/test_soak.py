"""A thousand trials whose scores cost nothing: memory, files and time must not grow with them."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking._tracking_service import utils

import checker
import episodes
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.records import Items, Metric, Score
from mlflow_soup.workflows import trials

TRIALS = 1000


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trivialise(file):
    """Scores out of thin air; a line for each trial: memory, open files, seconds for the store."""
    chance = np.random.default_rng(0)

    def evaluate(self, *parts):
        value = float(chance.random())
        items = Items("toy", "acc,none", 1.0, ("a", "b"), (value, value), (0.5, 0.5), ((), ()))
        return (
            ("toy", Score(value, 0.1, (items,), (Metric("toy", "acc,none", value, 0.1, True),))),
        )

    Evaluator.evaluate = evaluate
    evaluated, told = trials._evaluate, trials._Outbox.flush
    seconds = [0.0]

    def timed(function):
        def call(*args, **kwargs):
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[0] += time.monotonic() - began

        return call

    def flush(self, *, patiently):
        # MLflow remembers as many runs, and forgets the oldest from then on
        while len(utils._artifact_repos_cache) < 1025:
            number = str(len(utils._artifact_repos_cache))
            utils._artifact_repos_cache[number] = get_artifact_repository(str(Path.cwd()))
        timed(told)(self, patiently=patiently)
        line = [resident(), len(os.listdir("/proc/self/fd")), seconds[0]]
        file.write(json.dumps(line) + "\n")
        seconds[0] = 0.0

    trials._Outbox.flush = flush
    # looking for what is known, writing the journal and reading it
    trials._evaluate = timed(evaluated)


@pytest.mark.slow
def test_a_thousand_trials_cost_no_more_at_their_end_than_at_their_beginning(prepared, figures):
    with episodes.swept(prepared.database.parent / "soak") as root:
        place = episodes.make_place(prepared, root)
        lines = place.root / "trials.txt"
        command = [*prepared.request, "--method=random", f"--trials={TRIALS}", "--promote="]
        began = time.monotonic()
        process = episodes.start(place, command, lambda: trivialise(lines.open("w", 1)))
        code = episodes.finish(process, 1800.0)
        seconds = time.monotonic() - began
        assert code in (0, 3), place.said()  # the gate has nothing to judge by
        assert checker.problems(place.database) == []
        left = checker.look(place.database)
        told = np.array([json.loads(line) for line in lines.read_text().splitlines()])
    memory, files, store = told[:TRIALS].T
    # from the hundredth on: caches are filled by then
    slope = np.polyfit(np.arange(100, TRIALS), memory[100:], 1)[0]
    first, last = (np.median(part) for part in (store[100:200], store[-100:]))
    figures["soak"] = {
        "trials": len(left.trials),
        "seconds": round(seconds),
        "memory growth in bytes per trial": round(slope),
        "memory after 100 and all trials in MB": [round(memory[i] / 1e6) for i in (100, -1)],
        "open files after 100 and all trials": [int(files[100]), int(files[-1])],
        "store milliseconds per trial, 2nd and last hundred": [
            round(1000 * first, 1),
            round(1000 * last, 1),
        ],
    }
    assert len(left.trials) == TRIALS
    assert slope < 10_000  # what a trial leaves in the history that the next is asked from
    assert files[-1] <= files[100] + 1  # the thread that keeps the lease has its own connection
    assert last < 1.5 * first
