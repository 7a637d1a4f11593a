"""The gate: it decides from scores whether a soup may be promoted, and records every number.

The rule is non-inferiority: on the OOD tasks together the soup must not be worse than a rival by
more than the margin, at the chosen confidence. Both models answer the same items, so the gate
compares them item by item (see `pairing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow_soup.decision.pairing import ROUNDING, better, lower_bound, paired, pool, upper_bound
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Check, Difference, Evidence, Examination, Rules, Score, Verdict
from mlflow_soup.request.margins import Margin, Margins, parse_margins


def inconsistent(examination: Examination) -> str:
    """Why the scores of an examination cannot be compared, in words; empty if they can.

    All models must have been scored on the same items of the same tasks, at least one item each,
    and each score must be the sum of its items.
    """
    soup = examination.roles["soup"]
    meant = [_parts(score) for _, score in (("held-out", soup.held_out), *soup.ood)]
    if not soup.ood or not all(meant) or not all(ids for parts in meant for _, _, _, ids in parts):
        return "it was scored on no items"
    for role, evidence in examination.roles.items():
        own = [score for _, score in (("held-out", evidence.held_out), *evidence.ood)]
        if [task for task, _ in evidence.ood] != [task for task, _ in soup.ood]:
            return f"{role} was scored on other tasks"
        if [_parts(score) for score in own] != meant:
            return f"{role} was scored on other items"
        for score in own:
            if score.flaw:
                return f"a score of {role} is damaged: {score.flaw}"
    return ""


def _parts(score: Score) -> list[tuple[str, str, float, tuple[str, ...]]]:
    return [(i.task, i.metric, i.weight, i.ids) for i in score.items]


def missing(
    examination: Examination,
    rules: Rules,
    items: Mapping[str, Sequence[Any]] | None,
    *,
    limited: bool = False,
) -> str:
    """What an examination lacks for a verdict under some rules, in words; empty if nothing.

    Args:
        examination: the evidence of all models.
        rules: the rules.
        items: for each OOD task of the rules, its items as (leaf task, metric, names); None if the
            rules name no tasks.
        limited: whether scores on the first items of each task suffice.
    """
    if not limited and examination.settings.get("limit") is not None:
        return f"only the first {examination.settings['limit']} items of each task were scored"
    for role, evidence in examination.roles.items():
        of = dict(evidence.ood)
        for task in rules.tasks:
            if task not in of:
                return f"{role} ({evidence.version}) was not scored on {task}"
            scored = [(i.task, i.metric, i.ids) for i in of[task].items]
            if items is not None and scored != list(items[task]):
                return f"{role} ({evidence.version}) was scored on other items of {task}"
        for task, score in of.items():
            if rules.tasks and task not in rules.tasks:
                continue
            if (count := sum(len(i.ids) for i in score.items)) < rules.min_items:
                return f"{task} has {count} items, and the rules ask for {rules.min_items}"
    return ""


def judge(
    soup: Evidence,
    parents: Sequence[Evidence],
    champions: Sequence[Evidence],
    rules: Rules,
    others: Sequence[Evidence] = (),
) -> Verdict:
    """Decide from scores alone whether the soup may be promoted.

    With Δ = soup − rival there are two rules:

        shown:        Δ − t·se ≥ −margin
        not refuted:  Δ ≥ −margin,  or  Δ + t·se ≥ 0

    `questions` says which rule holds for what. The soup must be shown to hold against each version
    that it would replace; without such a version, against the parent of the best held-out score.
    That parent is a rival in any case. A rival with the same bytes as the soup (λ = 1) counts as
    equal, for any number of items.

    Args:
        soup: the soup's evidence.
        parents: the parents' evidence, at least one.
        champions: the evidence of the versions that the soup would replace; may be empty.
        rules: margins, confidence, and the OOD tasks to judge on.
        others: the evidence of more rivals, which it would not replace.

    Raises:
        ObjectiveError: two models were not scored on the same tasks and items.
    """
    parent = parents[better([parent.held_out for parent in parents])]
    soup, parent = _on(soup, rules), _on(parent, rules)
    replaced, more = (
        {e.digest: _on(e, rules) for e in reversed(some) if e.digest != soup.digest}
        for some in (champions, others)
    )
    rivals = {parent.digest: parent, **more, **replaced}
    checks: list[Check] = []
    for digest, rival in rivals.items():
        checks += _compare(soup, rival, rules, shown=digest in (replaced or {parent.digest}))
    return Verdict(tuple(checks), rules)


# how likely a soup that is as good as a rival is refuted, by its held-out score or under one margin
LUCK = 0.025


@dataclass(frozen=True)
class Question:
    """Something that the gate asks of the soup against one rival.

    Attributes:
        tasks: the OOD tasks, whose mean counts; empty for the held-out score.
        margin: the allowed loss.
        shown: whether it must be shown to hold; else it must not be refuted.
        confidence: the confidence of the one-sided bound.
    """

    tasks: tuple[str, ...]
    margin: Margin
    shown: bool
    confidence: float


def questions(
    margins: Margins, confidence: float, levels: Mapping[str, float], *, shown: bool
) -> list[Question]:
    """All that the gate asks of the soup against one rival.

    Tasks under one margin must hold together. To demand more would refuse more soups that are as
    good as their rivals, by luck. So one task of several must only not be refuted, and the same is
    asked against a rival that the soup would not replace. Neither must the held-out score be
    refuted: the search chose the soup by it, so it can speak against the soup, and not for it.

    A soup that is as good as a rival is refuted by luck in 5 % or less: half of this is for the
    held-out score, half for the tasks of each margin. It does not depend on the confidence, which
    would make the gate looser the higher it is, nor on the number of rivals.

    Args:
        margins: the margins of the rules.
        confidence: the confidence of the rules.
        levels: OOD task → the score of the rival. A share of the score 0 is no scale: a task with a
            relative margin and this score is judged alone.
        shown: whether the soup must be shown to hold against the rival.
    """
    groups: dict[str, list[str]] = {}
    for name, level in levels.items():
        alone = margins.at(name).relative and not level
        groups.setdefault(name if alone else margins.group(name), []).append(name)
    asked = [Question((), Margin(0.0, relative=False), False, 1.0 - LUCK)]
    for names in groups.values():
        margin = margins.at(names[0])
        single = [(name,) for name in names] if len(names) > 1 else []
        sure = 1.0 - LUCK / (len(single) + (not shown) or 1)
        asked += [Question(one, margin, False, sure) for one in single]
        asked.append(Question(tuple(names), margin, shown, confidence if shown else sure))
    return asked


def _compare(soup: Evidence, rival: Evidence, rules: Rules, *, shown: bool) -> list[Check]:
    """All checks against one rival."""
    if [name for name, _ in soup.ood] != [name for name, _ in rival.ood]:
        raise ObjectiveError(
            f"{soup.version} and {rival.version} were not scored on the same OOD tasks",
            where="the OOD scores of both versions",
            fix="evaluate both versions again with the same OOD tasks",
        )
    ours, theirs = dict(soup.ood), dict(rival.ood)
    levels = {name: score.value for name, score in theirs.items()}
    margins = parse_margins(rules.margin)
    checks = []
    for question in questions(margins, rules.confidence, levels, shown=shown):
        tasks, margin = question.tasks, question.margin
        if not tasks:
            difference, allowed = paired(soup.held_out, rival.held_out), 0.0
        else:
            # several tasks with a relative margin: each difference is a share of the rival's score
            shares = margin.relative and len(tasks) > 1
            weights = [1.0 / len(tasks) / (abs(levels[t]) if shares else 1.0) for t in tasks]
            losses = [margin.of(levels[t]) for t in tasks for _ in ours[t].items]
            both = [pool([side[t] for t in tasks], weights) for side in (ours, theirs)]
            difference = paired(both[0], both[1], losses)
            allowed = margin.value if shares else margin.of(levels[tasks[0]])
        same = soup.digest == rival.digest
        bound, required, side = _bound(difference, question, allowed)
        if same:
            bound = 0.0
        checks.append(
            Check(
                *(tasks, rival.version, difference, side, bound, required),
                *(bound >= required - ROUNDING, str(margin), allowed),
            )
        )
    return checks


def _bound(difference: Difference, question: Question, allowed: float) -> tuple[float, float, str]:
    """What counts, what it must not be below, and which bound it is."""
    if question.shown:
        return lower_bound(difference, question.confidence), 0.0 - allowed, "lower"
    if difference.value >= -allowed - ROUNDING:
        return difference.value, 0.0 - allowed, ""
    return upper_bound(difference, question.confidence), 0.0, "upper"


def _on(evidence: Evidence, rules: Rules) -> Evidence:
    """The evidence on the OOD tasks of the rules."""
    if not rules.tasks:
        return evidence
    return replace(evidence, ood=tuple(own for own in evidence.ood if own[0] in rules.tasks))
