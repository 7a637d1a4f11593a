"""The power of the gate: how likely it passes a soup that is exactly as good as its rivals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import bisect

from mlflow_soup.decision.gate import questions
from mlflow_soup.decision.pairing import quantile
from mlflow_soup.records import Power, Verdict
from mlflow_soup.request.margins import Margins, parse_margins

ENOUGH = 0.8  # the usual goal for the power of a test
MOST = 1000.0


@dataclass(frozen=True)
class Measure:
    """What is known about a comparison of two models on some items.

    Attributes:
        freedom: the degrees of freedom of the error; the number of items, less one.
        stderr: the paired standard error of the difference.
        level: the score of a rival; it matters for a margin that is a share of it.
    """

    freedom: float
    stderr: float
    level: float = 1.0

    @classmethod
    def of_answers(cls, count: int, discordance: float) -> "Measure":
        """A comparison on items that are right or wrong.

        Args:
            count: the number of items.
            discordance: the share of items that only one of the two models answers right.
        """
        return cls(max(count - 1, 1), math.sqrt(count * discordance + 2.0) / (count + 2.0))


@dataclass(frozen=True)
class Design:
    """What the gate will judge on.

    Attributes:
        held_out: the held-out items.
        ood: OOD task → its items.
        margins: the margins.
        confidence: the confidence of the rules.
        replaced: the number of versions that the soup would replace, besides its parents.
    """

    held_out: Measure
    ood: Mapping[str, Measure]
    margins: Margins
    confidence: float
    replaced: int = 0

    @classmethod
    def of(cls, verdict: Verdict) -> "Design | None":
        """The design of a verdict, with the errors that were measured; None without OOD tasks."""
        margins = parse_margins(verdict.rules.margin)
        shown = [check for check in verdict.checks if check.side == "lower"]
        if not shown:
            return None
        rival = shown[0].against
        others = {check.against for check in verdict.checks} > {check.against for check in shown}
        own = [check for check in verdict.checks if check.against == rival]
        held_out = next(check.difference for check in own if not check.tasks)
        ood = {}
        for check in own:
            if len(check.tasks) == 1:
                margin = margins.at(check.name)
                level = check.allowed / margin.value if margin.relative and margin.value else 1.0
                d = check.difference
                ood[check.name] = Measure(d.freedom, d.stderr, level)
        replaced = len({check.against for check in shown}) if others else 0
        measured = Measure(held_out.freedom, held_out.stderr)
        return cls(measured, ood, margins, verdict.rules.confidence, replaced)

    def with_items(self, factor: float) -> "Design":
        """The design with so many times the items of each OOD task."""
        return self._scaled(factor, math.sqrt(factor))

    def with_margins(self, factor: float) -> "Design":
        """A design with the same power as this one has with so many times the margins."""
        return self._scaled(1.0, factor)

    def _scaled(self, items: float, precision: float) -> "Design":
        ood = {
            task: replace(m, freedom=items * m.freedom, stderr=m.stderr / precision)
            for task, m in self.ood.items()
        }
        return replace(self, ood=ood)


def chance(design: Design, *, draws: int = 20_000, seed: int = 0) -> float:
    """How likely a soup passes that is exactly as good as its rivals, from 0 to 1.

    A simulation: all models are equally good, the errors of two models on the same items are
    independent and normal, and a rival's error counts in every comparison with it. The held-out
    scores of soup and rivals differ by chance alone; a search that chose the soup by its held-out
    score makes it more likely to pass.
    """
    rng = np.random.default_rng(seed)
    rivals = [True] * design.replaced + [not design.replaced]
    measures = {"": design.held_out, **design.ood}
    errors = {
        name: m.stderr / math.sqrt(2.0) * rng.standard_normal((1 + len(rivals), draws))
        for name, m in measures.items()
    }
    levels = {name: m.level for name, m in design.ood.items()}
    passed = np.ones(draws, bool)
    for number, shown in enumerate(rivals, 1):
        asked = questions(design.margins, design.confidence, levels, shown=shown)
        for question in asked:
            names = question.tasks or ("",)
            scales = [measures[name].level if question.margin.relative else 1.0 for name in names]
            differences = [
                (errors[name][0] - errors[name][number]) / scale
                for name, scale in zip(names, scales, strict=True)
            ]
            mean = np.mean(differences, axis=0)
            stderrs = [measures[name].stderr / s for name, s in zip(names, scales, strict=True)]
            stderr = math.hypot(*stderrs) / len(names)
            freedom = sum(measures[name].freedom for name in names)
            width = quantile(question.confidence, freedom) * stderr
            margin = question.margin.value
            if question.shown:
                passed &= mean - width >= -margin
            else:
                passed &= (mean >= -margin) | (mean + width >= 0.0)
    return float(passed.mean())


def told(designs: Mapping[float, Design], unknown: Sequence[str]) -> Power:
    """The chances of some designs, for a document.

    Args:
        designs: share of the answers that differ between two models → what the gate judges on.
        unknown: the tasks whose errors nobody knows yet; they count as passed.
    """
    design = next(iter(designs.values()))
    return Power(
        str(design.margins),
        design.confidence,
        {task: round(measure.freedom) + 1 for task, measure in design.ood.items()},
        tuple(unknown),
        {share: chance(its) for share, its in designs.items()},
    )


def times_items(design: Design) -> float:
    """How many times the items of the OOD tasks it takes for `ENOUGH`, at most `MOST` times."""
    return _times(design.with_items)


def times_margins(design: Design) -> float:
    """How many times the margins it takes for `ENOUGH`, at most `MOST` times."""
    return _times(design.with_margins)


def _times(scaled: Callable[[float], Design]) -> float:
    def lack(exponent: float) -> float:
        return chance(scaled(math.exp(exponent))) - ENOUGH

    ends = math.log(1.0 / MOST), math.log(MOST)
    if lack(ends[1]) < 0.0:
        return MOST
    return math.exp(bisect(lack, *ends, xtol=0.01)) if lack(ends[0]) < 0.0 else 1.0 / MOST
