import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from mlflow_soup import merge_checkpoints, verify
from mlflow_soup.errors import ParentError
from mlflow_soup.evaluation.compatibility import check_compatible
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.weights.checkpoint import INDEX, SINGLE, shorten
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.soup import write

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def weights():
    """Three small tensors; `shard` puts a and c into the first file, b into the second."""
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate("abc")}


@pytest.fixture
def bare(tmp_path):
    """A checkpoint of three tensors that a test may spoil."""
    return toy.bare(tmp_path / "bare", weights())


def test_a_plain_folder_is_found(checkpoints):
    found = find_checkpoint(checkpoints[0], "v1")
    assert found.weights == found.tokenizer == checkpoints[0]
    assert found.tensors["embed_out.weight"].dtype == "F32"
    assert found.tensors["embed_out.weight"].shape == (25, 48)


def test_mlflows_transformers_flavour_is_found(checkpoints, tmp_path):
    model, tokenizer = tmp_path / "model", tmp_path / "components" / "tokenizer"
    model.mkdir()
    tokenizer.mkdir(parents=True)
    for file in checkpoints[0].iterdir():
        shutil.copy(file, tokenizer if "token" in file.name else model)
    found = find_checkpoint(tmp_path, "v1")
    assert (found.weights, found.tokenizer) == (model, tokenizer)


def test_a_folder_below_artifacts_is_found(checkpoints, tmp_path):
    shutil.copytree(checkpoints[0], tmp_path / "artifacts" / "hf")
    assert find_checkpoint(tmp_path, "v1").weights == tmp_path / "artifacts" / "hf"


def test_tensors_have_the_order_of_their_data_not_of_their_names(tmp_path):
    tensors = {name: torch.tensor([float(i)]) for i, name in enumerate("zamy")}
    found = find_checkpoint(toy.bare(tmp_path / "bare", tensors), "v1")
    assert list(found.tensors) == list("zamy")
    assert [(name, tensor.item()) for name, tensor in found.read()] == [
        *zip("zamy", range(4), strict=True)
    ]


def test_shards_are_read_one_after_the_other(bare):
    found = find_checkpoint(toy.shard(bare), "v1")
    assert found.files() == [FIRST, SECOND]
    assert [(name, info.file) for name, info in found.tensors.items()] == [
        ("a", FIRST),
        ("c", FIRST),
        ("b", SECOND),
    ]
    read = dict(found.read())
    assert list(read) == ["a", "c", "b"]
    assert all(torch.equal(read[name], tensor) for name, tensor in weights().items())


def no_weights(folder):
    (folder / SINGLE).unlink()


def pickle(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def adapter(folder):
    (folder / SINGLE).unlink()
    (folder / "adapter_config.json").write_text("{}")


def adapter_beside_weights(folder):
    (folder / "adapter_config.json").write_text("{}")


def two_models(folder):
    shutil.copytree(folder, folder / "one")
    shutil.copytree(folder / "one", folder / "two")
    (folder / "config.json").unlink()


def own_code(folder):
    toy.edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def quantised(folder):
    toy.edit_json(folder / "config.json", quantization_config={"bits": 4})


def compressed(folder):
    toy.edit_json(folder / "config.json", compression_config={"format": "int-quantized"})


def eight_bit_floats(folder):
    scaled = torch.ones(4).to(torch.float8_e4m3fn)
    toy.lay_out(folder / SINGLE, {**weights(), "q_proj.weight": scaled})


def truncated(folder):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-10])


def not_safetensors(folder):
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1")


def no_tokenizer(folder):
    (folder / "tokenizer_config.json").unlink()


def no_values(folder):
    toy.edit_tensors(folder, a=torch.empty(0), b=torch.empty(0))


def compiled(folder):
    toy.edit_tensors(folder, **{"layer.0._orig_mod.weight": torch.ones(2)})


def parallel(folder):
    wrapped = {f"module.{name}": tensor for name, tensor in weights().items()}
    toy.lay_out(folder / SINGLE, wrapped)


def two_tokenizers(folder):
    for name in ("slow", "fast"):
        (folder / name).mkdir()
        shutil.copy(folder / "tokenizer_config.json", folder / name)
    no_tokenizer(folder)


