import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import toy
from mlflow_soup import merge_checkpoints
from mlflow_soup.errors import ParentError
from mlflow_soup.evaluation import loading
from mlflow_soup.evaluation.compatibility import (
    CONFIG_MAY_DIFFER,
    TOKENIZER_MAY_DIFFER,
    check_compatible,
    differences,
)
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.checkpoint import SINGLE
from mlflow_soup.weights.find import find_checkpoint

CONFIG = {"hidden_size": 48, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
TENSORS = {"w": torch.ones(4, 3), "b": torch.ones(3)}
NAMES = ("models:/a/1", "models:/a/2")


@pytest.fixture
def pair(tmp_path):
    """The folders of two checkpoints that can be mixed."""
    folders = [toy.bare(tmp_path / f"v{i}", TENSORS, **CONFIG) for i in (1, 2)]
    for folder in folders:
        (folder / "tokenizer.json").write_text("{}")
    return folders


def compared(folders):
    return differences(*(find_checkpoint(f, name) for f, name in zip(folders, NAMES, strict=True)))


def test_checkpoints_of_one_run_do_not_differ(checkpoints):
    check_compatible([find_checkpoint(folder, folder.name) for folder in checkpoints])


def test_the_split_into_files_is_not_a_difference(checkpoints, folder):
    found = [find_checkpoint(checkpoints[1], "v2"), find_checkpoint(toy.shard(folder), "v1")]
    check_compatible(found)
    check_compatible(found[::-1])


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({"hidden_size": 64}, ["config.json: hidden_size is 48 against 64"]),
        ({"hidden_size": "48"}, ["config.json: hidden_size is 48 against '48'"]),
        ({"rotary_pct": 0.5}, ["config.json: rotary_pct is absent against 0.5"]),
        ({"hidden_size": None}, ["config.json: hidden_size is 48 against absent"]),
        (
            {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
            ["config.json: rope_parameters: rope_theta is 10000.0 against 500000.0"],
        ),
        (
            {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "yarn", "factor": 4.0}},
            [
                "config.json: rope_parameters: factor is absent against 4.0",
                "config.json: rope_parameters: rope_type is 'default' against 'yarn'",
            ],
        ),
        ({"eos_token_id": [0, 2]}, ["config.json: eos_token_id is absent against [0, 2]"]),
    ],
)
def test_a_config_field_is_named_with_both_values(pair, fields, lines):
    toy.edit_json(pair[1] / "config.json", **fields)
    assert compared(pair) == lines


def test_the_value_of_the_first_checkpoint_comes_first(pair):
    toy.edit_json(pair[0] / "config.json", hidden_size=64)
    assert compared(pair) == ["config.json: hidden_size is 64 against 48"]


@pytest.mark.parametrize("field", sorted({*CONFIG_MAY_DIFFER} - {"auto_map"}))
def test_config_fields_that_do_not_change_the_model_may_differ(pair, field):
    toy.edit_json(pair[0] / "config.json", **{field: "one"})
    assert compared(pair) == []
    toy.edit_json(pair[1] / "config.json", **{field: "two"})
    assert compared(pair) == []


@pytest.mark.parametrize("field", sorted({*TOKENIZER_MAY_DIFFER} - {"auto_map"}))
def test_tokenizer_fields_that_do_not_change_the_tokens_may_differ(pair, field):
    toy.edit_json(pair[0] / "tokenizer_config.json", **{field: "one"})
    assert compared(pair) == []
    toy.edit_json(pair[1] / "tokenizer_config.json", **{field: "two"})
    assert compared(pair) == []


def test_the_old_name_of_the_dtype_is_not_a_difference(pair):
    toy.edit_json(pair[0] / "config.json", torch_dtype="bfloat16")
    toy.edit_json(pair[1] / "config.json", dtype="bfloat16")
    assert compared(pair) == []


