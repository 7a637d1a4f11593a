import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toy
from mlflow_soup.records import LayerDistance
from mlflow_soup.weights import distance
from mlflow_soup.weights.distance import layer_of, measure
from mlflow_soup.weights.find import find_checkpoint
from strategies import FEW, apart

FIRST, SECOND = "model.layers.0.mlp.weight", "model.layers.10.mlp.weight"


def opened(folder, *parents):
    """Open checkpoints made of the given tensors."""
    return [
        find_checkpoint(toy.bare(folder / f"v{i}", own), f"v{i}") for i, own in enumerate(parents)
    ]


def normal(seed, dtype=torch.float32):
    """Tensors of a small model; some are larger than a chunk, some are equal in all parents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (70, 1000), FIRST: (7, 3), SECOND: (), "norm.bias": (0, 2)}
    own = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}
    own["model.layers.10.gate"] = torch.ones(5, dtype=dtype)
    return own | {"model.layers.10.mask": torch.ones(2, dtype=torch.bool)}


def test_two_numbers_by_hand(tmp_path):
    old, new = {FIRST: torch.tensor([3.0, 4.0])}, {FIRST: torch.tensor([3.0, 0.0])}
    (layer,) = measure(opened(tmp_path, old, new)).layers
    assert layer == LayerDistance("layer 0", (25.0, 9.0), ((0.0, 16.0), (16.0, 0.0)))
    assert layer.relative(0, 1) == 4 / 5
    assert layer.relative(1, 0) == 4 / 3
    assert layer.cosine(0, 1) == layer.cosine(1, 0) == pytest.approx(3 / 5)
    assert layer.delta_cosine(0, 1) == pytest.approx(-4 / 5)  # (3, 4) and (0, −4)
    assert layer.delta_cosine(1, 0) == 0.0  # (3, 0) and (0, 4)


def test_deltas_that_turn(tmp_path):
    parents = [{FIRST: torch.tensor(at)} for at in ([0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [3.0, 2.0])]
    (layer,) = measure(opened(tmp_path, *parents)).layers
    assert layer.turn(0, 1, 2) == 0.0  # a right angle
    assert layer.turn(0, 1, 0) == -1.0  # straight back
    assert layer.turn(1, 2, 3) == 0.0
    assert layer.turn(0, 1, 3) == pytest.approx(math.sqrt(1 / 2))


def test_zeros_have_no_direction():
    layer = LayerDistance("other", (0.0, 4.0, 0.0), ((0, 4, 0), (4, 0, 4), (0, 4, 0)))
    assert (layer.relative(0, 1), layer.relative(1, 0), layer.relative(0, 2)) == (math.inf, 1, 0)
    assert (layer.cosine(0, 1), layer.cosine(0, 2)) == (0.0, 1.0)
    assert layer.delta_cosine(0, 1) == layer.turn(0, 2, 1) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_distances_equal_plain_arithmetic(tmp_path, dtype):
    parents = [normal(seed, dtype) for seed in range(3)]
    measured = measure(opened(tmp_path, *parents))
    assert [layer.name for layer in measured.layers] == [
        *("embedding", "layer 0", "layer 10", "other")
    ]
    for layer in measured.layers:
        names = [n for n, t in parents[0].items() if layer_of(n) == layer.name if t.dtype == dtype]
        flat = [np.concatenate([own[n].double().numpy().ravel() for n in names]) for own in parents]
        differences = [[((b - a) ** 2).sum() for b in flat] for a in flat]
        np.testing.assert_allclose(layer.norms, [(a**2).sum() for a in flat], rtol=1e-12)
        np.testing.assert_allclose(layer.squares, differences, rtol=1e-12)
    whole = measured.whole
    flat = [
        torch.cat([t.double().reshape(-1) for t in own.values() if t.dtype == dtype])
        for own in parents
    ]
    for i, j in permutations(range(3), 2):
        delta = flat[j] - flat[i]
        cosine = torch.nn.functional.cosine_similarity
        assert whole.relative(i, j) == pytest.approx(float(delta.norm() / flat[i].norm()))
        assert whole.cosine(i, j) == pytest.approx(float(cosine(flat[i], flat[j], dim=0)))
        assert whole.delta_cosine(i, j) == pytest.approx(float(cosine(flat[i], delta, dim=0)))
        on = flat[3 - i - j] - flat[j]
        turned = float(cosine(delta, on, dim=0))
        assert whole.turn(i, j, 3 - i - j) == pytest.approx(turned)


def test_parents_too_close_for_inner_products_have_a_correct_distance(tmp_path):
    old = torch.full((1000,), 1.0, dtype=torch.float64)
    new = old + 1e-12
    whole = measure(opened(tmp_path, {FIRST: old}, {FIRST: new})).whole
    assert whole.relative(0, 1) == pytest.approx(float(new[0] - 1))


def test_distances_do_not_depend_on_chunks_or_shards(tmp_path, monkeypatch):
    parents = [normal(seed) for seed in range(2)]
    whole = measure(opened(tmp_path / "one", *parents))
    monkeypatch.setattr(distance, "CHUNK", 14)
    for folder in (checkpoints := opened(tmp_path / "two", *parents)):
        toy.shard(folder.weights)
    again = measure([find_checkpoint(checkpoint.weights, "v") for checkpoint in checkpoints])
    for a, b in zip(whole.layers, again.layers, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose(a.norms, b.norms)
        np.testing.assert_allclose(a.squares, b.squares)


def test_old_pythias_constants_are_left_out(tmp_path):
    own = normal(0) | {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-math.inf, dtype=torch.float16)
    }
    assert measure(opened(tmp_path / "a", own, own)) == measure(
        opened(tmp_path / "b", normal(0), normal(0))
    )


def test_the_distance_of_a_checkpoint_from_itself_is_zero(tmp_path):
    for layer in measure(opened(tmp_path, normal(0), normal(0))).layers:
        assert layer.relative(0, 1) == 0.0
        assert layer.cosine(0, 1) == 1.0


def test_relative_distances_do_not_change_when_all_parents_are_scaled(tmp_path):
    parents = [normal(seed, torch.bfloat16) for seed in range(2)]
    large = [{n: 2 * t if t.dtype == torch.bfloat16 else t for n, t in p.items()} for p in parents]
    small, grown = (
        measure(opened(tmp_path / folder, *own))
        for folder, own in (("small", parents), ("grown", large))
    )
    for a, b in zip(small.layers, grown.layers, strict=True):
        assert a.relative(0, 1) == b.relative(0, 1)
        assert a.cosine(0, 1) == b.cosine(0, 1)


@FEW
@given(measured=apart(), scale=st.sampled_from([0.25, 3.0, 1e3]))
def test_laws_of_distances(measured, scale):
    whole = measured.whole
    count = len(whole.norms)
    for layer in (*measured.layers, whole):
        grown = replace(
            layer,
            norms=tuple(scale**2 * n for n in layer.norms),
            squares=tuple(tuple(scale**2 * s for s in row) for row in layer.squares),
        )
        for i, j in permutations(range(count), 2):
            assert -1.0 <= layer.cosine(i, j) == layer.cosine(j, i) <= 1.0
            assert layer.relative(i, j) == pytest.approx(grown.relative(i, j))
            assert layer.cosine(i, j) == pytest.approx(grown.cosine(i, j), abs=1e-9)
            assert layer.delta_cosine(i, j) == pytest.approx(grown.delta_cosine(i, j), abs=1e-9)
            assert layer.squares[i][j] == layer.squares[j][i]
        for i in range(count):
            assert (layer.relative(i, i), layer.cosine(i, i)) == (0.0, 1.0)
    for i in range(count):
        assert whole.norms[i] == pytest.approx(sum(layer.norms[i] for layer in measured.layers))
        for j in range(count):
            parts = [layer.squares[i][j] for layer in measured.layers]
            assert whole.squares[i][j] == pytest.approx(sum(parts))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt_neox.embed_in.weight", "embedding"),
        ("gpt_neox.layers.7.attention.query_key_value.weight", "layer 7"),
        ("gpt_neox.final_layer_norm.bias", "other"),
        ("embed_out.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.31.self_attn.q_proj.weight", "layer 31"),
        ("model.norm.weight", "other"),
        ("lm_head.weight", "head"),
        ("transformer.wte.weight", "embedding"),
        ("wpe.weight", "embedding"),
        ("h.3.ln_1.weight", "layer 3"),
        ("transformer.h.11.mlp.c_fc.weight", "layer 11"),
        ("transformer.ln_f.weight", "other"),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", "layer 2"),
        ("transformer.word_embeddings.weight", "embedding"),
        ("model.decoder.embed_positions.weight", "embedding"),
        ("backbone.layers.0.mixer.in_proj.weight", "layer 0"),
        ("a", "other"),
    ],
)
def test_a_tensor_belongs_to_the_layer_in_its_name(name, layer):
    assert layer_of(name) == layer


def test_layers_have_the_order_of_the_network(tmp_path):
    names = ["lm_head.w", "h.10.w", "h.9.w", "ln_f.w", "wte.w"]
    own = {name: torch.ones(1) for name in names}
    measured = measure(opened(tmp_path, own, own))
    assert [layer.name for layer in measured.layers] == [
        *("embedding", "layer 9", "layer 10", "other", "head")
    ]


def test_real_checkpoints_have_their_layers(checkpoints):
    measured = measure([find_checkpoint(folder, "v") for folder in checkpoints])
    assert [layer.name for layer in measured.layers] == [
        *("embedding", "layer 0", "layer 1", "other", "head")
    ]
    # v1 and v2 are independent noise; v3 is v2 except for the embedding of the digits
    for layer in measured.layers[1:]:
        assert layer.squares[1][2] == 0.0
    assert all(layer.relative(0, 1) > 0.0 for layer in measured.layers if layer.name != "other")
