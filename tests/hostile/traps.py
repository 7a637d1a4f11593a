"""Hostile inputs are made and watched here: a folder to spoil, a canary, and a secret.

A payload would make the canary, or read the secret.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from mlflow_soup.evaluation.templates import RENDERER

WATCHED: list[tuple[str, str]] = []
ALWAYS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_watching = False


def _note(event, args):
    if _watching and (event in ALWAYS or event in ("open", "pickle.find_class")):
        WATCHED.append((event, str(args[0]) if args else ""))


sys.addaudithook(_note)


class Watch:
    """What is opened and run meanwhile."""

    def __enter__(self):
        global _watching
        RENDERER.start()  # it starts a process
        WATCHED.clear()
        _watching = True
        return WATCHED

    def __exit__(self, *_):
        global _watching
        _watching = False


@pytest.fixture
def place(tmp_path):
    """A folder to be spoilt, what a payload would make, and what it would read."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    secret = elsewhere / "secret.jsonl"
    secret.write_text('{"text": "the password is 1234"}\n')
    return SimpleNamespace(
        root=tmp_path,
        folder=tmp_path / "v2",
        canary=tmp_path / "canary",
        secret=secret,
        code=f"__import__('pathlib').Path({str(tmp_path / 'canary')!r}).touch()",
    )


def untouched(place, watched):
    """Nothing was run, and the secret was not read."""
    assert not place.canary.exists()
    opened = [path for event, path in watched if event == "open"]
    assert not [path for path in opened if path == str(place.secret)]
    assert not [event for event, _ in watched if event in ALWAYS]


def plain(place, **fields):
    """A task of plain data, which would be loaded but for these fields."""
    data = place.folder / "items.jsonl"
    row = {"question": "a", "choices": ["b", "c"], "answer": 0}
    data.write_text((json.dumps(row) + "\n") * 3)
    return {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **fields,
    }


def write(place, content, name="mine.yaml"):
    (place.folder / "utils.py").write_text(f"{place.code}\ndef run(*a, **k): return []\n")
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (place.folder / name).write_text(text)


def with_fields(**fields):
    def spoil(place):
        told = json.loads(
            json.dumps(fields)
            .replace("SECRET", str(place.secret))
            .replace("ELSEWHERE", str(place.secret.parent))
            .replace("FOLDER", str(place.folder))
            .replace("UTILS", str(place.folder / "utils.py"))
        )
        write(place, plain(place, **told))

    return spoil


def with_lines(lines):
    return lambda place: write(place, yaml.safe_dump(plain(place)) + lines)


def with_data(**kwargs):
    return with_fields(dataset_kwargs=kwargs)
