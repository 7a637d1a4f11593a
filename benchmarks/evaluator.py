"""What one more λ costs, beside the model's bare forward passes and the other ways to score it.

    python benchmarks/evaluator.py                  # tiny model, minutes; a table and JSON
    python benchmarks/evaluator.py --shape 160m --device cuda --dtype bfloat16

Two random GPTNeoX checkpoints, and tasks of four kinds: 0-shot with four choices of several tokens;
5-shot with single letters to choose from, the examples drawn for each item (lm-eval's default) or
the same for all (as MMLU has them), prompts of about 500 tokens; and whole documents. Five ways to
score a merge, taken in turns in one process:

- bare: the model on the same tokens, sorted by length and padded as lm-eval does, nothing else.
- ours: `--evaluator prepared`.
- lm-eval: `--evaluator lm-eval`, its own forward passes on frozen requests.
- simple_evaluate: lm-eval's function on the live model, its index of tasks kept between calls.
- disk: the merge is written, loaded by `from_pretrained` and given to `simple_evaluate`, as tools
  do that merge and evaluate in separate steps.

All but `disk` write λ into the live model first, which is part of their time. Ours has a start-up
besides, once for all λ: loading the task, building its requests, tokenising and batching them.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.loading import quiet
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights import soup
from mlflow_soup.weights.find import find_checkpoint

BATCH_SIZE, MAX_LENGTH = 32, 640
LAMBDAS = (0.9, 0.6, 0.7, 0.5, 0.8)
SHAPES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
VOCABULARY = {"tiny": 4096, "160m": 50304}
KINDS = {"choices": "acc", "drawn": "acc", "same": "acc", "documents": "bits_per_byte"}
TITLES = {
    "choices": "0-shot, four choices of several tokens",
    "drawn": "5-shot letters, examples drawn for each item",
    "same": "5-shot letters, the same examples for all",
    "documents": "whole documents",
}


def write_tasks(folder: Path, items: int) -> None:
    """Tasks `choices`, `drawn`, `same` and `documents`; a token is a letter."""
    rng = np.random.default_rng(0)

    def text(least: int, most: int) -> str:
        return "".join(rng.choice(list(toy.LETTERS + " "), size=rng.integers(least, most)))

    def rows(count: int, least: int, most: int) -> list[dict[str, Any]]:
        return [
            {
                "question": text(least, most) + "?",
                "choices": [text(4, 12) for _ in "abcd"],
                "answer": int(rng.integers(4)),
            }
            for _ in range(count)
        ]

    files = {
        "choices": rows(items, 15, 45),
        "letters": rows(items // 4, 60, 110),
        "dev": rows(20, 60, 110),
        "text": [{"text": text(40, 400)} for _ in range(items // 4)],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    letters = choice | {"doc_to_choice": list("abcd"), "fewshot_split": "dev", "num_fewshot": 5}
    document = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    tasks = {
        "choices": ("choices", choice | {"num_fewshot": 0}),
        "drawn": ("letters", letters),
        "same": ("letters", letters | {"fewshot_config": {"sampler": "first_n"}}),
        "documents": ("text", document | {"num_fewshot": 0}),
    }
    for name, (file, config) in tasks.items():
        config |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {
                    "test": str(folder / f"{file}.jsonl"),
                    "dev": str(folder / "dev.jsonl"),
                }
            },
            "test_split": "test",
            "metric_list": [
                {
                    "metric": KINDS[name],
                    "aggregation": "mean" if KINDS[name] == "acc" else KINDS[name],
                    "higher_is_better": KINDS[name] == "acc",
                }
            ],
        }
        if file == "text":
            config["dataset_kwargs"]["data_files"].pop("dev")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


class Listener(HFLM):  # type: ignore[misc]
    """lm-eval's model that remembers what tokens it was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard: set[tuple[int, ...]] = set()

    # private door: lm_eval.models.huggingface.HFLM._loglikelihood_tokens
    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self.heard |= {tuple((c + k)[-(self.max_length + 1) : -1]) for _, c, k in requests}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def batches(self) -> list[torch.Tensor]:
        """The tokens in padded batches, the longest first."""
        ordered = sorted(self.heard, key=lambda tokens: (-len(tokens), tokens))
        return [
            torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(tokens) for tokens in ordered[i : i + BATCH_SIZE]], batch_first=True
            ).to(self.device)
            for i in range(0, len(ordered), BATCH_SIZE)
        ]


