"""One Hypothesis strategy per noun of the domain."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mlflow_soup.records import (
    Digests,
    Distance,
    Items,
    LayerDistance,
    Manifest,
    Recipe,
    Score,
    Source,
    Trial,
    Version,
)
from mlflow_soup.request.names import Target, VersionRef
from mlflow_soup.search.space import Space

# for laws whose every example fits Gaussian processes
FEW = settings(max_examples=25)

# safetensors' floating dtypes as their bits: unsigned carrier, mask of the exponent
BITS = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}


def lams() -> st.SearchStrategy[float]:
    """λ of the newer of two parents, in steps of 1e-4 as recipes have it."""
    return st.integers(0, 10_000).map(lambda n: n / 10_000)


def recipes() -> st.SearchStrategy[Recipe]:
    """Pairs at any λ of [0, 1]."""
    return lams().map(Space.pair(0.0).recipe)


def spaces(most: int = 2) -> st.SearchStrategy[Space]:
    """Two parents, or up to `most`; α in steps of 1e-4, with room for a hundred candidates."""
    alphas = st.integers(0, 9_900).map(lambda n: n / 10_000)
    return st.builds(Space.simplex, st.integers(2, most), alphas)


def weights(count: int) -> st.SearchStrategy[np.ndarray]:
    """Merge weights of `count` parents, not rounded, corners and faces among them."""
    parts = st.lists(st.integers(0, 10**6), min_size=count, max_size=count).filter(any)
    return parts.map(lambda parts: np.array(parts) / sum(parts))


def choices(
    levels: Sequence[Sequence[float]],
    right: Sequence[int | set[int]],
    *,
    sizes: Sequence[Sequence[float]] = (),
    gold: Sequence[int] | None = None,
    shares: Sequence[float] = (),
    task: str = "quiz",
    weight: float = 1.0,
) -> Items:
    """A multiple-choice task as lm-eval tells of it.

    Args:
        levels: log-likelihoods, those of an item's choices together.
        right: each item's right choice or choices.
        sizes: what the log-likelihoods are divided by.
        gold: what is known of the right choices; all of it when there is one per item.
        shares: equal ones by default.
        task: its name.
        weight: of the task in the score.
    """
    each = sizes if len(sizes) else [np.ones(len(row)) for row in levels]
    wins = [int(np.argmax(np.divide(row, size))) for row, size in zip(levels, each, strict=True)]
    sets = [{one} if isinstance(one, int) else one for one in right]
    count = len(levels)
    if gold is None:
        gold = [one if isinstance(one, int) else -1 for one in right]
    return Items(
        task=task,
        metric="acc_norm,none" if len(sizes) else "acc,none",
        weight=weight,
        ids=tuple(map(str, range(count))),
        values=tuple(float(win in its) for win, its in zip(wins, sets, strict=True)),
        shares=tuple(shares) or (1.0 / count,) * count,
        log_likelihoods=tuple(tuple(map(float, row)) for row in levels),
        gold=tuple(gold),
        sizes=tuple(tuple(map(float, row)) for row in sizes),
    )


def scored(*items: Items) -> Score:
    """The score that the items add up to."""
    return Score(
        math.fsum(i.weight * float(np.dot(i.shares, i.values)) for i in items), 0.01, items
    )


class Quiz:
    """Items whose log-likelihoods are smooth: linear in λ, bent by Σ λᵢ·λⱼ, and `wild`.

    Merging helps: the right choice gains most from being bent.
    """

    def __init__(self, seed, *, count=2, items=200, bend=0.5, wild=0.0, side=0.0):
        rng = np.random.default_rng(seed)
        self.right = rng.integers(4, size=items).tolist()
        gold = np.eye(4)[self.right]
        # what the parents have in common, and what not; `side` favours the newest
        self.ends = rng.normal(size=(items, 4, 1)) + 0.7 * rng.normal(size=(items, 4, count))
        self.ends[..., -1] += side * gold
        self.bend = bend * (gold + rng.normal(size=(items, 4)))
        self.wild = wild * rng.normal(size=(items, 4))
        self.phase = rng.uniform(0.0, 6.3, size=(items, 4))

    def levels(self, lam):
        """Log-likelihoods at merge weights, shape (items, 4)."""
        lam = np.asarray(lam)
        products = (1.0 - lam @ lam) / 2.0
        waves = self.wild * np.sin(self.phase + 12.0 * lam @ np.arange(1, len(lam) + 1))
        return self.ends @ lam + 4.0 * self.bend * products + waves

    def accuracy(self, points):
        """The share of items that are right at each of some points."""
        return np.array([np.mean(self.levels(lam).argmax(axis=1) == self.right) for lam in points])

    def score(self, lam, **options):
        """The score of a merge, as lm-eval tells of it."""
        return scored(choices(self.levels(lam).tolist(), self.right, **options))

    def trials(self, points):
        """A history of merges at given points."""
        space = Space.simplex(self.ends.shape[2], 0.0)
        recipes = [space.recipe(point) for point in points]
        return [Trial(i, r, self.score(r.lam)) for i, r in enumerate(recipes)]


@st.composite
def histories(draw, space: Space, *, least: int = 0, most: int = 9) -> list[Trial]:
    """Trials of a search: the start first, then distinct candidates; with items or without.

    Some of them failed, but never the first: a search without its parents' scores has no result.
    """
    size = draw(st.integers(least, most))
    candidates = st.sampled_from(list(map(tuple, space.candidates().tolist())))
    later = draw(st.lists(candidates, min_size=size, unique=True))
    chosen = list(dict.fromkeys((*space.start(), *map(space.recipe, later))))[:size]
    if draw(st.booleans()):
        quiz = Quiz(draw(st.integers(0, 9)), count=space.count, items=20)
        values = [draw(st.sampled_from([quiz.score(recipe.lam), None])) for recipe in chosen]
        values[:1] = [quiz.score(recipe.lam) for recipe in chosen[:1]]
    else:
        scores = st.none() | st.floats(0.2, 0.8).map(lambda value: Score(value, 0.01))
        values = [draw(scores.filter(bool) if i == 0 else scores) for i in range(len(chosen))]
    return [Trial(i, r, s) for i, (r, s) in enumerate(zip(chosen, values, strict=True))]


@st.composite
def observations(draw, *, least: int = 1, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Weights of two to four parents, in steps of 1e-4 and perhaps repeated; a score for each."""
    space = Space.simplex(draw(st.integers(2, 4)), 0.0)
    points = draw(st.lists(weights(space.count), min_size=least, max_size=most))
    scores = draw(
        st.lists(
            st.integers(-2_000, 2_000).map(lambda n: n / 1_000),
            min_size=len(points),
            max_size=len(points),
        )
    )
    return np.array([space.recipe(point).lam for point in points]), np.array(scores)


