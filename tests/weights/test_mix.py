"""The kernel, bit for bit: the expected bits come from NumPy, in separate operations."""

import hashlib
import itertools
import os
import subprocess
import sys
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import strategies as s
from mlflow_soup.errors import ParentError
from mlflow_soup.weights.mix import Scratch, add_up, is_finite, mix, same_bytes, terms

DTYPES = sorted(s.BITS, key=str)


def bits(tensor):
    """A tensor's bits as unsigned integers."""
    carrier, _ = s.BITS[tensor.dtype]
    signed = getattr(torch, np.dtype(carrier).name.removeprefix("u"))
    return tensor.contiguous().view(signed).numpy().view(carrier)


def widened(tensor):
    """A tensor's values in the precision of the products."""
    raw = bits(tensor)
    if tensor.dtype == torch.bfloat16:  # bf16 is the upper half of a float32
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if tensor.dtype == torch.float16:
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float64 if tensor.dtype == torch.float64 else np.float32)


def narrowed(values, dtype):
    """The bits of the nearest number of `dtype`; ties go to even."""
    if dtype == torch.bfloat16:
        wide = values.view(np.uint32)
        # add half of the lost part, and for ties the last kept bit; infinities stay
        up = (wide + np.uint32(0x7FFF) + ((wide >> 16) & 1)) >> 16
        return np.where(np.isinf(values), wide >> 16, up).astype(np.uint16)
    with np.errstate(over="ignore"):
        carrier, _ = s.BITS[dtype]
        narrow = values.astype(np.float16) if dtype == torch.float16 else values
    return narrow.view(carrier)


def expected_bits(tensors, coefficients):
    """Σ c·Θ: each product and each sum is rounded, the result once more to the parents' dtype."""
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


@cache
def specials(dtype):
    """Bits at which rounding, underflow or overflow begins, of either sign."""
    carrier, exponent = s.BITS[dtype]
    normal = exponent & -exponent
    one = exponent >> 1 & exponent
    edges = [0, 1, 2, normal - 1, normal, normal + 1, one - 1, one, one + 1, exponent - 1]
    sign = 1 << 8 * np.dtype(carrier).itemsize - 1
    return np.array([edge | s for s in (0, sign) for edge in edges], carrier)


@cache
def trained(dtype):
    """Two tensors: every pair of special numbers, and the pairs again among finite numbers."""
    carrier, exponent = s.BITS[dtype]
    edges = specials(dtype)
    pairs = np.stack([np.repeat(edges, len(edges)), np.tile(edges, len(edges))])
    rng = np.random.default_rng(5)
    drawn = rng.integers(0, np.iinfo(carrier).max, (2, 300_000), carrier, endpoint=True)
    finite = drawn[:, (drawn & carrier(exponent) != exponent).all(axis=0)]
    rest = rng.permutation(np.concatenate([finite, np.tile(pairs, 40)], axis=1), axis=1)
    both = np.concatenate([pairs, rest], axis=1)
    return [torch.from_numpy(b.view(f"i{b.itemsize}").copy()).view(dtype) for b in both]


LAMS = ((0.5, 0.5), (0.3, 0.7), (0.9999, 0.0001), (1 / 3, 2 / 3))


@cache
def trained_soup(dtype, lam):
    """The soup of both tensors, computed with NumPy."""
    return expected_bits(trained(dtype), lam)


