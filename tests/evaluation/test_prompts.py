import json
import shutil

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import toy
from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import ChatTemplate, Prompting, parse_generation
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.find import find_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
_LOOP = "{% for i in range(99999) %}"
_NESTED = _LOOP + _LOOP + "{% endfor %}{% endfor %}"
TERMS = "shots:acc,shots_of_test:acc_norm,generate:exact_match"


def chatty(folder, place, template):
    """A copy of a checkpoint whose tokenizer has a chat template."""
    shutil.copytree(folder, place)
    toy.edit_json(place / "tokenizer_config.json", chat_template=template)
    return LiveModel(find_checkpoint(place, "v1"))


@pytest.fixture(scope="module")
def live(checkpoints, tmp_path_factory):
    return chatty(checkpoints[0], tmp_path_factory.mktemp("chat") / "v1", TEMPLATE)


@pytest.fixture(scope="module")
def folder(tasks, tmp_path_factory):
    folder = toy.copy_tasks(tasks, tmp_path_factory.mktemp("prompted"))
    letters = yaml.safe_load((folder / "letters.yaml").read_text()) | {"num_fewshot": 2}
    files = {"validation": str(folder / "letters.jsonl"), "train": str(folder / "digits.jsonl")}
    generate = yaml.safe_load((folder / "spelling.yaml").read_text())
    for config in (
        letters
        | {"task": "shots", "fewshot_split": "train", "description": "Look. "}
        | {"dataset_kwargs": {"data_files": files}},
        letters | {"task": "shots_of_test", "fewshot_split": "validation", "gen_prefix": "So:"},
        generate | {"task": "generate", "filter_list": None},
    ):
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / f"{config['task']}.yaml").write_text(yaml.safe_dump(kept))
    return folder


def theirs(live, folder, **options):
    lm = HFLM(
        pretrained=live.model, tokenizer=live.tokenizer, batch_size=32, softmax_dtype="float32"
    )
    found = simple_evaluate(
        lm,
        tasks=[term.split(":")[0] for term in TERMS.split(",")],
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        bootstrap_iters=0,
        limit=20,
        **options,
    )
    samples = {
        task: [(row["arguments"], row["resps"]) for row in rows]
        for task, rows in found["samples"].items()
    }
    return found["results"], samples


def ours(live, folder, prompting, **options):
    suite = load_suite(TERMS, include_path=str(folder))
    return Evaluator(live, suite, limit=20, prompting=prompting, **options)


OPTIONS = {
    "plain": {},
    "instructed": {"system_instruction": "Answer."},
    "chat": {"apply_chat_template": True},
    "turns": {"apply_chat_template": True, "system_instruction": "Answer."},
    "one turn": {"apply_chat_template": True, "fewshot_as_multiturn": False},
    "longer": {"gen_kwargs": "max_gen_toks=3,repetition_penalty=1.5"},
}


