"""What workers gain: measured here for two, and simulated for up to 256 from measured costs.

    python benchmarks/scale.py                    # some minutes; a table and JSON
    python benchmarks/scale.py --engines ray:2    # the actors of a cluster; needs the extra ray
    python benchmarks/scale.py --plot docs/images/scale.png

Measured: two random GPTNeoX checkpoints and a task of four choices. The same λ are scored by this
process, by workers that have a λ each, and by workers that share the batches of one λ. The machine
may be busy, so the efficiency counts processor seconds: those of one process for the same scores,
divided by those of driver and workers together. Start-up is told apart.

Simulated (seeded): a driver that records one score after the other, and workers as `workers.pool`
uses them: one evaluation each while as many wait, else the batches of each are cut for all.
"""

import argparse
import heapq
import json
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from evaluator import SHAPES, VOCABULARY, write_tasks
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.request.names import parse_workers
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers.engine import Inline
from mlflow_soup.workers.open import check_workers, open_engine
from mlflow_soup.workers.worker import Mixture, Reply, Request

# -- measured --------------------------------------------------------------------------------------


def write_parents(root: Path, shape: str) -> list[Path]:
    """Two random checkpoints with a tokenizer."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        size = SHAPES[shape]
        config = GPTNeoXConfig(
            vocab_size=VOCABULARY[shape],
            intermediate_size=4 * size["hidden_size"],
            max_position_embeddings=2048,
            **size,
        )
        folders.append(toy.save(GPTNeoXForCausalLM(config), root / f"v{seed}"))
    return folders


def helpers() -> list[psutil.Process]:
    """The processes below this one that hold a model: workers, and the server that forks them."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if any("forkserver" in w or "ray::Remote" in w for w in p.cmdline())]


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system time of this process and of others."""
    times = [process.cpu_times() for process in (psutil.Process(), *processes)]
    return sum(time.user + time.system for time in times)


def memory(process: psutil.Process) -> int:
    """The proportional set size of a process, in MB."""
    return int(process.memory_full_info().pss) >> 20


@dataclass(frozen=True)
class Timed:
    """Wall and processor seconds of some evaluations, and their scores."""

    wall: float
    cpu: float
    scores: list[str]


def score(engine: Any, evaluator: Evaluator, mixtures: Sequence[Mixture], *, ahead: bool) -> Timed:
    """Score mixtures in order; `ahead` lets the engine know all of them."""
    pids = helpers()
    wall, cpu = time.monotonic(), processor_seconds(pids)
    if ahead:
        for mixture in mixtures:
            engine.expect(str(mixture.lam), evaluator, mixture, lambda: None)
        engine.begin()
    found = []
    for mixture in mixtures:
        answers = engine.answer(str(mixture.lam), evaluator, mixture)
        found.append(repr(evaluator.score(*answers.parts)))
    return Timed(time.monotonic() - wall, processor_seconds(pids) - cpu, found)


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Workers against this process, in turns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "tasks").mkdir()
        write_tasks(root / "tasks", chosen.items)
        parents = [find_checkpoint(f, f.name) for f in write_parents(root, chosen.shape)]
        digests = tuple(map(digest, parents))
        live = LiveModel(parents[0], "cpu")
        suite = load_suite("choices", include_path=str(root / "tasks"))
        evaluator, inline = Evaluator(live, suite), Inline(live)
        mixtures = [
            Mixture(tuple(parents), digests, (1 - k / 64, k / 64))
            for k in range(chosen.evaluations)
        ]
        warm = [
            Mixture(tuple(parents), digests, (0.5 + k / 1000, 0.5 - k / 1000)) for k in range(4)
        ]
        result: dict[str, Any] = {"items": chosen.items, "evaluations": len(mixtures), "rows": []}
        for name in chosen.engines.split(","):
            donor = Mixture((parents[0],), digests[:1], (1.0,))
            begin = time.monotonic()
            workers = parse_workers(name)
            check_workers(workers, live.model.device)
            engine = open_engine(inline, donor, workers, patience=600.0)
            with engine:
                score(engine, evaluator, warm, ahead=True)
                result[f"{name} start, s"] = round(time.monotonic() - begin, 1)
                result[f"{name} PSS per worker, MB"] = [memory(p) for p in helpers()][
                    -engine.size :
                ]
                for ahead in (True, False):
                    rounds = []
                    for _ in range(chosen.rounds):
                        one = score(inline, evaluator, mixtures, ahead=False)
                        many = score(engine, evaluator, mixtures, ahead=ahead)
                        assert many.scores == one.scores, "the digits differ"
                        rounds.append((one, many))
                    result["rows"].append(row(name, ahead, engine.size, rounds))
        share = evaluator.lm.portions(1)[0]
        reply: Reply = inline.mixer.answer(mixtures[1], evaluator.lm, share)
        request = Request("0" * 64, mixtures[0].sources(), mixtures[0].lam, "mmap", share)
        result["bytes"] = {
            "requests, once for each worker": len(pickle.dumps(evaluator.lm.freeze())),
            "a λ to a worker": len(pickle.dumps(request)),
            "its answers back": len(pickle.dumps(reply)),
        }
    return result


def row(name: str, ahead: bool, size: int, rounds: list[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Medians of one way to use workers."""
    middle = sorted(rounds, key=lambda pair: pair[0].wall / pair[1].wall)[len(rounds) // 2]
    work = sorted(one.cpu / many.cpu for one, many in rounds)[len(rounds) // 2]
    count = len(middle[0].scores)
    return {
        "workers": name,
        "way": "one λ each" if ahead else "batches of one λ",
        "λ per hour, one process": round(3600 * count / middle[0].wall),
        "λ per hour": round(3600 * count / middle[1].wall),
        "speed-up (wall)": round(middle[0].wall / middle[1].wall, 2),
        "efficiency (processor)": round(work, 3),
        "workers' number": size,
    }


# -- simulated -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds of one evaluation on one worker; 1.5 M tokens, bf16 (docs, Workers).

    Attributes:
        forward: the forward passes.
        switch: a switch of λ with parents in page cache: sums, and the way to the GPU.
        record: of the driver: aggregate, journal, requests to MLflow.
        batches: of the requests.
    """

    forward: float
    switch: float
    record: float = 0.5
    batches: int = 1000


SIZES = {
    "1 B": Costs(7.6, 0.5),
    "7 B": Costs(53.0, 3.5),
    "7 B, parents on the GPU": Costs(53.0, 0.1),
    "70 B on 4 GPUs": Costs(525.0, 17.0),
}
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# rounds of evaluations that are known at once: (how many, ...), in order
JOBS = {
    "search of a pair": (3, 1, 1, 1, 1, 1, 1),
    "study of 78 pairs": (91,),
    "track of 100 checkpoints": (199,),
}


def simulate(rounds: Sequence[int], workers: int, costs: Costs, seed: int = 0) -> float:
    """Seconds from the first request to the last record."""
    draw = random.Random(seed)
    free = [(0.0, i) for i in range(workers)]  # when each worker is idle
    driver = 0.0  # when the driver is idle
    for count in rounds:
        heapq.heapify(free)
        begin = driver  # a round needs the scores of those before
        ends = []
        for left in range(count, 0, -1):
            shares = min(max(1, workers // left), costs.batches)
            each = costs.forward / shares
            # contiguous batches are not cut evenly: by half a batch at worst, and by chance
            uneven = 0.0 if shares == 1 else costs.forward / costs.batches / 2
            last = 0.0
            for _ in range(shares):
                at, worker = heapq.heappop(free)
                took = costs.switch + (each + uneven) * draw.lognormvariate(0.0, 0.03)
                last = max(last, max(at, begin) + took)
                heapq.heappush(free, (max(at, begin) + took, worker))
            ends.append(last)
        for end in ends:  # records are written in the order of the requests
            driver = max(driver, end) + costs.record
    return driver


def simulations() -> list[dict[str, Any]]:
    """Hours and efficiency of each job and size for each number of workers."""
    rows = []
    for job, rounds in JOBS.items():
        for size, costs in SIZES.items():
            alone = simulate(rounds, 1, costs)
            for count in COUNTS:
                took = simulate(rounds, count, costs)
                rows.append(
                    {
                        "job": job,
                        "size": size,
                        "workers": count,
                        "hours": round(took / 3600, 3),
                        "speed-up": round(alone / took, 2),
                        "efficiency": round(alone / took / count, 3),
                    }
                )
    return rows


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over the number of workers, a panel for each job."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(JOBS), sharey=True)
    for axis, job in zip(axes, JOBS, strict=True):
        for size in SIZES:
            own = [r for r in rows if (r["job"], r["size"]) == (job, size)]
            axis.plot(COUNTS, [r["speed-up"] for r in own], marker="o", markersize=3, label=size)
        axis.plot(COUNTS, COUNTS, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", title=job, xlabel="workers", ylim=(0.8, 300))
        axis.set_xticks(COUNTS, map(str, COUNTS), fontsize=7)
        axis.minorticks_off()
    axes[0].set_ylabel("speed-up (simulated)")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engines", default="2")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    measured, simulated = measure(chosen), simulations()
    if chosen.plot:
        draw_plot(simulated, chosen.plot)
    for row_ in measured["rows"]:
        print("  ".join(f"{key}: {value}" for key, value in row_.items()), file=sys.stderr)
    for row_ in simulated:
        if row_["workers"] in (1, 2, 8, 64, 256):
            print("  ".join(map(str, row_.values())), file=sys.stderr)
    print(json.dumps({"measured": measured, "simulated": simulated}, indent=1))


if __name__ == "__main__":
    main()