@pytest.fixture(params=[1, 2, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunk", [1, 7, 333, 1024, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_do_not_depend_on_threads_or_chunks(dtype, threads, chunk):
    length = 800 * (chunk or 1000)  # small, because each chunk takes some microseconds
    tensors = [tensor[:length] for tensor in trained(dtype)]
    scratch = Scratch(chunk)
    assert scratch.chunk == chunk or scratch.chunk % threads == 0
    for lam in LAMS:
        soup = mix(tensors, lam, scratch=scratch)
        np.testing.assert_array_equal(bits(soup), trained_soup(dtype, lam)[:length])


LEVELS = ["DEFAULT", "AVX2", "AVX512"]
MIX_AND_DIGEST = """
import hashlib, sys
import torch
from safetensors.torch import load_file
from mlflow_soup.weights.mix import bits, mix
print(torch.backends.cpu.get_cpu_capability())
tensors = load_file(sys.argv[1])
for name in sorted({name[:-1] for name in tensors}):
    for lam in map(float, sys.argv[2:]):
        soup = mix([tensors[name + "0"], tensors[name + "1"]], (1 - lam, lam))
        print(hashlib.sha256(bits(soup).numpy().tobytes()).hexdigest())
"""


def test_the_bits_are_equal_on_every_generation_of_cpus(tmp_path):
    here = torch.backends.cpu.get_cpu_capability()
    levels = LEVELS[: LEVELS.index(here) + 1] if here in LEVELS else ["DEFAULT"]
    lams = ("0.5", "0.7", "0.0001")
    tensors = {f"{dtype}.{i}": t for dtype in DTYPES for i, t in enumerate(trained(dtype))}
    save_file(tensors, tmp_path / "inputs")
    assert all(same_bytes(t, tensors[name]) for name, t in load_file(tmp_path / "inputs").items())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MIX_AND_DIGEST, tmp_path / "inputs", *lams],
            env={**os.environ, "ATEN_CPU_CAPABILITY": level.lower()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for level in levels
    ]
    printed = [process.communicate()[0].split() for process in running]
    assert [took for took, *_ in printed] == levels  # PyTorch used these levels
    digests = [
        hashlib.sha256(trained_soup(dtype, (1 - lam, lam)).tobytes()).hexdigest()
        for dtype in DTYPES
        for lam in map(float, lams)
    ]
    assert [own for _, *own in printed] == [digests] * len(levels)


def exact(tensor):
    """A tensor's numbers as exact fractions."""
    return [Fraction(value) for value in tensor.double().reshape(-1).tolist()]


def spacing(value, dtype):
    """The distance from a number of `dtype` to the next larger one."""
    about = torch.finfo(dtype)
    power = Fraction(about.smallest_normal)
    while 2 * power <= abs(value):
        power *= 2
    return Fraction(about.eps) * power


def slack(products, dtype):
    """The largest error of λ, products and sums in working precision.

    Each rounds once: by half a unit in the last place, or by half the smallest subnormal number.
    """
    work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    unit, least = Fraction(work.eps) / 2, Fraction(work.eps) * Fraction(work.smallest_normal)
    return (len(products) + 2) * (unit * sum(map(abs, products)) + least)


def ideals(tensors, lam):
    """For each element: its index, its products with λ and their sum, all exact."""
    numbers = zip(*map(exact, tensors), strict=True)
    for i, values in enumerate(numbers):
        products = [Fraction(c) * v for c, v in zip(lam, values, strict=True)]
        yield i, products, sum(products)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data(), recipe=s.recipes())
def test_a_soup_is_within_one_rounding_of_the_exact_sum(dtype, drawn, recipe):
    tensors = drawn.draw(s.parents(dtype))
    soup = exact(mix(tensors, recipe.lam))
    for i, products, ideal in ideals(tensors, recipe.lam):
        off = abs(soup[i] - ideal)
        half = spacing(max(abs(ideal), abs(soup[i])), dtype) / 2
        # in double precision, rounding the sum is the rounding to the parents' dtype
        assert off <= slack(products, dtype) + half
        # for λ from 0 to 1, the soup leaves the interval between the parents by no more than that
        low, high = sorted((exact(tensors[0])[i], exact(tensors[1])[i]))
        assert (
            low - slack(products, dtype) - half <= soup[i] <= high + slack(products, dtype) + half
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data(), recipe=s.recipes())
def test_a_parent_mixed_with_itself_does_not_change(dtype, drawn, recipe):
    (tensor,) = drawn.draw(s.parents(dtype, count=1))
    assert same_bytes(mix([tensor, tensor.clone()], recipe.lam), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data(), recipe=s.recipes())
def test_two_parents_may_be_swapped_together_with_their_weights(dtype, drawn, recipe):
    old, new = drawn.draw(s.parents(dtype))
    assert same_bytes(mix([new, old], recipe.lam[::-1]), mix([old, new], recipe.lam))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=st.data())
