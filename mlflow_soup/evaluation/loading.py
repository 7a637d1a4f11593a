"""Let transformers load a model and a tokenizer that somebody else wrote, within limits."""

import contextlib
import copy
import hashlib
import inspect
import io
import json
import logging
import math
import re
import string
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import chat_template_utils  # private door

from mlflow_soup.errors import ParentError, brief
from mlflow_soup.evaluation.limits import LimitError, Result, try_within, work_within
from mlflow_soup.files.untrusted import open_regular
from mlflow_soup.weights.checkpoint import Checkpoint, shorten
from mlflow_soup.weights.digests import of_file
from mlflow_soup.weights.inherit import TEMPLATES, belongs

logger = logging.getLogger("mlflow_soup")
# what loading a config or a tokenizer may take. Models of transformers take up to 1 s and 150 MB, a
# tokenizer with 500 000 tokens and merges 5 s and 380 MB; sentencepiece is converted, which is slow
_MEMORY = 1 << 30
_SECONDS_OF_MODEL, _SECONDS_OF_TOKENIZER = 30, 120
# a model may have 4 parts or values for each that the weights have, as when weights are tied or
# stored fused, and so many more: masks of GPT-Neo's and GPT-J's kind are not stored
_MORE_PARTS, _MORE_VALUES = 10_000, 1 << 28

# what reading texts may take, for each character: Python's slow tokenizers read 100 000 in a
# second, and a list of tokens takes 36 bytes for each
_CHARACTERS_IN_A_SECOND, _BYTES_OF_CHARACTER = 20_000, 200

_MOST_GROWTH = 16  # of a text, by the rules of a decoder; those of transformers have at most 1

