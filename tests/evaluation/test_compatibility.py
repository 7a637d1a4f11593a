import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

import toy
from mlflow_soup.errors import ParentError
from mlflow_soup.weights.checkpoint import SINGLE
from mlflow_soup.weights.compatibility import (
    CONFIG_MAY_DIFFER,
    TOKENIZER_FILES,
    TOKENIZER_MAY_DIFFER,
    check_compatible,
    differences,
)
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


@pytest.mark.parametrize("field", sorted(CONFIG_MAY_DIFFER))
def test_config_fields_that_do_not_change_the_model_may_differ(pair, field):
    toy.edit_json(pair[0] / "config.json", **{field: "one"})
    assert compared(pair) == []
    toy.edit_json(pair[1] / "config.json", **{field: "two"})
    assert compared(pair) == []


@pytest.mark.parametrize("field", sorted(TOKENIZER_MAY_DIFFER))
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


@pytest.mark.parametrize("file", TOKENIZER_FILES)
def test_tokenizer_files_are_compared_by_their_bytes(pair, file):
    for folder in pair:
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
    toy.edit_json(folder / "config.json", rotary_pct=0.5, transformers_version="4.0.0")
    bias = torch.zeros(3)
    toy.edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias, "more": bias.clone()})
    (folder / "tokenizer.json").write_text("{}")
    pair = [find_checkpoint(checkpoints[0], NAMES[0]), find_checkpoint(folder, NAMES[1])]
    lines = differences(*pair)
    assert "config.json: rotary_pct is absent against 0.5" in lines
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
    with pytest.raises(ParentError, match="and 200 more"):
        check_compatible([find_checkpoint(folder, folder.name) for folder in folders])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_all_weights_is_a_difference_in_each(checkpoints, folder, dtype):
    content = load_file(folder / SINGLE)
    toy.edit_tensors(folder, **{name: tensor.to(dtype) for name, tensor in content.items()})
    lines = differences(find_checkpoint(checkpoints[0], "v1"), find_checkpoint(folder, "v2"))
    assert [line.split()[1] for line in lines] == sorted(content)
    assert all(f" against {toy.DTYPES[dtype]} (" in line for line in lines)


def test_a_checkpoint_does_not_differ_from_itself(pair):
    found = find_checkpoint(pair[0], "v1")
    assert differences(found, found) == []
