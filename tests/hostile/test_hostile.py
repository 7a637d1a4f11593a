"""Hostile checkpoints, task folders, registries and manifests, met the way a user meets them.

Each case builds its input in a folder of its own, with a canary that its payload would make and a
secret that it would read. It must be refused by the right error, which names the file and the
reason; the canary must not be there, and nobody may have opened the secret.
"""

import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import time

import dill
import lm_eval.caching.cache
import lm_eval.utils
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig
from traps import ALWAYS, Watch, place, plain, untouched, with_data, with_fields, with_lines, write  # noqa: F401

import mlflow_soup
import toy
from conftest import MODEL
from mlflow_soup import Spec, errors
from mlflow_soup.errors import MismatchError, ObjectiveError, ParentError, SpecError
from mlflow_soup.evaluation import loading, task_folders
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.records import Version
from mlflow_soup.registry.pull import pull
from mlflow_soup.request.names import parse_uri
from mlflow_soup.statistics.calibration import calibrate
from mlflow_soup.weights.checkpoint import INDEX, SINGLE
from mlflow_soup.weights.find import find_checkpoint

SECOND = "model-00002-of-00002.safetensors"


class Payload:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


# ---- checkpoints: what merging or opening one meets


def header(place, content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    length = len(text) if length is None else length
    (place.folder / SINGLE).write_bytes(length.to_bytes(8, "little") + text + data)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def replace_by(make, name):
    def spoil(place):
        (place.folder / name).unlink(missing_ok=True)
        make(place.folder / name, place)

    return spoil


def link(path, place):
    path.symlink_to(place.secret)


def pipe(path, place):
    os.mkfifo(path)


def folder(path, place):
    path.mkdir()


def door(path, place):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    os.chdir(here)


def long(size):
    return lambda path, place: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), size)


def text(content):
    return lambda path, place: path.write_bytes(content)


def in_json(name, **fields):
    return lambda place: toy.edit_json(place.folder / name, **fields)


def in_shards(spoil):
    def shard_first(place):
        toy.shard(place.folder)
        spoil(place)

    return shard_first


def in_index(file):
    def spoil(place):
        where = json.loads((place.folder / INDEX).read_text())["weight_map"]
        name = file.format(secret=place.secret)
        toy.edit_json(place.folder / INDEX, weight_map=where | {"b": name})

    return in_shards(spoil)


def only_pickle(place):
    (place.folder / SINGLE).unlink()
    (place.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(place.code)))


def below(make, name):
    def spoil(place):
        (place.folder / "notes").mkdir()
        make(place.folder / "notes" / name, place)

    return spoil


def beside_tokenizer(make):
    def spoil(place):
        (place.folder / "additional_chat_templates").mkdir()
        make(place.folder / "additional_chat_templates" / "tool_use.jinja", place)

    return spoil