def measure(
    ways: dict[str, Callable[[float], float | None]], rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Medians of CPU and wall seconds of each way, all in turns; the first turn does not count."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        lam = LAMBDAS[i % len(LAMBDAS)]
        scores = []
        for name, way in ways.items():
            begin = time.process_time(), time.perf_counter()
            score = way(lam)
            if device != "cpu":
                torch.accelerator.synchronize()
            runs[name].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
            scores += [score] if score is not None else []
        if not all(math.isclose(score, scores[0], rel_tol=1e-5) for score in scores):
            print(f"scores differ at λ = {lam}: {scores}", file=sys.stderr)
    return {
        name: {
            "cpu_s": statistics.median(cpu for cpu, _ in measured[1:]),
            "wall_s": statistics.median(wall for _, wall in measured[1:]),
        }
        for name, measured in runs.items()
    }


def score_by_lm_eval(model: Any, kind: str, manager: TaskManager, lm: type[HFLM] = HFLM) -> Any:
    """lm-eval's model after `simple_evaluate`, and the score."""
    with quiet():
        asked = lm(
            pretrained=model,
            tokenizer=toy.tokenizer(),
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            softmax_dtype="float32",
        )
        results = simple_evaluate(asked, tasks=[kind], task_manager=manager, bootstrap_iters=0)
    return asked, float(results["results"][kind][f"{KINDS[kind]},none"])


def compare(
    kind: str, root: Path, parents: list[Any], live: LiveModel, chosen: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of each way on one kind of task."""
    links = live.link(parents)
    manager = TaskManager(include_defaults=False, include_path=str(root / "tasks"))
    listener, _ = score_by_lm_eval(live.model, kind, manager, Listener)
    batches = listener.batches()

    def prepare(name: str) -> Evaluator:
        suite = load_suite(kind, include_path=str(root / "tasks"))
        return Evaluator(live, suite, evaluator=name, batch_size=BATCH_SIZE, max_length=MAX_LENGTH)

    theirs = prepare("lm-eval")
    begin = time.process_time()
    ours = prepare("prepared")
    start_up = time.process_time() - begin

    def switch(lam: float) -> None:
        live.set_weights(links, (1 - lam, lam))

    def bare(lam: float) -> None:
        switch(lam)
        with torch.no_grad():
            for tokens in batches:
                _ = live.model(tokens).logits

    def evaluate(evaluator: Evaluator) -> Callable[[float], float]:
        def way(lam: float) -> float:
            switch(lam)
            return evaluator.score().metrics[0].value

        return way

    def by_lm_eval(lam: float) -> float:
        switch(lam)
        return float(score_by_lm_eval(live.model, kind, manager)[1])

    def by_disk(lam: float) -> float:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            soup.write(parents, (1 - lam, lam), Path(folder), digests=False)
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            return float(score_by_lm_eval(model.to(chosen.device), kind, manager)[1])

    ways: dict[str, Callable[[float], float | None]] = {
        "bare": bare,
        "ours": evaluate(ours),
        "lm-eval": evaluate(theirs),
        "simple_evaluate": by_lm_eval,
        "disk": by_disk,
    }
    medians = measure(ways, chosen.rounds, chosen.device)
    medians["ours"]["start_up_cpu_s"] = start_up
    return medians


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--items", type=int, default=400, help="of the 0-shot task; others 1/4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "tasks").mkdir()
        write_tasks(root / "tasks", chosen.items)
        shape = SHAPES[chosen.shape]
        config = GPTNeoXConfig(
            **shape,
            vocab_size=VOCABULARY[chosen.shape],
            intermediate_size=4 * shape["hidden_size"],
            max_position_embeddings=MAX_LENGTH,
        )
        folders = [
            toy.save(GPTNeoXForCausalLM(config).to(getattr(torch, chosen.dtype)), root / f"v{i}")
            for i in (1, 2)
        ]
        parents = [find_checkpoint(folder, folder.name) for folder in folders]
        live = LiveModel(parents[0], chosen.device)
        results = {
            kind: compare(kind, root, parents, live, chosen) for kind in chosen.kinds.split(",")
        }
    for kind, ways in results.items():
        print(f"\n| {TITLES[kind]} | CPU s per λ | wall s | ratio to bare |")
        print("|---|---|---|---|")
        # on an accelerator the CPU waits
        key = "cpu_s" if chosen.device == "cpu" else "wall_s"
        for name, row in ways.items():
            print(
                f"| {name} | {row['cpu_s']:.2f} | {row['wall_s']:.2f} "
                f"| {row[key] / ways['bare'][key]:.2f} |"
            )
        print(f"\nstart-up of ours: {ways['ours']['start_up_cpu_s']:.2f} CPU s")
    print()
    print(json.dumps({"options": vars(chosen), "results": results}))


if __name__ == "__main__":
    main()
