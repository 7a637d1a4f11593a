"""The gate: it decides from scores whether a soup may be promoted, and records every number.

The rule is non-inferiority: on each OOD task the soup must not be worse than the reference by more
than the margin, at the chosen confidence. Both models answer the same items, so the gate compares
them item by item (see `pairing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_soup.decision.pairing import ROUNDING, better, lower_bound, paired
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Check, Evidence, Verdict


@dataclass(frozen=True)
class Rules:
    """The rules of the gate.

    Attributes:
        margin: the allowed loss on each OOD task, in the metric's units (0.01 = one accuracy
            point).
        confidence: the confidence of the one-sided bounds, in (0.5, 1).
    """

    margin: float
    confidence: float


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
        rules: margin and confidence.

    Raises:
        ObjectiveError: two models were not scored on the same tasks and items.
    """
    references = [parents[better([parent.held_out for parent in parents])]]
    for champion in champions:
        if champion.digest not in {soup.digest, *(r.digest for r in references)}:
            references.append(champion)
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
            checks.append(
                Check(
                    task,
                    reference.version,
                    difference,
                    bound=bound,
                    required=-rules.margin,
                    passed=bound >= -rules.margin,
                )
            )
    return Verdict(tuple(checks))
