"""The command line: options from `Spec`, words and exit codes. Commands import the rest late."""

import contextlib
import gc
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
import cloup

from mlflow_soup import output
from mlflow_soup.errors import GateError, SoupError, SpecError
from mlflow_soup.files.untrusted import parse_yaml
from mlflow_soup.output import Answer, Answering
from mlflow_soup.redaction import guard_process, purge, redact_line
from mlflow_soup.request import orders
from mlflow_soup.request.knobs import as_written, kind, option
from mlflow_soup.request.names import check_name, parse_uri
from mlflow_soup.request.spec import NAMINGS, STUDIES, Spec

if TYPE_CHECKING:
    from mlflow_soup.workflows.study import Report


class SoupGroup(cloup.Group):
    """The one place where a SoupError becomes words. Any other exception is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn our errors into words, documents and exit codes."""
        answer = ctx.obj = Answer()
        try:
            return super().invoke(ctx)
        except SoupError as error:
            click.echo(f"error: {error}", err=True)
            answer.fail(output.failure(error), error.exit_code, _refusal(error))
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, Terminated) as stop:
            signum = _signum(stop)
            click.echo("interrupted; the same command continues where it stopped", err=True)
            answer.fail(output.interrupted(signum), 128 + signum)
            ctx.exit(128 + signum)
        except click.ClickException as error:
            purge(error)  # it quotes the command line
            answer.fail(output.failure(error), error.exit_code)
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            answer.fail(output.failure(error), 1)
            raise


def _refusal(error: SoupError) -> dict[str, Any]:
    """The verdict of a gate that refuses a promotion; nothing for other errors."""
    if not isinstance(error, GateError) or error.verdict is None:
        return {}
    from mlflow_soup.reporting import document

    return {"verdict": document.verdict(error.verdict)}


class Terminated(SystemExit):
    """A signal that ends the process, after it has ended its runs in MLflow."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def _signum(stop: KeyboardInterrupt | Terminated) -> int:
    """The signal that raised an exception."""
    return stop.signum if isinstance(stop, Terminated) else signal.SIGINT


# `mlflow run` passes a SIGTERM on to nobody, and a closed terminal says SIGHUP
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def hear_signals() -> None:
    """Let a signal that ends the process end it with an exception, also in a callback.

    Python drops an exception that is raised in a destructor, or in the callback of a weak
    reference. A signal that comes there is sent once more.
    """
    report = sys.unraisablehook

    def send_again(dropped: Any) -> None:
        error, ending = dropped.exc_value, not threading.main_thread().is_alive()
        if ending or not isinstance(error, KeyboardInterrupt | Terminated):
            report(dropped)
            return
        _listen()
        timer = threading.Timer(0.05, os.kill, (os.getpid(), _signum(error)))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    _listen()


def _listen() -> None:
    for signum in _ENDING:
        signal.signal(signum, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    for again in _ENDING:  # the process is ending already
        signal.signal(again, signal.SIG_IGN)
    raise Terminated(signum)


def _use_one_thread() -> None:
    """Limit torch to one thread: a merge waits for the disk.

    The threads of OpenMP spin between two operations, and take the core that writes or digests.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextlib.contextmanager
def _heavy_imports() -> Iterator[None]:
    """Import without garbage collection.

    torch makes so many objects that collecting them takes as long as importing it. They live as
    long as the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _read_spec(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Read `--spec FILE`: options in YAML. The command line overrides them."""
    if path is None:
        return
    try:
        content = parse_yaml(path.read_bytes()) or {}
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{path} cannot be read: {error}",
            where="--spec",
            fix="name a YAML file of options, such as pair: v12,v13",
        ) from error
    known = {f.name: f for f in fields(Spec)}
    unknown = sorted(set(content) - set(known)) if isinstance(content, dict) else [str(content)]
    if unknown:
        raise SpecError(
            f"{path} sets {', '.join(map(repr, unknown))}, which is not an option",
            where="--spec",
            fix=f"set only options of this list: {', '.join(sorted(known))}",
        )
    said = {
        name: as_written(known[name], value)
        for name, value in content.items()
        if value not in (None, "", [])  # as an empty text of the command line: not said
    }
    odd = [name for name, value in said.items() if isinstance(value, dict | list | set)]
    if odd:
        raise SpecError(
            f"{path} sets {odd[0]} to {said[odd[0]]!r}, which is not one text or number",
            where="--spec",
            fix="write the value as on the command line, such as pair: v12,v13 for --pair v12,v13; "
            "where that takes several, a list of them may stand here: pair: [v12, v13]",
        )
    ctx.default_map = {**(ctx.default_map or {}), **{name: str(v) for name, v in said.items()}}


