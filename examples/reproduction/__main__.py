"""`python examples/reproduction`: the paper's experiments on the quickstart's checkpoints.

Run the quickstart first, then this in the same folder. What was evaluated once is not evaluated
again: stop it and start it again as you like.
"""

import os
import sys
from pathlib import Path

# Nothing here is on the hub. The Hugging Face libraries read these once, when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import click

LATE, EARLY = "v12,v13", "v3,v4"
# folder of the results → study and what it is asked
EXPERIMENTS = {
    "pairs": ("pairs", {"versions": ",".join(f"v{i}" for i in range(1, 14))}),
    "count": ("count", {"versions": "v8,v9,v10,v11,v12,v13"}),
    "landscape-late": ("landscape", {"pair": LATE}),
    "landscape-early": ("landscape", {"pair": EARLY}),
    "heldout": ("heldout", {"pair": LATE}),
    "alpha": ("alpha", {"pair": LATE}),
    "ood": ("ood", {"pairs": LATE}),
    "methods": ("methods", {"pairs": f"{EARLY} v11,v12 {LATE}"}),
}


@click.command()
@click.option("--model", default="quickstart-llm", show_default=True, help="Registered model.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="reproduction",
    show_default=True,
    help="Where tables and figures are written.",
)
@click.option("--only", multiple=True, type=click.Choice(list(EXPERIMENTS)), help="Some of them.")
@click.option("--limit", type=int, help="Items per task, for a quick try.")
def main(model: str, out: Path, only: tuple[str, ...], limit: int | None) -> None:
    """Which pairs, how many, which λ, how many items, which space, which method."""
    import mlflow_soup

    for name in only or EXPERIMENTS:
        study, asked = EXPERIMENTS[name]
        spec = mlflow_soup.Spec(model=model, limit=limit, out=str(out / name), **asked)
        try:
            click.echo(mlflow_soup.run_study(study, spec).summary + "\n")
        except mlflow_soup.SoupError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
