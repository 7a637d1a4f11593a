"""One Hypothesis strategy per noun of the domain."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mlflow_soup.records import (
    Digests,
    Items,
    Manifest,
    Recipe,
    Score,
    Source,
    Trial,
    Version,
)
from mlflow_soup.space import Space
from mlflow_soup.spec import Target, VersionRef

# for laws whose every example fits Gaussian processes: few, and the same in every run
FEW = settings(max_examples=25, deadline=None, derandomize=True)

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


def spaces() -> st.SearchStrategy[Space]:
    """[α, 1] with α in steps of 1e-4 and room for at least a hundred candidates."""
    return st.integers(0, 9_900).map(lambda n: Space.pair(n / 10_000))


@st.composite
def histories(draw, space: Space, *, least: int = 0, most: int = 9) -> list[Trial]:
    """Trials of a search: the start first, then distinct λ of [α, 1].

    Some of them failed, but never the first: a search without its parents' scores has no result.
    """
    size = draw(st.integers(least, most))
    later = draw(st.lists(st.sampled_from(space.candidates().tolist()), min_size=size, unique=True))
    chosen = list(dict.fromkeys((*space.start(), *map(space.recipe, later))))[:size]
    scores = st.none() | st.floats(0.2, 0.8).map(lambda value: Score(value, 0.01))
    outcomes = [draw(scores.filter(bool) if i == 0 else scores) for i in range(len(chosen))]
    return [Trial(i, r, s) for i, (r, s) in enumerate(zip(chosen, outcomes, strict=True))]


@st.composite
def observations(draw, *, least: int = 1, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """λ, in steps of 1e-4 and perhaps repeated, and a score for each."""
    points = draw(st.lists(lams(), min_size=least, max_size=most))
    scores = draw(
        st.lists(
            st.integers(-2_000, 2_000).map(lambda n: n / 1_000),
            min_size=len(points),
            max_size=len(points),
        )
    )
    return np.array(points), np.array(scores)


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