def _option(knob: Field[Any], command: str) -> Callable[[Any], Any]:
    choices = knob.metadata["choices"]
    words = knob.metadata["help"]
    default = knob.metadata["defaults"].get(command, knob.default)
    if kind(knob) is bool:  # `--fix`, or `--fix=no` as MLflow Projects say it
        return cloup.option(
            *(option(knob), knob.name),
            type=bool,
            is_flag=False,
            flag_value=True,
            metavar="[YES|NO]",
            help=words + ("  [default: no]" if default is False else ""),
        )
    if default not in ("", None):
        words += f"  [default: {default}]"
    # no default: a policy tag of the model may set what the command line does not
    return cloup.option(
        option(knob),
        knob.name,
        type=click.Choice(choices) if choices else kind(knob),
        metavar=None if choices else kind(knob).__name__.upper().replace("STR", "TEXT"),
        help=words,
    )


def _knobs(command: str) -> Callable[[Any], Any]:
    """All options of a command in their groups, in the order of the fields."""

    def decorate(function: Any) -> Any:
        knobs = [f for f in fields(Spec) if command in f.metadata["commands"]]
        function = cloup.option(
            "--spec",
            type=click.Path(path_type=Path),
            callback=_read_spec,
            is_eager=True,
            expose_value=False,
            help="YAML file with any of these options.",
        )(function)
        groups = dict.fromkeys(knob.metadata["group"] for knob in knobs)
        for group in reversed(groups):
            options = [_option(knob, command) for knob in knobs if knob.metadata["group"] == group]
            function = cloup.option_group(group, *options)(function)
        return function

    return decorate


def _spec(said: dict[str, Any]) -> Spec:
    """The Spec of the options that were given, on the command line or else in the file of `--spec`.

    MLproject passes an empty text for options that nobody gave.
    """
    ctx = click.get_current_context()
    given = {name: value for name, value in said.items() if value not in (None, "")}
    typed = {name for name in given if ctx.get_parameter_source(name) is _TYPED}
    replaced = set(NAMINGS) - typed if typed & set(NAMINGS) else set()
    file = {name: text for name, text in (ctx.default_map or {}).items() if name in said}
    return Spec(**{name: v for name, v in (file | given).items() if name not in replaced})


_TYPED = click.core.ParameterSource.COMMANDLINE


EXIT_CODES = (
    "Exit codes: 0 done, 2 bad request, 3 refused by the gate or nothing to promote, "
    "4 version missing or damaged, 5 overtaken by another promotion or process, "
    "6 store unreachable or disk full, 7 no permission, 1 anything else."
)
MAIN = cloup.Section("The main job")
STEPS = cloup.Section("Its last steps, one by one")
SOUPS = cloup.Section("Soups and their lineage")
OTHER = cloup.Section("Trial, experiments, repair")


