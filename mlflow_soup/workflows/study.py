"""Run one of the paper's experiments, from request to report: a run, a table, a figure and notes.

No version is registered. Each evaluation is stored as a run and is never repeated. The same command
therefore continues a study that was stopped.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlflow_soup.errors import SpecError
from mlflow_soup.files.durable import check_writable, on_disk
from mlflow_soup.redaction import redact, redacting
from mlflow_soup.registry import inputs, naming, tracking
from mlflow_soup.registry.alone import alone
from mlflow_soup.registry.links import how_to_look, link, run_path
from mlflow_soup.registry.outages import asking
from mlflow_soup.reporting import tables
from mlflow_soup.request.spec import METHODS, Spec
from mlflow_soup.search.methods import unused
from mlflow_soup.workflows import comparison, pilots
from mlflow_soup.workflows.bench import no_ood_tasks
from mlflow_soup.workflows.job import Job, Session, open_session, settle
from mlflow_soup.workflows.pilots import Result

logger = logging.getLogger("mlflow_soup")


@dataclass(frozen=True)
class Study:
    """One experiment.

    Attributes:
        named_by: the option that names the versions.
        jobs: session, versions or pairs → the jobs of the study; refuses invalid requests.
        work: session, versions or pairs, study run → result.
    """

    named_by: str
    jobs: Callable[[Session, Any], Sequence[Job]]
    work: Callable[[Session, Any, str], Result]


STUDIES: Mapping[str, Study] = {
    "pairs": Study("versions", pilots.pair_jobs, pilots.pairs),
    "count": Study("versions", pilots.count_jobs, pilots.count),
    "schedule": Study("versions", pilots.schedule_jobs, pilots.schedule),
    "landscape": Study("pair", pilots.grid_jobs, pilots.landscape),
    "heldout": Study("pair", pilots.grid_jobs, pilots.heldout),
    "alpha": Study("pair", pilots.alpha_jobs, pilots.alpha),
    "ood": Study("pairs", comparison.method_jobs, comparison.ood),
    "methods": Study("pairs", comparison.method_jobs, comparison.methods),
}
# option → how to name versions with this option
_NAMING = {
    "pairs": "name one pair or more: --pairs 'v11,v12 v12,v13'",
    "pair": "name the older version, then the newer: --pair v12,v13",
    "versions": "name them oldest first: --versions v10,v11,v12,v13, or --last 4",
}


@dataclass(frozen=True)
class Report:
    """The result of a study, the run that stores it, and the text for the terminal."""

    result: Result
    run_id: str
    summary: str


def _prepare(name: str, spec: Spec) -> tuple[Session, Any]:
    if name not in STUDIES:
        raise SpecError(
            f"there is no study {name!r}",
            where="the name of the study",
            fix=f"name one of {', '.join(STUDIES)}",
        )
    option = STUDIES[name].named_by
    # a Spec can set options that no command takes
    for other in ("pair", "versions", "last", "pairs"):
        if getattr(spec, other) and other != option and (option, other) != ("versions", "last"):
            raise SpecError(
                f"the study {name} does not take --{other}",
                where=f"--{option}",
                fix=_NAMING[option],
            )
    groups = spec.couples if option == "pairs" else (spec.parents,)
    if not any(groups) and not spec.last:
        raise SpecError("no versions were named", where=f"--{option}", fix=_NAMING[option])
    if spec.out:
        check_writable(Path(spec.out))
    spec = spec.with_defaults_of(name)
    asked, named = spec.space if "space" in spec.named else "", spec.named
    client, model, spec = settle(spec, [ref for group in groups for ref in group])
    spec.check_space(asked)
    for words in unused(_methods(name, spec), named):
        logger.warning(words)
    if name == "ood" and not spec.ood_tasks:
        raise no_ood_tasks()
    if not _needs_ood_tasks(name, spec):
        spec = replace(spec, ood_tasks="")
    if not _takes(name, "test_tasks"):
        spec = replace(spec, test_tasks="")
    session, resolved = open_session(client, model, spec, groups, f"--{option}")
    subject = resolved if option == "pairs" else resolved[0]
    STUDIES[name].jobs(session, subject)
    return session, subject


def _methods(name: str, spec: Spec) -> Sequence[str]:
    """The methods of a study; of one that asks for none, all knobs that it takes are its own."""
    if _takes(name, "methods"):
        return spec.compared
    return (spec.method,) if _takes(name, "method") else METHODS


def _needs_ood_tasks(name: str, spec: Spec) -> bool:
    """Whether a study scores on the OOD tasks, or reads a text that their items must not be in."""
    return _takes(name, "ood_tasks") or (_takes(name, "calibration") and bool(spec.calibration))


def _takes(name: str, knob: str) -> bool:
    """Whether a study has a knob."""
    return any(f.name == knob and name in f.metadata["commands"] for f in fields(Spec))


@redacting()
@asking("study the versions")
@alone()
def run_study(name: str, spec: Spec) -> Report:
    """Run one of the paper's pilot experiments on registered versions. It registers no version.

    Args:
        name: a name in `STUDIES`.
        spec: the versions, tasks and settings; the model's policy fills in what it leaves open.

    Raises:
        SpecError: the request is wrong; nothing was changed.
        ParentError: a version is missing, damaged, or does not match another.
        ObjectiveError: a version has no finite score.
    """
    session, subject = _prepare(name, spec)
    tags = {
        "mlflow.runName": naming.run_name(f"study {name} of {session.name}"),
        naming.ROLE: "study",
        naming.METHOD: name,
        naming.MODEL: session.name,
    }
    with (
        tracking.open_run(session.client, session.spec.experiment, tags) as run_id,
        session.bench.engine,
    ):
        said = {f"cfg.{f.name}": getattr(session.spec, f.name) for f in fields(session.spec)}
        params = {k: v for k, v in said.items() if v not in ("", None)}
        tracking.log(session.client, run_id, params=params)
        result = STUDIES[name].work(session, subject, run_id)
        return Report(result, run_id, tell(session, run_id, name, result))


def _about(session: Session) -> str:
    """A sentence that says which model and tasks the numbers of a study belong to."""
    spec, suites = session.spec, session.bench.suites
    items = f", the first {spec.limit} items of each task" if spec.limit else ""
    tasks = ", ".join(map(str, suites.held_out.terms))
    if suites.test is not None:
        tasks += f"; test: {', '.join(map(str, suites.test.terms))}"
    return (
        f"Model {session.name}; held-out: {tasks}{items}. Best in bold (here *); low and high: "
        "95 % paired interval of Δ."
    )


def tell(session: Session, run_id: str, name: str, result: Result) -> str:
    """Write table, figure and notes to the run, and to `spec.out` if set; the text to print."""
    client, spec = session.client, session.spec
    about = _about(session)
    notes = "\n".join(f"- {note}" for note in result.notes)
    text = f"# {result.title}\n\n{about}\n\n{tables.markdown(result.table)}\n\n{notes}\n"
    text = redact(text)
    files = {f"{name}.csv": tables.csv(result.table), f"{name}.md": text}
    for file, content in files.items():
        client.log_text(run_id, content, file)
    client.log_figure(run_id, result.figure, f"{name}.png")
    tracking.log(client, run_id, description=text)
    inputs.link(client, run_id, {inputs.HELD_OUT: [*session.bench.held_out.datasets.values()]})
    look = [f"run: {link(run_path(client, run_id))}"]
    if command := how_to_look():
        look.append(f"to open it, run: {command}")
    if spec.out:
        folder = Path(spec.out)
        with on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (folder / file).write_text(content, encoding="utf-8")
            result.figure.savefig(folder / f"{name}.png", dpi=150)
        look.append(f"files: {folder / name}.csv, .md and .png")
    return "\n".join([result.title, about, tables.text(result.table), *result.notes, *look])
