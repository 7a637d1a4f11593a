"""The command line: knobs from `Spec`, words and exit codes; everything heavy is imported late."""

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from mlflow_soup.errors import SoupError, SpecError
from mlflow_soup.files.untrusted import parse_yaml
from mlflow_soup.redaction import guard_process, purge, redact
from mlflow_soup.registry.family import FORMATS
from mlflow_soup.request.knobs import kind
from mlflow_soup.request.names import parse_uri
from mlflow_soup.request.spec import STUDIES, Spec


class SoupGroup(click.Group):
    """The one place where a SoupError becomes words; anything else is a bug, with traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, turning our errors into their words and exit codes."""
        try:
            return super().invoke(ctx)
        except SoupError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, Terminated) as stop:
            signum = stop.signum if isinstance(stop, Terminated) else signal.SIGINT
            click.echo("interrupted; the same command continues where it stopped", err=True)
            ctx.exit(128 + signum)
        except click.ClickException as error:
            purge(error)  # it repeats what was written
            raise


def _say(words: str) -> None:
    click.echo(redact(words))


class Terminated(SystemExit):
    """A signal that ends the process: runs are to be ended properly on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    for again in (signal.SIGTERM, signal.SIGHUP):  # we are on the way out
        signal.signal(again, signal.SIG_IGN)
    raise Terminated(signum)


def _use_one_thread() -> None:
    """Keep torch to one thread: what waits for a disk has no use for more.

    OpenMP's threads spin between two operations, and burn the core that writes or digests.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextlib.contextmanager
def _heavy_imports() -> Iterator[None]:
    """Import without looking for garbage among what will live as long as the process.

    torch makes so many objects that collecting them, then and at the end, takes as long as
    importing it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _read_spec(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """`--spec FILE`: knobs from YAML, which options on the command line override."""
    if path is None:
        return
    try:
        content = parse_yaml(path.read_bytes()) or {}
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{path} cannot be read: {error}", where="--spec", fix="name a YAML file of knobs"
        ) from error
    known = {f.name for f in fields(Spec)}
    unknown = sorted(set(content) - known) if isinstance(content, dict) else [str(content)]
    if unknown:
        raise SpecError(
            f"{path} sets {', '.join(map(repr, unknown))}, which is no knob",
            where="--spec",
            fix=f"known knobs: {', '.join(sorted(known))}",
        )
    odd = [name for name, value in content.items() if isinstance(value, dict | list | set)]
    if odd:
        raise SpecError(
            f"{path} sets {odd[0]} to {content[odd[0]]!r}",
            where="--spec",
            fix="write one text or number, as the option takes it: pair: v12,v13",
        )
    said = {name: str(value) for name, value in content.items() if value is not None}
    ctx.default_map = {**(ctx.default_map or {}), **said}


def _option(knob: Field[Any]) -> Callable[[Any], Any]:
    choices = knob.metadata["choices"]
    words = knob.metadata["help"]
    if knob.default not in ("", None):
        words += f"  [default: {knob.default}]"
    # no default: what is not said may come from the model's policy tags
    return click.option(
        "--" + knob.name.replace("_", "-"),
        knob.name,
        type=click.Choice(choices) if choices else kind(knob),
        metavar=None if choices else kind(knob).__name__.upper().replace("STR", "TEXT"),
        help=words,
    )


def _knobs(command: str) -> Callable[[Any], Any]:
    """All options of a command, in the order of the fields."""

    def decorate(function: Any) -> Any:
        for knob in reversed([f for f in fields(Spec) if command in f.metadata["commands"]]):
            function = _option(knob)(function)
        return click.option(
            "--spec",
            type=click.Path(path_type=Path),
            callback=_read_spec,
            is_eager=True,
            expose_value=False,
            help="YAML file with any of these options.",
        )(function)

    return decorate


def _spec(said: dict[str, Any]) -> Spec:
    """A Spec of what was said; an empty text (MLproject's way of leaving out) says nothing."""
    return Spec(**{name: value for name, value in said.items() if value not in (None, "")})


@click.group(
    cls=SoupGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # MLflow Projects turn `-P ood_tasks=…` into `--ood_tasks …`
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(package_name="mlflow-soup")
def main() -> None:
    """Merge registered checkpoints into a better version; promote it only if it holds."""
    guard_process()
    # `mlflow run` passes a SIGTERM on to nobody, and a closed terminal says SIGHUP
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminate)


@main.command()
@_knobs("run")
@click.pass_context
def run(ctx: click.Context, /, **said: Any) -> None:
    """Search the merge weights λ, register the soup, check it out of domain, promote it.

    Exit codes: 0 done, 2 bad request, 3 refused by the gate, 4 parent missing or damaged,
    5 overtaken by another promotion or process, 6 store unreachable or disk full, 1 anything else.
    """
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.workflows import run as pipeline

    outcome = pipeline.run(spec)
    _say(outcome.summary)
    ctx.exit(outcome.exit_code)


@main.group()
def study() -> None:
    """The paper's pilot experiments on one's own versions; nothing is registered.

    Each leaves its runs, a table (CSV and Markdown) and a figure in MLflow. What has been evaluated
    before is not evaluated again, so the same command goes on where it was cut short.
    """


def _add_study(name: str, words: str) -> None:
    @study.command(name, help=words, short_help=words.partition("?")[0] + "?")
    @_knobs(name)
    def command(**said: Any) -> None:
        spec = _spec(said)
        with _heavy_imports():
            from mlflow_soup.workflows.study import run_study

        _say(run_study(name, spec).summary)


for _name, _words in STUDIES.items():
    _add_study(_name, _words)


@main.command()
@_knobs("evaluate")
def evaluate(**said: Any) -> None:
    """Score a registered soup, its parents and the champion out of domain."""
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import report
        from mlflow_soup.workflows import release

    _say(report.ood_table(release.evaluate(spec)))


@main.command()
@_knobs("gate")
@click.pass_context
def gate(ctx: click.Context, /, **said: Any) -> None:
    """Judge a soup by its newest evaluation. Exit code 0 when it passes, 3 when it is refused."""
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import report
        from mlflow_soup.workflows import release

    version, verdict = release.gate(spec)
    _say(f"{version}: gate {'passed' if verdict.passed else 'REFUSED'}")
    for check in verdict.checks:
        _say(f"  {report.format_check(check)}")
    ctx.exit(0 if verdict.passed else 3)


@main.command()
@_knobs("promote")
def promote(**said: Any) -> None:
    """Point an alias, a stage or another model's alias at a soup that passed the gate."""
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.workflows import release

    version, target = release.promote(spec)
    _say(f"{target} → {version}")


@main.command()
@click.argument("uri")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default="text",
    show_default=True,
    help="A tree for people, a graph for programs, a drawing for Markdown pages.",
)
def lineage(uri: str, form: str) -> None:
    """Print the family tree of a version, models:/my-llm/14 or models:/my-llm@champion.

    Soups of soups are followed down to trained checkpoints; nothing is pulled.
    """
    name, ref = parse_uri(uri)
    with _heavy_imports():
        from mlflow_soup.registry import store
        from mlflow_soup.registry.versions import find_model, resolve, trace

    client = store.connect()
    version = resolve(client, find_model(client, name, [ref]), ref)
    _say(FORMATS[form](trace(client, version)))


