"""`python examples/trajectory`: pretrain a small Llama, with 24 checkpoints and 3 annealed twins.

A second call trains nothing. See the README beside this file.
"""

import os
import sys
from pathlib import Path

# Nothing here is on the hub. The Hugging Face libraries read these once, when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import click

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"


@click.command()
@click.option("--model", default="trajectory-llm", show_default=True, help="Registered model.")
@click.option("--seed", default=0, show_default=True, help="Seed of the training.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default="trajectory-data",
    show_default=True,
    help="Where the tasks are written.",
)
@click.option("--steps", type=click.IntRange(24), help="Optimizer steps, for a quick look.")
@click.option("--items", type=click.IntRange(8), help="Questions per task, for a quick look.")
@click.option("--packages", help="Read these installed packages only, separated by commas.")
def main(
    model: str, seed: int, data: Path, steps: int | None, items: int | None, packages: str | None
) -> None:
    """Pretrain a small Llama on the prose of installed packages, and register its checkpoints."""
    from mlflow_soup.errors import SoupError

    try:
        prepare(model, seed, data, steps, items, packages)
    except SoupError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def prepare(
    model: str, seed: int, data: Path, steps: int | None, items: int | None, packages: str | None
) -> None:
    """Write the tasks, train, and leave the policy with the model."""
    import pretrain
    import questions
    import text
    from mlflow import MlflowClient

    from mlflow_soup.quickstart.pretrain import set_policy
    from mlflow_soup.quickstart.steps import quiet_unless_terminal

    quiet_unless_terminal()
    chosen = tuple(packages.split(",")) if packages else text.PACKAGES
    versions = text.versions(chosen)
    for other in text.unpinned(versions, CONSTRAINTS):
        click.echo(f"note: {other} is not the version in constraints.txt, so the text differs")
    settings = pretrain.Settings()
    if steps is not None:
        settings = pretrain.tiny(settings, steps)
    plan = pretrain.Plan(model, settings, seed, tuple(versions))
    if any(plan.missing(MlflowClient())) or not (data / "tasks").is_dir():
        documents = text.read(chosen)
        include_path = questions.write(documents, data / "tasks", items)
        # `mlflow run` names the experiment that it chose
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        click.echo(pretrain.train(plan, documents, experiment))
        set_policy(plan.name, questions.policy(include_path))
        set_policy(plan.twins_name, questions.policy(include_path))
    else:
        click.echo(f"{plan.name} and {plan.twins_name} are complete: nothing to train")


if __name__ == "__main__":
    main()
