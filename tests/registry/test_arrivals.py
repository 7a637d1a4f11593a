"""Which versions have arrived, and what is known of those that were handled."""

import pytest

from conftest import MODEL, register
from mlflow_soup.registry import arrivals
from mlflow_soup.registry.arrivals import Progress


def test_checkpoints_are_the_versions_that_are_no_soups(client, checkpoints):
    assert arrivals.checkpoints(client, MODEL) == [1, 2, 3]
    client.set_model_version_tag(MODEL, "2", "soup.digest", "forged")
    for _ in range(8):
        register(client, checkpoints[0])
    assert arrivals.checkpoints(client, MODEL) == [1, *range(3, 12)]
    assert arrivals.checkpoints(client, MODEL, above=2, until=10) == list(range(3, 11))
    assert arrivals.checkpoints(client, MODEL, above=11) == []


def test_no_number_is_given_twice(client, checkpoints):
    client.delete_model_version(MODEL, "3")
    assert register(client, checkpoints[0]) == 4


def test_progress_is_read_as_it_was_written(client):
    path = arrivals.progress_file(arrivals.watched(client, MODEL))
    assert arrivals.read(path) is None
    progress = Progress(3, 4, ("run --last 2 'λ'",), 2)
    arrivals.write(path, progress)
    assert arrivals.read(path) == progress


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"handled": "9", "done": []}', '{"handled": 9, "more": 1}']
)
def test_damaged_progress_is_told_and_passed_over(tmp_path, caplog, text):
    path = tmp_path / "progress.json"
    path.write_text(text)
    assert arrivals.read(path) is None
    assert "is passed over" in caplog.text


def test_a_model_that_is_made_again_has_a_progress_of_its_own(client):
    before = arrivals.progress_file(arrivals.watched(client, MODEL))
    client.delete_registered_model(MODEL)
    client.create_registered_model(MODEL)
    assert arrivals.progress_file(arrivals.watched(client, MODEL)) != before
