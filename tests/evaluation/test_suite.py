import json
import os

import pytest
import yaml

from mlflow_soup import errors
from mlflow_soup.evaluation import suite
from mlflow_soup.evaluation.suite import load_suite

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
        ("a/b", "'a/b' is not an lm-eval task", "task:metric"),
        ("toy_f1", "is not a sum over items", "averaged over items"),
    ],
)
def test_wrong_task_names_are_answered_with_near_ones(tasks, tmp_path, text, what, fix):
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "toy_f1"}
    config["metric_list"] = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
    (tmp_path / "f1.yaml").write_text(yaml.safe_dump(config))
    letters = yaml.safe_load((tasks / "letters.yaml").read_text())
    for name, change in (
        ("toy_split", {"validation_split": "nowhere"}),
        ("toy_unsafe", {"unsafe_code": True}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(letters | {"task": name} | change))
    with pytest.raises(errors.SpecError) as caught:
        load_suite(text, include_path=os.pathsep.join([str(tasks), str(tmp_path)]))
    assert what in caught.value.what
    assert fix in caught.value.fix


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
