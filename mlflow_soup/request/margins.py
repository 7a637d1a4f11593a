"""The margins of the gate: how much a soup may lose on a task, by metric or by task."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

DEFAULT = "0.01"
# of metrics without a scale of their own, unless a margin names them
WITHOUT_SCALE = "2%"
_ENTRY = re.compile(
    r"(?:(?P<name>[^\s=,%]+)=)?(?P<value>[0-9.]+(?:e[+-]?[0-9]+)?)(?P<percent>\s*%)?", re.I
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
        """Whether it never allows more than another."""
        return self.value == 0.0 or (self.relative == other.relative and self.value <= other.value)


@dataclass(frozen=True)
class Margins:
    """All margins of a request.

    Attributes:
        named: name of a task, of a metric, or `task:metric` → its margin.
        rest: the margin of everything else; None if nobody stated it.
    """

    named: Mapping[str, Margin]
    rest: Margin | None

    def at(self, term: str) -> Margin:
        """The margin of a term, `task:metric`, which may end with a filter.

        A name of both counts before the task's, and the task's before the metric's.
        """
        task, _, metric = term.partition(",")[0].partition(":")
        for name in (f"{task}:{metric}", task, metric):
            if name in self.named:
                return self.named[name]
        if not has_scale(metric) and not (self.rest and self.rest.relative):
            return _read(WITHOUT_SCALE)
        return self.rest or _read(DEFAULT)

    def __str__(self) -> str:
        rest = [str(self.rest or DEFAULT)]
        return ",".join(rest + [f"{name}={margin}" for name, margin in self.named.items()])

    def are_at_most(self, others: "Margins") -> bool:
        """Whether no term may lose more by these margins than by others."""
        names = [name.split(":") for name in (*self.named, *others.named)]
        # a name alone may be that of a task or of a metric
        tasks = {"", *(parts[0] for parts in names if has_scale(parts[0]))}
        metrics = {"", "perplexity", *(parts[-1] for parts in names)}
        terms = (f"{task}:{metric}" for task, metric in product(tasks, metrics))
        return all(self.at(term).is_at_most(others.at(term)) for term in terms)


def _read(text: str) -> Margin:
    percent = text.endswith("%")
    value = float(text.rstrip("%"))
    if not value < float("inf"):
        raise ValueError(f"{text} is not finite")
    return Margin(value / 100.0 if percent else value, percent)


def parse_margins(text: str) -> Margins:
    """Read `0.01,acc=0.005,perplexity=2%,piqa:acc=0`.

    Raises:
        ValueError: an entry cannot be read, or a name has two margins.
    """
    named: dict[str, Margin] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _ENTRY.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a margin")
        name = match["name"] or ""
        if name in named:
            raise ValueError(f"{name or 'everything else'} has two margins")
        named[name] = _read(match["value"] + (match["percent"] or "").strip())
    rest = named.pop("", None)
    return Margins(named, rest)
