"""Tag `soup.on_version` of a registered model: what is done when a checkpoint arrives.

The tag holds command lines, separated by `;` or by new lines: `run --last 6; run --pair @best,new`.

Whoever writes the tag must not gain more than the policy tags give. So a line may set

- what a policy tag may set, except paths: these are files of the machine that watches;
- which versions are merged, counted from the one that arrived;
- an alias or a stage of the same registered model as the target of a promotion. Whoever may write
  the model's tags may move these anyway, and here the gate comes first.

All other options (code that may run, keys, evidence, experiment, device …) say how far the machine
goes along. They stand on the command line of `watch`.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from mlflow_soup.errors import SpecError
from mlflow_soup.request.names import parse_target
from mlflow_soup.request.spec import NAMINGS, Spec

# the commands that the tag may name, where the command line has them; whether each needs versions
COMMANDS: Mapping[str, bool] = {"run": True, "track": False}
PLACE = "tag soup.on_version of the registered model"
NEW = "new"  # stands for the version that arrived
MOST = 8  # lines
_PIECE = re.compile(r"""(?: "(?:\\.|[^"\\])*" | '[^']*' | \\. | [^;\n] )+""", re.X | re.S)
_TASKS = ("tasks", "ood_tasks", "test_tasks")  # the command line takes files there, too
_ANY = 999_999_999  # stands for the version that arrived when a line is checked before


@dataclass(frozen=True)
class Order:
    """One line of the tag.

    Attributes:
        line: its words, as a shell would take them.
        command: its first word, one of `COMMANDS`.
        named: the knobs that it sets.
    """

    line: str
    command: str
    named: Mapping[str, Any]

    @property
    def last(self) -> int:
        """How many of the newest versions it merges, up to the one that arrived; or 0."""
        return int(self.named.get("last") or 0)

    def spec(self, own: Mapping[str, Any], number: int, versions: Sequence[int] = ()) -> Spec:
        """The request of this line for a version that arrived.

        Args:
            own: the knobs of the command line of `watch`, and the model.
            number: the number of the version that arrived.
            versions: the numbers that `last` stands for, oldest first.

        Raises:
            SpecError: a value cannot be read, or is out of range.
        """
        said = {**own, **self.named}
        for naming in ("pair", "versions"):
            if naming in said:
                said[naming] = ",".join(
                    f"v{number}" if part.strip() == NEW else part.strip()
                    for part in said[naming].split(",")
                )
        if versions:
            del said["last"]
            said["versions"] = ",".join(f"v{version}" for version in versions)
        return Spec(**said)


def split(text: str) -> list[list[str]]:
    """The words of each line.

    Raises:
        SpecError: there is no line, there are too many, or a quote is not closed.
    """
    try:
        found = [words for piece in _PIECE.findall(text) if (words := shlex.split(piece))]
    except ValueError as error:
        raise _wrong(f"a quote is not closed: {error}", f"close it, in {text!r}") from error
    if not 0 < len(found) <= MOST:
        what = f"it holds {len(found)} command lines" if found else "it is missing or empty"
        raise _wrong(what, f"set it to 1 to {MOST} command lines, such as: run --last 2")
    return found


def may_stand(knob_: Field[Any]) -> bool:
    """Whether a line may set a knob."""
    path = os.PathLike in knob_.metadata["parts"]
    return knob_.name in (*NAMINGS, "promote") or (knob_.metadata["policy"] and not path)


def check_command(name: str, known: Sequence[str]) -> None:
    """Refuse a command that the tag may not name.

    Raises:
        SpecError: it may not.
    """
    if name not in known:
        fix = f"begin each command line with one of: {', '.join(known)}"
        raise _wrong(f"{name!r} is not a command that it may name", fix)


def misread(line: str, why: str, name: str = "") -> SpecError:
    """The error for a line that the command does not take.

    Args:
        line: the line.
        why: what click says.
        name: the name of the option that the command does not have here, with underscores; empty
            for another reason.
    """
    knob_ = next((f for f in fields(Spec) if f.name == name), None)
    if not name:
        return _wrong(f"{line!r}: {why}", "correct the tag; it takes the options of the command")
    fix = f"remove --{name.replace('_', '-')} from the tag"
    if knob_ is not None and knob_.metadata["policy"]:
        fix += f"; set tag soup.{name} instead, or give it to mlflow-soup watch"
    elif knob_ is not None and "watch" in knob_.metadata["commands"]:
        fix += "; give it to mlflow-soup watch, if it shall hold"
    elif name == "spec":
        fix += "; name all options in the tag"
    return _wrong(f"{line!r}: no tag can set --{name.replace('_', '-')}", fix)


def check(order: Order, model: str) -> Order:
    """The order, if it can be done for any version that may arrive.

    Args:
        order: a line of the tag.
        model: the registered model.

    Raises:
        SpecError: it names no versions, or always the same ones; it promotes into another model; a
            value cannot be read, or is out of range.
    """
    naming = [name for name in NAMINGS if order.named.get(name)]
    if not naming and COMMANDS[order.command]:
        raise _wrong(f"{order.line!r} names no versions", "add --last 2, or --pair @champion,new")
    for name in naming:
        text = str(order.named[name])
        if name != "last" and NEW not in [part.strip() for part in text.split(",")]:
            fix = f"write {NEW} for the version that arrives: --{name} @champion,{NEW}"
            raise _wrong(f"{order.line!r} does not merge the version that arrives", fix)
    for name in _TASKS:
        text = str(order.named.get(name) or "")
        if "/" in text or os.sep in text or re.search(r"\.ya?ml\b", text):
            what = f"{order.line!r} names a file of tasks: {text}"
            raise _wrong(what, f"name tasks there, and set tag soup.{name} to the file")
    try:
        spec = order.spec({"model": model}, _ANY)
        target = parse_target(spec.promote) if spec.promote else None
    except SpecError as error:
        raise _wrong(f"{order.line!r}: {error.what}", error.fix) from error
    if target is not None and target.kind == "model" and target.model != model:
        fix = f"name an alias of {model}, such as alias:champion; promote to {target.model} by hand"
        raise _wrong(f"{order.line!r} promotes into another registered model", fix)
    return order


def _wrong(what: str, fix: str) -> SpecError:
    return SpecError(f"tag soup.on_version cannot be followed: {what}", where=PLACE, fix=fix)
