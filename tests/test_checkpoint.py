import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from mlflow_soup import checkpoint, errors
from mlflow_soup.checkpoint import check_compatible, differences, digest, find, write


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(checkpoints[0], tmp_path / "spoilt")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, **tensors):
    path = folder / "model.safetensors"
    content = {**load_file(path), **tensors}
    save_file({k: v for k, v in content.items() if v is not None}, path, {"format": "pt"})


def shard(folder):
    """The same checkpoint in two files with an index."""
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(content)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: content[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in content.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    return folder


def test_a_plain_folder_is_found(checkpoints):
    found = find(checkpoints[0], "v1")
    assert found.weights == found.tokenizer == checkpoints[0]
    assert found.tensors["embed_out.weight"].dtype == "F32"
    assert found.tensors["embed_out.weight"].shape == (25, 48)


def test_mlflows_transformers_flavour_is_found(checkpoints, tmp_path):
    model, tokenizer = tmp_path / "model", tmp_path / "components" / "tokenizer"
    model.mkdir()
    tokenizer.mkdir(parents=True)
    for file in checkpoints[0].iterdir():
        shutil.copy(file, tokenizer if "token" in file.name else model)
    found = find(tmp_path, "v1")
    assert (found.weights, found.tokenizer) == (model, tokenizer)


def test_a_folder_below_artifacts_is_found(checkpoints, tmp_path):
    shutil.copytree(checkpoints[0], tmp_path / "artifacts" / "hf")
    assert find(tmp_path, "v1").weights == tmp_path / "artifacts" / "hf"


def test_the_digest_does_not_depend_on_sharding(checkpoints, folder):
    assert digest(find(shard(folder), "sharded")) == digest(find(checkpoints[0], "v1"))


@pytest.mark.parametrize("change", ["value", "name", "shape"])
def test_the_digest_tells_tensors_apart(checkpoints, folder, change):
    bias = load_file(folder / "model.safetensors")["gpt_neox.final_layer_norm.bias"].clone()
    if change == "value":
        bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
        edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias})
    elif change == "name":
        edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": None, "renamed": bias})
    else:
        edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias.reshape(2, 24)})
    assert digest(find(folder, "changed")) != digest(find(checkpoints[0], "v1"))


def test_a_soup_keeps_its_newest_parents_layout(checkpoints, folder, tmp_path):
    parents = [find(checkpoints[1], "v2"), find(shard(folder), "v1")]
    soup = write(parents, (0.25, 0.75), tmp_path / "soup")
    assert soup.tensors == parents[1].tensors
    assert {p.name for p in (tmp_path / "soup").iterdir()} == {p.name for p in folder.iterdir()}
    assert (tmp_path / "soup" / checkpoint.INDEX).read_bytes() == (
        folder / checkpoint.INDEX
    ).read_bytes()
    old, new = (dict(p.read()) for p in parents)
    for name, tensor in soup.read():
        expected = old[name] * torch.tensor(0.25) + new[name] * torch.tensor(0.75)
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_at_its_ends_the_soup_is_a_parent_byte_for_byte(checkpoints, tmp_path, lam):
    parents = [find(folder, folder.name) for folder in checkpoints[:2]]
    write(parents, (1 - lam, lam), tmp_path / "soup")
    parent = checkpoints[int(lam)]
    assert load_file(tmp_path / "soup" / "model.safetensors").keys() == parents[0].tensors.keys()
    assert digest(find(tmp_path / "soup", "soup")) == digest(find(parent, "parent"))


def test_the_file_is_the_same_each_time(checkpoints, tmp_path):
    parents = [find(folder, folder.name) for folder in checkpoints[:2]]
    for name in ("once", "twice"):
        write(parents, (0.3, 0.7), tmp_path / name)
    once, twice = (tmp_path / n / "model.safetensors" for n in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()


def test_neither_manifest_nor_card_of_a_soup_is_inherited(checkpoints, folder, tmp_path):
    for name in (checkpoint.MANIFEST, checkpoint.CARD, "registered_model_meta"):
        (folder / name).write_text("of the parent")
    write([find(checkpoints[1], "v2"), find(folder, "v1")], (0.5, 0.5), tmp_path / "soup")
    assert not (tmp_path / "soup" / checkpoint.MANIFEST).exists()
    assert not (tmp_path / "soup" / "registered_model_meta").exists()


def test_every_difference_is_in_one_report(checkpoints, folder):
    edit_config(folder, rotary_pct=0.5, transformers_version="4.0.0")
    bias = torch.zeros(3)
    edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias, "more": bias.clone()})
    (folder / "tokenizer.json").write_text("{}")
    lines = differences(find(checkpoints[0], "models:/a/1"), find(folder, "models:/a/2"))
    assert any("rotary_pct" in line and "0.5" in line for line in lines)
    assert "gpt_neox.final_layer_norm.bias: F32 (48,) against F32 (3,)" in lines
    assert "more: only in models:/a/2" in lines
    assert "tokenizer: tokenizer.json differs" in lines
    assert not any("transformers_version" in line for line in lines)
    with pytest.raises(errors.ParentError, match=r"only in models:/a/2\n"):
        check_compatible([find(checkpoints[0], "models:/a/1"), find(folder, "models:/a/2")])


