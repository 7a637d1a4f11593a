"""Copy a checkpoint of any layout into one flat folder, as Hugging Face's tools expect it.

MLflow's transformers flavour keeps the tokenizer in a folder of its own. transformers finds none
beside the weights then, and silently makes an empty one. A flat folder holds weights, configs,
tokenizer and licences side by side. What only MLflow loads stays behind, and so does code.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from mlflow_soup.errors import ParentError
from mlflow_soup.files.durable import check_space, on_disk
from mlflow_soup.files.writer import BLOCK, FileWriter
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.inherit import (
    TEMPLATES,
    copy_as_taken,
    is_licence,
    is_of_model,
    is_of_tokenizer,
    pieces,
)


def flatten(checkpoint: Checkpoint, folder: Path) -> dict[Path, str]:
    """Copy the files of a checkpoint into a folder.

    Args:
        checkpoint: the checkpoint.
        folder: the folder to write into; exists and is empty.

    Returns:
        Each file of the checkpoint that was copied → the SHA-256 of its copy.

    Raises:
        ParentError: two files would have the same name; or one cannot be read, is no plain file, or
            was changed in the meantime.
        StoreError: there is no space for the copies, or the disk fails.
    """
    beside = dict(_beside(checkpoint))
    weights = [checkpoint.weights / file for file in checkpoint.files()]
    sizes = [stamp[0] for stamp in checkpoint.stamps.values()]
    sizes += [path.stat().st_size for path in beside.values()]
    check_space(folder, sum(size + BLOCK for size in sizes))
    digests = {}
    for name, path in beside.items():
        with on_disk(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
        digests[path] = copy_as_taken(path, checkpoint.label, folder / name)
    for path in weights:
        with FileWriter(folder / path.name, digest=True) as writer:
            for piece in pieces(path, checkpoint.label):
                writer.put(piece)
        assert writer.sha256 is not None
        digests[path] = writer.sha256.hexdigest()
    checkpoint.check_unchanged()
    return digests


def _beside(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """What is copied besides the weights: name in the flat folder, and path; each name once."""
    found: dict[str, Path] = {}
    for name, path in _candidates(checkpoint):
        other = found.setdefault(name, path)
        if other == path:
            yield name, path
        elif of_file(other) != of_file(path):
            raise ParentError(
                f"{checkpoint.label} has two different files {name}, and a flat folder has room "
                "for one",
                where=f"{other} and {path}",
                fix="register the version with one of them",
            )


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    weights, tokenizer = checkpoint.weights, checkpoint.tokenizer
    for path in _plain(weights, checkpoint):
        if is_of_model(path.name) and path not in checkpoint.passed_over:
            yield path.name, path
    # where the tokenizer has a folder of its own, one file of it beside the weights is none
    for path in _plain(tokenizer, checkpoint):
        if is_of_tokenizer(path.name) and not is_of_model(path.name):
            yield path.name, path
    for path in _plain(tokenizer / TEMPLATES, checkpoint):
        if is_of_tokenizer(path.name):
            yield f"{TEMPLATES}/{path.name}", path
    for folder in (checkpoint.root, weights, tokenizer):
        for path in _plain(folder, checkpoint):
            if is_licence(path.name) and not is_of_tokenizer(path.name):
                yield path.name, path


def _plain(folder: Path, checkpoint: Checkpoint) -> Iterator[Path]:
    """The files in a folder, by name; a link is refused when it is opened."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink():
            raise ParentError(
                f"{checkpoint.label} holds a link: {entry.name}",
                where=entry.path,
                fix="register the checkpoint again with plain files only",
            )
        if entry.is_file():
            yield Path(entry.path)
