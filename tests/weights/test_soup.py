"""The soup on disk: its bytes, its layout, the parents it refuses; it is complete or absent."""

import filecmp
import hashlib
import importlib
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import strategies as s
import toy
from mlflow_soup.errors import ParentError, StoreError
from mlflow_soup.files.durable import staged
from mlflow_soup.files.writer import BLOCK
from mlflow_soup.records import Mismatch
from mlflow_soup.weights import soup
from mlflow_soup.weights.checkpoint import SINGLE, Checkpoint
from mlflow_soup.weights.digests import digest, digest_all
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.inherit import belongs
from mlflow_soup.weights.manifest import CARD, MANIFEST
from mlflow_soup.weights.mix import mix, same_bytes
from mlflow_soup.weights.soup import compare

FLOATS = {
    "double": torch.float64,
    "single": torch.float32,
    "half": torch.float16,
    "brain": torch.bfloat16,
}


def write(parents, lam, folder, **options):
    folder.mkdir()
    return soup.write(parents, lam, folder, **options)


def opened(folders):
    return [find_checkpoint(folder, folder.name) for folder in folders]


def tensors_of(folder):
    return dict(find_checkpoint(folder, "read again").read())


def some_tensors(seed, **others):
    """A few tensors of each dtype; the integers are equal for every seed."""
    generator = torch.Generator().manual_seed(seed)
    floats = {
        f"{name}.{shape}": torch.randn(shape, generator=generator).to(dtype)
        for name, dtype in FLOATS.items()
        for shape in ((3, 5), (7,), (), (0, 4))
    }
    mask = {"mask": torch.tensor([True, False, True]), "steps": torch.tensor([[2, 2**40]])}
    return {**mask, **floats, **others}


@pytest.fixture
def pair(tmp_path):
    """The folders of two checkpoints that can be mixed."""
    return [toy.bare(tmp_path / f"v{i}", some_tensors(i)) for i in (1, 2)]


def test_a_soup_has_the_layout_of_its_newest_parent(checkpoints, folder, tmp_path):
    parents = [find_checkpoint(checkpoints[1], "v2"), find_checkpoint(toy.shard(folder), "v1")]
    written = write(parents, (0.25, 0.75), tmp_path / "soup").checkpoint
    assert written.tensors == parents[1].tensors
    assert list(written.tensors) == list(parents[1].tensors)
    assert {p.name for p in (tmp_path / "soup").iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "soup" / path.name).read_bytes() == path.read_bytes()
    old, new = (dict(p.read()) for p in parents)
    for name, tensor in written.read():
        expected = old[name] * torch.tensor(0.25) + new[name] * torch.tensor(0.75)
        assert torch.equal(tensor, expected)


def test_mlflows_transformers_flavour_is_kept(checkpoints, tmp_path):
    flavour = tmp_path / "flavour"
    (flavour / "model").mkdir(parents=True)
    (flavour / "components" / "tokenizer").mkdir(parents=True)
    for file in checkpoints[1].iterdir():
        below = "components/tokenizer" if "token" in file.name else "model"
        shutil.copy(file, flavour / below)
    (flavour / "MLmodel").write_text("flavors: {transformers: {}}")
    write(
        [find_checkpoint(checkpoints[0], "v1"), find_checkpoint(flavour, "v2")],
        (0.5, 0.5),
        tmp_path / "soup",
    )
    written = {path.relative_to(tmp_path / "soup") for path in (tmp_path / "soup").rglob("*")}
    assert written == {path.relative_to(flavour) for path in flavour.rglob("*")}
    assert find_checkpoint(tmp_path / "soup", "soup").weights == tmp_path / "soup" / "model"


def test_transformers_loads_a_soup_without_missing_tensors(checkpoints, tmp_path):
    write(opened(checkpoints[:2]), (0.25, 0.75), tmp_path / "soup")
    merged, report = GPTNeoXForCausalLM.from_pretrained(tmp_path / "soup", output_loading_info=True)
    assert not any(report.values())
    old, new = (GPTNeoXForCausalLM.from_pretrained(f).state_dict() for f in checkpoints[:2])
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, old[name] * 0.25 + new[name] * 0.75)


