"""Text that every Python carries: the standard library, as documents of prose and of code.

A document is one module or one help topic. What a document is for is decided by a hash of its name
alone, so the same module is never trained on in one run and evaluated on in the next.

| use          | prose (docstrings, help topics) | code (sources without docstrings, comments) |
|--------------|---------------------------------|---------------------------------------------|
| `TRAIN`      | yes                             | one module in four                          |
| `PROSE_EVAL` | yes, never trained on           | not used                                    |
| `CODE_EVAL`  | not used                        | yes, never trained on                       |

Code is thus another domain than prose, yet not gibberish to a model trained on `TRAIN`.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mlflow_soup.errors import SpecError

# What Linux distributions package apart, and tables that are neither prose nor code.
LEFT_OUT = {
    *("dist-packages", "site-packages", "encodings", "pydoc_data", "test", "tests"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "turtle.py", "venv"),
}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Use(Enum):
    """What a document is for."""

    TRAIN = "train"
    PROSE_EVAL = "prose"
    CODE_EVAL = "code"


@dataclass(frozen=True)
class Document:
    """One module or help topic: its prose by paragraph, on one line each; its code by block."""

    name: str
    use: Use
    prose: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


def read() -> list[Document]:
    """The documents of this Python installation, sorted by use and name, training documents first.

    A paragraph or block that the library has twice stays only where it comes first, so nothing
    that is evaluated on was trained on word for word under another name.

    Raises:
        SpecError: this Python was installed without the sources of its standard library.
    """
    documents = sorted((*_topics(), *_modules()), key=lambda d: (list(Use).index(d.use), d.name))
    if not any(d.code for d in documents if d.use is Use.CODE_EVAL):
        raise SpecError(
            "this Python has no sources of its standard library, which the quickstart learns from",
            where=sysconfig.get_path("stdlib"),
            fix="use a Python that was installed with its .py files",
        )
    seen: set[str] = set()

    def unseen(paragraphs: tuple[str, ...]) -> tuple[str, ...]:
        kept = tuple(p for p in dict.fromkeys(paragraphs) if p not in seen)
        seen.update(kept)
        return kept

    return [Document(d.name, d.use, unseen(d.prose), unseen(d.code)) for d in documents]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text` that are prose, on one line each: no doctests, tables, headings."""
    flowed = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [p for p in flowed if ">>>" not in p and len(p) >= 40 and _share_of_letters(p) > 0.7]


def _share_of_letters(text: str) -> float:
    return sum(c.isalpha() or c == " " for c in text) / len(text)


def hashed(name: str) -> float:
    """`name` as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32


def _topics() -> Iterator[Document]:
    """The language reference, which `help()` shows; each topic is a document of prose."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        name = f"topic {topic}"
        use = Use.PROSE_EVAL if hashed(name) < 0.3 else Use.TRAIN
        yield Document(name, use, tuple(paragraphs(text)))


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.isdisjoint(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = "/".join(parts)
        tree = ast.parse(path.read_bytes())
        match hashed(name):
            case share if share < 0.30:
                yield Document(name, Use.PROSE_EVAL, prose=docstrings(tree))
            case share if share < 0.42:
                yield Document(name, Use.CODE_EVAL, code=_blocks(tree))
            case share if share < 0.57:
                yield Document(name, Use.TRAIN, docstrings(tree), _blocks(tree))
            case _:
                yield Document(name, Use.TRAIN, docstrings(tree))


def docstrings(tree: ast.Module) -> tuple[str, ...]:
    """The paragraphs of prose in the docstrings of a module."""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, Documented))
    return tuple(p for docstring in found if docstring for p in paragraphs(docstring))


def _blocks(tree: ast.Module) -> tuple[str, ...]:
    """The module's functions and classes, without docstrings and comments; not its tables."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tuple(ast.unparse(node) for node in tree.body if isinstance(node, Documented))
