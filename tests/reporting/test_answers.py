"""The first lines of a page: what they say, and how a later command renews them."""

from dataclasses import replace

import pytest
from test_report import NEW, SOUP, story  # noqa: F401 (a fixture)

from mlflow_soup.records import Check, Difference, Promotion, Rules, Verdict, Version
from mlflow_soup.reporting import answers

MADE = Promotion("alias champion", SOUP, Version("llm", 9), "2026-11-29T10:55:09+02:00")


def test_the_first_lines_answer_all_questions(story):  # noqa: F811
    chosen, gate, promoted = answers.first_lines(replace(story, promotion=MADE)).split("  \n")
    assert chosen == (
        "Chosen: λ = 0.8, +0.0400 over v13, the better parent (95 %: +0.0203 to +0.0597)"
    )
    assert gate == (
        "Gate: refused (margin 0.05, confidence 0.95); 1 of 2 checks fails: code:acc -0.0200 "
        "against v13, which may be bad luck"
    )
    assert promoted == (
        "Promoted: alias champion → llm v14, 2026-11-29 08:55 UTC, in place of llm v9"
    )


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("", "Promoted: nothing, as nobody asked for it (--promote)"),
        ("alias:champion", "Promoted: nothing, alias:champion stays as it was"),
    ],
)
def test_where_nothing_was_promoted_the_line_says_so(story, target, said):  # noqa: F811
    assert answers.promoted(replace(story, target=target)) == said


def test_a_run_without_a_gate_says_why(story):  # noqa: F811
    told = answers.gate(replace(story, verdict=None))
    assert told == "Gate: did not run, no OOD tasks were given (--ood-tasks)"


def holds(name, room):
    return Check((name,), NEW, Difference(0.01, 0.01, 9), "lower", room, 0.0, True, "0.01")


def test_a_gate_that_passed_tells_its_tightest_check():
    checks = tuple(holds(f"t{i}:acc", 0.1 * i) for i in (4, 1, 2, 3))
    told = answers.verdict_line(Verdict(checks, Rules("0.01", 0.95)), "llm")
    assert told == (
        "Gate: passed (margin 0.01, confidence 0.95); closest of 4 checks: t1:acc +0.0100 "
        "against v13"
    )
    told = answers.verdict_line(Verdict(checks[:1], Rules("0", 0.9)), "prod")
    assert told.endswith("; its check: t4:acc +0.0100 against llm v13")


def test_a_verdict_without_checks_says_so():
    told = answers.verdict_line(Verdict((), Rules("0.01", 0.95)), "llm")
    assert told.endswith("nothing was checked")


def test_a_later_command_renews_its_line_and_no_other(story):  # noqa: F811
    text = f"{answers.first_lines(story)}\n\nGate: in the words of somebody else.\n"
    line = answers.promotion_line(MADE)
    assert answers.renew(text, line) == text.replace(answers.promoted(story), line)
    again = "Gate: passed (margin 0.1, confidence 0.95), its check holds: \\1"
    assert answers.renew(text, again) == text.replace(answers.gate(story), again)


def test_the_words_of_others_are_not_renewed():
    text = "Our best model.\nIt was Promoted: by hand.\n"
    assert answers.renew(text, answers.promotion_line(MADE)) == text


@pytest.mark.parametrize(
    "at", ["", "yesterday", "![x](http://evil/p.png)", "0001-01-01T00:00:00+14:00"]
)
def test_a_time_that_is_none_is_not_told(at):
    assert answers.when(at) == ""
    assert answers.promotion_line(replace(MADE, at=at)).count(",") == 1
