"""The lm-eval tasks of the trajectory, about documents that the model has never seen.

They ask as the quickstart's do: which of four continuations belongs to a passage?
`trajectory_prose` is for searches, `trajectory_test` is the test set. `trajectory_stdlib` asks
about the prose of Python's standard library, which nothing of the training text is of: out of
domain.
"""

from collections.abc import Sequence
from pathlib import Path

from text import Document, Use

from mlflow_soup.quickstart import corpus, tasks

# name → how many questions, of standard errors of 1.1, 0.55 and 0.9 points
TASKS = {"trajectory_prose": 2000, "trajectory_test": 8000, "trajectory_stdlib": 3000}
CHOICES, WORDS = 4, (10, 2)  # as in the quickstart, for the same reasons


def write(documents: Sequence[Document], folder: Path, items: int | None = None) -> Path:
    """Write the three tasks and their items; the same text gives the same bytes.

    Args:
        documents: all documents.
        folder: where to.
        items: questions of each task; None for `TASKS`.

    Returns:
        The absolute folder, for lm-eval's `include_path`.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rarity = tasks.rarity_in(p for d in documents if d.use is Use.TRAIN for p in d.prose)
    stdlib = [d for d in corpus.read() if d.use is corpus.Use.PROSE_EVAL]
    texts = {
        "trajectory_prose": {d.name: d.text for d in documents if d.use is Use.HELD_OUT},
        "trajectory_test": {d.name: d.text for d in documents if d.use is Use.TEST},
        "trajectory_stdlib": {d.name: "\n".join(d.prose) for d in stdlib},
    }
    for name, count in TASKS.items():
        every = [p for document, text in texts[name].items() for p in cut(document, text)]
        chosen = tasks.sample(every, items or count, source=f"the text for {name}")
        tasks.write_task(
            folder, name, tasks.questions(chosen, CHOICES, rarity), tasks.MULTIPLE_CHOICE
        )
    return folder


def cut(document: str, text: str) -> list[tasks.Passage]:
    """The passages of a document."""
    return list(tasks.passages(document, text, *WORDS))


def policy(include_path: Path) -> dict[str, str]:
    """The tags that say how soups of the trajectory are searched and judged."""
    return {
        "soup.tasks": "trajectory_prose:acc",
        "soup.ood_tasks": "trajectory_stdlib:acc",
        "soup.test_tasks": "trajectory_test:acc",
        "soup.margin": str(tasks.MARGIN),
        "soup.include_path": str(include_path),
    }
