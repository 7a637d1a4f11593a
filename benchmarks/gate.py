"""The gate: how often it promotes a soup that is worse by the margin, and one that is as good.

    python benchmarks/gate.py                  # all tables in Markdown; a quarter of an hour
    python benchmarks/gate.py --draws 200      # rougher and faster
    python benchmarks/gate.py --out gate.jsonl # each number as JSON, too

Every number is a share of simulated verdicts: items are drawn, all models answer them, and
`mlflow_soup.decision.gate.judge` decides. Beside it stands the rule of version 0.1 (`each`): every
OOD task must be shown to hold against every rival, and no held-out score may be below a rival's.

Right-or-wrong items: each model differs from a common ancestor in the same share of the items, so
that any two equal models differ in the share `discordance`. Passages: ten such questions each,
which go together. Bits per byte: documents of unequal length, whose differences have heavy tails
(Student's t with 5 degrees of freedom). Perplexity: the same, as a perplexity near 20. Held-out
scores are those of a soup that no search chose.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

sys.path.append(str(Path(__file__).parent.parent))

from mlflow_soup.decision.gate import judge
from mlflow_soup.decision.pairing import better, lower_bound, paired
from mlflow_soup.records import Evidence, Items, Rules, Score, Version
from mlflow_soup.request.margins import parse_margins

Array = np.ndarray[Any, Any]
RULES = Rules("0.01", 0.95)
SOUP, PARENT = Version("toy", 1), Version("toy", 2)
BITS = 1.2  # of a document, on average
PERPLEXITY = 20.0
EACH = 10  # questions on a passage


@dataclass(frozen=True)
class Kind:
    """A kind of items.

    Attributes:
        metric: lm-eval's metric.
        margin: the margin that the gate uses, in the unit of `loss`.
        draw: (random generator, number of items, spread, for each model its loss) → for each model
            the values of the items; and their shares.
        smaller: whether a smaller value is better.
        clusters: whether `EACH` items go together.
    """

    metric: str
    margin: float
    draw: Callable[[np.random.Generator, int, float, Sequence[float]], tuple[list[Array], Array]]
    smaller: bool = False
    clusters: bool = False


def answers(
    rng: np.random.Generator, count: int, discordance: float, losses: Sequence[float]
) -> tuple[list[Array], Array]:
    """Right or wrong answers; two models without a loss differ in a share of the items."""
    ancestor = rng.random(count) < 0.5
    models = [
        (ancestor ^ (rng.random(count) < _flips(ancestor, discordance, loss))).astype(float)
        for loss in losses
    ]
    return models, np.full(count, 1.0 / count)


def _flips(ancestor: Array, discordance: float, loss: float) -> Array:
    """How likely a model answers an item otherwise than the ancestor."""
    flips = (1.0 - math.sqrt(1.0 - 2.0 * discordance)) / 2.0
    wins, falls = (flips - loss, flips + loss) if flips >= loss else (0.0, 2.0 * loss)
    return np.where(ancestor, falls, wins)


def passages(
    rng: np.random.Generator, count: int, correlation: float, losses: Sequence[float]
) -> tuple[list[Array], Array]:
    """Answers to `EACH` questions on every passage, of which 5 % differ between two models.

    A model answers a question otherwise if a normal number is small; those of one passage have the
    correlation that is given.
    """
    ancestor, models = rng.random(count) < 0.5, []
    passage = np.arange(count) // EACH
    for loss in losses:
        shared = rng.standard_normal(passage[-1] + 1)[passage]
        own = rng.standard_normal(count)
        number = math.sqrt(correlation) * shared + math.sqrt(1.0 - correlation) * own
        models.append((ancestor ^ (ndtr(number) < _flips(ancestor, 0.05, loss))).astype(float))
    return models, np.full(count, 1.0 / count)


def documents(
    rng: np.random.Generator, count: int, spread: float, losses: Sequence[float]
) -> tuple[list[Array], Array]:
    """Losses of documents of unequal length; `spread` is the deviation between two models."""
    lengths = rng.lognormal(0.0, 0.5, count)
    base = BITS + 0.3 * rng.standard_normal(count)
    scale = spread / math.sqrt(2.0) / math.sqrt(5.0 / 3.0)
    models = [base + loss + scale * rng.standard_t(5, count) for loss in losses]
    return models, lengths / lengths.sum()


def perplexities(
    rng: np.random.Generator, count: int, spread: float, losses: Sequence[float]
) -> tuple[list[Array], Array]:
    """The same for a perplexity, linearised around its value; a loss is a share of it."""
    inner = [math.log1p(loss) for loss in losses]
    values, shares = documents(rng, count, spread, inner)
    values = [v + math.log(PERPLEXITY) - BITS for v in values]
    means = [float(shares @ v) for v in values]
    return [math.exp(m) * (1.0 + v - m) for v, m in zip(values, means, strict=True)], shares


KINDS = {
    "acc": Kind("acc,none", 0.01, answers),
    "acc, passages": Kind("acc,none", 0.01, passages, clusters=True),
    "bits_per_byte": Kind("bits_per_byte,none", 0.01, documents, smaller=True),
    "perplexity": Kind("perplexity,none", 0.02, perplexities, smaller=True),
}


@dataclass(frozen=True)
class Case:
    """A kind of verdict, to be drawn many times.

    Attributes:
        kind: a name in `KINDS`.
        count: the number of items of each task.
        spread: how much two equal models differ: a share of the answers, or a deviation.
        losses: for each OOD task, the soup's loss against its rivals, in margins.
        champions: the versions that the soup would replace, besides its parent.
        behind: how much worse the champions are than the parent, in margins.
    """

    kind: str
    count: int
    spread: float
    losses: tuple[float, ...]
    champions: int = 0
    behind: float = 0.0


def evidence(case: Case, rng: np.random.Generator) -> list[Evidence]:
    """The evidence of a soup, its better parent and the champions."""
    kind, rivals = KINDS[case.kind], 1 + case.champions
    below = [0.0] + [case.behind * kind.margin] * case.champions

    def scores(name: str, what: Kind, spread: float, loss: float) -> list[Score]:
        worse = [loss * what.margin, *(below if name != "held-out" else [0.0] * rivals)]
        models, shares = what.draw(rng, case.count, spread, worse)
        sign, ids, parts = (
            -1.0 if what.smaller else 1.0,
            _ids(name, case.count, what),
            tuple(shares),
        )
        return [
            Score(
                sign * math.fsum(shares * values),
                0.0,
                (Items(name, what.metric, sign, ids, tuple(values.tolist()), parts),),
            )
            for values in models
        ]

    held_out = scores("held-out", KINDS["acc"], 0.05, 0.0)
    tasks = [scores(f"t{i}", kind, case.spread, loss) for i, loss in enumerate(case.losses)]
    metric = kind.metric.removesuffix(",none")
    return [
        Evidence(
            Version("toy", number),
            str(number),
            held_out[number],
            tuple((f"t{i}:{metric}", task[number]) for i, task in enumerate(tasks)),
        )
        for number in range(1 + rivals)
    ]


@functools.cache
def _ids(name: str, count: int, kind: Kind) -> tuple[str, ...]:
    clusters = [f":{name}{i // EACH}" if kind.clusters else "" for i in range(count)]
    return tuple(f"{name}:{i}{cluster}" for i, cluster in enumerate(clusters))


def each(soup: Evidence, parents: Sequence[Evidence], champions: Sequence[Evidence]) -> bool:
    """The rule of version 0.1, out of domain."""
    margins = parse_margins(RULES.margin)
    rivals = [parents[better([p.held_out for p in parents])], *champions]
    return all(
        lower_bound(paired(ours, theirs), RULES.confidence) >= -margins.at(name).of(theirs.value)
        for rival in rivals
        for (name, ours), (_, theirs) in zip(soup.ood, rival.ood, strict=True)
    )


def passes(case: Case, draws: int) -> dict[str, float]:
    """How often each rule passes the soup: out of domain, and with the held-out rule."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    found = np.zeros(4)
    for _ in range(draws):
        soup, parent, *champions = evidence(case, rng)
        old = each(soup, [parent], champions)
        bare = all(soup.held_out.value >= r.held_out.value for r in (parent, *champions))
        checks = judge(soup, [parent], champions, RULES).checks
        new = all(check.passed for check in checks if check.tasks)
        found += [old, old and bare, new, all(check.passed for check in checks)]
    return dict(zip(("each", "each, all", "now", "now, all"), found / draws, strict=True))