def test_another_dtype_is_a_difference(checkpoints, folder):
    half = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    edit_tensors(folder, **half)
    with pytest.raises(errors.ParentError, match=r"F32 .* against BF16"):
        check_compatible([find(checkpoints[0], "v1"), find(folder, "v2")])


def test_checkpoints_of_one_run_do_not_differ(checkpoints):
    check_compatible([find(folder, folder.name) for folder in checkpoints])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(folder, value):
    bias = load_file(folder / "model.safetensors")["gpt_neox.final_layer_norm.bias"].clone()
    bias[7] = value
    edit_tensors(folder, **{"gpt_neox.final_layer_norm.bias": bias})
    with pytest.raises(errors.ParentError, match=r"final_layer_norm\.bias.*NaN or infinity"):
        digest(find(folder, "v1"))


def test_old_pythias_infinite_mask_is_let_through_and_copied(checkpoints, folder, tmp_path):
    name = "gpt_neox.layers.0.attention.masked_bias"
    second = shutil.copytree(checkpoints[1], tmp_path / "second")
    for at in (folder, second):
        edit_tensors(at, **{name: torch.tensor(-float("inf"), dtype=torch.float16)})
    parents = [find(folder, "v1"), find(second, "v2")]
    digest(parents[0])
    write(parents, (0.5, 0.5), tmp_path / "soup")
    assert load_file(tmp_path / "soup" / "model.safetensors")[name].item() == -float("inf")


def spoil(folder, how):
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "adapter":
        (folder / "model.safetensors").unlink()
        (folder / "adapter_config.json").write_text("{}")
    elif how == "two models":
        shutil.copytree(folder, folder / "again")
    elif how == "own code":
        edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    elif how == "quantised":
        edit_config(folder, quantization_config={"bits": 4})
    elif how == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])
    elif how == "no tokenizer":
        (folder / "tokenizer_config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "shard elsewhere":
        shard(folder)
        index = json.loads((folder / checkpoint.INDEX).read_text())
        index["weight_map"]["embed_out.weight"] = "../model-00001-of-00002.safetensors"
        (folder / checkpoint.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no weights", "0 folders with config.json and"),
        ("pickle", "pickles are not read"),
        ("adapter", "merge_and_unload"),
        ("two models", "2 folders"),
        ("own code", "brings its own code"),
        ("quantised", "is quantised"),
        ("truncated", "is damaged"),
        ("no tokenizer", "0 folders with a tokenizer"),
        ("config is no JSON", "cannot be read"),
        ("shard elsewhere", "no file beside it"),
    ],
)
def test_what_is_no_sound_checkpoint_is_refused_with_a_reason(folder, how, words):
    spoil(folder, how)
    with pytest.raises(errors.ParentError, match=words):
        find(folder, "models:/toy/1")


def test_links_are_not_copied_into_a_soup(checkpoints, folder, tmp_path):
    (folder / "notes.txt").symlink_to("/etc/passwd")
    with pytest.raises(errors.ParentError, match="holds a link"):
        write([find(checkpoints[1], "v2"), find(folder, "v1")], (0.5, 0.5), tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_soup_of_a_model_and_itself_is_that_model(checkpoints, tmp_path):
    parent = find(checkpoints[0], "v1")
    soup = write([parent, parent], (0.3, 0.7), tmp_path / "soup")
    assert digest(soup) == digest(parent)


def test_tied_weights_are_written_once(tmp_path, trained):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**{**trained.config.to_dict(), "tie_word_embeddings": True})
    for i in (1, 2):
        torch.manual_seed(i)
        toy.save(GPTNeoXForCausalLM(config), tmp_path / f"v{i}")
    parents = [find(tmp_path / f"v{i}", f"v{i}") for i in (1, 2)]
    soup = write(parents, (0.4, 0.6), tmp_path / "soup")
    assert soup.tensors.keys() == parents[0].tensors.keys()
    assert "embed_out.weight" not in soup.tensors
