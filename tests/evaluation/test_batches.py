import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_soup.evaluation.batches import Input, Limits, divide, pack, unpack

tokens = st.lists(st.integers(0, 2), min_size=2, max_size=12)


@st.composite
def inputs(draw):
    """Distinct sequences of few different tokens, so that many begin alike; the longest first."""
    drawn = draw(st.lists(st.tuples(tokens, st.integers(1, 12)), min_size=1, max_size=20))
    found = {
        pack(own): Input(pack(own), f"task {rows % 2}", [(0, own[: min(rows, len(own))])])
        for own, rows in drawn
    }
    return sorted(found.values(), key=lambda one: (-len(one), one.data))


limits = st.builds(
    Limits,
    inputs=st.integers(1, 8),
    tokens=st.integers(5, 60),
    logits=st.integers(5, 60),
    forward=st.sampled_from([0.0, 3.0]),
    selects=st.booleans(),
)


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)))
def test_packed_tokens_unpack_and_are_in_their_order(one, other):
    assert unpack(pack(one)).tolist() == one
    assert (pack(one) < pack(other)) == (one < other)


@given(inputs(), limits, st.booleans())
def test_every_input_is_in_one_batch(given_inputs, limits, shares):
    parts = divide(given_inputs, limits, shares=shares)
    assert sorted(one.data for part in parts for one in part.inputs) == sorted(
        one.data for one in given_inputs
    )


@given(inputs(), limits)
def test_prefixes_are_what_inputs_begin_with_and_end_before_what_is_read(given_inputs, limits):
    for part in divide(given_inputs, limits, shares=True):
        assert len(set(part.prefixes)) == len(part.prefixes)
        for one in part.inputs:
            assert part.shared <= one.start
            assert not part.shared or one.before(part.shared) in part.prefixes
    assert not any(part.shared for part in divide(given_inputs, limits, shares=False))


@given(inputs(), limits, st.booleans())
def test_a_batch_keeps_its_limits_unless_it_is_one_input(given_inputs, limits, shares):
    for part in divide(given_inputs, limits, shares=shares):
        rows, columns = part.size
        read = sum(one.rows if limits.selects else len(one) for one in part.inputs)
        assert rows <= limits.inputs
        if rows > 1:
            assert read <= limits.logits
            if not part.shared:
                assert rows * columns <= limits.tokens


def by_hand(*texts, rows=1):
    return [Input(pack(list(text.encode())), "task", [(0, [0] * rows)]) for text in texts]


@pytest.mark.parametrize(
    ("texts", "rows", "shared"),
    [
        (("examples a", "examples b", "examples c"), 1, len("examples ")),
        (("context one", "context two", "another one", "another two"), 4, len("context")),
        (("nothing", "in what", "they do"), 1, 0),
        (("lonely",), 1, 0),
    ],
)
def test_prefixes_are_shared_where_that_saves_a_fifth(texts, rows, shared):
    limits = Limits(inputs=8, tokens=1000, logits=1000, forward=0.0, selects=True)
    (part,) = divide(by_hand(*texts, rows=rows), limits, shares=True)
    assert part.shared == shared
    dear = Limits(inputs=8, tokens=1000, logits=1000, forward=100.0, selects=True)
    (part,) = divide(by_hand(*texts, rows=rows), dear, shares=True)
    assert part.shared == 0
