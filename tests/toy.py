"""A language small enough to be learnt in seconds, and models of it.

Words repeat: `kat kat kat`. Held-out text is written in letters, OOD text in digits, so that a
model can be damaged in one domain and stay sound in the other. Two noisy copies of one trained
model stand for two checkpoints of a run: their average has less noise and is better than both.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from mlflow_soup.weights.checkpoint import INDEX, SINGLE

LETTERS, DIGITS = "abcdefghijklm", "0123456789"
END = "<|endoftext|>"

# as safetensors calls them
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {character: i for i, character in enumerate([END, " ", *LETTERS, *DIGITS])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=END))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def sentence(rng: np.random.Generator, alphabet: str, repeats: int = 4) -> str:
    word = "".join(rng.choice(list(alphabet), size=3))
    return " ".join([word] * repeats)


def train(steps: int = 150) -> GPTNeoXForCausalLM:
    """A model that has learnt to repeat words of either alphabet."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encode = tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(encode),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = [sentence(rng, LETTERS if rng.random() < 0.6 else DIGITS) for _ in range(32)]
        ids = torch.tensor(encode(texts)["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def noisy(model: GPTNeoXForCausalLM, seed: int, sigma: float) -> GPTNeoXForCausalLM:
    """A copy with Gaussian noise on every matrix: a checkpoint on its way."""
    generator = torch.Generator().manual_seed(seed)
    copy = GPTNeoXForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.ndim > 1:
                scale = sigma * weight.std()
                weight += scale * torch.randn(weight.shape, generator=generator)
    return copy.eval()


def damage_digits(model: GPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    """Make a model blind to digits, in place; letters do not notice."""
    with torch.no_grad():
        rows = model.get_input_embeddings().weight[-len(DIGITS) :]
        rows.copy_(5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    return model


def save(model: GPTNeoXForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lay_out(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file with its tensors in this order, at odd offsets if it so happens."""
    header, parts, end = {}, [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def bare(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """The least that is a checkpoint: tensors, a config and a tokenizer's config."""
    folder.mkdir(parents=True)
    lay_out(folder / SINGLE, tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def shard(folder: Path) -> Path:
    """The same checkpoint in two files with an index: every other tensor is in the second."""
    content = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(content)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: content[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in content.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **fields: object) -> None:
    """Set fields of a JSON object, or drop those given as None."""
    content = {**json.loads(path.read_text()), **fields}
    gone = {name for name, value in fields.items() if value is None}
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in gone}))


def edit_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of a checkpoint in one file, or drop those that are None."""
    content = {**load_file(folder / SINGLE), **tensors}
    kept = {name: tensor for name, tensor in content.items() if tensor is not None}
    save_file(kept, folder / SINGLE, {"format": "pt"})


def _choice_items(alphabet: str, count: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        words = {"".join(rng.choice(list(alphabet), size=3)) for _ in range(8)}
        right, *wrong = sorted(words)[:4]
        answer = int(rng.integers(4))
        choices = [*wrong[:answer], right, *wrong[answer:]]
        items.append({"question": " ".join([right] * 2), "choices": choices, "answer": answer})
    return items


def copy_tasks(tasks: Path, folder: Path) -> Path:
    """Copy a folder that `write_tasks` made; its YAML files then name the copied data."""
    shutil.copytree(tasks, folder, dirs_exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(tasks), str(folder)))
    return folder


def write_task(path: Path, config: dict[str, Any]) -> None:
    """Write a task's YAML, with copies of its data files beside it."""
    config = copy.deepcopy(config)
    files = config["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        if Path(file).is_file() and Path(file).parent != path.parent:
            files[split] = str(shutil.copy(file, path.parent))
    path.write_text(yaml.safe_dump(config))


def write_tasks(folder: Path, count: int = 120) -> Path:
    """Tasks `toy_letters`, `toy_digits` (multiple choice), `toy_digits_bpb`, `toy_spelling`.

    The last generates, with two filters; the first two are group `toy_all`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, alphabet, seed in (("letters", LETTERS, 1), ("digits", DIGITS, 2)):
        data = folder / f"{name}.jsonl"
        items = _choice_items(alphabet, count, seed)
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        task = {
            "task": f"toy_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "num_fewshot": 0,
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True}
                for m in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    rng = np.random.default_rng(3)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(rng, DIGITS)}) + "\n" for _ in range(40)))
    task = {
        "task": "toy_digits_bpb",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(text)}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            },
        ],
        "metadata": {"version": 1.0},
    }
    (folder / "digits_bpb.yaml").write_text(yaml.safe_dump(task))
    spelling = {
        "task": "toy_spelling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "digits.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [" "], "do_sample": False, "max_gen_toks": 4},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {
                "name": "digits",
                "filter": [
                    {"function": "regex", "regex_pattern": "([0-9]{3})"},
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "spelling.yaml").write_text(yaml.safe_dump(spelling))
    group = {
        "group": "toy_all",
        "task": ["toy_letters", "toy_digits"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "all.yaml").write_text(yaml.safe_dump(group))
    return folder