@cloup.group(
    cls=SoupGroup,
    sections=[MAIN, STEPS, SOUPS, OTHER],
    context_settings=cloup.Context.settings(
        help_option_names=["-h", "--help"],
        # MLflow Projects turn `-P ood_tasks=…` into `--ood_tasks …`
        token_normalize_func=lambda token: token.replace("_", "-"),
        formatter_settings=cloup.HelpFormatter.settings(max_width=100, row_sep=None),
    ),
)
@click.version_option(package_name="mlflow-soup")
def main() -> None:
    """Merge registered checkpoints, and promote the result only if it is not worse elsewhere.

    Shell completion: `_MLFLOW_SOUP_COMPLETE=bash_source mlflow-soup` prints the script for bash,
    zsh_source and fish_source those for zsh and fish.
    """
    guard_process()
    hear_signals()


@main.command(section=MAIN, epilog=EXIT_CODES, cls=Answering)
@_knobs("run")
@output.options()
@click.pass_obj
def run(answer: Answer, /, **said: Any) -> None:
    """Search λ, register the soup, judge it, promote it.

    The gate compares the soup with its parents and the champion on out-of-domain tasks.
    """
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows import run as workflow

    outcome = workflow.run(spec)
    answer.say(outcome.summary)
    answer.give(document.run(outcome), outcome.exit_code)


@main.command(section=MAIN, cls=Answering)
@_knobs("track")
@output.options()
@click.pass_obj
def track(answer: Answer, /, **said: Any) -> None:
    """Score each checkpoint, and the merge of the window that ends there.

    Two curves over the tokens seen, in one run: the merged one is less noisy, and tells earlier how
    training goes and what a decay of the learning rate would give. Called again, the command adds
    the checkpoints that are new. Nothing is registered.
    """
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.workflows.track import track as workflow

    _report(answer, workflow(spec))


def _report(answer: Answer, report: "Report") -> None:
    """End a command whose result is a table."""
    from mlflow_soup.reporting import document

    result = report.result
    answer.say(report.summary)
    answer.give(document.study(result.title, result.table, result.notes, report.run_id))


@main.command(section=MAIN)
@cloup.option_group(
    "When",
    cloup.option(
        "--poll",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="Seconds between two looks at the registry.  [default: 30]",
    ),
    cloup.option(
        "--listen",
        default="",
        metavar="HOST:PORT",
        help="Also look when MLflow's webhook says that a version was made. The environment "
        "variable MLFLOW_SOUP_WEBHOOK_SECRET holds the secret of the webhook.",
    ),
    cloup.option(
        "--since",
        default="",
        metavar="VERSION",
        help="At the first start, begin with this version.  [default: the newest]",
    ),
    cloup.option(
        "--once",
        type=bool,
        is_flag=False,
        flag_value=True,
        default=False,
        metavar="[YES|NO]",
        help="Handle what has arrived, and end.  [default: no]",
    ),
)
@_knobs("watch")
@click.pass_context
def watch(
    ctx: click.Context, /, poll: float, listen: str, since: str, once: bool, **said: Any
) -> None:
    """Do what the model's policy says, whenever a checkpoint is registered.

    Tag soup.on_version of the registered model holds one or more command lines, such as
    run --last 2 --promote alias:champion, separated by ; or new lines. Each checkpoint is handled
    once, in the order of the versions, and told in one line. Soups are no checkpoints.

    A tag may set what a policy tag may set, and the versions and the alias of the same model. The
    options below are yours alone. SIGTERM ends the watch with exit code 0; the same command then
    goes on where it stopped.
    """
    spec = _spec(said)
    # the first line of what it does comes after some twenty seconds
    model = spec.model or "the registered model"
    click.echo(f"watch: {model}, every {poll:g} s; loading libraries", err=True)
    try:
        with _heavy_imports():
            from mlflow_soup.workflows import watch as workflow

        code = workflow.watch(
            spec, read_orders, click.echo, poll_s=poll, listen=listen, since=since, once=once
        )
    except Terminated as stop:
        if stop.signum != signal.SIGTERM:
            raise
        click.echo("the watch has ended; the same command goes on", err=True)
        code = 0
    ctx.exit(code)