# settings of a tokenizer that decide its tokens
_RULES = (
    *("special_tokens_map", "chat_template", "padding_side", "truncation_side"),
    *("model_max_length", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("add_bos_token", "add_eos_token"),
)

_PROBE = f"{string.printable} é ß 中 🙂"  # rules of a tokenizer can make a text longer without end

_ONE_THREAD = threading.RLock()
_TRIED: set[str] = set()  # fingerprints of what loads within limits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notes of libraries, which have no switches of their own.

    One thread at a time: the streams belong to the process, and so do the classes that transformers
    patches while it loads a model. Two threads that restore them out of order leave them changed:
    silent streams, and models that tie no weights.
    """
    notes = logging.getLogger("transformers")  # its handler keeps the first stream
    with (
        _ONE_THREAD,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        before = notes.level
        notes.setLevel(logging.ERROR)
        try:
            yield
        finally:
            notes.setLevel(before)


class _Built(BaseException):
    """The model is built, and its weights are not loaded."""


def _stop(*_: Any, **__: Any) -> NoReturn:
    raise _Built


def try_loading(checkpoint: Checkpoint) -> None:
    """Refuse a config or tokenizer that takes more than its limits, before this process loads it.

    Both decide how often transformers' loops run and how much they allocate, in more ways than
    rules on numbers could name. A fork does what this process will do, up to the weights. It costs
    0.2 s, and as long as the tokenizer takes to load; a new process would take seconds to start.
    Checkpoints of one training have the same config and tokenizer: these are tried once.

    Raises:
        ParentError: one of them takes more than its limits, or ends the process.
    """
    fingerprint = _fingerprint(checkpoint)
    if fingerprint in _TRIED:
        return

    def build() -> None:
        # private door: transformers.PreTrainedModel._load_pretrained_model
        PreTrainedModel._load_pretrained_model = staticmethod(_stop)  # type: ignore[method-assign]
        with contextlib.suppress(_Built):
            load_model(checkpoint)

    with _refusing("config", checkpoint), quiet():
        try_within(build, seconds=_SECONDS_OF_MODEL, memory=_MEMORY, file_size=_MEMORY)
    _try_tokenizer(checkpoint)
    _TRIED.add(fingerprint)


def _try_tokenizer(checkpoint: Checkpoint) -> None:
    def tokenize() -> None:
        load_tokenizer(checkpoint)(_PROBE)

    with _refusing("tokenizer", checkpoint), quiet():
        try_within(tokenize, seconds=_SECONDS_OF_TOKENIZER, memory=_MEMORY, file_size=_MEMORY)


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint that this process has not tried yet.

    Raises:
        ParentError: transformers cannot load it, or it takes more than its limits.
    """
    _try_tokenizer(checkpoint)
    with quiet():
        return load_tokenizer(checkpoint)


def reads_alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether the tokenizers of two checkpoints make the same tokens of a text.

    The config of a model beside the tokenizer can make transformers choose another class for it.

    Raises:
        ParentError: transformers cannot load one of them, or it takes more than its limits.
    """
    found = []
    for checkpoint in (one, other):
        tokenizer = open_tokenizer(checkpoint)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        found.append((list(tokenizer(_PROBE)["input_ids"]), special))
    return found[0] == found[1]


@contextlib.contextmanager
def _refusing(what: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn a LimitError of a fork into the error for a config or a tokenizer."""
    folder = checkpoint.weights if what == "config" else checkpoint.tokenizer
    try:
        yield
    except LimitError as error:
        raise ParentError(
            f"the {what} of {checkpoint.label} cannot be loaded: {error}",
            where=str(folder / ("config.json" if what == "config" else "tokenizer_config.json")),
            fix=f"compare the numbers and files of the {what} with those of a sound version, "
            "and register it again",
        ) from error


def config_as_loaded(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What transformers makes of a config: with defaults, and fields of old versions by new names.

    Fields are left out that the config's class does not declare and that no code of transformers
    reads, such as the notes of a trainer.

    Returns:
        The fields; None if transformers does not have the model type, or cannot load the config.

    Raises:
        ParentError: the config takes more than its limits.
    """
    kind = str(checkpoint.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return None

    def load() -> dict[str, Any]:
        found: dict[str, Any] = (
            CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(checkpoint.config))).to_dict()
        )
        declared = CONFIG_MAPPING[kind]().to_dict()
        # transformers 5 moves fields of the rotary embedding there, and keeps the old ones
        moved = (found.get("rope_parameters") or {}).items()
        return {
            field: value
            for field, value in found.items()
            if field in declared
            or (value is not None and (field, value) not in moved and _is_read(field, kind))
        }

    with _refusing("config", checkpoint), quiet():
        try:
            return work_within(load, seconds=_SECONDS_OF_MODEL, memory=_MEMORY, file_size=_MEMORY)
        except LimitError:
            raise
        except Exception:  # a config can make the class raise anything; loading the model says so
            return None


def _is_read(field: str, kind: str) -> bool:
    """Whether transformers' code for a model type, or its common code, has this word."""
    own = Path(inspect.getfile(CONFIG_MAPPING[kind])).parent
    shared = Path(transformers.__file__).parent
    word = re.compile(rf"\b{re.escape(field)}\b")
    return any(
        word.search(file.read_text(encoding="utf-8"))
        for folder in (own, shared, shared / "integrations", shared / "generation")
        for file in folder.glob("*.py")
    )


def tokenizer_as_loaded(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `rules_of` says of a checkpoint's tokenizer; None if transformers cannot load it.

    Raises:
        ParentError: the tokenizer takes more than its limits.
    """
    limits = {"seconds": _SECONDS_OF_TOKENIZER, "memory": _MEMORY, "file_size": _MEMORY}
    with _refusing("tokenizer", checkpoint), quiet():
        try:
            return work_within(lambda: rules_of(load_tokenizer(checkpoint)), **limits)
        except ParentError:
            return None


def rules_of(tokenizer: Any) -> dict[str, Any]:
    """All that decides which tokens a loaded tokenizer makes of a text, as plain values."""
    rules = {name: getattr(tokenizer, name, None) for name in _RULES}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # how the last text was padded and cut
        rules["backend"] = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
    else:
        rules["added_tokens"] = {
            str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()
        }
        rules["class"] = type(tokenizer).__name__
        rules["vocabulary"] = tokenizer.get_vocab()
        paths = (Path(tokenizer.name_or_path) / n for n in tokenizer.vocab_files_names.values())
        rules["files"] = {path.name: of_file(path) for path in paths if path.is_file()}
    return rules


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of what transformers builds a model and a tokenizer from, besides the weights."""
    digest = hashlib.sha256(repr([(n, t.shape) for n, t in checkpoint.tensors.items()]).encode())
    places = {checkpoint.weights, checkpoint.tokenizer, checkpoint.tokenizer / TEMPLATES}
    for folder in sorted(place for place in places if place.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.is_file() and belongs(path.name):
                with open_regular(path) as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(repr((folder == checkpoint.weights, path.name, content)).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _in_proportion(checkpoint: Checkpoint) -> Iterator[None]:
    """Refuse a model with far more parameters than the weights, while it is built.

    transformers builds it without memory for its values, but then allocates all that it misses.
    """
    thread = threading.get_ident()
    most_parts = _MORE_PARTS + 4 * len(checkpoint.tensors)
    stored = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    parts, values = 0, 0

    def count(_: torch.nn.Module, __: str, tensor: Tensor | None) -> None:
        nonlocal parts, values
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        parts, values = parts + 1, values + tensor.numel()
        for much, most, there, what in (
            (parts, most_parts, len(checkpoint.tensors), "tensors"),
            (values, _MORE_VALUES + 4 * stored, stored, "values"),
        ):
            if much > most:
                raise ParentError(
                    f"the config of {checkpoint.label} asks for more than {most} {what}, but its "
                    f"weights have {there}",
                    where=str(checkpoint.weights / "config.json"),
                    fix="save the model again with save_pretrained, so that its config fits",
                )

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skeleton(checkpoint: Checkpoint) -> Any:
    """The transformers model of a checkpoint, without memory for its values.

    Raises:
        ParentError: transformers cannot build it.
    """
    try:
        with quiet(), _in_proportion(checkpoint), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                str(checkpoint.weights), trust_remote_code=False, local_files_only=True
            )
            auto: Any = AutoModelForCausalLM
            return auto.from_config(config, trust_remote_code=False)
    except ParentError:
        raise
    except Exception as error:  # a config can make the model's code raise anything
        raise _unloadable(checkpoint, "model", "AutoModelForCausalLM", error) from error


def load_model(checkpoint: Checkpoint, device_map: Any = None) -> Any:
    """The transformers model of a checkpoint, with its weights.

    Args:
        checkpoint: the checkpoint.
        device_map: what transformers calls so; None for the CPU.

    Raises:
        ParentError: transformers cannot load it, a weight is missing, or the config asks for far
            more than the weights have.
    """
    try:
        with quiet(), _in_proportion(checkpoint):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.weights),
                dtype="auto",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (ParentError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config can make the model's code raise anything
        raise _unloadable(checkpoint, "model", "AutoModelForCausalLM", error) from error
    model, info = loaded
    if unused := sorted(info["unexpected_keys"]):
        logger.warning(
            "transformers does not use these tensors of %s: %s. They are merged and stay in the "
            "soup, but no score depends on them",
            checkpoint.label,
            ", ".join(shorten(unused, 3)),
        )
    # transformers initialises these at random, with only a warning
    shapes = [
        f"{name} is {list(stored)}, and not {list(wanted)}"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    for what, found in (
        ("lacks tensors that the model needs", sorted(info["missing_keys"])),
        ("has tensors of other shapes than its config says", shapes),
    ):
        if found:
            raise ParentError(
                f"{checkpoint.label} {what}: {', '.join(shorten(found, 3))}",
                where=str(checkpoint.weights),
                fix="save the checkpoint with save_pretrained, and register it again",
            )
    return model


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ParentError: transformers cannot load it, or its decoder makes texts much longer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.tokenizer), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise _unloadable(checkpoint, "tokenizer", "AutoTokenizer", error) from error
    _check_decoder(tokenizer, checkpoint)
    return tokenizer


def _check_decoder(tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Refuse rules by which tokens become text without an end.

    The weights choose the tokens. So no trial on texts shows what these rules can take.
    """
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    if decoder is None:
        return
    growth = 1.0
    for rule in _replacements(json.loads(decoder.__getstate__())):
        text = rule["pattern"].get("String")
        if text is None:
            what = f"matches a pattern, {rule['pattern']}"
            break
        growth *= max(1.0, len(rule["content"]) / max(1, len(text)))
        if growth > _MOST_GROWTH:
            what = f"makes texts more than {_MOST_GROWTH} times as long"
            break
    else:
        return
    raise ParentError(
        f"the decoder of the tokenizer of {checkpoint.label} {what}",
        where=str(checkpoint.tokenizer / "tokenizer.json"),
        fix="replace short texts by short texts in the decoder, and register the version again",
    )


def _replacements(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Replace rules of a decoder."""
    if rule["type"] == "Replace":
        yield rule
    for inner in rule.get("decoders", ()):
        yield from _replacements(inner)


def _unloadable(checkpoint: Checkpoint, what: str, loader: str, error: Exception) -> ParentError:
    fix = f"register a checkpoint that {loader}.from_pretrained loads"
    kind = checkpoint.config.get("model_type")
    words = f"transformers cannot load the {what} of {checkpoint.label}: {brief(error)}"
    if kind is None:
        words = f"the config of {checkpoint.label} names no model_type"
    elif kind not in CONFIG_MAPPING:
        words = f"transformers {transformers.__version__} does not have models of type {kind!r}"
        fix = f"install a version that has them; or {fix}"
    elif what == "model" and CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        words = f"{checkpoint.label} is of type {kind!r}, which does not predict the next token"
    folder = checkpoint.weights if what == "model" else checkpoint.tokenizer
    return ParentError(words, where=str(folder), fix=fix)


class _Today(datetime):
    """The day that a chat template prints as today's: a score must not depend on the day."""

    @classmethod
    def now(cls, tz: Any = None) -> "_Today":
        return cls(2024, 7, 26, tzinfo=tz)


def stop_clock() -> None:
    """Let every chat template print the same day; for the rest of a fork."""
    # private door: transformers.utils.chat_template_utils.datetime
    chat_template_utils.datetime = _Today  # type: ignore[attr-defined]


def read_within(work: Callable[[], Result], characters: int) -> Result:
    """Do work on texts in a fork, within limits that grow with the number of characters.

    Raises:
        LimitError: the work took more than its limits, or crashed.
    """
    size = _MEMORY + _BYTES_OF_CHARACTER * characters
    seconds = _SECONDS_OF_TOKENIZER + characters // _CHARACTERS_IN_A_SECOND
    with quiet():
        return work_within(work, seconds=seconds, memory=size, file_size=size)


def tokenize_within(work: Callable[[], Result], tokenizer: Any, characters: int) -> Result:
    """Let a tokenizer read texts in a fork, within limits, and return what `work` makes of them.

    The rules of a tokenizer are somebody else's. A rule can make a text longer without end, take
    forever on it, or crash, and do so on no other text.

    Args:
        work: reads the texts; its result can be pickled.
        tokenizer: the tokenizer, as `load_tokenizer` returned it.
        characters: the number of characters in the texts.

    Raises:
        ParentError: the tokenizer takes more than its limits, or ends the process.
    """
    try:
        return read_within(work, characters)
    except LimitError as error:
        raise ParentError(
            f"the tokenizer of the versions cannot read the texts of the tasks: {error}",
            where=str(tokenizer.name_or_path),
            fix="compare the rules in tokenizer.json with those of a sound version, and register "
            "the versions again",
        ) from error
