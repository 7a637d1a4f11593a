"""Publish a finished run in MLflow: metrics, figures, the report, and the version's page."""

from collections.abc import Sequence

from mlflow.entities import Metric

from mlflow_soup.records import Distance, Soup, Trial, listed
from mlflow_soup.redaction import redact
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.descriptions import describe
from mlflow_soup.registry.evaluations import score_metrics
from mlflow_soup.registry.links import (
    artifact_path,
    how_to_look,
    link,
    run_path,
    share_view,
    target,
    version_link,
    version_path,
)
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_soups
from mlflow_soup.reporting import answers, geometry, interactive, report, tables, windows
from mlflow_soup.search.belief import LANDSCAPE, believe
from mlflow_soup.search.schedule import Schedule
from mlflow_soup.workflows.job import Job
from mlflow_soup.workflows.portrait import portray


def notes(job: Job, trials: Sequence[Trial], soup: Soup, apart: Distance | None) -> list[str]:
    """Sentences that a reader needs to judge the scores."""
    client, spec = job.client, job.spec
    notes = []
    if soup.original is not None:
        what = "The soup" if job.method.merges else "Nothing was merged: the soup"
        what += f" has the same weights as {soup.original}"
        if not soup.registered:
            what += ", so it was not registered; to register it all the same: --register-copies"
        notes.append(f"{what}.")
    if soup.registered:
        found = find_soups(client, soup.version.name, {naming.DIGEST: soup.digest})
        if others := [version for version in found if version != soup.version]:
            has = "has" if len(others) == 1 else "have"
            notes.append(f"{listed(others)} {has} the same weights, by another request.")
    if job.bench.test is not None and not soup.registered:
        notes.append("The test set was not scored: there is no new version.")
    if spec.method == "bayesopt":
        if len(trials) < spec.budget:
            notes.append(
                f"The search ended after {len(trials)} of {spec.budget} evaluations: one more was "
                f"expected to gain less than {spec.stop:g} of the paired standard error."
            )
        belief = believe(job.space, trials)
        if spec.acquisition == LANDSCAPE and belief.landscape is None:
            notes.append(f"The curve was not reconstructed from the items: {belief.why}.")
    if job.space.times:
        notes += windows.words(job.space, soup, job.time_tag, searched=job.method.searches)
    measured = [(t.recipe, t.held_out) for t in trials if t.held_out is not None]
    if job.method.searches:
        notes += [
            f"{job.space.label(recipe)} scores {score.value:.4f}, but gives the newest version "
            f"less than the smallest weight allowed, --alpha {job.space.alpha:g}."
            for recipe, score in measured
            if not job.space.feasible(recipe) and score.value > soup.held_out.value
        ]
        measured = [(recipe, score) for recipe, score in measured if job.space.feasible(recipe)]
    if job.method.chooses and len(measured) > 1:
        notes += report.luck(spec.method, job.space, trials, soup, measured)
    if noise := soup.held_out.noise:
        notes.append(
            f"Answers are sampled: with another seed, a score would differ by up to {noise:.4f} "
            "(standard deviation)."
        )
    if job.method.needs:
        notes += job.statistics_notes
    distances = []
    if apart is not None:
        names = [parent.version.short for parent in soup.parents]
        distances.append(geometry.words(apart, names))
        # a search for a window has compared how far it may reach
        if not spec.scheduled:
            distances += [geometry.caution(apart, names), geometry.barrier(job.space, trials)]
        if soup.recipe.method == "linear":
            distances.append(geometry.theory(apart, soup.lam))
    notes += filter(None, distances)
    first = next(t for t in trials if t.held_out is not None)
    if cut := int(client.get_run(first.run_id).data.metrics.get(naming.TRUNCATED, 0)):
        notes.append(f"{cut} held-out requests were longer than the longest input, and were cut.")
    return notes


