"""The files that a soup takes from its newest parent besides the weights, and how they are copied.

A soup takes what something loads: transformers, a tokenizer or MLflow. It also takes licences.
Logs, states of optimizers, results, caches, signatures, code of the training and weights in other
formats stay behind: they are about the parent, or they are no part of a model.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlflow_soup.errors import ParentError
from mlflow_soup.files.durable import check_space, on_disk
from mlflow_soup.files.untrusted import open_regular, parse_json
from mlflow_soup.files.writer import BLOCK
from mlflow_soup.weights.checkpoint import INDEX, Checkpoint, readable, unreadable

# lower-case names of the files that tokenizers load
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "*.jinja", "*.model", "*.spm"),
    *("*.tiktoken", "tekken.json", "*vocab*.json", "vocab.txt", "vocab.bpe", "encoder.json"),
    *("merges.txt", "bpe.codes", "dict.txt", "emoji.json", "byte_maps.json", "word_*.json"),
    *("normalizer.json", "prophetnet.tokenizer"),
)
# what transformers loads beside the weights
_OF_MODEL = (
    *("config.json", "generation_config.json", INDEX, "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
_LICENCES = ("*licen[cs]e*", "*copying*", "notice*", "*use_policy*", "*terms_of_use*")
# lower-case names of files that a soup takes over, in any folder of `_homes`
BELONGS = (
    *TOKENIZERS,
    *_OF_MODEL,
    # what sentence-transformers loads
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
    # what MLflow loads
    *("mlmodel", "conda.yaml", "python_env.yaml", "requirements.txt"),
    *("input_example*", "serving_input_example.json"),
    *_LICENCES,
)
AUTO_MAP = "auto_map"  # a field of configs that names code
_CODE = "code"  # MLflow puts this folder on Python's path
TEMPLATES = "additional_chat_templates"  # a folder beside a tokenizer
_PIECE = 1 << 20  # bytes that are copied at a time


def belongs(name: str) -> bool:
    """Whether a file of this name is part of a model."""
    return _is_one_of(BELONGS, name)


def is_of_tokenizer(name: str) -> bool:
    """Whether a tokenizer may load a file of this name."""
    return _is_one_of(TOKENIZERS, name)


def is_of_model(name: str) -> bool:
    """Whether transformers may load a file of this name beside the weights."""
    return _is_one_of(_OF_MODEL, name)


def is_licence(name: str) -> bool:
    """Whether a file of this name is a licence."""
    return _is_one_of(_LICENCES, name)


def _is_one_of(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def copy_the_rest(donor: Checkpoint, folder: Path) -> Path:
    """Copy the files that belong to the model but hold no weights; return the weights' folder.

    Raises:
        ParentError: the donor holds a link or a special file, or a file that cannot be read.
        StoreError: there is no space for the copies and the weights.
    """
    paths = list(_taken_over(donor))
    sizes = [stamp[0] for stamp in donor.stamps.values()] + [path.stat().st_size for path in paths]
    check_space(folder, sum(size + BLOCK for size in sizes))
    for path in paths:
        target = folder / path.relative_to(donor.root)
        with on_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        copy_as_taken(path, donor.label, target)
    weights = folder / donor.weights.relative_to(donor.root)
    with on_disk(weights):
        weights.mkdir(parents=True, exist_ok=True)
    return weights


def _taken_over(donor: Checkpoint) -> Iterator[Path]:
    root = donor.root
    # folders in which names count; the last two are those of MLflow's flavours
    homes = {root, donor.weights, donor.tokenizer, root / "metadata", root / "processor"}
    homes |= {home / TEMPLATES for home in homes}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            raise _not_plain(path, donor.label, "a link")
        if path.is_dir():
            continue
        if not path.is_file():
            raise _not_plain(path, donor.label, "an entry that is neither a file nor a folder")
        if path in donor.passed_over:
            continue
        named = path.parent in homes or path.parent.parent == root / "components"
        if (named and belongs(path.name)) or path.is_relative_to(root / _CODE):
            yield path


def copy_as_taken(path: Path, label: str, target: Path) -> str:
    """Copy a file as a soup takes it over; return the SHA-256 of the copy.

    Raises:
        ParentError: the file is no plain file, or cannot be read.
        StoreError: the disk is full or fails.
    """
    sha256 = hashlib.sha256()
    with on_disk(target), target.open("wb") as copy:
        for piece in _taken(path, label):
            sha256.update(piece)
            copy.write(piece)
    return sha256.hexdigest()


def digest_of_copy(path: Path, label: str) -> str:
    """SHA-256 of a file as a soup takes it over."""
    sha256 = hashlib.sha256()
    for piece in _taken(path, label):
        sha256.update(piece)
    return sha256.hexdigest()


def _taken(path: Path, label: str) -> Iterator[bytes]:
    """The content that a soup takes over: without fields that name code, which stays behind."""
    if not path.name.endswith("config.json"):
        yield from pieces(path, label)
        return
    content = b"".join(pieces(path, label))
    if AUTO_MAP.encode() in content:
        try:
            config = parse_json(content)
        except ValueError as error:
            raise unreadable(path, label, error) from error
        if _drop_code(config):
            content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    yield content


def _drop_code(config: Any) -> bool:
    """Remove `auto_map` from a config, and from the configs inside it; whether there was one."""
    if not isinstance(config, dict):
        return False
    inside = [_drop_code(value) for value in config.values()]
    return config.pop(AUTO_MAP, None) is not None or any(inside)


def pieces(path: Path, label: str) -> Iterator[bytes]:
    """The content of a regular file, piece by piece: it may be larger than the memory."""
    try:
        with readable(label), open_regular(path) as file:
            while piece := file.read(_PIECE):
                yield piece
    except ValueError as error:
        raise _not_plain(path, label, "an entry that is not a plain file") from error


def _not_plain(path: Path, label: str, what: str) -> ParentError:
    return ParentError(
        f"{label} holds {what}: {path.name}",
        where=str(path),
        fix="register the checkpoint again with plain files only",
    )
