import json
import math
import os
import random

import numpy as np
import pytest
import torch
import yaml
from lm_eval import evaluator as reference
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import toy
from mlflow_soup import errors
from mlflow_soup.decision import pairing
from mlflow_soup.evaluation.evaluator import Evaluator, mean_score
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import Prompting
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.find import find_checkpoint

EVERYTHING = "toy_letters,toy_digits:acc_norm,toy_digits_bpb:bits_per_byte"


@pytest.fixture(scope="module")
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


def test_scores_are_those_of_lm_eval_on_the_merged_weights(live, checkpoints, tasks):
    evaluator = Evaluator(live, load_suite(EVERYTHING, include_path=str(tasks)))
    links = live.link([find_checkpoint(folder, folder.name) for folder in checkpoints[:2]])
    for lam in (0.0, 0.37, 1.0):
        live.set_weights(links, (1 - lam, lam))
        ours = {m.task + m.metric: m.value for m in evaluator.score().metrics}
        theirs = reference.simple_evaluate(
            HFLM(pretrained=live.model, tokenizer=toy.tokenizer(), batch_size=32),
            tasks=["toy_letters", "toy_digits", "toy_digits_bpb"],
            task_manager=TaskManager(include_defaults=False, include_path=str(tasks)),
            bootstrap_iters=0,
        )["results"]
        expected = {
            "toy_lettersacc,none": theirs["toy_letters"]["acc,none"],
            "toy_digitsacc_norm,none": theirs["toy_digits"]["acc_norm,none"],
            "toy_digits_bpbbits_per_byte,none": theirs["toy_digits_bpb"]["bits_per_byte,none"],
        }
        assert ours == pytest.approx(expected, rel=1e-6, abs=0)


def test_a_score_is_the_mean_of_its_terms_oriented_so_that_larger_is_better(live, tasks):
    score = Evaluator(live, load_suite(EVERYTHING, include_path=str(tasks))).score()
    letters, digits, bits = (m.value for m in score.metrics)
    assert score.value == pytest.approx((letters + digits - bits) / 3, abs=1e-15)
    assert [i.weight for i in score.items] == pytest.approx([1 / 3, 1 / 3, -1 / 3])


def test_gold_and_sizes_say_which_items_are_right(live, tasks):
    suite = load_suite("toy_letters,toy_digits:acc_norm", include_path=str(tasks))
    for _, score in Evaluator(live, suite).evaluate():
        (items,) = score.items
        compared = np.array(items.log_likelihoods) / np.array(items.sizes)
        assert tuple(compared.argmax(axis=1) == np.array(items.gold)) == items.values
        assert 0 < sum(items.values) < len(items.values)


def test_nothing_is_known_of_answers_without_choices(live, tasks):
    suite = load_suite("toy_digits_bpb", include_path=str(tasks))
    (items,) = Evaluator(live, suite).score().items
    assert items.gold == () == items.sizes


def test_items_add_up_to_the_score(live, tasks):
    suite = load_suite(EVERYTHING + ",toy_digits_bpb:word_perplexity", include_path=str(tasks))
    for _, score in Evaluator(live, suite).evaluate():
        total = sum(i.weight * np.dot(i.shares, i.values) for i in score.items)
        assert total == pytest.approx(score.value, rel=1e-9)
        assert sum(score.items[0].shares) == pytest.approx(1.0)


def test_the_standard_error_of_an_accuracy_is_lm_evals(live, tasks):
    score = Evaluator(live, load_suite("toy_letters", include_path=str(tasks))).score()
    value, count = score.value, len(score.items[0].ids)
    assert score.stderr == pytest.approx(math.sqrt(value * (1 - value) / (count - 1)))


def test_a_perplexity_is_linearised_around_its_value(live, tasks):
    suite = load_suite("toy_digits_bpb:word_perplexity", include_path=str(tasks))
    evaluator = Evaluator(live, suite)
    before = evaluator.score()
    with torch.no_grad():
        live.model.get_output_embeddings().weight *= 1.001
    after = evaluator.score()
    difference = pairing.paired(after, before)
    assert difference.value == pytest.approx(after.value - before.value, rel=1e-6)
    assert 0 < difference.stderr < before.stderr


