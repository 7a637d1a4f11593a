import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion

import toy
from mlflow_soup import errors
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.search.space import Space
from mlflow_soup.weights import soup
from mlflow_soup.weights.find import find_checkpoint

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 25,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt_neox tied": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=25)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=16, head_dim=8)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**EXPERTS)),
}
IDS = torch.arange(20)[None]


def save_pair(family, dtype, root):
    """Save two checkpoints with some equal tensors, like an expert that no token was routed to."""
    folders = []
    for i in (1, 2):
        torch.manual_seed(i)
        folders.append(toy.save(FAMILIES[family]().to(dtype), root / f"v{i}"))
    shared, content = (load_file(folder / "model.safetensors") for folder in folders)
    agree = {name: tensor for name, tensor in shared.items() if ".1." in name}
    save_file({**content, **agree}, folders[1] / "model.safetensors", {"format": "pt"})
    return folders


def link(live, folders):
    return live.link([find_checkpoint(folder, folder.name) for folder in folders])


def merge(folders, lam, out):
    out.mkdir()
    return soup.write([find_checkpoint(folder, folder.name) for folder in folders], lam, out)


def reload(folder, live):
    """Load the model from a folder, onto the device of the live model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return loaded.to(live.model.device)


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_model_is_the_written_file_bit_for_bit(tmp_path, family, dtype):
    folders = save_pair(family, dtype, tmp_path)
    live = LiveModel(find_checkpoint(folders[0], "v1"))
    links = link(live, folders)
    live.set_weights(links, (0.9, 0.1))
    live.set_weights(links, (0.37, 0.63))
    merge(folders, (0.37, 0.63), tmp_path / "soup")
    reloaded = reload(tmp_path / "soup", live)
    expected = reloaded.state_dict()
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(live.model), logits(reloaded))
    assert not torch.equal(
        logits(live.model), logits(LiveModel(find_checkpoint(folders[1], "v2")).model)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_window_of_sixteen_is_the_written_file_on_any_number_of_threads(tmp_path, dtype, threads):
    folders = []
    for i in range(18):
        torch.manual_seed(i)
        folders.append(toy.save(FAMILIES["llama"]().to(dtype), tmp_path / f"v{i}"))
    weights = [0.0, 0.0, *np.diff((np.arange(17) / 16) ** 1.5)]  # two before the window
    lam = Space(18, 0.0).recipe(weights).lam
    merge(folders[2:], lam[2:], tmp_path / "soup")  # by the threads of this test run
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        live = LiveModel(find_checkpoint(folders[0], "v0"))
        live.set_weights(link(live, folders), lam)
        expected = reload(tmp_path / "soup", live).state_dict()
        for name, tensor in live.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    finally:
        torch.set_num_threads(before)


def old_pythia(folder):
    """Add the buffers of a transformers 4 GPTNeoX checkpoint, and rename `dtype` in the config."""
    path = folder / "model.safetensors"
    content = load_file(path)
    for layer in range(SMALL["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        content[f"{attention}.bias"] = mask
        content[f"{attention}.masked_bias"] = torch.tensor(float("-inf"), dtype=torch.float16)
        content[f"{attention}.rotary_emb.inv_freq"] = torch.rand(
            4, generator=torch.Generator().manual_seed(1)
        )
    save_file(content, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_old_pythias_buffers_are_kept_and_do_no_harm(tmp_path):
    folders = [old_pythia(f) for f in save_pair("gpt_neox", torch.float16, tmp_path)]
    live = LiveModel(find_checkpoint(folders[0], "v1"))
    live.set_weights(link(live, folders), (0.4, 0.6))
    merge(folders, (0.4, 0.6), tmp_path / "soup")
    written = load_file(tmp_path / "soup" / "model.safetensors")
    parent = load_file(folders[1] / "model.safetensors")
    assert written.keys() == parent.keys()
    for name in (n for n in parent if "attention." in n and "query" not in n and "dense" not in n):
        assert torch.equal(written[name], parent[name])
    reloaded = reload(tmp_path / "soup", live)
    assert torch.equal(logits(live.model), logits(reloaded))
    assert torch.isfinite(logits(reloaded)).all()


def edit_all(folders, change):
    """Change the tensors of each checkpoint: `change` gets them, and a generator of its own."""
    for seed, folder in enumerate(folders):
        path = folder / "model.safetensors"
        content = change(load_file(path), torch.Generator().manual_seed(seed))
        save_file(content, path, {"format": "pt"})


def check_live_and_file(folders, tmp_path):
    """The live model has the bits of the written soup, which has the parents' tensors."""
    live = LiveModel(find_checkpoint(folders[1], "v2"))
    live.set_weights(link(live, folders), (0.4, 0.6))
    merge(folders, (0.4, 0.6), tmp_path / "soup")
    reloaded = reload(tmp_path / "soup", live)
    expected = reloaded.state_dict()
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(live.model), logits(reloaded))
    written, parent = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "soup", folders[1])
    )
    assert written.keys() == parent.keys()
    return written


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox tied"])
def test_names_without_the_prefix_of_the_base_model_are_followed(tmp_path, family):
    folders = save_pair(family, torch.float32, tmp_path)
    prefix = f"{FAMILIES[family]().base_model_prefix}."
    edit_all(folders, lambda c, _: {n.removeprefix(prefix): t for n, t in c.items()})
    written = check_live_and_file(folders, tmp_path)
    assert not [name for name in written if name.startswith(prefix)]


