"""The kernel, bit for bit: NumPy in separate operations says what every dtype must come to."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.errors import ParentError
from mlflow_soup.merge import mix, same_bytes

DTYPES = sorted(s.BITS, key=str)


def bits(tensor):
    """A tensor's bits as unsigned integers; torch only carries them."""
    carrier, _ = s.BITS[tensor.dtype]
    signed = getattr(torch, np.dtype(carrier).name.removeprefix("u"))
    return tensor.contiguous().view(signed).numpy().view(carrier)


def widened(tensor):
    """A tensor's values in the type its products are formed in."""
    raw = bits(tensor)
    if tensor.dtype == torch.bfloat16:  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == torch.float16:
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float64 if tensor.dtype == torch.float64 else np.float32)


def narrowed(values, dtype):
    """Bits of the nearest number of `dtype`, ties to even."""
    if dtype == torch.bfloat16:
        wide = values.view(np.uint32)
        # half of the lost part, and the kept part's last bit for ties; infinities stay
        up = (wide + np.uint32(0x7FFF) + ((wide >> 16) & 1)) >> 16
        return np.where(np.isinf(values), wide >> 16, up).astype(np.uint16)
    with np.errstate(over="ignore"):
        carrier, _ = s.BITS[dtype]
        narrow = values.astype(np.float16) if dtype == torch.float16 else values
    return narrow.view(carrier)


def expected_bits(tensors, coefficients):
    """Σ c·Θ by the book: each product and each sum rounded, then once to the parents' dtype."""
    dtype = tensors[0].dtype
    work = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore", under="ignore"):
        total = widened(tensors[0]) * work(coefficients[0])
        for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
            product = widened(tensor) * work(coefficient)
            total = total + product
    return narrowed(np.asarray(total, work), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data(), recipe=s.recipes())
def test_a_soup_of_two_has_the_bits_of_separate_rounded_operations(dtype, drawn, recipe):
    tensors = drawn.draw(s.parents(dtype))
    soup = mix(tensors, recipe.lam)
    assert (soup.dtype, soup.shape) == (dtype, tensors[0].shape)
    if 1.0 not in recipe.lam and not same_bytes(*tensors):
        np.testing.assert_array_equal(bits(soup), expected_bits(tensors, recipe.lam))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data())
def test_a_soup_of_three_adds_its_parents_oldest_first(dtype, drawn):
    tensors = drawn.draw(s.parents(dtype, count=3))
    lam = (0.2, 0.3, 0.5)
    if not same_bytes(tensors[0], tensors[1]):
        np.testing.assert_array_equal(bits(mix(tensors, lam)), expected_bits(tensors, lam))


def test_half_way_between_neighbours_goes_to_the_even_one():
    # bf16 has 8 significant bits: 1 + 1/128 and 1 + 2/128 are neighbours, so are 1 and 1 + 1/128
    old = torch.tensor([1 + 1 / 128, 1.0], dtype=torch.bfloat16)
    new = torch.tensor([1 + 2 / 128, 1 + 1 / 128], dtype=torch.bfloat16)
    assert mix([old, new], (0.5, 0.5)).tolist() == [1 + 2 / 128, 1.0]


def test_double_precision_is_mixed_in_double_precision():
    old = torch.tensor([1.0], dtype=torch.float64)
    new = torch.tensor([1.0 + 2**-50], dtype=torch.float64)  # fp32 sees no difference
    assert mix([old, new], (0.5, 0.5)).item() == 1.0 + 2**-51


def test_products_and_sums_are_not_fused():
    # λ = 0.1 as fp32; fused multiply-add would keep the product's lost digits
    rng = np.random.default_rng(0)
    old, new = (torch.from_numpy(rng.standard_normal(4096).astype(np.float32)) for _ in range(2))
    separate = old.numpy() * np.float32(0.9) + new.numpy() * np.float32(0.1)
    exact_product = new.numpy().astype(float) * float(np.float32(0.1))
    fused = (old.numpy() * np.float32(0.9) + exact_product).astype(np.float32)
    assert (separate != fused).any()  # the two ways do differ
    np.testing.assert_array_equal(mix([old, new], (0.9, 0.1)).numpy(), separate)


ODD = {
    "floats": (torch.tensor([float("nan"), -0.0, float("-inf")]), torch.tensor([1.0, 0.0, 2.0])),
    "integers": (torch.tensor([1, 2]), torch.tensor([3, 4])),
    "booleans": (torch.tensor([True, False]), torch.tensor([False, False])),
}


@pytest.mark.parametrize("name", sorted(ODD))
@pytest.mark.parametrize(("lam", "chosen"), [((1.0, 0.0), 0), ((0.0, 1.0), 1)])
def test_all_the_weight_on_one_parent_gives_its_bytes(name, lam, chosen):
    assert same_bytes(mix(ODD[name], lam), ODD[name][chosen])


@pytest.mark.parametrize("tensor", [first for first, _ in ODD.values()], ids=sorted(ODD))
@given(recipe=s.recipes())
def test_parents_that_agree_come_out_unchanged(tensor, recipe):
    assert same_bytes(mix([tensor, tensor.clone()], recipe.lam), tensor)


@pytest.mark.parametrize("name", ["booleans", "integers"])
def test_differing_integers_are_refused_by_name(name):
    with pytest.raises(ParentError, match=r"'h\.attn\.bias'") as refusal:
        mix(ODD[name], (0.5, 0.5), name="h.attn.bias")
    assert str(ODD[name][0].dtype) in refusal.value.what
    assert refusal.value.exit_code == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data(), recipe=s.recipes())
def test_mixing_leaves_the_parents_alone(dtype, drawn, recipe):
    tensors = drawn.draw(s.parents(dtype))
    before = [tensor.clone() for tensor in tensors]
    mix(tensors, recipe.lam)
    assert all(map(same_bytes, before, tensors))


def test_how_a_tensor_lies_in_memory_does_not_matter():
    old, new = torch.arange(12.0).reshape(3, 4), torch.arange(12.0).reshape(3, 4) ** 2
    expected = mix([old, new], (0.3, 0.7))
    assert same_bytes(mix([old.T.contiguous().T, new], (0.3, 0.7)).contiguous(), expected)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([0], dtype=torch.int32), torch.tensor([0.0]), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.arange(4.0).reshape(2, 2).T, torch.tensor([[0.0, 2.0], [1.0, 3.0]]), True),
    ],
    ids=["NaN", "signed zero", "dtype", "shape", "empty", "scalar", "strides"],
)
def test_tensors_are_the_same_by_their_bytes(first, second, same):
    assert same_bytes(first, second) is same