def test_groups_are_weighted_as_lm_eval_weights_them(live, tasks, tmp_path):
    lines = (tasks / "letters.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:30]))
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "few_letters"}
    config["dataset_kwargs"]["data_files"] = {"validation": str(tmp_path / "few.jsonl")}
    toy.write_task(tmp_path / "few.yaml", config)
    for name, by_size in (("sized", True), ("macro", False)):
        inner = {
            "group": f"{name}_inner",
            "task": ["few_letters"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
        }
        outer = inner | {"group": name, "task": [f"{name}_inner", "toy_digits"]}
        for group in (inner, outer):
            (tmp_path / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    path = os.pathsep.join([str(tasks), str(tmp_path)])
    scores = {
        name: Evaluator(live, load_suite(name, include_path=path)).score()
        for name in ("sized", "macro", "few_letters", "toy_digits")
    }
    few, digits = scores["few_letters"].value, scores["toy_digits"].value
    assert scores["sized"].value == pytest.approx((30 * few + 100 * digits) / 130)
    assert scores["macro"].value == pytest.approx((few + digits) / 2)
    assert scores["sized"].metrics[0].task == "sized"


def test_a_model_that_gives_no_finite_likelihoods_is_no_good_model(checkpoints, tasks):
    live = LiveModel(find_checkpoint(checkpoints[0], "v1"))
    evaluator = Evaluator(live, load_suite("toy_letters", include_path=str(tasks)))
    with torch.no_grad():
        live.model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(errors.ObjectiveError, match="not finite"):
        evaluator.score()


def rescaled(model, factor):
    """Scale the attention values by a factor and divide the output by it: an equal model."""
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            attention = layer.attention
            for tensor in (attention.query_key_value.weight, attention.query_key_value.bias):
                tensor.view(4, 3, -1)[:, 2] *= factor
            attention.dense.weight /= factor
    return model


@pytest.mark.parametrize("evaluator", ["prepared", "lm-eval"])
@pytest.mark.parametrize("task", ["toy_letters", "toy_digits_bpb:bits_per_byte", "toy_spelling"])
def test_a_mixture_that_overflows_in_half_precision_has_no_score(
    trained, tasks, tmp_path, task, evaluator
):
    found = []
    for factor in (1000.0, 0.001):
        model = rescaled(toy.noisy(trained, 1, 0.1), factor).half()
        found.append(find_checkpoint(toy.save(model, tmp_path / str(factor)), f"× {factor}"))
    live = LiveModel(found[0])
    links = live.link(found)
    suite = load_suite(task, include_path=str(tasks))
    scoring = Evaluator(live, suite, limit=20, evaluator=evaluator)
    for lam in ((1.0, 0.0), (0.0, 1.0)):
        live.set_weights(links, lam)
        assert scoring.score().items
    live.set_weights(links, (0.5, 0.5))
    with pytest.raises(errors.NonFiniteError, match="not finite") as refusal:
        scoring.score()
    assert "register the parents in F32 or BF16" in refusal.value.fix


def test_a_perplexity_beyond_all_numbers_is_no_score(live, tasks, monkeypatch):
    suite = load_suite("toy_digits_bpb:word_perplexity", include_path=str(tasks))
    scoring = Evaluator(live, suite, limit=5)
    answers = scoring.lm.answers

    def unlikely(parts):
        return {kind: [1e4 * x for x in found] for kind, found in answers(parts).items()}

    monkeypatch.setattr(scoring.lm, "answers", unlikely)
    with pytest.raises(errors.NonFiniteError, match="too large for a float"):
        scoring.score()


def test_cut_requests_are_counted(live, tasks):
    suite = load_suite("toy_letters", include_path=str(tasks))
    whole, cut = Evaluator(live, suite), Evaluator(live, suite, max_length=5)
    whole.score()
    cut.score()
    assert whole.truncated == 0
    assert cut.truncated == 400  # 100 items of 4 choices, each 7 + 4 characters
    assert whole.fingerprint != cut.fingerprint


def test_few_shot_examples_are_drawn_once(live, tasks, tmp_path):
    config = yaml.safe_load((tasks / "letters.yaml").read_text())
    config |= {"task": "shots", "num_fewshot": 3, "doc_to_target": "{{choices[answer]}}"}
    config["dataset_kwargs"]["data_files"]["train"] = str(tasks / "digits.jsonl")
    config |= {"training_split": "train", "fewshot_split": "train", "doc_to_target": "answer"}
    toy.write_task(tmp_path / "shots.yaml", config)
    suite = load_suite("shots", include_path=f"{tmp_path}{os.pathsep}{tasks}")
    evaluator = Evaluator(live, suite)
    first, second = evaluator.score(), evaluator.score()
    assert first == second
    again = Evaluator(live, load_suite("shots", include_path=f"{tmp_path}{os.pathsep}{tasks}"))
    assert again.fingerprint == evaluator.fingerprint
    assert again.score() == first


def test_the_number_of_examples_can_be_set_where_the_task_leaves_it_open(live, tasks, tmp_path):
    config = yaml.safe_load((tasks / "letters.yaml").read_text())
    config |= {"task": "open", "fewshot_split": "validation"}
    del config["num_fewshot"]
    toy.write_task(tmp_path / "open.yaml", config)
    prints = {
        shots: Evaluator(
            live,
            load_suite("open", include_path=f"{tmp_path}{os.pathsep}{tasks}"),
            prompting=Prompting(shots),
        ).fingerprint
        for shots in (None, 0, 2)
    }
    assert prints[None] == prints[0] != prints[2]


def test_limit_takes_the_first_items(live, tasks):
    suite = load_suite("toy_letters", include_path=str(tasks))
    all_items = Evaluator(live, suite).score().items[0]
    suite = load_suite("toy_letters", include_path=str(tasks))
    few = Evaluator(live, suite, limit=7).score().items[0]
    assert few.ids == all_items.ids[:7]
    np.testing.assert_allclose(few.log_likelihoods, all_items.log_likelihoods[:7], rtol=1e-5)


def test_the_data_decide_the_fingerprint_not_only_the_name(live, tmp_path):
    prints = set()
    for seed_count in (50, 51):
        folder = toy.write_tasks(tmp_path / str(seed_count), count=seed_count)
        prints.add(Evaluator(live, load_suite("toy_letters", include_path=str(folder))).fingerprint)
    assert len(prints) == 2


def test_generation_tasks_are_scored_with_their_filters(live, tasks):
    suite = load_suite("toy_spelling:exact_match,digits", include_path=str(tasks))
    score = Evaluator(live, suite, limit=20).score()
    assert score.metrics[0].key == "toy_spelling/exact_match.digits"
    assert set(score.items[0].values) <= {0.0, 1.0}
    assert set(score.items[0].log_likelihoods) == {()}
    assert str(load_suite("toy_spelling", include_path=str(tasks)).terms[0]).endswith(",strict")


def test_the_right_answers_are_part_of_the_fingerprint(live, tasks, tmp_path):
    prints = set()
    for shift in (0, 1):
        lines = [json.loads(x) for x in (tasks / "letters.jsonl").read_text().splitlines()]
        folder = tmp_path / f"tasks{shift}"
        folder.mkdir()
        data = folder / "data.jsonl"
        rows = [line | {"answer": (line["answer"] + shift) % 4} for line in lines]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = yaml.safe_load((tasks / "letters.yaml").read_text())
        config["dataset_kwargs"]["data_files"]["validation"] = str(data)
        (folder / "letters.yaml").write_text(yaml.safe_dump(config))
        suite = load_suite("toy_letters", include_path=str(folder))
        requests = Evaluator(live, suite)
        prints.add(requests.fingerprint)
    assert len(prints) == 2


def test_few_shot_prompts_are_those_of_the_lm_eval_command(live, tasks, tmp_path):
    config = yaml.safe_load((tasks / "letters.yaml").read_text())
    config |= {"task": "shots", "num_fewshot": 3, "fewshot_split": "train"}
    config["dataset_kwargs"]["data_files"]["train"] = str(tasks / "digits.jsonl")
    toy.write_task(tmp_path / "shots.yaml", config)
    ours = Evaluator(
        live, load_suite("shots", include_path=f"{tmp_path}{os.pathsep}{tasks}")
    ).score()
    theirs = reference.simple_evaluate(
        HFLM(pretrained=live.model, tokenizer=toy.tokenizer(), batch_size=32),
        tasks=["shots"],
        task_manager=TaskManager(include_defaults=False, include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    prompts = [row["prompt_hash"][:16] for row in theirs["samples"]["shots"]]
    assert [item.split(":")[1] for item in ours.items[0].ids] == prompts


# --- texts


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def texts(live, tasks):
    """A function that returns the texts of a suite."""

    def read(names, **options):
        folders = dict.fromkeys([str(options.pop("folder", tasks)), str(tasks)])
        suite = load_suite(names, include_path=os.pathsep.join(folders))
        return list(Evaluator(live, suite, **options).texts())

    return read


def test_the_text_of_an_item_is_its_question_with_the_right_choice(texts, tasks):
    expected = [
        f"{row['question']} {row['choices'][row['answer']]}"
        for row in rows_of(tasks / "letters.jsonl")
    ]
    assert texts("toy_letters") == texts("toy_letters:acc_norm") == expected
    assert texts("toy_letters", limit=7) == expected[:7]


def test_the_text_of_a_document_is_the_document(texts, tasks):
    expected = [row["text"] for row in rows_of(tasks / "text.jsonl")]
    assert texts("toy_digits_bpb:bits_per_byte") == expected


def test_the_text_of_a_generated_answer_is_the_prompt_with_the_reference(texts, tasks):
    found = texts("toy_spelling", limit=5)
    for text, row in zip(found, rows_of(tasks / "digits.jsonl"), strict=False):
        assert text == f"{row['question']} {row['choices'][row['answer']]}"
    assert len(found) == 5


def test_a_reference_follows_its_prompt_as_in_few_shot_examples(texts, tasks, tmp_path):
    config = yaml.safe_load((tasks / "spelling.yaml").read_text())
    targets = {"plain": "{{choices[answer]}}", "several": "{{[choices[answer], 'other']}}"}
    targets["none"] = "{{[]}}"
    for name, target in targets.items():
        own = config | {"task": name, "doc_to_text": "{{question}}", "doc_to_target": target}
        toy.write_task(tmp_path / f"{name}.yaml", own)
    row = rows_of(tasks / "digits.jsonl")[0]
    expected = f"{row['question']} {row['choices'][row['answer']]}"
    assert texts("plain", folder=tmp_path, limit=1) == [expected]
    assert texts("several", folder=tmp_path, limit=1) == [expected]
    assert texts("none", folder=tmp_path, limit=1) == []


def test_an_item_without_one_right_answer_has_no_text(texts, tasks, tmp_path):
    rows = rows_of(tasks / "letters.jsonl")[:3]
    rows[1]["answer"] = -100  # as some data sets mark items without a label
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "some"}
    config["dataset_kwargs"]["data_files"]["validation"] = str(tmp_path / "some.jsonl")
    toy.write_task(tmp_path / "some.yaml", config)
    expected = [f"{row['question']} {row['choices'][row['answer']]}" for row in rows[::2]]
    assert texts("some", folder=tmp_path) == expected


def test_texts_are_those_of_the_asked_tasks_alone(texts):
    assert len(texts("toy_all")) == 200
    held_out, ood = ({*texts(names)} for names in ("toy_letters", "toy_digits,toy_digits_bpb"))
    assert not held_out & ood
    assert not set("".join(held_out)) & set(toy.DIGITS)


@pytest.fixture
def first_digits(tasks, tmp_path):
    """Folders with a task that samples its answers, some of which are right by chance."""
    config = yaml.safe_load((tasks / "spelling.yaml").read_text())
    config |= {"task": "first_digit", "doc_to_target": "{{choices[answer].strip()[0]}}"}
    config["filter_list"][1]["filter"][0]["regex_pattern"] = "([0-9])"
    config["generation_kwargs"] |= {"do_sample": True, "temperature": 2.0}
    toy.write_task(tmp_path / "first_digit.yaml", config)
    return [str(tasks), str(tmp_path)]


@pytest.mark.parametrize("evaluator", ["prepared", "lm-eval"])
def test_sampled_answers_are_seeded_as_lm_eval_seeds_them(live, first_digits, caplog, evaluator):
    path = os.pathsep.join(first_digits)
    suite = load_suite("first_digit:exact_match,digits", include_path=path)
    ours = Evaluator(live, suite, limit=60, evaluator=evaluator)
    assert "first_digit: the answers are sampled (do_sample)" in caplog.text
    theirs = reference.simple_evaluate(
        HFLM(pretrained=live.model, tokenizer=toy.tokenizer(), batch_size=32),
        tasks=["first_digit"],
        task_manager=TaskManager(include_defaults=False, include_path=first_digits),
        bootstrap_iters=0,
        limit=60,
    )["results"]["first_digit"]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, second = ours.score(), ours.score()
    assert first == second
    assert first.metrics[0].value == theirs["exact_match,digits"]
    assert first.noise == first.stderr > 0
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    two = load_suite("first_digit:exact_match,digits toy_letters", include_path=path)
    both = Evaluator(live, two, limit=60, evaluator=evaluator).evaluate()
    assert both[1][1].noise == 0.0
    assert mean_score([score for _, score in both]).noise == pytest.approx(both[0][1].noise / 2)


def test_answers_that_are_not_sampled_make_no_noise(live, tasks, caplog):
    suite = load_suite("toy_spelling", include_path=str(tasks))
    assert Evaluator(live, suite, limit=20).score().noise == 0.0
    assert "sampled" not in caplog.text