@pytest.mark.parametrize("lam", [(0.3, 0.7), (0.5, 0.5), (0.9999, 0.0001)])
def test_every_tensor_equals_the_kernels_mix_of_the_parents(pair, tmp_path, lam):
    write(opened(pair), lam, tmp_path / "soup")
    old, new = map(tensors_of, pair)
    merged = tensors_of(tmp_path / "soup")
    assert list(merged) == list(new)
    assert all(same_bytes(merged[name], mix([old[name], new[name]], lam)) for name in new)


def test_three_parents_make_one_soup(pair, tmp_path):
    pair.append(toy.bare(tmp_path / "v3", some_tensors(3)))
    lam = (0.2, 0.3, 0.5)
    written = write(opened(pair), lam, tmp_path / "soup")
    assert len(written.parents) == 3
    contents, merged = list(map(tensors_of, pair)), tensors_of(tmp_path / "soup")
    for name, tensor in merged.items():
        assert same_bytes(tensor, mix([content[name] for content in contents], lam))


@st.composite
def families(draw):
    """The tensors of two parents, of any dtypes and bits, in any order."""
    dtypes = draw(st.lists(st.sampled_from(sorted(FLOATS.values(), key=str)), max_size=5))
    some = (s.parents(dtype).filter(lambda both: both[0].shape != (0,)) for dtype in dtypes)
    drawn = [draw(parents) for parents in some]  # a vector without values is refused
    bools = draw(st.integers(0, 5))
    drawn.insert(draw(st.integers(0, len(drawn))), [torch.ones(bools, dtype=torch.bool)] * 2)
    return [{f"t{i}": both[parent] for i, both in enumerate(drawn)} for parent in (0, 1)]


