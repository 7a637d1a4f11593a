r"""Ordinary lm-eval tasks, made from documents the model has never seen.

`quickstart_prose` asks which of four continuations belongs to a passage of prose; the wrong ones
continue passages of other documents. `quickstart_code` asks the same of code: out of domain for a
model trained mostly on prose. `quickstart_prose_bpb`, `quickstart_code_bpb` measure bits per byte.
`quickstart_prose_test` asks as the first does, about other passages: the test set.

Any evaluation tool that knows lm-eval can run them:

    lm_eval --model hf --model_args pretrained=... --include_path quickstart-data/tasks \
        --tasks quickstart_prose
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import log2
from pathlib import Path
from typing import Any, TypeVar

from mlflow_soup.errors import SpecError
from mlflow_soup.quickstart.corpus import Document, Use

T = TypeVar("T")
WORD = re.compile(r"\w+|[^\w\s]")

HELD_OUT = "quickstart_prose:acc"
OOD = ("quickstart_code:acc", "quickstart_code_bpb:bits_per_byte")
TEST = "quickstart_prose_test:acc"
# A point of accuracy, a hundredth of a bit: 1.6 to 2 standard errors of the difference
# between a soup and its parent, item by item. Less could not be told from nothing.
MARGIN = 0.01
# Bytes, so at most as many tokens: the context of the model. lm-eval cuts longer passages with only
# a warning, and fails on longer continuations.
LONGEST = 128


@dataclass(frozen=True)
class Sizes:
    """How much is evaluated: what keeps one λ at a few seconds on two cores."""

    # Standard error of acc = sqrt(.25 / 2000) = 1.1 points; of soup minus parent about half that.
    items: int = 2000
    # Fewer: of some 4,200 passages of prose, the held-out task has the first 2,000.
    test_items: int = 1500
    # More, because the gate needs the difference's lower bound and not only its sign.
    code_items: int = 3000
    choices: int = 4
    # (context, continuation) in words. Two words tell right from wrong best: what a small model
    # knows of a continuation is in its first words, the others add noise and time.
    prose_words: tuple[int, int] = (10, 2)
    # A word of code, as white space splits it, is three or four tokens long.
    code_words: tuple[int, int] = (6, 2)
    # 45 kB of text leave bits per byte with a paired standard error of some thousandths.
    bpb_chunks: int = 150
    bpb_chunk_chars: int = 300


@dataclass(frozen=True)
class Passage:
    """A piece of a document, cut in two."""

    document: str
    context: str
    continuation: str


def policy(include_path: Path) -> dict[str, str]:
    """The tags that say how soups of the quickstart's model are searched and judged."""
    return {
        "soup.tasks": HELD_OUT,
        "soup.ood_tasks": ",".join(OOD),
        "soup.test_tasks": TEST,
        "soup.margin": str(MARGIN),
        "soup.include_path": str(include_path),
    }


def write(documents: Sequence[Document], folder: Path, sizes: Sizes = Sizes()) -> Path:
    """Write the five tasks and their items into `folder`; the same Python gives the same bytes.

    Returns:
        The absolute folder, for lm-eval's `include_path`.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prose = {d.name: "\n".join(d.prose) for d in documents if d.use is Use.PROSE_EVAL}
    code = {d.name: "\n".join(d.code) for d in documents if d.use is Use.CODE_EVAL}
    rarity = rarity_in(p for d in documents if d.use is Use.TRAIN for p in d.prose + d.code)
    for name, texts, words, items in (
        ("quickstart_prose", prose, sizes.prose_words, sizes.items),
        ("quickstart_code", code, sizes.code_words, sizes.code_items),
    ):
        every = [p for document, text in texts.items() for p in passages(document, text, *words)]
        chosen = sample(every, items)
        write_task(folder, name, questions(chosen, sizes.choices, rarity), MULTIPLE_CHOICE)
        if texts is prose:
            taken = {p.context for p in chosen}
            spare = [p for p in every if p.context not in taken]
            more = sample(spare, sizes.test_items, "items for the test set")
            asked = questions(more, sizes.choices, rarity)
            write_task(folder, f"{name}_test", asked, MULTIPLE_CHOICE)
        chunks = [c for text in texts.values() for c in _chunks(text, sizes.bpb_chunk_chars)]
        rows = [{"text": chunk} for chunk in sample(chunks, sizes.bpb_chunks)]
        write_task(folder, f"{name}_bpb", rows, BITS_PER_BYTE)
    return folder


def questions(
    passages: Sequence[Passage], choices: int, rarity: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Each passage against its neighbours' continuations by rarity, all from other documents.

    The choices of an item are equally rare on their own, so only what they continue tells which
    one is right. Each continuation is right once and wrong about `choices` - 1 times; the right
    answer is at each position equally often.
    """
    ranked = sorted(passages, key=lambda p: (rarity(p.continuation), _digest(p)))
    rows = []
    for number, passage in enumerate(ranked):
        around = chain(ranked[number + 1 :], ranked[:number])
        others = (p.continuation for p in around if p.document != passage.document)
        options: list[str] = []
        for text in others:
            if text not in (passage.continuation, *options):
                options.append(text)
            if len(options) == choices - 1:
                break
        answer = number % choices
        options.insert(answer, passage.continuation)
        rows.append({"passage": passage.context, "choices": options, "answer": answer})
    return rows


def rarity_in(texts: Iterable[str]) -> Callable[[str], float]:
    """How rare a piece of text is: bits per word by counting the words and signs of `texts`."""
    counts = Counter(word for text in texts for word in WORD.findall(text))
    total = counts.total()

    def bits(word: str) -> float:
        # An unknown word is spelt: 8 bits to say so, and then 2.5 per letter.
        return -log2(counts[word] / total) if word in counts else 8 + 2.5 * len(word)

    return lambda text: sum(bits(word) for word in WORD.findall(text))


def passages(document: str, text: str, before: int, after: int) -> Iterator[Passage]:
    """Consecutive passages of so many words. Line breaks and indentation stay as they are."""
    starts = [
        i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())
    ]
    for first in range(0, len(starts) - before - after, before + after):
        begin, cut, end = (starts[first + words] for words in (0, before, before + after))
        context = text[begin:cut].rstrip()
        # What separates the two belongs to the continuation: the tokenizer joins it to the word.
        continuation = text[begin + len(context) : end].rstrip()
        if len((context + continuation).encode()) <= LONGEST:
            yield Passage(document, context, continuation)


def _chunks(text: str, length: int) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text) - length, length)]


def sample(
    items: Sequence[T],
    count: int,
    what: str = "items",
    source: str = "the standard library of this Python",
) -> list[T]:
    """`count` of the items, in an order that depends on nothing but what they say."""
    if len(items) < count:
        raise SpecError(
            f"{source} gives only {len(items)} {what}",
            where=f"--items {count}",
            fix=f"ask for {len(items)} items or fewer",
        )
    return sorted(items, key=_digest)[:count]


def _digest(item: object) -> bytes:
    return hashlib.sha256(repr(item).encode()).digest()


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], kind: dict[str, Any]) -> None:
    """Write the rows and the YAML of a task: `MULTIPLE_CHOICE` or `BITS_PER_BYTE`."""
    items = folder / f"{name}.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        # Absolute: lm-eval resolves relative paths against the working directory, not the task.
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "num_fewshot": 0,
        **kind,
        "metadata": {"version": 1.0},
    }
    # JSON is YAML, and quotes what needs quoting.
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


MULTIPLE_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{passage}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
BITS_PER_BYTE: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