def read_orders(text: str, model: str) -> list[orders.Order]:
    """What tag `soup.on_version` of a model says, read by the options of the commands themselves.

    Raises:
        SpecError: it cannot be followed.
    """
    known = [name for name in orders.COMMANDS if name in main.commands]
    found = []
    for words in orders.split(text):
        orders.check_command(words[0], known)
        order = orders.Order(shlex.join(words), words[0], _read_line(words))
        found.append(orders.check(order, model))
    return found


def _read_line(words: Sequence[str]) -> dict[str, Any]:
    """The knobs that a line of the tag sets. Only options that may stand there are known."""
    line, able = shlex.join(words), {f.name for f in fields(Spec) if orders.may_stand(f)}
    command = main.commands[words[0]]
    options = [param for param in command.params if param.name in able]
    settings = {"token_normalize_func": main.context_settings["token_normalize_func"]}
    bare = click.Command(words[0], settings, params=options, add_help_option=False)
    try:
        params = bare.make_context(words[0], list(words[1:])).params
    except click.NoSuchOption as error:
        taken = any(error.option_name in param.opts for param in command.params)
        name = error.option_name.removeprefix("--").replace("-", "_") if taken else ""
        raise orders.misread(line, error.message, name) from error
    except click.ClickException as error:
        raise orders.misread(line, error.format_message()) from error
    return {name: value for name, value in params.items() if value not in (None, "")}


@main.group(section=OTHER)
def study() -> None:
    """The paper's experiments on your own versions.

    Nothing is registered. Each study leaves its runs, a table (CSV and Markdown) and a figure in
    MLflow. The same command continues an interrupted study: finished evaluations are not repeated.
    """


def _add_study(name: str, words: str) -> None:
    @study.command(name, help=words, short_help=words.partition("?")[0] + "?", cls=Answering)
    @_knobs(name)
    @output.options()
    @click.pass_obj
    def command(answer: Answer, /, **said: Any) -> None:
        spec = _spec(said)
        with _heavy_imports():
            from mlflow_soup.workflows.study import run_study

        _report(answer, run_study(name, spec))


for _name, _words in STUDIES.items():
    _add_study(_name, _words)


@main.command(section=STEPS, epilog=EXIT_CODES, cls=Answering)
@_knobs("evaluate")
@output.options()
@click.pass_obj
def evaluate(answer: Answer, /, **said: Any) -> None:
    """Score a soup, its parents and the champion out of domain."""
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import document, report
        from mlflow_soup.workflows import release

    examination = release.evaluate(spec)
    answer.say(report.ood_table(examination.roles))
    answer.give(document.evaluate(examination))


@main.command(section=STEPS, epilog=EXIT_CODES, cls=Answering)
@_knobs("gate")
@output.options()
@click.pass_obj
def gate(answer: Answer, /, **said: Any) -> None:
    """Judge a soup by its newest evaluation, and write the verdict.

    The verdict is computed from the scores each time, by the rules of the model that owns the
    target of --promote. With --power, nothing is judged: the command says how likely the gate
    passes a soup that is exactly as good as its rivals.
    """
    spec = _spec(said)
    if spec.power:
        with _heavy_imports():
            from mlflow_soup.decision.power import told as chances
            from mlflow_soup.reporting import document, report
            from mlflow_soup.workflows.power import power

        designs = power(spec)
        answer.say(report.power_words(*designs))
        answer.give(document.gate_power(chances(*designs)))
    with _heavy_imports():
        from mlflow_soup.reporting import document, report
        from mlflow_soup.workflows import release

    decision = release.gate(spec)
    version, verdict = decision.proven.version, decision.verdict
    answer.say(f"{version}: {report.verdict_line(verdict)}")
    for check in verdict.checks:
        answer.say(f"  {report.format_check(check)}")
    if words := report.luckless(verdict):
        answer.say(words)
    told = document.gate(version, verdict, decision.examination)
    answer.give(told, 0 if verdict.passed else 3)


