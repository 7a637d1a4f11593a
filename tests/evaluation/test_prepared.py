import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

import toy
from mlflow_soup import errors
from mlflow_soup.evaluation import prepared
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prepared import FrozenLM, PreparedLM
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.find import find_checkpoint

NATS = 1e-4  # the largest allowed difference of a log-likelihood in fp32
SIZES = {
    "vocab_size": len(toy.tokenizer()),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "GPTNeoX": {},
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": EXPERTS,
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mistral": {"sliding_window": 16},
    "Gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 16},
    "Granite": {"logits_scaling": 7.0},
    "Mamba": {"state_size": 4},
}


def family(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | FAMILIES[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ask(method, *arguments, task="task"):
    return [
        Instance(method, {}, each, number, (task, number, 1))
        for number, each in enumerate(arguments)
    ]


def words(rng, least, most):
    return "".join(rng.choice(list(toy.LETTERS + " "), size=rng.integers(least, most))) + "."


def choices(items=10):
    """Contexts of several lengths, each with four choices of several tokens."""
    rng = np.random.default_rng(0)
    contexts = [words(rng, 10, 40) for _ in range(items)]
    return ask("loglikelihood", *[(c, " " + words(rng, 1, 9)) for c in contexts for _ in range(4)])


def letters(items=10):
    """Prompts that begin alike, each with four single tokens to choose from."""
    rng = np.random.default_rng(1)
    examples = words(rng, 40, 50)
    prompts = [examples + words(rng, 5, 15) for _ in range(items)]
    return ask("loglikelihood", *[(p, letter) for p in prompts for letter in "abcd"], task="more")


def wrapped(model, kind=PreparedLM, batch_size=8, max_length=100):
    return kind(
        pretrained=model,
        tokenizer=toy.tokenizer(),
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
    )


def assert_same(ours, theirs):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    np.testing.assert_allclose(
        [likelihood for likelihood, _ in ours], [x for x, _ in theirs], rtol=0, atol=NATS
    )


@pytest.fixture(autouse=True, scope="module")
def free_forwards():
    """Set the fixed cost of a forward pass to 0, so that only tokens decide whether to share.

    On models this small, the fixed cost would decide alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepared.OVERHEAD, "cpu", 0.0)
        yield


def shared(lm):
    return [batch for batch in lm._plans["loglikelihood"].batches if batch.prefixes is not None]


@pytest.fixture(scope="module")
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


@pytest.fixture(scope="module")
def mixed(tasks, tmp_path_factory):
    """A folder with tasks of every kind."""
    folder = toy.copy_tasks(tasks, tmp_path_factory.mktemp("mixed"))
    base = yaml.safe_load((folder / "letters.yaml").read_text())
    files = {
        "validation": str(folder / "letters.jsonl"),
        "train": str(folder / "digits.jsonl"),
    }
    shots = {
        "doc_to_choice": ["a", "b", "c", "d"],
        "num_fewshot": 2,
        "fewshot_split": "train",
        "dataset_kwargs": {"data_files": files},
    }
    rng = np.random.default_rng(2)
    texts = [{"text": toy.sentence(rng, toy.DIGITS, repeats)} for repeats in (3, 40, 1, 25)]
    (folder / "long.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    long = yaml.safe_load((folder / "digits_bpb.yaml").read_text())
    long["dataset_kwargs"] = {"data_files": {"test": str(folder / "long.jsonl")}}
    generate = yaml.safe_load((folder / "spelling.yaml").read_text()) | {"task": "generate"}
    del generate["filter_list"]
    for config in (
        base | {"task": "several"},
        base | shots | {"task": "drawn"},
        base | shots | {"task": "same", "fewshot_config": {"sampler": "first_n"}},
        long | {"task": "long"},
        generate,
    ):
        (folder / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    return folder


MIXED = "several:acc_norm,drawn:acc,same:acc,long:bits_per_byte,generate:exact_match"


@pytest.fixture(scope="module")
def theirs(live, mixed):
    """The results of lm-eval's own function for those tasks."""
    return simple_evaluate(
        wrapped(live.model, HFLM, 32, None),
        tasks=[term.split(":")[0] for term in MIXED.split(",")],
        task_manager=TaskManager(include_defaults=False, include_path=str(mixed)),
        bootstrap_iters=0,
        limit=50,
    )


@pytest.mark.parametrize("evaluator", ["prepared", "lm-eval"])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_scores_are_those_of_lm_eval_whatever_the_batch_size(
    live, mixed, theirs, evaluator, batch_size
):
    suite = load_suite(MIXED, include_path=str(mixed))
    score = Evaluator(live, suite, evaluator=evaluator, batch_size=batch_size, limit=50).score()
    for metric, items in zip(score.metrics, score.items, strict=True):
        expected = theirs["results"][metric.task][metric.metric]
        if metric.task == "long":  # a sum of log-likelihoods
            assert metric.value == pytest.approx(expected, rel=1e-6)
        else:
            assert metric.value == expected
        rows = [
            [
                response[0][0] if isinstance(response[0], tuple) else response[0]
                for response in resps
            ]
            for resps in (row["resps"] for row in theirs["samples"][metric.task])
        ]
        if metric.task != "generate":
            np.testing.assert_allclose(items.log_likelihoods, rows, rtol=1e-6, atol=NATS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_the_likelihoods_of_lm_eval(name):
    model = family(name)
    requests = [*choices(), *letters()]
    lm = wrapped(model)
    lm.prepare({"loglikelihood": requests})
    assert lm.selects
    assert lm.shares == bool(shared(lm)) == (name != "Mamba")
    assert_same(lm.loglikelihood(requests), wrapped(model, HFLM).loglikelihood(requests))


@pytest.mark.parametrize("name", ["Llama", "Mamba"])
def test_documents_longer_than_the_model_are_read_in_windows(name):
    model = family(name)
    rng = np.random.default_rng(3)
    texts = [(words(rng, n, n + 1),) for n in (3, 250, 19, 20, 21, 100)] + [("",)]
    requests = ask("loglikelihood_rolling", *texts)
    lm = wrapped(model, max_length=20)
    lm.prepare({"loglikelihood_rolling": requests})
    expected = wrapped(model, HFLM, max_length=20).loglikelihood_rolling(requests)
    np.testing.assert_allclose(lm.loglikelihood_rolling(requests), expected, rtol=1e-6, atol=NATS)


def test_changed_weights_are_seen(live, checkpoints, mixed):
    suite = load_suite("several,same,long:bits_per_byte", include_path=str(mixed))
    evaluator = Evaluator(live, suite, limit=50)
    links = live.link([find_checkpoint(folder, folder.name) for folder in checkpoints[:2]])
    scores = []
    for lam in (0.0, 1.0, 0.0):
        live.set_weights(links, (1 - lam, lam))
        scores.append(evaluator.score())
    assert scores[0] == scores[2]
    assert scores[0].items[0].log_likelihoods != scores[1].items[0].log_likelihoods
    assert scores[1] == Evaluator(live_at(live, links, 1.0), suite, limit=50).score()
    live.set_weights(links, (1.0, 0.0))


def live_at(live, links, lam):
    live.set_weights(links, (1 - lam, lam))
    return live


def test_contexts_with_several_choices_and_common_beginnings_are_forwarded_once():
    model = family("Llama")
    lm = wrapped(model)
    forwarded = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: forwarded.append((args or [kwargs["input_ids"]])[0].numel()),
        with_kwargs=True,
    )
    for requests in (choices(), letters()):
        lm.prepare({"loglikelihood": requests})
        forwarded.clear()
        lm.loglikelihood(requests)
        ours = sum(forwarded)
        forwarded.clear()
        wrapped(model, HFLM).loglikelihood(requests)
        assert 0 < ours < 0.8 * sum(forwarded)


def test_the_same_question_in_two_tasks_is_forwarded_once():
    requests = choices()
    again = ask("loglikelihood", *[request.args for request in requests], task="other")
    lm = wrapped(family("Llama"))
    lm.prepare({"loglikelihood": requests})
    once = sum(len(batch.tokens) for batch in lm._plans["loglikelihood"].batches)
    lm.prepare({"loglikelihood": [*requests, *again]})
    assert once == sum(len(batch.tokens) for batch in lm._plans["loglikelihood"].batches)
    answers = lm.loglikelihood([*requests, *again])
    assert answers[: len(requests)] == answers[len(requests) :]


class Untrusting(nn.Module):
    """A head that needs the hidden states of a whole batch, not single positions."""

    def __init__(self, head, fails):
        super().__init__()
        self.head, self.fails = head, fails
        self.weight = head.weight

    def forward(self, hidden):
        if self.fails and hidden.shape[0] == 1:
            raise RuntimeError("this is not the batch")
        return self.head(hidden + 0.1 * hidden.mean((0, 1), keepdim=True))


class Hidden(nn.Linear):
    """A head that its model never calls: the model only uses the weight."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight)


@pytest.mark.parametrize("way", ["differs", "fails", "is not called", "is not known"])
def test_a_model_whose_head_does_not_cooperate_is_forwarded_as_lm_eval_does(way, monkeypatch):
    model = family("Llama")
    if way in ("differs", "fails"):
        model.lm_head = Untrusting(model.lm_head, way == "fails")
    elif way == "is not called":
        head = model.lm_head
        model.lm_head = nn.Module()
        model.lm_head.forward = head.forward
        monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    else:
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    # one batch: a head that reads the whole batch only agrees with lm-eval on equal batches
    requests = letters(4)[::4]
    lm = wrapped(model)
    lm.prepare({"loglikelihood": requests})
    assert not lm.selects
    assert not lm.shares
    assert_same(lm.loglikelihood(requests), wrapped(model, HFLM).loglikelihood(requests))


def test_a_model_whose_cache_forgets_is_forwarded_without(monkeypatch):
    model = family("Llama")
    forward = model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    requests = letters()
    lm = wrapped(model)
    lm.prepare({"loglikelihood": requests})
    assert lm.selects
    assert not lm.shares
    assert_same(lm.loglikelihood(requests), wrapped(model, HFLM).loglikelihood(requests))


def test_what_was_prepared_is_not_read_again(live, mixed, monkeypatch):
    suite = load_suite("several,same,long:bits_per_byte", include_path=str(mixed))
    evaluator = Evaluator(live, suite, limit=20)
    once = evaluator.score()
    monkeypatch.setattr(live.tokenizer.__class__, "encode", None)
    assert evaluator.score() == once


def test_requests_that_were_not_prepared_are_answered_all_the_same():
    model = family("GPTNeoX")
    lm = wrapped(model)
    lm.prepare({"loglikelihood": letters()})
    for requests in (choices(), choices()[5:6], letters()):
        assert_same(lm.loglikelihood(requests), wrapped(model, HFLM).loglikelihood(requests))
    assert_same(wrapped(model).loglikelihood(choices()), lm.loglikelihood(choices()))
    assert lm.loglikelihood([]) == []
    assert lm.loglikelihood_rolling([]) == []


def test_a_context_may_be_empty():
    model = family("GPTNeoX")
    requests = ask("loglikelihood", ("", "kat"), ("", "kit kat"), ("k", "at"))
    ours, theirs = (wrapped(model, kind).loglikelihood(requests) for kind in (PreparedLM, HFLM))
    assert_same(ours, theirs)


def test_equal_logits_are_greedy_for_the_first_token_only():
    model = family("GPTNeoX")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    requests = ask("loglikelihood", ("a", toy.END), ("a", " "), ("b", "c"))
    ours, theirs = (wrapped(model, kind).loglikelihood(requests) for kind in (PreparedLM, HFLM))
    assert [greedy for _, greedy in ours] == [True, False, False]
    assert_same(ours, theirs)


def test_log_likelihoods_are_the_same_in_pieces(monkeypatch):
    model = family("Llama")
    requests = [*choices(), *letters()]
    whole = wrapped(model, HFLM).loglikelihood(requests)
    monkeypatch.setattr("mlflow_soup.evaluation.prepared.SOFTMAX_LOGITS", {"cpu": 50})
    monkeypatch.setattr("mlflow_soup.evaluation.prepared.BATCH_LOGITS", 1000)
    lm = wrapped(model)
    assert_same(lm.loglikelihood(requests), whole)
    lm.prepare({"loglikelihood": requests})
    assert max(b.reads.numel() for b in lm._plans["loglikelihood"].batches) <= 40


@pytest.mark.parametrize("kind", [PreparedLM, FrozenLM])
def test_cut_requests_are_counted(kind):
    lm = wrapped(family("GPTNeoX"), kind, max_length=50)
    requests = [*choices(), *letters()]
    lengths = [
        len(context) + len(continuation) - 1 for context, continuation in choices_of(requests)
    ]
    answers = lm.loglikelihood(requests)
    assert lm.truncated == sum(length > 50 for length in lengths) > 0
    assert_same(answers, wrapped(lm.model, HFLM, max_length=50).loglikelihood(requests))
    lm.loglikelihood(requests)
    assert lm.truncated == 2 * sum(length > 50 for length in lengths)


def choices_of(requests):
    return [request.args for request in requests]


@pytest.mark.parametrize(
    ("answer", "fix"), [("bcdefg", "raise --max-length"), ("", "remove the empty answer")]
)
def test_an_answer_that_is_too_long_or_empty_is_refused(answer, fix):
    lm = wrapped(family("GPTNeoX"), max_length=5)
    words = f"an answer of {len(answer)} tokens; an answer must have 1 to 5"
    with pytest.raises(errors.ObjectiveError, match=words) as refusal:
        lm.prepare({"loglikelihood": ask("loglikelihood", ("a", answer))})
    assert fix in refusal.value.fix


def test_infinite_weights_are_noticed(checkpoints, mixed):
    live = LiveModel(find_checkpoint(checkpoints[0], "v1"))
    evaluator = Evaluator(live, load_suite("same", include_path=str(mixed)), limit=20)
    with torch.no_grad():
        live.model.get_input_embeddings().weight[2] = float("inf")
    with pytest.raises(errors.NonFiniteError):
        evaluator.score()


@pytest.mark.parametrize(("fits", "halved"), [(5, 4), (1, 1)])
def test_the_batch_is_halved_until_it_fits(monkeypatch, fits, halved):
    model = family("GPTNeoX")
    forward = model.forward

    def small(tokens, **kwargs):
        if len(tokens) > fits:
            raise torch.OutOfMemoryError("too much")
        return forward(tokens, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    lm = PreparedLM(
        pretrained=model,
        tokenizer=toy.tokenizer(),
        batch_size=32,
        softmax_dtype="float32",
        probes=True,
    )
    lm.prepare({"loglikelihood": choices()})
    assert lm.batch_size == halved
    assert_same(lm.loglikelihood(choices()), wrapped(model, HFLM, halved).loglikelihood(choices()))
    with pytest.raises(torch.OutOfMemoryError):
        wrapped(model, batch_size=32).loglikelihood(choices())
    monkeypatch.setattr(model, "forward", lambda *_, **__: small([0] * 6))
    with pytest.raises(torch.OutOfMemoryError):
        lm.prepare({"loglikelihood": choices()})


def test_a_task_of_one_item_is_scored(live, mixed):
    suite = load_suite("several,long:bits_per_byte", include_path=str(mixed))
    one = Evaluator(live, suite, limit=1).score()
    assert [len(items.ids) for items in one.items] == [1, 1]


def test_the_evaluator_is_part_of_the_fingerprint(live, mixed):
    suite = load_suite("several", include_path=str(mixed))
    ways = [Evaluator(live, suite, evaluator=name, limit=5) for name in ("prepared", "lm-eval")]
    assert ways[0].settings() == ways[1].settings() | {"evaluator": "prepared"}
    assert ways[0].fingerprint != ways[1].fingerprint
