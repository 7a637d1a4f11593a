"""Record how the items of a trajectory move with the merge window: its duration and its schedule.

    python examples/trajectory           # registers 24 versions of a small model, and three twins
    python benchmarks/record_schedule.py trajectory-llm 24 --name trajectory-v24

It merges the versions up to the newest one on a grid of (duration, p), see `schedules.py`, and by
the schemes that teams choose by hand. The model's policy tags say what they are scored on:
`soup.tasks` are the held-out items, `soup.test_tasks` the fresh ones, which a search never sees.

    NAME.json    every score, the paired difference to the newest version, and the items that are
                 answered right, as bits in hexadecimal
    NAME.md      the same as a table
    NAME.npz     log-likelihoods of all held-out and some fresh items on the grid, for
                 `schedules.load`; not with `--population 0`
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.append(str(Path(__file__).parent.parent))

import numpy as np
import torch
from mlflow import MlflowClient
from numpy.typing import NDArray
from torch import Tensor

import schedules
from mlflow_soup.evaluation.items import freeze
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import PLAIN
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.records import Version
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.store import connect
from mlflow_soup.search.space import Space
from mlflow_soup.weights.checkpoint import Checkpoint
from mlflow_soup.weights.find import find_checkpoint
from schedules import Array

Bits = NDArray[np.bool_]
BATCH_TOKENS = 2048  # more leave the cache
# tokens, places, where each choice begins and ends, and (position, token, choice) to be read
Row = tuple[list[int], list[int], list[tuple[int, int]], list[tuple[int, int, int]]]


@dataclass(frozen=True)
class Batch:
    """B questions, each a row of T tokens: the passage, then all choices, which see it only.

    Attributes:
        tokens, places: (B, T), the tokens, and where each stands in its own text.
        sees: (B, 1, T, T), which tokens each may look at.
        reads: (R,), the positions in the flattened tokens whose logits are read.
        row, token, choice: (M,), for each token of a choice where among the R its logits are, the
            token itself, and the number of its choice in the whole task.
    """

    tokens: Tensor
    places: Tensor
    sees: Tensor
    reads: Tensor
    row: Tensor
    token: Tensor
    choice: Tensor


class Questions:
    """Multiple-choice items of a task, scored as lm-eval does, up to rounding.

    It takes a third of the time: a passage goes through the model once, not once for each choice.

    Args:
        live: the model, whose weights may change between calls.
        term: `TASK:acc`.
        include_path: where lm-eval finds the task.
        most: how many items at most; they are spread over all.

    Attributes:
        kept: which items of the task are scored, shape (N,).
        gold: index of each right choice, shape (N,).
    """

    def __init__(self, live: LiveModel, term: str, include_path: str, most: int) -> None:
        (task,) = load_suite(term, include_path=include_path).loaded["tasks"].values()
        freeze(task, PLAIN, None)
        asked: dict[int, list[Any]] = {}
        for request in task.instances:
            asked.setdefault(request.doc_id, []).append(request)
        # in groups of four: the right answer goes round among the choices
        groups = np.array_split(np.arange(len(asked)), max(1, len(asked) // 4))
        share = min(1.0, most / len(asked))
        taken = [g for i, g in enumerate(groups) if int((i + 1) * share) > int(i * share)]
        self.kept = np.concatenate(taken)
        questions = [asked[i] for i in self.kept.tolist()]
        self.gold = np.array([task.doc_to_target(of[0].doc) for of in questions])
        self._model, self._choices = live.model, len(questions[0])
        read = [self._read(live, of, number) for number, of in enumerate(questions)]
        read.sort(key=lambda one: -len(one[0]))
        self._batches = []
        while read:
            fit = max(1, BATCH_TOKENS // len(read[0][0]))
            self._batches.append(_batch(read[:fit]))
            read = read[fit:]

    def _read(self, live: LiveModel, requests: Sequence[Any], number: int) -> Row:
        """A question as one row: its tokens, places, beginnings of choices, and what is read."""

        def encode(text: str) -> list[int]:
            return list(live.tokenizer(text, add_special_tokens=False)["input_ids"])

        passage = encode(requests[0].args[0])
        tokens, places = list(passage), list(range(len(passage)))
        parts, reads = [], []
        for i, request in enumerate(requests):
            own = encode("".join(request.args))[len(passage) :]
            begin = len(tokens)
            positions = [len(passage) - 1, *range(begin, begin + len(own) - 1)]
            choice = number * len(requests) + i
            reads += [(at, token, choice) for at, token in zip(positions, own, strict=True)]
            tokens += own[:-1]  # the last one is only predicted
            places += range(len(passage), len(passage) + len(own) - 1)
            parts.append((begin, len(tokens)))
        return tokens, places, parts, reads

    def __call__(self) -> Array:
        """The log-likelihood of each choice for the current weights, shape (N, C)."""
        out = torch.zeros(len(self.gold) * self._choices)
        with torch.no_grad():
            for one in self._batches:
                hidden = self._model.base_model(
                    input_ids=one.tokens,
                    position_ids=one.places,
                    attention_mask=one.sees,
                    use_cache=False,
                ).last_hidden_state
                read = hidden.flatten(0, 1)[one.reads]
                scores = self._model.get_output_embeddings()(read).log_softmax(-1)
                out.index_add_(0, one.choice, scores[one.row, one.token])
        return out.double().numpy().reshape(len(self.gold), -1)

    def right(self, likelihoods: Array) -> Bits:
        """Which items these log-likelihoods answer right, shape (N,)."""
        return np.asarray(likelihoods.argmax(axis=1) == self.gold)


def _batch(rows: Sequence[Row]) -> Batch:
    """Rows, the longest first, padded on the right."""
    count, width = len(rows), len(rows[0][0])
    tokens, places = torch.zeros(2, count, width, dtype=torch.long)
    sees = torch.zeros(count, width, width, dtype=torch.bool)
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    reads, targets, choices = [], [], []
    for i, (own, at, parts, asked) in enumerate(rows):
        tokens[i, : len(own)] = torch.tensor(own)
        places[i, : len(own)] = torch.tensor(at)
        passage = parts[0][0]
        sees[i, :, :passage] = earlier[:, :passage]
        for begin, end in parts:
            sees[i, begin:end, begin:end] = earlier[: end - begin, : end - begin]
        reads += [i * width + position for position, _, _ in asked]
        targets += [token for _, token, _ in asked]
        choices += [choice for _, _, choice in asked]
    distinct, row = torch.unique(torch.tensor(reads), return_inverse=True)
    token, choice = torch.tensor(targets), torch.tensor(choices)
    return Batch(tokens, places, sees[:, None], distinct, row, token, choice)


class Place:
    """The versions up to the newest one, and the items that score their merges.

    Args:
        model: the registered model.
        newest: the number of the version where the windows end.
        longest: how many versions a window can hold.
        fresh: how many fresh items are scored.
        some: how many of them are scored on the whole grid; 0 for none.
    """

    def __init__(self, model: str, newest: int, longest: int, fresh: int, some: int) -> None:
        client = MlflowClient()
        self.store = connect(60.0)
        self.numbers = list(range(max(1, newest - longest + 1), newest + 1))
        tags = [client.get_model_version(model, str(n)).tags for n in self.numbers]
        self.times = [float(tag["tokens_seen"]) for tag in tags]
        self.gap = self.times[-1] - self.times[-2]
        parents = [self.checkpoint(model, n) for n in self.numbers]
        self.live = LiveModel(parents[-1], "cpu")
        self._links = self.live.link(parents)
        policy = client.get_registered_model(model).tags
        path = policy["soup.include_path"]
        self.held_out = Questions(self.live, policy["soup.tasks"], path, 10**6)
        self.fresh = Questions(self.live, policy["soup.test_tasks"], path, fresh)
        self.some = Questions(self.live, policy["soup.test_tasks"], path, some) if some else None
        if self.some and not np.isin(self.some.kept, self.fresh.kept).all():
            raise SystemExit("--population: the half of --fresh, a quarter, or the like")
        self._space = Space(len(parents), 0.0)

    def checkpoint(self, model: str, number: int) -> Checkpoint:
        """The files of a version."""
        return find_checkpoint(pull(self.store, Version(model, number)), f"{model} v{number}")

    def merge(self, weights: Array) -> tuple[float, ...]:
        """Set the live model to this merge; gives the weights as they were rounded."""
        lam = self._space.recipe(weights).lam
        self.live.set_weights(self._links, lam)
        return lam

    def alone(self, checkpoint: Checkpoint) -> None:
        """Set the live model to another checkpoint."""
        self.live.set_weights(self.live.link([checkpoint]), (1.0,))


class Recording:
    """What is known of the merges of a place.

    Attributes:
        rows: what `json.dumps` can write of each merge that was noted, the newest version first.
        right: which items each of them answers right: of the held-out ones, of the fresh ones.
        grid: the accuracy at each cell of the grid, in points.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rows: list[dict[str, Any]] = []
        self.right: list[tuple[Bits, Bits]] = []
        self.grid: list[dict[str, float]] = []
        self._seen: dict[tuple[float, ...], tuple[Array, Array]] = {}
        self._began = time.time()

    @property
    def seconds(self) -> int:
        """Since it began."""
        return round(time.time() - self._began)

    def note(self, name: str, window: float, weights: Array) -> None:
        """Score a merge on all items."""
        lam = self.place.merge(weights)
        if lam not in self._seen:
            self._seen[lam] = self.place.held_out(), self.place.fresh()
        self._note(name, window, lam, self._seen[lam])

    def note_alone(self, name: str, checkpoint: Checkpoint) -> None:
        """Score another checkpoint on all items."""
        self.place.alone(checkpoint)
        self._note(name, 1, (), (self.place.held_out(), self.place.fresh()))

    def _note(
        self, name: str, window: float, lam: Sequence[float], scores: tuple[Array, Array]
    ) -> None:
        held_out, fresh = self.place.held_out.right(scores[0]), self.place.fresh.right(scores[1])
        self.right.append((held_out, fresh))
        row: dict[str, Any] = {"name": name, "window": window, "weights": list(lam)}
        for i, what in enumerate(("held_out", "fresh")):
            row[what] = compare(self.right[-1][i], self.right[0][i])
        self.rows.append(row)
        scored = [row[what]["score"] for what in ("held_out", "fresh")]
        print(f"{self.seconds} s", name, window, *scored, flush=True)

    def scan(self, file: Path | None) -> None:
        """Score the grid on the held-out items, and note its best cell on all items.

        Args:
            file: where log-likelihoods are written, also those of some fresh items, whose best
                cell is then noted too; or None.
        """
        place = self.place
        some = place.some if file else None
        cells, lams = schedules.grid(len(place.times)), []
        curves: list[list[Array]] = [[], []]
        for duration, power in cells:
            weights = schedules.decayed(place.times, duration * place.gap, power)
            lam = place.merge(weights)
            held_out, fresh = self._seen.get(lam, (None, None))
            lams.append(lam)
            curves[0].append(place.held_out() if held_out is None else held_out)
            cell = {"duration": duration, "p": power}
            cell["held_out"] = 100 * float(place.held_out.right(curves[0][-1]).mean())
            if some:
                among = np.isin(place.fresh.kept, some.kept)
                curves[1].append(some() if fresh is None else fresh[among])
                cell["fresh"] = 100 * float(some.right(curves[1][-1]).mean())
            self.grid.append({key: round(value, 3) for key, value in cell.items()})
        for what in ("held_out", "fresh") if some else ("held_out",):
            best = max(range(len(cells)), key=lambda i: self.grid[i][what])
            name = f"best cell {what.replace('_', '-')}, p = {cells[best][1]:g}"
            self.note(name, cells[best][0], np.array(lams[best]))
        if file and some:
            golds = (place.held_out.gold, some.gold)
            stacked = [(np.stack(c, axis=-1), g) for c, g in zip(curves, golds, strict=True)]
            items = dict(zip(("held_out", "fresh"), stacked, strict=True))
            schedules.save(file, cells, lams, items)
            print(f"{file}: {len(cells)} cells, {file.stat().st_size / 1e6:.2f} MB")