def test_three_parents_may_be_swapped_within_one_rounding(dtype, drawn):
    tensors, lam = drawn.draw(s.parents(dtype, count=3)), (0.2, 0.3, 0.5)
    orders = list(itertools.permutations(range(3)))
    soups = [exact(mix([tensors[i] for i in o], [lam[i] for i in o])) for o in orders]
    for i, products, _ in ideals(tensors, lam):
        found = [soup[i] for soup in soups]
        step = spacing(max(map(abs, found)), dtype)
        assert max(found) - min(found) <= step + 2 * slack(products, dtype)


def test_a_tie_between_neighbours_is_rounded_to_even():
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
    assert (separate != fused).any()  # the test data show the difference
    np.testing.assert_array_equal(mix([old, new], (0.9, 0.1)).numpy(), separate)


ODD = {
    "floats": (torch.tensor([float("nan"), -0.0, float("-inf")]), torch.tensor([1.0, 0.0, 2.0])),
    "integers": (torch.tensor([1, 2]), torch.tensor([3, 4])),
    "booleans": (torch.tensor([True, False]), torch.tensor([False, False])),
}


@pytest.mark.parametrize("name", sorted(ODD))
@pytest.mark.parametrize(("lam", "chosen"), [((1.0, 0.0), 0), ((0.0, 1.0), 1)])
def test_a_weight_of_one_gives_the_bytes_of_that_parent(name, lam, chosen):
    assert same_bytes(mix(ODD[name], lam), ODD[name][chosen])


@pytest.mark.parametrize("tensor", [first for first, _ in ODD.values()], ids=sorted(ODD))
@given(recipe=s.recipes())
def test_equal_parents_give_the_same_bytes(tensor, recipe):
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


def test_the_memory_layout_of_a_tensor_does_not_matter():
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
def test_tensors_are_compared_by_their_bytes(first, second, same):
    assert same_bytes(first, second) is same


def edges(length, chunk):
    """The first and last elements of a tensor and of its chunks."""
    return [0, chunk - 1, chunk, length // 2, length - 2, length - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_value_that_is_not_finite_is_found_at_any_place(dtype, value, guilty):
    length, scratch = 100_003, Scratch(1024)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(length, generator=generator).to(dtype) for _ in range(2)]
    parts = list(zip(tensors, (0.25, 0.75), strict=True))
    out = torch.empty_like(tensors[0])
    copied = [(tensors[guilty], 1.0)]
    assert add_up(parts, out, scratch=scratch, check=True)
    assert add_up(copied, out, scratch=scratch, check=True)
    assert is_finite(tensors[guilty], scratch)
    for place in edges(length, scratch.chunk):
        before = tensors[guilty][place].item()
        tensors[guilty][place] = value
        assert not add_up(parts, out, scratch=scratch, check=True)
        assert not add_up(copied, out, scratch=scratch, check=True)
        assert not is_finite(tensors[guilty], scratch)
        assert add_up(parts, out, scratch=scratch)  # without `check` it is not looked for
        tensors[guilty][place] = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)], ids=str)
def test_the_largest_numbers_are_finite_although_their_sum_is_not(dtype, signs):
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([signs[0] * largest, signs[1] * largest], dtype=dtype).repeat(3000)
    half = (tensor / 2, 0.5)
    scratch, out = Scratch(1024), torch.empty_like(tensor)
    assert is_finite(tensor, scratch)
    assert add_up([(tensor, 1.0)], out, scratch=scratch, check=True)
    assert same_bytes(out, tensor)
    assert add_up([(tensor, 0.5), half], out, scratch=scratch, check=True)
    tensor[4000] = float("inf")
    assert not is_finite(tensor, scratch)
    assert not add_up([(tensor, 0.5), half], out, scratch=scratch, check=True)


