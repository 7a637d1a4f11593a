"""Items and metrics that no benchmark should have: lm-eval's own result, or one clear error."""

import json
import os

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mlflow_soup.decision import pairing
from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.find import find_checkpoint


@pytest.fixture(scope="module")
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


@pytest.fixture
def write(tasks, tmp_path):
    """Write the task `mine`: a shipped toy task with other items and fields."""

    def write(kind, rows, **fields):
        config = yaml.safe_load((tasks / f"{kind}.yaml").read_text()) | {"task": "mine"} | fields
        split = config.get("validation_split") or config["test_split"]
        config["dataset_kwargs"] = {"data_files": {split: "mine.jsonl"}}
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(kept))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def letters(tasks):
    return [json.loads(line) for line in (tasks / "letters.jsonl").read_text().splitlines()][:12]


def changed(rows, number, **fields):
    return [row | fields if at == number else row for at, row in enumerate(rows)]


def metrics(*named):
    return [{"metric": m, "aggregation": a, "higher_is_better": True} for m, a in named]


def theirs(live, folder, monkeypatch):
    monkeypatch.chdir(folder)  # lm-eval looks for relative data there only
    lm = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=32)
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    found = simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    return found["results"]["mine"]


SCORED = {
    "an empty question": ("letters", lambda rows: changed(rows, 0, question=""), {}, "acc"),
    "an empty choice": (
        "letters",
        lambda rows: changed(rows, 3, choices=["", *rows[3]["choices"][1:]]),
        {},
        "acc_norm",
    ),
    "one choice": (
        "letters",
        lambda rows: changed(rows, 3, choices=rows[3]["choices"][:1], answer=0),
        {},
        "acc",
    ),
    "equal choices": (
        "letters",
        lambda rows: changed(rows, 3, choices=rows[3]["choices"][:1] * 4),
        {},
        "acc",
    ),
    "a right answer that is no choice": (
        "letters",
        lambda rows: changed(rows, 3, answer=9),
        {},
        "acc",
    ),
    "equal items": ("letters", lambda rows: rows[:5] + rows[:5], {}, "acc"),
    "one item": ("letters", lambda rows: rows[:1], {}, "acc"),
    "an empty text": (
        "digits_bpb",
        lambda rows: [{"text": ""}, {"text": "kat kat"}],
        {},
        "bits_per_byte",
    ),
    "a text without words": (
        "digits_bpb",
        lambda rows: [{"text": " "}, {"text": "kat kat"}],
        {},
        "word_perplexity",
    ),
    "a metric that is no sum beside the one that is asked for": (
        "letters",
        lambda rows: rows,
        {"metric_list": metrics(("acc", "mean"), ("mcc", "matthews_corrcoef"))},
        "acc",
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_odd_items_score_what_lm_eval_gives(live, letters, write, monkeypatch, name):
    kind, change, fields, metric = SCORED[name]
    folder = write(kind, change(letters), **fields)
    score = Evaluator(live, load_suite(f"mine:{metric}", include_path=str(folder))).score()
    expected = theirs(live, folder, monkeypatch)[f"{metric},none"]
    assert score.metrics[0].value == pytest.approx(expected, rel=1e-9)
    assert not score.flaw
    assert pairing.paired(score, score).value == 0.0


REFUSED = {
    "no items": ("letters", lambda rows: [], {}, "task mine has no items"),
    "no texts": ("digits_bpb", lambda rows: [], {}, "task mine has no items"),
    "only empty texts": (
        "digits_bpb",
        lambda rows: [{"text": ""}] * 2,
        {},
        "task mine could not be scored: ZeroDivisionError",
    ),
    "no choices": (
        "letters",
        lambda rows: changed(rows, 3, choices=[]),
        {},
        "task mine could not be scored",
    ),
    "no choices of the first item": (
        "letters",
        lambda rows: changed(rows, 0, choices=[]),
        {},
        "task mine could not be loaded: IndexError",
    ),
    "a metric that fails beside the one that is asked for": (
        "letters",
        lambda rows: rows,
        {"metric_list": metrics(("acc", "mean"), ("f1", "f1"))},
        "task mine could not be scored: ValueError: Target is multiclass",
    ),
    "an aggregation that lm-eval does not have": (
        "letters",
        lambda rows: rows,
        {"metric_list": metrics(("acc", "luck"))},
        "is not a sum over items",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_lm_eval_cannot_score_is_refused_and_no_weights_are_blamed(live, letters, write, name):
    kind, change, fields, what = REFUSED[name]
    folder = write(kind, change(letters), **fields)
    with pytest.raises(SpecError, match=what) as refusal:
        Evaluator(live, load_suite("mine", include_path=str(folder))).score()
    words = str(refusal.value)
    assert "mine.yaml" in words or "metric" in words
    assert not {"λ", "--alpha", "parents", "weights"} & {*words.split()}


def test_of_several_tasks_the_one_that_fails_is_named(tasks, write):
    path = os.pathsep.join([str(tasks), str(write("letters", []))])
    with pytest.raises(SpecError, match=r"^task mine has no items"):
        load_suite("toy_letters,mine,toy_digits", include_path=path)