def compare(right: Bits, newest: Bits) -> dict[str, float]:
    """Accuracy in points, and the paired difference to the newest version with its error."""
    difference = 100.0 * right - 100.0 * newest
    return {
        "score": round(100 * float(right.mean()), 3),
        "over_newest": round(float(difference.mean()), 3),
        "stderr": round(float(difference.std(ddof=1) / len(difference) ** 0.5), 3),
    }


def twins_of(place: Place, twins: str) -> Iterator[tuple[str, Checkpoint]]:
    """The twins annealed from the newest version, and those that have seen as much as it."""
    for version in MlflowClient().search_model_versions(f"name = '{twins}'"):
        origin = version.tags["annealed_from"].rpartition("/")[2]
        tokens = float(version.tags["tokens_seen"])
        if int(origin) == place.numbers[-1] or tokens == place.times[-1]:
            after = round((tokens - place.times[-1]) / place.gap)
            what = f"annealed from v{origin}" + (f", {after} gaps later" if after else "")
            yield what, place.checkpoint(twins, int(version.version))


def table(rows: Sequence[dict[str, Any]], about: str) -> str:
    """The rows in Markdown."""
    lines = [about, "", "| merge | window | held-out | over newest | fresh | over newest |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["name"], f"{row['window']:g}"]
        for what in ("held_out", "fresh"):
            one = row[what]
            cells += [f"{one['score']:.2f}", f"{one['over_newest']:+.2f} ± {one['stderr']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Merge, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", help="the registered model")
    parser.add_argument("newest", type=int, help="the version where the windows end")
    parser.add_argument("--name", required=True, help="begins the file names")
    parser.add_argument("--twins", help="annealed twins; MODEL-annealed if nothing is said")
    parser.add_argument("--longest", type=int, default=12, help="versions of the longest window")
    parser.add_argument("--windows", default="2,3,4,5,6,8,10,12", help="of the schemes by hand")
    parser.add_argument("--fresh", type=int, default=8000, help="fresh items for what is by hand")
    parser.add_argument("--population", type=int, default=4000, help="fresh ones on the grid, or 0")
    recorded = Path(__file__).parent / "recorded" / "schedules"
    parser.add_argument("--out", type=Path, default=recorded)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    place = Place(chosen.model, chosen.newest, chosen.longest, chosen.fresh, chosen.population)
    recording = Recording(place)
    recording.note("newest", 1, np.eye(len(place.times))[-1])
    windows = [w for w in map(int, chosen.windows.split(",")) if w <= len(place.times)]
    for name, weights in schedules.SCHEMES.items():
        for window in windows:
            recording.note(name, window, weights(place.times, window * place.gap))
    recording.scan(chosen.out / f"{chosen.name}.npz" if chosen.population else None)
    for name, checkpoint in twins_of(place, chosen.twins or f"{chosen.model}-annealed"):
        recording.note_alone(name, checkpoint)

    counts = [len(place.held_out.gold), len(place.fresh.gold)]
    about = f"{chosen.model} v{chosen.newest}, {counts[0]} held-out and {counts[1]} fresh items"
    (chosen.out / f"{chosen.name}.md").write_text(table(recording.rows, about), encoding="utf-8")
    for row, right in zip(recording.rows, recording.right, strict=True):
        row["answers"] = [np.packbits(bits).tobytes().hex() for bits in right]
    result = {
        "model": chosen.model,
        "versions": place.numbers,
        "tokens_seen": place.times,
        "items": counts,
        "seconds": recording.seconds,
        "rows": recording.rows,
        "grid": recording.grid,
    }
    (chosen.out / f"{chosen.name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(table(recording.rows, about))


if __name__ == "__main__":
    main()
