"""Find the one checkpoint in a folder, and refuse anything that is not plain data.

Only safetensors files are read, single or sharded. Pickles and remote code are refused, because
anyone who may write to a registry can put them there. Adapters are refused, because they cannot be
averaged.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlflow_soup.errors import ParentError
from mlflow_soup.files.untrusted import (
    LARGEST_YAML,
    check_marks,
    parse_json,
    parse_yaml,
    read_regular,
)
from mlflow_soup.weights.checkpoint import (
    COPIED,
    INDEX,
    MIXED,
    SINGLE,
    Checkpoint,
    TensorInfo,
    damaged,
    read_weight_header,
    readable,
    shorten,
    stamp_of,
)
from mlflow_soup.weights.inherit import TEMPLATES, belongs

# largest sizes of files in bytes. For comparison: Gemma's tokenizer_config.json lists 6000 unused
# tokens; an index with 90 000 tensors has 9 MB, a tokenizer with 260 000 tokens 34 MB
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_LARGEST = {_CONFIG: 1 << 20, _GENERATION: 1 << 20, _TOKENIZER: 16 << 20, INDEX: 16 << 20}
_LARGEST_OTHER = 128 << 20
_COPIES = ("num_beams", "num_beam_groups", "num_return_sequences")
_MOST_COPIES = 64
_ADAPTER = "merge the adapter into its base (peft: merge_and_unload), then register the result"


def _only(folders: Sequence[Path], root: Path, what: str, label: str, fix: str) -> Path:
    if len(folders) != 1:
        found = ", ".join(str(f) for f in folders) or f"below {root}"
        what = f"{label} has {len(folders)} folders with {what}, but must have exactly one"
        raise ParentError(what, where=found, fix=fix)
    return folders[0]


def load_json(path: Path, label: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        ParentError: the file cannot be read, is too large, or is not a JSON object.
    """
    try:
        content = parse_json(read_regular(path, _LARGEST.get(path.name, _LARGEST_OTHER)))
    except (OSError, ValueError) as error:
        raise _unreadable(path, label, error) from error
    if not isinstance(content, dict):
        raise ParentError(
            f"{path.name} of {label} is not a JSON object",
            where=str(path),
            fix="save the checkpoint again, then register the new copy",
        )
    return content


def _unreadable(path: Path, label: str, error: Exception) -> ParentError:
    return ParentError(
        f"{path.name} of {label} cannot be read: {error}",
        where=str(path),
        fix="save the checkpoint again, then register the new copy",
    )


def _check_plain(folder: Path, label: str) -> None:
    """Refuse links, pipes and overlong files, because libraries will read this folder later."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_symlink():
            raise ParentError(
                f"{entry.name} of {label} is a link",
                where=str(path),
                fix="register plain files; `cp -rL` replaces the links in a folder by copies",
            )
        if entry.is_dir():
            if entry.name == TEMPLATES:
                _check_plain(path, label)
            continue
        if not entry.is_file():
            raise ParentError(
                f"{entry.name} of {label} is neither a file nor a folder",
                where=str(path),
                fix="register the checkpoint again with plain files only",
            )
        most = _LARGEST.get(entry.name, _LARGEST_OTHER)
        if belongs(entry.name):
            try:
                _check_size(path, most)
            except ValueError as error:
                raise _unreadable(path, label, error) from error


def _check_size(path: Path, most: int) -> None:
    """Refuse a file of more than `most` bytes, and JSON of too many values."""
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"it is {size} bytes long, but at most {most} bytes are allowed")
    if path.suffix == ".json":
        check_marks(read_regular(path, most))


def _check_generation(config: Mapping[str, Any], path: Path, label: str) -> None:
    """Refuse settings of generation that multiply what each text takes."""
    for key in _COPIES:
        number = config.get(key)
        if isinstance(number, int | float) and number > _MOST_COPIES:
            raise ParentError(
                f"{path.name} of {label} asks for {key} = {number}, but at most {_MOST_COPIES} are "
                "allowed",
                where=str(path),
                fix=f"register the checkpoint with a smaller {key}",
            )


def _check_mlmodel(path: Path, label: str) -> None:
    """Refuse an MLmodel file with more than plain values, because it is copied to the soup."""
    try:
        parse_yaml(read_regular(path, LARGEST_YAML))
    except (OSError, ValueError) as error:
        raise _unreadable(path, label, error) from error


def _weight_files(folder: Path, label: str) -> tuple[list[str], dict[str, str]]:
    """The names of the weight files, and the index: tensor name → file; empty without an index."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if files != [SINGLE]:
            raise ParentError(
                f"{label} has no index, and its weights are not the one file {SINGLE}",
                where=f"{folder}: {', '.join(files)}",
                fix=f"register one file {SINGLE}, or shards with {INDEX}",
            )
        return files, {}
    weight_map = load_json(folder / INDEX, label).get("weight_map")
    where = {str(k): str(v) for k, v in weight_map.items()} if isinstance(weight_map, dict) else {}
    names = sorted(set(where.values()))
    for name in names:
        if name not in files:
            raise ParentError(
                f"the index of {label} names {name!r}, which is not a weight file in its folder",
                where=str(folder / INDEX),
                fix="save the checkpoint again with all shards in one folder",
            )
    if names != files:  # transformers would read model.safetensors and ignore the index
        raise ParentError(
            f"the index of {label} names {len(names)} files, but its folder has {len(files)}",
            where=f"{folder}: {', '.join(sorted({*files} ^ {*names}))}",
            fix="save the checkpoint again in an empty folder, so that it has one set of weights",
        )
    return names, where