@given(both=families(), recipe=s.recipes())
@s.FEW
def test_any_tensors_equal_the_kernels_mix(both, recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    folders = [toy.bare(root / f"v{i}", tensors) for i, tensors in enumerate(both)]
    write(opened(folders), recipe.lam, root / "soup")
    merged = tensors_of(root / "soup")
    assert list(merged) == list(both[0])
    for name, tensor in merged.items():
        assert same_bytes(tensor, mix([tensors[name] for tensors in both], recipe.lam))


def test_tensors_may_be_longer_than_the_writers_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_soup.files.writer.BUFFER", 2 * BLOCK)
    odd = torch.tensor([True] * 3)  # the next tensors cross the ends of the buffers
    both = [{"mask": odd, "w": torch.randn(99_999), "b": torch.randn(777).half()} for _ in "12"]
    folders = [toy.bare(tmp_path / f"v{i}", tensors) for i, tensors in enumerate(both)]
    written = write(opened(folders), (0.3, 0.7), tmp_path / "soup")
    for name, tensor in tensors_of(tmp_path / "soup").items():
        assert same_bytes(tensor, mix([tensors[name] for tensors in both], (0.3, 0.7)))
    assert written.digests == digest_all(find_checkpoint(tmp_path / "soup", "soup"))


def test_tensors_at_odd_offsets_are_mixed_right(tmp_path):
    def parent(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "mask": torch.tensor([True, False, True]),
            "half": torch.randn(1001, generator=generator).half(),
            "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
            "brain": torch.randn(333, 3, generator=generator).bfloat16(),
            "short": torch.tensor([65535], dtype=torch.uint16),
            "single": torch.randn(501, generator=generator),
            "double": torch.randn(77, generator=generator).double(),
        }

    folders = [toy.bare(tmp_path / f"v{i}", parent(i)) for i in (1, 2)]
    content = (folders[1] / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["half"]["data_offsets"][0] % 2 == 1
    written = write(opened(folders), (0.3, 0.7), tmp_path / "soup")
    merged = tensors_of(tmp_path / "soup")
    assert list(merged) == list(parent(1))
    for name, tensor in merged.items():
        assert same_bytes(tensor, mix([parent(1)[name], parent(2)[name]], (0.3, 0.7)))
    assert written.digests == digest_all(find_checkpoint(tmp_path / "soup", "soup"))
    assert list(compare(opened(folders), (0.3, 0.7), written.checkpoint)) == []


def test_the_only_metadata_is_the_format(pair, tmp_path):
    save_file(load_file(pair[1] / SINGLE), pair[1] / SINGLE, {"format": "pt", "step": "12"})
    write(opened(pair), (0.5, 0.5), tmp_path / "soup")
    with safe_open(tmp_path / "soup" / SINGLE, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_data_begin_at_a_block(pair, tmp_path):
    write(opened(pair), (0.5, 0.5), tmp_path / "soup")
    content = (tmp_path / "soup" / SINGLE).read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % BLOCK == 0


def test_the_soup_does_not_depend_on_the_files_of_the_older_parent(pair, tmp_path):
    write(opened(pair), (0.3, 0.7), tmp_path / "whole")
    toy.shard(pair[0])
    write(opened(pair), (0.3, 0.7), tmp_path / "sharded")
    assert (tmp_path / "whole" / SINGLE).read_bytes() == (
        tmp_path / "sharded" / SINGLE
    ).read_bytes()


def test_the_digest_does_not_depend_on_the_files_of_the_newest_parent(pair, tmp_path):
    whole = write(opened(pair), (0.3, 0.7), tmp_path / "whole")
    toy.shard(pair[1])
    sharded = write(opened(pair), (0.3, 0.7), tmp_path / "sharded")
    assert sharded.checkpoint.files() == find_checkpoint(pair[1], "v2").files()
    assert sharded.digests.canonical == whole.digests.canonical


WRITE = """
import sys
from pathlib import Path
import torch
import transformers
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.soup import write
threads, folder, *parents = sys.argv[1:]
torch.set_num_threads(int(threads))
Path(folder).mkdir()
write([find_checkpoint(Path(parent), parent) for parent in parents], (0.3, 0.7), Path(folder))
"""


def test_the_files_are_the_same_in_every_process(tmp_path):
    def parent(seed):  # tensors long enough for several threads
        generator = torch.Generator().manual_seed(seed)
        long = {
            f"{name}.{i}": torch.randn(300_000 + i, generator=generator).to(dtype)
            for name, dtype in FLOATS.items()
            for i in (0, 1)
        }
        return some_tensors(seed, **long)

    folders = [toy.shard(toy.bare(tmp_path / f"v{i}", parent(i))) for i in (1, 2)]
    runs = [("1", "0"), ("2", "1"), ("8", "4711")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, threads, tmp_path / threads, *folders],
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for threads, seed in runs
    ]
    assert [process.wait() for process in started] == [0] * len(runs)
    here = write(opened(folders), (0.3, 0.7), tmp_path / "here")
    for threads, _ in runs:
        assert same_trees(tmp_path / threads, tmp_path / "here")
    assert len(here.digests.files) == 2


def same_trees(first, second):
    """True if two folders hold the same files with the same bytes."""
    names = [
        sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
        for root in (first, second)
    ]
    return names[0] == names[1] and all(
        filecmp.cmp(first / name, second / name, shallow=False) for name in names[0]
    )


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_with_a_weight_of_one_the_soup_is_that_parent_byte_for_byte(pair, tmp_path, lam):
    # the integers of the other parent do not matter then
    toy.edit_tensors(pair[0], mask=torch.tensor([False, False, True]))
    write(opened(pair), (1 - lam, lam), tmp_path / "soup")
    parent, merged = tensors_of(pair[int(lam)]), tensors_of(tmp_path / "soup")
    assert merged.keys() == parent.keys()
    assert all(same_bytes(merged[name], parent[name]) for name in parent)


def test_a_soup_of_a_model_and_itself_is_that_model(checkpoints, tmp_path):
    parent = find_checkpoint(checkpoints[0], "v1")
    written = write([parent, parent], (0.3, 0.7), tmp_path / "soup")
    assert digest(written.checkpoint) == digest(parent)


def test_tied_weights_are_written_once(tmp_path, trained):
    config = GPTNeoXConfig(**{**trained.config.to_dict(), "tie_word_embeddings": True})
    for i in (1, 2):
        torch.manual_seed(i)
        toy.save(GPTNeoXForCausalLM(config), tmp_path / f"v{i}")
    parents = opened([tmp_path / "v1", tmp_path / "v2"])
    written = write(parents, (0.4, 0.6), tmp_path / "soup").checkpoint
    assert written.tensors.keys() == parents[0].tensors.keys()
    assert "embed_out.weight" not in written.tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_the_digests_are_those_of_the_files(pair, tmp_path, sharded):
    if sharded:
        toy.shard(pair[1])
    parents = opened(pair)
    written = write(parents, (0.3, 0.7), tmp_path / "soup")
    assert written.digests == digest_all(find_checkpoint(tmp_path / "soup", "soup"))
    assert written.parents == tuple(map(digest_all, parents))
    for found, at in zip(
        (written.digests, *written.parents), (tmp_path / "soup", *pair), strict=True
    ):
        assert found.files == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in at.glob("*.safetensors")
        }


def test_a_soup_without_digests_has_the_same_bytes(pair, tmp_path):
    write(opened(pair), (0.3, 0.7), tmp_path / "with")
    written = write(opened(pair), (0.3, 0.7), tmp_path / "without", digests=False)
    assert written.digests is None
    assert written.parents == (None, None)
    assert same_trees(tmp_path / "with", tmp_path / "without")


OF_THE_MODEL = [
    *("generation_config.json", "special_tokens_map.json", "tokenizer.model", "qwen.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.4.0.json"),
    *("LICENSE", "LLAMA_LICENCE.txt", "NOTICE.md", "USE_POLICY.md", "MLmodel", "metadata/MLmodel"),
    *("conda.yaml", "input_example.json", "code/evil.py", "code/own/words.txt"),
    *("components/processor/preprocessor_config.json", "components/tokenizer/tokenizer.json"),
]
OF_THE_PARENT = [
    *(MANIFEST, CARD, "registered_model_meta", "model.sig", ".gitattributes", ".git/config"),
    # weights in other formats
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "model.safetensors.bak"),
    *("tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "consolidated.00.pth", "params.json"),
    # the state of the training
    *("optimizer.pt", "optimizer/state.json", "scheduler.json", "trainer_state.json"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "random_states_0.pkl", "latest", "rng_state_0.pth"),
    *("checkpoint-500/config.json", "checkpoint-500/tokenizer.json", "training_args.bin"),
    # results, logs and caches
    *(
        "eval_results.json",
        "all_results.json",
        "train.log",
        "events.out.tfevents.1",
        "notes/on.txt",
    ),
    *(
        "runs/1/events.out",
        "wandb/config.yaml",
        "__pycache__/a.pyc",
        "modeling_own.py",
        "core.1234",
    ),
]


def test_a_soup_inherits_what_belongs_to_a_model_and_nothing_else(pair, tmp_path):
    for name in (*OF_THE_MODEL, *OF_THE_PARENT):
        (pair[1] / name).parent.mkdir(parents=True, exist_ok=True)
        (pair[1] / name).write_text("{}")
    (pair[0] / "NOTICE").touch()  # of the older parent
    write(opened(pair), (0.5, 0.5), tmp_path / "soup")
    written = {
        str(path.relative_to(tmp_path / "soup"))
        for path in (tmp_path / "soup").rglob("*")
        if path.is_file()
    }
    assert written == {SINGLE, "config.json", "tokenizer_config.json", *OF_THE_MODEL}


@pytest.mark.slow
def test_what_any_tokenizer_of_transformers_loads_is_inherited():
    names = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    for module in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".tokenization_" not in module.name:
            continue
        try:
            found = vars(importlib.import_module(module.name)).values()
        except (ImportError, NameError):  # it needs a package that is not installed
            continue
        for kind in found:
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase):
                names |= set(kind.vocab_files_names.values())
    assert len(names) > 20
    assert [name for name in names if not belongs(name)] == []


