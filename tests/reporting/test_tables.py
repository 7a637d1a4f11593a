"""Tests of tables as Markdown for a page, as text for a terminal, and as CSV for a program."""

import csv
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_soup.records import Table
from mlflow_soup.reporting import tables

# a carriage return ends a line for some readers of CSV, quoted or not
texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"))
words = texts.filter(str.strip)
cells = st.none() | texts | st.integers() | st.floats(allow_nan=False)


@st.composite
def any_tables(draw):
    """Tables of one to four columns with any cells; the first column may be the group."""
    names = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    rows = draw(st.lists(st.tuples(*[cells] * len(names)), max_size=5))
    best = draw(st.dictionaries(st.sampled_from(names), st.booleans()))
    return Table(tuple(names), tuple(rows), best, draw(st.sampled_from(["", names[0]])))


SOUPS = Table(
    ("pair", "method", "score", "Δ parent", "seconds"),
    (
        ("v1+v2", "uniform", 0.5, -0.02, 30.0),
        ("v1+v2", "greedy", 0.56, 0.04, 10.0),
        ("v1+v2", "ours", 0.56, 0.04, 20.0),
        ("v2+v3", "uniform", 0.61, 0.01, 10.0),
        ("v2+v3", "ours", None, None, None),
    ),
    best={"score": True, "seconds": False},
    group="pair",
)


def bold(table):
    """(row, column) of the bold cells of a Markdown table."""
    lines = [line.split(" | ") for line in tables.markdown(table).splitlines()[2:]]
    return {(i, j) for i, line in enumerate(lines) for j, c in enumerate(line) if "**" in c}


def test_a_page_reads_as_it_should():
    assert tables.markdown(SOUPS).splitlines() == [
        "| pair | method | score | Δ parent | seconds |",
        "| --- | --- | ---: | ---: | ---: |",
        "| v1+v2 | uniform | 0.5000 | -0.0200 | 30.0000 |",
        "| v1+v2 | greedy | **0.5600** | +0.0400 | **10.0000** |",
        "| v1+v2 | ours | **0.5600** | +0.0400 | 20.0000 |",
        "| v2+v3 | uniform | **0.6100** | +0.0100 | **10.0000** |",
        "| v2+v3 | ours |  |  |  |",
    ]


def test_a_terminal_reads_as_it_should():
    assert tables.text(SOUPS).splitlines() == [
        "pair   method    score   Δ parent  seconds",
        "v1+v2  uniform  0.5000    -0.0200  30.0000",
        "v1+v2  greedy   0.5600*   +0.0400  10.0000*",
        "v1+v2  ours     0.5600*   +0.0400  20.0000",
        "v2+v3  uniform  0.6100*   +0.0100  10.0000*",
        "v2+v3  ours",
    ]


def test_without_a_group_the_best_is_that_of_the_whole_table():
    assert bold(Table(SOUPS.columns, SOUPS.rows, SOUPS.best)) == {(3, 2), (1, 4), (3, 4)}


@pytest.mark.parametrize("larger", [True, False])
def test_missing_numbers_are_never_the_best(larger):
    table = Table(("score",), ((None,), (float("nan"),), (0.4,), (None,)), {"score": larger})
    assert bold(table) == {(2, 0)}
    assert not bold(Table(("score",), ((None,), (float("nan"),)), {"score": larger}))


def test_numbers_that_read_equal_are_equally_good():
    assert bold(Table(("score",), ((0.50001,), (0.50002,), (0.4999,)), {"score": True})) == {
        (0, 0),
        (1, 0),
    }


def test_what_rounds_to_zero_has_no_minus():
    table = Table(("Δ", "score"), ((-0.00001, -0.00001),))
    assert tables.markdown(table).splitlines()[-1] == "| +0.0000 | 0.0000 |"


def test_counts_have_no_decimals():
    assert "| 12 | +3 |" in tables.markdown(Table(("k", "gain"), ((12, 3),)))


@given(any_tables())
def test_every_line_of_a_page_has_a_cell_per_column(table):
    lines = tables.markdown(table).split("\n")
    assert len(lines) == 2 + len(table.rows)
    for line in lines:
        assert len(line.splitlines()) == 1
        separators = re.findall(r"\\.|(\|)", line)  # an escaped bar does not separate cells
        assert separators.count("|") == len(table.columns) + 1


@given(st.lists(st.tuples(words, words, st.floats(allow_nan=False))))
def test_in_a_terminal_text_starts_and_numbers_end_at_the_same_place(rows):
    table = Table(("pair", "method", "score"), tuple(rows), {"score": True})
    lines = [line.removesuffix("*") for line in tables.text(table).split("\n")]
    cells = [list(re.finditer(r"\S+( \S+)*", line)) for line in lines]
    assert len(lines) == 1 + len(rows)
    assert all(len(line) == 3 for line in cells)
    assert len({(pair.start(), method.start()) for pair, method, _ in cells}) == 1
    assert not rows or len({score.end() for *_, score in cells}) == 1


@given(any_tables())
def test_csv_reads_back_exactly(table):
    head, *rows = csv.reader(io.StringIO(tables.csv(table), newline=""))
    assert head == list(table.columns)
    assert len(rows) == len(table.rows)
    for row, read in zip(table.rows, rows, strict=True):
        for cell, word in zip(row, read, strict=True):
            if cell is None:
                assert word == ""
            else:
                assert type(cell)(word) == cell
