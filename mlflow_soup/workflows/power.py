"""Say how likely the gate passes a soup that is as good as its rivals, before it is scored."""

import math
from collections.abc import Mapping, Sequence

from mlflow_soup.decision.power import Design, Measure
from mlflow_soup.evaluation.suite import Suite
from mlflow_soup.registry.alone import alone
from mlflow_soup.registry.outages import asking
from mlflow_soup.registry.store import connect
from mlflow_soup.registry.versions import find_model
from mlflow_soup.request.margins import parse_margins
from mlflow_soup.request.names import parse_version
from mlflow_soup.request.spec import Spec
from mlflow_soup.workflows.bench import Suites, load_suites, no_ood_tasks, rivals
from mlflow_soup.workflows.proof import settle_rules, would_replace

# shares of the answers that differ between two neighbouring checkpoints
DISCORDANCES = (0.02, 0.05, 0.10)


@asking("judge the power of the gate")
@alone()
def power(spec: Spec) -> tuple[Mapping[float, Design], Sequence[str]]:
    """What the gate will judge on, for several shares of the answers that differ; see `designs_of`.

    Nothing is evaluated, and nothing is written.

    Args:
        spec: `model` or `version` names the model; its policy and the spec state tasks and rules.

    Raises:
        SpecError: no tasks are stated, or the command line is looser than the policy.
    """
    client = connect(60.0 * spec.store_patience)
    name = find_model(client, spec.model, [parse_version(spec.version)] if spec.version else [])
    spec = settle_rules(client, spec, name)
    if not spec.ood_tasks:
        raise no_ood_tasks()
    replaced = sum(would_replace(spec, name, rival) for rival in rivals(client, name, spec))
    return designs_of(spec, load_suites(spec), replaced=replaced)


def designs_of(
    spec: Spec, suites: Suites, *, replaced: int
) -> tuple[Mapping[float, Design], Sequence[str]]:
    """What the gate will judge on, by how much a soup's answers differ from those of its rivals.

    Args:
        spec: a settled spec.
        suites: the held-out and the OOD tasks, the latter not None.
        replaced: the number of versions that the soup would replace.

    Returns:
        Share of the answers that differ → design; and the tasks whose errors nobody knows yet,
        which count as passed.
    """
    ood = suites.ood
    assert ood is not None
    counts = _counts(ood, spec.limit)
    unknown = [str(term) for term in ood.terms if not ood.averages(term)]

    def design(discordance: float) -> Design:
        measures = {
            name: Measure(max(count - 1, 1), 0.0)
            if name in unknown
            else Measure.of_answers(count, discordance)
            for name, count in counts.items()
        }
        known = sum(_counts(suites.held_out, spec.limit).values())
        return Design(
            Measure.of_answers(known, discordance),
            *(measures, parse_margins(spec.margin), spec.confidence, replaced),
        )

    return {share: design(share) for share in DISCORDANCES}, unknown


def _counts(suite: Suite, limit: int | None) -> dict[str, int]:
    most = math.inf if limit is None else limit
    return {
        str(term): int(sum(min(len(list(t.eval_docs)), most) for t in suite.leaves(term)))
        for term in suite.terms
    }
