import os
import threading

import mlflow
import pytest

import forked
from conftest import MODEL
from mlflow_soup import errors
from mlflow_soup.registry import ledger
from mlflow_soup.registry.ledger import find_ledger, open_ledger
from mlflow_soup.registry.store import Store


def test_entries_are_read_as_they_were_written(client):
    book = open_ledger(client, MODEL)
    assert book.read("a") == []
    assert book.append("a", 1, {"to": 4, "by": "me"})
    assert book.append("a", 2, {"to": 5, "by": "you"})
    assert book.append("a/b c", 1, {"to": 1})
    assert [entry.told["to"] for entry in book.read("a")] == [4, 5]
    assert book.series("a") == ["a", "a/b c"]
    book.mark("a", 2, "made")
    book.mark("a", 2, "void")
    assert [entry.mark for entry in book.read("a")] == ["", "void"]
    assert open_ledger(Store(), MODEL).read("a") == book.read("a")


def test_an_entry_is_written_once(client):
    book = open_ledger(client, MODEL)
    assert book.append("a", 1, {"by": "me"})
    assert not book.append("a", 1, {"by": "you"})
    assert book.append("a", 1, {"by": "me"})  # the answer to the first may have been lost
    assert [entry.told for entry in book.read("a")] == [{"by": "me"}]


def test_text_that_is_not_ours_is_shown(client):
    book = open_ledger(client, MODEL)
    client.log_param(book.run_id, "a/00001", "not json")
    client.log_param(book.run_id, "a/x", "no number")
    assert [entry.told for entry in book.read("a")] == [{"unreadable": "not json"}]


def test_looking_makes_no_ledger(client):
    before = len(client.search_experiments())
    assert find_ledger(client, MODEL) is None
    assert len(client.search_experiments()) == before


def test_the_error_about_a_deleted_ledger_says_how_to_restore_it(client):
    book = open_ledger(client, MODEL)
    experiment = client.get_run(book.run_id).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(errors.RegistryError, match="was deleted") as caught:
        open_ledger(client, MODEL)
    assert f"mlflow experiments restore --experiment-id {experiment}" in caught.value.fix
    client.restore_experiment(experiment)
    assert open_ledger(client, MODEL) == book


def race(client, count, work):
    """Run `work(i)` in several threads at once; return their results."""
    barrier, found = threading.Barrier(count), [None] * count

    def one(i):
        barrier.wait()
        found[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("store", ["client", "server_client"])
def test_of_several_at_once_one_makes_the_ledger_and_one_writes_each_entry(request, store):
    client = request.getfixturevalue(store)
    books = race(client, 4, lambda i: open_ledger(Store(30.0), "raced"))
    assert len({book.run_id for book in books}) == 1
    active = [e.name for e in client.search_experiments() if "raced" in e.name]
    assert active == ["soup-ledger/raced"]
    assert ledger.leftovers(client, "raced") == []
    for number in range(1, 6):
        won = race(client, 4, lambda i, n=number: books[i].append("a", n, {"by": i}))
        assert sum(won) == 1
        assert books[0].read("a")[-1].told == {"by": won.index(True)}
    assert [entry.number for entry in books[0].read("a")] == [1, 2, 3, 4, 5]


def _make_a_ledger(uri, barrier, made):
    mlflow.set_tracking_uri(uri)
    client = Store(30.0)
    client.search_experiments(max_results=1)
    barrier.wait(60)
    made.put(open_ledger(client, MODEL).run_id)


def test_of_several_processes_one_makes_the_ledger(client):
    barrier, made = forked.context.Barrier(3), forked.context.Queue()
    args = (os.environ["MLFLOW_TRACKING_URI"], barrier, made)
    processes = [forked.warm().Process(target=_make_a_ledger, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    found = {made.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert found == {open_ledger(client, MODEL).run_id}
