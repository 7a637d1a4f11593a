"""The first lines of a page: what won, by how much, over what; the gate and why; what was promoted.

MLflow shows only the first lines of a run's description, and the first words of a version's.

    Chosen: λ = 0.57, +0.0140 over my-llm v13, the better parent (95 % interval +0.0007 to …)
    Gate: passed (margin 0.01, confidence 0.95), each of 3 checks holds: held-out +0.0140, …
    Promoted: alias champion → my-llm v14, 2026-11-29 08:55 UTC
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from mlflow_soup.records import Check, Promotion, Verdict
from mlflow_soup.reporting.report import (
    Story,
    format_check,
    format_interval,
    gains,
    luckless,
)

_MOST = 3  # checks that are told in the line on the gate
_BREAK = "  \n"  # Markdown's line break


def first_lines(story: Story) -> str:
    """The answers about a finished run, in Markdown."""
    return _BREAK.join((chosen(story), gate(story), promoted(story)))


def chosen(story: Story) -> str:
    """Which λ won, by how much, and over what."""
    soup = story.soup
    version, gain = next(iter(gains(story).items()))
    which = "better" if len(story.references) > 1 else "newest"
    what = story.space.label(soup.recipe)
    if soup.original is not None:
        what += f", which is {soup.original} itself"
    if not gain.value and not gain.stderr:
        return f"Chosen: {what}, no better than {version}, the {which} parent"
    over = f"{gain.value:+.4f} over {version}, the {which} parent"
    return f"Chosen: {what}, {over} ({format_interval(gain)})"


def gate(story: Story) -> str:
    """Whether the gate passed, and why."""
    if story.verdict is not None:
        return verdict_line(story.verdict)
    registered = story.soup.registered
    why = "no OOD tasks were given (--ood-tasks)" if registered else "there is no new version"
    return f"Gate: did not run, {why}"


def verdict_line(verdict: Verdict) -> str:
    """A verdict in one line, with the checks that decided it."""
    checks = verdict.checks
    if verdict.passed:
        told = "; ".join(_short(checks))
        each = f"each of {len(checks)} checks holds" if len(checks) > 1 else "its check holds"
        return f"Gate: passed ({verdict.rules}), {each}: {told}"
    failed = [check for check in checks if not check.passed]
    told = "; ".join(format_check(c).removesuffix(": REFUSED") for c in failed[:_MOST])
    more = f"; and {len(failed) - _MOST} more" if len(failed) > _MOST else ""
    luck = ". This may be bad luck" if luckless(verdict) else ""
    count = f"{len(failed)} of {len(checks)} checks fail{'s' * (len(failed) == 1)}"
    return f"Gate: refused ({verdict.rules}), {count}: {told}{more}{luck}"


def _short(checks: Sequence[Check]) -> list[str]:
    """The checks with the least room, each as `held-out +0.0140 over my-llm v13`."""
    tightest = sorted(checks, key=lambda check: check.bound - check.required)[:_MOST]
    told = [check for check in checks if check in tightest]
    words = [f"{check.name} {check.difference.value:+.4f}" for check in told]
    if len({check.against for check in told}) == 1:
        words[-1] += f" against {told[-1].against}"
    else:
        words = [f"{w} against {c.against}" for w, c in zip(words, told, strict=True)]
    return [*words, "…"] if len(told) < len(checks) else words


def promoted(story: Story) -> str:
    """What was promoted, and when."""
    if story.promotion is not None:
        return promotion_line(story.promotion)
    if story.target:
        return f"Promoted: nothing, {story.target} stays as it was"
    return "Promoted: nothing, as nobody asked for it (--promote)"


def promotion_line(promotion: Promotion) -> str:
    """A promotion in one line: target, version, when, and what was there before."""
    line = f"Promoted: {promotion}"
    if promotion.at:
        line += f", {when(promotion.at)}"
    if promotion.previous is not None:
        line += f", in place of {promotion.previous}"
    return line


def when(at: str) -> str:
    """A time in ISO 8601 for people: `2026-11-29 08:55 UTC`; other text stays as it is."""
    try:
        return f"{datetime.fromisoformat(at).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return at


def renew(text: str, line: str) -> str:
    """A description in which one of the first lines is replaced by a later one, if it has it.

    Args:
        text: the description.
        line: the new line; what stands before its colon names the line that it replaces.
    """
    name = re.escape(line.partition(":")[0])
    return re.sub(rf"^{name}: .*?(?=  $|$)", lambda _: line, text, count=1, flags=re.M)
