"""Searching λ: our searchers against peers, by the number of evaluations they need.

    python benchmarks/search.py --describe                      # what the landscapes look like
    python benchmarks/search.py --seeds 50 --out results.jsonl  # ours, random and grid; resumable
    python benchmarks/search.py --table results.jsonl           # Markdown of what is there so far
    python benchmarks/search.py --parallel --out parallel.jsonl # 1, 2, 4, 8 evaluations at a time
    python benchmarks/search.py --recorded benchmarks/recorded --out recorded.jsonl

Peers need an environment of their own; there the same commands measure them, into the same file:

    python3 -m venv peers
    peers/bin/pip install torch==2.13.0     # first: another version may bring gigabytes of CUDA
    peers/bin/pip install scikit-optimize optuna botorch bayesian-optimization scikit-learn scipy
    peers/bin/python benchmarks/search.py --seeds 50 --out results.jsonl

`mlflow_soup` is the one that is installed or on PYTHONPATH, else that of this tree. Set
OMP_NUM_THREADS=1: seconds per ask are CPU seconds of one thread. Whoever changes a searcher or a
landscape begins a new file: what is in it is not measured again.

Every evaluation counts, those of the parents too. Everybody but us starts from the parents and the
middle of [α, 1] (of more than two parents, their uniform soup); we choose our own start. Regret is
the best held-out score of a dense grid of feasible λ minus the best one measured; true regret is
the same on the population, for the λ that a searcher recommends after n evaluations: ours by
`search.recommend`, scikit-optimize by `expected_minimum`, BoTorch by the maximum of its posterior
mean; the others offer nothing but the best one measured. In points: of accuracy, or 0.005 bits per
byte.

The last table is of whole searches with our default budget and stop rule. It compares the λ that is
chosen in the end with the plain average of all parents and with the better parent, on the
population, and gives the standard error of the mean over seeds. Luck is the true regret of the λ
with the best held-out score of all.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))

import landscapes
import mlflow_soup
import peers
from landscapes import Landscape
from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.request.spec import Spec
from mlflow_soup.search import ask as search_ask
from mlflow_soup.search import recommend as search_recommend
from mlflow_soup.search.belief import CHOICES
from mlflow_soup.search.methods import METHODS
from mlflow_soup.search.space import Space
from started import Grid, Random, Weights

BUDGET = 20
CLOSE = (0.25, 0.10)  # points below the best that count as found
LOOK = (4, 6, 8, 10, 15, 20)  # evaluations after which regrets are shown
BATCHES = (1, 2, 4, 8)
Make = Callable[[str, int], Landscape]  # of a family and a seed
SEVERAL = [name for name in landscapes.FAMILIES if name[0].isdigit()]


class Searcher(Protocol):
    """What the benchmark drives."""

    def ask(self, pending: Sequence[Weights]) -> Weights:
        """The merge weights to evaluate next, while others are being evaluated."""

    def tell(self, weights: Weights, score: Score) -> None:
        """What the evaluation said."""

    def recommend(self) -> Weights:
        """The merge weights to keep if the search ended now."""


class Ours:
    """`mlflow_soup.search` with one acquisition."""

    def __init__(self, landscape: Landscape, seed: int, acquisition: str) -> None:
        if landscape.parents == 2:
            self.space = Space.pair(landscape.alpha)
        else:
            self.space = Space.simplex(landscape.parents, landscape.alpha)  # type: ignore[attr-defined]
        self.seed, self.acquisition = seed, acquisition
        self.trials: list[Trial] = []

    def ask(self, pending: Sequence[Weights]) -> Weights:
        """As the pipeline asks."""
        recipe = search_ask.ask(
            self.space,
            self.trials,
            acquisition=self.acquisition,
            seed=self.seed,
            pending=[Recipe("linear", weights) for weights in pending],
        )
        return recipe.lam

    def tell(self, weights: Weights, score: Score) -> None:
        """Append the trial."""
        self.trials.append(Trial(len(self.trials), Recipe("linear", weights), score))

    def recommend(self) -> Weights:
        """As the pipeline does in the end."""
        return search_recommend.recommend(self.space, self.trials).lam

    def finish(self, landscape: Landscape) -> tuple[list[Trial], Recipe]:
        """A whole search as `mlflow-soup run` makes it: its trials, and the recipe it chooses."""
        versions = ",".join(f"v{i + 1}" for i in range(landscape.parents))
        spec = Spec(versions=versions, acquisition=self.acquisition, seed=self.seed)
        method, trials = METHODS[spec.method], list[Trial]()
        while (recipe := method.proceed(self.space, trials, spec)) is not None:
            trials.append(Trial(len(trials), recipe, landscape.score(recipe.lam)))
        return trials, method.choose(self.space, trials, spec)

    def end(self, landscape: Landscape) -> dict[str, float]:
        """What became of a whole search."""
        return end(*self.finish(landscape), landscape)


def searchers() -> dict[str, Any]:
    """Name → function of a landscape and a seed; peers that are not installed are left out."""
    table: dict[str, Any] = {
        f"ours {name}": lambda landscape, seed, name=name: Ours(landscape, seed, name)
        for name in CHOICES
    }
    return table | {"random": Random, "grid": Grid} | peers.installed()


def measure(
    searcher: Searcher, landscape: Landscape, batch: int, budget: int = BUDGET
) -> dict[str, Any]:
    """Regret after every evaluation, true regret of recommendations, and seconds per ask."""
    feasible = landscape.feasible(landscape.grid)
    best = landscape.held_out_values[feasible].max()
    truth = landscape.population_values[feasible].max()
    record: dict[str, Any] = {"asked": [], "regret": [], "true": {}, "seconds": []}
    found = -np.inf
    while len(record["asked"]) < budget:
        pending: list[Weights] = []
        for _ in range(min(batch, budget - len(record["asked"]))):
            begin = time.process_time()
            pending.append(searcher.ask(pending))
            record["seconds"].append(time.process_time() - begin)
            record["asked"].append(pending[-1])
        for weights in pending:
            score = landscape.score(weights)
            begin = time.process_time()
            searcher.tell(weights, score)  # some peers think here
            record["seconds"][len(record["regret"])] += time.process_time() - begin
            if landscape.feasible(np.array([weights]))[0]:
                found = max(found, score.value)
            regret = max(best - found, 0.0) / landscape.point if found > -np.inf else None
            record["regret"].append(regret if regret is None else round(regret, 4))
        count = len(record["asked"])
        if count in LOOK:
            recommended = np.array([searcher.recommend()])
            regret = max(truth - landscape.truth(recommended)[0], 0.0) / landscape.point
            record["true"][str(count)] = round(float(regret), 4)
    record["seconds"] = [round(seconds, 4) for seconds in record["seconds"]]
    if isinstance(searcher, Ours) and batch == 1:
        record["end"] = searcher.end(landscape)
    return record


def end(trials: Sequence[Trial], chosen: Recipe, landscape: Landscape) -> dict[str, float]:
    """The number of trials of a whole search, and what is true of the recipe that it chose."""
    parents = np.eye(landscape.parents)
    points = np.vstack([chosen.lam, parents.mean(axis=0), parents])
    own, uniform, *others = landscape.truth(points) / landscape.point
    feasible = landscape.feasible(landscape.grid)
    values = landscape.population_values[feasible] / landscape.point
    lucky = values[landscape.held_out_values[feasible].argmax()]
    return {
        "trials": len(trials),
        "regret": round(max(values.max() - own, 0.0), 4),
        "luck": round(values.max() - lucky, 4),
        "over uniform": round(own - uniform, 4),
        "over parents": round(own - max(others), 4),
    }


def run(
    names: Sequence[str],
    families: Sequence[str],
    make: Make,
    seeds: int,
    batches: Sequence[int],
    out: Path,
    table: dict[str, Any] | None = None,
    budget: int = BUDGET,
) -> None:
    """Append what `out` lacks; all families of one seed before the next seed."""
    table = table or searchers()
    done = {key(record) for record in read(out)} if out.is_file() else set()
    for name in sorted({*names} - {*table}):
        print(f"skipped: {name} is not installed here or not known", file=sys.stderr)
    for seed in range(seeds):
        for family in families:
            wanted = [
                (name, batch)
                for name in names
                if name in table and (family not in SEVERAL or takes_several(name))
                for batch in batches
                if (name, batch, family, seed) not in done
            ]
            if wanted:
                landscape = make(family, seed)
            for name, batch in wanted:
                searcher = table[name](landscape, seed)
                head = {"searcher": name, "batch": batch, "family": family, "seed": seed}
                with out.open("a") as file:
                    file.write(
                        json.dumps(head | measure(searcher, landscape, batch, budget)) + "\n"
                    )
        print(f"seed {seed} done", file=sys.stderr)


def takes_several(name: str) -> bool:
    """Whether a searcher takes more than two parents."""
    return not name.startswith("ours") or hasattr(Space, "simplex")


def key(record: dict[str, Any]) -> tuple[str, int, str, int]:
    """What a run is known by."""
    return record["searcher"], record["batch"], record["family"], record["seed"]


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file; the last one of each run counts."""
    records = map(json.loads, file.read_text().splitlines())
    return list({key(record): record for record in records}.values())


