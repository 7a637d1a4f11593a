"""What `mlflow-soup quickstart` does before the main job: tasks, pretraining, policy."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mlflow_soup.quickstart import corpus, pretrain, tasks


def prepare(
    model: str, folder: Path, seed: int, steps: int | None, items: int | None
) -> Iterator[str]:
    """Write evaluation tasks, and register the checkpoints of a small model as versions 1 to 13.

    A second call finds the versions and trains nothing.

    Args:
        model: the registered model.
        folder: where the tasks are written.
        seed: of the pretraining.
        steps: optimizer steps; None for all.
        items: questions for each task; None for all.

    Yields:
        Sentences that say what was done.

    Raises:
        SpecError: the model has versions of another pretraining, or this Python has no sources.
    """
    quiet_unless_terminal()
    settings, sizes = pretrain.Settings(), tasks.Sizes()
    if steps is not None:
        settings = replace(settings, steps_between=max(1, steps // settings.checkpoints))
    if items is not None:
        sizes = replace(sizes, items=items, test_items=items, code_items=items)
    pretrain.tell("reading texts of this Python, and writing tasks")
    documents = corpus.read()
    include_path = tasks.write(documents, folder / "tasks", sizes)
    # `mlflow run` names the experiment that it chose
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
    yield pretrain.pretrain(model, documents, settings, seed=seed, experiment_id=experiment)
    pretrain.set_policy(model, tasks.policy(include_path))
    pretrain.tell("the main job: v12 and v13")


def quiet_unless_terminal() -> None:
    """Show no progress bars of the Hugging Face libraries in a log file."""
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