def publish(client: Store, run_id: str, key: str, story: report.Story) -> str:
    """Write metrics, report, figures and the version's description.

    Args:
        client: the store's client.
        run_id: the search run.
        key: its key.
        story: what to tell.

    Returns:
        The summary.
    """
    soup = story.soup
    chosen = next(trial for trial in story.trials if trial.recipe == soup.recipe)
    axes = ("duration", "power") if isinstance(story.space, Schedule) else ("lambda",)
    run_page = run_path(client, run_id)
    view, plot = share_view(client, run_id, key, chosen.run_id, axes)
    links = {"run": target(run_page), "all λ": target(view), "plot": target(plot)}
    links["interactive"] = target(artifact_path(client, run_id, naming.INTERACTIVE))
    links |= {str(parent.version): version_link(parent.version) for parent in soup.parents}
    text = redact(f"{answers.first_lines(story)}\n\n{report.markdown(story, links)}")
    space = story.space
    names = [parent.version.short for parent in soup.parents]
    history = windows.trials_table if isinstance(space, Schedule) else report.trials_table
    whole = text + history(story)
    if story.distance is not None:
        layers = tables.markdown(geometry.table(story.distance, names))
        whole += f"\n## Distance of the parents\n\n{layers}\n"
    whole = redact(whole)
    tag = naming.VERSION if soup.registered else naming.ORIGINAL
    tags = {tag: f"{soup.version.name}/{soup.version.number}"}
    if story.verdict is not None:
        tags[naming.GATE] = naming.PASSED if story.verdict.passed else naming.REFUSED
    tracking.log(client, run_id, metrics=_metrics(story), tags=tags, description=whole)
    client.log_text(run_id, whole, naming.REPORT)
    client.log_text(run_id, interactive.page(story), naming.INTERACTIVE)
    figure = windows.figure(story) if space.times else report.landscape(story)
    for suffix in ("png", "svg"):
        client.log_figure(run_id, figure, f"{naming.LANDSCAPE}.{suffix}")
    if story.distance is not None:
        client.log_figure(run_id, geometry.distances(story.distance, names), naming.DISTANCES)
    if soup.registered:
        describe(client, soup.version, text)
        if story.promotion is None:  # else it was done when the alias moved
            portray(client, soup.version.name)
    pages = [
        f"version: {link(version_path(soup.version))}",
        f"run: {link(run_page)}",
        f"all λ: {link(view)}",
    ]
    if command := how_to_look():
        pages.append(f"to open these, run: {command}")
    return report.summary(story, pages)


def _metrics(story: report.Story) -> list[Metric]:
    """The metrics of the search run."""
    soup = story.soup
    gain = story.gains[story.better]
    numbers = {
        naming.GAIN: gain.value,
        naming.GAIN_STDERR: gain.stderr,
        naming.CHOSEN_LAMBDA: soup.recipe.lam[-1],
    }
    if isinstance(story.space, Schedule) and (found := story.space.window_of(soup.recipe)):
        numbers |= dict(zip((naming.DURATION, naming.POWER), found, strict=True))
    if story.distance is not None:
        whole = story.distance.whole
        numbers |= {
            naming.KL_RATIO: geometry.kl_ratio(whole, soup.lam),
            naming.RELATIVE_L2: whole.relative(0, -1),
            naming.COSINE: whole.cosine(0, -1),
        }
    metrics = score_metrics(soup.held_out, naming.HELD_OUT)
    metrics += [tracking.metric(key, _rounded(value)) for key, value in numbers.items()]
    metrics += [
        tracking.metric(naming.CURVE, t.held_out.value, round(1000 * t.recipe.lam[-1]))
        for t in story.trials
        if t.held_out is not None and story.space.count == 2
    ]
    for _, score in story.roles["soup"].ood if story.roles else ():
        metrics += [tracking.metric(f"{naming.OOD}/{m.key}", m.value) for m in score.metrics]
    if story.tested:
        tested = next(iter(report.test_gains(story).values()))
        metrics += score_metrics(story.tested["soup"].score, naming.TEST)
        metrics.append(tracking.metric(naming.TEST_GAIN, _rounded(tested.value)))
        metrics.append(tracking.metric(naming.TEST_GAIN_STDERR, _rounded(tested.stderr)))
    return metrics


def _rounded(value: float) -> float:
    """A number that we computed, for people; scores keep every digit, as lm-eval prints them."""
    return round(value, 6)