@st.composite
def parents(draw, dtype: torch.dtype, *, count: int = 2) -> list[torch.Tensor]:
    """Tensors of one shape and of any finite bits; scalars and empty ones too."""
    carrier, exponent = BITS[dtype]
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    bits = arrays.from_dtype(np.dtype(carrier)).filter(lambda b: int(b) & exponent != exponent)
    drawn = [draw(arrays.arrays(carrier, shape, elements=bits)) for _ in range(count)]
    signed = [torch.from_numpy(np.asarray(d).view(f"i{d.dtype.itemsize}")) for d in drawn]
    # NumPy's empty arrays have strides that torch's never have
    return [s.clone(memory_format=torch.contiguous_format).view(dtype) for s in signed]


@st.composite
def apart(draw, *, most: int = 4, least: int = 2) -> Distance:
    """Parents of a few layers, each of a few numbers; zeros and equal parents among them."""
    count = draw(st.integers(least, most))
    layers = []
    for number in range(draw(st.integers(1, 3))):
        shape = (count, draw(st.integers(1, 3)))
        points = draw(arrays.arrays(np.float64, shape, elements=st.integers(-9, 9)))
        squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
        norms = (points**2).sum(axis=1)
        rows = tuple(map(tuple, squares.tolist()))
        layers.append(LayerDistance(f"layer {number}", tuple(norms.tolist()), rows))
    return Distance(tuple(layers))


