import os
import time

import pytest

from mlflow_soup import errors
from mlflow_soup.records import Items, Score
from mlflow_soup.registry import journal, scores
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.scores import Scores

ITEMS = Items("a", "acc,none", 1.0, ("x", "y"), (1.0, 0.0), (0.5, 0.5), ((-1.5, -2.25), (-0.1,)))
SCORES = Scores({"": Score(0.5, 0.1, (ITEMS,))}, {"seconds/evaluate": 2.0})


@pytest.fixture
def kept(tmp_path) -> Journal:
    one = Journal(tmp_path / "journal")
    one.open()
    return one


def never():
    raise AssertionError("it was evaluated again")


def test_an_evaluation_is_not_repeated_until_its_entry_is_dropped(kept):
    assert kept.recall("k", lambda: SCORES) == SCORES
    assert Journal(kept.folder).recall("k", never) == SCORES
    kept.drop("k")
    assert kept.read("k") is None
    kept.drop("k")  # a second time does no harm


def test_a_damaged_entry_is_not_read(kept):
    kept.recall("k", lambda: SCORES)
    (file,) = kept.folder.iterdir()
    content = bytearray(file.read_bytes())
    for at in range(4, len(content), 7):
        spoilt = bytearray(content)
        spoilt[at] ^= 0xFF
        file.write_bytes(spoilt)
        assert kept.read("k") in (None, SCORES)
    file.write_bytes(content[: len(content) // 2])
    assert kept.read("k") is None
    assert kept.recall("k", lambda: SCORES) == SCORES


def test_an_evaluation_that_fails_leaves_nothing(kept):
    def fail():
        raise errors.NonFiniteError("not finite", where="here", fix="none")

    with pytest.raises(errors.NonFiniteError):
        kept.recall("k", fail)
    assert list(kept.folder.iterdir()) == []


def test_free_space_is_checked_before_anything_is_evaluated(kept, monkeypatch):
    monkeypatch.setattr(journal, "ROOM", 1 << 62)
    with pytest.raises(errors.StoreError, match="MB are needed") as caught:
        kept.recall("k", never)
    assert caught.value.exit_code == 6


def test_a_full_disk_is_reported_with_its_folder(mount):
    full = mount("tmpfs", "size=16k,nr_inodes=3")
    for i in range(2):
        (full / str(i)).touch()
    with pytest.raises(errors.StoreError, match="cannot be written"):
        Journal(full / "journal").open()


def test_old_entries_are_deleted(kept, monkeypatch):
    kept.recall("old", lambda: SCORES)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100 * 24 * 3600)
    kept.open()
    assert kept.read("old") is None


@pytest.mark.parametrize("spoil", ["pipe", "link", "folder", "device"])
def test_an_entry_that_others_made_is_not_waited_for_or_followed(kept, tmp_path, spoil):
    path = kept.folder / "k.parquet"
    scores.write(SCORES, tmp_path / "elsewhere")
    if spoil == "pipe":
        os.mkfifo(path)
    elif spoil == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere" if spoil == "link" else "/dev/zero")
    assert kept.read("k") is None