def test_tensors_that_transformers_does_not_use_are_merged_and_told(tmp_path, caplog, capfd):
    """As the layers for multi-token prediction of DeepSeek-V3, at another depth than its own."""
    folders = save_pair("llama", torch.float32, tmp_path)
    extra = ("model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight")
    edit_all(folders, lambda c, g: c | {n: torch.randn(32, 32, generator=g) for n in extra})
    written = check_live_and_file(folders, tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    for name in extra:
        torch.testing.assert_close(written[name], torch.lerp(first[name], second[name], 0.6))
    (told,) = [r.getMessage() for r in caplog.records if r.name == "mlflow_soup"]
    assert told.startswith(
        f"transformers does not use these tensors of v2: {', '.join(extra)}. They"
    )
    capfd.readouterr()  # of transformers itself, above
    LiveModel(find_checkpoint(folders[1], "v2"))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())  # nor in transformers' words


def test_masks_that_old_versions_saved_are_kept(tmp_path):
    """As GPT-J and GPT-Neo were published."""
    folders = save_pair("gpt2", torch.float16, tmp_path)
    masks = {
        "transformer.h.0.attn.causal": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9).half(),
    }
    edit_all(folders, lambda content, _: content | masks)
    written = check_live_and_file(folders, tmp_path)
    assert all(torch.equal(written[name], mask) for name, mask in masks.items())


def test_a_weight_kept_in_another_precision_than_the_model_is_rounded_as_loading_rounds_it(
    tmp_path,
):
    folders = save_pair("llama", torch.bfloat16, tmp_path)
    for folder in folders:
        content = load_file(folder / "model.safetensors")
        content["model.norm.weight"] = torch.rand(32)  # F32 on disk, BF16 in memory
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    live = LiveModel(find_checkpoint(folders[0], "v1"))
    live.set_weights(link(live, folders), (0.37, 0.63))
    merge(folders, (0.37, 0.63), tmp_path / "soup")
    reloaded = reload(tmp_path / "soup", live)
    assert torch.equal(
        live.model.state_dict()["model.norm.weight"], reloaded.state_dict()["model.norm.weight"]
    )
    assert torch.equal(logits(live.model), logits(reloaded))


def test_a_head_saved_beside_the_embedding_it_is_tied_to_is_written_once(tmp_path):
    folders = save_pair("qwen2 tied", torch.float32, tmp_path)
    for folder in folders:
        content = load_file(folder / "model.safetensors")
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    live = LiveModel(find_checkpoint(folders[0], "v1"))
    links = link(live, folders)
    assert len([x for x in links if x.name in ("lm_head.weight", "model.embed_tokens.weight")]) == 1
    live.set_weights(links, (0.25, 0.75))
    merge(folders, (0.25, 0.75), tmp_path / "soup")
    reloaded = reload(tmp_path / "soup", live)
    assert torch.equal(logits(live.model), logits(reloaded))


