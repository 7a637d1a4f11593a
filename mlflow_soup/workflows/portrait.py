"""Describe a registered model: what it holds, its policy, and where its aliases point."""

import contextlib

from mlflow_soup.errors import DeniedError
from mlflow_soup.records import Version, listed
from mlflow_soup.registry import family, naming
from mlflow_soup.registry.descriptions import describe_model
from mlflow_soup.registry.links import version_link
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import find_registered, tags_of
from mlflow_soup.reporting import answers

# the knobs of the policy that the page tells, each with what it is for
_POLICY = {
    "tasks": "The search for a soup scores",
    "ood_tasks": "The gate judges on",
    "margin": "A soup may lose at most",
    "confidence": "The gate must be sure by",
    "test_tasks": "The last, unbiased score is that on",
    "on_version": "When a checkpoint arrives, `watch` does",
}


def portray(client: Store, name: str) -> None:
    """Describe a registered model, unless somebody else has, or the user may not.

    The text is for people: it repeats tags and aliases that anybody with EDIT may have written.
    """
    found = find_registered(client, name)
    if found is None:
        return
    lines = [
        f"- {words} `{_plain(found.tags[tag])}`"
        for knob, words in _POLICY.items()
        if (tag := f"soup.{knob}") in found.tags
    ]
    policy = "\n".join(lines) or "- none: each command names its tasks"
    aliases = [_alias(client, name, a, Version(name, int(n))) for a, n in found.aliases.items()]
    parts = [
        "Checkpoints of a language model, and soups: merges of such checkpoints that mlflow-soup "
        "registered. The tag `soup.parents` marks a soup; its page says what it gained.",
        "\n".join(aliases) or "Champion: none, no alias points to a version",
        f"Policy, from the tags below:\n\n{policy}",
    ]
    with contextlib.suppress(DeniedError):
        describe_model(client, name, "\n\n".join(parts))


def _alias(client: Store, name: str, alias: str, version: Version) -> str:
    """An alias in one line: the version, what it is made of, and since when."""
    tags = tags_of(client, version)
    words = f"{alias.capitalize()}: {version_link(version)}"
    if parents := family.read(version, tags).parents:
        words += f", a soup of {listed([parent for parent, _ in parents])}"
    for told in tags.get(naming.PROMOTIONS, "").split("; "):
        target, _, at = told.rpartition(" ")
        if target in (f"alias {alias}", f"{name}@{alias}") and (since := answers.when(at)):
            words += f", since {since}"
    return words


def _plain(text: str) -> str:
    """A tag's value for a place between backticks, in one line."""
    return " ".join(text.replace("`", "'").split())
