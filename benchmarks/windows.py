"""Switching the weights of a window in memory: how the time grows with the number of parents.

    python benchmarks/windows.py                    # Llama of 160M weights in BF16; 3 GB of disk
    python benchmarks/windows.py --layers 2         # a smaller one

It makes eight random checkpoints, which the parents repeat in turn; they are larger than any cache.
The windows are measured in turns; medians are printed, and JSON. A parent of weight 0 is not read,
so a window of 6 among 64 versions takes the time of 6 parents. Anonymous memory is what a process
really takes; the parents' files are mapped, and can be dropped at any time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merge import SIZES
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.search.space import Space
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.find import find_checkpoint

DISTINCT = 8
# number of versions, number of them with a weight
WINDOWS = ((2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (64, 6), (6, 6))


def make_parents(folder: Path, layers: int) -> list[Checkpoint]:
    """Checkpoints of random weights, each with noise on the first."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import toy

    shape = {k: v for k, v in SIZES["160M"].items() if k != "shard"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape | {"num_hidden_layers": layers})).bfloat16()
    found = []
    for number in range(DISTINCT):
        where = folder / f"v{number}"
        model.save_pretrained(where)
        toy.tokenizer().save_pretrained(where)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * parameter.std() * torch.randn_like(parameter)
        found.append(find_checkpoint(where, where.name))
    return found


def anonymous_mb() -> float:
    """The anonymous memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=SIZES["160M"]["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        parents = make_parents(Path(temporary), chosen.layers)
        live = LiveModel(parents[0], "cpu")
        size = sum(parameter.nbytes for parameter in live.model.state_dict().values())
        before = anonymous_mb()
        linked = live.link([parents[i % DISTINCT] for i in range(64)])
        took: dict[tuple[int, int], list[float]] = {window: [] for window in WINDOWS}
        for _ in range(chosen.rounds + 1):
            for count, weighed in WINDOWS:
                weights = np.zeros(64)
                weights[64 - weighed :] = 1.0 / weighed
                lam = Space(64, 0.0).recipe(weights).lam
                last = [parents[i % DISTINCT] for i in range(64 - count, 64)]
                links = linked if count == 64 else live.link(last)
                begin = time.perf_counter()
                live.set_weights(links, lam[64 - count :])
                took[count, weighed].append(time.perf_counter() - begin)
        memory = anonymous_mb() - before
    rows = []
    for (count, weighed), seconds in took.items():
        median = statistics.median(seconds[1:])  # the first round fills the page cache
        rows.append(
            {
                "versions": count,
                "with_weight": weighed,
                "milliseconds": round(1000 * median, 1),
                "GB_per_s": round((weighed + 1) * size / median / 1e9, 2),
            }
        )
    print(f"model of {size / 1e6:.0f} MB; the links of 64 parents take {memory:.0f} MB more memory")
    print("versions  with weight      ms  GB/s moved  against a pair")
    pair = rows[0]["milliseconds"]
    for row in rows:
        print(
            f"{row['versions']:8}  {row['with_weight']:11}  {row['milliseconds']:6}  "
            f"{row['GB_per_s']:10}  {row['milliseconds'] / pair:14.2f}"
        )
    print(json.dumps({"model_MB": size / 1e6, "more_memory_MB": memory, "rows": rows}))


if __name__ == "__main__":
    main()