def config_is_not_json(folder):
    (folder / "config.json").write_text("{")


def config_is_not_an_object(folder):
    (folder / "config.json").write_text("[1]")


def config_is_nested_too_deep(folder):
    (folder / "config.json").write_text('{"a":' * 100_000)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_weights, "0 folders with config.json and"),
        (pickle, "pickles are not read"),
        (adapter, "merge_and_unload"),
        (adapter_beside_weights, "an adapter beside its weights"),
        (two_models, "2 folders with config.json"),
        (own_code, "brings its own code.*auto_map"),
        (quantised, "is quantised.*quantization_config"),
        (compressed, "is quantised.*compression_config"),
        (eight_bit_floats, "is quantised.*\n.*q_proj.weight: F8_E4M3"),
        (truncated, "model.safetensors of models:/toy/1 is damaged"),
        (not_safetensors, "model.safetensors of models:/toy/1 is damaged"),
        (no_tokenizer, "0 folders with a tokenizer"),
        (two_tokenizers, "2 folders with a tokenizer"),
        (no_values, "has 2 tensors without values, the first a\n.*\n.*zero_to_fp32"),
        (compiled, "'_orig_mod.' in their names, as in layer.0._orig_mod.weight"),
        (parallel, r"'module.' in their names, as in module\.[abc].*\n.*\n.*model\.module"),
        (config_is_not_json, "config.json of models:/toy/1 cannot be read"),
        (config_is_not_an_object, "config.json of models:/toy/1 is not a JSON object"),
        (config_is_nested_too_deep, "config.json of models:/toy/1 cannot be read"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_a_reason(bare, spoil, words):
    spoil(bare)
    with pytest.raises(ParentError, match=words) as refusal:
        find_checkpoint(bare, "models:/toy/1")
    assert "models:/toy/1" in refusal.value.what
    assert refusal.value.exit_code == 4


def rename_in_index(folder, **files):
    """Change the file of tensors in the index; None removes them from it."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"] | files
    kept = {name: file for name, file in weight_map.items() if file is not None}
    toy.edit_json(folder / INDEX, weight_map=kept)


def in_the_wrong_shard(folder):
    rename_in_index(folder, b=FIRST, c=SECOND)


def missing_in_the_index(folder):
    rename_in_index(folder, c=None)


def in_no_shard(folder):
    rename_in_index(folder, d=SECOND)


def in_two_shards(folder):
    toy.lay_out(folder / SECOND, {"b": torch.ones(2, 3), "c": torch.ones(2, 3)})


def unlisted_shard(folder):
    toy.lay_out(folder / "model-00003-of-00003.safetensors", {"d": torch.ones(2)})


def single_file_beside_shards(folder):
    toy.lay_out(folder / SINGLE, weights())


def shard_missing(folder):
    (folder / SECOND).unlink()


def shard_is_a_link(folder):
    (folder / SECOND).rename(folder.parent / "elsewhere.safetensors")
    (folder / SECOND).symlink_to(folder.parent / "elsewhere.safetensors")


def shard_above(folder):
    shutil.copy(folder / SECOND, folder.parent)
    rename_in_index(folder, b=f"../{SECOND}")


def shard_is_the_folder_above(folder):
    rename_in_index(folder, b="..")


def shard_by_absolute_path(folder):
    rename_in_index(folder, b=str(folder / SECOND))


def no_weight_map(folder):
    toy.edit_json(folder / INDEX, weight_map=None)


def no_index(folder):
    (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (in_the_wrong_shard, rf"b is in {SECOND}, but the index says {FIRST}\n  \|     c is in"),
        (missing_in_the_index, f"c is in {FIRST}, but the index says nothing"),
        (in_no_shard, f"d is in no file, but the index says {SECOND}"),
        (in_two_shards, f"'c' of models:/toy/1 is in two files\n  where: {FIRST} and {SECOND}"),
        (shard_missing, f"names '{SECOND}', which is not a weight file in its folder"),
        (shard_is_a_link, f"{SECOND} of models:/toy/1 is a link"),
        (shard_above, f"names '../{SECOND}', which is not a weight file in its folder"),
        (shard_is_the_folder_above, r"names '\.\.', which is not a weight file in its folder"),
        (shard_by_absolute_path, "which is not a weight file in its folder"),
        (no_weight_map, "the index of models:/toy/1 names no weight file"),
        (no_index, f"has no index.*\n.*{FIRST}, {SECOND}"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(bare, spoil, words):
    spoil(toy.shard(bare))
    with pytest.raises(ParentError, match=words) as refusal:
        find_checkpoint(bare, "models:/toy/1")
    assert "models:/toy/1" in refusal.value.what


@pytest.mark.parametrize(
    ("put", "files", "over"),
    [
        (unlisted_shard, [FIRST, SECOND], ["model-00003-of-00003.safetensors"]),
        # transformers looks for it first
        (single_file_beside_shards, [SINGLE], [FIRST, SECOND, INDEX]),
    ],
)
def test_weights_that_transformers_does_not_read_are_passed_over(
    bare, tmp_path, caplog, put, files, over
):
    put(toy.shard(bare))
    found = find_checkpoint(bare, "v1")
    assert found.files() == files
    assert found.tensors.keys() == {"a", "b", "c"}
    assert [path.name for path in found.passed_over] == over
    found.tell_passed_over()
    assert [record.getMessage().partition(" is passed over")[0] for record in caplog.records] == [
        f"{name} of v1" for name in over
    ]
    (tmp_path / "soup").mkdir()
    write([found, found], (0.5, 0.5), tmp_path / "soup")
    weights_of_the_soup = {path.name for path in (tmp_path / "soup").glob("model*")}
    assert weights_of_the_soup == {*files} | {INDEX} - {*over}


def test_consolidated_weights_beside_one_file_are_passed_over(bare):
    shutil.copy(bare / SINGLE, bare / "consolidated.safetensors")
    found = find_checkpoint(bare, "v1")
    assert found.files() == [SINGLE]
    assert found.passed_over == (bare / "consolidated.safetensors",)


@pytest.mark.parametrize("home", ["", "model"])
def test_a_model_counts_and_not_the_checkpoints_below_it(bare, tmp_path, home):
    root = tmp_path / "root"
    shutil.copytree(bare, root / home)
    for step in (500, 1000):
        shutil.copytree(bare, root / home / f"checkpoint-{step}")
    found = find_checkpoint(root, "v1")
    assert found.weights == found.tokenizer == root / home
    assert [path.name for path in found.passed_over] == ["checkpoint-1000", "checkpoint-500"]
    (tmp_path / "soup").mkdir()
    write([found, found], (0.5, 0.5), tmp_path / "soup")
    assert not list((tmp_path / "soup").rglob("checkpoint-*"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"])
@pytest.mark.parametrize("home", ["", "components/tokenizer"])
def test_a_tokenizer_is_known_by_its_vocabulary(bare, name, home):
    (bare / "tokenizer_config.json").unlink()
    (bare / home).mkdir(parents=True, exist_ok=True)
    (bare / home / name).write_text("{}")
    assert find_checkpoint(bare, "v1").tokenizer == bare / home


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "auto_map"])
@pytest.mark.parametrize("nothing", [None, {}])
def test_a_field_that_says_nothing_is_no_reason_to_refuse(bare, key, nothing):
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {key: nothing}))
    assert find_checkpoint(bare, "v1").config[key] == nothing


def test_code_that_transformers_does_not_need_is_left_behind(folder, tmp_path):
    for file, code in (
        ("config.json", {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ):
        toy.edit_json(folder / file, auto_map=code)
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    live = LiveModel(find_checkpoint(folder, "v1"), "cpu")
    assert type(live.model).__name__ == "GPTNeoXForCausalLM"
    assert live.tokenizer("kam")["input_ids"]
    merge_checkpoints([folder, folder], [0.5, 0.5], tmp_path / "soup", digests=True)
    for file in ("config.json", "tokenizer_config.json"):
        before, after = (json.loads((f / file).read_text()) for f in (folder, tmp_path / "soup"))
        assert before.pop("auto_map")
        assert after == before
    assert not (tmp_path / "soup" / "evil.py").exists()
    assert {finding.verdict for finding in verify(tmp_path / "soup")} == {"ok", "skipped"}


def test_one_file_has_one_name(bare):
    (bare / SINGLE).rename(bare / "weights.safetensors")
    with pytest.raises(ParentError, match=rf"no index.*\n.*weights\.safetensors\n.*{SINGLE}"):
        find_checkpoint(bare, "v1")


def test_a_long_report_ends_with_a_count():
    lines = [str(number) for number in range(7)]
    assert shorten(lines, 7) == lines
    assert shorten(lines, 5) == ["0", "1", "2", "3", "4", "and 2 more"]


def test_an_index_wrong_about_many_tensors_gives_a_short_report(tmp_path):
    folder = toy.bare(tmp_path / "bare", {f"t{i:03}": torch.ones(1) for i in range(300)})
    toy.shard(folder)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    swapped = {name: SECOND if file == FIRST else FIRST for name, file in names.items()}
    toy.edit_json(folder / INDEX, weight_map=swapped)
    with pytest.raises(ParentError, match="and 200 more") as refusal:
        find_checkpoint(folder, "v1")
    assert len(str(refusal.value).splitlines()) < 110


def huge(folder, size):
    """A checkpoint of one huge tensor; only its header takes space on the disk."""
    toy.bare(folder, {})
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    with (folder / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + size)
    return folder


def test_checkpoints_larger_than_memory_are_compared_by_their_headers(tmp_path):
    sizes = (10**12, 10**12, 10**12 - 2)
    found = [
        find_checkpoint(huge(tmp_path / str(i), size), f"v{i}") for i, size in enumerate(sizes)
    ]
    assert found[0].tensors["w"].shape == (5 * 10**11,)
    check_compatible(found[:2])
    with pytest.raises(ParentError, match=re.escape("BF16 (500000000000,) against BF16 (49999")):
        check_compatible(found)


def longer(path):
    with path.open("ab") as file:
        file.write(b" ")


def touched(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def gone(path):
    path.unlink()


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", [FIRST, SECOND])
@pytest.mark.parametrize("change", [longer, touched, gone, replaced_by_a_folder])
def test_a_changed_checkpoint_is_refused_with_the_name_of_the_file(bare, file, change):
    found = find_checkpoint(toy.shard(bare), "models:/toy/1")
    found.check_unchanged()
    change(bare / file)
    with pytest.raises(ParentError, match=rf"^{file} of models:/toy/1 was changed"):
        found.check_unchanged()


def test_reading_does_not_count_as_a_change(bare):
    found = find_checkpoint(bare, "v1")
    assert {name: tensor.sum().item() for name, tensor in found.read()} == {"a": 0, "b": 6, "c": 12}
    found.check_unchanged()
    assert load_file(bare / SINGLE).keys() == found.tensors.keys()


def test_weights_that_are_a_link_are_refused(bare):
    (bare / SINGLE).rename(bare.parent / "elsewhere")
    (bare / SINGLE).symlink_to(bare.parent / "elsewhere")
    with pytest.raises(ParentError, match=f"{SINGLE} of models:/toy/1 is a link"):
        find_checkpoint(bare, "models:/toy/1")


def test_a_checkpoint_without_tokenizer_is_found_if_none_is_needed(bare):
    for path in bare.glob("*token*"):
        path.unlink()
    assert find_checkpoint(bare, "v1", with_tokenizer=False).tensors.keys() == {"a", "b", "c"}
    with pytest.raises(ParentError, match="0 folders with a tokenizer"):
        find_checkpoint(bare, "v1")


def test_parts_of_a_file_larger_than_memory_can_be_read(bare):
    size = 1 << 40
    header = {"hole": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (bare / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    ((name, tensor),) = find_checkpoint(bare, "v1", with_tokenizer=False).read()
    assert (name, len(tensor)) == ("hole", size // 2)
    assert tensor[-1].item() == 0.0


def test_a_checkpoint_without_tensors_is_refused(bare):
    save_file({}, bare / SINGLE, {"format": "pt"})
    with pytest.raises(ParentError, match="holds no tensors"):
        find_checkpoint(bare, "v1", with_tokenizer=False)
