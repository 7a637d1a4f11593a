"""May this soup be promoted? Paired, one-sided, with every number written down.

Non-inferiority: on each OOD task the soup must not be worse than the reference by more than the
margin, at the chosen confidence. The items are the same for both, so they are compared pair by
pair; that is three times sharper than comparing the two standard errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_soup.decision.pairing import ROUNDING, better, lower_bound, paired
from mlflow_soup.errors import ObjectiveError
from mlflow_soup.records import Check, Evidence, Verdict


@dataclass(frozen=True)
class Rules:
    """What the gate demands.

    Attributes:
        margin: allowed loss on each OOD task, in the metric's units (0.01 = one accuracy point).
        confidence: of the one-sided bounds, in (0.5, 1).
    """

    margin: float
    confidence: float


def judge(
    soup: Evidence, parents: Sequence[Evidence], champions: Sequence[Evidence], rules: Rules
) -> Verdict:
    """Decide from scores alone whether the soup may be promoted.

    Against the better parent (by held-out score: what would be shipped without a soup) and each
    current champion: held-out score better or equal, and on each OOD task

        Δ − t·se ≥ −margin

    A reference with the soup's own weights (λ = 1) is equal, whatever the number of items.

    Args:
        soup: its evidence.
        parents: theirs, at least one.
        champions: that of the versions that stand where the soup would stand; may be empty.
        rules: margin and confidence.
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
                where="their evidence",
                fix="evaluate both again with the same tasks",
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
