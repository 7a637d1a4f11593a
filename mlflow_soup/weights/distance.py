"""How far apart parents are, layer by layer, in one pass over their files.

A soup of parents that are far apart is usually worse than each of them. The distance shows this
before a search, for the cost of reading the parents once.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from mlflow_soup.records import Distance, LayerDistance
from mlflow_soup.weights.checkpoint import MAY_BE_INFINITE, Checkpoint
from mlflow_soup.weights.mix import CHUNK, Scratch

# tensors outside the numbered layers are recognised by parts of their names
HEADS = {"lm_head", "embed_out", "output", "head"}
EMBEDDINGS = {"wte", "wpe"}  # GPT-2; the names of other embeddings contain `emb`


def layer_of(name: str) -> str:
    """The layer of a tensor, by its name: the first number in it, or the kind of tensor.

    `gpt_neox.layers.7.…`, `model.layers.7.mlp.experts.3.…` and `h.7.…` are all `layer 7`. Tensors
    without a number are `embedding`, `head` or `other`; the last norm, for example, is `other`.
    """
    parts = name.split(".")
    for part in parts:
        if part.isdecimal():
            return f"layer {int(part)}"
    if HEADS & {*parts}:
        return "head"
    embeds = any(part in EMBEDDINGS or "emb" in part for part in parts)
    return "embedding" if embeds else "other"


def _depth(layer: str) -> tuple[int, int]:
    """A sort key: the layer's place on the way from the tokens to the logits."""
    kind, _, number = layer.partition(" ")
    return ("embedding", "layer", "other", "head").index(kind), int(number or 0)


@torch.no_grad()
def measure(parents: Sequence[Checkpoint]) -> Distance:
    """The squared norms and squared distances of all parents, layer by layer.

        ‖Θ_i‖² = Σ θ_i²,   ‖Θ_j − Θ_i‖² = Σ (θ_j − θ_i)²,   in fp64, over floating-point tensors

    Each file is read once, in chunks: the memory depends only on the number of parents. A tensor
    that is saved twice, such as a head that is tied to the embedding, counts twice. The constants
    of `MAY_BE_INFINITE` are left out.

    Args:
        parents: the checkpoints, oldest first, already checked to be compatible; all other values
            are finite.
    """
    weights = [dict(parent.read()) for parent in parents]
    count = len(weights)
    # the kernel's chunks are sized for fp32; fp64 numbers are twice as large
    scratch = Scratch(CHUNK // 2 * torch.get_num_threads())
    sums: dict[str, np.ndarray] = {}  # squared norms on the diagonal, squared distances above it
    for name in tqdm(weights[0], "distance", unit="tensor", disable=None):
        tensors = [own[name].reshape(-1) for own in weights]
        if not tensors[0].is_floating_point() or name.endswith(MAY_BE_INFINITE):
            continue
        total = sums.setdefault(layer_of(name), np.zeros((count, count)))
        for start in range(0, len(tensors[0]), scratch.chunk):
            parts = [tensor[start : start + scratch.chunk] for tensor in tensors]
            rows = [
                scratch.row(torch.float64, k, len(part)).copy_(part) for k, part in enumerate(parts)
            ]
            spare = scratch.row(torch.float64, count, len(parts[0]))
            for i, j in itertools.combinations_with_replacement(range(count), 2):
                step = rows[i] if i == j else torch.sub(rows[j], rows[i], out=spare)
                total[i, j] += float(torch.dot(step, step))
    return Distance(tuple(_layer(name, sums[name]) for name in sorted(sums, key=_depth)))


def _layer(name: str, sums: np.ndarray) -> LayerDistance:
    above = np.triu(sums, 1)
    squares = (above + above.T).tolist()
    return LayerDistance(name, tuple(sums.diagonal().tolist()), tuple(map(tuple, squares)))