def mlmodel(content):
    return lambda place: (place.folder / "MLmodel").write_text(content.format(code=place.code))


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def empties(size, one=b"[]"):
    """A JSON object of so many bytes that holds only empty values."""
    return b'{"a":[' + (one + b",") * (size // len(one + b",")) + b"0]}"


MANY = {f"t{i}": entry((0,), (0, 0)) for i in range(20_001)}

CHECKPOINTS = {
    "a pickle alone": (only_pickle, "pickles are not read"),
    "code in config": (
        in_json("config.json", model_type="evil", auto_map={"AutoModel": "evil.Model"}),
        r"brings its own code \(auto_map in its config",
    ),
    "code in a config within": (
        in_json(
            "config.json", model_type="e", text_config={"auto_map": {"AutoModel": "evil.Model"}}
        ),
        "brings its own code",
    ),
    "a kernel of the Hub": (
        in_json("config.json", _attn_implementation="evil/kernel"),
        r"brings its own code \(_attn_implementation",
    ),
    "weights by another name": (
        in_json("config.json", transformers_weights="evil.safetensors.index.json"),
        r"names other files as its weights \(transformers_weights",
    ),
    "code in tokenizer": (
        in_json(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
            tokenizer_class="EvilTokenizer",
        ),
        "tokenizer of .* brings its own code",
    ),
    "a tokenizer elsewhere": (
        in_json("tokenizer_config.json", fast_tokenizer_files=["../elsewhere/tokenizer.5.0.json"]),
        "fast_tokenizer_files",
    ),
    "config is a link": (replace_by(link, "config.json"), r"config\.json of .* is a link"),
    "config is a pipe": (replace_by(pipe, "config.json"), r"config\.json of .* neither a file"),
    "config is a folder": (replace_by(folder, "config.json"), r"config\.json of .* cannot be read"),
    "config is a socket": (replace_by(door, "config.json"), r"config\.json of .* neither a file"),
    "config nested": (
        replace_by(text(b'{"a":' * 100_000), "config.json"),
        r"config\.json of .* nested too deep",
    ),
    "config nested a little": (
        replace_by(text(b'{"a":' * 300 + b"1" + b"}" * 300), "config.json"),
        r"config\.json of .* nested too deep",
    ),
    "config of 300 MB": (
        replace_by(long(300 << 20), "config.json"),
        r"config\.json of .* 314572800",
    ),
    "config no UTF-8": (replace_by(text(b'{"a": "\xff"}'), "config.json"), r"config\.json .*utf-8"),
    "tokenizer is a link": (replace_by(link, "tokenizer.json"), r"tokenizer\.json of .* is a link"),
    "tokenizer is a pipe": (replace_by(pipe, "tokenizer.json"), r"tokenizer\.json of .* neither"),
    "tokenizer of 1 TB": (replace_by(long(1 << 40), "tokenizer.json"), r"tokenizer\.json .* 10995"),
    "tokenizer's config of 1 GB": (
        replace_by(long(1 << 30), "tokenizer_config.json"),
        r"tokenizer_config\.json of .* 1073741824",
    ),
    "tokenizer's config of empties": (
        replace_by(text(empties(15 << 20)), "tokenizer_config.json"),
        r"tokenizer_config\.json of .* more than 4000000 commas",
    ),
    "an index of empties": (
        in_shards(replace_by(text(empties(15 << 20, b"{}")), INDEX)),
        f"{INDEX} of .* more than 4000000 commas",
    ),
    "a header of empties": (
        lambda place: header(place, empties((8 << 20) - 64, b"[[]]")),
        "model.safetensors of .* more than 4000000 commas",
    ),
    "a shape of 1000 dimensions": (
        lambda place: header(place, {"a": entry((1,) * 1000, (0, 4))}, bytes(4)),
        "'a' has 1000 dimensions",
    ),
    "tokenizer of empties": (
        replace_by(text(empties(60 << 20)), "tokenizer.json"),
        r"tokenizer\.json of .* more than 4000000 commas",
    ),
    "special tokens of empties": (
        replace_by(text(empties(60 << 20, b"{}")), "special_tokens_map.json"),
        r"special_tokens_map\.json of .* more than 4000000 commas",
    ),
    "added tokens of empties": (
        replace_by(text(empties(60 << 20, b"{}")), "added_tokens.json"),
        r"added_tokens\.json of .* more than 4000000 commas",
    ),
    "generation settings of 100 MB": (
        replace_by(text(empties(100 << 20)), "generation_config.json"),
        r"generation_config\.json of .* 1048576",
    ),
    "generation settings nested": (
        replace_by(text(b'{"a":' * 100_000), "generation_config.json"),
        r"generation_config\.json of .* nested too deep",
    ),
    "a million beams": (
        replace_by(text(b'{"num_beams": 1000000}'), "generation_config.json"),
        r"generation_config\.json of .* asks for num_beams = 1000000",
    ),
    "a million beams in config": (
        in_json("config.json", num_return_sequences=1_000_000),
        r"config\.json of .* asks for num_return_sequences = 1000000",
    ),
    "vocabulary of 1 GB": (replace_by(long(1 << 30), "vocab.txt"), r"vocab\.txt of .* 1073741824"),
    "merges of 1 GB": (replace_by(long(1 << 30), "merges.txt"), r"merges\.txt of .* 1073741824"),
    "sentencepiece of 1 TB": (
        replace_by(long(1 << 40), "tokenizer.model"),
        r"tokenizer\.model of .* 1099511627776",
    ),
    "a chat template of 1 GB": (
        replace_by(long(1 << 30), "chat_template.jinja"),
        r"chat_template\.jinja of .* 1073741824",
    ),
    "a chat template is a link": (
        beside_tokenizer(link),
        r"tool_use\.jinja of .* is a link",
    ),
    "a chat template is a pipe": (
        beside_tokenizer(pipe),
        r"tool_use\.jinja of .* neither a file",
    ),
    "weights are a link": (replace_by(link, SINGLE), "model.safetensors of .* is a link"),
    "weights are a pipe": (replace_by(pipe, SINGLE), "model.safetensors of .* neither a file"),
    "weights are a folder": (replace_by(folder, SINGLE), "model.safetensors of .* regular"),
    "a shard is a link": (in_shards(replace_by(link, SECOND)), f"{SECOND} of .* is a link"),
    "a shard is a pipe": (in_shards(replace_by(pipe, SECOND)), f"{SECOND} of .* neither a file"),
    "a shard above": (in_index("../elsewhere/secret.jsonl"), "names '../elsewhere/secret.jsonl'"),
    "a shard by its path": (
        in_index("{secret}"),
        "names '/.*secret.jsonl', which is not a weight file",
    ),
    "a shard is the folder above": (in_index(".."), r"names '\.\.', which is not a weight file"),
    "an index nested": (
        in_shards(replace_by(text(b'{"weight_map":' + b"[" * 9999), INDEX)),
        f"{INDEX} of .* nested too deep",
    ),
    "an index of 1 GB": (in_shards(replace_by(long(1 << 30), INDEX)), f"{INDEX} of .* 1073741824"),
    "an index of a list": (in_shards(replace_by(text(b"[]"), INDEX)), "is not a JSON object"),
    "a header of 99 MB": (
        lambda place: (
            header(place, b"{", length=99 << 20),
            os.truncate(place.folder / SINGLE, 100 << 20),
        ),
        "header is longer than 8388608 bytes",
    ),
    "a header beyond the end": (
        lambda p: header(p, b"{}", length=1 << 62),
        "ends inside its header",
    ),
    "a header nested": (
        lambda p: header(p, b'{"a":' * 100_000),
        "model.safetensors of .* nested too deep",
    ),
    "a name twice": (lambda p: header(p, b'{"a":1,"a":1}'), "has a key twice"),
    "no tensors": (lambda p: header(p, {}), "holds no tensors"),
    "20001 tensors": (lambda p: header(p, MANY), "more than 20000 tensors"),
    "a hole": (
        lambda p: header(p, {"a": entry(offsets=(4, 12))}, bytes(12)),
        "'a' begins at byte 4",
    ),
    "an overlap": (
        lambda p: header(p, {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b' begins at byte 4",
    ),
    "bytes at the end": (lambda p: header(p, {"a": entry()}, bytes(9)), "take 8 .* has 9"),
    "bytes missing": (lambda p: header(p, {"a": entry()}, bytes(7)), "take 8 .* has 7"),
    "a negative shape": (lambda p: header(p, {"a": entry((-2,))}, bytes(8)), "number -2"),
    "an overflow": (
        lambda p: header(p, {"a": entry((1 << 40, 1 << 40, 0), (0, 0))}),
        "shape of 'a' is too large",
    ),
    "another dtype": (
        lambda p: header(p, {"a": entry((8,), dtype="F8_E4M3")}, bytes(8)),
        "a: F8_E4M3",
    ),
    "a name that forges lines": (
        lambda p: header(p, {"a\n  fix: run evil": entry()}, bytes(8)),
        "cannot be printed",
    ),
    "not a number": (
        lambda place: toy.edit_tensors(place.folder, b=torch.tensor([[float("nan")] * 3] * 2)),
        "'b' of .* holds NaN or infinity",
    ),
    "MLmodel makes objects": (
        mlmodel('a: !!python/object/apply:builtins.exec ["{code}"]'),
        "MLmodel of .* could not determine a constructor",
    ),
    "MLmodel is a bomb": (
        lambda p: (p.folder / "MLmodel").write_text(BOMB),
        "MLmodel of .* has more than",
    ),
    "MLmodel nested": (mlmodel("a: " + "[" * 100_000), "MLmodel of .* nested too deep"),
    "MLmodel of 1 GB": (replace_by(long(1 << 30), "MLmodel"), "MLmodel of .* 1073741824"),
    "MLmodel is a link": (replace_by(link, "MLmodel"), "MLmodel of .* is a link"),
    "a link in the tree": (below(link, "notes.txt"), "holds a link: notes.txt"),
    "a pipe in the tree": (below(pipe, "notes.txt"), "neither a file nor a folder: notes.txt"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(place, case):
    spoil, words = CHECKPOINTS[case]
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate("abc")}
    for name in ("v1", "v2"):
        toy.bare(place.root / name, tensors)
    spoil(place)
    parents = [place.root / "v1", place.folder]
    with Watch() as watched, pytest.raises(ParentError, match=words) as refusal:
        mlflow_soup.merge_checkpoints(parents, (0.5, 0.5), place.root / "soup")
    untouched(place, watched)
    assert not [event for event, _ in watched if event == "pickle.find_class"]
    assert str(place.folder) in str(refusal.value)
    assert refusal.value.fix
    assert not (place.root / "soup").exists()


# ---- checkpoints: what the live model meets when transformers builds it


def gpt_neo(**fields):
    """A model whose config says how often a list is repeated, and whose masks grow as a square."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    config = GPTNeoConfig(**small, max_position_embeddings=64, attention_types=[[["global"], 2]])

    def spoil(place):
        AutoModelForCausalLM.from_config(config).save_pretrained(place.folder)
        in_json("config.json", **fields)(place)

    return spoil


def broken_tokenizer(place):
    """transformers cannot load it; memory and time are not the reason."""
    (place.folder / "tokenizer.json").write_text("{}")


def doubling(place):
    """Each rule of this tokenizer makes the letters twice as many."""
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    rules = {"type": "Sequence", "normalizers": [rule] * 40}
    toy.edit_json(place.folder / "tokenizer.json", normalizer=rules)


HUGE = 10**9
TOO_MUCH = "cannot be loaded: it takes more than"
BUILT = {
    "labels": (in_json("config.json", num_labels=HUGE), f"config of .* {TOO_MUCH}"),
    "labels with names": (
        in_json("config.json", num_labels=HUGE, id2label={str(i): "a" for i in range(30_000)}),
        f"config of .* {TOO_MUCH}",
    ),
    "a list of so many": (
        gpt_neo(attention_types=[[["global", "local"], HUGE]]),
        f"config of .* {TOO_MUCH}",
    ),
    "layers": (in_json("config.json", num_hidden_layers=10**7), "more than 1.... tensors, but"),
    "a vocabulary": (in_json("config.json", vocab_size=10**12), "more than 2........ values, but"),
    "wide layers": (
        in_json("config.json", intermediate_size=HUGE),
        "more than 2........ values, but its weights have",
    ),
    "hidden states": (in_json("config.json", hidden_size=4 * HUGE), "more than 2........ values"),
    "masks of a square": (gpt_neo(max_position_embeddings=10**6), "more than 2........ values"),
    "extra tokens": (
        in_json("tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=HUGE),
        f"tokenizer of .* {TOO_MUCH}",
    ),
    "extra bytes": (
        in_json("tokenizer_config.json", tokenizer_class="ByT5Tokenizer", extra_ids=HUGE),
        f"tokenizer of .* {TOO_MUCH}",
    ),
    "masks for sentences": (
        in_json("tokenizer_config.json", tokenizer_class="PegasusTokenizer", offset=HUGE),
        f"tokenizer of .* {TOO_MUCH}",
    ),
    "a text of 2^40 letters": (doubling, f"tokenizer of .* {TOO_MUCH}"),
    "a tokenizer that is none": (broken_tokenizer, "transformers cannot load"),
}


def build(place, checkpoints, case):
    """Spoil a checkpoint, and try to make a live model of it."""
    spoil, words = BUILT[case]
    shutil.copytree(checkpoints[0], place.folder)
    spoil(place)
    with Watch() as watched, pytest.raises(ParentError, match=words) as refusal:
        LiveModel(find_checkpoint(place.folder, "v2"))
    untouched(place, watched)
    assert str(place.folder) in str(refusal.value)
    assert refusal.value.fix


@pytest.mark.parametrize("case", BUILT)
def test_a_checkpoint_that_takes_too_much_to_build_is_refused(
    place, checkpoints, monkeypatch, case
):
    monkeypatch.setattr(loading, "_MEMORY", 256 << 20)  # the slow test has the true limit
    begin = resource.getrusage(resource.RUSAGE_SELF)
    build(place, checkpoints, case)
    end = resource.getrusage(resource.RUSAGE_SELF)
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 10  # of this process


# ---- tokenizers: what no text shows but those of the tasks


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def chain(name, rules):
    return {"type": "Sequence", name: rules}


WORD = {"Regex": "[a-m0-9]{3} "}  # the toy texts have it
FUTILE = "|".join(f"[a-m0-9{other} ]" for other in "NOPQRSTU")  # so many ways to match a letter
READ = {
    "a text of 10 MB for a word": {"normalizer": replacing(WORD, "k" * 10**7)},
    "a text of 2^40 words": {
        "normalizer": chain("normalizers", [replacing(WORD, "kam kam ")] * 40),
    },
    "a pattern that the library gives up": {
        "pre_tokenizer": split({"Regex": f"(?=[a-m0-9]{{3}} )(?:{FUTILE})+(?<![a-m0-9 ])"})
    },
}


def spoilt_tokenizer(place, checkpoints, **rules):
    shutil.copytree(checkpoints[0], place.folder)
    toy.edit_json(place.folder / "tokenizer.json", **rules)
    return find_checkpoint(place.folder, "v2")


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("reader", ["prepared", "lm-eval", "calibration"])
def test_a_tokenizer_that_takes_too_much_for_a_tasks_texts_is_refused(
    place, checkpoints, tasks, monkeypatch, case, reader
):
    monkeypatch.setattr(loading, "_MEMORY", 256 << 20)
    live = LiveModel(spoilt_tokenizer(place, checkpoints, **READ[case]), "cpu")
    suite = load_suite("toy_letters", include_path=str(tasks))
    begin = resource.getrusage(resource.RUSAGE_SELF)
    read = {
        "calibration": lambda: calibrate(["kam kam kam kam"], live, tokens=100),
        "prepared": lambda: Evaluator(live, suite),
        "lm-eval": lambda: Evaluator(live, suite, evaluator="lm-eval"),
    }[reader]
    with pytest.raises(ParentError, match="tokenizer of the versions cannot read") as refusal:
        read()
    end = resource.getrusage(resource.RUSAGE_SELF)
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 10  # of this process
    assert refusal.value.where == str(place.folder)


@pytest.mark.parametrize("case", READ)
def test_nor_does_it_read_what_a_task_generates_from(place, checkpoints, tasks, monkeypatch, case):
    monkeypatch.setattr(loading, "_MEMORY", 256 << 20)
    live = LiveModel(spoilt_tokenizer(place, checkpoints, **READ[case]), "cpu")
    with pytest.raises(ParentError, match="tokenizer of the versions cannot read"):
        Evaluator(live, load_suite("toy_spelling", include_path=str(tasks)))


LETTER = {"String": "a"}
DECODED = {
    "a text of 10 MB for a letter": (replacing(LETTER, "b" * 10**7), "makes texts more than 16"),
    "a text of 2^40 letters": (
        chain("decoders", [replacing(LETTER, "aa")] * 40),
        "makes texts more than 16",
    ),
    "chains in chains": (
        chain("decoders", [chain("decoders", [replacing(LETTER, "aaa")])] * 3),
        "makes texts more than 16",
    ),
    "a text for nothing": (replacing({"String": ""}, "b" * 17), "makes texts more than 16"),
    "a pattern": (
        chain("decoders", [{"type": "Fuse"}, replacing({"Regex": "(a+)+$"}, "")]),
        "matches a pattern",
    ),
}


@pytest.mark.parametrize("case", DECODED)
def test_a_decoder_that_could_take_too_much_is_refused(place, checkpoints, case):
    decoder, words = DECODED[case]
    with pytest.raises(ParentError, match=f"decoder of the tokenizer of v2 {words}") as refusal:
        LiveModel(spoilt_tokenizer(place, checkpoints, decoder=decoder), "cpu")
    assert refusal.value.where == str(place.folder / "tokenizer.json")


def test_the_decoder_of_a_llama_is_not_refused(place, checkpoints):
    rules = [replacing({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    rules += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoder = chain("decoders", rules)
    live = LiveModel(spoilt_tokenizer(place, checkpoints, decoder=decoder), "cpu")
    assert live.tokenizer.decode(live.tokenizer("kam")["input_ids"]) == "kam"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 64}, "max_new_tokens = 64, but 63 is the most"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences = 2, but 1 is"),
    ],
)
def test_a_model_that_generates_too_much_is_refused(place, checkpoints, tasks, settings, words):
    shutil.copytree(checkpoints[0], place.folder)
    toy.edit_json(place.folder / "generation_config.json", **settings)
    live = LiveModel(find_checkpoint(place.folder, "v2"), "cpu")
    with pytest.raises(ParentError, match=words):
        Evaluator(live, load_suite("toy_spelling", include_path=str(tasks)))
    assert Evaluator(live, load_suite("toy_letters", include_path=str(tasks))).score()


def test_a_task_that_generates_more_than_the_model_reads_is_refused(place, checkpoints, tasks):
    live = LiveModel(find_checkpoint(checkpoints[0], "v2"), "cpu")
    suite = load_suite("toy_spelling", include_path=str(tasks))
    suite.loaded["tasks"]["toy_spelling"].config.generation_kwargs["max_gen_toks"] = 10**9
    with pytest.raises(ObjectiveError, match="toy_spelling generates up to 1000000000 tokens"):
        Evaluator(live, suite)


# ---- back to checkpoints


def test_a_large_vocabulary_and_a_long_context_are_built(place):
    config = LlamaConfig(
        vocab_size=250_000,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=10_485_760,
        rope_theta=100_000_000,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(place.folder)
    toy.tokenizer().save_pretrained(place.folder)
    toy.edit_json(place.folder / "tokenizer_config.json", model_max_length=10**30)
    assert LiveModel(find_checkpoint(place.folder, "v2")).model.config.vocab_size == 250_000


# ---- task folders: what `--include-path` or a tag meets


def group(**fields):
    def spoil(place):
        write(place, {"group": "mine", **fields})

    return spoil


def linked_yaml(place):
    (place.folder / "mine.yaml").symlink_to(place.secret)


def include_of(name):
    def spoil(place):
        (place.secret.parent / "base.yaml").write_text("process_docs: !function secret.run\n")
        (place.secret.parent / "secret.py").write_text(f"{place.code}\n")
        write(place, plain(place, include=name.format(place.secret.parent)))

    return spoil


ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch canary') }}"
FILE = {"test": "SECRET"}

TASKS = {
    "a function": (
        with_lines("process_docs: !function utils.run\n"),
        "mine.yaml runs a Python function",
    ),
    "a function of Python's": (with_lines("doc_to_text: !function os.system\n"), "os.system"),
    "a function for few shots": (
        with_lines("fewshot_config: {samples: !function utils.run}\n"),
        "runs a Python function, utils.run",
    ),
    "a function as metric": (
        with_lines("metric_list: [{metric: !function utils.run}]\n"),
        "runs a Python function, utils.run",
    ),
    "a class": (with_lines("class: !function utils.Task\n"), "runs a Python function, utils.Task"),
    "a class by name": (with_fields(**{"class": "utils.Task"}), "is a Python class"),
    "an include above": (include_of("../elsewhere/base.yaml"), "includes '../elsewhere/base.yaml'"),
    "an include by path": (include_of("{}/base.yaml"), "which is outside its folder"),
    "data by path": (with_data(data_files=FILE), r"mine\.yaml takes its data from '/.*secret"),
    "data above": (
        with_data(data_files={"test": "../elsewhere/secret.jsonl"}),
        r"/\.\./elsewhere/secret\.jsonl', which is outside its folder",
    ),
    "data at home": (with_data(data_files=["~/.netrc"]), "netrc"),
    "data in a folder elsewhere": (
        with_data(data_dir="ELSEWHERE", data_files="secret.jsonl"),
        "elsewhere', which is outside",
    ),
    "data by a pattern": (with_data(data_files="ELSEWHERE/*.jsonl"), "which is not a plain file"),
    "data from the network": (
        with_data(data_files="http://169.254.169.254/latest"),
        "not a plain file",
    ),
    "data in an archive": (with_data(data_files="zip://a::SECRET"), "not a plain file"),
    "data by a script": (with_fields(dataset_path="UTILS"), "takes its data from '/.*utils.py'"),
    "data by a folder": (
        with_fields(dataset_path="ELSEWHERE"),
        "takes its data from '/.*elsewhere'",
    ),
    "data by a folder above": (with_fields(dataset_path="../elsewhere"), "'../elsewhere'"),
    "remote code": (with_data(trust_remote_code=True), "with trust_remote_code"),
    "a cache elsewhere": (with_data(cache_dir="ELSEWHERE"), "loads its data with cache_dir"),
    "data by code": (with_fields(custom_dataset="utils.run"), "makes its data with code"),
    "a metric of evaluate": (
        with_fields(metric_list=[{"metric": "acc", "hf_evaluate": True}]),
        "from the evaluate library, which downloads code",
    ),
    "a metric by a script": (
        with_fields(metric_list=[{"metric": "UTILS"}]),
        "would download as code",
    ),
    "prompts elsewhere": (with_fields(use_prompt="ELSEWHERE/prompts.yaml:a"), "takes prompts from"),
    "generation by code": (
        with_fields(
            output_type="generate_until",
            generation_kwargs={"custom_generate": "ELSEWHERE", "trust_remote_code": True},
        ),
        "generates with custom_generate, trust_remote_code",
    ),
    "code that is not unsafe": (with_fields(unsafe_code=False), "unsafe_code"),
    "a group gives data": (
        group(task=[{"task": "arc_easy", "dataset_path": "json", "dataset_kwargs": {}}]),
        "replaces the dataset_",
    ),
    "a group takes a warning off": (group(task=["humaneval"], unsafe_code=False), "unsafe_code"),
    "a group in a group": (
        group(task=[{"group": "x", "task": [{"task": "y", "use_prompt": "a.yaml:b"}]}]),
        "takes prompts from",
    ),
    "YAML makes objects": (
        with_lines("a: !!python/object/apply:os.system ['touch canary']\n"),
        r"mine\.yaml cannot be read: could not determine a constructor",
    ),
    "YAML is a bomb": (with_lines(BOMB), r"mine\.yaml cannot be read: it has more than"),
    "YAML holds itself": (with_lines("a: &a [*a]\n"), r"mine\.yaml cannot be read: the alias \*a"),
    "YAML nested": (with_lines("a: " + "[" * 100_000), r"mine\.yaml cannot be read: .* too deep"),
    "YAML is a link": (linked_yaml, r"mine\.yaml cannot be read: it is a link"),
    "a name that is a number": (with_fields(task=5), "has a task named 5, which is not text"),
    "a template that escapes": (
        with_fields(doc_to_text=ESCAPE),
        "mine could not .*: SecurityError",
    ),
    "a choice that escapes": (
        with_fields(doc_to_choice=ESCAPE),
        "mine could not .*: SecurityError",
    ),
    "a template by its attributes": (
        with_fields(doc_to_text="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "SecurityError",
    ),
    "a template by format": (
        with_fields(doc_to_text="{{ '{0.__class__.__init__.__globals__}'.format(question) }}"),
        "SecurityError",
    ),
    "a template that changes the document": (
        with_fields(doc_to_text="{{ choices.append('x') }}"),
        "SecurityError",
    ),
}


@pytest.fixture
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


@pytest.mark.parametrize("case", TASKS)
def test_a_hostile_task_folder_is_refused(place, monkeypatch, case):
    spoil, words = TASKS[case]
    place.folder.mkdir()
    spoil(place)
    monkeypatch.chdir(place.root)
    with Watch() as watched, pytest.raises(SpecError, match=words) as refusal:
        load_suite("mine", include_path=str(place.folder))
    untouched(place, watched)
    assert "mine" in str(refusal.value)
    assert refusal.value.fix


@pytest.mark.parametrize("field", ["description", "doc_to_target", "doc_to_text"])
def test_a_template_that_escapes_from_a_later_document_is_refused(place, monkeypatch, live, field):
    place.folder.mkdir()
    late = "{% if loop_ is defined %}" + ESCAPE + "{% endif %}{{ 0 }}"
    write(place, plain(place, **{field: late}))
    rows = [{"question": "a", "choices": ["b", "c"], "answer": 0} | r for r in ({}, {"loop_": 1})]
    data = "".join(json.dumps({"loop_": None} | row) + "\n" for row in rows)
    (place.folder / "items.jsonl").write_text(data.replace('"loop_": null, ', ""))
    monkeypatch.chdir(place.root)
    with Watch() as watched, pytest.raises(SpecError, match="SecurityError") as refusal:
        Evaluator(live, load_suite("mine", include_path=str(place.folder)))
    untouched(place, watched)
    assert "mine" in refusal.value.what


def test_code_runs_when_the_digest_of_its_folder_is_allowed(place, live):
    place.folder.mkdir()
    write(place, yaml.safe_dump(plain(place)) + "process_docs: !function utils.keep\n")
    (place.folder / "utils.py").write_text(f"{place.code}\ndef keep(docs): return docs\n")
    with pytest.raises(SpecError, match="runs a Python function") as refusal:
        load_suite("mine", include_path=str(place.folder))
    its = refusal.value.fix.rpartition("--allow-task-code ")[2]
    assert its == task_folders.digest(place.folder)
    spec = Spec(include_path=str(place.folder), allow_task_code=its)
    for _ in range(2):  # what ran left nothing that changes the digest
        suite = load_suite("mine", include_path=spec.include_path, allowed=spec.allowed_code)
        assert Evaluator(live, suite).score().items
        assert place.canary.exists()
    for change in ("mine.yaml", "utils.py", "items.jsonl", "more.txt"):
        before = (place.folder / change).read_bytes() if change != "more.txt" else None
        with (place.folder / change).open("a") as file:
            file.write("\n")
        with pytest.raises(SpecError, match="runs a Python function"):
            load_suite("mine", include_path=spec.include_path, allowed=spec.allowed_code)
        if before is not None:
            (place.folder / change).write_bytes(before)


def included(place):
    (place.folder / "base").write_text("target_delimiter: ''\n")
    write(place, plain(place, include="base"))


PLAIN = {
    "as it is": with_fields(),
    "an include beside it": included,
    "a dataset of the Hub": with_fields(dataset_path="01-ai/any.thing", dataset_kwargs=None),
    "files of the Hub": with_fields(dataset_path="a/b", dataset_kwargs={"data_files": "x/y.json"}),
    "an old name of the Hub": with_fields(dataset_path="winogrande", dataset_kwargs=None),
    "documents with odd fields": with_fields(
        fewshot_config={"sampler": "first_n", "samples": [{"class": "a", "task": 5}]},
        metadata={"class": "a", "unsafe_code": "no"},
    ),
    "a group of shipped tasks": group(
        task=["arc_easy", {"task": "piqa", "num_fewshot": 3}],
        aggregate_metric_list=[{"metric": "acc", "weight_by_size": True}],
    ),
    "anchors": with_lines("own: &a {x: 1}\nmetadata: {<<: *a}\n"),
    "no task at all": lambda place: write(place, "- just\n- a list\n"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_folder_of_plain_data_needs_no_leave(place, case):
    place.folder.mkdir()
    PLAIN[case](place)
    [folder] = task_folders.read_folders(str(place.folder), ())
    assert not folder.unreadable
    factory = task_folders.Factory([folder], "here")
    for entry in folder.entries.values():
        if entry.kind.name == "GROUP":
            continue  # its members' data are on the Hub
        factory._load_full_config(entry)


def test_no_tag_allows_code():
    settled = Spec().settle({"soup.allow_task_code": "a" * 64, "soup.batch_size": "8"})
    assert settled.batch_size == 8
    assert settled.allowed_code == ()


def test_shipped_templates_say_in_the_sandbox_what_they_said(place):
    row = {"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "question": "q  x", "answer": 1}
    plainly = lm_eval.utils.Environment(undefined=lm_eval.utils.StrictUndefined)
    plainly.keep_trailing_newline = True
    plainly.filters["regex_replace"] = lm_eval.utils.regex_replace
    for template in (
        "Question: {{question}}\n",
        "{{choices.text}}",
        "{{choices.label.index('B')}}",
        "{% for i in range(choices['text']|length) %}{{ 'ABCD'[i] }}. {% endfor %}",
        "{{question.split(' ')[:-1]|join(' ')}} ____",
        "{{question|regex_replace(' +', ' ')}}",
        "{{['no', 'yes'][answer]}}",
    ):
        expected = plainly.from_string(template).render(**row)
        assert lm_eval.utils.apply_template(template, row) == expected


@pytest.mark.parametrize("name", ["./mine", "mine,../x", "../gone.yaml", "/tmp/gone.yaml"])
def test_a_task_that_is_not_there_is_not_sought_by_path(place, monkeypatch, name):
    place.folder.mkdir()
    write(place, plain(place))
    monkeypatch.chdir(place.folder)
    with Watch() as watched, pytest.raises(SpecError, match=r"has no task|no task file"):
        load_suite(name, include_path=str(place.folder))
    untouched(place, watched)


@pytest.mark.parametrize("name", ["mine.yaml", "{}/mine.yaml", "{}/*.yaml", "../v2/m*.yaml"])
def test_a_task_that_is_named_by_its_file_is_judged_like_any_other(place, monkeypatch, name):
    place.folder.mkdir()
    write(place, plain(place))
    with (place.folder / "mine.yaml").open("a") as file:
        file.write("process_docs: !function utils.steal\n")
    monkeypatch.chdir(place.folder)
    with Watch() as watched, pytest.raises(SpecError, match=r"runs a Python function"):
        load_suite(name.format(place.folder))
    untouched(place, watched)


def test_lm_evals_cache_of_requests_is_not_read(place, live, monkeypatch):
    place.folder.mkdir()
    write(place, plain(place))
    monkeypatch.setattr(lm_eval.caching.cache, "PATH", str(place.root))
    read = []
    monkeypatch.setattr(dill, "loads", read.append)
    monkeypatch.setattr(dill, "dumps", read.append)
    Evaluator(live, load_suite("mine", include_path=str(place.folder))).score()
    assert read == []
    assert not list(place.root.glob("*.pickle"))


# ---- a sound checkpoint with something beside it that must stay what it is


def test_a_pickle_beside_the_weights_is_not_read(place, checkpoints):
    shutil.copytree(checkpoints[0], place.folder)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl"):
        (place.folder / name).write_bytes(pickle.dumps(Payload(place.code)))
    (place.folder / "MLmodel").write_text(
        "loader_module: evil\nflavors: {python_function: {loader_module: evil, code: code}}\n"
    )
    (place.folder / "code").mkdir()
    (place.folder / "code" / "evil.py").write_text(place.code)
    with Watch() as watched:
        LiveModel(find_checkpoint(place.folder, "v2"))
        mlflow_soup.merge_checkpoints(
            [place.folder, place.folder], (0.5, 0.5), place.root / "soup", digests=True
        )
        assert {f.verdict for f in mlflow_soup.verify(place.root / "soup")} == {"ok", "skipped"}
    assert not place.canary.exists()
    assert not [event for event, _ in watched if event in ALWAYS]
    assert not [path for event, path in watched if event == "open" and path.endswith(".bin")]
    assert load_file(place.root / "soup" / SINGLE)


# ---- registries and manifests


def as_version(client, location, name=MODEL):
    return Version(name, int(client.create_model_version(name, str(location)).version))


@pytest.mark.parametrize("source", ["/etc", "file:///etc", "file:///proc/self"])
def test_a_version_whose_files_are_the_machines_is_no_checkpoint(client, source):
    version = as_version(client, source)
    with Watch() as watched, pytest.raises(ParentError, match=r"folders with config\.json"):
        find_checkpoint(pull(client, version), version.uri)
    assert not [path for _, path in watched if path.startswith(("/etc/", "/proc/self/env"))]


@pytest.mark.parametrize("source", ["gopher://evil/x", "data:,x", "http:", "s3:"])
def test_a_version_whose_files_no_store_keeps_is_refused(client, source):
    version = as_version(client, source)
    with pytest.raises(errors.SoupError, match=r"models:/toy-llm/4|toy-llm v4"):
        pull(client, version)


@pytest.mark.parametrize("name", ["a`b", "a\nb", "a/b", "../x", "a:b", "a?b"])
def test_a_model_name_that_is_more_than_a_name_is_refused(name):
    for ask in (lambda: Spec(model=name), lambda: parse_uri(f"models:/{name}/1")):
        with pytest.raises(SpecError, match="registered"):
            ask()


MANIFESTS = {
    "nested": lambda content, place: "[" * 100_000,
    "empties": lambda content, place: empties(60 << 20).decode(),
    "empty objects": lambda content, place: empties(60 << 20, b"{}").decode(),
    "huge": lambda content, place: " " * (65 << 20),
    "a list": lambda content, place: [],
    "a weight that is no number": lambda content, place: (
        content | {"parents": [p | {"lambda": "0xg"} for p in content["parents"]]}
    ),
    "a weight that is not finite": lambda content, place: (
        content | {"parents": [p | {"lambda": "nan"} for p in content["parents"]]}
    ),
    "names that forge lines": lambda content, place: (
        content | {"parents": [p | {"uri": "x\nok        tags"} for p in content["parents"]]}
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(place, case):
    tensors = {"w": torch.ones(2)}
    parents = [toy.bare(place.root / name, tensors) for name in ("v1", "v2")]
    mlflow_soup.merge_checkpoints(parents, (0.5, 0.5), place.root / "soup")
    path = place.root / "soup" / "soup_manifest.json"
    made = MANIFESTS[case](json.loads(path.read_text()), place)
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(MismatchError, match=r"soup_manifest\.json of .* cannot be read") as refusal:
        list(mlflow_soup.verify(place.root / "soup"))
    assert str(path) in refusal.value.where


def test_a_soup_whose_files_are_links_is_no_soup(place):
    parents = [toy.bare(place.root / name, {"w": torch.ones(2)}) for name in ("v1", "v2")]
    mlflow_soup.merge_checkpoints(parents, (0.5, 0.5), place.root / "soup")
    link(place.root / "soup" / "notes.json", place)
    with Watch() as watched:
        findings = {f.what: f for f in mlflow_soup.verify(place.root / "soup")}
    untouched(place, watched)
    assert "is a link" in findings[str(place.root / "soup")].details[0]


# ---- as large as they come


@pytest.mark.slow
def test_a_million_tensors_and_a_config_of_real_json_are_refused_in_a_second(place):
    toy.bare(place.folder, {"w": torch.ones(2)})
    whole = (place.folder / SINGLE).read_bytes()
    header(place, {f"t{i}": entry((0,), (0, 0)) for i in range(1_000_000)})
    begin = time.monotonic()
    with pytest.raises(ParentError, match="header is longer than"):
        find_checkpoint(place.folder, "v2")
    (place.folder / SINGLE).write_bytes(whole)
    (place.folder / "config.json").write_text('{"a": [' + "1, " * 100_000_000 + "1]}")
    with pytest.raises(ParentError, match=r"config\.json of v2 cannot be read"):
        find_checkpoint(place.folder, "v2")
    assert time.monotonic() - begin < 30  # writing 300 MB included


CORPUS = """
import sys, pytest
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", "--durations=3",
    "--durations-min=0", "--basetemp", sys.argv[2], sys.argv[1], "-k",
    "hostile_checkpoint_is_refused or true_limits"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", BUILT)
def test_the_true_limits_end_what_takes_too_much(place, checkpoints, case):
    build(place, checkpoints, case)


@pytest.mark.slow
def test_hostile_checkpoints_take_little_memory_and_time(tmp_path, capsys):
    command = [sys.executable, "-c", CORPUS, __file__, tmp_path / "corpus"]
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(command, capture_output=True, text=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0, ran.stdout
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    count = len(CHECKPOINTS) + len(BUILT)
    slowest = [line for line in ran.stdout.splitlines() if " call " in line]
    with capsys.disabled():
        print(
            f"\n{count} hostile checkpoints: {seconds:.0f} s of processor time, "
            f"peak of one process {end.ru_maxrss >> 10} MB; slowest:",
            *slowest,
            sep="\n  ",
        )
    assert end.ru_maxrss >> 10 < 3072  # this process, and the 1 GiB that a fork may take
    assert seconds < 40 + 8 * count


def test_there_are_forty_cases_and_more(capsys):
    cases = len(CHECKPOINTS) + len(BUILT) + len(TASKS) + len(MANIFESTS)
    with capsys.disabled():
        print(
            f"\n{cases} hostile inputs: {len(CHECKPOINTS) + len(BUILT)} checkpoints, "
            f"{len(TASKS)} task folders"
        )
    assert cases >= 40
