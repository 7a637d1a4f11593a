"""Tables of the reference, generated from the code when the site is built.

A page asks for a table with a comment on a line of its own: `<!-- generate: knobs -->`. The names
are the keys of `TABLES`.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import click

from mlflow_soup import errors
from mlflow_soup.cli import main
from mlflow_soup.registry import naming
from mlflow_soup.request import knobs
from mlflow_soup.request.spec import STUDIES, Spec
from mlflow_soup.search.methods import METHODS

REQUEST = re.compile(r"^<!-- generate: (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page: put the tables where the page asks for them."""
    return REQUEST.sub(lambda asked: TABLES[asked[1]](), markdown)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def code(text: object) -> str:
    """The text in a fixed-width font, or nothing for nothing."""
    return f"`{text}`" if text not in ("", None) else ""


def command_names(group: click.Group = main, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, `study pairs`, in the order of `--help`."""
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if isinstance(command, click.Group):
            yield from command_names(command, f"{before}{name} ")


def commands() -> str:
    """What `--help` prints, for every command."""
    parts = []
    for name, command in command_names():
        program = f"mlflow-soup {name}"
        # of the command's own class, with the settings of `main`
        context = command.context_class(command, info_name=program, **main.context_settings)
        with context:
            words = command.get_help(context)
        parts.append(f"## {name}\n\n```text\n{words}\n```")
    return "\n\n".join(parts)


KINDS = {str: "text", bool: "yes, no", int: "whole number", float: "number"}


def knob_sections() -> str:
    """Every field of `Spec` in its order: meaning, values, default, commands, policy tag."""
    parts = []
    for knob in fields(Spec):
        choices, limits = knob.metadata["choices"], knob.metadata["range"]
        values = ", ".join(map(code, choices)) if choices else KINDS[knobs.kind(knob)]
        if limits is not None:
            values = limits.words.removeprefix("give ")
        users = knob.metadata["commands"]
        named = [name for name in main.commands if name in users]
        studies = [f"study {name}" for name in STUDIES if name in users]
        named += ["every study"] if len(studies) == len(STUDIES) else studies
        facts = {
            "values": values,
            "default": code("no" if knob.default is False else knob.default),
            "commands": ", ".join(named),
            "policy tag": code(f"soup.{knob.name}") if knob.metadata["policy"] else "",
        }
        lines = "\n".join(f"- {what}: {fact}" for what, fact in facts.items() if fact)
        heading = f"## `{knobs.option(knob)}` {{#{knob.name}}}"
        parts.append(f"{heading}\n\n{knob.metadata['help']}\n\n{lines}")
    return "\n\n".join(parts)


def name_tables() -> str:
    """The constants of `registry.naming` with their comments, one table a section."""
    source = inspect.getsource(naming)
    lines = source.splitlines()
    sections: dict[str, list[tuple[str, str]]] = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign) or not ast.unparse(statement.targets[0]).isupper():
            continue
        heading = next(
            line.removeprefix("# ")
            for line in reversed(lines[: statement.lineno])
            if line.startswith("# ")
        )
        if not isinstance(statement.value, ast.Constant):
            continue
        comment = lines[statement.lineno - 1].partition("  # ")[2]
        rows = sections.setdefault(heading, [])
        rows.append((code(statement.value.value), comment))
    return "\n\n".join(
        f"### {heading[0].upper()}{heading[1:]}\n\n{table(('name', 'meaning'), rows)}"
        for heading, rows in sections.items()
    )


def exit_codes() -> str:
    """The exceptions of `errors` by exit code."""
    found = [
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SoupError)
    ]
    rows = [
        (str(e.exit_code), code(e.__name__), (e.__doc__ or "").partition("\n")[0])
        for e in sorted(found, key=lambda e: e.exit_code)
    ]
    return table(("exit code", "exception", "meaning"), rows)


def methods() -> str:
    """The rows of `METHODS`."""
    rows = [(code(name), method.words, code(method.needs)) for name, method in METHODS.items()]
    return table(("`--method`", "how it makes one model of several", "statistics"), rows)


def studies() -> str:
    """The rows of `STUDIES`."""
    rows = [(f"`mlflow-soup study {name}`", words) for name, words in STUDIES.items()]
    return table(("command", "question"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "exit-codes": exit_codes,
    "knobs": knob_sections,
    "methods": methods,
    "names": name_tables,
    "studies": studies,
}