def needed(record: dict[str, Any], close: float) -> float:
    """Evaluations until the best one measured is that close, infinite if never."""
    hits = (n for n, r in enumerate(record["regret"], 1) if r is not None and r <= close)
    return next(hits, np.inf)


def quantile(values: list[float], q: float, budget: int = BUDGET) -> str:
    """A quantile that was reached, `>20` when it is infinite."""
    value = np.quantile(values, q, method="inverted_cdf")
    return f">{budget}" if np.isinf(value) else f"{value:g}"


def row(records: list[dict[str, Any]], batch: int) -> list[str]:
    """The cells of a searcher."""
    cells = [str(len(records))]
    for close in CLOSE:
        counts = [needed(record, close) for record in records]
        cells.append(f"{quantile(counts, 0.5)} / {quantile(counts, 0.9)}")
        if batch > 1:
            cells[-1] += f" in {quantile(np.ceil(np.array(counts) / batch), 0.5)} rounds"
        cells.append(f"{np.isfinite(counts).mean():.0%}")
    cells.append(means([r["regret"][n - 1] for r in records] for n in LOOK))
    cells.append(means([r["true"].get(str(n)) for r in records] for n in LOOK))
    asks = [statistics.median(r["seconds"]) for r in records]
    return [*cells, f"{1000 * statistics.median(asks):.0f}"]