def test_files_beside_the_weights_take_no_memory(pair, tmp_path):
    for name, size in (("train.log", 1 << 40), ("code/words.bin", 300 << 20)):
        (pair[1] / name).parent.mkdir(exist_ok=True)
        (pair[1] / name).touch()
        os.truncate(pair[1] / name, size)
    tracemalloc.start()
    write(opened(pair), (0.5, 0.5), tmp_path / "soup")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000  # of which 16 MB are the buffers for the weights
    assert (tmp_path / "soup" / "code" / "words.bin").stat().st_size == 300 << 20


def file_link(folder):
    (folder / "notes" / "passwd.txt").symlink_to("/etc/passwd")


def folder_link(folder):
    (folder / "notes" / "etc").symlink_to("/etc")


def pipe(folder):
    os.mkfifo(folder / "notes" / "pipe")


@pytest.mark.parametrize(
    ("put", "what"), [(file_link, "a link"), (folder_link, "a link"), (pipe, "neither a file")]
)
def test_links_and_pipes_are_not_copied_into_a_soup(pair, tmp_path, put, what):
    (pair[1] / "notes").mkdir()
    put(pair[1])
    with pytest.raises(ParentError, match=f"v2 holds .*{what}"):
        write(opened(pair), (0.5, 0.5), tmp_path / "soup")
    assert list((tmp_path / "soup").iterdir()) == []


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor_and_parent(tmp_path, name, guilty, value):
    contents = [{name: torch.randn(9_999).to(FLOATS[name]), "fine": torch.ones(3)} for _ in "12"]
    contents[guilty][name][4_711] = value
    folders = [toy.bare(tmp_path / f"v{i}", content) for i, content in enumerate(contents)]
    with pytest.raises(ParentError, match=rf"^'{name}' of v{guilty} holds NaN or inf") as refusal:
        write(opened(folders), (0.3, 0.7), tmp_path / "soup")
    assert refusal.value.exit_code == 4
    assert str(folders[guilty] / SINGLE) == refusal.value.where


