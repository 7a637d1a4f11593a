"""Prose of installed packages, as documents: the docstrings of a module, the README of a package.

What a document is for is decided by a hash of its name alone, so no module is trained on in one run
and evaluated on in the next.

| use        | share | what for                                                   |
|------------|-------|------------------------------------------------------------|
| `TRAIN`    | 72 %  | the training text                                          |
| `HELD_OUT` | 8 %   | the task that a search reads                               |
| `TEST`     | 20 %  | the test set: many questions, which neither search nor gate reads |

Packages copy from themselves. A paragraph stays only where it comes first, and what is evaluated on
has no eight words in a row that the training text has too.
"""

import ast
import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.quickstart.corpus import docstrings, hashed, paragraphs

# What mlflow-soup needs anyway, so all of it is there; `constraints.txt` pins the versions.
PACKAGES = (
    *("accelerate", "datasets", "huggingface_hub", "lm_eval", "matplotlib", "mlflow", "networkx"),
    *("nltk", "numpy", "pandas", "pyarrow", "scikit-learn", "scipy", "SQLAlchemy", "sympy"),
    *("torch", "transformers"),
)
LEFT_OUT = {"test", "tests", "testing", "_vendor", "vendor", "externals"}
IN_A_ROW = 8  # words


class Use(Enum):
    """What a document is for."""

    TRAIN = "train"
    HELD_OUT = "held-out"
    TEST = "test"


@dataclass(frozen=True)
class Document:
    """A module or a README: its prose by paragraph, on one line each."""

    name: str
    use: Use
    prose: tuple[str, ...]

    @property
    def text(self) -> str:
        """All paragraphs, one a line."""
        return "\n".join(self.prose)


def versions(packages: Iterable[str] = PACKAGES) -> list[str]:
    """`name==version` of each package that the text is of, as installed.

    Raises:
        SpecError: a package is not installed.
    """
    try:
        # `+cpu` and the like say how torch was built; the text is the same
        return [f"{p}=={importlib.metadata.version(p).partition('+')[0]}" for p in packages]
    except importlib.metadata.PackageNotFoundError as error:
        raise SpecError(
            f"package {error.name} is not installed, and the text is of its docstrings",
            where="examples/trajectory",
            fix=f"pip install {error.name}",
        ) from error


def unpinned(found: Sequence[str], constraints: Path) -> list[str]:
    """Those of the versions that are others than `constraints.txt` pins."""
    pinned = {line.strip().lower() for line in constraints.read_text().splitlines()}
    return [version for version in found if version.lower() not in pinned]


def read(packages: Sequence[str] = PACKAGES) -> list[Document]:
    """The documents of these packages, sorted by use and name, training documents first."""
    texts = sorted(
        (list(Use).index(use_of(name)), name, prose)
        for package in packages
        for name, prose in _documents(importlib.metadata.distribution(package))
    )
    seen: set[str] = set()
    trained: set[int] = set()
    documents = []
    for index, name, prose in texts:
        use = list(Use)[index]
        kept = [p for p in dict.fromkeys(prose) if p not in seen]
        seen.update(kept)
        if use is Use.TRAIN:
            trained.update(row for p in kept for row in in_a_row(p))
        else:
            kept = [p for p in kept if trained.isdisjoint(in_a_row(p))]
        if kept:
            documents.append(Document(name, use, tuple(kept)))
    return documents


def use_of(name: str) -> Use:
    """What the document of this name is for."""
    share = hashed(name)
    return Use.HELD_OUT if share < 0.08 else Use.TEST if share < 0.28 else Use.TRAIN


def in_a_row(paragraph: str) -> Iterator[int]:
    """Hashes of all runs of eight words, without signs and capitals; of all words if fewer."""
    words = re.findall(r"\w+", paragraph.lower())
    for first in range(max(1, len(words) - IN_A_ROW + 1)):
        yield hash(tuple(words[first : first + IN_A_ROW]))


def _documents(package: importlib.metadata.Distribution) -> Iterator[tuple[str, tuple[str, ...]]]:
    about = package.metadata.get_payload()
    yield f"{package.name} README", tuple(paragraphs(str(about)))
    for file in package.files or ():
        if file.suffix != ".py" or ".." in file.parts or not LEFT_OUT.isdisjoint(file.parts):
            continue
        path = Path(str(file.locate()))
        if not path.is_file():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package writes is not ours to change
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates, and sources for other Pythons
                continue
        yield file.as_posix(), docstrings(tree)
