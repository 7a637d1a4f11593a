"""lm-eval's own tasks are those that `lm_eval` itself would run, for every name."""

from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager, _index

from mlflow_soup.errors import ObjectiveError
from mlflow_soup.evaluation import library
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.files.cache import CACHE_ENV


@pytest.fixture(scope="module")
def expected():
    return TaskManager().task_index


@pytest.fixture(scope="module", autouse=True)
def known_to_others():
    yield
    library.library()  # in the next test's cache, it would be made anew


@pytest.fixture(autouse=True)
def forgotten():
    library._index.cache_clear()
    yield
    library._index.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid(monkeypatch):
    def build(*_, **__):
        raise AssertionError("the library is indexed again")

    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", build)


def leaves(name, index, within=()):
    """The tasks that a name stands for, from the YAML of groups and the members of tags."""
    entry = index[name]
    if entry.kind.name == "TAG":
        members = sorted(entry.tags)
    elif entry.kind.name == "GROUP" and name not in within:
        members = entry.cfg.get("task") or []
    else:
        return {name}
    found = set()
    for member in [members] if isinstance(members, str) else members:
        named = member if isinstance(member, str) else member.get("group") or member.get("task")
        if isinstance(named, str) and named in index:
            found |= leaves(named, index, (*within, name))
        else:
            found.add(str(named))
    return found


def test_each_name_stands_for_the_tasks_that_lm_eval_runs(cache, expected, monkeypatch, capsys):
    monkeypatch.setattr(library, "TaskManager", lambda **k: made(expected, **k))
    library.library()  # keeps the index
    library._index.cache_clear()
    forbid(monkeypatch)
    monkeypatch.setattr(library, "TaskManager", TaskManager)
    found = library.library().task_index
    assert found.keys() == expected.keys()
    for name, entry in found.items():
        its = expected[name]
        assert (entry.kind, entry.tags) == (its.kind, its.tags)
        assert its.yaml_path == (entry.yaml_path and Path(entry.yaml_path))
        entry.cfg = its.cfg  # what its YAML says
    counted = 0
    for name in found:
        assert leaves(name, found) == leaves(name, expected)
        counted += len(leaves(name, found))
    with capsys.disabled():
        print(f"\n{len(found)} names of lm-eval stand for {counted} tasks")


def made(index, **options):
    manager = TaskManager(include_defaults=False)
    if options.get("include_defaults", True):
        manager.task_index.update(index)
    return manager


@pytest.mark.parametrize("content", ["", "[1]", '{"x": ["TASK"]}', '{"x": ["ODD", null, []]}'])
def test_a_damaged_index_is_made_again(cache, expected, monkeypatch, content):
    monkeypatch.setattr(library, "TaskManager", lambda **k: made(expected, **k))
    library.library()
    [kept] = (cache / "lm-eval").glob("*.json")
    whole = kept.read_bytes()
    kept.write_text(content)
    library._index.cache_clear()
    assert library.library().task_index.keys() == expected.keys()
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path, expected, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(library, "TaskManager", lambda **k: made(expected, **k))
    assert library.library().task_index.keys() == expected.keys()


def test_an_editable_installation_is_indexed_each_time(cache, monkeypatch):
    monkeypatch.setattr(library, "_installed", lambda: None)
    asked = []
    monkeypatch.setattr(library, "TaskManager", lambda **k: asked.append(k) or made({}, **k))
    library.library()
    assert {} in asked
    assert not (cache / "lm-eval").exists()


@pytest.mark.parametrize(
    "group", [{"task": ["arc_easy"]}, {"task": [{"task": "piqa", "num_fewshot": 1}, "arc_easy"]}]
)
def test_a_group_of_ones_own_has_tasks_of_lm_eval(tmp_path, group):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"group": "mine", **group}))
    with pytest.raises(ObjectiveError, match=r"ai2_arc|baber/piqa"):  # there is no Hub here
        load_suite("mine", include_path=str(tmp_path))


def test_a_group_whose_members_lie_in_other_folders_has_them():
    with pytest.raises(ObjectiveError, match="could not be loaded"):
        load_suite("spanish_bench")
