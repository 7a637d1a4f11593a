"""Switching λ on a GPU that holds the parents: the bits against the CPU's, and the seconds.

    python benchmarks/device.py                             # Llama of 160M weights; 3 GB of disk
    python benchmarks/device.py --size 7B --dtypes bfloat16 # 28 GB of disk, 42 GB of GPU memory
    python benchmarks/device.py --device cpu --size tiny    # only whether the script works

It makes two random checkpoints of each dtype, with subnormal numbers and zeros of both signs among
their weights. Table 1: for each λ, whether every parameter has the SHA-256 that the kernel on the
CPU gives it, and whether the scores of a small task are equal. Table 2: the median seconds of a
switch by `--parents-in`, with a warm page cache; the ways take turns. `link` is done once.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toy
from merge import SIZES
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import Link, LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.request.spec import PARENTS_IN
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.mix import bits

SHARES = (0.0, 0.3, 0.5, 0.7123, 1.0)
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "vocab_size": 500,
}
SEVEN = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
SHAPES: dict[str, dict[str, Any]] = {"tiny": TINY, **SIZES, "7B": SEVEN}


def make_parents(folder: Path, size: str, dtype: torch.dtype) -> list[Checkpoint]:
    """Two checkpoints of random weights, the second with noise on the first."""
    shape = {key: value for key, value in SHAPES[size].items() if key != "shard"}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 7 B weights in F32 would take 28 GB
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128))
    torch.set_default_dtype(before)
    found = []
    for number in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * 0.02 * torch.randn_like(parameter)
                flat = parameter.view(-1)
                small = torch.randint(0, 50, (len(flat[::101]),), dtype=bits(flat[:0]).dtype)
                flat[::101] = small.view(dtype) * (1 - 2 * (number % 2))
                flat[::103] = 0.0
                flat[::107] = -0.0
        where = folder / f"v{number}"
        model.save_pretrained(where)
        toy.tokenizer().save_pretrained(where)
        found.append(find_checkpoint(where, where.name))
    return found


def digests(live: LiveModel) -> dict[str, str]:
    """Parameter → SHA-256 of its bytes."""
    return {
        name: hashlib.sha256(bits(tensor.cpu()).numpy().tobytes()).hexdigest()
        for name, tensor in live.model.state_dict().items()
    }


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def compare(
    parents: list[Checkpoint], live: LiveModel, links: dict[str, list[Link]], tasks: Path
) -> list[dict[str, Any]]:
    """For each λ: parameters with other bits than the CPU's; whether the scores are equal."""
    suite = load_suite("toy_letters", include_path=str(tasks))
    evaluator = Evaluator(live, suite, limit=50)
    plain = LiveModel(parents[0], "cpu")
    mapped, rows = plain.link(parents), []
    for share in SHARES:
        lam = (1.0 - share, share)
        plain.set_weights(mapped, lam)
        expected, scores = digests(plain), []
        for way in ("device", "mmap"):
            live.set_weights(links[way], lam)
            scores.append(evaluator.score())
            if way == "device":
                found = digests(live)
        other = [name for name, digest in expected.items() if found[name] != digest]
        rows.append(
            {
                "lambda": share,
                "parameters": len(expected),
                "with_other_bits": len(other),
                "first": other[0] if other else None,
                "scores_equal": scores[0] == scores[1],
            }
        )
    return rows


def seconds_of(
    live: LiveModel, links: dict[str, list[Link]], rounds: int
) -> dict[str, list[float]]:
    """Way → the seconds of its switches."""
    device = live.model.device
    took: dict[str, list[float]] = {way: [] for way in links}
    for number in range(rounds + 1):
        for way, linked in links.items():
            wait(device)
            begin = time.perf_counter()
            live.set_weights(linked, (0.3 + 0.01 * number, 0.7 - 0.01 * number))
            wait(device)
            took[way].append(time.perf_counter() - begin)
    return {way: seconds[1:] for way, seconds in took.items()}  # the first fills the page cache


def measure(size: str, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """All that one dtype shows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parents = make_parents(folder, size, dtype)
        live, links, linking = LiveModel(parents[0], device), {}, {}
        for way in PARENTS_IN:
            begin = time.perf_counter()
            links[way] = live.link(parents, where=way)
            wait(live.model.device)
            linking[way] = time.perf_counter() - begin
        took = seconds_of(live, links, rounds)
        rows = compare(parents, live, links, toy.write_tasks(folder / "tasks", count=50))
        size_of = sum(tensor.nbytes for tensor in live.model.state_dict().values())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "model_GB": size_of / 1e9,
        "bits": rows,
        "link_seconds": linking,
        "switch_seconds": {way: statistics.median(seconds) for way, seconds in took.items()},
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SHAPES, default="160M")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    if chosen.device != "cpu" and not torch.accelerator.is_available():
        print("Skipped: there is no GPU here. --device cpu only shows whether the script works.")
        return
    dtypes = [getattr(torch, name) for name in chosen.dtypes.split(",")]
    found = [measure(chosen.size, each, chosen.device, chosen.rounds) for each in dtypes]
    name = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name(chosen.device)
    print(f"{chosen.size} on {name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("\ndtype          λ  parameters with other bits  scores")
    for one in found:
        for row in one["bits"]:
            print(
                f"{one['dtype']:9}  {row['lambda']:6}  {row['with_other_bits']:10} of "
                f"{row['parameters']:11}  {'equal' if row['scores_equal'] else 'DIFFER'}"
            )
    print("\ndtype      parents in   link s   switch ms")
    for one in found:
        for way, seconds in one["switch_seconds"].items():
            linking = one["link_seconds"][way]
            print(f"{one['dtype']:9}  {way:10}  {linking:7.2f}  {1e3 * seconds:10.1f}")
    print(json.dumps({"size": chosen.size, "device": name, "dtypes": found}))


if __name__ == "__main__":
    main()
