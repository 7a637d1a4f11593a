"""Links to pages of the MLflow UI: a version, a run, the comparison of a search's trials."""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from mlflow.exceptions import MlflowException

from mlflow_soup.records import Version
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import is_server, where, where_models
from mlflow_soup.registry.store import Store


def link(path: str) -> str:
    """The URL of a page: on the server of its store, or on the one that `mlflow ui` would start."""
    return f"{_home(path)}/#{path}"


def target(path: str) -> str:
    """The target of a link between pages; one server may show runs, and another one models."""
    return f"#{path}" if _home("/models") == _home("/experiments") else link(path)


def _home(path: str) -> str:
    store = where_models() if path.startswith("/models") else where()
    return store.rstrip("/") if is_server(store) else "http://127.0.0.1:5000"


def how_to_look() -> str:
    """The command that starts the UI on the stores that are no servers; empty if all are."""
    stores = [store for store in (where(), where_models()) if not is_server(store)]
    options = ("--backend-store-uri", "--registry-store-uri")
    told = [f"{o} {shlex.quote(s)}" for o, s in zip(options, dict.fromkeys(stores), strict=False)]
    return " ".join(("mlflow ui", *told)) if told else ""


def _here(path: str) -> str:
    """The path within the workspace that the user works in, if the store has workspaces."""
    workspace = os.environ.get("MLFLOW_WORKSPACE", "").strip()  # `mlflow.set_workspace` writes it
    if not workspace:
        return path
    return f"{path}{'&' if '?' in path else '?'}workspace={quote(workspace, safe='')}"


def run_path(client: Store, run_id: str) -> str:
    """The path of a run's page, in the mode that shows models and metrics."""
    experiment = client.experiment_of(run_id)
    return _here(f"/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning")


def artifact_path(client: Store, run_id: str, file: str) -> str:
    """The path of the page that shows an artifact of a run."""
    page = f"/experiments/{client.experiment_of(run_id)}/runs/{run_id}/artifacts/{quote(file)}"
    return _here(f"{page}?workflowType=machine_learning")


def share_view(
    client: Store, run_id: str, key: str, chosen: str, axes: Sequence[str]
) -> tuple[str, str]:
    """Prepare the UI's comparison of a search's trials; the paths of its table and of its plot.

    The rows of a pair are in the order of the curve, not of luck. MLflow does not document how it
    stores a shared view. A UI that does not know the view shows the plain list of runs.

    Args:
        client: the store's client.
        run_id: the search run.
        key: its key.
        chosen: the run of the chosen trial.
        axes: the params of the trials to plot the score over.
    """
    experiment = client.experiment_of(run_id)
    score = {"key": naming.OBJECTIVE, "type": "METRIC"}
    chart = {"runsCountToCompare": 100, "metricSectionId": "soup", "deleted": False}
    plots: list[dict[str, Any]] = [
        {
            **chart,
            "type": "SCATTER",
            "uuid": axis,
            "xaxis": {"key": axis, "type": "PARAM"},
            "yaxis": score,
        }
        for axis in axes
    ]
    # the UI draws a bar chart of each metric that no chart is of, also of a deleted one
    plots += [
        {
            **chart,
            "type": "BAR",
            "uuid": f"no {metric}",
            "metricKey": metric,
            "isGenerated": True,
            "deleted": True,
        }
        for metric in client.get_run(chosen).data.metrics
    ]
    state = {
        "searchFilter": f"tags.`{naming.KEY}` = '{key}' and tags.`{naming.ROLE}` = 'trial'",
        "orderByKey": "params.`lambda`" if len(axes) == 1 else "attributes.start_time",
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [
            *(f"params.`{axis}`" for axis in dict.fromkeys(("lambda", *axes))),
            f"metrics.`{naming.OBJECTIVE}`",
            f"tags.`{naming.CHOSEN}`",
        ],
        "compareRunSections": [
            {
                "uuid": "soup",
                "name": "The score of each trial",
                "display": True,
                "isReordered": True,
                "columns": len(axes),
                "cardHeight": 520,
            }
        ],
        "isAccordionReordered": True,
        "compareRunCharts": plots,
    }
    share = key[:16]
    # private door: mlflow.sharedViewState
    with contextlib.suppress(MlflowException):  # a user who may not tag the experiment gets no view
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{share}", json.dumps(state))
    table = (
        f"/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={share}"
    )
    return _here(table), _here(f"{table}&compareRunsMode=CHART")


def version_path(version: Version) -> str:
    """The path of a version's page."""
    return _here(f"/models/{quote(version.name, safe='')}/versions/{version.number}")


def version_link(version: Version) -> str:
    """A link to a version's page, in Markdown."""
    words = re.sub(r"([\\*_<\[\]])", r"\\\1", str(version))
    return f"[{words}]({target(version_path(version))})"
