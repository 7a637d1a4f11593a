import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import toy
from mlflow_soup import errors
from mlflow_soup.checkpoint import find, write
from mlflow_soup.live import LiveModel, open_weights

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 25,
}
FAMILIES = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt_neox tied": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, tie_word_embeddings=True, num_key_value_heads=2)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_model_is_the_written_file_bit_for_bit(tmp_path, family, dtype):
    for i in (1, 2):
        torch.manual_seed(i)
        toy.save(FAMILIES[family]().to(dtype), tmp_path / f"v{i}")
    parents = [find(tmp_path / f"v{i}", f"v{i}") for i in (1, 2)]
    live = LiveModel(parents[0])
    live.set_weights([open_weights(p) for p in parents], (0.37, 0.63))
    write(parents, (0.37, 0.63), tmp_path / "soup")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype="auto")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(live.model(ids).logits, reloaded(ids).logits)


def test_moving_away_and_back_leaves_no_trace(checkpoints):
    parents = [find(folder, folder.name) for folder in checkpoints[:2]]
    live = LiveModel(parents[0])
    sources = [open_weights(p) for p in parents]
    ids = torch.arange(20)[None]

    def logits(lam):
        live.set_weights(sources, (1 - lam, lam))
        with torch.no_grad():
            return live.model(ids).logits

    first = logits(0.3)
    for lam in (0.0, 1.0, 0.77):
        assert not torch.equal(logits(lam), first)
    assert torch.equal(logits(0.3), first)


def test_switching_leaves_the_parents_files_alone(checkpoints):
    before = [(folder / "model.safetensors").read_bytes() for folder in checkpoints[:2]]
    parents = [find(folder, folder.name) for folder in checkpoints[:2]]
    live = LiveModel(parents[1])
    live.set_weights([open_weights(p) for p in parents], (0.5, 0.5))
    assert before == [(folder / "model.safetensors").read_bytes() for folder in checkpoints[:2]]


def test_a_missing_weight_is_refused_not_initialised_at_random(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints[0], tmp_path / "spoilt")
    content = load_file(folder / "model.safetensors")
    del content["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.ParentError, match=r"missing keys.*dense_h_to_4h"):
        LiveModel(find(folder, "v1"))