def test_a_soup_that_overflows_is_not_finite_although_its_parents_are():
    # 0.01 + 0.5 + 0.49 is a little more than 1 when weights and products are rounded to fp32
    largest = torch.full((2000,), torch.finfo(torch.float32).max)
    parts, scratch = [(largest, c) for c in (0.01, 0.5, 0.49)], Scratch()
    assert is_finite(largest, scratch)
    assert not add_up(parts, torch.empty(2000), scratch=scratch, check=True)


@pytest.mark.parametrize("tensor", [torch.tensor([2**40]), torch.tensor([True]), torch.zeros(0)])
def test_integers_and_empty_tensors_are_finite(tensor):
    assert is_finite(tensor, Scratch())
    assert add_up([(tensor, 1.0)], tensor.clone(), scratch=Scratch(), check=True)


@pytest.mark.parametrize("chunk", [7, 1024, None])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_a_soup_in_another_dtype_is_rounded_to_the_dtype_of_its_parents_first(dtype, wide, chunk):
    tensors = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    out, lam = torch.empty(5000, dtype=wide), (0.3, 0.7)
    assert add_up(list(zip(tensors, lam, strict=True)), out, scratch=Scratch(chunk), check=True)
    assert same_bytes(out, mix(tensors, lam).to(wide))
    add_up([(tensors[1], 1.0)], out, scratch=Scratch(chunk))
    assert same_bytes(out, tensors[1].to(wide))


def test_rounding_only_once_would_give_other_numbers():
    # 1 + 2⁻⁸ is half way between 1 and 1 + 2⁻⁷ in bf16, but is exact in fp32
    old, new = torch.tensor([1.0]).bfloat16(), torch.tensor([1 + 2**-7]).bfloat16()
    out = torch.empty(1)
    add_up([(old, 0.5), (new, 0.5)], out, scratch=Scratch())
    assert out.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
def test_nothing_is_allocated_after_the_first_tensor(dtype, wide):
    parents = [torch.randn(50_000).to(dtype) for _ in range(3)]
    parts = list(zip(parents, (0.2, 0.3, 0.5), strict=True))
    out, scratch = torch.empty(50_000, dtype=wide or dtype), Scratch(4096)
    first = allocated(lambda: add_up(parts, out, scratch=scratch, check=True))
    again = allocated(lambda: add_up(parts, out, scratch=scratch, check=True))
    short = [(tensor[:99], c) for tensor, c in parts]
    fewer = allocated(lambda: add_up(short, out[:99], scratch=scratch, check=True))
    assert max(first) >= 4096 * 4  # the scratch rows
    assert max(again + fewer, default=0) <= 8  # single numbers, which PyTorch keeps in tensors


def allocated(action):
    """The sizes in bytes of all memory that PyTorch allocates inside the block."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def test_rows_are_allocated_once_and_reused():
    scratch = Scratch(100)
    row = scratch.row(torch.float32, 0, 100)
    assert len(row) == 100
    assert scratch.row(torch.float32, 0, 30).data_ptr() == row.data_ptr()
    others = [scratch.row(torch.float32, 1, 1), scratch.row(torch.float64, 0, 1)]
    assert len({row.data_ptr(), *(other.data_ptr() for other in others)}) == 3


def test_a_parent_with_weight_zero_is_left_out():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(50, generator=generator) for _ in range(2))
    other = torch.full((50,), float("nan"))
    expected = mix([old, new], (0.3, 0.7))
    assert same_bytes(mix([old, other, new], (0.3, 0.0, 0.7)), expected)
    assert same_bytes(mix([old, other, old.clone()], (0.3, 0.0, 0.7)), old)  # the rest is equal
    whole = torch.tensor([1, 2])
    assert same_bytes(mix([whole, whole + 1, whole.clone()], (0.3, 0.0, 0.7)), whole)
    for same in (None, False):  # a live model knows in advance whether all parents are equal
        parts = terms([old, other, old.clone()], (0.3, 0.0, 0.7), same=same)
        assert len(parts) == 1


def test_a_weight_close_to_one_is_mixed_and_not_copied():
    old, new = torch.tensor([1.0]), torch.tensor([3e7])
    assert mix([old, new], (1.0, 1e-7)).item() == 4.0
