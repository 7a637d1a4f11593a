"""Tests of the study figures: each draws the measured numbers and labels them."""

import io
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from mlflow_soup.reporting import charts

NAN, INF = float("nan"), float("inf")
LABEL = "held-out score: piqa"
PAIR = ("llm v12", "llm v13")
SCORES = {(0, 0): 0.40, (1, 1): 0.50, (2, 2): 0.55, (0, 1): 0.45, (1, 2): 0.56}


def render(figure):
    """Draw a figure to a file; a warning of matplotlib is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), dpi=40)
    return figure


def line(axes, label):
    """The points (x, y) of all lines with that label."""
    found = [drawn.get_xydata() for drawn in axes.lines if drawn.get_label() == label]
    return np.concatenate(found).tolist()


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def segments(axes):
    """The ends of every error bar, in the order in which they are drawn."""
    bars = [found for found in axes.containers if isinstance(found, ErrorbarContainer)]
    return [ends.tolist() for bar in bars for ends in bar.lines[2][0].get_segments()]


def test_a_heat_map_has_each_score_in_its_cell():
    figure = render(charts.pairs(["v1", "v2", "v3"], SCORES, LABEL))
    axes, bar = figure.axes
    (image,) = axes.images
    drawn = image.get_array()
    assert {(i, j): drawn[i, j] for i, j in np.argwhere(~drawn.mask)} == SCORES
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts == {(j, i): f"{score:.4f}" for (i, j), score in SCORES.items()}
    assert [t.get_text() for t in axes.get_xticklabels()] == ["v1", "v2", "v3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("newer version", "older version")
    assert bar.get_ylabel() == LABEL


def test_a_heat_map_frames_the_parents_and_the_best_soup():
    figure = charts.pairs(["v1", "v2", "v3"], SCORES, LABEL)
    *alone, best = figure.axes[0].patches
    assert [frame.get_xy() for frame in alone] == [(i - 0.5, i - 0.5) for i in range(3)]
    assert best.get_xy() == (1.5, 0.5)
    assert best.get_linestyle() != alone[0].get_linestyle()
    assert legend(figure) == ["a version alone", "above both parents", "best soup: v2 + v3, 0.5600"]
    assert figure.get_suptitle() == "1 of 2 soups of two versions score above both parents"
    (marks,) = figure.axes[0].collections
    np.testing.assert_allclose(marks.get_offsets(), [[2.35, 0.67]])


def test_a_soup_of_a_parent_without_score_is_not_said_to_be_better():
    scores = {(0, 0): 0.4, (0, 1): 0.5, (1, 1): NAN}
    assert "0 of 1 soups" in charts.pairs(["v1", "v2"], scores, LABEL).get_suptitle()


def test_the_numbers_of_a_heat_map_can_be_read_on_every_colour():
    scores = {(i, j): 0.01 * (10 * i + j) for i in range(10) for j in range(i, 10)}
    axes = charts.pairs([f"v{i}" for i in range(10)], scores, LABEL).axes[0]

    def luminance(colour):
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for text in axes.texts:
        j, i = text.get_position()
        cell = luminance(axes.images[0].to_rgba(scores[i, j])[:3])
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        # WCAG 2.2 requires a contrast of 4.5 for small text
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4.5


def test_a_heat_map_of_many_versions_has_no_numbers():
    scores = {(i, j): 0.5 for i in range(20) for j in range(i, 20)}
    assert not charts.pairs([f"v{i}" for i in range(20)], scores, LABEL).axes[0].texts


def test_soups_of_more_versions_stand_beside_the_best_of_them():
    scores, lows, highs = [0.53, 0.52, 0.51], [0.52, 0.50, 0.50], [0.54, 0.54, 0.52]
    best_parent = [0.51, 0.51, 0.515]
    figure = render(
        charts.count(
            "llm v13",
            [2, 3, 4],
            scores,
            lows=lows,
            highs=highs,
            best_parent=best_parent,
            label=LABEL,
        )
    )
    (axes,) = figure.axes
    assert line(axes, "best of these versions alone") == [[2, 0.51], [3, 0.51], [4, 0.515]]
    assert axes.lines[1].get_xydata().tolist() == [[2, 0.53], [3, 0.52], [4, 0.51]]
    np.testing.assert_allclose(
        segments(axes), [[[k, a], [k, b]] for k, a, b in zip((2, 3, 4), lows, highs, strict=True)]
    )
    assert axes.get_xticks().tolist() == [2, 3, 4]
    assert axes.get_ylabel() == LABEL
    assert "llm v13" in figure.get_suptitle()


def test_a_landscape_marks_the_weights_that_beat_the_better_parent():
    lam, scores, stderr = [1.0, 0.0, 0.5, 0.75], [0.52, 0.50, 0.51, 0.54], [0.0, 0.03, 0.02, 0.01]
    figure = render(charts.landscape(PAIR, lam, scores, stderr=stderr, better=0.52, label=LABEL))
    (axes,) = figure.axes
    curve = [[0.0, 0.50], [0.5, 0.51], [0.75, 0.54], [1.0, 0.52]]
    assert line(axes, "soup") == curve
    assert line(axes, "λ that beats the better parent") == [[0.75, 0.54]]
    assert line(axes, "λ that does not beat it") == [curve[0], curve[1], curve[3]]
    assert "1 of 4 λ (25 %) beat" in figure.get_suptitle()
    (band,) = axes.collections
    (outline,) = (path.vertices for path in band.get_paths())
    at_half = outline[outline[:, 0] == 0.5][:, 1]
    np.testing.assert_allclose([at_half.min(), at_half.max()], [0.51 - 0.0392, 0.51 + 0.0392])
    assert "better parent, 0.5200" in legend(figure)
    assert axes.get_xlabel() == "λ, weight of llm v13 (rest: llm v12)"
    assert axes.get_ylabel() == LABEL


def test_weights_whose_evaluation_failed_do_not_count():
    figure = charts.landscape(
        PAIR, [0.0, 0.5, 1.0], [0.5, NAN, 0.6], stderr=[0.1, NAN, 0.1], better=0.5, label=LABEL
    )
    assert "1 of 2 λ (50 %)" in render(figure).get_suptitle()


def test_each_draw_of_the_items_is_a_point_and_their_median_a_line():
    lam = [[0.7, 0.9, 1.0], [0.8, 0.8, 0.8]]
    scores = [[0.50, 0.56, NAN], [0.55, 0.55, 0.55]]
    figure = render(charts.heldout(PAIR, [0.25, 1.0], lam, scores, full_best=0.57, label=LABEL))
    chosen, worth = figure.axes
    assert [y for _, y in line(chosen, "one random draw of items")] == [
        0.7,
        0.9,
        1.0,
        0.8,
        0.8,
        0.8,
    ]
    assert [round(x) for x, _ in line(chosen, "one random draw of items")] == [0, 0, 0, 1, 1, 1]
    assert [y for _, y in line(chosen, "median")] == [0.9, 0.9, 0.8, 0.8]
    assert [y for _, y in line(worth, "one random draw of items")] == [0.50, 0.56, 0.55, 0.55, 0.55]
    assert [y for _, y in line(worth, "median")] == pytest.approx([0.53, 0.53, 0.55, 0.55])
    assert {y for _, y in line(worth, "best λ on all items")} == {0.57}
    assert [t.get_text() for t in worth.get_xticklabels()] == ["25", "100"]
    assert legend(figure) == ["one random draw of items", "median", "best λ on all items"]


def test_spaces_that_choose_the_same_weight_are_all_seen():
    spaces = {0.0: (0.87, 0.56), 0.5: (0.87, 0.56), 0.9: (0.93, 0.55)}
    lam, scores = [0.93, 0.0, 0.87], [0.55, 0.40, 0.56]
    figure = render(charts.alpha(PAIR, lam, scores, spaces=spaces, label=LABEL))
    above, below = figure.axes
    assert line(above, "evaluated λ") == [[0.0, 0.40], [0.87, 0.56], [0.93, 0.55]]
    assert line(above, "chosen λ") == [[0.87, 0.56], [0.87, 0.56], [0.93, 0.55]]
    bars = [[0.0, 0], [1, 0], [0.5, 1], [1, 1], [0.9, 2], [1, 2]]
    assert line(below, "searched range") == bars
    assert [t.get_text() for t in below.get_yticklabels()] == ["[0, 1]", "[0.5, 1]", "[0.9, 1]"]
    assert [t.get_text() for t in below.texts] == [
        "λ = 0.87: 0.5600",
        "λ = 0.87: 0.5600",
        "λ = 0.93: 0.5500",
    ]


def test_a_dumbbell_joins_what_a_task_chose_and_what_others_chose():
    ind, ood = [[0.50, 0.20], [0.55, 0.25]], [[0.49, 0.21], [NAN, 0.24]]
    figure = render(charts.ood(["greedy", "ours"], ["piqa", "gsm8k"], ind=ind, ood=ood, label="x"))
    for column, (axes, task) in enumerate(zip(figure.axes, ["piqa", "gsm8k"], strict=True)):
        own, other = np.array(ind)[:, column], np.array(ood)[:, column]
        np.testing.assert_equal(np.transpose(line(axes, "λ found on this task (IND)"))[0], own)
        np.testing.assert_equal(np.transpose(line(axes, "λ found on other tasks (OOD)"))[0], other)
        assert axes.get_title(loc="left") == task
        assert [t.get_text() for t in axes.get_yticklabels()] == ["greedy", "ours"]
    assert legend(figure) == ["λ found on this task (IND)", "λ found on other tasks (OOD)"]


def test_a_forest_has_every_interval_in_the_order_given():
    groups = {
        "v1 + v2": {"uniform": (-0.02, -0.03, -0.01), "ours": (0.01, -0.01, 0.03)},
        "v2 + v3": {"ours": (0.02, 0.01, 0.03)},
    }
    figure = render(charts.methods(groups, LABEL))
    for axes, (pair, rows) in zip(figure.axes, groups.items(), strict=True):
        assert axes.get_title(loc="left") == pair
        assert [t.get_text() for t in axes.get_yticklabels()] == list(rows)
        drawn = [[low, high] for _, low, high in rows.values()]
        np.testing.assert_allclose([[a, b] for (a, _), (b, _) in segments(axes)], drawn)
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    faces = [to_hex(c.lines[0].get_markerfacecolor()) for c in figure.axes[0].containers]
    assert faces == [charts.BLUE.lower(), "#ffffff"]
    assert legend(figure) == [
        "better parent",
        "gain, 95 % interval excludes 0",
        "gain, 95 % interval includes 0",
    ]
    assert LABEL in figure.axes[-1].get_xlabel()


LONG = "models_of_the_department_of_applied_linguistics v12"
FLAT = {"lows": [0.5], "highs": [0.5], "best_parent": [0.5]}


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: charts.pairs(["v1"], {}, LABEL), id="no scores at all"),
        pytest.param(lambda: charts.pairs(["v1", "v2"], {(0, 1): 0.5}, LABEL), id="one soup"),
        pytest.param(lambda: charts.pairs(["v1", "v2"], {(0, 0): NAN}, LABEL), id="all failed"),
        pytest.param(
            lambda: charts.pairs([LONG] * 3, dict.fromkeys(SCORES, 0.5), LABEL), id="equal scores"
        ),
        pytest.param(lambda: charts.count("v3", [2], [0.5], label=LABEL, **FLAT), id="one k"),
        pytest.param(
            lambda: charts.count(LONG, [2], [NAN], label=LONG, **{key: [NAN] for key in FLAT}),
            id="no soup",
        ),
        pytest.param(
            lambda: charts.landscape(PAIR, [0.5], [0.5], stderr=[0.0], better=0.5, label=LABEL),
            id="one λ",
        ),
        pytest.param(
            lambda: charts.landscape(
                (LONG, LONG), [0, 1], [NAN] * 2, stderr=[NAN] * 2, better=0.5, label=LONG
            ),
            id="no λ",
        ),
        pytest.param(
            lambda: charts.heldout(
                PAIR, [0.5, 1.0], [[0.5], [NAN]], [[0.5], [NAN]], full_best=0.5, label=LABEL
            ),
            id="one draw",
        ),
        pytest.param(
            lambda: charts.alpha(PAIR, [1.0], [0.5], spaces={0.5: (1.0, 0.5)}, label=LABEL),
            id="one space",
        ),
        pytest.param(
            lambda: charts.ood(["ours"], [LONG], ind=[[0.5]], ood=[[0.5]], label=LABEL),
            id="one task",
        ),
        pytest.param(
            lambda: charts.methods({LONG: {"ours": (0.0, 0.0, 0.0)}}, LABEL), id="no difference"
        ),
        pytest.param(lambda: charts.methods({LONG: {"ours": (NAN,) * 3}}, LABEL), id="failed"),
        pytest.param(
            lambda: charts.methods({LONG: {"ours": (0.1, -INF, INF)}}, LABEL), id="one item"
        ),
        pytest.param(
            lambda: charts.landscape(
                PAIR, [0, 1], [0.4, 0.5], stderr=[INF] * 2, better=0.5, label=LABEL
            ),
            id="one item, over λ",
        ),
        pytest.param(
            lambda: charts.count(
                "v3",
                [2],
                [0.3],
                lows=[0.1 + 0.2],
                highs=[0.1 + 0.2],
                best_parent=[0.1],
                label=LABEL,
            ),
            id="an interval off by a last digit",
        ),
    ],
)
def test_little_to_draw_is_drawn_without_complaint(figure):
    assert render(figure()).get_suptitle()
