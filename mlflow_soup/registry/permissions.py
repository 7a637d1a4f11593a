"""What MLflow's permissions ask for: each call needs one permission, on one thing.

A server answers a forbidden call with 403 and no more. So `store.Store` notes on the error what the
call needs, and `outages.asking` tells it.
"""

import inspect
from collections.abc import Callable
from typing import Any

READ, EDIT, MANAGE = "READ", "EDIT", "MANAGE"
_NOTE = "MLflow asks for "
# the first parameter of MLflow's method → what it names
_THINGS = {
    "run_id": "the experiment of run {}, if there is such a run",
    "experiment_id": "experiment {}",
    "model_id": "the experiment of logged model {}",
    "name": "registered model {!r}",
}
# where nobody may read by default, a server says 403 of what does not exist, too
IF_ANY = ", if there is one"
_ANYBODY = ("create_experiment", "create_registered_model")
_READS = ("get_", "list_", "search_", "download_")
_OWNERS = {  # what only MANAGE allows, and whoever made a thing has that
    *("delete_run", "delete_experiment", "delete_logged_model", "delete_registered_model"),
    *("delete_model_version", "delete_model_version_tag", "delete_registered_model_alias"),
}


def needed(call: Callable[..., Any], *args: Any) -> str:
    """What a call of MLflow's client needs, such as `EDIT on experiment 3`; empty if not known.

    Args:
        call: the method of `MlflowClient`.
        args: its arguments, without the client.
    """
    name = call.__name__
    _, first, *_ = [*inspect.signature(call).parameters, "", ""]  # after `self`
    if name in _ANYBODY or first not in _THINGS or not args:
        return ""
    thing = _THINGS[first].format(args[0])
    level = READ if name.startswith(_READS) else MANAGE if name in _OWNERS else EDIT
    if name == "get_experiment_by_name":
        thing = f"experiment {args[0]!r}"
    elif name == "get_registered_model":
        thing += IF_ANY
    return f"{level} on {thing}"


def note(error: BaseException, need: str) -> None:
    """Note on an error what its call needs; a later note counts more."""
    if need:
        error.add_note(f"{_NOTE}{need}")


def noted(error: BaseException) -> str:
    """What was noted on an error; empty if nothing was."""
    notes = [n for n in getattr(error, "__notes__", ()) if n.startswith(_NOTE)]
    return notes[-1].removeprefix(_NOTE) if notes else ""