def test_another_dtype_in_the_config_is_a_difference_under_either_name(pair):
    toy.edit_json(pair[0] / "config.json", torch_dtype="bfloat16")
    toy.edit_json(pair[1] / "config.json", dtype="float32")
    assert compared(pair) == ["config.json: dtype is 'bfloat16' against 'float32'"]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"b": torch.ones(5)}, [f"{SINGLE}: b is F32 (3,) against F32 (5,)"]),
        ({"b": torch.ones(3, 1)}, [f"{SINGLE}: b is F32 (3,) against F32 (3, 1)"]),
        ({"b": torch.ones(3).half()}, [f"{SINGLE}: b is F32 (3,) against F16 (3,)"]),
        ({"b": None}, [f"{SINGLE}: b, F32 (3,), is only in models:/a/1"]),
        (
            {"more": torch.ones(2, 2).bfloat16()},
            [f"{SINGLE}: more, BF16 (2, 2), is only in models:/a/2"],
        ),
        (
            {"b": None, "bias": torch.ones(3)},
            [
                f"{SINGLE}: b, F32 (3,), is only in models:/a/1",
                f"{SINGLE}: bias, F32 (3,), is only in models:/a/2",
            ],
        ),
        ({"w": torch.zeros(4, 3)}, []),
    ],
    ids=["size", "shape", "dtype", "missing", "extra", "renamed", "values"],
)
def test_a_tensor_is_named_with_its_dtype_and_shape_in_both(pair, changes, lines):
    toy.edit_tensors(pair[1], **changes)
    assert compared(pair) == lines


def sha256(text):
    return "sha256 " + hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    "file",
    [
        *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
        *("spiece.model", "sentencepiece.bpe.model", "added_tokens.json", "chat_template.jinja"),
        *("special_tokens_map.json", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken"),
    ],
)
def test_tokenizer_files_are_compared_by_their_bytes(pair, file):
    for folder in pair:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text('{"vocab": 1}')
    assert compared(pair) == []
    (pair[1] / file).write_text('{"vocab":  1}')
    old, new = sha256('{"vocab": 1}'), sha256('{"vocab":  1}')
    assert compared(pair) == [f"{file}: {old} against {new}"]
    (pair[1] / file).unlink()
    assert compared(pair) == [f"{file}: {old} against absent"]
    assert compared(pair[::-1]) == [f"{file}: absent against {old}"]


def test_a_tokenizer_that_begins_sentences_differently_is_a_difference(pair):
    toy.edit_json(pair[0] / "tokenizer_config.json", add_bos_token=True)
    toy.edit_json(pair[1] / "tokenizer_config.json", add_bos_token=False)
    assert compared(pair) == ["tokenizer_config.json: add_bos_token is True against False"]


def test_a_changed_added_token_is_named_by_its_path(pair):
    for folder, special in zip(pair, (True, False), strict=True):
        token = {"content": "<pad>", "special": special}
        toy.edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"7": token})
    assert compared(pair) == [
        "tokenizer_config.json: added_tokens_decoder: 7: special is True against False"
    ]


def test_a_tokenizer_in_a_separate_folder_is_compared(pair, tmp_path):
    tokenizer = pair[1] / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(pair[1] / file, tokenizer)
    assert compared(pair) == []
    (tokenizer / "tokenizer.json").write_text("[]")
    assert compared(pair) == [f"tokenizer.json: {sha256('{}')} against {sha256('[]')}"]


def test_a_tokenizer_config_that_is_not_json_is_refused_by_name(pair):
    (pair[1] / "tokenizer_config.json").write_text("{")
    with pytest.raises(ParentError, match=r"tokenizer_config\.json of models:/a/2 cannot be"):
        compared(pair)


