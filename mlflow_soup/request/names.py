"""What a user may name: versions, models, and where a soup is promoted to."""

import re
from dataclasses import dataclass

from mlflow_soup.errors import SpecError

_VERSION = re.compile(r"v?(?P<number>[1-9][0-9]*)|@(?P<alias>[A-Za-z0-9_-]{1,255})")
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?=v?[0-9])|(?=@))(?P<version>[^/]+)")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,127}")
_PROMOTE = re.compile(
    r"(?:(?P<kind>alias|stage):)?(?P<name>[A-Za-z0-9_-]+)"
    r"|model:(?P<model>[A-Za-z0-9][A-Za-z0-9_. -]{0,127})@(?P<alias>[A-Za-z0-9_-]+)"
)
STAGES = ("Staging", "Production")  # Archived is where the others go


@dataclass(frozen=True)
class VersionRef:
    """A version as the user names it: a number or an alias."""

    number: int | None
    alias: str | None

    def __str__(self) -> str:
        return f"@{self.alias}" if self.alias else f"v{self.number}"


def parse_version(text: str, where: str = "--version") -> VersionRef:
    """`v12`, `12` or `@champion`; `where` says for errors which option it came from.

    Raises:
        SpecError: it is none of them.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text.strip()!r} names no version",
            where=where,
            fix="write a version as v12, 12 or @alias",
        )
    number = match["number"]
    return VersionRef(int(number) if number else None, match["alias"])


def parse_uri(text: str, where: str = "argument URI") -> tuple[str, VersionRef]:
    """Model and version of `models:/my-llm/14`, `models:/my-llm/v14` or `models:/my-llm@champion`.

    Raises:
        SpecError: it is none of them; a logged model and a stage are not.
    """
    text = text.strip()
    match = _URI.fullmatch(text)
    if match is None:
        fix = "write models:/my-llm/14 or models:/my-llm@champion"
        if re.fullmatch(r"models:/m-[0-9a-f]+", text):
            fix = f"it is a logged model: register it, then {fix}"
        elif re.fullmatch(r"(?i)models:/[^/]+/(none|staging|production|archived|latest)", text):
            fix = f"stages and latest move from version to version: {fix}"
        raise SpecError(f"{text!r} names no registered version", where=where, fix=fix)
    check_name(match["name"], where)
    return match["name"], parse_version(match["version"], where)


def parse_pair(text: str, where: str = "--pair") -> tuple[VersionRef, ...]:
    """`older,newer`, two different versions.

    Raises:
        SpecError: there are not two, or they are the same.
    """
    refs = _parse_refs(text, where)
    if len(refs) != 2:
        raise SpecError(
            f"a pair is two versions, and {text!r} names {len(refs)}",
            where=where,
            fix="name the older, then the newer: --pair v12,v13; more than two: --versions",
        )
    return refs


def parse_versions(text: str) -> tuple[VersionRef, ...]:
    """`v11,v12,v13`: two or more different versions, the newest last.

    Raises:
        SpecError: there are fewer, or one is named twice.
    """
    refs = _parse_refs(text, "--versions")
    if len(refs) < 2:
        raise SpecError(
            f"a soup needs two versions at least, and {text!r} names {len(refs)}",
            where="--versions",
            fix="name them by age, the newest last: --versions v11,v12,v13",
        )
    return refs


def parse_pairs(text: str) -> tuple[tuple[VersionRef, ...], ...]:
    """`v11,v12 v12,v13`: one pair or more, as `parse_pair` reads them.

    Raises:
        SpecError: one of them is no pair, or is named twice.
    """
    for part in text.split():
        if len([ref for ref in part.split(",") if ref.strip()]) != 2:
            raise SpecError(
                f"{part!r} is no pair",
                where="--pairs",
                fix="two versions by a comma, pairs by spaces, in quotes: 'v11,v12 v12,v13'",
            )
    pairs = tuple(parse_pair(part, "--pairs") for part in text.split())
    if len(set(pairs)) < len(pairs):
        raise SpecError(
            f"{text!r} names a pair twice", where="--pairs", fix="name each once: 'v11,v12 v12,v13'"
        )
    return pairs


def _parse_refs(text: str, where: str) -> tuple[VersionRef, ...]:
    refs = tuple(parse_version(part, where) for part in text.split(",") if part.strip())
    twice = next((ref for ref in refs if refs.count(ref) > 1), None)
    if twice is not None:
        raise SpecError(
            f"{twice} is named twice", where=where, fix="name each version once: v12,v13"
        )
    return refs


@dataclass(frozen=True)
class Target:
    """Where a promotion points: an alias, a stage, or an alias of another registered model."""

    kind: str  # alias, stage or model
    name: str  # of the alias or stage
    model: str = ""  # kind `model` only

    def __str__(self) -> str:
        return f"{self.model}@{self.name}" if self.model else f"{self.kind} {self.name}"


def parse_target(text: str) -> Target:
    """`alias:champion` (or just `champion`), `stage:Production`, `model:prod-llm@champion`.

    Raises:
        SpecError: it is none of them, the stage is not one of MLflow's, or the alias is reserved.
    """
    match = _PROMOTE.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text!r} is nowhere a version can be promoted to",
            where="--promote",
            fix="write alias:champion, stage:Production or model:prod-llm@champion",
        )
    if match["kind"] != "stage":
        check_alias(match["alias"] or match["name"], "--promote")
    if match["model"]:
        return Target("model", match["alias"], match["model"])
    if match["kind"] == "stage":
        stage = match["name"].capitalize()
        if stage not in STAGES:
            raise SpecError(
                f"{match['name']!r} is no stage to promote to",
                where="--promote",
                fix=f"one of {', '.join(STAGES)}; or an alias: alias:champion",
            )
        return Target("stage", stage)
    return Target("alias", match["name"])


def check_alias(alias: str, where: str) -> None:
    """Refuse what MLflow does not take as an alias."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise SpecError(
            f"{alias!r} cannot be an alias",
            where=where,
            fix="letters, digits, _ and -, up to 255; MLflow reserves latest and v1, v2, …",
        )


def check_name(model: str, where: str = "--model, or MLFLOW_SOUP_MODEL") -> None:
    """Refuse names of registered models that cannot be put into MLflow's search filters."""
    if model and not _MODEL.fullmatch(model):
        raise SpecError(
            f"{model!r} is not taken as the name of a registered model",
            where=where,
            fix="letters, digits, spaces and _.- only, a letter or digit first",
        )
