"""The margins of the gate: how much a soup may lose on a task, by metric or by task."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product

DEFAULT = "0.01"
# of metrics without a scale of their own, unless a margin names them
WITHOUT_SCALE = "2%"
PERPLEXITIES = frozenset({"perplexity", "word_perplexity", "byte_perplexity"})
_ALONE = "alone"
_ENTRY = re.compile(
    r"(?P<alone>[^\s=,%]+)=alone|"
    r"(?:(?P<name>[^\s=,%]+)=)?(?P<value>[0-9.]+(?:e[+-]?[0-9]+)?)(?P<percent>\s*%)?",
    re.I,
)


def has_scale(metric: str) -> bool:
    """Whether a difference of a metric means the same at every level; a perplexity has no scale."""
    return not metric.partition(",")[0].endswith("perplexity")


@dataclass(frozen=True)
class Margin:
    """An allowed loss: an amount in the units of the metric, or a share of the rival's score."""

    value: float
    relative: bool

    def of(self, score: float) -> float:
        """The allowed loss against a rival with this score, in the units of the metric."""
        return self.value * abs(score) if self.relative else self.value

    def __str__(self) -> str:
        value, sign = (100.0 * self.value, "%") if self.relative else (self.value, "")
        short = f"{value:g}"
        return (short if self.relative or float(short) == value else repr(value)) + sign

    def is_at_most(self, other: "Margin") -> bool:
        """Whether it never allows more than another, for means over several tasks, too.

        Shares of scores and amounts weigh the tasks otherwise, so that a margin of 0 % may pass
        what one of 0.01 refuses.
        """
        return self.relative == other.relative and self.value <= other.value


@dataclass(frozen=True)
class Margins:
    """All margins of a request.

    Attributes:
        named: name of a task, of a metric, or `task:metric` → its margin; None for `alone`: the
            margin is as without the name, but the gate judges it apart from the rest.
        rest: the margin of everything else; None if nobody stated it.
    """

    named: Mapping[str, Margin | None]
    rest: Margin | None

    def at(self, term: str) -> Margin:
        """The margin of a term, `task:metric`, which may end with a filter.

        A name of both counts before the task's, and the task's before the metric's.
        """
        found = [self.named[name] for name in self._names(term)]
        rest = self.rest or _read(DEFAULT)
        if not has_scale(_split(term)[1]) and not rest.relative:
            rest = _read(WITHOUT_SCALE)
        return next((margin for margin in found if margin is not None), rest)

    def group(self, term: str) -> str:
        """The name of the group of terms that a term is judged with; equal names, one group.

        Terms without a name in the margins are one group for each unit: shares of the items, bits
        per byte, and perplexities. Those of a named metric are one group. A task that is named is
        judged alone.
        """
        metric = _split(term)[1]
        if names := self._names(term):
            return metric if names == [metric] else term
        if not has_scale(metric):
            return WITHOUT_SCALE
        return metric if metric == "bits_per_byte" else ""

    def _names(self, term: str) -> list[str]:
        """The names that hold for a term, the one that counts first."""
        task, metric = _split(term)
        return [name for name in (f"{task}:{metric}", task, metric) if name in self.named]

    def alone(self, names: Iterable[str]) -> "Margins":
        """The same margins; these tasks are judged alone."""
        return replace(self, named={**dict.fromkeys(names), **self.named})

    def __str__(self) -> str:
        rest = [str(self.rest or DEFAULT)]
        named = [f"{name}={m if m is not None else _ALONE}" for name, m in self.named.items()]
        return ",".join(rest + named)

    def are_at_most(self, others: "Margins") -> bool:
        """Whether no term, and no group of terms, may lose more by these margins than by others.

        What others name must be named here, too. So every group here is part of one group there: a
        mean cannot fall by more than a margin if none of its parts does.
        """
        if not others.named.keys() <= self.named.keys():
            return False
        names = {*self.named, *others.named}
        # a name alone may be that of a task or of a metric; these are metrics of lm-eval
        tasks = {"", *(_split(name)[0] for name in names - PERPLEXITIES)}
        metrics = {"", "perplexity", *(name.partition(":")[2] or name for name in names)}
        terms = (f"{task}:{metric}" for task, metric in product(tasks, metrics))
        return all(self.at(term).is_at_most(others.at(term)) for term in terms)


def _split(term: str) -> tuple[str, str]:
    """The task and the metric of a term, without the filter."""
    task, _, metric = term.partition(",")[0].partition(":")
    return task, metric


def _read(text: str) -> Margin:
    percent = text.endswith("%")
    value = float(text.rstrip("%"))
    if not value < float("inf"):
        raise ValueError(f"{text} is not finite")
    return Margin(value / 100.0 if percent else value, percent)


def parse_margins(text: str) -> Margins:
    """Read `0.01,acc=0.005,perplexity=2%,piqa:acc=0,boolq=alone`.

    Raises:
        ValueError: an entry cannot be read, or a name has two margins.
    """
    named: dict[str, Margin | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a margin")
        name = match["alone"] or match["name"] or ""
        if name in named:
            raise ValueError(f"{name or 'everything else'} has two margins")
        value = match["value"] and match["value"] + (match["percent"] or "").strip()
        named[name] = _read(value) if value else None
    rest = named.pop("", None)
    return Margins(named, rest)
