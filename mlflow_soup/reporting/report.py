"""Write a run's report: Markdown for MLflow's pages, lines for the terminal, and one figure.

Every score and every difference has the unit of its metric. An accuracy is a share between 0 and 1,
not percentage points: points would hide that other metrics have other units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlflow_soup.decision import pairing
from mlflow_soup.decision.power import (
    ENOUGH,
    MOST,
    Design,
    chance,
    times_items,
    times_margins,
)
from mlflow_soup.records import (
    Check,
    Difference,
    Distance,
    Evidence,
    Promotion,
    Recipe,
    Score,
    Soup,
    Trial,
    Unbiased,
    Verdict,
    Version,
    listed,
)
from mlflow_soup.search.belief import Array, believe
from mlflow_soup.search.methods import METHODS
from mlflow_soup.search.recommend import expected
from mlflow_soup.search.space import Space

PAGES = ("run", "all λ", "plot", "interactive")  # the links of a report to other pages
_SECTION = "## Out of domain"  # the heading of a report's last section
# colour-blind safe (Okabe & Ito 2008)
literally = rc_context({"text.parse_math": False})  # decorates figures: a name may hold a $
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def bounds(scores: Array, count: int = 12) -> Array:
    """The limits of `count` colours for some scores, ascending; the nearer to the best, the closer.

        b_i = max − (max − min)·(1 − i/count)²,   i = 0 … count

    With equal steps, a few bad scores, as of windows that reach back to the begin of a run, would
    leave one colour for all others.
    """
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    width = max(high - low, 1e-4)  # equal scores need colours, too
    return high - width * np.linspace(1.0, 0.0, count + 1) ** 2


def trial_of(trials: Sequence[Trial], recipe: Recipe) -> Trial | None:
    """The trial of a recipe that has a score; None if there is none."""
    return next((t for t in trials if t.recipe == recipe and t.held_out is not None), None)


def format_difference(difference: Difference, confidence: float = 0.95) -> str:
    """A difference as text: `+0.0142 (95 % interval +0.0021 to +0.0263, 1500 paired items)`."""
    if not difference.value and not difference.stderr:
        return f"no difference, in each of the {difference.count} items"
    low, high = pairing.interval(difference, confidence)
    clusters = ""
    if difference.clusters:
        number = f"{difference.clusters} cluster{'s' * (difference.clusters > 1)}"
        clusters = f" in {number}, design effect {difference.effect:.1f}"
    return (
        f"{difference.value:+.4f} ({confidence:.0%} interval {low:+.4f} to {high:+.4f}, "
        f"{difference.count} paired items{clusters})"
    ).replace("%", " %")


def rows_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_check(check: Check) -> str:
    """One check of the gate in words and numbers, in one line."""
    verdict = "holds" if check.passed else "REFUSED"
    against = f"{check.name} against {check.against}: {check.difference.value:+.4f}"
    return f"{against}, {_finding(check)}: {verdict}"


def _finding(check: Check) -> str:
    """What a check found."""
    least, bound = _required(check), f"({check.side} bound {check.bound:+.4f})"
    if check.side == "lower":
        sure = "surely not below" if check.passed else "not surely above"
        return f"{sure} {least} {bound}"
    if check.side == "upper":
        return f"which may be luck {bound}" if check.passed else f"which is no luck {bound}"
    return f"not below {least}"


def _required(check: Check) -> str:
    """The least bound; with the margin, if that is a share of the rival's score."""
    if not check.required:
        return "0"
    return f"{check.required:+.4f}" + (f" ({check.margin})" if "%" in check.margin else "")


def checks_table(verdict: Verdict) -> str:
    """Every check of a verdict as a Markdown table."""
    rows = [
        [
            check.name,
            str(check.against),
            f"{check.difference.value:+.4f} ± {check.difference.stderr:.4f}",
            _finding(check),
            "yes" if check.passed else "**no**",
        ]
        for check in verdict.checks
    ]
    head = [
        "check",
        "against",
        "difference ± paired standard error",
        "finding",
        "holds",
    ]
    return rows_table(head, rows)