def test_versions_of_transformers_that_drop_dimensions_of_one_are_followed(tmp_path, monkeypatch):
    def squeezing(model, weights):  # as transformers 5.17 does when it splits tensors
        reverted = revert_weight_conversion(model, weights)
        return {name: weight.squeeze() for name, weight in reverted.items()}

    monkeypatch.setattr("mlflow_soup.evaluation.live.revert_weight_conversion", squeezing)
    folders = save_pair("mixtral", torch.float32, tmp_path)
    live = LiveModel(find_checkpoint(folders[0], "v1"))
    assert live.places.keys() == load_file(folders[0] / "model.safetensors").keys()


def test_moving_away_and_back_leaves_no_trace(checkpoints):
    live = LiveModel(find_checkpoint(checkpoints[0], "v1"))
    links = link(live, checkpoints[:2])

    def at(lam):
        live.set_weights(links, (1 - lam, lam))
        return logits(live.model)

    first = at(0.3)
    for lam in (0.0, 1.0, 0.77):
        assert not torch.equal(at(lam), first)
    assert torch.equal(at(0.3), first)


@pytest.mark.parametrize("where", ["memory", "device"])
def test_parents_read_into_memory_give_the_same_model(checkpoints, where):
    live = LiveModel(find_checkpoint(checkpoints[0], "v1"))
    mapped = link(live, checkpoints[:2])
    live.set_weights(mapped, (0.3, 0.7))
    expected = logits(live.model)
    parents = [find_checkpoint(folder, folder.name) for folder in checkpoints[:2]]
    copied = live.link(parents, where=where)
    assert {x.parents[0].data_ptr() for x in copied}.isdisjoint(
        x.parents[0].data_ptr() for x in mapped
    )
    live.set_weights(copied, (0.0, 1.0))
    live.set_weights(copied, (0.3, 0.7))
    assert torch.equal(logits(live.model), expected)


def test_switching_keeps_every_parameter_where_it_is(checkpoints):
    live = LiveModel(find_checkpoint(checkpoints[0], "v1"))
    links = link(live, checkpoints[:2])
    before = {name: p.data_ptr() for name, p in live.model.state_dict().items()}
    live.set_weights(links, (0.3, 0.7))
    assert before == {name: p.data_ptr() for name, p in live.model.state_dict().items()}


def test_switching_leaves_the_parents_files_alone(checkpoints):
    before = [(folder / "model.safetensors").read_bytes() for folder in checkpoints[:2]]
    live = LiveModel(find_checkpoint(checkpoints[1], "v2"))
    live.set_weights(link(live, checkpoints[:2]), (0.5, 0.5))
    assert before == [(folder / "model.safetensors").read_bytes() for folder in checkpoints[:2]]


def test_a_missing_weight_is_refused_not_initialised_at_random(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[0], tmp_path / "spoilt")
    content = load_file(folder / "model.safetensors")
    del content["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        errors.ParentError, match=r"lacks tensors that the model needs: .*dense_h_to_4h"
    ):
        LiveModel(find_checkpoint(folder, "v1"))


@pytest.mark.parametrize("base", [0, 1])
def test_a_head_that_only_one_parent_ties_to_its_embedding_is_refused(tmp_path, base):
    folders = save_pair("qwen2 tied", torch.float32, tmp_path)
    for i, folder in enumerate(folders):
        content = load_file(folder / "model.safetensors")
        content["lm_head.weight"] = content["model.embed_tokens.weight"] * (1 if i == base else 2)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    live = LiveModel(find_checkpoint(folders[base], "base"))
    with pytest.raises(errors.ParentError, match=r"embed_tokens.* differ, but the model uses one"):
        link(live, folders)


