"""Task folders whose data sets, templates, includes and copies are not what they seem.

As in `test_hostile`, each case is met the way a user meets it, with a canary that its payload would
make and a secret that it would read.
"""

import gzip
import inspect
import json
import marshal
import os
import py_compile
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from test_hostile import TASKS
from traps import Watch, place, plain, untouched, with_fields, write  # noqa: F401

import mlflow_soup.evaluation.task_data
from mlflow_soup.errors import SpecError, StoreError
from mlflow_soup.evaluation import items, task_folders, template_process, templates
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.limits import LimitError, try_within, work_within
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import parse_generation
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.evaluation.task_data import Reader
from mlflow_soup.evaluation.task_folders import generation_problems, read_files
from mlflow_soup.evaluation.template_process import environment
from mlflow_soup.evaluation.templates import RENDERER
from mlflow_soup.files.untrusted import Function
from mlflow_soup.weights.find import find_checkpoint


@pytest.fixture
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


@pytest.fixture
def hurried(monkeypatch):
    """A process that renders for half a second only."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    RENDERER._end()
    yield
    RENDERER._end()


def load(place, name="mine", allowed=()):
    return load_suite(name, include_path=str(place.folder), allowed=allowed)


# ---- columns that open what they name


def declared(features, rows):
    """A table that says of its columns how they are decoded; nothing is encoded."""
    return pyarrow.Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema)


def parquet(place, features, rows, **fields):
    """A task whose Parquet file declares features."""
    pyarrow.parquet.write_table(declared(features, rows), place.folder / "items.parquet")
    files = {"test": str(place.folder / "items.parquet")}
    write(
        place, plain(place, dataset_path="parquet", dataset_kwargs={"data_files": files}) | fields
    )


ROW = {"question": "a", "choices": ["b", "c"], "answer": 0}
COLUMNS = {
    "question": datasets.Value("string"),
    "choices": datasets.List(datasets.Value("string")),
    "answer": datasets.Value("int64"),
}
OPENING = {  # feature, its value, what a template does with it
    "an image": (datasets.Image(), lambda p: p, "{{ x.save('CANARY', format='PPM') }}"),
    "an image's file": (datasets.Image(), lambda p: p, "{{ x.fp.read() }}"),
    "a list of images": (
        datasets.List(datasets.Image()),
        lambda p: [p],
        "{{ x[0].save('CANARY', format='PPM') }}",
    ),
    "an image within": (
        {"y": datasets.Image()},
        lambda p: {"y": p},
        "{{ x.y.save('CANARY', format='PPM') }}",
    ),
    "sound": (datasets.Audio(), lambda p: p, "{{ x.get_all_samples() }}"),
    "a film": (datasets.Video(), lambda p: p, "{{ x.get_frame_at(0) }}"),
    "a document": (datasets.Pdf(), lambda p: p, "{{ x.pages }}"),
}


@pytest.mark.parametrize("case", OPENING)
def test_a_column_stays_what_the_file_holds(place, case):
    feature, value, template = OPENING[case]
    place.folder.mkdir()
    row = ROW | {"x": value({"bytes": None, "path": str(place.secret)})}
    template = template.replace("CANARY", str(place.canary))
    parquet(place, COLUMNS | {"x": feature}, [row], doc_to_text="{{question}}" + template)
    with Watch() as watched, pytest.raises(SpecError, match="mine could not be loaded") as refusal:
        load(place)
    untouched(place, watched)
    assert "has no attribute" in str(refusal.value)


@pytest.mark.parametrize("case", OPENING)
def test_a_data_set_of_the_hub_is_not_decoded_either(place, monkeypatch, case):
    feature, value, _ = OPENING[case]
    row = {"x": value({"bytes": None, "path": str(place.secret)})}
    found = datasets.DatasetDict({"test": datasets.Dataset(declared({"x": feature}, [row]))})
    assert found["test"].features == {"x": feature}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)  # there is no Hub here
    with Watch() as watched:
        rows = list(Reader("some/where", None, {}, "mine.yaml")()["test"])
    untouched(place, watched)
    assert rows == [row]


def test_a_path_that_leads_to_a_host_connects_to_none(place):
    place.folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        row = ROW | {"x": {"bytes": None, "path": url}}
        parquet(place, COLUMNS | {"x": datasets.Image()}, [row], doc_to_text="{{ x.path }}")
        with Watch() as watched:
            suite = load(place)
            task = suite.loaded["tasks"]["mine"]
            assert task.doc_to_text(task.eval_docs[0]) == url
        untouched(place, watched)
        with pytest.raises(TimeoutError):
            server.accept()


def test_templates_see_plain_values_only():
    class Odd:
        def __str__(self):
            return "odd"

    class Text(str):
        def save(self):
            return "saved"

    document = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": Odd(),
        "d": [Odd(), Text("t"), (1, None)],
        "e": {"f": True, "g": Odd},
        "h": b"bytes",
    }
    made = templates.plain(document)
    assert made == {"a": 0.5, "b": [0, 1, 2], "d": ["t", [1, None]], "e": {"f": True}}
    assert type(made["d"][0]) is str
    assert RENDERER.render("{{a}} {{b}} {{d}} {{e}}", document) == (
        "0.5 [0, 1, 2] ['t', [1, None]] {'f': True}"
    )
    for text in ("{{c}}", "{{h}}", "{{e.g}}"):
        with pytest.raises(Exception, match=r"undefined|no attribute"):
            RENDERER.render(text, document)
    with pytest.raises(Exception, match="no attribute 'save'"):
        RENDERER.render("{{d[0].save()}}", document)


# ---- files that are harmless one by one


def merged(base, mine):
    """A task that includes `base`; it says `mine` itself."""

    def spoil(place):
        told = json.dumps([base, mine]).replace("ELSEWHERE", str(place.secret.parent))
        first, second = json.loads(told)
        whole = plain(place)
        for key in ("dataset_path", "dataset_kwargs"):
            whole.pop(key)
        (place.folder / "base.yaml").write_text(yaml.safe_dump(first))
        write(place, whole | {"include": "base.yaml"} | second)

    return spoil


def in_a_group(member, **changes):
    """A group whose member is harmless without what the group changes."""

    def spoil(place):
        write(place, plain(place, task="inner") | member, "inner.yaml")
        (place.folder / "mine.yaml").write_text(yaml.safe_dump({"group": "mine", **changes}))

    return spoil


def doubling_includes(place):
    for i in range(40):
        (place.folder / f"{i}.inc").write_text(f"include: [{i + 1}.inc, {i + 1}.inc]\n")
    (place.folder / "40.inc").write_text("num_fewshot: 0\n")
    write(place, plain(place) | {"include": "0.inc"})


HUB = {"dataset_path": "a/b", "dataset_kwargs": {"data_files": {"test": "secret.jsonl"}}}
MERGED = {
    "a file of the Hub read here": (
        merged(HUB, {"dataset_path": "text"}),
        "takes its data from 'secret.jsonl', which is outside its folder",
    ),
    "a folder given, a file included": (
        merged({"dataset_kwargs": {"data_files": "secret.jsonl"}} | HUB, {"dataset_path": "json"}),
        "secret.jsonl",
    ),
    "files given, a format included": (
        merged(
            {"dataset_path": "json", "dataset_kwargs": {}},
            {"dataset_kwargs": {"data_files": "ELSEWHERE/secret.jsonl"}},
        ),
        "secret.jsonl', which is outside its folder",
    ),
    "a class included": (merged(HUB | {"class": "x.Y"}, {}), "is a Python class"),
    "a format of pickles": (
        with_fields(dataset_path="pandas", dataset_kwargs={"data_files": "UTILS"}),
        "takes its data from 'pandas'",
    ),
    "a format that opens images": (
        with_fields(dataset_path="imagefolder", dataset_kwargs={"data_dir": "FOLDER"}),
        "takes its data from 'imagefolder'",
    ),
    "a format without files": (with_fields(dataset_kwargs={}), "names no data_files"),
    "a group that gives a format": (
        in_a_group(HUB, task=[{"task": "inner", "dataset_path": "text"}]),
        "replaces the dataset_path",
    ),
    "a group that gives a format to all": (
        in_a_group(HUB, task=["inner"], dataset_path="text"),
        "replaces the dataset_path",
    ),
    "a group that gives code": (
        in_a_group(HUB, task=["inner"], custom_dataset="utils.run"),
        "makes its data with code",
    ),
    "a group within that gives prompts": (
        in_a_group(HUB, task=[{"group": "g", "task": ["inner"], "use_prompt": "a:b"}]),
        "takes prompts from",
    ),
    "an answer asked for without end": (with_fields(repeats=10**9), "asks each item 1000000000"),
    "many beams": (with_fields(generation_kwargs={"num_beams": 10**5}), "num_beams = 100000"),
    "beams that are no number": (
        with_fields(generation_kwargs={"num_beams": {}}),
        "num_beams = {}",
    ),
    "many texts to stop at": (
        with_fields(generation_kwargs={"until": ["x"] * 65}),
        "stops at 65 texts",
    ),
    "includes that double": (doubling_includes, "an included file counted each time"),
}


@pytest.mark.parametrize("case", MERGED)
def test_what_files_say_together_is_judged(place, monkeypatch, case):
    spoil, words = MERGED[case]
    monkeypatch.setattr(task_folders, "LARGEST_YAMLS", 1 << 20)
    place.folder.mkdir()
    monkeypatch.chdir(place.secret.parent)
    spoil(place)
    with Watch() as watched, pytest.raises(SpecError, match=words) as refusal:
        load(place)
    untouched(place, watched)
    assert str(place.folder) in str(refusal.value)
    assert "password" not in str(refusal.value)


def test_a_yaml_that_is_not_asked_for_stops_nobody(place, caplog):
    place.folder.mkdir()
    write(place, plain(place))
    (place.folder / "odd.yaml").write_text("task: [unclosed\n")
    (place.folder / "code.yaml").write_text("task: code\nprocess_docs: !function utils.run\n")
    os.mkfifo(place.folder / "pipe.yaml")
    with Watch() as watched:
        assert load(place).terms
    untouched(place, watched)
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if "odd.yaml" in text or "pipe.yaml" in text]) == 2


def test_the_name_of_a_yaml_reaches_no_log_as_it_is(place, caplog):
    place.folder.mkdir()
    write(place, plain(place))
    (place.folder / "odd\x1b[2J.yaml").write_text("task: [unclosed\n")
    load(place)
    [told] = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert r"odd\x1b[2J.yaml" in told
    assert "\x1b" not in told


# ---- the leave for code


def with_code(place, text="def keep(docs): return docs\n"):
    place.folder.mkdir()
    write(place, yaml.safe_dump(plain(place)) + "process_docs: !function utils.keep\n")
    (place.folder / "utils.py").write_text(text)


def test_the_code_that_runs_is_the_copy_that_was_digested(place, monkeypatch):
    with_code(place, f"{place.code}\ndef keep(docs): return docs\n")
    its = task_folders.digest(place.folder)
    read = task_folders.read_folders

    def then_changed(*arguments):
        found = read(*arguments)
        (place.folder / "utils.py").write_text("raise SystemExit('another code')\n")
        (place.folder / "mine.yaml").write_text("task: mine\nclass: !function os.system\n")
        return found

    monkeypatch.setattr("mlflow_soup.evaluation.suite.read_folders", then_changed)
    assert load(place, allowed=(its,)).terms
    assert place.canary.exists()


def test_a_copy_that_is_not_allowed_is_deleted_at_once(place, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with_code(place)
    with pytest.raises(SpecError, match="runs a Python function"):
        load(place, allowed=("0" * 64,))
    assert not [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]


def test_compiled_code_beside_it_is_not_run(place):
    with_code(place)
    its = task_folders.digest(place.folder)
    evil = place.root / "evil.py"
    evil.write_text(f"{place.code}\ndef keep(docs): return docs\n")
    compiled = place.folder / "__pycache__" / f"utils.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(
        str(evil), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert task_folders.digest(place.folder) == its
    assert load(place, allowed=(its,)).terms
    assert not place.canary.exists()


def a_link_to_code(place):
    (place.secret.parent / "utils.py").write_text(f"{place.code}\ndef keep(docs): return docs\n")
    (place.folder / "utils.py").unlink()
    (place.folder / "utils.py").symlink_to(place.secret.parent / "utils.py")


def a_linked_folder(place):
    (place.folder / "more").symlink_to(place.secret.parent)


def a_pipe(place):
    os.mkfifo(place.folder / "pipe")


@pytest.mark.parametrize("spoil", [a_link_to_code, a_linked_folder, a_pipe])
def test_a_folder_has_no_digest_if_something_in_it_leads_elsewhere(place, spoil):
    with_code(place)
    its = task_folders.digest(place.folder)
    spoil(place)
    with Watch() as watched, pytest.raises(SpecError, match="no digest covers"):
        load(place, allowed=(its,))
    with pytest.raises(SpecError, match="no digest covers") as refusal:
        load(place)
    assert "mine.yaml runs a Python function" in refusal.value.what
    assert "--allow-task-code" not in refusal.value.fix
    untouched(place, watched)


def test_a_folder_that_is_too_large_has_no_digest(place, monkeypatch):
    monkeypatch.setattr(task_folders, "LARGEST_FOLDER", 1 << 20)
    with_code(place)
    with (place.folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SpecError, match="runs a Python function") as refusal:
        load(place)
    assert "no digest covers it" in refusal.value.fix
    with pytest.raises(SpecError, match="no digest covers it"):
        load(place, allowed=("0" * 64,))


def test_a_group_without_leave_gives_no_arguments_to_allowed_code(place):
    place.folder.mkdir()
    made = "import datasets\ndef make(say, **_):\n    print(say)\n    return {}\n"
    write(place, yaml.safe_dump(plain(place)) + "custom_dataset: !function make.make\n")
    (place.folder / "make.py").write_text(made)
    other = place.root / "other"
    other.mkdir()
    for member in (
        {"task": "mine", "metadata": {"say": "x"}},
        {"group": "mine", "metadata": {"say": "x"}},
    ):
        (other / "g.yaml").write_text(yaml.safe_dump({"group": "g", "task": [member]}))
        its = task_folders.digest(place.folder)
        with pytest.raises(SpecError, match="gives its members metadata"):
            load_suite("g", include_path=f"{place.folder}{os.pathsep}{other}", allowed=(its,))


def an_include_above(place):
    return "include: ../elsewhere/base.yaml\n", "'../elsewhere/base.yaml'"


def an_include_by_path(place):
    return f"include: {place.secret.parent}/base.yaml\n", "base.yaml'"


def a_function_by_path(place):
    return f"process_docs: !function {place.secret.parent}/code.keep\n", "code.keep'"


@pytest.mark.parametrize("line", [an_include_above, an_include_by_path, a_function_by_path])
def test_what_a_digest_does_not_cover_is_not_loaded(place, line):
    place.folder.mkdir()
    (place.secret.parent / "base.yaml").write_text("process_docs: !function code.keep\n")
    (place.secret.parent / "code.py").write_text(f"{place.code}\ndef keep(docs): return docs\n")
    text, words = line(place)
    write(place, yaml.safe_dump(plain(place)) + text)
    its = task_folders.digest(place.folder)
    with Watch() as watched, pytest.raises(SpecError, match="does not cover it") as refusal:
        load(place, allowed=(its,))
    untouched(place, watched)
    assert words in refusal.value.what


# ---- what has no end


TEMPLATES = {
    "loops in loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "loops over a text": (
        "{% for a in question * 99 %}{% for b in question * 99 %}{% for c in question * 99 %}"
        "{% for d in question * 99 %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "a pattern that goes back": "{{ (question * 40 ~ 'b')|regex_replace('(a+)+$', '') }}",
    "a long text": "{{ 'a' * 10 ** 11 }}",
    "a wide text": "{{ 'a'.ljust(10 ** 11) }}",
    "a wide number": "{{ '%099999999d' % 1 }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "an indent": "{{ question|indent(10 ** 10, true) }}",
    "a large number": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
}
ALIKE = ("loops in loops", "a long text", "a macro that calls itself")


@pytest.mark.parametrize(
    ("field", "case"),
    [
        *(("doc_to_text", case) for case in TEMPLATES),
        *(  # both fields are rendered alike: one case each of time, memory and depth
            pytest.param("doc_to_target", case, marks=[] if case in ALIKE else pytest.mark.slow)
            for case in TEMPLATES
        ),
    ],
)
@pytest.mark.usefixtures("hurried")
def test_a_template_comes_to_an_end(place, case, field):
    place.folder.mkdir()
    write(place, plain(place, **{field: TEMPLATES[case]}))
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Watch() as watched, pytest.raises(SpecError, match="mine could not"):
        load(place)
    untouched(place, watched)
    assert time.monotonic() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.usefixtures("hurried")
def test_a_template_has_its_time_for_all_documents_together(place, live):
    place.folder.mkdir()
    slow = "{% if n > 2 %}{% for a in range(1500000 // 20) %}{% for b in range(9) %}{% endfor %}"
    write(place, plain(place, doc_to_text=slow + "{% endfor %}{% endif %}{{question}}"))
    rows = [ROW | {"n": n} for n in range(2000)]
    (place.folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = load(place)
    with pytest.raises(SpecError, match=r"takes more than 0.5 s of processor time"):
        Evaluator(live, suite)


def deep_json(place):
    return "items.jsonl", b'{"question": ' + b"[" * 300_000 + b"]" * 300_000 + b"}\n"


def packed(place):
    return "items.jsonl.gz", gzip.compress(b'{"question": "' + b"a" * (64 << 20) + b'"}\n')


def repeated(place):
    column = pyarrow.array(["a" * (1 << 20)]).dictionary_encode()
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), column.dictionary)
    pyarrow.parquet.write_table(pyarrow.table({"question": column}), place.folder / "i.parquet")
    return "i.parquet", None


def a_pipe_of_items(place):
    os.mkfifo(place.folder / "pipe.jsonl")
    return "pipe.jsonl", None


def long_items(place):
    return "items.jsonl", b'{"question": "' + b"a" * (17 << 20) + b'"}\n'


DATA = {
    "deep JSON": (deep_json, "cannot be read: it takes more than|crashed"),
    "a packed file": (packed, "cannot be read: it takes more than .* MiB of disk"),
    "a text a million times": (repeated, "cannot be read: it takes more than"),
    "a pipe": (a_pipe_of_items, "not a regular file"),
    "a long file": (long_items, "at most 16777216 are read"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_come_to_an_end(place, monkeypatch, case):
    monkeypatch.setattr(mlflow_soup.evaluation.task_data, "LARGEST", 16 << 20)
    make, words = DATA[case]
    place.folder.mkdir()
    name, content = make(place)
    if content is not None:
        (place.folder / name).write_bytes(content)
    kind = "parquet" if name.endswith(".parquet") else "json"
    options = {"data_files": {"test": str(place.folder / name)}}
    write(place, plain(place) | {"dataset_path": kind, "dataset_kwargs": options})
    if name == "items.jsonl":
        (place.folder / name).write_bytes(content)
    with Watch() as watched, pytest.raises(SpecError, match=words) as refusal:
        load(place)
    untouched(place, watched)
    assert "mine.yaml" in str(refusal.value)


def test_prompts_do_not_fill_the_memory(place, live, monkeypatch):
    monkeypatch.setattr(items, "MOST_CHARACTERS", 1_000_000)
    place.folder.mkdir()
    fields = {"description": "a" * 500_000, "fewshot_config": {"samples": [ROW]}}
    write(place, plain(place, **fields))
    with pytest.raises(SpecError, match="more than 1000000 characters in all"):
        Evaluator(live, load(place))


MANY = {
    "many choices": {"doc_to_choice": ["b"] * 100},
    "a long answer": {
        "output_type": "loglikelihood",
        "doc_to_choice": None,
        "doc_to_target": "{{ 'b' * 500000 }}",
    },
}


@pytest.mark.parametrize("case", MANY)
def test_answers_do_not_fill_the_memory(place, live, monkeypatch, case):
    monkeypatch.setattr(items, "MOST_CHARACTERS", 1_000_000)
    place.folder.mkdir()
    write(place, plain(place, **MANY[case]))
    with pytest.raises(SpecError, match="prompts and answers have more than 1000000"):
        Evaluator(live, load(place))


GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{ 'a' * 30 }}",
    "doc_to_target": "{{ 'a' * 30 ~ 'b' }}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["never"], "max_gen_toks": 24},
}
BACK = r"(?:[\s\S]+)+(?!)"
MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}


def filters(pattern):
    chain = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
    return [{"name": "x", "filter": chain}]


PATTERNS = {
    "a filter": {
        "metric_list": [MATCH],
        "filter_list": filters(BACK),
    },
    "a metric": {
        "metric_list": [MATCH | {"regexes_to_ignore": [r"(a+)+$"]}],
    },
    "a filter of choices": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        # it sees no text, and does not end on that
        "filter_list": filters("(?:(?:(?:(?:x|a|){100}){100}){100}){100}(?!)"),
    },
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_on_what_a_model_generates_come_to_an_end(place, live, monkeypatch, case):
    monkeypatch.setattr(items, "SECONDS", 1)
    place.folder.mkdir()
    write(place, plain(place, **GENERATE | PATTERNS[case]))
    evaluator = Evaluator(live, load(place))
    with pytest.raises(SpecError, match="its filters and metrics do not end"):
        evaluator.score()


def test_honest_patterns_score_as_lm_eval_scores_them(place, live):
    place.folder.mkdir()
    fields = {
        "metric_list": [MATCH | {"regexes_to_ignore": [","]}],
        "filter_list": filters("(.*)"),
    }
    write(place, plain(place, **GENERATE, **fields))
    assert Evaluator(live, load(place)).score().items[0].values == (0.0, 0.0, 0.0)


def test_work_is_tried_within_its_limits(tmp_path):
    limits = {"seconds": 1, "memory": 64 << 20, "file_size": 1 << 20}

    def spin():
        while True:
            pass

    def fill():
        return bytearray(256 << 20)

    def write_much():
        (tmp_path / "large").write_bytes(bytes(2 << 20))

    def crash():
        os.abort()

    for work in (spin, fill, write_much, crash):
        with pytest.raises(LimitError, match="it takes more than 1 s of processor time"):
            try_within(work, **limits)
        with pytest.raises(LimitError):
            work_within(work, **limits)
    assert not try_within(lambda: 1 / 0, **limits)  # the caller meets the error itself
    assert try_within(lambda: (tmp_path / "small").write_bytes(b"x"), **limits)
    assert (tmp_path / "small").read_bytes() == b"x"


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def _raise_odd(first, second):
    raise Odd(first, second)


def _refuse(here):
    assert os.getpid() != here  # what fails in the fork is not tried again outside of it
    raise SpecError("what", where="where", fix="fix")


def test_the_result_of_work_is_handed_back(mount, monkeypatch):
    limits = {"seconds": 1, "memory": 64 << 20, "file_size": 1 << 20}
    here = os.getpid()
    assert work_within(lambda: (os.getpid() == here, {"a": [1.5]}), **limits) == (
        False,
        {"a": [1.5]},
    )
    with pytest.raises(ZeroDivisionError):
        work_within(lambda: 1 / 0, **limits)
    with pytest.raises(SpecError, match="what") as handed:
        work_within(lambda: _refuse(here), **limits)
    assert (handed.value.where, handed.value.fix) == ("where", "fix")
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):  # pickle cannot copy it
        work_within(lambda: _raise_odd(1, 2), **limits)
    monkeypatch.setattr("tempfile.tempdir", str(mount("tmpfs", "size=64k")))
    with pytest.raises(StoreError, match="no room for a temporary file"):
        work_within(lambda: bytes(1 << 19), **limits)


# ---- the process that renders


def test_the_process_that_renders_holds_nothing_and_writes_nothing(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "much-secret")
    RENDERER._end()
    RENDERER.start()
    process = RENDERER._process
    RENDERER.render("{{a}}", {"a": "started"})
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"much-secret" not in environment
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert limits.split("Max file size")[1].split()[:2] == ["0", "0"]
    loaded = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", templates.template_process.__file__, "1", "1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "jinja2.sandbox" in loaded
    assert not [name for name in ("torch", "mlflow", "lm_eval", "numpy") if f" {name}\n" in loaded]


def test_threads_and_forks_get_their_own_answers():
    wrong = []

    def ask(number):
        for i in range(200):
            if RENDERER.render("{{a}} of {{b}}", {"a": i, "b": number}) != f"{i} of {number}":
                wrong.append((i, number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        made = RENDERER.render("{{a}}", {"a": "in a fork"})
        os._exit(0 if made == "in a fork" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert RENDERER.render("{{a}}", {"a": "after a fork"}) == "after a fork"


def test_after_a_template_was_stopped_others_are_rendered(hurried):
    with pytest.raises(Exception, match="processor time"):
        RENDERER.render(TEMPLATES["loops in loops"], {})
    assert RENDERER.render("{{a}}", {"a": 1}) == "1"
    RENDERER._process.kill()
    with pytest.raises(Exception, match="exit status -9"):
        RENDERER.render("{{a}}", {"a": 2})
    assert RENDERER.render("{{a}}", {"a": 2}) == "2"


def test_texts_are_rendered_once(monkeypatch):
    asked = []
    ask = RENDERER._ask
    monkeypatch.setattr(RENDERER, "_ask", lambda *a: asked.append(a) or ask(*a))
    rows = [{"a": f"once {i}"} for i in range(1000)]
    RENDERER.render_ahead(["<{{a}}>"], rows)
    assert len(asked) == 4
    assert [RENDERER.render("<{{a}}>", row) for row in rows] == [f"<once {i}>" for i in range(1000)]
    assert len(asked) == 4


def test_texts_that_are_kept_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(templates, "_MOST_KEPT", 100_000)
    rows = [{"a": f"much {i}"} for i in range(1000)]
    RENDERER.render_ahead(["{{ a * 100 }}"], rows)
    assert sum(len(text) for kept in RENDERER._kept.values() for text in kept.values()) < 100_000
    assert RENDERER.render("{{ a * 100 }}", rows[0]) == "much 0" * 100


@pytest.mark.parametrize("document", [{"a": "é\ud800\x00"}, {"a": 2**80}, {"a": float("inf")}])
def test_odd_values_arrive_as_they_are(document):
    assert RENDERER.render("{{a}}", document) == str(document["a"])


# ---- honest folders


@pytest.mark.slow
def test_lm_evals_own_folders_are_read_as_lm_eval_reads_them(capsys):
    root = Path(inspect.getfile(TaskManager)).parent
    read, expected = task_folders._read(root), TaskIndex.build([root])
    assert read.entries.keys() == expected.keys()
    env, compiled = environment(), 0
    for name, entry in read.entries.items():
        assert (entry.kind, entry.tags) == (expected[name].kind, expected[name].tags)
        if entry.cfg is None:  # a tag
            continue
        assert entry.yaml_path == expected[name].yaml_path
        its = expected[name].cfg
        assert entry.cfg.keys() == its.keys()
        assert {k for k, v in entry.cfg.items() if v != its[k]} <= with_functions(entry.cfg), name
        for field in ("description", "doc_to_text", "doc_to_target", "doc_to_choice"):
            if isinstance(text := entry.cfg.get(field), str) and not isinstance(text, Function):
                env.from_string(text)
                compiled += 1
    with capsys.disabled():
        print(f"\n{len(read.entries)} tasks, groups and tags, {compiled} templates")
        print(f"left out: {[path.name for path in read.unreadable]}")


def with_functions(config):
    """The keys of a task whose values hold functions; lm-eval gives these with their folder."""
    return {key for key, value in config.items() if list(task_folders._functions(value))}


@pytest.mark.slow
def test_all_hostile_folders_together_take_this_much(place, monkeypatch, capsys):
    begin = time.monotonic()
    monkeypatch.chdir(place.root)
    for spoil, _ in (*TASKS.values(), *MERGED.values()):
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir()
        spoil(place)
        with pytest.raises(SpecError):
            load(place)
    took = time.monotonic() - begin
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    with capsys.disabled():
        print(f"\n{len(TASKS) + len(MERGED)} task folders: {took:.1f} s, peak {peak >> 10} MiB")


# ---- data of others


@pytest.mark.parametrize("above", [True, False], ids=["a folder above both", "both folders"])
def test_the_data_of_a_task_lie_beside_its_yaml(place, above):
    place.folder.mkdir()
    config = plain(place, dataset_kwargs={"data_files": {"test": str(place.secret)}})
    write(place, config)
    path = place.root if above else os.pathsep.join([str(place.folder), str(place.secret.parent)])
    with Watch() as watched, pytest.raises(SpecError, match="which is outside its folder"):
        load_suite("mine", include_path=str(path))
    if not above:  # else the refusal prints the digest of both
        untouched(place, watched)


def test_a_yaml_file_lends_its_folder_to_no_other_task(place):
    place.folder.mkdir()
    write(place, plain(place, dataset_kwargs={"data_files": {"test": str(place.secret)}}))
    beside = place.secret.parent / "fine.yaml"
    beside.write_text(yaml.safe_dump(plain(place, task="fine")))
    with Watch() as watched, pytest.raises(SpecError, match="which is outside its folder"):
        load_suite(f"{place.folder}/mine.yaml,{beside}")
    untouched(place, watched)


@pytest.mark.parametrize("pattern", ["{}/**/mine.yaml", "/*/*/*/*/mine.yaml", "{}/*/mine.yaml"])
def test_patterns_of_folders_are_refused_before_anything_is_listed(place, pattern):
    with pytest.raises(SpecError, match="is a pattern of folders"):
        load_suite(pattern.format(place.root))


def test_only_the_named_file_of_a_folder_is_read(place):
    place.folder.mkdir()
    write(place, plain(place))
    (place.folder / "below").mkdir()
    os.mkfifo(place.folder / "below" / "other.yaml")
    (place.folder / "odd.yaml").write_text("task: odd\n  oops: [")
    folder, defines = read_files(place.folder, [place.folder / "mine.yaml"], ())
    assert [*folder.entries] == ["mine"]
    assert not folder.unreadable
    assert defines == {place.folder / "mine.yaml": ["mine"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"until": {"a": 1}},
        {"until": ["x", {}]},
        {"max_gen_toks": "x"},
        {"max_gen_toks": -1},
        {"max_gen_toks": 1e300},
        {"temperature": float("nan")},
        {"temperature": "0.7=3"},
        {"num_beams": 0},
        {"num_beams": True},
        {"do_sample": "perhaps"},
    ],
    ids=str,
)
def test_settings_of_generation_have_their_types(settings):
    assert [*generation_problems(settings)]
    with pytest.raises(SpecError, match="--gen-kwargs"):
        parse_generation(json.dumps(settings), "--gen-kwargs")


def test_rendered_texts_end_at_the_room_that_is_left():
    renderer = template_process._Renderer(10.0, 1.0)
    documents = [marshal.dumps({"x": letter * 4}) for letter in "abc"]
    texts = [answer[0] for answer in renderer.render("{{ x }}", documents, 8)]
    assert texts == ["aaaa", "bbbb", None]
    # what a failure says counts, too
    answers = list(renderer.render("{{ x.y.z }}", documents, 8))
    assert {answer[1] for answer in answers} <= {"UndefinedError", "MemoryError"}
    assert answers[-1][1] == "MemoryError"