Row = dict[str, str | float]


def power(draws: int) -> Iterator[Row]:
    """A soup that is exactly as good as its rivals."""
    for spread, tasks, champions in itertools.product((0.02, 0.05, 0.1), (1, 2, 4), (0, 1, 2)):
        case = Case("acc", 2000, spread, (0.0,) * tasks, champions)
        about = {"discordance": f"{spread:.0%}", "OOD tasks": tasks, "rivals": 1 + champions}
        yield {**about, **passes(case, draws)}


def errors(draws: int) -> Iterator[Row]:
    """A soup that is worse by exactly the margin on every OOD task, against every rival."""
    spreads = {
        "acc": (0.02, 0.05, 0.5),
        "acc, passages": (0.1, 0.5),
        "bits_per_byte": (0.02,),
        "perplexity": (0.1,),
    }
    for kind, count, tasks in itertools.product(KINDS, (30, 300, 2000, 14000), (1, 2)):
        for spread in spreads[kind]:
            case = Case(kind, count, spread, (1.0,) * tasks)
            about = {"metric": kind, "items": count, "spread": f"{spread:g}", "OOD tasks": tasks}
            its = passes(case, draws if count < 14000 else max(draws // 4, 1))
            yield {**about, "each": its["each"], "now": its["now"]}


def single(draws: int) -> Iterator[Row]:
    """A soup that is worse on one OOD task only, and as good on the others."""
    for tasks, loss in itertools.product((1, 2, 4, 8), (1.0, 2.0, 3.0, 4.0)):
        case = Case("acc", 2000, 0.05, (loss,) + (0.0,) * (tasks - 1))
        its = passes(case, draws)
        yield {"OOD tasks": tasks, "margins lost": loss, "each": its["each"], "now": its["now"]}


def parents(draws: int) -> Iterator[Row]:
    """A soup that is worse than its better parent, and replaces a champion that is worse still."""
    for loss in (0.0, 1.0, 2.0, 3.0):
        case = Case("acc", 2000, 0.05, (loss,) * 2, champions=1, behind=loss + 3.0)
        its = passes(case, draws)
        yield {"margins lost": loss, "each": its["each"], "now": its["now"]}


TABLES = {"power": power, "errors": errors, "single": single, "parents": parents}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; shares in per cent."""

    def words(cell: str | float) -> str:
        return f"{cell:.1%}".replace("%", " %") if isinstance(cell, float) else str(cell)

    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([words(row[name]) for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000, help="verdicts for each number")
    parser.add_argument("--tables", default=",".join(TABLES), help="names, separated by commas")
    parser.add_argument("--out", type=Path, help="file for the numbers, one line of JSON each")
    chosen = parser.parse_args()
    for name in chosen.tables.split(","):
        rows = list(TABLES[name](chosen.draws))
        print(f"### {name}\n\n{TABLES[name].__doc__}\n\n{table(rows)}\n", flush=True)
        if chosen.out is not None:
            with chosen.out.open("a") as file:
                file.writelines(json.dumps({"table": name, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
