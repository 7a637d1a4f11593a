"""Fisher-weighted averaging and RegMean, against numbers by hand and NumPy's solvers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.statistics import averaging
from mlflow_soup.statistics.averaging import fisher, regmean
from mlflow_soup.weights.mix import Scratch, mix, same_bytes

DTYPES = sorted(s.BITS, key=str)


def drawn(count, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def informations(count, *shape, seed=1):
    """Random Fisher information, spread over twelve powers of ten."""
    return [(9 * tensor).exp() * 1e-6 for tensor in drawn(count, *shape, seed=seed)]


def gram(inputs):
    return inputs.T @ inputs / len(inputs)


# -- fisher ----------------------------------------------------------------------------------------


def test_each_element_is_weighted_by_its_own_information():
    parents = [torch.tensor([0.0, 0.0, 8.0]), torch.tensor([4.0, 4.0, 0.0])]
    known = [torch.tensor([1.0, 3.0, 1.0]), torch.tensor([3.0, 1.0, 0.0])]
    # (1·0 + 3·4) / 4, (3·0 + 1·4) / 4, and only the first parent has information on the last
    assert fisher(parents, known, floor=0.0).tolist() == [3.0, 1.0, 8.0]


def test_the_floor_is_added_to_all_informations():
    parents = [torch.tensor([0.0]), torch.tensor([6.0])]
    known = [torch.tensor([1.0]), torch.tensor([3.0])]
    assert fisher(parents, known, floor=1.0).item() == 4.0  # (2·0 + 4·6) / 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_fisher_is_the_weighted_mean_within_rounding(dtype, count):
    parents, known = drawn(count, 40, 50, dtype=dtype), informations(count, 40, 50)
    wide = np.stack([parent.double().numpy() for parent in parents])
    weights = np.stack([f.double().numpy() for f in known]) + 1e-3
    expected = (wide * weights).sum(0) / weights.sum(0)
    found = fisher(parents, known, floor=1e-3)
    assert (found.dtype, found.shape) == (dtype, (40, 50))
    # half a unit of the dtype plus the earlier roundings, relative to the largest parent
    work = 4 * count * (2.0**-53 if dtype == torch.float64 else 2.0**-24)
    slack = (torch.finfo(dtype).eps + work) * np.abs(wide).max(0)
    assert (np.abs(found.double().numpy() - expected) <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_any_information_fisher_is_the_plain_mean(dtype):
    parents, nothing = drawn(2, 100, dtype=dtype), [torch.zeros(100)] * 2
    torch.testing.assert_close(fisher(parents, nothing, floor=0.0), mix(parents, (0.5, 0.5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(choices=st.data())
def test_elements_that_are_equal_in_all_parents_do_not_change(dtype, choices):
    old, new = choices.draw(s.parents(dtype))
    new = torch.where(torch.arange(new.numel()).view(new.shape) % 2 == 0, old, new)
    found = fisher([old, new, new], informations(3, *old.shape), floor=1e-6)
    alike = old == new
    assert torch.equal(found[alike], new[alike])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1024, None])
def test_the_bits_do_not_depend_on_chunks_or_threads(chunk, threads):
    parents, known = drawn(3, 5_000, dtype=torch.bfloat16), informations(3, 5_000)
    expected = fisher(parents, known, floor=1e-6, scratch=Scratch(5_000))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = fisher(parents, known, floor=1e-6, scratch=Scratch(chunk))
    torch.set_num_threads(before)
    assert same_bytes(found, expected)


def test_information_of_one_parent_at_any_scale_gives_no_nan():
    parents = drawn(2, 4)
    for information in (1e-45, 1e-38, 1e-20, 1e20, 1e37):
        found = fisher(parents, [torch.full((4,), information), torch.zeros(4)], floor=0.0)
        assert torch.isfinite(found).all()


# -- regmean ---------------------------------------------------------------------------------------


def test_a_single_weight_is_weighted_by_the_squares_of_its_inputs():
    weights = [torch.tensor([[1.0]]), torch.tensor([[4.0]])]
    grams = [torch.tensor([[1.0]]), torch.tensor([[2.0]])]
    assert regmean(weights, grams, ridge=0.0).item() == 3.0  # (1·1 + 2·4) / 3


def test_regmean_fits_the_outputs_of_its_parents_by_least_squares():
    weights, inputs = drawn(3, 20, 8, seed=2), drawn(3, 50, 8, seed=3)
    found = regmean(weights, [gram(x.double()).float() for x in inputs], scale=1.0, ridge=0.0)
    answers = [x @ w.T for x, w in zip(inputs, weights, strict=True)]
    stacked, wanted = (torch.cat(parts).double().numpy() for parts in (inputs, answers))
    expected, *_ = np.linalg.lstsq(stacked, wanted)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 2_500])
@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9])
def test_regmean_solves_the_normal_equations(rows, scale):
    weights, inputs = drawn(2, rows, 8, seed=2), drawn(2, 5, 8, seed=3)  # fewer tokens than inputs
    grams = [gram(x) for x in inputs]
    found = regmean(weights, grams, scale=scale, ridge=0.0)
    shrunk = [g.double().numpy() for g in grams]
    shrunk = [scale * g + (1 - scale) * np.diag(np.diag(g)) for g in shrunk]
    right = sum(g @ w.T.double().numpy() for g, w in zip(shrunk, weights, strict=True))
    expected = np.linalg.solve(sum(shrunk), right).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_inputs_of_zero_give_the_plain_mean():
    weights, inputs = drawn(2, 5, 8, seed=2), drawn(2, 50, 8, seed=3)
    mean = torch.stack(weights).mean(0)
    assert torch.equal(regmean(weights, [torch.zeros(8, 8)] * 2), mean)
    for x in inputs:
        x[:, 3] = 0.0
    found = regmean(weights, [gram(x) for x in inputs])
    assert torch.equal(found[:, 3], mean[:, 3])
    assert not torch.isclose(found[:, :3], mean[:, :3]).any()


def test_a_larger_ridge_is_closer_to_the_plain_mean():
    weights, grams = drawn(2, 5, 8, seed=2), [gram(x) for x in drawn(2, 50, 8, seed=3)]
    mean = torch.stack(weights).mean(0)
    off = [float((regmean(weights, grams, ridge=r) - mean).norm()) for r in (0.0, 0.1, 1.0, 1e9)]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-6


def test_inputs_that_do_not_determine_the_layer_are_refused():
    weights, grams = drawn(2, 5, 8), [torch.ones(8, 8)] * 2
    with pytest.raises(SpecError, match="inputs do not determine 'w' at scale 1"):
        regmean(weights, grams, scale=1.0, ridge=0.0, name="w")
    assert torch.isfinite(regmean(weights, grams, scale=1.0, ridge=1e-6)).all()


# -- both ------------------------------------------------------------------------------------------


def by_fisher(tensors, name=""):
    return fisher(tensors, informations(len(tensors), *tensors[0].shape), floor=1e-6, name=name)


def by_regmean(tensors, name=""):
    width = tensors[0].shape[-1]
    return regmean(tensors, [gram(x) for x in drawn(len(tensors), 50, width, seed=3)], name=name)


METHODS = pytest.mark.parametrize("average", [by_fisher, by_regmean])


@METHODS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_parents_give_the_same_bytes(average, dtype):
    (tensor,) = drawn(1, 6, 8, dtype=dtype)
    assert same_bytes(average([tensor, tensor.clone(), tensor.clone()]), tensor)


@METHODS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_is_kept_and_the_parents_are_not_modified(average, dtype):
    tensors = drawn(2, 6, 8, dtype=dtype)
    before = [tensor.clone() for tensor in tensors]
    assert average(tensors).dtype == dtype
    assert all(map(same_bytes, tensors, before))


@METHODS
def test_the_memory_layout_of_a_tensor_does_not_matter(average):
    tensors = drawn(2, 6, 8)
    turned = [tensor.T.contiguous().T for tensor in tensors]
    torch.testing.assert_close(average(turned), average(tensors), rtol=0, atol=1e-6)


@METHODS
def test_differing_integers_are_refused_by_name(average):
    tensors = [torch.eye(8).long(), torch.ones(8, 8).long()]
    with pytest.raises(ParentError, match="parents differ in 'steps'"):
        average(tensors, name="steps")


def test_statistics_are_not_modified():
    weights, grams = drawn(2, 6, 8), [gram(x.double()) for x in drawn(2, 50, 8)]
    known = informations(2, 6, 8)
    before = [tensor.clone() for tensor in (*grams, *known)]
    regmean(weights, grams)
    fisher(weights, known, floor=1.0)
    assert all(map(same_bytes, (*grams, *known), before))


def test_each_row_is_solved_separately(monkeypatch):
    weights, grams = drawn(2, 9, 8, seed=2), [gram(x) for x in drawn(2, 50, 8, seed=3)]
    expected = regmean(weights, grams)
    monkeypatch.setattr(averaging, "_BLOCK", 2)
    torch.testing.assert_close(regmean(weights, grams), expected, rtol=1e-6, atol=1e-7)
