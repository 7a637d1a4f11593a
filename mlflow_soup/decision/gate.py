"""The gate: it decides from scores whether a soup may be promoted, and records every number.

The rule is non-inferiority: on each OOD task the soup must not be worse than the reference by more
than the margin, at the chosen confidence. Both models answer the same items, so the gate compares
them item by item (see `pairing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow_soup.decision.pairing import ROUNDING, better, lower_bound, paired
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Check, Evidence, Examination, Rules, Score, Verdict
from mlflow_soup.request.margins import parse_margins


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
    soup: Evidence, parents: Sequence[Evidence], champions: Sequence[Evidence], rules: Rules
) -> Verdict:
    """Decide from scores alone whether the soup may be promoted.

    The soup is compared with the parent of the best held-out score, which would be used without a
    soup, and with each current champion. Its held-out score must be at least as good, and on each
    OOD task

        Δ − t·se ≥ −margin

    A reference with the same bytes as the soup (λ = 1) counts as equal, for any number of items.

    Args:
        soup: the soup's evidence.
        parents: the parents' evidence, at least one.
        champions: the evidence of the versions that the soup would replace; may be empty.
        rules: margins, confidence, and the OOD tasks to judge on.

    Raises:
        ObjectiveError: two models were not scored on the same tasks and items.
    """
    soup, *others = [_on(evidence, rules) for evidence in (soup, *parents, *champions)]
    parents, champions = others[: len(parents)], others[len(parents) :]
    references = [parents[better([parent.held_out for parent in parents])]]
    for champion in champions:
        if champion.digest not in {soup.digest, *(r.digest for r in references)}:
            references.append(champion)
    margins = parse_margins(rules.margin)
    checks = []
    for reference in references:
        difference = paired(soup.held_out, reference.held_out)
        checks.append(
            Check(
                "held-out",
                reference.version,
                difference,
                bound=difference.value,
                required=0.0,
                passed=difference.value >= -ROUNDING,
            )
        )
        if [name for name, _ in soup.ood] != [name for name, _ in reference.ood]:
            raise ObjectiveError(
                f"{soup.version} and {reference.version} were not scored on the same OOD tasks",
                where="the OOD scores of both versions",
                fix="evaluate both versions again with the same OOD tasks",
            )
        for (task, ours), (_, theirs) in zip(soup.ood, reference.ood, strict=True):
            difference = paired(ours, theirs)
            same = soup.digest == reference.digest
            bound = 0.0 if same else lower_bound(difference, rules.confidence)
            margin = margins.at(task)
            required = -margin.of(theirs.value)
            checks.append(
                Check(
                    task,
                    reference.version,
                    difference,
                    bound=bound,
                    required=required,
                    passed=bound >= required,
                    margin=str(margin),
                )
            )
    return Verdict(tuple(checks), rules)


def _on(evidence: Evidence, rules: Rules) -> Evidence:
    """The evidence on the OOD tasks of the rules."""
    if not rules.tasks:
        return evidence
    return replace(evidence, ood=tuple(own for own in evidence.ood if own[0] in rules.tasks))