@main.command(section=STEPS, epilog=EXIT_CODES, cls=Answering)
@_knobs("sign")
@output.options()
@click.pass_obj
def sign(answer: Answer, /, **said: Any) -> None:
    """Sign the files of a soup that passes the gate.

    The verdict is computed as for promote; --promote only says whose rules hold. The environment
    variable MLFLOW_SOUP_KEY names the private key, an elliptic-curve key in PEM. The signature is
    the file model.sig of the version. It replaces an earlier one, and moves no alias.
    """
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows import release

    version, key = release.sign(spec)
    answer.say(f"{version}: signed by the key {key}")
    answer.give(document.sign(version, key))


@main.command(section=STEPS, epilog=EXIT_CODES, cls=Answering)
@_knobs("promote")
@output.options()
@click.pass_obj
def promote(answer: Answer, /, **said: Any) -> None:
    """Point an alias or a stage at a soup.

    The soup's bytes are compared with its manifest, its parents are merged again, and the gate's
    verdict is computed anew: no tag decides. The alias may be that of another registered model.
    With --public-key, one of the keys must also have signed all files (mlflow-soup sign).
    """
    spec = _spec(said)
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows import release

    decision, made = release.promote(spec)
    answer.say(str(made))
    version, verdict = decision.proven.version, decision.verdict
    answer.give(document.promote(version, verdict, decision.examination, made))


@main.command(section=OTHER, cls=Answering)
@click.option("--model", default="quickstart-llm", show_default=True, help="Registered model.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="quickstart-data",
    show_default=True,
    help="Folder for the evaluation tasks.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the pretraining.")
@click.option("--steps", type=int, help="Optimizer steps of the pretraining, for a quick try.")
@click.option("--items", type=int, help="Questions for each task, for a quick try.")
@click.option("--trials", type=int, help="Largest number of evaluations.")
@click.option(
    "--promote", default="alias:champion", show_default=True, help="Target if the gate passes."
)
@output.options()
@click.pass_obj
def quickstart(answer: Answer, /, promote: str, trials: int | None, **options: Any) -> None:
    """Pretrain a small model, merge two checkpoints.

    The command registers 13 checkpoints, does the main job on the last two, and promotes the
    soup. It needs no network and no GPU: four minutes on two cores, 1 GB of memory.
    """
    # nothing here is on the hub; the Hugging Face libraries read these when they are imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    check_name(options["model"])
    if not sys.stderr.isatty():
        click.echo("loading libraries", err=True)
    with _heavy_imports():
        from mlflow_soup.quickstart import steps
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows import run as workflow

    for words in steps.prepare(**options):
        answer.say(words)
    spec = _spec(
        {"model": options["model"], "pair": "v12,v13", "promote": promote, "trials": trials}
    )
    outcome = workflow.run(spec)
    answer.say(outcome.summary)
    answer.say(f"to serve it, run: mlflow-soup export {outcome.soup.version.uri} --out served")
    answer.give(document.run(outcome), outcome.exit_code)


@main.command(section=SOUPS, cls=Answering)
@click.argument("uri")
@output.options(mermaid="a drawing for Markdown")
@click.pass_obj
def lineage(answer: Answer, /, uri: str) -> None:
    """Print the family tree of a version.

    Name it as models:/my-llm/14 or models:/my-llm@champion. The tree ends at the trained
    checkpoints. No file is downloaded.
    """
    name, ref = parse_uri(uri)
    with _heavy_imports():
        from mlflow_soup.registry import family, store
        from mlflow_soup.registry.versions import find_model, resolve, trace

    client = store.connect()
    version = resolve(client, find_model(client, name, [ref]), ref)
    found = trace(client, version)
    answer.say(family.mermaid(found) if answer.form == "mermaid" else family.text(found))
    answer.give(family.graph(found))


