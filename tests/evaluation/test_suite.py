import json
import os
import shutil
from functools import partial

import pytest
import yaml

import toy
from mlflow_soup import errors
from mlflow_soup.evaluation import suite
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.evaluation.task_folders import digest

PAPER = {
    "ceval-valid": "ceval/ceval-exam",
    "cmmlu": "lmlmcat/cmmlu",
    "mmlu": "cais/mmlu",
    "gsm8k": "openai/gsm8k",
    "piqa": "baber/piqa",
    "winogrande": "winogrande",
    "sciq": "allenai/sciq",
    "arc_easy": "allenai/ai2_arc",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_benchmarks_resolve_and_name_the_dataset_they_cannot_reach(name):
    manager = suite._open_manager([name], [], "here")
    assert name in manager.task_index
    with pytest.raises(errors.ObjectiveError) as caught:
        load_suite(name)
    assert PAPER[name].split("/")[-1] in caught.value.what


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("toy_letters", ["toy_letters:acc"]),
        ("toy_letters:acc_norm", ["toy_letters:acc_norm"]),
        ("toy_letters:acc,none", ["toy_letters:acc"]),
        ("toy_letters:acc,toy_digits", ["toy_letters:acc", "toy_digits:acc"]),
        (
            "toy_letters toy_digits_bpb:bits_per_byte",
            ["toy_letters:acc", "toy_digits_bpb:bits_per_byte"],
        ),
        ("toy_all", ["toy_all:acc"]),
        ("toy_d*s,toy_spelling", ["toy_digits:acc", "toy_spelling:exact_match,strict"]),
        ("toy_[dl]*s:acc_norm", ["toy_digits:acc_norm", "toy_letters:acc_norm"]),
        ("toy_digits:acc,toy_l*s", ["toy_digits:acc", "toy_letters:acc"]),
    ],
)
def test_tasks_are_named_as_lm_eval_names_them(tasks, text, terms):
    assert [str(t) for t in load_suite(text, include_path=str(tasks)).terms] == terms


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("toy_lettres", "no task 'toy_lettres'", "did you mean toy_letters"),
        ("toy_letters:accc", "no metric 'accc'", "did you mean acc"),
        ("toy_letters:acc,non", "'non' is neither an lm-eval task nor a filter", "a filter: none"),
        ("toy_all,toy_digits", "Duplicate task", "by itself or by a group"),
        ("toy_letters,toy_letters:acc", "named twice", "name each task once"),
        ("toy_split", "task toy_split could not be loaded: KeyError", "--model dummy"),
        ("toy_unsafe", "runs code", "sandbox"),
        ("a/b", "no task 'a/b'", "--include-path FOLDER"),
        ("a:b:c", "'a:b:c' is not an lm-eval task", "task:metric"),
        ("toy_*x", "no task 'toy_*x'", "check the name"),
        ("gone/*.yaml", "no task file gone/*.yaml", "a relative path starts in the folder"),
        ("toy_f1", "is not a sum over items", "averaged over items"),
    ],
)
def test_wrong_task_names_are_answered_with_near_ones(tasks, tmp_path, text, what, fix):
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "toy_f1"}
    config["metric_list"] = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    toy.write_task(tmp_path / "f1.yaml", config)
    letters = yaml.safe_load((tasks / "letters.yaml").read_text())
    for name, change in (
        ("toy_split", {"validation_split": "nowhere"}),
        ("toy_unsafe", {"unsafe_code": True}),
    ):
        toy.write_task(tmp_path / f"{name}.yaml", letters | {"task": name} | change)
    with pytest.raises(errors.SpecError) as caught:
        load_suite(text, include_path=os.pathsep.join([str(tasks), str(tmp_path)]))
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_tasks_are_named_by_their_yaml_files_as_for_lm_eval(tasks, tmp_path, monkeypatch):
    terms = [str(term) for term in load_suite(str(tasks / "letters.yaml")).terms]
    assert terms == ["toy_letters:acc"]
    both = load_suite(f"{tasks}/[dl]*s.yaml:acc_norm")
    assert {str(term) for term in both.terms} == {"toy_digits:acc_norm", "toy_letters:acc_norm"}
    monkeypatch.chdir(tasks.parent)
    relative = load_suite(f"{tasks.name}/letters.yaml")
    assert relative.documents() == load_suite("toy_letters", include_path=str(tasks)).documents()
    after_a_metric = load_suite(f"{tasks}/digits.yaml:acc_norm,{tasks}/letters.yaml")
    assert [str(term) for term in after_a_metric.terms] == [
        "toy_digits:acc_norm",
        "toy_letters:acc",
    ]
    (tmp_path / "base.yaml").write_text("dataset_path: json\n")
    with pytest.raises(errors.SpecError, match=r"base\.yaml defines no task: it has no key task"):
        load_suite(f"{tmp_path}/base.yaml")
    with pytest.raises(errors.SpecError, match="no task 'toy_digits'"):  # it is beside the file
        load_suite(f"{tasks}/letters.yaml,toy_digits")


