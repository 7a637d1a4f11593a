"""The ledger of a registered model: what happened to it, in numbered entries that are written once.

MLflow has one operation in which only the first of several callers succeeds: a run's param cannot
be changed. So entry n + 1 of a series is a param of the ledger's run, and the process that writes
it knows that no other entry followed entry n. The run is the only one of its experiment, which is
named after the model. Names of experiments are unique: of several new ledgers, each made under a
name of its own, the first to be renamed stays.
"""

import json
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_soup.errors import RegistryError
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import asking, where
from mlflow_soup.registry.store import Store, pages


@dataclass(frozen=True)
class Entry:
    """One entry of a series.

    Attributes:
        number: from 1, without gaps.
        told: its content, which is written once.
        mark: a note that its writer added later and may replace; empty for none.
    """

    number: int
    told: Mapping[str, Any]
    mark: str = ""


@dataclass(frozen=True)
class Ledger:
    """The ledger of one registered model: several named series of entries."""

    client: Store
    name: str
    run_id: str

    @property
    def hasty(self) -> "Ledger":
        """The same ledger without retries, for calls that may fail."""
        return replace(self, client=self.client.hasty)

    def read(self, series: str) -> list[Entry]:
        """All entries of a series, oldest first."""
        with asking(f"read the ledger of {self.name}"):
            data = self.client.get_run(self.run_id).data
        found = {}
        for key, value in data.params.items():
            number = _number(series, key)
            if number is not None:
                found[number] = Entry(number, _read(value), data.tags.get(key, ""))
        return [found[number] for number in sorted(found)]

    def series(self, kind: str) -> list[str]:
        """The names of all series that begin with `kind`, sorted."""
        with asking(f"read the ledger of {self.name}"):
            params = self.client.get_run(self.run_id).data.params
        names = {key.rpartition("/")[0] for key in params}
        return sorted(name for name in names if name.startswith(kind))

    def append(self, series: str, number: int, told: Mapping[str, Any]) -> bool:
        """Append an entry; False if another process appended one of this number first.

        Args:
            series: the name of the series.
            number: the number of the last entry that was read, plus one.
            told: its content; it must be unique, for example by a nonce.
        """
        text = json.dumps(told, sort_keys=True)
        with asking(f"write to the ledger of {self.name}"):
            try:
                self.client.log_param(self.run_id, _key(series, number), text)
            except MlflowException as error:
                if "Changing param values is not allowed" in str(error.message):
                    return False
                raise
            # the answer may be lost, so the ledger says which entry came first
            return self.client.get_run(self.run_id).data.params[_key(series, number)] == text

    def mark(self, series: str, number: int, text: str) -> None:
        """Mark an entry; a new mark replaces the old one."""
        with asking(f"write to the ledger of {self.name}"):
            self.client.set_tag(self.run_id, _key(series, number), text)


def _key(series: str, number: int) -> str:
    return f"{series}/{number:05d}"


def _number(series: str, key: str) -> int | None:
    """The number of the entry that a param holds; None if we did not name the param.

    Somebody else could name one `…/5`, which must not pass for our `…/00005`.
    """
    of, _, digits = key.rpartition("/")
    number = int(digits) if of == series and digits.isdecimal() else None
    return number if number is not None and key == _key(series, number) else None


def _read(text: str) -> dict[str, Any]:
    """An entry's content; text that is not ours is kept under `unreadable`."""
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    return content if isinstance(content, dict) else {"unreadable": text}


def open_ledger(client: Store, name: str) -> Ledger:
    """The ledger of a registered model; the first call makes it.

    Raises:
        RegistryError: the ledger was deleted, or its experiment is not a ledger.
    """
    found = find_ledger(client, name)
    if found is None:
        with asking(f"make the ledger of {name}"):
            _make(client, name)
        found = find_ledger(client, name)
    assert found is not None
    return found


def find_ledger(client: Store, name: str) -> Ledger | None:
    """The ledger of a registered model, or None if it was never made.

    Raises:
        RegistryError: the ledger was deleted, or its experiment is not a ledger.
    """
    title = naming.ledger_name(name)
    with asking(f"open the ledger of {name}"):
        experiment = client.get_experiment_by_name(title)
    if experiment is None:
        return None
    if experiment.lifecycle_stage != "active" or naming.LEDGER not in experiment.tags:
        raise RegistryError(
            f"the ledger of {name} was deleted, or its experiment is not a ledger",
            where=f"{where()}, experiment {title!r} ({experiment.experiment_id})",
            fix="restore it: mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}; or rename the experiment, and a new ledger begins",
        )
    return Ledger(client, name, experiment.tags[naming.LEDGER])


def leftovers(client: Store, name: str) -> list[tuple[str, str]]:
    """Id and name of the experiments that were made for this ledger and never became it."""
    aside = f"{naming.ledger_name(name)}/"
    with asking(f"look for ledgers of {name}"):
        found = pages(client.search_experiments)
    return [(e.experiment_id, e.name) for e in found if e.name.startswith(aside)]


def _make(client: Store, name: str) -> None:
    """Make an experiment with the ledger's run under a unique name; the first rename wins."""
    title = naming.ledger_name(name)
    aside = f"{title}/{uuid.uuid4().hex}"

    def look() -> str | None:
        found = client.get_experiment_by_name(aside)
        return None if found is None else str(found.experiment_id)

    create = partial(client.create_experiment, aside)
    experiment = str(client.once(look, create, "make a ledger", tried=False))
    tags = {
        naming.ROLE: "ledger",
        "mlflow.note.content": _NOTE.format(name=name, word=shlex.quote(name)),
    }
    run_id = client.begin_run(experiment, f"ledger of {name}", tags)
    client.set_terminated(run_id)  # MLflow still writes params to a run that has ended
    client.set_experiment_tag(experiment, naming.LEDGER, run_id)
    try:
        client.rename_experiment(experiment, title)
    except MlflowException:
        if client.get_experiment_by_name(title) is None:
            raise
    if client.get_experiment(experiment).name != title:  # another process was first
        client.discard(lambda: client.delete_experiment(experiment), "delete a ledger")


_NOTE = """What mlflow-soup did to registered model `{name}`: a param for each promotion, written
once (who moved what, from what, by which verdict), and for each search that was begun. `mlflow-soup
doctor --model {word}` compares it with the registry. Do not delete it.
"""