@pytest.mark.parametrize("evaluator", ["prepared", "lm-eval"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_the_scores_of_lm_eval(live, folder, name, evaluator):
    options = OPTIONS[name]
    prompting = Prompting(
        system_instruction=options.get("system_instruction", ""),
        chat=ChatTemplate(live.tokenizer) if options.get("apply_chat_template") else None,
        fewshot_as_multiturn=options.get("fewshot_as_multiturn", True),
        gen_kwargs=parse_generation(options.get("gen_kwargs", ""), "here"),
    )
    results, _ = theirs(live, folder, **options)
    evaluation = ours(live, folder, prompting, evaluator=evaluator).evaluate()
    for term, score in evaluation:
        task, metric = term.split(":")
        printed = results[task][f"{metric},none"]
        assert score.metrics[0].value == pytest.approx(printed, abs=1e-12), term


def test_every_option_changes_the_fingerprint(live, folder):
    chat = ChatTemplate(live.tokenizer)
    prints = [
        ours(live, folder, prompting).fingerprint
        for prompting in (
            Prompting(),
            Prompting(system_instruction="Answer."),
            Prompting(chat=chat),
            Prompting(chat=chat, system_instruction="Answer."),
            Prompting(chat=chat, fewshot_as_multiturn=False),
            Prompting(gen_kwargs={"max_gen_toks": 3}),
        )
    ]
    assert len({*prints}) == len(prints)
    assert ours(live, folder, Prompting(chat=ChatTemplate(live.tokenizer))).fingerprint == prints[2]


def test_the_requests_are_those_that_lm_eval_logs(live, folder):
    prompting = Prompting(system_instruction="Answer.", chat=ChatTemplate(live.tokenizer))
    suite = load_suite(TERMS, include_path=str(folder))
    Evaluator(live, suite, limit=20, prompting=prompting)
    _, samples = theirs(live, folder, apply_chat_template=True, system_instruction="Answer.")
    for name, task in suite.loaded["tasks"].items():
        theirs_of_task = [args for rows, _ in samples[name] for args in rows]
        assert [request.args for request in task.instances] == theirs_of_task
    shots = suite.loaded["tasks"]["shots"].instances[0].args[0]
    assert shots.startswith("<system>Answer.")
    assert shots.count("<user>") == 3
    assert shots.endswith("<assistant>")


def test_a_template_that_refuses_a_system_prompt_gets_none(checkpoints, folder, tmp_path):
    live = chatty(checkpoints[0], tmp_path / "v1", NO_SYSTEM)
    prompting = Prompting(system_instruction="Answer.", chat=ChatTemplate(live.tokenizer))
    results, _ = theirs(live, folder, apply_chat_template=True, system_instruction="Answer.")
    for term, score in ours(live, folder, prompting).evaluate():
        task, metric = term.split(":")
        assert score.metrics[0].value == pytest.approx(results[task][f"{metric},none"], abs=1e-12)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (_NESTED, "processor time"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{{ 'x' * 10**6 }}", "it makes texts that are too long"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_or_has_no_end_is_refused(
    checkpoints, folder, tmp_path, monkeypatch, template, why
):
    monkeypatch.setattr("mlflow_soup.evaluation.loading._SECONDS_OF_TOKENIZER", 2)
    live = chatty(checkpoints[0], tmp_path / "v1", template)
    with pytest.raises(ParentError, match=why) as refusal:
        ours(live, folder, Prompting(chat=ChatTemplate(live.tokenizer)))
    assert "--apply-chat-template" in refusal.value.fix


def test_a_tokenizer_without_a_template_is_refused(checkpoints):
    with pytest.raises(SpecError, match="has no chat template"):
        ChatTemplate(LiveModel(find_checkpoint(checkpoints[0], "v1")).tokenizer)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("temperature=0.7,top_p=0.9,do_sample=True", {"temperature": 0.7, "top_p": 0.9}),
        (' {"until": ["\\n", ","], "max_gen_toks": 3}', {"until": ["\n", ","], "max_gen_toks": 3}),
    ],
)
def test_settings_of_generation_are_read_as_lm_eval_reads_them(text, settings):
    found = parse_generation(text, "here")
    assert {key: found[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("custom_generate=some/repository", "custom_generate, which could name code"),
        (json.dumps({"assistant_model": "x"}), "assistant_model, which could name code"),
        ("num_beams=1000", "num_beams = 1000"),
        ("warm", "'warm' is not a setting and its value"),
        ('{"until": ', "cannot be read"),
    ],
)
def test_settings_of_generation_that_are_none_are_refused(text, why):
    with pytest.raises(SpecError, match=why):
        parse_generation(text, "--gen-kwargs")


def test_a_template_that_prints_the_date_prints_the_same_every_day(checkpoints, folder, tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}: " + TEMPLATE
    live = chatty(checkpoints[0], tmp_path / "v1", template)
    suite = load_suite("shots", include_path=str(folder))
    Evaluator(live, suite, limit=2, prompting=Prompting(chat=ChatTemplate(live.tokenizer)))
    prompt = suite.loaded["tasks"]["shots"].instances[0].args[0]
    assert prompt.startswith("26 Jul 2024: <system>")


def test_texts_that_differ_at_each_call_are_refused(live):
    chat, count = ChatTemplate(live.tokenizer), iter(range(9))
    with pytest.raises(ParentError, match="ask for other texts each time"):
        chat.write(lambda: chat([{"role": "user", "content": str(next(count))}]))