def test_a_filter_after_a_pattern_is_that_of_all_its_tasks(tasks, tmp_path):
    spelling = yaml.safe_load((tasks / "spelling.yaml").read_text())
    for name in ("toy_first", "toy_second"):
        toy.write_task(tmp_path / f"{name}.yaml", spelling | {"task": name})
    suite = load_suite("toy_*[td]:exact_match,digits", include_path=str(tmp_path))
    terms = [str(term) for term in suite.terms]
    assert terms == ["toy_first:exact_match,digits", "toy_second:exact_match,digits"]


def test_relative_data_lie_beside_the_yaml_or_in_the_working_directory(
    tasks, tmp_path, monkeypatch
):
    config = yaml.safe_load((tasks / "letters.yaml").read_text())
    config["dataset_kwargs"] = {"data_files": {"validation": "data/letters.jsonl"}}
    folder, below = tmp_path / "mine", tmp_path / "mine" / "data"
    below.mkdir(parents=True)
    (folder / "letters.yaml").write_text(yaml.safe_dump(config))
    load = partial(load_suite, "toy_letters", include_path=str(folder))
    with pytest.raises(errors.SpecError, match=r"data/letters\.jsonl, which is not there") as gone:
        load()
    assert "put the file beside the YAML" in gone.value.fix
    assert "allow" not in gone.value.fix
    shutil.copy(tasks / "letters.jsonl", below)
    there = load().documents()
    assert there == load_suite("toy_letters", include_path=str(tasks)).documents()
    # with leave the folder is copied, and its data with it
    leave = digest(folder)
    assert load(allowed=[leave]).documents() == there
    (below / "letters.jsonl").rename(below / "validation.jsonl")
    (folder / "letters.yaml").write_text(
        yaml.safe_dump(config | {"dataset_kwargs": {"data_dir": "data"}})
    )
    assert {*load().documents()} == {*there}
    config["dataset_kwargs"] = {"data_files": {"validation": "mine/data/validation.jsonl"}}
    (folder / "letters.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)  # where lm-eval looks for it
    assert load().documents() == there


def test_a_task_in_two_folders_is_told(tasks, tmp_path, caplog):
    letters = yaml.safe_load((tasks / "letters.yaml").read_text())
    toy.write_task(tmp_path / "again.yaml", letters)
    path = os.pathsep.join([str(tasks), str(tmp_path)])
    load_suite("toy_letters", include_path=path)
    assert "toy_letters is in" in caplog.text
    assert "the last one counts" in caplog.text


def test_documents_are_told_apart_by_what_they_hold(tasks):
    letters = load_suite("toy_letters", include_path=str(tasks)).documents()
    digits = load_suite("toy_digits", include_path=str(tasks)).documents()
    lines = (tasks / "letters.jsonl").read_text().splitlines()
    assert len(letters) == len({json.dumps(json.loads(line)) for line in lines})
    assert not set(letters) & set(digits)


def test_a_yaml_that_lm_eval_skips_without_a_word_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: mine\n  oops: [")
    with pytest.raises(errors.SpecError) as caught:
        load_suite("mine", include_path=str(tmp_path))
    assert str(tmp_path / "broken.yaml") in caught.value.fix


def test_a_data_file_that_is_not_there_is_not_blamed_on_the_hub(tasks, tmp_path):
    config = yaml.safe_load((tasks / "letters.yaml").read_text())
    config["dataset_kwargs"]["data_files"]["validation"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(errors.ObjectiveError, match=r"gone\.jsonl") as caught:
        load_suite("toy_letters", include_path=str(tmp_path))
    assert "data_files" in caught.value.fix


@pytest.mark.parametrize("place", ["/proc/nowhere", "{}/file", "{}/file/below", "{}/dangling"])
def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_tasks(
    tasks, tmp_path, monkeypatch, place
):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("gone")
    cache = place.format(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with pytest.raises(errors.SpecError, match="cannot be written") as caught:
        load_suite("toy_letters", include_path=str(tasks))
    assert cache in caught.value.what
    assert "HF_HOME" in caught.value.where
    assert "data_files" not in caught.value.fix
