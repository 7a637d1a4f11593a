"""`python examples/quickstart`: from nothing to a promoted soup, offline.

It writes evaluation tasks, pretrains a model and merges the last two of its checkpoints.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

# Nothing here is on the hub. The Hugging Face libraries read these once, when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import click


@click.command()
@click.option("--model", default="quickstart-llm", show_default=True, help="Registered model.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="quickstart-data",
    show_default=True,
    help="Where the evaluation tasks are written.",
)
@click.option("--seed", default=0, show_default=True, help="Of the pretraining.")
@click.option("--steps", type=int, help="Optimizer steps of the pretraining, for a quick try.")
@click.option("--items", type=int, help="Questions per task, for a quick try.")
@click.option("--trials", type=int, help="Merge weights to evaluate.")
@click.option("--promote", default="alias:champion", show_default=True, help="If the gate agrees.")
def main(
    model: str,
    folder: Path,
    seed: int,
    steps: int | None,
    items: int | None,
    trials: int | None,
    promote: str,
) -> None:
    """Pretrain a small language model, merge its last two checkpoints, promote the soup."""
    import corpus
    import pretrain
    import tasks

    # `mlflow run` is ended by a signal that would leave its run RUNNING for ever
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    quiet_unless_terminal()
    settings, sizes = pretrain.Settings(), tasks.Sizes()
    if steps is not None:
        settings = replace(settings, steps_between=max(1, steps // settings.checkpoints))
    if items is not None:
        sizes = replace(sizes, items=items, code_items=items)
    documents = corpus.read()
    include_path = tasks.write(documents, folder / "tasks", sizes)
    click.echo(
        pretrain.pretrain(model, documents, settings, seed=seed, experiment_id=experiment_id())
    )
    pretrain.set_policy(model, include_path)
    sys.exit(soup(model, promote, trials))


def soup(model: str, promote: str, trials: int | None) -> int:
    """The main job, as any pipeline would call it. Returns its exit code."""
    import mlflow_soup

    budget = {} if trials is None else {"trials": trials}
    try:
        spec = mlflow_soup.Spec(model=model, pair="v12,v13", promote=promote, **budget)
        outcome = mlflow_soup.run(spec)
    except mlflow_soup.SoupError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    click.echo(outcome.summary)
    return outcome.exit_code


def experiment_id() -> str:
    """The experiment `mlflow run` chose, else MLflow's default."""
    return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")


def quiet_unless_terminal() -> None:
    """No progress bars of the Hugging Face libraries in a log file."""
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