def test_infinities_that_are_equal_in_all_parents_are_refused_too(tmp_path):
    content = {"w": torch.tensor([1.0, float("inf")])}
    folders = [toy.bare(tmp_path / f"v{i}", content) for i in (1, 2)]
    with pytest.raises(ParentError, match="'w' of v1 holds NaN or infinity"):
        write(opened(folders), (0.3, 0.7), tmp_path / "soup")


def test_a_soup_that_overflows_blames_no_single_parent(tmp_path):
    largest = torch.finfo(torch.float32).max
    folders = [toy.bare(tmp_path / f"v{i}", {"w": torch.tensor([largest, i])}) for i in (1, 2, 3)]
    with pytest.raises(ParentError, match="'w' of the soup exceeds the largest number") as refusal:
        write(opened(folders), (0.01, 0.5, 0.49), tmp_path / "soup")
    assert refusal.value.where == "v1 and v2 and v3"


def test_old_pythias_infinite_mask_is_accepted_and_copied(checkpoints, folder, tmp_path):
    name = "gpt_neox.layers.0.attention.masked_bias"
    second = shutil.copytree(checkpoints[1], tmp_path / "second")
    for at in (folder, second):
        toy.edit_tensors(at, **{name: torch.tensor(-float("inf"), dtype=torch.float16)})
    parents = [find_checkpoint(folder, "v1"), find_checkpoint(second, "v2")]
    written = write(parents, (0.5, 0.5), tmp_path / "soup")
    assert load_file(tmp_path / "soup" / SINGLE)[name].item() == -float("inf")
    assert digest(written.checkpoint) == written.digests.canonical


@pytest.mark.parametrize("name", ["mask", "steps"])
def test_integers_that_differ_are_refused_by_name(pair, tmp_path, name):
    toy.edit_tensors(pair[0], **{name: ~tensors_of(pair[0])[name]})
    with pytest.raises(ParentError, match=f"parents differ in '{name}'"):
        write(opened(pair), (0.5, 0.5), tmp_path / "soup")


