"""Searching a merge window: our searchers against peers and fixed rules, on recorded trajectories.

    python benchmarks/windows_search.py --seeds 12 --out windows.jsonl   # resumable
    python benchmarks/windows_search.py --table windows.jsonl            # only print

A place is a checkpoint of a recorded trajectory, benchmarks/recorded/schedules/*.npz. Everybody
searches two numbers there, the duration D of the window and the power p, see `schedules.py`; they
start from the newest checkpoint alone and half of the longest window with p = 2. Whoever is not
ours sees the square of log2 D and log2 p. Every searcher gets the nearest of the schedules that
ours chooses from, and is told which one it got.

The log-likelihood of every item is a cubic spline through those recorded, in √D and log2 p. A
power beyond those recorded counts as the largest one in a shorter window, whose checkpoints have
the same mean age. Each seed draws 2,000 held-out items; the rest is the population. It is finite:
the schedule that is best on it is partly lucky, so nobody reaches a regret of 0.

search.py says how to install peers, who recommends how, and what is measured. Here it is 15
evaluations: how many until the best measured schedule is near the best held-out score of all, and
the population regret of what is recommended, in points of accuracy. Ours recommends schedules that
it has not measured; in the end `mlflow-soup run` measures the last one, and chooses among what is
measured. So what it would choose is shown too, and whole searches with its stop rule. It prints
Markdown, and the same as JSON. Standard errors are over seeds: they say nothing of another
trajectory. Fixed rules are SMA (p = 1), WMA (p = 2) and minus-sqrt (p = 1/2) of 2, 3, 4, 5, 6, 8,
10 and 12 checkpoints.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

sys.path.append(str(Path(__file__).parent.parent))

import peers
import schedules
import search
from landscapes import POINT, Choices
from mlflow_soup.records import Recipe, Score, Trial
from mlflow_soup.request.spec import Spec
from mlflow_soup.search.methods import METHODS
from mlflow_soup.search.schedule import POWERS, Schedule, longest, power, weights
from started import Started, Weights

Array = NDArray[np.float64]
Key = tuple[str, int]  # place and seed

BUDGET = 15
LOOK = (4, 6, 8, 10)
HELD_OUT = 2000
LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12)
RULES = {"SMA": 1.0, "WMA": 2.0, "minus-sqrt": 0.5}
RIVAL = "ours landscape"  # that others are compared with
RECORDED = Path(__file__).parent / "recorded" / "schedules"


class Place:
    """A recorded place: what its items say at each schedule.

    Attributes:
        space: the schedules that are searched.
        rows: merge weights → row of the schedule.
        shapes: duration and power of each schedule, shape (m, 2).
        curves: log-likelihoods, shape (m, N, C); `gold` and `right` are (N,) and (m, N).
    """

    def __init__(self, file: Path) -> None:
        data = schedules.load(file)
        names = [key.removesuffix("_gold") for key in data if key.endswith("_gold")]
        recorded = np.concatenate([data[name] for name in names]).astype(np.float32)
        self.gold = np.concatenate([data[f"{name}_gold"] for name in names]).astype(np.int64)
        count = int(data["cells"][:, 0].max())
        self.space = Schedule(count, 0.0, tuple(map(float, range(1, count + 1))))
        lams = list(map(tuple, self.space.candidates().tolist()))
        self.rows = {lam: row for row, lam in enumerate(lams)}
        shapes = [self.space.shape_of(Recipe("linear", lam)) for lam in lams]
        self.shapes = np.array(shapes, float)
        curves = recorded @ splines(data["cells"], self.shapes).T.astype(np.float32)
        self.curves = np.ascontiguousarray(np.moveaxis(curves, -1, 0))
        self.right = self.curves.argmax(axis=2) == self.gold

    def schedule(self, duration: float, p: float) -> Weights:
        """The merge weights of a schedule."""
        return self.space.recipe(weights(self.space.times, duration, power(p))).lam


def splines(cells: Array, shapes: Array) -> Array:
    """How much each recorded cell counts at each (duration, p), shape (m, G)."""
    where = {(duration, p): i for i, (duration, p) in enumerate(cells.tolist())}
    durations = sorted({duration for duration, _ in where})
    powers = sorted({p for duration, p in where if duration > 1})
    duration, p = shapes.T
    shrink = np.where(p > powers[-1], (powers[-1] + 1) / (p + 1), 1.0)
    along = CubicSpline(np.sqrt(durations), np.eye(len(durations)))
    across = CubicSpline(np.log2(powers), np.eye(len(powers)))
    left = along(np.sqrt(np.maximum(duration * shrink, 1.0)))
    right = across(np.log2(np.minimum(p, powers[-1])))
    found = np.zeros((len(shapes), len(cells)))
    for i, d in enumerate(durations):
        for j, q in enumerate(powers):
            found[:, where.get((d, q), 0)] += left[:, i] * right[:, j]  # of 1 gap, the first cell
    return found


@lru_cache(maxsize=8)
def place_of(file: Path) -> Place:
    """A place, read once."""
    return Place(file)


class Window:
    """A place with the held-out items of a seed: what a searcher and a judge see of it."""

    alpha, point = 0.0, POINT

    def __init__(self, place: Place, seed: int) -> None:
        self.place, self.parents = place, place.space.count
        order = np.random.default_rng(seed).permutation(len(place.gold))
        self.held_out, self.population = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
        self.grid = place.space.candidates()
        self.held_out_values = place.right[:, self.held_out].mean(axis=1)
        self.population_values = place.right[:, self.population].mean(axis=1)

    def feasible(self, weights: Array) -> NDArray[np.bool_]:
        """All schedules are."""
        return np.ones(len(weights), bool)

    def truth(self, weights: Array) -> Array:
        """Score on the population, shape (n,)."""
        return self.population_values[[self.place.rows[tuple(row)] for row in weights.tolist()]]

    def score(self, lam: Sequence[float]) -> Score:
        """What an evaluation of a schedule says."""
        row = self.place.rows[tuple(lam)]
        items, right = self.place.curves[row, self.held_out], self.place.right[row, self.held_out]
        choices = Choices(np.zeros((1, 1, 1), np.float32), self.place.gold[self.held_out], None, 0)
        stderr = right.std() / np.sqrt(len(right))
        return Score(right.mean(), stderr, (choices.items(right.astype(float), items, 1.0),))


class Ours(search.Ours):
    """`mlflow_soup.search` in the space of schedules."""

    def __init__(self, landscape: Window, seed: int, acquisition: str) -> None:
        self.space = landscape.place.space
        self.seed, self.acquisition = seed, acquisition
        self.trials: list[Trial] = []

    def end(self, landscape: Window) -> dict[str, float]:
        """Of a whole search: its trials, and the population regret of its choice.

        Also the regret of what `choose` takes of what was measured so far.
        """
        versions = ",".join(f"v{i + 1}" for i in range(landscape.parents))
        spec = Spec(
            versions=versions, space="schedule", acquisition=self.acquisition, seed=self.seed
        )
        method, trials = METHODS[spec.method], list[Trial]()
        while (recipe := method.proceed(self.space, trials, spec)) is not None:
            trials.append(Trial(len(trials), recipe, landscape.score(recipe.lam)))
        ends = {"regret": trials} | {f"measured at {n}": self.trials[:n] for n in LOOK}
        best = landscape.population_values.max()
        found = {"trials": float(len(trials))}
        for name, some in ends.items():
            chosen = landscape.truth(np.array([method.choose(self.space, some, spec).lam]))[0]
            found[name] = round((best - chosen) / POINT, 4)
        return found


class Square(Started):
    """Coordinates of schedules in the unit square: log2 D and log2 p, each scaled to [0, 1]."""

    dimensions, sums = 2, False

    def __init__(self, landscape: Window, *rest: Any) -> None:
        self.place = landscape.place
        begins = {duration for duration, _ in self.place.shapes.tolist()}
        self.durations = np.array(sorted(begins))
        super().__init__(landscape, *rest)

    def start(self) -> list[Weights]:
        """As ours starts."""
        return [recipe.lam for recipe in self.place.space.start()]

    def cube(self, weights: Sequence[float]) -> list[float]:
        """Point of the square; the newest alone, which has any p, is in the middle of its edge."""
        duration, p = self.place.shapes[self.place.rows[tuple(weights)]]
        across = np.log2(p / POWERS[0]) / np.log2(POWERS[-1] / POWERS[0])
        return [self.scaled(duration), 0.5 if duration == self.durations[0] else float(across)]

    def scaled(self, duration: float) -> float:
        """log2 D from 0 to 1."""
        return float(np.log(duration) / np.log(longest(self.place.space.times)))

    def points(self, weights: Sequence[Weights]) -> Array:
        """Points of the square, shape (n, 2)."""
        return np.array([self.cube(row) for row in weights])

    def weights(self, point: Sequence[float]) -> Weights:
        """The schedule next to a point of the square."""
        along = np.abs([self.scaled(duration) - point[0] for duration in self.durations])
        across = np.abs(np.linspace(0, 1, len(POWERS)) - point[1])
        return self.place.schedule(self.durations[along.argmin()], POWERS[across.argmin()])


class Random(Square):
    """Uniform in the square."""

    def propose(self) -> Weights:
        """A point that is not known yet."""
        known = {weights for weights, _ in self.told}
        while (found := self.weights(self.rng.random(2))) in known:
            pass
        return found


class Grid(Square):
    """Halves, then quarters, then eighths of the square; in random order within each."""

    def propose(self) -> Weights:
        """The coarsest point not measured yet."""
        known = {weights for weights, _ in self.told}
        for steps in (2, 4, 8, 16):
            ends = np.linspace(0, 1, steps + 1)
            points = [self.weights((x, y)) for x in ends[1:] for y in ends]
            fresh = [found for found in points if found not in known]
            if fresh:
                return fresh[self.rng.integers(len(fresh))]
        raise ValueError("the grid is exhausted")


def searchers() -> dict[str, Any]:
    """Name → function of a window and a seed; peers that are not installed are left out."""
    table: dict[str, Any] = {
        f"ours {name}": lambda landscape, seed, name=name: Ours(landscape, seed, name)
        for name in ("landscape", "gp-hedge")
    }
    return table | {"random": Random, "grid": Grid} | peers.installed(Square)


def rules(window: Window) -> dict[str, float]:
    """Population regret of what needs no search, and of the best of the fixed rules."""
    fixed = {
        name: [window.place.schedule(n, p) for n in LENGTHS if n <= window.parents]
        for name, p in RULES.items()
    }
    best = window.population_values.max()

    def regret(among: Sequence[Weights]) -> float:
        return float(best - window.truth(np.array(among)).max()) / POINT

    every = [weights for several in fixed.values() for weights in several]
    values = [window.held_out_values[window.place.rows[weights]] for weights in every]
    pairs = [weights for weights in window.place.rows if sum(w > 0 for w in weights) <= 2]
    newest = [recipe.lam for recipe in window.place.space.alone()]
    lucky = window.grid[[window.held_out_values.argmax()]]
    return {
        "newest alone": regret(newest),
        "best pair, in hindsight": regret(pairs),
        **{f"{name}, best length in hindsight": regret(several) for name, several in fixed.items()},
        f"best of all {len(every)} fixed, in hindsight": regret(every),
        f"fixed with the best held-out score of {len(every)}": regret([every[np.argmax(values)]]),
        "best held-out score of all schedules": regret(list(map(tuple, lucky.tolist()))),
    }


def mean(values: dict[Key, float]) -> str:
    """The mean of (place, seed) → value, and its standard error over seeds, not over places."""
    groups = [[v for (at, _), v in values.items() if at == place] for place, _ in values]
    variance = np.mean([np.var(group, ddof=1) for group in groups]) / len(values)
    return f"{np.mean([*values.values()]):.2f} ± {np.sqrt(variance):.2f}"


def summary(records: dict[Key, dict[str, Any]], rival: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    """What is reported of a searcher, also in comparison with a rival on the same items."""
    found: dict[str, Any] = {"runs": len(records)}
    for close in search.CLOSE:
        counts = [search.needed(record, close) for record in records.values()]
        found[f"to {close:g}"] = search.quantile(counts, 0.5, BUDGET)
        found[f"within {close:g}"] = round(float(np.isfinite(counts).mean()), 3)
    for n in LOOK:
        found[f"regret at {n}"] = mean({key: r["true"][str(n)] for key, r in records.items()})
    last = str(LOOK[-1])
    found["more"] = mean(
        {
            key: record["true"][last] - rival[key]["true"][last]
            for key, record in records.items()
            if key in rival
        }
    )
    ends = {key: record["end"] for key, record in records.items() if "end" in record}
    if ends:
        found["trials"] = round(float(np.mean([end["trials"] for end in ends.values()])), 1)
        found["whole search"] = mean({key: end["regret"] for key, end in ends.items()})
        for n in LOOK:
            chosen = {key: end[f"measured at {n}"] for key, end in ends.items()}
            found[f"measured at {n}"] = mean(chosen)
    asks = [np.median(record["seconds"]) for record in records.values()]
    found["ms per ask"] = round(1000 * float(np.median(asks)))
    return found


def report(records: list[dict[str, Any]], places: dict[str, Path]) -> tuple[str, dict[str, Any]]:
    """Markdown and what it says as data: of all places, then of each."""
    lines: list[str] = []
    data: dict[str, Any] = {}
    for title, members in {"all places": [*places], **{name: [name] for name in places}}.items():
        runs: dict[str, dict[Key, dict[str, Any]]] = {}
        for record in records:
            if record["family"] in members:
                key = (record["family"], record["seed"])
                runs.setdefault(record["searcher"], {})[key] = record
        if not runs:
            continue
        rows = {name: summary(mine, runs.get(RIVAL, {})) for name, mine in runs.items()}
        head = ["searcher", "runs"]
        head += [f"to ≤ {close:g}, share within {BUDGET}" for close in search.CLOSE]
        head += [*(f"regret at {n}" for n in LOOK), f"more than {RIVAL} at {LOOK[-1]}"]
        lines += [f"\n### {title}\n", *search.markdown([*head, "ms per ask"])]
        for name, row in rows.items():
            cells = [name, str(row["runs"])]
            cells += [f"{row[f'to {c:g}']}, {row[f'within {c:g}']:.0%}" for c in search.CLOSE]
            cells += [*(row[f"regret at {n}"] for n in LOOK), row["more"], str(row["ms per ask"])]
            lines.append("| " + " | ".join(cells) + " |")
            if "trials" in row:
                cells = ["the same, among the measured", *[""] * (len(head) - len(LOOK) - 2)]
                cells += [*(row[f"measured at {n}"] for n in LOOK), "", ""]
                lines.append("| " + " | ".join(cells) + " |")
        keys = sorted({key for mine in runs.values() for key in mine})
        fixed = {key: rules(Window(place_of(places[key[0]]), key[1])) for key in keys}
        without: dict[str, str] = {}
        for name in fixed[keys[0]]:
            without[name] = mean({key: row[name] for key, row in fixed.items()})
        lines += ["", *search.markdown(["choice", "regret"])]
        lines += [
            f"| whole search of {name}, {row['trials']} evaluations | {row['whole search']} |"
            for name, row in rows.items()
            if "trials" in row
        ]
        lines += [f"| {name} | {value} |" for name, value in without.items()]
        data[title] = {"searchers": rows, "rules": without}
    return "\n".join(lines), data


def main() -> None:
    """Measure what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--searchers", help="names, by commas; default: all that are installed")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="folder of the places")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("windows.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    chosen = parser.parse_args()
    places = {file.stem: file for file in sorted(chosen.recorded.glob("*.npz"))}
    warnings.simplefilter("ignore")
    if not chosen.table:
        table = searchers()
        names = chosen.searchers.split(",") if chosen.searchers else [*table]

        def make(name: str, seed: int) -> Window:
            return Window(place_of(places[name]), seed)

        search.run(names, [*places], make, chosen.seeds, (1,), chosen.out, table, BUDGET)
    markdown, data = report(search.read(chosen.table or chosen.out), places)
    print(markdown)
    print(json.dumps(data))


if __name__ == "__main__":
    main()