@main.command(section=SOUPS, cls=Answering)
@click.argument("parents", nargs=-1, required=True, metavar="PARENT PARENT [PARENT]...")
@click.option(
    "--weights",
    required=True,
    help="Weight λ of each parent, in their order; they sum to 1: 0.3,0.7 or 1/3,2/3.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the soup; it must not exist.",
)
@click.option(
    "--digests",
    type=bool,
    default=False,
    metavar="YES|NO",
    help="Record the SHA-256 of all files and tensors; slower than the merge.  [default: no]",
)
@output.options()
@click.pass_obj
def merge(
    answer: Answer, /, parents: tuple[str, ...], weights: str, out: Path, digests: bool
) -> None:
    """Merge checkpoints with given weights.

    A parent is a folder or a version, models:/my-llm/12. The soup has the files, names and
    dtypes of the last parent. `mlflow-soup verify OUT` checks it against its manifest.
    """
    try:
        lam = [float(Fraction(weight.strip())) for weight in weights.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise SpecError(
            f"{weights!r} is not a list of weights",
            where="--weights",
            fix="give one number for each parent, from 0 to 1, that sum to 1: 0.3,0.7",
        ) from error
    _use_one_thread()
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows.merge import merge_checkpoints

    manifest = merge_checkpoints(parents, lam, out, digests=digests)
    shares = " + ".join(f"{source.lam:g} × {source.uri}" for source in manifest.sources)
    answer.say(f"{out} = {shares}")
    answer.give(document.merge(str(out), manifest))


@main.command(section=SOUPS, cls=Answering)
@click.argument("uri")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; it must not exist.",
)
@click.option(
    "--base-model",
    default="",
    metavar="ID[,ID]",
    help="Models on the Hugging Face Hub that the card names as base models.  [default: none]",
)
@click.option(
    "--experiment",
    default="",
    help="MLflow experiment whose scores count. Default: as for gate.",
)
@click.option(
    "--public-key",
    default="",
    metavar="FILE[,FILE]",
    help="PEM files with public keys, one of which must have signed all files. Only scores that "
    "one of them signed count.",
)
@click.option(
    "--allow-missing",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    metavar="[YES|NO]",
    help="Export a soup whose parents are gone; its card says that they were not merged again.  "
    "[default: no]",
)
@output.options()
@click.pass_obj
def export(
    answer: Answer,
    /,
    uri: str,
    out: Path,
    base_model: str,
    experiment: str,
    public_key: str,
    allow_missing: bool,
) -> None:
    """Write a version as one flat Hugging Face folder.

    URI is models:/my-llm/14, models:/my-llm@champion or a folder; a soup or any checkpoint. A
    soup is verified first. The folder holds weights, tokenizer and a model card, whatever the
    layout in the registry: from_pretrained, lm_eval, serving tools and the Hub take it.
    """
    _use_one_thread()
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows.export import export as write

    named = [name.strip() for name in base_model.split(",") if name.strip()]
    told = write(
        uri,
        out,
        base_models=named,
        experiment=experiment,
        public_key=public_key,
        allow_missing=allow_missing,
    )
    answer.say(f"{out} = {told.name}")
    for words in told.checked:
        answer.say(redact_line(f"  checked: {words}"))
    for words in told.unchecked:
        answer.say(redact_line(f"  NOT checked: {words}"))
    answer.say(f"  scores in the card: {', '.join(told.scores) or f'none, {told.unscored}'}")
    answer.say(f"to serve it: {_how_to_serve(out)}")
    answer.give(document.export(str(out), told))


def _how_to_serve(folder: str | Path) -> str:
    """The commands that serve a flat folder; `mlflow models serve` needs a file MLmodel."""
    where = shlex.quote(str(folder))
    needs = f"(pip install 'transformers[serving]'; or: vllm serve {where})"
    return f"transformers serve {where}    {needs}"