def test_every_difference_is_in_one_report(checkpoints, folder):
    toy.edit_json(folder / "config.json", hidden_act="relu", transformers_version="4.0.0")
    bias = torch.zeros(3)
    toy.edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias, "more": bias.clone()})
    (folder / "tokenizer.json").write_text("{}")
    pair = [find_checkpoint(checkpoints[0], NAMES[0]), find_checkpoint(folder, NAMES[1])]
    lines = differences(*pair)
    assert "config.json: hidden_act is 'gelu' against 'relu'" in lines
    assert f"{SINGLE}: gpt_neox.final_layer_norm.bias is F32 (48,) against F32 (3,)" in lines
    assert f"{SINGLE}: more, F32 (3,), is only in models:/a/2" in lines
    assert any(line.startswith("tokenizer.json: sha256 ") for line in lines)
    assert len(lines) == 4
    with pytest.raises(ParentError) as refusal:
        check_compatible(pair)
    assert all(f"    {line}\n" in f"{refusal.value.what}\n" for line in lines)
    assert refusal.value.what.startswith("models:/a/1 and models:/a/2 are not checkpoints of one")
    assert refusal.value.exit_code == 4


def test_several_parents_are_told_apart_in_the_report(tmp_path):
    changes = [{}, {"b": torch.ones(5)}, {}, {"b": torch.ones(7), "more": torch.ones(1)}]
    parents = [
        find_checkpoint(toy.bare(tmp_path / f"v{i}", TENSORS | change), f"v{i}")
        for i, change in enumerate(changes)
    ]
    with pytest.raises(ParentError) as refusal:
        check_compatible(parents)
    assert refusal.value.what.splitlines() == [
        "v0 and v1, v3 are not checkpoints of one model:",
        f"    v1: {SINGLE}: b is F32 (3,) against F32 (5,)",
        f"    v3: {SINGLE}: b is F32 (3,) against F32 (7,)",
        f"    v3: {SINGLE}: more, F32 (1,), is only in v3",
    ]
    check_compatible([parents[0], parents[2]])


