"""A knob: one option of the command line, with its default, help, choices and range.

The fields of `spec.Spec` are made with `knob`; everything here works on any such field.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from mlflow_soup.errors import SpecError
from mlflow_soup.request.margins import parse_margins

T = TypeVar("T")
if TYPE_CHECKING:

    class Written(Generic[T]):
        """A text that may also be given as a T: `as_written` makes a text of it."""

        def __get__(self, of: object, owner: object = None) -> str: ...
        def __set__(self, of: object, value: str | T) -> None: ...

else:

    class Written:
        """The text of the command line; its other types are for type checkers only."""

        def __class_getitem__(cls, _):
            return str


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        holds: whether a value is one of them; false for nan.
        words: the fix for one that is not.
    """

    holds: Callable[[Any], bool]
    words: str


@dataclass(frozen=True)
class Rule:
    """A rule of the gate: a command line may be stricter than the policy, never looser.

    Attributes:
        holds: whether a value of the command line, given first, is as strict as the policy's.
        words: what the command line must give, in front of the policy's value.
    """

    holds: Callable[[Any, Any], bool]
    words: str


NO_LOOSER = Rule(
    lambda ours, policy: parse_margins(ours).are_at_most(parse_margins(policy)),
    "at most these margins, with all their names:",
)
AT_LEAST = Rule(lambda ours, policy: ours >= policy, "at least")
SAME = Rule(lambda ours, policy: ours == policy, "the same,")
# whether a name after `task:metric` is a task or a filter, only lm-eval tells: `settle_rules` asks
ALL_OF = Rule(lambda ours, policy: {*_pieces(policy)} <= {*_pieces(ours)}, "all of")


def _pieces(text: str) -> list[str]:
    return text.replace(",", " ").split()


# the words for a knob that is on or off; `click.BOOL` reads these, and some more
SWITCH = {"yes": True, "no": False, "true": True, "false": False}


def whole(least: int, most: int | None = None) -> Range:
    """Whole numbers from `least`, up to `most` if there is one."""
    if most is None:
        return Range(lambda value: value >= least, f"give a whole number, {least} or more")
    words = f"give a whole number from {least} to {most}"
    return Range(lambda value: least <= value <= most, words)


def finite(unit: str = "") -> Range:
    """Finite numbers from 0, in a unit."""
    words = f"give a finite number{f' of {unit}' if unit else ''}, 0 or more"
    return Range(lambda value: 0.0 <= value < float("inf"), words)


def knob(
    group: str,
    default: Any,
    help: str,
    commands: str,
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    policy: bool = False,
    choices: tuple[str, ...] = (),
    range: Range | None = None,
    rule: Rule | None = None,
    several: str = "",
    parts: tuple[type, ...] = (),
) -> Any:
    """A field of a spec that is an option of some commands.

    Args:
        group: the group of options in `--help`.
        default: its value when nobody names it.
        help: one sentence for `--help`.
        commands: the commands that have the option, separated by spaces.
        defaults: other defaults of some of these commands.
        policy: whether a tag of the registered model may set it.
        choices: the texts that it may be; empty for any.
        range: the numbers that it may be; None for any.
        rule: for a rule of the gate, how the command line may differ from the policy; else None.
        several: what separates several parts in a text, and then the parts of a part; Python and
            YAML may give lists instead. Empty for one part only.
        parts: the types that a part may have besides a text.
    """
    metadata = {
        "group": group,
        "help": help,
        "commands": frozenset(commands.split()),
        "defaults": defaults,
        "policy": policy,
        "choices": choices,
        "range": range,
        "rule": rule,
        "several": several,
        "parts": parts,
    }
    return field(default=default, metadata=metadata)


_WHAT = {str: "a text", bool: "True or False", int: "a whole number", float: "a number"}


def kind(knob_: Field[Any]) -> type:
    """The type of a knob: str, bool, int or float."""
    named = get_args(knob_.type) or (knob_.type,)  # `int | None` is read as an int
    assert isinstance(named[0], type)
    return named[0]


def option(knob_: Field[Any]) -> str:
    """The option of the command line, `--batch-size`."""
    return "--" + knob_.name.replace("_", "-")


def place(knob_: Field[Any]) -> str:
    """Where a user sets the knob, for errors."""
    tag = f", or tag soup.{knob_.name} of the model" if knob_.metadata["policy"] else ""
    return option(knob_) + tag


def out_of_range(knob_: Field[Any], value: object, fix: str) -> SpecError:
    """The error for a value that a knob may not have."""
    return SpecError(f"{option(knob_)} {value} is out of range", where=place(knob_), fix=fix)


