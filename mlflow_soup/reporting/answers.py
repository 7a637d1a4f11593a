"""The first lines of a page: what won, by how much, over what; the gate and why; what was promoted.

MLflow shows only the first lines of a run's description, and the first words of a version's.

    Chosen: λ = 0.5705, +0.0140 over v13, the better parent (95 %: +0.0007 to +0.0273)
    Gate: passed (margin 0.01, confidence 0.95); closest of 3 checks: piqa +0.0053 against v13
    Promoted: alias champion → my-llm v14, 2026-11-29 08:55 UTC
"""

import re
from datetime import UTC, datetime

from mlflow_soup.decision import pairing
from mlflow_soup.records import Promotion, Verdict, Version
from mlflow_soup.reporting.report import Story, gains, luckless

_BREAK = "  \n"  # Markdown's line break


def first_lines(story: Story) -> str:
    """The answers about a finished run, in Markdown."""
    return _BREAK.join((chosen(story), gate(story), promoted(story)))


def chosen(story: Story) -> str:
    """Which λ won, by how much, and over what."""
    soup = story.soup
    parent, gain = next(iter(gains(story).items()))
    version = _short(parent, soup.version.name)
    which = "better" if len(story.references) > 1 else "newest"
    what = story.space.label(soup.recipe)
    if soup.original is not None:
        what += f", which is {soup.original} itself"
    if not gain.value and not gain.stderr:
        return f"Chosen: {what}, no better than {version}, the {which} parent"
    low, high = pairing.interval(gain, 0.95)
    over = f"{gain.value:+.4f} over {version}, the {which} parent"
    return f"Chosen: {what}, {over} (95 %: {low:+.4f} to {high:+.4f})"


def gate(story: Story) -> str:
    """Whether the gate passed, and why."""
    if story.verdict is not None:
        return verdict_line(story.verdict, story.soup.version.name)
    registered = story.soup.registered
    why = "no OOD tasks were given (--ood-tasks)" if registered else "there is no new version"
    return f"Gate: did not run, {why}"


def verdict_line(verdict: Verdict, model: str) -> str:
    """A verdict in one line, with the check that has the least room, or lacks most.

    Args:
        verdict: the verdict.
        model: the registered model of the page; its versions are told without its name.
    """
    checks, failed = verdict.checks, [check for check in verdict.checks if not check.passed]
    if not checks:
        return f"Gate: refused ({verdict.rules}), nothing was checked"
    check = min(failed or checks, key=lambda check: check.bound - check.required)
    told = f"{check.name} {check.difference.value:+.4f} against {_short(check.against, model)}"
    if verdict.passed:
        which = f"closest of {len(checks)} checks" if len(checks) > 1 else "its check"
        return f"Gate: passed ({verdict.rules}); {which}: {told}"
    luck = ", which may be bad luck" if luckless(verdict) else ""
    count = f"{len(failed)} of {len(checks)} checks fail{'s' * (len(failed) == 1)}"
    return f"Gate: refused ({verdict.rules}); {count}: {told}{luck}"


def _short(version: Version, model: str) -> str:
    """A version on a page of a model."""
    return version.short if version.name == model else str(version)


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
    if told := when(promotion.at):
        line += f", {told}"
    if promotion.previous is not None:
        line += f", in place of {promotion.previous}"
    return line


def when(at: str) -> str:
    """A time in ISO 8601 for people: `2026-11-29 08:55 UTC`; empty for other text."""
    try:
        return f"{datetime.fromisoformat(at).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return ""


def renew(text: str, line: str) -> str:
    """A description in which one of the first lines is replaced by a later one, if it has it.

    Args:
        text: the description.
        line: the new line; what stands before its colon names the line that it replaces.
    """
    name = re.escape(line.partition(":")[0])
    return re.sub(rf"^{name}: .*?(?=  $|$)", lambda _: line, text, count=1, flags=re.M)
