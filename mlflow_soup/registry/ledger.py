"""What happened to a registered model, in order: entries that nobody can write twice.

MLflow has one operation that only the first of several callers wins: a run's param is written once.
So entry n + 1 of a series is a param of one run, and whoever writes it knows that nothing came
between. The run is alone in an experiment named after the model, which is made aside and then
renamed, as names of experiments are unique.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_soup.errors import RegistryError
from mlflow_soup.registry import naming
from mlflow_soup.registry.outages import asking, where
from mlflow_soup.registry.store import Store, pages


@dataclass(frozen=True)
class Entry:
    """One thing that happened.

    Attributes:
        number: from 1, without gaps.
        told: what was written.
        mark: what its writer noted on it later, and may note anew; empty for nothing.
    """

    number: int
    told: Mapping[str, Any]
    mark: str = ""


@dataclass(frozen=True)
class Ledger:
    """The ledger of one registered model: series of entries, each under a name."""

    client: Store
    name: str
    run_id: str

    @property
    def hasty(self) -> "Ledger":
        """The same ledger, asked once: for what can be done later."""
        return replace(self, client=self.client.hasty)

    def read(self, series: str) -> list[Entry]:
        """All entries of a series, oldest first."""
        with asking(f"read the ledger of {self.name}"):
            data = self.client.get_run(self.run_id).data
        found = {}
        for key, value in data.params.items():
            of, _, number = key.rpartition("/")
            if of == series and number.isdecimal():
                found[int(number)] = Entry(int(number), _read(value), data.tags.get(key, ""))
        return [found[number] for number in sorted(found)]

    def series(self, kind: str) -> list[str]:
        """The names of all series that begin with `kind`, sorted."""
        with asking(f"read the ledger of {self.name}"):
            params = self.client.get_run(self.run_id).data.params
        names = {key.rpartition("/")[0] for key in params}
        return sorted(name for name in names if name.startswith(kind))

    def append(self, series: str, number: int, told: Mapping[str, Any]) -> bool:
        """Write an entry; False when another has written one of this number before.

        Args:
            series: its name.
            number: one more than the last that was read.
            told: what happened; it should say by whom, so that no two entries are equal.
        """
        text = json.dumps(told, sort_keys=True)
        with asking(f"write to the ledger of {self.name}"):
            try:
                self.client.log_param(self.run_id, _key(series, number), text)
            except MlflowException as error:
                if "Changing param values is not allowed" in str(error.message):
                    return False
                raise
            # an answer of the store is not needed to know who was first
            return self.client.get_run(self.run_id).data.params[_key(series, number)] == text

    def mark(self, series: str, number: int, text: str) -> None:
        """Note something on an entry; the last note counts."""
        with asking(f"write to the ledger of {self.name}"):
            self.client.set_tag(self.run_id, _key(series, number), text)


def _key(series: str, number: int) -> str:
    return f"{series}/{number:05d}"


def _read(text: str) -> dict[str, Any]:
    """An entry as it was written; what somebody else wrote there is shown as it is."""
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    return content if isinstance(content, dict) else {"unreadable": text}


def open_ledger(client: Store, name: str) -> Ledger:
    """The ledger of a registered model; made when it is asked for first.

    Raises:
        RegistryError: somebody deleted it.
    """
    found = find_ledger(client, name)
    if found is None:
        with asking(f"make the ledger of {name}"):
            _make(client, name)
        found = find_ledger(client, name)
    assert found is not None
    return found


def find_ledger(client: Store, name: str) -> Ledger | None:
    """The ledger of a registered model; None when nothing was ever written.

    Raises:
        RegistryError: somebody deleted it.
    """
    title = naming.ledger_name(name)
    with asking(f"open the ledger of {name}"):
        experiment = client.get_experiment_by_name(title)
    if experiment is None:
        return None
    if experiment.lifecycle_stage != "active" or naming.LEDGER not in experiment.tags:
        raise RegistryError(
            f"the ledger of {name} was deleted, or is none",
            where=f"{where()}, experiment {title!r} ({experiment.experiment_id})",
            fix="restore it: mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}; or rename it, to begin a new one",
        )
    return Ledger(client, name, experiment.tags[naming.LEDGER])


def leftovers(client: Store, name: str) -> list[tuple[str, str]]:
    """Id and name of the experiments that were to become this ledger and did not."""
    aside = f"{naming.ledger_name(name)}/"
    with asking(f"look for ledgers of {name}"):
        found = pages(client.search_experiments)
    return [(e.experiment_id, e.name) for e in found if e.name.startswith(aside)]


def _make(client: Store, name: str) -> None:
    """An experiment with the ledger's run, under a name of its own first; the first rename wins."""
    title = naming.ledger_name(name)
    aside = f"{title}/{uuid.uuid4().hex}"

    def look() -> str | None:
        found = client.get_experiment_by_name(aside)
        return None if found is None else str(found.experiment_id)

    experiment = client.once(look, lambda: str(client.create_experiment(aside)), "make a ledger")
    tags = {naming.ROLE: "ledger", "mlflow.note.content": _NOTE.format(name=name)}
    run_id = client.begin_run(experiment, f"ledger of {name}", tags)
    client.set_terminated(run_id)  # nothing runs; params may be written all the same
    client.set_experiment_tag(experiment, naming.LEDGER, run_id)
    try:
        client.rename_experiment(experiment, title)
    except MlflowException:
        if client.get_experiment_by_name(title) is None:
            raise
    if client.get_experiment(experiment).name != title:  # another was quicker
        client.discard(lambda: client.delete_experiment(experiment), "delete a ledger")


_NOTE = """What mlflow-soup did to registered model `{name}`: a param for each promotion, written
once (who moved what, from what, by which verdict), and for each search that was begun. `mlflow-soup
doctor --model {name}` compares it with the registry. Do not delete it.
"""
