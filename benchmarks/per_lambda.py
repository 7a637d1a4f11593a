"""What one more λ costs: switching a live model, against merging to disk and loading again.

    python benchmarks/per_lambda.py            # a quarter of a minute; prints a table and JSON

Three ways to score a merge of two random GPTNeoX checkpoints on the same multiple-choice items,
taken in turns in one process:

- live: ours. Weights are written into the live model, frozen requests are run.
- lm-eval: the same live model, but `simple_evaluate` builds and tokenises its requests each time.
- disk: the merge is written, loaded by `from_pretrained` and given to `simple_evaluate`, as tools
  do that merge and evaluate in separate steps.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from mlflow_soup import soup
from mlflow_soup.checkpoint import find
from mlflow_soup.live import LiveModel, quiet
from mlflow_soup.objective import Evaluator
from mlflow_soup.suite import load_suite

ROUNDS = 5
LAMBDAS = (0.9, 0.6, 0.7, 0.5, 0.8)


def main() -> None:
    """Measure, then print."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        tasks = toy.write_tasks(root / "tasks", count=500)
        config = GPTNeoXConfig(
            vocab_size=len(toy.tokenizer()),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=128,
        )
        folders = [toy.save(GPTNeoXForCausalLM(config), root / f"v{i}") for i in (1, 2)]
        parents = [find(folder, folder.name) for folder in folders]
        live = LiveModel(parents[0])
        links = live.link(parents)
        evaluator = Evaluator(live, load_suite("toy_letters", include_path=str(tasks)))
        manager = TaskManager(include_defaults=False, include_path=str(tasks))

        def lm_eval_of(model: object) -> float:
            with quiet():
                results = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=toy.tokenizer(), batch_size=32),
                    tasks=["toy_letters"],
                    task_manager=manager,
                    bootstrap_iters=0,
                )
            return float(results["results"]["toy_letters"]["acc,none"])

        def in_place(lam: float) -> float:
            live.set_weights(links, (1 - lam, lam))
            return evaluator.score().value

        def by_lm_eval(lam: float) -> float:
            live.set_weights(links, (1 - lam, lam))
            return lm_eval_of(live.model)

        def by_disk(lam: float) -> float:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                soup.write(parents, (1 - lam, lam), Path(folder), digests=False)
                with quiet():
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
                return lm_eval_of(model)

        ways: dict[str, Callable[[float], float]] = {
            "live": in_place,
            "lm-eval": by_lm_eval,
            "disk": by_disk,
        }
        for way in ways.values():  # caches warm, few-shot prompts built
            way(0.5)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _, lam in zip(range(ROUNDS), LAMBDAS, strict=False):
            scores = set()
            for name, way in ways.items():
                begin = time.process_time()
                scores.add(way(lam))
                seconds[name].append(time.process_time() - begin)
            if len(scores) != 1:
                raise SystemExit(f"the three ways disagree at λ = {lam}: {scores}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'way':<10}{'CPU s per λ':>12}{'ratio':>8}")
    for name, value in medians.items():
        print(f"{name:<10}{value:>12.2f}{value / medians['live']:>8.2f}")
    print(json.dumps({"cpu_seconds_per_lambda": medians, "runs": seconds}))


if __name__ == "__main__":
    main()