def means(columns: Iterable[list[float | None]]) -> str:
    """The mean of each column, a dash where one of its numbers is missing."""
    return " ".join("-" if None in column else f"{np.mean(column):.2f}" for column in columns)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: overall for pairs and for simplices, then each family."""
    looks = " ".join(map(str, LOOK))
    head = ["searcher", "runs"]
    for close in CLOSE:
        head += [f"to ≤ {close:.2f}, median / p90", "solved"]
    head += [f"regret at {looks}", f"true regret at {looks}", "ms per ask"]
    families = list(dict.fromkeys(record["family"] for record in records))
    groups = {
        "pairs": [f for f in families if f not in SEVERAL],
        "three and four parents": SEVERAL,
    }
    groups |= {what(family): [family] for family in families}
    lines: list[str] = []
    for title, members in groups.items():
        chosen = [record for record in records if record["family"] in members]
        if not chosen:
            continue
        lines += [f"\n### {title}\n", *markdown(head)]
        batches = {record["batch"] for record in records}
        for name, batch in dict.fromkeys((r["searcher"], r["batch"]) for r in chosen):
            mine = [r for r in chosen if (r["searcher"], r["batch"]) == (name, batch)]
            label = name if batches == {1} else f"{name}, {batch} at a time"
            lines.append("| " + " | ".join([label, *row(mine, batch)]) + " |")
    ended = [record for record in records if "end" in record]
    if ended:
        head = ["searcher", "family", "runs", "trials, mean / p90", "true regret", "luck"]
        head += ["gain over the plain average", "gain over the better parent"]
        lines += ["\n### whole searches: default budget and stop rule\n", *markdown(head)]
        for name, family in dict.fromkeys((r["searcher"], r["family"]) for r in ended):
            ends = [r["end"] for r in ended if (r["searcher"], r["family"]) == (name, family)]
            lines.append("| " + " | ".join([name, what(family), *ending(ends)]) + " |")
    return "\n".join(lines)


def ending(ends: Sequence[dict[str, float]]) -> list[str]:
    """The cells of whole searches; gains with the standard error of their mean."""
    trials = [e["trials"] for e in ends]
    cells = [str(len(ends)), f"{np.mean(trials):.1f} / {quantile(trials, 0.9)}"]
    cells += [f"{np.mean([e[cell] for e in ends]):.2f}" for cell in ("regret", "luck")]
    for rival in ("over uniform", "over parents"):
        gains = [e[rival] for e in ends]
        error = np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
        cells.append(f"{np.mean(gains):+.2f} ± {error:.2f}")
    return cells


def markdown(head: list[str]) -> list[str]:
    """The head of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]


def what(family: str) -> str:
    """A family's name and description; recorded ones have none."""
    known = landscapes.FAMILIES.get(family)
    return f"{family}: {known.what}" if known else family


def described(families: Sequence[str], make: Make, seeds: int) -> str:
    """Markdown of what the families are like."""
    lines: list[str] = []
    for name in families:
        numbers = landscapes.describe(make(name, seed) for seed in range(seeds))
        lines = lines or markdown(["family", *numbers])
        cells = [what(name), *(f"{x:.2f}" for x in numbers.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--searchers", help="names, by commas; default: all that are installed")
    parser.add_argument("--families", help="names, by commas; default: all")
    parser.add_argument("--recorded", type=Path, help="folder of recorded pairs, the families then")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--parallel", action="store_true", help="ours, several at a time")
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    parser.add_argument("--describe", action="store_true", help="only describe the landscapes")
    chosen = parser.parse_args()
    make: Make = landscapes.make
    families = list(landscapes.FAMILIES)
    if chosen.recorded:
        families = sorted(file.stem for file in chosen.recorded.glob("*.npz"))

        def make(name: str, seed: int) -> Landscape:
            return landscapes.load(chosen.recorded / f"{name}.npz", seed)

    if chosen.families:
        families = chosen.families.split(",")
    if chosen.describe:
        print(described(families, make, chosen.seeds))
        return
    warnings.simplefilter("ignore")
    if not chosen.table:
        print(f"mlflow_soup of {Path(mlflow_soup.__file__).parent}", file=sys.stderr)
        names = (
            chosen.searchers.split(",") if chosen.searchers else [*{**searchers(), **peers.PEERS}]
        )
        batches = BATCHES if chosen.parallel else (1,)
        if chosen.parallel:
            names = [name for name in names if name.startswith("ours ")]
        run(names, families, make, chosen.seeds, batches, chosen.out)
    records = read(chosen.table or chosen.out)
    if chosen.families or not chosen.table:
        records = [record for record in records if record["family"] in families]
    print(table(records))


if __name__ == "__main__":
    main()
