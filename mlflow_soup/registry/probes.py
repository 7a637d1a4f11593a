"""Ask whether MLflow's permissions allow what a command will write, before it evaluates anything.

Each probe deletes a tag that nothing has. MLflow asks for the same permission as for the writes of
the command, and nothing changes. Only servers have permissions: on a database nothing is asked.
"""

import os
from collections.abc import Callable
from typing import TypeVar

from mlflow.exceptions import MlflowException

from mlflow_soup.errors import DeniedError
from mlflow_soup.registry import naming, permissions
from mlflow_soup.registry.outages import asking, is_forbidden, is_server
from mlflow_soup.registry.permissions import EDIT, IF_ANY
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.tracking import RUN_ENV, here
from mlflow_soup.registry.versions import find_registered

T = TypeVar("T")
_TAG = "soup.probe"  # no model, run or experiment has it


def check_experiment(client: Store, name: str) -> None:
    """Check that the user may write runs into the experiment of a request.

    Args:
        client: the store's client.
        name: the experiment's name; empty for MLflow's choice. One that is not there may be made.

    Raises:
        DeniedError: the user may not.
    """
    if not is_server():
        return
    run_id = os.environ.get(RUN_ENV, "")  # `mlflow run` has made the run already
    place = f"experiment {name!r}" if name else "the current experiment"
    with asking(f"write to {f'run {run_id}' if run_id else place}"):
        if run_id:
            _try(lambda: client.delete_tag(run_id, _TAG))
            return
        need = f"{EDIT} on {place}" if name else ""
        if found := _try(lambda: here(client, name), need):
            _try(lambda: client.delete_experiment_tag(found, _TAG), need)


def check_model(client: Store, name: str) -> None:
    """Check that the user may write to a registered model and to its ledger.

    Args:
        client: the store's client.
        name: the registered model. One that is not there may be made, and so may its ledger.

    Raises:
        DeniedError: the user may not.
    """
    if not is_server():
        return
    with asking(f"write to registered model {name}"):
        try:
            _try(lambda: client.delete_registered_model_tag(name, _TAG))
        except MlflowException as error:
            try:
                found = find_registered(client, name)
            except DeniedError:
                permissions.note(error, f"{EDIT} on registered model {name!r}{IF_ANY}")
                raise error from None
            if found is not None:
                raise
    title = naming.ledger_name(name)
    with asking(f"write to the ledger of {name}"):
        need = f"{EDIT} on experiment {title!r}"
        ledger = _try(lambda: client.get_experiment_by_name(title), need)
        if ledger is not None and (run_id := ledger.tags.get(naming.LEDGER)):
            _try(lambda: client.delete_tag(run_id, _TAG), need)


def _try(call: Callable[[], T], need: str = "") -> T | None:
    """What a call returns; None if it fails, as it does on a tag that is not there.

    Args:
        call: the call.
        need: what the command will need, if that is more than the call needs.

    Raises:
        MlflowException: the call is forbidden.
        StoreError: the store is away.
    """
    try:
        return call()
    except MlflowException as error:
        if not is_forbidden(error):
            return None
        permissions.note(error, need)
        raise
