"""Merging on disk and switching λ in memory, against mergekit 0.1.5 and against the machine.

    python benchmarks/merge.py                       # both sizes, five rounds; 12 GB of disk
    python benchmarks/merge.py --sizes 160M --rounds 3

It makes random Llama-shaped checkpoints in BF16, and an environment for mergekit. The programs run
in turns as whole processes with a warm page cache; medians are printed, and JSON.

Table 1, disk to disk: CPU seconds (user + system), wall seconds, and the peak of anonymous memory,
which is what a process really takes (mapped files can be dropped at any time). Below them the
floor: reading both parents, and writing one result past the page cache.

Table 2, the live model: seconds to write Θ(λ) into its parameters and bytes moved per second (two
parents read, one model written), beside torch's own triad `a + s·b` on the same number of bytes.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MERGEKIT = "0.1.5"
LAMBDA = 0.7
SIZES: dict[str, dict[str, Any]] = {
    "160M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "shard": "1GB",
    },
    "1.1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "shard": "900MB",
    },
}


def make_parents(folder: Path, shape: dict[str, Any]) -> None:
    """Two checkpoints of random weights, the second with 3 % of noise on the first."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import toy

    shape = dict(shape)
    shard = shape.pop("shard")
    config = LlamaConfig(**shape, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, sigma in (("a", 0.02), ("b", 0.0006)):
            for weight in model.parameters():
                noise = sigma * torch.randn(weight.shape, generator=generator)
                weight.copy_(noise if name == "a" else weight.float() + noise)
            model.save_pretrained(folder / name, max_shard_size=shard)
            toy.tokenizer().save_pretrained(folder / name)


def make_mergekit(folder: Path) -> Path:
    """The Python of an environment with mergekit and our torch."""
    import torch

    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"installing mergekit {MERGEKIT} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = [f"torch=={torch.__version__.split('+')[0]}", f"mergekit=={MERGEKIT}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def anonymous_memory(pid: int) -> int:
    """Bytes of anonymous memory of a process, 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except (OSError, ProcessLookupError):
        pass
    return 0


def measure(command: Sequence[object]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak anonymous memory of a process."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.005)
    wall = time.perf_counter() - begin
    assert process.stderr is not None
    words = process.stderr.read().decode()
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{words}")
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall, "anonymous_mb": peak / 1e6}


def on_disk(folder: Path, mergekit: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Table 1: medians by program."""
    a, b, out = folder / "a", folder / "b", folder / "out"
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(path), "parameters": {"weight": weight}}
            for path, weight in ((a, 1 - LAMBDA), (b, LAMBDA))
        ],
        "dtype": "bfloat16",
    }
    (folder / "mergekit.yml").write_text(json.dumps(recipe))  # JSON is YAML
    files = [str(file) for parent in (a, b) for file in sorted(parent.glob("*.safetensors"))]
    megabytes = sum(os.path.getsize(file) for file in files) // 2 // 1_000_000
    ours = [Path(sys.executable).parent / "mlflow-soup", "merge", a, b, "--out", out]
    ours += ["--weights", f"{1 - LAMBDA:g},{LAMBDA:g}"]
    write = f"dd if=/dev/zero of={out} bs=16M count={megabytes // 16} oflag=direct"
    programs: dict[str, Sequence[object]] = {
        f"mergekit {MERGEKIT}": [mergekit.parent / "mergekit-yaml", folder / "mergekit.yml", out],
        "ours": ours,
        "ours, with digests": [*ours, "--digests", "yes"],
        "floor: import torch": [sys.executable, "-c", "import torch"],
        "floor: read both": ["sh", "-c", f"cat {' '.join(files)} > /dev/null"],
        "floor: write one": ["sh", "-c", write],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, command in programs.items():
            runs[name].append(measure(command))
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
    return {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }


def switch_ours(folder: Path) -> dict[str, float]:
    """Seconds of writing Θ(λ) into our live model, once it has its own pages."""
    from mlflow_soup.evaluation.live import LiveModel
    from mlflow_soup.weights.find import find_checkpoint

    parents = [find_checkpoint(folder / name, name) for name in "ab"]
    live = LiveModel(parents[0], "cpu")
    links = live.link(parents)
    live.set_weights(links, (0.5, 0.5))
    begin = time.perf_counter(), time.process_time()
    live.set_weights(links, (1 - LAMBDA, LAMBDA))
    return _since(begin) | {"bytes": 3.0 * sum(link.live.nbytes for link in links)}


def switch_mergekit(folder: Path) -> dict[str, float]:
    """The same by mergekit's `merge_state_dicts`, copied into the model afterwards."""
    import torch
    from mergekit.merge_methods.api import merge_state_dicts
    from safetensors.torch import load_file

    parents = [
        {k: v for file in (folder / name).glob("*.safetensors") for k, v in load_file(file).items()}
        for name in "ab"
    ]
    live = {name: tensor.clone() for name, tensor in parents[0].items()}
    for lam in (0.5, LAMBDA):
        begin = time.perf_counter(), time.process_time()
        weights = {"weight": [1 - lam, lam]}
        with torch.no_grad():
            merged = merge_state_dicts(
                parents, "linear", parameters=weights, out_dtype=torch.bfloat16
            )
            for name, tensor in live.items():
                tensor.copy_(merged[name])
        del merged
    return _since(begin)


def triad() -> dict[str, float]:
    """Seconds and bytes of `a + s·b`, two reads and one write as a switch has."""
    import torch

    one, two, out = (torch.rand(1 << 26) for _ in range(3))
    torch.add(one, two, alpha=0.3, out=out)
    begin = time.perf_counter(), time.process_time()
    torch.add(one, two, alpha=0.7, out=out)
    return _since(begin) | {"bytes": 3.0 * out.nbytes}


def _since(begin: tuple[float, float]) -> dict[str, float]:
    return {"wall_s": time.perf_counter() - begin[0], "cpu_s": time.process_time() - begin[1]}


SWITCHES = {"mergekit": switch_mergekit, "ours": switch_ours, "triad": lambda _: triad()}


def in_memory(folder: Path, mergekit: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Table 2: medians by program."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SWITCHES}
    for _ in range(rounds):
        for name in SWITCHES:
            python = mergekit if name == "mergekit" else sys.executable
            command = [python, __file__, "--switch", name, "--work", folder]
            done = subprocess.run(
                [str(word) for word in command], stdout=subprocess.PIPE, check=True
            )
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    medians["mergekit"]["bytes"] = medians["ours"]["bytes"]
    return medians


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder to work in and keep; default: temporary")
    parser.add_argument("--switch", choices=SWITCHES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.switch:
        print(json.dumps(SWITCHES[chosen.switch](chosen.work)))
        return
    with contextlib.ExitStack() as stack:
        work = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mergekit = make_mergekit(work / "mergekit")
        results: dict[str, Any] = {}
        for size in chosen.sizes.split(","):
            folder = work / size
            if not (folder / "b" / "config.json").is_file():
                make_parents(folder, SIZES[size])
            results[size] = {
                "disk": on_disk(folder, mergekit, chosen.rounds),
                "memory": in_memory(folder, mergekit, chosen.rounds),
            }
    for size, tables in results.items():
        print(f"\n{size}, disk to disk    CPU s   wall s  anonymous MB    CPU ratio  wall ratio")
        peer = tables["disk"][f"mergekit {MERGEKIT}"]
        for name, row in tables["disk"].items():
            ratios = (
                f"{peer['cpu_s'] / row['cpu_s']:10.1f}x {peer['wall_s'] / row['wall_s']:10.1f}x"
            )
            print(
                f"{name:<22}{row['cpu_s']:7.2f}{row['wall_s']:9.2f}{row['anonymous_mb']:14.0f}"
                + (f"  {ratios}" if not name.startswith("floor") else "")
            )
        print(f"\n{size}, λ switch        CPU s   wall s      GB/s")
        for name, row in tables["memory"].items():
            speed = row["bytes"] / row["wall_s"] / 1e9
            print(f"{name:<22}{row['cpu_s']:7.2f}{row['wall_s']:9.2f}{speed:10.1f}")
    print()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