def verdict_line(verdict: Verdict) -> str:
    """The verdict and its rules in one line, before those of its checks."""
    word = "passed" if verdict.passed else "REFUSED"
    return f"gate {word} ({verdict.rules}; positive where the soup is better)"


def verdict_words(verdict: Verdict) -> str:
    """The verdict and its rules in one sentence."""
    word = "passed" if verdict.passed else "refused"
    return f"The gate {word} the soup by these rules: {verdict.rules}."


def power_words(designs: Mapping[float, Design], unknown: Sequence[str]) -> str:
    """How likely the gate passes a soup that is as good as its rivals, before anything is scored.

    Args:
        designs: share of the answers that differ between two models → what the gate judges on.
        unknown: the tasks whose errors nobody knows yet; they count as passed.
    """
    design = designs[max(designs)]
    chances = {share: chance(design) for share, design in designs.items()}
    items = sum(round(measure.freedom) + 1 for measure in design.ood.values())
    said = ", ".join(f"in {passes:.0%} if {share:.0%}" for share, passes in chances.items())
    words = (
        f"The gate passes a soup that is exactly as good as its rivals {said} of the answers "
        f"differ ({len(design.ood)} OOD task{'s' * (len(design.ood) > 1)}, {items} items, margin "
        f"{design.margins})."
    )
    usual = sorted(designs)[len(designs) // 2]
    if chances[usual] < ENOUGH:
        words += f" For {ENOUGH:.0%} at {usual:.0%}: {_remedy(designs[usual])}."
    if unknown:
        words += f" {', '.join(unknown)} counts as passed: its errors are known once it is scored."
    return words.replace("%", " %")


def _remedy(design: Design) -> str:
    if times_items(design) >= MOST:
        return f"even {MOST:.0f} times the OOD items are not enough"
    items, margins = (math.ceil(10.0 * f(design)) / 10.0 for f in (times_items, times_margins))
    return f"{items:.1f} times the OOD items, or {margins:.1f} times the margin"


def luckless(verdict: Verdict) -> str:
    """After a refusal that may be bad luck: how likely an equal soup would have passed; else empty.

    It may be if no check shows a loss beyond the margin.
    """
    failed, confidence = [c for c in verdict.checks if not c.passed], verdict.rules.confidence
    design = Design.of(verdict)
    if not failed or design is None or math.isinf(sum(m.stderr for m in design.ood.values())):
        return ""
    for check in failed:
        highest = pairing.upper_bound(check.difference, confidence)
        if check.side == "upper" or highest < check.required:
            return ""
    passes = chance(design)
    words = (
        "This may be bad luck: with so many items and these errors, a soup that is exactly as good "
        f"as its rivals passes in {passes:.0%}."
    )
    if passes < ENOUGH:
        words += f" For {ENOUGH:.0%}: {_remedy(design)}."
    return words.replace("%", " %")


def verdict_section(verdict: Verdict, roles: Mapping[str, Evidence]) -> str:
    """The last section of a report: the verdict, its evidence and its checks."""
    parts = [
        f"{_SECTION}: {'passed' if verdict.passed else 'refused'}",
        verdict_words(verdict),
        ood_table(roles),
        checks_table(verdict),
    ]
    if words := luckless(verdict):
        parts.append(words)
    return "\n\n".join(parts) + "\n"


def renew(text: str, section: str) -> str:
    """A report whose last section is replaced by another verdict's."""
    before = text[: text.index(_SECTION)] if _SECTION in text else f"{text.rstrip()}\n\n"
    return before.lstrip() + section


def ood_table(roles: Mapping[str, Evidence]) -> str:
    """The held-out and OOD scores of every model as a Markdown table, as lm-eval prints them."""
    soup = roles["soup"]
    names = ["held-out", *(name for name, _ in soup.ood)]
    rows = []
    for role, evidence in roles.items():
        values = [f"{evidence.held_out.value:.4f}"]
        values += [f"{score.metrics[0].value:.4f}" for _, score in evidence.ood]
        rows.append([f"{role.split()[0]} ({evidence.version})", *values])
    return rows_table(["model", *names], rows)


@dataclass(frozen=True)
class Story:
    """Everything that the report of a run shows.

    Attributes:
        method: the name of the method that found the soup.
        space: the space of merge weights that was searched.
        soup: the soup.
        existed: True when an earlier run of the same request registered the soup.
        trials: all trials, in order.
        references: the parents that were scored alone, oldest first.
        gains: the paired held-out difference between the soup and each of these.
        better: the position of the better one.
        roles: role → evidence of the OOD stage; empty when there was no OOD stage.
        verdict: the verdict of the gate, or None when there was no OOD stage.
        target: where the request promotes the soup to; empty for nowhere.
        promotion: the promotion; None when there was none.
        distance: the distance of the parents; None of a soup of one parent, or of many.
        tested: role → score on the test set; empty without one.
        time_tag: the version tag with the times of the space; empty if they are only an order.
        notes: more sentences for the reader.
        next: the command that promotes what the gate passed; empty if none was left out.
    """

    method: str
    space: Space
    soup: Soup
    existed: bool
    trials: tuple[Trial, ...]
    references: tuple[Version, ...]
    gains: tuple[Difference, ...]
    better: int
    roles: Mapping[str, Evidence]
    verdict: Verdict | None
    target: str
    promotion: Promotion | None
    distance: Distance | None
    tested: Mapping[str, Unbiased] = field(default_factory=dict)
    time_tag: str = ""
    notes: tuple[str, ...] = ()
    next: str = ""


def gains(story: Story) -> dict[Version, Difference]:
    """The gain over each reference, the better one first."""
    order = sorted(range(len(story.gains)), key=lambda i: (i != story.better, i))
    return {story.references[i]: story.gains[i] for i in order}


def test_gains(story: Story) -> dict[Version, Difference]:
    """The gain on the test set: over each parent, the better one first, and over the champions.

    Which parent is the better one, the held-out items say: the test set chooses nothing.
    """
    soup, better = story.tested["soup"].score, story.references[story.better]
    rivals = {
        tested.version: tested.score
        for kind in ("parent", "champion")
        for role, tested in story.tested.items()
        if role.startswith(kind)
    }
    order = sorted(rivals, key=lambda version: version != better)  # a stable sort
    return {version: pairing.paired(soup, rivals[version]) for version in order}


def _named_gains(story: Story) -> list[tuple[str, Difference]]:
    """The gains, each with the name of the parent."""
    best = "the better parent" if len(story.references) > 1 else "the newest parent"
    (first, gain), *others = gains(story).items()
    return [(f"{best}, {first}", gain), *((str(version), gain) for version, gain in others)]


def _named_test_gains(story: Story) -> list[tuple[str, Difference]]:
    """The gains on the test set, each with the name of the version."""
    which = "better parent on the held-out items" if len(story.references) > 1 else "newest parent"
    parents = {t.version for role, t in story.tested.items() if role.startswith("parent")}
    (first, gain), *others = test_gains(story).items()
    return [
        (f"{first}, the {which}", gain),
        *((f"{v}{'' if v in parents else ', the champion'}", gain) for v, gain in others),
    ]


def _tested_rows(story: Story) -> list[tuple[str, Score]]:
    """Soup, parents and champions with their scores on the test set; each version once."""
    rows: dict[Version, tuple[str, Score]] = {}
    for role, tested in story.tested.items():
        name = f"{role.split()[0]} ({tested.version})"
        rows.setdefault(tested.version, (name, tested.score))
    return list(rows.values())


def _unbiased(story: Story) -> str:
    words = (
        "These items took no part in the choice of the soup or in the gate, so these gains are "
        "unbiased"
    )
    if METHODS[story.method].chooses:
        words += "; those on the held-out items are somewhat optimistic"
    return words


def _metrics_of(score: Score) -> str:
    return ", ".join(f"{m.task} {m.metric.removesuffix(',none')}" for m in score.metrics)


def test_section(story: Story) -> str:
    """The section of a report on the test set."""
    rows = [[name, f"{s.value:.4f}", f"{s.stderr:.4f}"] for name, s in _tested_rows(story)]
    return "\n\n".join(
        [
            f"## Test set: {_metrics_of(story.tested['soup'].score)}",
            rows_table(["model", "score", "standard error"], rows),
            "\n".join(
                f"- Against {name}: **{format_difference(d)}**"
                for name, d in _named_test_gains(story)
            ),
            f"{_unbiased(story)}.",
        ]
    )


def luck(
    method: str,
    space: Space,
    trials: Sequence[Trial],
    soup: Soup,
    measured: Sequence[tuple[Recipe, Score]],
) -> list[str]:
    """Sentences on the luck in the highest score, and on what was chosen instead.

    Args:
        method: the method of the search.
        space: the space that was searched.
        trials: all trials.
        soup: the soup.
        measured: the recipes that could be chosen, two or more, each with its score.
    """
    optimism = pairing.optimism([score for _, score in measured])
    could = " that could be chosen" if len(measured) < len(trials) else ""
    words = (
        f"The highest of the {len(measured)} scores{could} is expected to be {optimism:.4f} too "
        "high: some luck made it the highest."
    )
    if method != "bayesopt":
        return [words]
    words += (
        " The soup was chosen by the curve through all scores, so its own score usually holds less "
        "luck."
    )
    top, score = max(measured, key=lambda pair: pair[1].value)
    if score.value <= soup.held_out.value:
        return [words]
    chosen = space.label(soup.recipe)
    here, there = expected(space, trials, np.array([soup.recipe.lam, top.lam]))
    why = (
        f"expects {chosen} to be better by {here - there:.4f} on new items, so the higher score "
        "counts as luck."
    )
    if there > here:
        why = (
            f"expects it to be better by only {there - here:.4f} on new items, too little to "
            "prefer it to the plain average."
        )
    return [
        words,
        f"{space.label(top)} scored {score.value:.4f}, more than the chosen {chosen} with "
        f"{soup.held_out.value:.4f}. The curve through all scores {why}",
    ]


def plain(space: Space, recipe: Recipe) -> Recipe:
    """The plain average of the versions that a recipe gives a weight."""
    members = np.array(recipe.lam) > 0.0
    return space.recipe(members / members.sum())


def baselines(story: Story) -> list[tuple[str, Trial]]:
    """The trials of the parents, the uniform soup and the chosen soup, each with a label.

    Of a window that leaves some versions out, also the plain average of the window.
    """
    space, soup, trials = story.space, story.soup, story.trials
    alone = zip(story.references, space.alone(), strict=True)
    chosen = "soup" if soup.original is None else f"{soup.original} itself"
    named = [(f"{version} alone", recipe) for version, recipe in alone]
    named.append(("uniform soup", space.uniform()))
    if space.times and plain(space, soup.recipe) not in (space.uniform(), soup.recipe):
        named.append(("plain average of the window", plain(space, soup.recipe)))
    named.append((f"chosen {chosen}", soup.recipe))
    named = [(f"{name} ({space.label(recipe)})", recipe) for name, recipe in named]
    found = [(label, trial_of(trials, recipe)) for label, recipe in named]
    return [(label, trial) for label, trial in found if trial is not None]


def markdown(story: Story, links: Mapping[str, str]) -> str:
    """The report in Markdown, below the first lines of `answers`.

    Args:
        story: what the report shows.
        links: the targets for `PAGES`; each parent's name → its link in Markdown.
    """
    soup, trials = story.soup, story.trials
    parents = listed([links[str(p.version)] for p in soup.parents])
    rows = []
    for label, trial in baselines(story):
        assert trial.held_out is not None
        rows.append([label, f"{trial.held_out.value:.4f}", f"{trial.held_out.stderr:.4f}"])
    shares = zip(reversed(soup.lam), reversed(soup.parents), strict=True)
    mixture = " + ".join(f"{weight:g} × {parent.version}" for weight, parent in shares)
    if soup.recipe.method != "linear":
        mixture = listed([parent.version for parent in soup.parents])
    pages = ", ".join(f"[{name}]({links[name]})" for name in PAGES)
    parts = [
        f"Soup of {parents}: {mixture}. {story.method}: {METHODS[story.method].words}; "
        f"{len(trials)} evaluations ({pages}).",
        f"## Held-out: {_metrics_of(soup.held_out)}",
        rows_table(["model", "score", "standard error"], rows),
        "\n".join(
            f"- Against {name}: **{format_difference(d)}**" for name, d in _named_gains(story)
        ),
        "The soup was chosen on these items, so its gains are somewhat optimistic. The OOD items "
        "did not influence the choice."
        if METHODS[story.method].chooses
        else "These scores did not influence the choice of the soup.",
    ]
    parts += story.notes
    if story.tested:
        parts.append(test_section(story))
    if story.verdict is not None:
        parts.append(verdict_section(story.verdict, story.roles).rstrip())
    return "\n\n".join(parts) + "\n"


def trials_table(story: Story) -> str:
    """All trials in order, as a Markdown section."""
    history = []
    for trial in story.trials:
        score = f"{trial.held_out.value:.4f}" if trial.held_out else "failed"
        row = [str(trial.number), str(trial.recipe), score]
        chosen = trial.recipe == story.soup.recipe
        history.append([f"**{cell}**" for cell in row] if chosen else row)
    return (
        "\n## Trials\n\nThe chosen one is bold.\n\n"
        + rows_table(["trial", "λ", "held-out"], history)
        + "\n"
    )


@literally
def landscape(story: Story) -> Figure:
    """The held-out scores: over λ for two parents, by trial number for more.

    The parents, the uniform soup and the chosen soup have marks of their own. For two parents, the
    figure also shows the curve that the search estimated.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    space, soup = story.space, story.soup
    if space.count == 2:
        places = {t.number: t.recipe.lam[-1] for t in story.trials}
        if METHODS[story.method].searches:
            _draw_curve(axes, story)
        newer, older = soup.parents[-1].version, soup.parents[0].version
        axes.set_xlabel(f"λ, weight of {newer} (rest: {older})")
    else:
        places = {t.number: float(t.number) for t in story.trials}
        axes.set_xlabel("trial")
    chosen = "chosen λ" if soup.recipe.method == "linear" else f"chosen: {soup.recipe}"
    marks = (
        ("trial", "o", GREY, [t.recipe for t in story.trials]),
        ("parents", "s", GREEN, list(space.alone())),
        ("uniform soup", "D", GREEN, [space.uniform()]),
        (chosen, "o", ORANGE, [soup.recipe]),
    )
    for label, marker, colour, recipes in marks:
        found = [t for t in (trial_of(story.trials, r) for r in recipes) if t is not None]
        if not found:
            continue
        ring = label == chosen
        axes.plot(
            [places[t.number] for t in found],
            [t.held_out.value for t in found if t.held_out],
            marker,
            color=colour,
            markersize=16 if ring else 6 if label == "trial" else 8,
            markeredgewidth=2.5 if ring else 1.0,
            fillstyle="none" if ring else "full",
            label=label,
        )
    names = ", ".join(dict.fromkeys(m.task for m in soup.held_out.metrics))
    axes.set_ylabel(f"held-out score: {names}")
    axes.set_title(f"Soup of {listed([p.version for p in soup.parents])}", wrap=True)
    axes.legend(frameon=False)
    return figure


def estimate(story: Story, points: Array) -> tuple[Array, Array, Array | None]:
    """The estimated curve of a pair, for all drawings of it.

    Args:
        story: a search.
        points: merge weights, shape (m, 2).

    Returns:
        Shape (m,) each: the expected scores; half of their 95 % band; the smoothed curve that
        chooses λ, or None if the curve was not reconstructed from the items.
    """
    belief = believe(story.space, story.trials)
    mean, std = belief.posterior.predict(points)
    if belief.landscape is None:
        return mean, 1.96 * std, None
    smooth = belief.landscape.population(points)
    smooth += np.mean(mean - smooth)  # only the shape of this curve matters
    return mean, 1.96 * std, smooth


def _draw_curve(axes: Axes, story: Story) -> None:
    """Draw the estimated curve of a pair with its 95 % band, and shade the part not searched."""
    alpha = story.space.alpha
    grid = np.linspace(0.0, 1.0, 401)
    mean, half, smooth = estimate(story, np.column_stack([1.0 - grid, grid]))
    axes.fill_between(grid, mean - half, mean + half, color=BLUE, alpha=0.15, lw=0)
    what = "curve from the items" if smooth is not None else "Gaussian process"
    axes.plot(grid, mean, color=BLUE, label=f"{what}, 95 % band")
    if smooth is not None:
        axes.plot(grid, smooth, "--", color=ORANGE, label="smoothed curve, which chooses λ")
    if alpha > 0:
        axes.axvspan(-0.02, alpha, color=GREY, alpha=0.08, lw=0)
        axes.annotate(
            "not searched",
            (alpha / 2, 0.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            color=GREY,
        )
    axes.set_xlim(-0.02, 1.02)


def _tested_lines(story: Story) -> list[str]:
    rows = _tested_rows(story)
    width = max(len(name) for name, _ in rows)
    lines = ["score on the test set", *(f"  {name:<{width}}  {s.value:.4f}" for name, s in rows)]
    lines += [
        f"soup against {name}: {format_difference(d)}" for name, d in _named_test_gains(story)
    ]
    return [*lines, f"{_unbiased(story)}."]


def summary(story: Story, look: Sequence[str]) -> str:
    """The last lines that the command prints.

    Args:
        story: what the lines report.
        look: lines that say where to find the run and the version.
    """
    soup = story.soup
    width = max(len(label) for label, _ in baselines(story))
    lines = ["held-out score"]
    for label, trial in baselines(story):
        assert trial.held_out is not None
        lines.append(f"  {label:<{width}}  {trial.held_out.value:.4f}")
    lines += [
        f"soup against {name}: {format_difference(gain)}" for name, gain in _named_gains(story)
    ]
    if story.tested:
        lines += _tested_lines(story)
    done = "an earlier run registered it as" if story.existed else "registered as"
    if not soup.registered:
        done = "not registered, because it has the same weights as"
    how = f"{story.space.label(soup.recipe)}, {len(story.trials)} evaluations"
    lines.append(f"{done} {soup.version.uri} ({how})")
    if story.verdict is not None:
        lines.append(verdict_line(story.verdict))
        lines += [f"  {format_check(check)}" for check in story.verdict.checks]
        if words := luckless(story.verdict):
            lines.append(words)
    else:
        why = (
            "no OOD tasks were given (--ood-tasks)"
            if soup.registered
            else "there is no new version"
        )
        lines.append(f"gate not run: {why}")
    if story.promotion is not None:
        lines.append(f"promoted: {story.promotion}")
    elif story.target:
        lines.append(f"nothing was promoted to {story.target}")
    if story.next:
        look = [*look, f"next: {story.next}"]
    return "\n".join([*lines, *story.notes, *look])