@main.command(section=OTHER, cls=Answering)
@click.option("--model", default="", help="Registered model. Default: as for run.")
@click.option(
    "--fix",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    metavar="[YES|NO]",
    help="Repair whatever needs no decision of yours, and list the rest.  [default: no]",
)
@click.option(
    "--digests",
    type=bool,
    default=True,
    metavar="YES|NO",
    help="Also read the files of all soups, merge their parents again, and compute their verdicts "
    "again; no is faster.  [default: yes]",
)
@click.option(
    "--experiment",
    default="",
    help="MLflow experiment whose scores count. Default: as for gate.",
)
@click.option("--public-key", default="", help="As for gate: only what this key signed counts.")
@output.options()
@click.pass_obj
def doctor(answer: Answer, /, fix: bool, digests: bool, **said: Any) -> None:
    """Find contradictions in a model's records.

    The command compares the ledger, aliases, versions, runs and files of a registered model, and
    explains each difference. With --fix it also repairs whatever needs no decision of yours.

    Exit codes: 0 everything agrees, 3 something still disagrees, 4 no such model, 6 store
    unreachable or disk full, 7 no permission, 1 anything else.
    """
    with _heavy_imports():
        from mlflow_soup.workflows import doctor as doctors

    name, complaints = doctors.examine(_spec(said), digests=digests)
    told: list[dict[str, Any]] = []
    for complaint in complaints:
        answer.say(redact_line(complaint.what))
        answer.say(redact_line(f"    why: {complaint.why}"))
        mended = fix and doctors.mend(complaint)
        if mended:
            answer.say(redact_line(f"    done: {complaint.remedy.removeprefix('--fix ')}"))
        else:
            answer.say(redact_line(f"    fix: {complaint.remedy}"))
        about = {"what": complaint.what, "why": complaint.why, "remedy": complaint.remedy}
        able = complaint.repair is not None
        told.append({**about, "repairable": able, "repaired": mended})
    left = sum(not one["repaired"] for one in told)
    answer.say(f"{name}: {left or 'no'} complaint{'' if left == 1 else 's'}")
    answer.give({"model": name, "complaints": told, "left": left}, 3 if left else 0)


@main.command(section=SOUPS, cls=Answering)
@click.argument("soup", metavar="SOUP")
@click.option(
    "--public-key",
    default="",
    metavar="FILE[,FILE]",
    help="PEM files with public keys, one of which must have signed all files of the soup.",
)
@click.option(
    "--promoted",
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    metavar="[YES|NO]",
    help="Also ask whether mlflow-soup promoted the soup to the alias that SOUP names, or somebody "
    "moved the alias by hand; with --public-key, whether one of the keys signed that.  "
    "[default: no]",
)
@output.options()
@click.pass_obj
def verify(answer: Answer, /, soup: str, public_key: str, promoted: bool) -> None:
    """Check a soup against its manifest.

    SOUP is a version, models:/my-llm/14, or a folder. The command downloads the soup and
    its parents, compares files and digests with the manifest, and merges the parents again.

    Exit codes: 0 the soup is what its manifest says, 3 it is not, or is not signed by
    --public-key, or was not promoted, 4 the soup or a parent is missing.
    """
    _use_one_thread()
    with _heavy_imports():
        from mlflow_soup.reporting import document
        from mlflow_soup.workflows import verify as checks

    origin, manifest, findings = checks.open_soup(soup, public_key=public_key, promoted=promoted)
    found = []
    for finding in findings:
        first, *others = finding.details
        answer.say(redact_line(f"{finding.verdict:<8}  {finding.what}: {first}"))
        for line in others:
            answer.say(redact_line(f"{'':<10}{line}"))
        found.append(finding)
    status = checks.status(found)
    words, code = _STATUS[status]
    answer.say(f"{soup}: {words}")
    answer.give(document.verify(origin.uri, status, found, manifest), code)


# status of a soup → words, exit code
_STATUS = {
    "unsigned": ("NOT signed as a whole by a key of --public-key", 3),
    "mismatch": ("NOT what its manifest says", 3),
    "missing": ("not verified, a parent is missing", 4),
    "unpromoted": ("NOT where a promotion put it", 3),
    "recorded": ("files, tags and parents are as recorded; the parents were not merged again", 0),
    "verified": ("verified", 0),
}
