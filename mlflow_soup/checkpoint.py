"""A directory of safetensors ↔ tensors: find, compare, digest and write checkpoints.

Only safetensors are read, single or sharded. Pickles, remote code and adapters are refused: a
registry takes anything that anybody uploads.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlflow_soup.errors import ParentError
from mlflow_soup.merge import mix

INDEX = "model.safetensors.index.json"
MANIFEST = "soup_manifest.json"
CARD = "README.md"
# which file wrote them, not what the model is
CONFIG_MAY_DIFFER = frozenset({"_name_or_path", "transformers_version"})
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
# old Pythia keeps a constant −inf here, in fp16
MAY_BE_INFINITE = ("masked_bias",)
# written anew for every soup, or by MLflow when it serves the files; and what belongs to the parent
# alone: its weights in other formats and the state of its training
NOT_INHERITED = (
    *(MANIFEST, CARD, "registered_model_meta", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx", "optimizer*", "scheduler*", "trainer_state.json"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the header alone."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened but not read.

    Attributes:
        label: how errors name it, `models:/my-llm/12`.
        root: the artifact tree.
        weights: the folder below it with config.json and safetensors.
        tokenizer: the folder with the tokenizer; often the same.
        config: config.json.
        tensors: by name on disk.
    """

    label: str
    root: Path
    weights: Path
    tokenizer: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with its name, file by file; memory-mapped, so do not write into them."""
        for file in self.files():
            with self._open(file) as handle:
                for name in sorted(n for n, info in self.tensors.items() if info.file == file):
                    yield name, handle.get_tensor(name)

    def files(self) -> list[str]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def _open(self, file: str) -> Any:
        return safe_open(self.weights / file, framework="pt")


def _only(folders: Sequence[Path], what: str, label: str, fix: str) -> Path:
    if len(folders) != 1:
        found = ", ".join(str(f) for f in folders) or "none"
        raise ParentError(f"{label} has {len(folders)} folders with {what}", where=found, fix=fix)
    return folders[0]


def _load_json(path: Path, label: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ParentError(
            f"{path.name} of {label} cannot be read: {error}",
            where=str(path),
            fix="register the checkpoint again",
        ) from error
    if not isinstance(content, dict):
        raise ParentError(
            f"{path.name} of {label} is not a JSON object",
            where=str(path),
            fix="register the checkpoint again",
        )
    return content


def _weight_files(folder: Path, label: str) -> list[str]:
    """File names of the weights: those of the index where there is one."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        return files
    weight_map = _load_json(folder / INDEX, label).get("weight_map")
    names = sorted({str(v) for v in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in names:
        if Path(name).name != name or not (folder / name).is_file() or (folder / name).is_symlink():
            raise ParentError(
                f"the index of {label} names {name!r}, which is no file beside it",
                where=str(folder / INDEX),
                fix="register the checkpoint again, all shards in one folder",
            )
    if names != files:  # transformers would read model.safetensors, and leave the index alone
        raise ParentError(
            f"the index of {label} names {len(names)} files, but {len(files)} are there",
            where=f"{folder}: {', '.join(sorted({*files} ^ {*names}))}",
            fix="register the checkpoint again with one set of weights",
        )
    return names


def find(root: Path, label: str) -> Checkpoint:
    """The one checkpoint in an artifact tree, whatever layout it was logged in.

    A plain Hugging Face folder, MLflow's transformers flavour (`model/`, `components/tokenizer/`)
    and a folder below `artifacts/` are all found by what they hold.

    Raises:
        ParentError: there is none or more than one, or it needs code or pickles to be read.
    """
    folders = sorted({path.parent for path in root.rglob("*.safetensors")})
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if not folders and any(root.rglob("adapter_config.json")):
        fix = "merge the adapter into its base first (peft: merge_and_unload) and register that"
    elif not folders and any(root.rglob("*.bin")):
        fix = "convert it: save_pretrained writes safetensors; pickles are not read"
    else:
        fix = "register one Hugging Face checkpoint folder: config.json and *.safetensors"
    weights = _only(folders, "config.json and *.safetensors", label, fix)
    config = _load_json(weights / "config.json", label)
    for field, why in (
        ("auto_map", "brings its own code"),
        ("quantization_config", "is quantised"),
    ):
        if field in config:
            raise ParentError(
                f"{label} {why} ({field} in its config) and cannot be merged",
                where=str(weights / "config.json"),
                fix="register an architecture that transformers knows, in F32, BF16 or F16",
            )
    tokenizer = weights
    if not (weights / "tokenizer_config.json").is_file():
        holders = sorted({path.parent for path in root.rglob("tokenizer_config.json")})
        tokenizer = _only(holders, "a tokenizer", label, "register the tokenizer beside the model")
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(weights, label):
        try:
            with safe_open(weights / file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if name in tensors:
                        raise ParentError(
                            f"{name!r} of {label} is in two files",
                            where=f"{tensors[name].file} and {file} in {weights}",
                            fix="register the checkpoint again with one set of weights",
                        )
                    view = handle.get_slice(name)
                    tensors[name] = TensorInfo(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ParentError(
                f"{file} of {label} is damaged: {error}",
                where=str(weights / file),
                fix="register the checkpoint again",
            ) from error
    return Checkpoint(label, root, weights, tokenizer, config, tensors)


def _file_digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def differences(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Why two checkpoints cannot be mixed, one line each; empty when they can."""
    lines = []
    for field in sorted({*first.config, *second.config} - CONFIG_MAY_DIFFER):
        ours, theirs = first.config.get(field), second.config.get(field)
        if ours != theirs:
            lines.append(f"config.json: {field} is {ours!r} against {theirs!r}")
    for name in sorted({*first.tensors, *second.tensors}):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            lines.append(f"{name}: only in {(first if a else second).label}")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(f"{name}: {a} against {b}")
    for file in TOKENIZER_FILES:
        if _file_digest(first.tokenizer / file) != _file_digest(second.tokenizer / file):
            lines.append(f"tokenizer: {file} differs")
    return lines


def check_compatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse parents that differ in anything but their weights' values.

    Raises:
        ParentError: with every difference, up to twenty, in one report.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        lines = differences(first, other)
        if lines:
            more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
            raise ParentError(
                f"{first.label} and {other.label} are not checkpoints of one model:\n    "
                + "\n    ".join([*lines[:20], *more]),
                where=f"{first.label} against {other.label}",
                fix="merge versions of one training run: same architecture, tokenizer and dtype",
            )


def _raw(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(checkpoint: Checkpoint) -> str:
    """Canonical digest of the tensors: independent of sharding and of key order.

        sha256 over sorted (name, dtype, shape, sha256(little-endian bytes))

    Reads every tensor once and refuses values that are not finite.

    Raises:
        ParentError: a tensor holds NaN or infinity.
    """
    rows = []
    for name, tensor in checkpoint.read():
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        if not finite and not name.endswith(MAY_BE_INFINITE):
            raise ParentError(
                f"{name!r} of {checkpoint.label} holds NaN or infinity",
                where=str(checkpoint.weights / checkpoint.tensors[name].file),
                fix="merge another version; this one did not survive its training",
            )
        info = checkpoint.tensors[name]
        content = hashlib.sha256(_raw(tensor)).hexdigest()
        rows.append(json.dumps([name, info.dtype, list(info.shape), content]))
    return "sha256:" + hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def write(checkpoints: Sequence[Checkpoint], lam: Sequence[float], folder: Path) -> Checkpoint:
    """Write the soup Σ λ_i·Θ_i in its newest parent's layout: same files, names and dtypes.

    Args:
        checkpoints: the parents, oldest first, already found compatible.
        lam: merge weights λ, one per parent, summing to 1.
        folder: where the artifact tree goes; must not exist yet.

    Returns:
        The written checkpoint, opened.
    """
    donor = checkpoints[-1]
    weights = donor.weights.relative_to(donor.root)

    for path in donor.root.rglob("*"):
        if path.is_symlink():
            raise ParentError(
                f"{donor.label} holds a link, {path.name}",
                where=str(path),
                fix="register the checkpoint again with plain files",
            )
    shutil.copytree(donor.root, folder, ignore=shutil.ignore_patterns(*NOT_INHERITED))
    readers = [dict(c.read()) for c in checkpoints]
    for file in donor.files():
        names = [name for name, info in donor.tensors.items() if info.file == file]
        mixed = {}
        for name in names:
            mixed[name] = mix([reader[name] for reader in readers], lam, name=name)
        # one metadata key: with more, safetensors orders them differently in every process
        save_file(mixed, folder / weights / file, metadata={"format": "pt"})
    return find(folder, "the soup")
