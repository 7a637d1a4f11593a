"""Find the one checkpoint in a folder, and refuse anything that is not plain data.

Only safetensors files are read, single or sharded. Pickles and remote code are refused, because
anyone who may write to a registry can put them there. Adapters are refused, because they cannot be
averaged.
"""

import os
import re
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
    unreadable,
)
from mlflow_soup.weights.inherit import AUTO_MAP, TEMPLATES, belongs

# largest sizes of files in bytes. For comparison: Gemma's tokenizer_config.json lists 6000 unused
# tokens; an index with 90 000 tensors has 9 MB, a tokenizer with 260 000 tokens 34 MB
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_LARGEST = {_CONFIG: 1 << 20, _GENERATION: 1 << 20, _TOKENIZER: 16 << 20, INDEX: 16 << 20}
_LARGEST_OTHER = 128 << 20
_COPIES = ("num_beams", "num_beam_groups", "num_return_sequences")
_MOST_COPIES = 64
# what libraries for training put before the names of all tensors, or into some
_BEFORE = ("module.", "base_model.model.")
_INTO = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# files that hold a vocabulary; transformers needs no tokenizer_config.json beside them
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_ADAPTER = "merge the adapter into its base (peft: merge_and_unload), then register the result"


def _only(folders: Sequence[Path], root: Path, what: str, label: str, fix: str) -> Path:
    """The one folder, or the one that the others are in, such as a Trainer's checkpoint-500."""
    around = [folder for folder in folders if all(f.is_relative_to(folder) for f in folders)]
    if not around:
        found = ", ".join(str(f) for f in folders) or f"below {root}"
        what = f"{label} has {len(folders)} folders with {what}, but must have exactly one"
        raise ParentError(what, where=found, fix=fix)
    return around[0]


def load_json(path: Path, label: str) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        ParentError: the file cannot be read, is too large, or is not a JSON object.
    """
    try:
        content = parse_json(read_regular(path, _LARGEST.get(path.name, _LARGEST_OTHER)))
    except (OSError, ValueError) as error:
        raise unreadable(path, label, error) from error
    if not isinstance(content, dict):
        raise ParentError(
            f"{path.name} of {label} is not a JSON object",
            where=str(path),
            fix="save the checkpoint again, then register the new copy",
        )
    return content


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
                raise unreadable(path, label, error) from error


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
        raise unreadable(path, label, error) from error


def _weight_files(folder: Path, label: str) -> tuple[list[str], dict[str, str]]:
    """The weight files that transformers reads, and the index: tensor name → file.

    The index is empty if there is none, and where transformers does not read it: it prefers
    model.safetensors.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if SINGLE not in files:
            raise ParentError(
                f"{label} has no index, and its weights are not the one file {SINGLE}",
                where=f"{folder}: {', '.join(files)}",
                fix=f"register one file {SINGLE}, or shards with {INDEX}",
            )
        return [SINGLE], {}
    weight_map = load_json(folder / INDEX, label).get("weight_map")
    where = {str(k): str(v) for k, v in weight_map.items()} if isinstance(weight_map, dict) else {}
    names = sorted(set(where.values()))
    if SINGLE in files and SINGLE not in names:
        return [SINGLE], {}
    if not names:
        raise ParentError(
            f"the index of {label} names no weight file",
            where=str(folder / INDEX),
            fix="save the checkpoint again with save_pretrained",
        )
    for name in names:
        if name not in files:
            raise ParentError(
                f"the index of {label} names {name!r}, which is not a weight file in its folder",
                where=str(folder / INDEX),
                fix="save the checkpoint again with all shards in one folder",
            )
    return names, where


def _passed_over(
    folders: Sequence[Path], weights: Path, files: Sequence[str], indexed: bool
) -> list[Path]:
    """Weights that transformers does not read: of other folders, and beside those that it reads."""
    beside = sorted(path for path in weights.glob("*.safetensors") if path.name not in files)
    if not indexed and (weights / INDEX).is_file():
        beside.append(weights / INDEX)
    return [folder for folder in folders if folder != weights] + beside


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
        refused += [(key, "is quantised", unquantised)] if config.get(key) else []
    if config.get("transformers_weights") not in (None, SINGLE, INDEX):
        whole = f"name the weights {SINGLE}, or name them in {INDEX}"
        refused += [("transformers_weights", "names other files as its weights", whole)]
    for key, why, fix in refused:
        raise ParentError(
            f"{label} cannot be merged: it {why} ({key} in its config)",
            where=str(weights / _CONFIG),
            fix=fix,
        )
    tokenizer = _tokenizer(root, weights, label, with_tokenizer)
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
    unfilled = [n for n, info in tensors.items() if info.shape == (0,) and info.dtype in MIXED]
    if unfilled:
        raise ParentError(
            f"{label} has {len(unfilled)} tensors without values, the first {unfilled[0]}",
            where=str(weights / tensors[unfilled[0]].file),
            fix="gather the weights of all processes when you save: with DeepSpeed ZeRO-3, set "
            "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py",
        )
    wrappers = [found[0] for name in tensors if (found := _INTO.search(name))]
    wrappers += [part for part in _BEFORE if tensors and all(n.startswith(part) for n in tensors)]
    if wrappers:
        raise ParentError(
            f"the tensors of {label} have {wrappers[0]!r} in their names, as in "
            f"{next(name for name in tensors if wrappers[0] in name)}; no model has",
            where=str(weights),
            fix="save the model without what wraps it for training: "
            "accelerator.unwrap_model(model), model.module or model._orig_mod; of an adapter, "
            "model.merge_and_unload()",
        )
    over = tuple(_passed_over(folders, weights, files, indexed=bool(where)))
    return Checkpoint(label, root, weights, tokenizer, config, tensors, stamps, over)


def _tokenizer(root: Path, weights: Path, label: str, needed: bool) -> Path:
    """The folder of the tokenizer: that of the weights, or the one other folder that has one."""
    for files in ((_TOKENIZER,), _VOCABULARIES):
        if any((weights / name).is_file() for name in files):
            return weights
        holders = sorted({path.parent for name in files for path in root.rglob(name)})
        if holders:
            break
    else:
        if not needed:
            return weights
    fix = "register the model together with its one tokenizer"
    tokenizer = _only(holders, root, "a tokenizer", label, fix)
    _check_plain(tokenizer, label)
    return tokenizer


def _code(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a config, and of the configs inside it, by which transformers would run code.

    It ignores `auto_map` where it has the model type or the class itself.
    """
    named = [*_named_code(config)]
    if AUTO_MAP in named and _is_known(config):
        named = [key for key in named if key != AUTO_MAP]
    yield from named


def _named_code(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        # a value `org/kernel` makes transformers download code from the Hub
        if (key == AUTO_MAP and value) or (key.endswith("_implementation") and "/" in str(value)):
            yield key
        elif isinstance(value, dict):
            yield from _named_code(value)


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the model type of a config, or the class of a tokenizer."""
    import transformers  # takes seconds, and few checkpoints name code

    if "tokenizer_class" in config:
        return hasattr(transformers, str(config["tokenizer_class"]))
    return config.get("model_type") in transformers.CONFIG_MAPPING


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
