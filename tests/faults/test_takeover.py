"""Searches that are stopped, paused, or begun twice at once."""

import os
import signal
import time
from functools import partial

import pytest

import checker
import episodes
from mlflow_soup.registry import lease

pytestmark = pytest.mark.slow


def hurry():
    """Waiting in seconds, where users wait for minutes."""
    lease.BEAT_S, lease.GRACE_S, lease.LOOK_S = 0.3, 3.0, 0.3


def statuses(place, role):
    with checker.Database(place.database) as database:
        return [
            status
            for (status,) in database.rows(
                "SELECT status FROM runs JOIN tags USING (run_uuid) "
                "WHERE key = 'soup.role' AND value = ? ORDER BY start_time",
                role,
            )
        ]


@pytest.mark.parametrize("begun", [2, 5])
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_search_that_is_told_to_stop_ends_its_runs_and_says_so(
    place, prepared, expected, how, code, begun
):
    process = episodes.start(place, prepared.request, partial(episodes.slow, 1.0))
    episodes.wait_for(place, begun)
    time.sleep(0.3)
    os.kill(process.pid, how)
    assert episodes.finish(process) == code, place.said()
    assert statuses(place, "search") == ["KILLED"]
    assert "RUNNING" not in statuses(place, "trial") + statuses(place, "ood")
    assert "same command" in place.said()
    assert "Traceback" not in place.said()
    assert episodes.run(place, prepared.request) == 0, place.said()
    assert statuses(place, "search") == ["FINISHED"]
    assert checker.problems(place.database, expected) == []
    assert place.repeated() <= 1


def elsewhere(place):
    """The same store, as another machine sees it."""
    cache = place.root / "cache of another machine"
    return {"MLFLOW_SOUP_CACHE": str(cache)}


@pytest.mark.parametrize("machines", [1, 2])
def test_of_two_same_searches_at_once_one_waits_and_says_so(
    place, prepared, expected, figures, machines
):
    first = episodes.start(place, prepared.request, hurry, partial(episodes.slow, 0.7))
    episodes.wait_for(place, 1)
    environment = elsewhere(place) if machines == 2 else {}
    second = episodes.start(place, prepared.request, hurry, environment=environment)
    codes = [episodes.finish(first), episodes.finish(second)]
    figures[f"two same searches at once, machines: {machines}"] = {
        "exit codes": codes,
        "repeated evaluations": place.repeated(),
    }
    assert codes == [0, 0], place.said()
    assert "this process waits" in place.said()
    assert checker.problems(place.database, expected) == []
    assert place.repeated() == 0


@pytest.mark.parametrize("begun", [2, 4, 5, 7])
def test_who_was_paused_finds_that_another_took_over(place, prepared, expected, figures, begun):
    """Paused in a trial, in the last of them, and in the examination of soup and parents."""
    paused = episodes.start(place, prepared.request, hurry, partial(episodes.slow, 2.0))
    episodes.wait_for(place, begun)
    time.sleep(0.5)
    episodes.pause(paused, place)
    other = episodes.start(place, prepared.request, hurry, environment=elsewhere(place))
    try:
        codes = [episodes.finish(other)]
        after_takeover = checker.problems(place.database, expected)
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    codes.append(episodes.finish(paused))
    figures[f"paused in evaluation {begun}"] = {
        "exit codes": codes,
        "repeated evaluations": place.repeated(),
    }
    assert codes[0] == 0, place.said()
    assert "gave no sign of life" in place.said()
    assert codes[1] == 5, place.said()
    assert statuses(place, "search") == ["FINISHED"]  # it was theirs both
    assert after_takeover == []
    assert checker.problems(place.database, expected) == []
    # an examination is told to MLflow as a whole: on another machine it is begun anew
    assert place.repeated() <= max(1, begun - 4)
