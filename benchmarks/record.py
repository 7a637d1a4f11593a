"""Record how the items of the quickstart's tasks move with λ, for `search.py --recorded`.

    mlflow run . -e quickstart --env-manager local        # registers 13 versions of a small model
    python benchmarks/record.py models:/quickstart-llm/12 models:/quickstart-llm/13 --name v12-v13

Folders do as well as versions. Two files are written per pair; half a minute of work for each λ.
The curves are so smooth that a spline through 11 λ is right to 0.0004 nats (root mean square at the
ten λ between them, v12 and v13).

    lam              (L,)       λ, ascending from 0 to 1
    log_likelihoods  (N, C, L)  integers: the differences along λ of log-likelihoods in steps of
                                `step` nats (the first one whole), because those compress
    step             ()         0.0001
    gold             (N,)       index of the right choice; absent for documents, where C = 1
    sizes            (N, C)     what log-likelihoods are divided by before choices are compared,
                                absent for 1; of documents (N,), their bytes
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.append(str(Path(__file__).parent.parent))

from mlflow import MlflowClient

from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.quickstart import corpus, tasks
from mlflow_soup.records import Items, Version
from mlflow_soup.registry.pull import pull
from mlflow_soup.weights.find import find_checkpoint

TASKS = "quickstart_prose:acc,quickstart_prose_bpb:bits_per_byte"
STEP = 1e-4  # nats; at 1e-3 an item in a thousand changes sides


def folder(parent: str) -> Path:
    """Where the files of a parent are: itself, or the registered version `models:/name/number`."""
    if not parent.startswith("models:/"):
        return Path(parent)
    name, number = parent.removeprefix("models:/").split("/")
    return pull(MlflowClient(), Version(name, int(number)))


def save(path: Path, lam: list[float], curve: list[Items]) -> None:
    """Write what one task's items said at each λ."""
    whole = np.stack([np.array(items.log_likelihoods) for items in curve], axis=-1)
    steps = np.diff(np.round(whole / STEP), axis=-1, prepend=0).astype(np.int32)
    arrays = {"lam": np.array(lam), "log_likelihoods": steps, "step": np.array(STEP)}
    first = curve[0]
    if first.gold:
        arrays["gold"] = np.array(first.gold, np.int16)
        if first.sizes and np.ptp(np.array(first.sizes)):
            arrays["sizes"] = np.array(first.sizes)
    else:  # bits = −log-likelihood / (bytes · log 2)
        size = -whole[:, 0, 0] / np.log(2) / np.array(first.values)
        arrays["sizes"] = np.round(size).astype(np.int32)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {steps.shape}, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("old", help="folder or models:/name/number")
    parser.add_argument("new", help="the same, the newer one")
    parser.add_argument("--name", required=True, help="of the pair, begins the file names")
    parser.add_argument("--items", type=int, default=4000, help="questions")
    parser.add_argument("--chunks", type=int, default=300, help="texts for bits per byte")
    parser.add_argument("--points", type=int, default=11, help="how many λ")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "recorded")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    parents = [find_checkpoint(folder(parent), parent) for parent in (chosen.old, chosen.new)]
    with tempfile.TemporaryDirectory() as temporary:
        sizes = dataclasses.replace(
            tasks.Sizes(), items=chosen.items, bpb_chunks=chosen.chunks, code_items=100
        )
        include_path = tasks.write(corpus.read(), Path(temporary), sizes)
        live = LiveModel(parents[0], "cpu")
        links = live.link(parents)
        evaluator = Evaluator(live, load_suite(TASKS, include_path=str(include_path)))
        lam = np.linspace(0, 1, chosen.points).round(4).tolist()
        scores = []
        for weight in lam:
            live.set_weights(links, (1 - weight, weight))
            scores.append(evaluator.score())
            print(f"λ = {weight}: {[f'{m.key} {m.value:.4f}' for m in scores[-1].metrics]}")
    for i, what in enumerate(("acc", "bytes")):
        save(chosen.out / f"{chosen.name}-{what}.npz", lam, [score.items[i] for score in scores])


if __name__ == "__main__":
    main()