@main.command()
@click.argument("parents", nargs=-1, required=True, metavar="PARENT PARENT [PARENT]...")
@click.option(
    "--weights",
    required=True,
    help="Weight λ of each parent, in their order, comma-separated: 0.3,0.7 or 1/3,2/3.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the soup, not there yet.",
)
@click.option(
    "--digests",
    type=bool,
    default=False,
    metavar="YES|NO",
    help="Record SHA-256 of all files and tensors; takes longer than the merge.  [default: no]",
)
def merge(parents: tuple[str, ...], weights: str, out: Path, digests: bool) -> None:
    """Merge folders or versions (models:/my-llm/12) with given weights; no search, no registry.

    The soup has the files, names and dtypes of the last parent, and a manifest from which
    `mlflow-soup verify OUT` can make it again.
    """
    try:
        lam = [float(Fraction(weight.strip())) for weight in weights.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise SpecError(
            f"{weights!r} is no list of weights",
            where="--weights",
            fix="numbers from 0 to 1 that sum to 1, one for each parent: 0.3,0.7",
        ) from error
    _use_one_thread()
    with _heavy_imports():
        from mlflow_soup.workflows.merge import merge_checkpoints

    manifest = merge_checkpoints(parents, lam, out, digests=digests)
    shares = " + ".join(f"{source.lam:g} × {source.uri}" for source in manifest.sources)
    _say(f"{out} = {shares}")


def _printable(line: str) -> str:
    """One line for the terminal: what others named cannot pretend to be more lines, or colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@main.command()
@click.option("--model", default="", help="Registered model; default: as of run.")
@click.option(
    "--fix",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    metavar="[YES|NO]",
    help="Repair what can be repaired without a decision.  [default: no]",
)
@click.option(
    "--digests",
    type=bool,
    default=True,
    metavar="YES|NO",
    help="Read the bytes of all soups, too.  [default: yes]",
)
@click.pass_context
def doctor(ctx: click.Context, /, model: str, fix: bool, digests: bool) -> None:
    """Compare ledger, aliases, versions, runs and bytes of a model; explain what disagrees.

    Exit codes: 0 nothing disagrees (any more), 3 something does, 4 there is no such model, 6 store
    unreachable or disk full, 1 anything else.
    """
    with _heavy_imports():
        from mlflow_soup.workflows import doctor as doctors

    name, complaints = doctors.examine(model, digests=digests)
    left = 0
    for complaint in complaints:
        _say(_printable(complaint.what))
        _say(_printable(f"    why: {complaint.why}"))
        if fix and doctors.mend(complaint):
            click.echo(_printable(f"    done: {complaint.remedy.removeprefix('--fix ')}"))
        else:
            _say(_printable(f"    fix: {complaint.remedy}"))
            left += 1
    click.echo(f"{name}: {left or 'no'} complaint{'' if left == 1 else 's'}")
    ctx.exit(3 if left else 0)


@main.command()
@click.argument("soup", metavar="SOUP")
@click.pass_context
def verify(ctx: click.Context, soup: str) -> None:
    """Check whether a soup is what it says: models:/my-llm/14, or a folder.

    It and its parents are pulled, compared with its manifest, mixed again and compared once more.
    Exit codes: 0 it is what its manifest says, 3 it is not, 4 it or a parent is missing.
    """
    _use_one_thread()
    with _heavy_imports():
        from mlflow_soup.workflows import verify as verification

    verdicts, again = set(), False
    for finding in verification.verify(soup):
        first, *others = finding.details
        _say(_printable(f"{finding.verdict:<8}  {finding.what}: {first}"))
        for line in others:
            _say(_printable(f"{'':<10}{line}"))
        verdicts.add(finding.verdict)
        again = (finding.what, finding.verdict) == ("merged again", "ok")  # what comes last
    if "MISMATCH" in verdicts:
        _say(f"{soup}: NOT what its manifest says")
        ctx.exit(3)
    if "missing" in verdicts:
        _say(f"{soup}: not verified, a parent is missing")
        ctx.exit(4)
    if not again:
        _say(f"{soup}: files, tags and parents are as recorded; it was not mixed again")
    else:
        _say(f"{soup}: verified")