def other_values(path):
    content = load_file(path)
    save_file({**content, "single.(7,)": content["single.(7,)"] + 1}, path)
    later(path)


def other_tensors(path):
    save_file({"else": torch.ones(3)}, path)
    later(path)


def later(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


def missing(path):
    path.unlink()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("change", [other_values, other_tensors, later, cut_short, missing])
def test_a_parent_that_changed_before_the_merge_is_refused_by_name(pair, tmp_path, number, change):
    parents = opened(pair)
    change(pair[number] / SINGLE)
    with pytest.raises(ParentError, match=rf"^{SINGLE} of v{number + 1} was changed"):
        write(parents, (0.3, 0.7), tmp_path / "soup")


class StillTraining(Checkpoint):
    """A checkpoint that its training run saves again while it is read."""

    def read(self):
        yield from super().read()
        later(self.weights / SINGLE)


@pytest.mark.parametrize("number", [0, 1])
def test_a_parent_that_changes_while_it_is_read_is_refused_by_name(pair, tmp_path, number):
    parents = opened(pair)
    parents[number] = StillTraining(**vars(parents[number]))
    with pytest.raises(ParentError, match=rf"^{SINGLE} of v{number + 1} was changed"):
        write(parents, (0.3, 0.7), tmp_path / "soup", digests=False)


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(pair, mount):
    disk = mount("tmpfs", "size=4k")
    with pytest.raises(StoreError, match=r"MB are needed, but only 0\.0 MB are free"):
        write(opened(pair), (0.5, 0.5), disk / "soup")
    assert list((disk / "soup").iterdir()) == []


def test_a_disk_that_fills_during_the_merge_is_reported_and_nothing_is_left(tmp_path, mount):
    class WithANeighbour(Checkpoint):
        def read(self):
            (disk / "theirs").write_bytes(bytes(300_000))
            return super().read()

    content = {"w": torch.randn(100_000)}
    folders = [toy.bare(tmp_path / f"v{i}", content) for i in (1, 2)]
    disk = mount("tmpfs", "size=600k")
    parents = opened(folders)
    parents[0] = WithANeighbour(**vars(parents[0]))
    with (
        pytest.raises(StoreError, match=rf"^{SINGLE} cannot be written: No space") as full,
        staged(disk / "soup") as folder,
    ):
        soup.write(parents, (0.3, 0.7), folder)
    assert full.value.exit_code == 6
    assert [path.name for path in disk.iterdir()] == ["theirs"]


# -- compare ---------------------------------------------------------------------------------------


def test_a_sound_soup_has_no_mismatch(pair, tmp_path):
    written = write(opened(pair), (0.3, 0.7), tmp_path / "soup").checkpoint
    assert list(compare(opened(pair), (0.3, 0.7), written)) == []


def test_a_soup_in_other_files_has_no_mismatch(pair, tmp_path):
    write(opened(pair), (0.3, 0.7), tmp_path / "soup")
    toy.shard(tmp_path / "soup")
    toy.shard(pair[0])
    resharded = find_checkpoint(tmp_path / "soup", "soup")
    assert list(compare(opened(pair), (0.3, 0.7), resharded)) == []


def test_other_merge_weights_give_a_mismatch_in_every_mixed_tensor(pair, tmp_path):
    written = write(opened(pair), (0.3, 0.7), tmp_path / "soup").checkpoint
    found = {m.tensor for m in compare(opened(pair), (0.5, 0.5), written)}
    assert found == {
        name
        for name, info in written.tensors.items()
        if info.dtype[0] in "FB" and 0 not in info.shape and name != "mask"
    }


def flip(folder, name, element, bit):
    """Flip one bit of one element in a soup's file; return the element's bits before and after."""
    path = folder / SINGLE
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    info = json.loads(content[8:begin])[name]
    first, end = (begin + offset for offset in info["data_offsets"])
    width = 1
    for size in info["shape"]:
        width *= size
    width = (end - first) // width
    at = slice(first + element * width, first + (element + 1) * width)
    before = int.from_bytes(content[at], "little")
    after = before ^ 1 << bit
    content[at] = after.to_bytes(width, "little")
    path.write_bytes(content)
    return f"0x{before:0{2 * width}x}", f"0x{after:0{2 * width}x}"


SHAPES = {
    "double": (20, 30),
    "single": (20, 30),
    "half": (600,),
    "brain": (5, 4, 30),
    "steps": (600,),
    "mask": (2, 300),
}


@pytest.fixture
def long_pair(tmp_path):
    """Two checkpoints whose tensors have 600 elements; `compare` mixes 100 at a time."""

    def parent(seed):
        generator = torch.Generator().manual_seed(seed)
        floats = {
            name: torch.randn(SHAPES[name], generator=generator).to(dtype)
            for name, dtype in FLOATS.items()
        }
        steps = torch.arange(-300, 300)
        return {"mask": (steps % 7 > 2).reshape(SHAPES["mask"]), "steps": steps, **floats}

    return [toy.bare(tmp_path / f"v{i}", parent(i)) for i in (1, 2)]


@pytest.mark.parametrize("element", [0, 99, 100, 311, 599])
@pytest.mark.parametrize("name", SHAPES)
def test_one_flipped_bit_is_found(long_pair, tmp_path, monkeypatch, name, element):
    monkeypatch.setattr(soup, "_COMPARED", 100)
    write(opened(long_pair), (0.3, 0.7), tmp_path / "soup", digests=False)
    width = {"double": 64, "steps": 64, "single": 32, "half": 16, "brain": 16, "mask": 1}[name]
    for bit in {0, width // 2, width - 1}:
        expected, found = flip(tmp_path / "soup", name, element, bit)
        # the index, by NumPy
        index, shape = [], SHAPES[name]
        rest = element
        for size in reversed(shape):
            rest, place = divmod(rest, size)
            index.insert(0, place)
        damaged = find_checkpoint(tmp_path / "soup", "soup")
        assert list(compare(opened(long_pair), (0.3, 0.7), damaged)) == [
            Mismatch(name, 1, tuple(index), expected, found)
        ]
        flip(tmp_path / "soup", name, element, bit)
    assert (
        list(compare(opened(long_pair), (0.3, 0.7), find_checkpoint(tmp_path / "soup", "soup")))
        == []
    )


def test_a_flipped_bit_of_a_single_number_is_found(pair, tmp_path):
    write(opened(pair), (0.3, 0.7), tmp_path / "soup")
    bits = flip(tmp_path / "soup", "single.()", 0, 22)
    damaged = find_checkpoint(tmp_path / "soup", "soup")
    assert list(compare(opened(pair), (0.3, 0.7), damaged)) == [Mismatch("single.()", 1, (), *bits)]


def test_all_differing_elements_are_counted_and_the_first_is_shown(
    long_pair, tmp_path, monkeypatch
):
    monkeypatch.setattr(soup, "_COMPARED", 100)
    write(opened(long_pair), (0.3, 0.7), tmp_path / "soup")
    first, *_ = [flip(tmp_path / "soup", "half", at, 3) for at in (205, 207, 400, 599)]
    other = flip(tmp_path / "soup", "single", 7, 31)
    damaged = find_checkpoint(tmp_path / "soup", "soup")
    assert list(compare(opened(long_pair), (0.3, 0.7), damaged)) == [
        Mismatch("half", 4, (205,), *first),
        Mismatch("single", 1, (0, 7), *other),
    ]


def test_nan_in_a_soup_is_found(long_pair, tmp_path):
    write(opened(long_pair), (0.3, 0.7), tmp_path / "soup")
    spoilt = tensors_of(tmp_path / "soup")["single"].clone()
    spoilt[3, 4] = float("nan")
    toy.edit_tensors(tmp_path / "soup", single=spoilt)
    (found,) = compare(opened(long_pair), (0.3, 0.7), find_checkpoint(tmp_path / "soup", "soup"))
    assert (found.count, found.index, found.found) == (1, (3, 4), "0x7fc00000")


@pytest.mark.parametrize(
    ("changes", "expected", "found"),
    [
        ({"half": None}, "F16 (600,)", "absent"),
        ({"half": torch.zeros(599).half()}, "F16 (600,)", "F16 (599,)"),
        ({"half": torch.zeros(600).bfloat16()}, "F16 (600,)", "BF16 (600,)"),
        ({"half": torch.zeros(600, 1).half()}, "F16 (600,)", "F16 (600, 1)"),
    ],
    ids=["missing", "size", "dtype", "shape"],
)
def test_a_tensor_of_another_dtype_or_shape_is_reported_with_both(
    long_pair, tmp_path, changes, expected, found
):
    write(opened(long_pair), (0.3, 0.7), tmp_path / "soup")
    toy.edit_tensors(tmp_path / "soup", **changes)
    changed = find_checkpoint(tmp_path / "soup", "soup")
    assert list(compare(opened(long_pair), (0.3, 0.7), changed)) == [
        Mismatch("half", 0, (), expected, found)
    ]


def test_a_tensor_that_no_parent_has_is_reported(long_pair, tmp_path):
    write(opened(long_pair), (0.3, 0.7), tmp_path / "soup")
    toy.edit_tensors(tmp_path / "soup", backdoor=torch.zeros(2, 2))
    changed = find_checkpoint(tmp_path / "soup", "soup")
    assert list(compare(opened(long_pair), (0.3, 0.7), changed)) == [
        Mismatch("backdoor", 0, (), "absent", "F32 (2, 2)")
    ]


# -- kill -9 ---------------------------------------------------------------------------------------

# forking one process is faster than starting many that import PyTorch
KILLED = """
import os, signal, sys, time
from pathlib import Path
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.files.durable import staged
from mlflow_soup.weights.soup import write
out, *parents = map(Path, sys.argv[1:])
for line in sys.stdin:
    begun = time.monotonic()
    child = os.fork()
    if not child:
        with staged(out) as folder:
            write([find_checkpoint(parent, parent.name) for parent in parents], (0.3, 0.7), folder)
        os._exit(0)
    if line != "never\\n":
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(status, time.monotonic() - begun, flush=True)
"""


def test_after_a_kill_the_soup_is_complete_or_absent_and_the_next_run_cleans_up(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = [
        toy.shard(
            toy.bare(
                tmp_path / f"v{i}",
                {f"t{n}": torch.randn(2_000_000, generator=generator) for n in range(8)},
            )
        )
        for i in (1, 2)
    ]
    place, expected = tmp_path / "place", tmp_path / "expected"
    place.mkdir()
    out = place / "soup"
    command = [sys.executable, "-c", KILLED, out, *folders]
    rng = random.Random(0)
    midway = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(moment):
            process.stdin.write(f"{moment}\n")
            process.stdin.flush()
            status, took = process.stdout.readline().split()
            return int(status), float(took)

        status, took = run("never")
        assert status == 0
        out.rename(expected)
        until = time.monotonic() + 40  # about six seconds on an idle machine
        while midway < (12 if time.monotonic() < until else 1):
            assert time.monotonic() < until + 300
            _, lasted = run(rng.uniform(0, 1.1 * took))
            remains = [path for path in place.iterdir() if path != out]
            assert len(remains) <= 1  # the remains of the killed process; older ones were removed
            if out.exists():
                assert same_trees(out, expected)
                shutil.rmtree(out)
                took = min(took, lasted)  # the first may have been slow
            elif any(path.stat().st_size for left in remains for path in left.glob("*.s*")):
                midway += 1
        status, _ = run("never")
        assert status == 0
        process.stdin.close()
    assert [path.name for path in place.iterdir()] == ["soup"]
    assert same_trees(out, expected)
    for folder in (*folders, place, expected):  # pytest would keep these 250 MB
        shutil.rmtree(folder)
