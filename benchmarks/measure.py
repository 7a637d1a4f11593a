"""What Fisher information and Gram matrices cost: seconds and memory, by tokens of text.

    python benchmarks/measure.py                    # tiny model, a minute; a table and JSON
    python benchmarks/measure.py --shape 160m --tokens 512,1024,2048,4096
    python benchmarks/measure.py --shape 160m --device cuda

A random GPTNeoX in bf16, as an evaluator holds it; every row is a process of its own. Memory is
anonymous (`RssAnon`, looked at 200 times a second) and what it peaks at above the loaded model, in
bytes and in times the model's size in fp32. What lies in the file being made is page cache: it is
counted apart (`RssFile`, which has the parent's file too), and the system may take it back. On an
accelerator its own memory is counted as well, likewise above the loaded model.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.statistics.calibration import WINDOW, calibrate
from mlflow_soup.statistics.measure import measure
from mlflow_soup.weights.find import find_checkpoint

SHAPES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
VOCABULARY = {"tiny": 4096, "160m": 50304}
WAYS = {
    "fisher, empirical": {"kind": "fisher"},
    "fisher, sampled": {"kind": "fisher", "estimator": "sampled"},
    "regmean": {"kind": "regmean"},
}


class Memory:
    """Watches what this process holds, until it is asked."""

    def __init__(self) -> None:
        self.before = resident()
        self.peak, self._done = self.before, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            now = resident()
            self.peak = {name: max(self.peak[name], now[name]) for name in now}

    def above(self) -> dict[str, int]:
        """Peaks in bytes above what was held at first."""
        self._done.set()
        self._thread.join()
        return {name: self.peak[name] - self.before[name] for name in self.before}


def resident() -> dict[str, int]:
    """Bytes of anonymous memory and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class Accelerator:
    """Watches the memory of a device; of the CPU there is nothing to watch."""

    def __init__(self, device: str) -> None:
        self._module = None if device == "cpu" else torch.get_device_module(device)
        if self._module is not None:
            self._module.reset_peak_memory_stats()
            self._before = self._module.memory_allocated()

    def above(self) -> int:
        """Its peak in bytes above what was held at first."""
        if self._module is None:
            return 0
        self._module.synchronize()
        return int(self._module.max_memory_allocated() - self._before)


def cost(folder: Path, way: str, tokens: int, device: str) -> dict[str, Any]:
    """Seconds and bytes of one way, on one text."""
    rng = np.random.default_rng(0)
    letters = list(toy.LETTERS + " ")
    parent = find_checkpoint(folder, "v1")
    live = LiveModel(parent, device)
    texts = ("".join(rng.choice(letters, WINDOW)) for _ in range(tokens))
    calibration = calibrate(texts, live, tokens=tokens)
    size = 4 * sum(parameter.numel() for parameter in live.model.parameters())
    options = dict(WAYS[way])
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        on_device = Accelerator(device)
        memory, begin = Memory(), (time.process_time(), time.perf_counter())
        made = measure(
            options.pop("kind"), live, parent, "digest", calibration, Path(cache), **options
        )
        cpu, wall = time.process_time() - begin[0], time.perf_counter() - begin[1]
        above = memory.above()
        device_bytes = on_device.above()
        on_disk = sum(tensor.nbytes for tensor in made.tensors.values())
    return {
        "way": way,
        "tokens": calibration.tokens,
        "cpu_s": cpu,
        "wall_s": wall,
        "anonymous": above["RssAnon"],
        "of_fp32_model": above["RssAnon"] / size,
        "file_backed": above["RssFile"],
        "on_device": device_bytes,
        "of_fp32_model_on_device": device_bytes / size,
        "on_disk": on_disk,
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", default="1024,2048,4096,8192")
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        shape = SHAPES[chosen.shape]
        config = GPTNeoXConfig(
            **shape,
            vocab_size=VOCABULARY[chosen.shape],
            intermediate_size=4 * shape["hidden_size"],
        )
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).to(getattr(torch, chosen.dtype))
        folder = toy.save(model, Path(temporary, "v1"))
        del model
        alone = multiprocessing.get_context("spawn")
        rows = []
        for way in chosen.ways.split(";"):
            for tokens in map(int, chosen.tokens.split(",")):
                with ProcessPoolExecutor(1, alone) as pool:
                    rows.append(pool.submit(cost, folder, way, tokens, chosen.device).result())
    print(
        "| | tokens | CPU s | wall s | MB above the live model | of the fp32 model | MB in files "
        "| MB on the device | of the fp32 model |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['tokens']} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} "
            f"| {row['anonymous'] / 1e6:.0f} | {row['of_fp32_model']:.2f} "
            f"| {row['file_backed'] / 1e6:.0f} | {row['on_device'] / 1e6:.0f} "
            f"| {row['of_fp32_model_on_device']:.2f} |"
        )
    print()
    print(json.dumps({"options": vars(chosen), "rows": rows}))


if __name__ == "__main__":
    main()