def _check_index(
    where: Mapping[str, str], tensors: Mapping[str, TensorInfo], path: Path, label: str
) -> None:
    """Refuse an index that does not name, for each tensor, the file that holds it."""
    wrong = [
        f"{name} is in {tensors[name].file if name in tensors else 'no file'}, "
        f"but the index says {where.get(name, 'nothing')}"
        for name in sorted({*where, *tensors})
        if name not in tensors or where.get(name) != tensors[name].file
    ]
    if wrong:
        raise ParentError(
            f"the index of {label} does not fit its files:\n    " + "\n    ".join(shorten(wrong)),
            where=str(path),
            fix="save the checkpoint again with save_pretrained",
        )


def find_checkpoint(root: Path, label: str, *, with_tokenizer: bool = True) -> Checkpoint:
    """The one checkpoint in an artifact tree of any layout.

    The folders are found by their files: a plain Hugging Face folder, the layout of MLflow's
    transformers flavour (`model/`, `components/tokenizer/`), or a folder below `artifacts/`.

    Args:
        root: the artifact tree.
        label: the name of the checkpoint in errors.
        with_tokenizer: if True, refuse a checkpoint without a tokenizer; merging needs none.

    Raises:
        ParentError: the tree has no checkpoint or several, or the checkpoint is damaged, quantised,
            an adapter, or needs code or pickles.
    """
    with readable(label):
        return _find(root, label, with_tokenizer)