@st.composite
def paired_items(draw, *, binary: bool = False) -> tuple[Items, Items]:
    """One task's items as two models answered them."""
    answers = st.sampled_from([0.0, 1.0]) if binary else st.floats(-8, 8, width=16)
    pairs = draw(st.lists(st.tuples(answers, answers), min_size=2, max_size=40))
    ids = tuple(map(str, range(len(pairs))))
    shares = (1 / len(pairs),) * len(pairs)
    first, second = zip(*pairs, strict=True)
    return (
        Items("task", "acc,none", 1.0, ids, first, shares),
        Items("task", "acc,none", 1.0, ids, second, shares),
    )


def model_names() -> st.SearchStrategy[str]:
    """Names of registered models, as `--model` takes them."""
    return st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,20}", fullmatch=True)


def versions() -> st.SearchStrategy[Version]:
    """Registered model versions."""
    return st.builds(Version, model_names(), st.integers(1, 10**6))


def aliases() -> st.SearchStrategy[str]:
    """Aliases that MLflow takes: not `latest`, not `v12`."""
    names = st.from_regex(r"[A-Za-z_-][A-Za-z0-9_-]{0,20}", fullmatch=True)
    return names.filter(lambda name: name.lower() != "latest" and not name[1:].isdigit())


def version_refs() -> st.SearchStrategy[VersionRef]:
    """Versions as users name them."""
    numbers = st.integers(1, 10**6).map(lambda n: VersionRef(n, None))
    return numbers | aliases().map(lambda alias: VersionRef(None, alias))


def targets() -> st.SearchStrategy[Target]:
    """Where a promotion can point."""
    stages = st.sampled_from(["Staging", "Production"])
    return (
        st.builds(Target, st.just("alias"), aliases())
        | st.builds(Target, st.just("stage"), stages)
        | st.builds(Target, st.just("model"), aliases(), model_names())
    )


def requests() -> st.SearchStrategy[dict]:
    """Search requests: names to digests, numbers and lists of them."""
    values = st.text(max_size=8) | st.integers() | st.floats(allow_nan=False) | st.none()
    fields = st.text(max_size=8)
    return st.dictionaries(fields, values | st.lists(values, max_size=3), min_size=1, max_size=5)


def digests() -> st.SearchStrategy[Digests]:
    """Digests of a few tensors and files."""
    hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
    names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1)
    named = st.dictionaries(names, hexes, max_size=3)
    return st.builds(Digests, hexes.map("sha256:{}".format), named, named)


def manifests() -> st.SearchStrategy[Manifest]:
    """Manifests of two to four parents, with and without digests and a search."""
    uris = versions().map(lambda version: version.uri) | st.just("/checkpoints/12")
    sources = st.builds(
        Source,
        uris,
        st.floats(0, 1),
        st.none() | digests(),
        st.sampled_from(["", "0a1b"]),
        st.sampled_from(["", "s3://bucket/12"]),
    )
    search = st.just({}) | st.just({"key": "k", "run_id": "r", "held_out": {"0x1p-1": 0.5}})
    return st.builds(
        Manifest,
        st.just("") | model_names(),
        st.just("linear"),
        st.lists(sources, min_size=2, max_size=4).map(tuple),
        st.none() | digests(),
        st.just({}) | st.just({"config.json": "0" * 64}),
        search,
        st.just({"torch": "2.13.0"}),
    )


def tensor_sets() -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """One to four small tensors by name, empty ones and scalars among them."""
    shapes = st.lists(st.integers(0, 3), max_size=3)
    dtypes = st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]
    )
    tensors = st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), shapes, dtypes)
    return st.dictionaries(st.sampled_from("abcdé"), tensors, min_size=1, max_size=4)