@pytest.fixture
def transposing():
    """Make transformers transpose Llama's output projections when it loads them."""
    name = "self_attn.o_proj.weight"
    before = get_checkpoint_conversion_mapping("llama")
    converter = WeightConverter(name, name, operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping("llama", [converter], overwrite=True)
    yield
    register_checkpoint_conversion_mapping("llama", before or [], overwrite=True)


@pytest.mark.parametrize("constant", [False, True])
def test_weights_that_are_transposed_on_loading_are_refused(tmp_path, transposing, constant):
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    if constant:  # rows and columns look alike
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
    toy.save(model, tmp_path / "v1")
    with pytest.raises(errors.ParentError, match=r"cannot match the weights of v1 .*o_proj"):
        LiveModel(find_checkpoint(tmp_path / "v1", "v1"))


UNLOADABLE = {
    "an unknown dtype": ({"dtype": "float99"}, "cannot load the model of v1: AttributeError: "),
    "text for a number": ({"hidden_size": "x"}, "cannot load the model of v1: .*hidden_size"),
    "a type of the future": ({"model_type": "gpt9"}, r"transformers \S+ does not have .*'gpt9'"),
    "no type": ({"model_type": None}, "the config of v1 names no model_type"),
    "an encoder and decoder": ({"model_type": "t5"}, "type 't5', which does not predict the next"),
    "another vocabulary": (
        {"vocab_size": 999},
        r"embed_in.weight is \[25, 48\], and not \[999, 48\]",
    ),
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_config_that_makes_no_model_is_refused_in_our_words(checkpoints, tmp_path, name):
    change, words = UNLOADABLE[name]
    folder = shutil.copytree(checkpoints[0], tmp_path / "spoilt")
    toy.edit_json(folder / "config.json", **change)
    with pytest.raises(errors.ParentError, match=words) as refusal:
        LiveModel(find_checkpoint(folder, "v1"))
    assert "\n" not in refusal.value.what
    assert len(refusal.value.what) < 500


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_a_tokenizer_that_cannot_be_read_is_refused_in_words(checkpoints, tmp_path, content):
    folder = shutil.copytree(checkpoints[0], tmp_path / "spoilt")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(errors.ParentError, match="cannot load the tokenizer of v1") as refusal:
        LiveModel(find_checkpoint(folder, "v1"))
    assert "AutoTokenizer" in refusal.value.fix
    assert "\n" not in refusal.value.what


@pytest.mark.parametrize("where", ["mmap", "device"])
def test_a_mixture_that_is_not_finite_is_no_model(tmp_path, trained, where):
    largest = torch.finfo(torch.float32).max
    found = []
    for i in range(3):
        folder = toy.save(trained, tmp_path / f"v{i}")
        name = "gpt_neox.final_layer_norm.bias"
        toy.edit_tensors(folder, **{name: torch.tensor([largest, float(i)] + [0.0] * 46)})
        found.append(find_checkpoint(folder, f"v{i}"))
    live = LiveModel(found[0])
    with pytest.raises(errors.NonFiniteError, match=r"norm\.bias.* is not finite") as refusal:
        live.set_weights(live.link(found, where=where), (0.01, 0.5, 0.49))
    assert "raise --alpha" in refusal.value.fix
    assert "register the parents in F32 or BF16" in refusal.value.fix


def test_two_threads_that_load_at_once_leave_transformers_and_the_streams_as_they_were(
    tmp_path, monkeypatch
):
    folders = [toy.save(FAMILIES["gpt2"](), tmp_path / f"v{i}") for i in (1, 2)]
    before = (PreTrainedModel.tie_weights, sys.stdout, sys.stderr)
    build, first = GPT2LMHeadModel.__init__, threading.Event()

    def slow(self, *args, **kwargs):  # the first to come in leaves first
        time.sleep(0.5 if first.is_set() else (first.set(), 0.2)[1])
        build(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "__init__", slow)
    threads = [
        threading.Thread(target=LiveModel, args=(find_checkpoint(folder, folder.name), "cpu"))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (PreTrainedModel.tie_weights, sys.stdout, sys.stderr) == before