def _find(root: Path, label: str, with_tokenizer: bool) -> Checkpoint:
    folders = sorted({path.parent for path in root.rglob("*.safetensors")})
    folders = [folder for folder in folders if os.path.lexists(folder / _CONFIG)]
    if not folders and any(root.rglob("adapter_config.json")):
        fix = _ADAPTER
    elif not folders and any(root.rglob("*.bin")):
        fix = "save it again with save_pretrained, which writes safetensors; pickles are not read"
    else:
        fix = "register one Hugging Face checkpoint folder, with config.json and *.safetensors"
    weights = _only(folders, root, "config.json and *.safetensors", label, fix)
    if (weights / "adapter_config.json").is_file():
        raise ParentError(
            f"{label} has an adapter beside its weights, and adapters cannot be averaged",
            where=str(weights / "adapter_config.json"),
            fix=_ADAPTER,
        )
    _check_plain(weights, label)
    if os.path.lexists(root / "MLmodel"):
        _check_mlmodel(root / "MLmodel", label)
    config = load_json(weights / _CONFIG, label)
    _check_generation(config, weights / _CONFIG, label)
    if (weights / _GENERATION).is_file():
        path = weights / _GENERATION
        _check_generation(load_json(path, label), path, label)
    unquantised = f"register its weights in one of the dtypes {', '.join(MIXED)}"
    own_code = "register a model whose architecture is part of transformers"
    refused = [(key, "brings its own code", own_code) for key in _code(config)]
    for key in ("quantization_config", "compression_config"):
        refused += [(key, "is quantised", unquantised)] if key in config else []
    if config.get("transformers_weights") not in (None, SINGLE, INDEX):
        whole = f"name the weights {SINGLE}, or name them in {INDEX}"
        refused += [("transformers_weights", "names other files as its weights", whole)]
    for key, why, fix in refused:
        raise ParentError(
            f"{label} cannot be merged: it {why} ({key} in its config)",
            where=str(weights / _CONFIG),
            fix=fix,
        )
    tokenizer = weights
    if not (weights / _TOKENIZER).is_file():
        holders = sorted({path.parent for path in root.rglob(_TOKENIZER)})
        if holders or with_tokenizer:
            fix = "register the model together with its one tokenizer"
            tokenizer = _only(holders, root, "a tokenizer", label, fix)
            _check_plain(tokenizer, label)
    if (tokenizer / _TOKENIZER).is_file():
        _check_tokenizer(load_json(tokenizer / _TOKENIZER, label), tokenizer, label)
    files, where = _weight_files(weights, label)
    stamps = {file: stamp_of(weights / file) for file in files}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        header = read_weight_header(weights / file, label)
        header.pop("__metadata__", None)
        # sorted by the place of their data; empty tensors share a place, so also by name
        for name in sorted(header, key=lambda n: (header[n]["data_offsets"], n)):
            if name in tensors:
                raise ParentError(
                    f"{name!r} of {label} is in two files",
                    where=f"{tensors[name].file} and {file} in {weights}",
                    fix="save the checkpoint again in an empty folder, so that it has one set of "
                    "weights",
                )
            entry = header[name]
            tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]))
    if where:
        _check_index(where, tensors, weights / INDEX, label)
    forged = [name for name in tensors if not name.isprintable()]
    if forged:
        raise ParentError(
            f"{label} has a tensor whose name cannot be printed: {forged[0]!r}",
            where=str(weights / tensors[forged[0]].file),
            fix="save the checkpoint again with save_pretrained",
        )
    known = MIXED.keys() | COPIED.keys()
    odd = [f"{name}: {info.dtype}" for name, info in tensors.items() if info.dtype not in known]
    if odd:
        raise ParentError(
            f"{label} is quantised, or has tensors of a dtype that cannot be merged:\n    "
            + "\n    ".join(shorten(odd, 10)),
            where=str(weights),
            fix=unquantised,
        )
    for file in files:
        _check_with_safetensors(weights / file, label)
    return Checkpoint(label, root, weights, tokenizer, config, tensors, stamps)


def _code(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config, and of the configs inside it, that name code outside transformers."""
    for key, value in config.items():
        # a value `org/kernel` makes transformers download code from the Hub
        if key == "auto_map" or (key.endswith("_implementation") and "/" in str(value)):
            yield key
        elif isinstance(value, dict):
            yield from _code(value)


def _check_with_safetensors(path: Path, label: str) -> None:
    """Refuse a file that safetensors refuses; the soup's users will read it with safetensors."""
    try:
        # framework="pt" would reserve memory for the whole file, and fail if there is less
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise damaged(path, label, error) from error


def _check_tokenizer(config: Mapping[str, Any], folder: Path, label: str) -> None:
    """Refuse a tokenizer that brings its own code or names files outside its folder."""
    files = config.get("fast_tokenizer_files") or ()
    leading_out = [f for f in files if os.path.basename(str(f)) != f]
    what = "".join(f"brings its own code ({key})" for key in list(_code(config))[:1])
    if leading_out:
        what = f"names a file outside its folder, {leading_out[0]!r} (fast_tokenizer_files)"
    if what:
        raise ParentError(
            f"the tokenizer of {label} {what}",
            where=str(folder / _TOKENIZER),
            fix="register a tokenizer whose class is part of transformers, with all of its files",
        )