def test_a_report_on_other_architectures_is_short(tmp_path):
    folders = [
        toy.bare(tmp_path / kind, {f"{kind}.{i}": torch.ones(1) for i in range(150)})
        for kind in ("gpt", "llama")
    ]
    with pytest.raises(ParentError) as refusal:
        check_compatible([find_checkpoint(folder, folder.name) for folder in folders])
    assert refusal.value.what.splitlines()[1:] == [
        f"    {SINGLE}: gpt.0, F32 (1,), is only in gpt; 149 more tensors differ in this way",
        f"    {SINGLE}: llama.0, F32 (1,), is only in llama; 149 more tensors differ in this way",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_all_weights_is_a_difference_in_each(checkpoints, folder, dtype):
    content = load_file(folder / SINGLE)
    toy.edit_tensors(folder, **{name: tensor.to(dtype) for name, tensor in content.items()})
    lines = differences(find_checkpoint(checkpoints[0], "v1"), find_checkpoint(folder, "v2"))
    first = min(content)
    shape = tuple(content[first].shape)
    assert lines == [
        f"{SINGLE}: {first} is F32 {shape} against {toy.DTYPES[dtype]} {shape}; "
        f"{len(content) - 1} more tensors differ in this way"
    ]


def test_a_checkpoint_does_not_differ_from_itself(pair):
    found = find_checkpoint(pair[0], "v1")
    assert differences(found, found) == []


# ---- what transformers loads, where the files differ


@pytest.fixture
def llamas(tmp_path):
    """The folders of two Llamas of one training."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes, **heads))
    for name in ("v1", "v2"):
        model.save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
    return [tmp_path / "v1", tmp_path / "v2"]


def as_transformers_4_writes(folder, rope_theta=10_000.0):
    """The same config and tokenizer as version 4.57.1 of transformers writes them."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.57.1"}
    config |= {"rope_theta": rope_theta, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    end = {"content": toy.END, "special": True, **flags}
    toy.edit_json(
        folder / "tokenizer_config.json",
        backend=None,
        tokenizer_class="PreTrainedTokenizerFast",
        extra_special_tokens={},
        clean_up_tokenization_spaces=False,
        added_tokens_decoder={"0": end},
    )
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    plain = {"type": "TemplateProcessing", "special_tokens": {}}
    plain |= {"single": [first], "pair": [first, second]}
    toy.edit_json(folder / "tokenizer.json", post_processor=plain)


def test_files_of_another_version_of_transformers_are_no_difference(llamas, tmp_path):
    as_transformers_4_writes(llamas[0])
    assert compared(llamas) == compared(llamas[::-1]) == []
    merge_checkpoints(llamas, [0.5, 0.5], tmp_path / "soup")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # of one version
        assert (tmp_path / "soup" / file).read_bytes() == (llamas[1] / file).read_bytes()
    assert compared([tmp_path / "soup", llamas[0]]) == []


def test_another_model_in_files_of_another_version_is_told_as_it_is_loaded(llamas):
    as_transformers_4_writes(llamas[0], rope_theta=500_000.0)
    lines = ["config.json: rope_parameters: rope_theta is 500000.0 against 10000.0"]
    assert compared(llamas) == lines


@pytest.mark.parametrize(
    "fields",
    [
        {"unsloth_version": "2025.1", "_attn_implementation_autoset": True},
        {"attention_bias": False},  # the default
        {"rms_norm_eps": 1e-6, "dtype": "float32"},
        {"quantization_config": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
    ],
)
def test_fields_that_change_nothing_are_no_difference(llamas, fields):
    config = json.loads((llamas[1] / "config.json").read_text())
    (llamas[1] / "config.json").write_text(json.dumps(config | fields))
    toy.edit_json(llamas[0] / "config.json", attention_bias=None, rms_norm_eps=None)
    assert compared(llamas) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"attention_bias": True}, "attention_bias is False against True"),
        # undeclared, but common code reads it
        ({"sliding_window": 8}, "sliding_window is absent against 8"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: factor is"),
    ],
)
def test_a_field_that_changes_the_model_is_a_difference(llamas, fields, line):
    toy.edit_json(llamas[1] / "config.json", **fields)
    assert any(found.startswith(f"config.json: {line}") for found in compared(llamas))


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_special_tokens_count_wherever_they_are_written(llamas, file):
    for folder, token in zip(llamas, (toy.END, "a"), strict=True):
        toy.edit_json(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
        content = json.loads(path.read_text()) if (path := folder / file).exists() else {}
        path.write_text(json.dumps(content | {"eos_token": token}))
    line = f"tokenizer: special_tokens_map: eos_token is '{toy.END}' against 'a'"
    assert line in compared(llamas)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_counts_wherever_it_lies(llamas, file):
    template = "{{ messages[0].content }}"
    (llamas[0] / "chat_template.jinja").write_text(template)
    if file == "tokenizer_config.json":
        toy.edit_json(llamas[1] / file, chat_template=template)
    else:
        (llamas[1] / file).write_text(template)
    assert compared(llamas) == []
    (llamas[0] / "chat_template.jinja").write_text(template + "!")
    (line,) = compared(llamas)
    assert line == f"tokenizer: chat_template is '{template}!' against '{template}'"


def test_a_tokenizer_that_takes_too_much_to_compare_is_refused(llamas, monkeypatch):
    monkeypatch.setattr(loading, "_MEMORY", 256 << 20)
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 17}
    toy.edit_json(llamas[0] / "tokenizer.json", decoder=rule)
    assert any(line.startswith("tokenizer.json: sha256") for line in compared(llamas))
    toy.edit_json(llamas[0] / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    toy.edit_json(llamas[0] / "tokenizer_config.json", extra_ids=10**9)
    with pytest.raises(ParentError, match="tokenizer of models:/a/1 cannot be loaded: it takes"):
        compared(llamas)


def test_the_fingerprint_of_an_evaluator_sees_special_tokens(llamas, tasks):
    (llamas[1] / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    toy.edit_json(llamas[1] / "tokenizer_config.json", eos_token=None)
    suite = load_suite("toy_letters", include_path=str(tasks))
    prints = {
        Evaluator(LiveModel(find_checkpoint(folder, "v"), "cpu"), suite, limit=2).fingerprint
        for folder in llamas
    }
    assert len(prints) == 2
