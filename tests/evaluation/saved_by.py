"""Save small models with the transformers on Python's path: `python saved_by.py FOLDER`.

Each model is a checkpoint with a tokenizer in a folder of its own, named by its model type. Models
that this version does not have are left out.
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SMALL = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FLAT = {**SMALL, **WIDE, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**FLAT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SCALED = {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
CONFIGS = {
    "GPT2Config": GPT,
    "GPTJConfig": {**GPT, "rotary_dim": 4},
    "GPTNeoXConfig": {**FLAT, "rotary_pct": 0.5},
    "OPTConfig": {**FLAT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomConfig": {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": {**SMALL, **WIDE, "multi_query": True, "alibi": False},
    "LlamaConfig": {**GROUPED, **SCALED},
    "MistralConfig": {**GROUPED, "sliding_window": 16},
    "MixtralConfig": {**GROUPED, "num_local_experts": 4},
    "Qwen2Config": {**GROUPED, "tie_word_embeddings": True},
    "Qwen3Config": HEADS,
    "Qwen2MoeConfig": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3MoeConfig": {**EXPERTS, "head_dim": 8},
    "OlmoConfig": GROUPED,
    "Olmo2Config": GROUPED,
    "OlmoeConfig": EXPERTS,
    "GemmaConfig": HEADS,
    "Gemma2Config": {**HEADS, "sliding_window": 16},
    "Gemma3TextConfig": {**HEADS, "sliding_window": 16},
    "PhiConfig": {**GROUPED, "partial_rotary_factor": 0.5},
    "Phi3Config": GROUPED,
    "StableLmConfig": GROUPED,
    "Starcoder2Config": GROUPED,
    "GraniteConfig": GROUPED,
    "CohereConfig": {**GROUPED, "logit_scale": 0.1},
    "SmolLM3Config": GROUPED,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """With a rule of each kind that files of tokenizers hold."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *"▁abcdefghijk"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<s>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{{ messages[0]['content'] }}"
    return wrapped


def main(folder: Path) -> None:
    for name, settings in CONFIGS.items():
        kind = getattr(transformers, name, None)
        if kind is None:
            continue
        torch.manual_seed(0)
        config = kind(**settings)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(folder / config.model_type)
        tokenizer().save_pretrained(folder / config.model_type)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