def as_written(knob_: Field[Any], value: Any) -> Any:
    """The text of a command line for a list, a path or a number; other values are unchanged.

    Raises:
        SpecError: a path holds the mark that separates several.
    """
    if kind(knob_) is not str or isinstance(value, str):
        return value
    try:
        return _written(knob_, value, knob_.metadata["several"])
    except TypeError:
        return value


def _written(knob_: Field[Any], value: object, several: str) -> str:
    if several and isinstance(value, list | tuple):
        return several[0].join(_written(knob_, part, several[1:]) for part in value)
    if isinstance(value, bool) or not isinstance(value, (str, *knob_.metadata["parts"])):
        raise TypeError
    text = os.fsdecode(value) if isinstance(value, os.PathLike) else str(value)
    mark = knob_.metadata["several"]
    if mark and mark in text and os.PathLike in knob_.metadata["parts"]:
        raise SpecError(
            f"the path {text} holds {mark!r}, which separates several paths",
            where=f"Spec({knob_.name}=…), {option(knob_)}",
            fix=f"rename it, or name it by a link whose path has no {mark!r}",
        )
    return text


def check(knob_: Field[Any], value: object) -> None:
    """Refuse a value of another type, of another choice or out of range.

    Raises:
        SpecError: it is.
    """
    types = get_args(knob_.type) or (knob_.type,)
    accepted = (*types, int) if float in types else types  # 0 is as good as 0.0
    # True is an int to Python, and no number to a user
    if (isinstance(value, bool) and bool not in types) or not isinstance(value, accepted):
        what = _WHAT[kind(knob_)] + (" or a list of texts" if knob_.metadata["several"] else "")
        example = f", for example {knob_.default!r}" if knob_.default else ""
        raise SpecError(
            f"{knob_.name} is {value!r}, which is not {what}",
            where=f"Spec({knob_.name}=…), {option(knob_)}",
            fix=f"give {what}{example}; {knob_.metadata['help']}",
        )
    if isinstance(value, int) and value.bit_length() > 63:  # Python refuses to print 5000 digits
        raise out_of_range(knob_, f"of {value.bit_length()} bits", "give a smaller number")
    if (choices := knob_.metadata["choices"]) and value not in choices:
        raise out_of_range(knob_, value, f"give one of {', '.join(choices)}")
    allowed: Range | None = knob_.metadata["range"]
    if value is not None and allowed is not None and not allowed.holds(value):
        raise out_of_range(knob_, value, allowed.words)


def read(knob_: Field[Any], text: str) -> Any:
    """The value of a knob that a policy tag sets.

    Raises:
        SpecError: the text is not of the knob's type.
    """
    try:
        if kind(knob_) is bool:
            return SWITCH[text.strip().lower()]
        return kind(knob_)(text.strip())
    except (ValueError, KeyError) as error:
        what = "yes or no" if kind(knob_) is bool else _WHAT[kind(knob_)]
        raise SpecError(
            f"policy tag soup.{knob_.name} is {text!r}, which is not {what}",
            where="tags of the registered model",
            fix=f"set the tag to {what}, or pass {option(knob_)}",
        ) from error


def check_rule(knob_: Field[Any], ours: Any, policy: Any, owner: str) -> None:
    """Refuse a rule of the command line that is looser than that of the policy.

    Raises:
        SpecError: it is.
    """
    if not knob_.metadata["rule"].holds(ours, policy):
        raise looser(knob_, ours, policy, owner)


def looser(knob_: Field[Any], ours: Any, policy: Any, owner: str) -> SpecError:
    """The error for a rule of the command line that is looser than that of the policy."""
    rule: Rule = knob_.metadata["rule"]
    return SpecError(
        f"{option(knob_)} {ours} is looser than the policy of {owner}, which says {policy}",
        where=f"{option(knob_)}, and tag soup.{knob_.name} of {owner}",
        fix=f"leave {option(knob_)} out, or give {rule.words} {policy}; whoever owns {owner} "
        "may change the tag",
    )


def numbers(knob_: Field[Any], text: str, least: float, most: float) -> tuple[float, ...]:
    """The different numbers in `1/4,0.5,1`, ascending; fractions are read too.

    Raises:
        SpecError: one is not a number from `least` to `most`.
    """
    fix = f"give numbers from {least:g} to {most:g}, separated by commas: 1/2,0.9"
    try:
        found = sorted({float(Fraction(part.strip())) for part in text.split(",")})
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise out_of_range(knob_, repr(text), fix) from error
    if not all(least <= number <= most for number in found):
        raise out_of_range(knob_, text, fix)
    return tuple(found)
