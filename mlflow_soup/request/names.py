"""Names that a user writes: of versions, models and promotion targets."""

import re
from dataclasses import dataclass

from mlflow_soup.errors import SpecError
from mlflow_soup.redaction import redact_line

_VERSION = re.compile(r"v?(?P<number>[1-9][0-9]{0,17})|@(?P<alias>[A-Za-z0-9_-]{1,255})")
_URI = re.compile(r"models:/(?P<name>[^/]+)(?:/(?=v?[0-9])|(?=@[^@]*$))(?P<version>[^/]+)", re.S)
_LONGEST = 200  # MLflow's 256, less what the ledger of a model needs for the name of its experiment
_PROMOTE = re.compile(
    r"(?:(?P<kind>alias|stage):)?(?P<name>[A-Za-z0-9_-]+)"
    r"|model:(?P<model>[^/]+)@(?P<alias>[A-Za-z0-9_-]+)",
    re.S,
)
STAGES = ("Staging", "Production")  # MLflow moves what they replace to Archived


@dataclass(frozen=True)
class VersionRef:
    """A version as a user names it: by number or by alias."""

    number: int | None
    alias: str | None

    def __str__(self) -> str:
        return f"@{self.alias}" if self.alias else f"v{self.number}"


def parse_version(text: str, where: str = "--version") -> VersionRef:
    """The version that `v12`, `12` or `@champion` means.

    Args:
        text: what the user wrote.
        where: the option that it came from, for errors.

    Raises:
        SpecError: the text is neither a number nor an alias.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text.strip()!r} is not a version",
            where=where,
            fix="write a version as v12, 12 or @alias",
        )
    number = match["number"]
    return VersionRef(int(number) if number else None, match["alias"])


def parse_uri(text: str, where: str = "argument URI") -> tuple[str, VersionRef]:
    """Model and version of `models:/my-llm/14`, `models:/my-llm/v14` or `models:/my-llm@champion`.

    Raises:
        SpecError: the text is not such a URI. A logged model or a stage is not a version.
    """
    text = text.strip()
    match = _URI.fullmatch(text)
    if match is None:
        fix = "write models:/my-llm/14 or models:/my-llm@champion"
        if re.fullmatch(r"models:/m-[0-9a-f]+", text):
            fix = f"this is a logged model: register it, then {fix}"
        elif re.fullmatch(r"(?i)models:/[^/]+/(none|staging|production|archived|latest)", text):
            fix = f"name one version, because stages and latest move: {fix}"
        raise SpecError(f"{text!r} is not the URI of a registered version", where=where, fix=fix)
    check_name(match["name"], where)
    return match["name"], parse_version(match["version"], where)


def parse_pair(text: str, where: str = "--pair") -> tuple[VersionRef, ...]:
    """The two versions of `older,newer`.

    Raises:
        SpecError: the text does not name two different versions.
    """
    refs = _parse_refs(text, where)
    if len(refs) != 2:
        raise SpecError(
            f"a pair is two versions, but {text!r} names {len(refs)}",
            where=where,
            fix="name the older version, then the newer: --pair v12,v13; for more than two use "
            "--versions",
        )
    return refs


def parse_versions(text: str) -> tuple[VersionRef, ...]:
    """The two or more versions of `v11,v12,v13`, the newest last.

    Raises:
        SpecError: there is only one, or one is named twice.
    """
    refs = _parse_refs(text, "--versions")
    if len(refs) < 2:
        raise SpecError(
            f"a soup needs at least two versions, but {text!r} names {len(refs)}",
            where="--versions",
            fix="name the versions by age, the newest last: --versions v11,v12,v13",
        )
    return refs


def parse_pairs(text: str) -> tuple[tuple[VersionRef, ...], ...]:
    """The pairs of `v11,v12 v12,v13`.

    Raises:
        SpecError: one is not a pair, or is named twice.
    """
    for part in text.split():
        count = len([ref for ref in part.split(",") if ref.strip()])
        if count != 2:
            raise SpecError(
                f"a pair is two versions, but {part!r} names {count}",
                where="--pairs",
                fix="put only a comma in a pair, and a space between pairs: 'v11,v12 v12,v13'",
            )
    pairs = tuple(parse_pair(part, "--pairs") for part in text.split())
    if len(set(pairs)) < len(pairs):
        raise SpecError(
            f"{text!r} names a pair twice",
            where="--pairs",
            fix="name each pair once: 'v11,v12 v12,v13'",
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

    @property
    def text(self) -> str:
        """The target as a user writes it; `parse_target` reads it."""
        return f"model:{self.model}@{self.name}" if self.model else f"{self.kind}:{self.name}"


def parse_target(text: str) -> Target:
    """`alias:champion` (or just `champion`), `stage:Production`, `model:prod-llm@champion`.

    Raises:
        SpecError: the text is not a target, MLflow has no such stage, or the alias is reserved.
    """
    match = _PROMOTE.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"{text!r} is not a promotion target",
            where="--promote",
            fix="write alias:champion, stage:Production or model:prod-llm@champion",
        )
    if match["kind"] != "stage":
        check_alias(match["alias"] or match["name"], "--promote")
    if match["model"]:
        check_name(match["model"], "--promote")
        return Target("model", match["alias"], match["model"])
    if match["kind"] == "stage":
        stage = match["name"].capitalize()
        if stage not in STAGES:
            raise SpecError(
                f"{match['name']!r} is not a stage that a version can be promoted to",
                where="--promote",
                fix=f"write one of {', '.join(STAGES)}, or name an alias: alias:champion",
            )
        return Target("stage", stage)
    return Target("alias", match["name"])


def check_alias(alias: str, where: str) -> None:
    """Refuse a text that MLflow does not accept as an alias."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise SpecError(
            f"{alias!r} cannot be an alias",
            where=where,
            fix="use up to 255 letters, digits, _ and -; MLflow reserves latest and v1, v2, …",
        )


def check_name(model: str, where: str = "--model, or MLFLOW_SOUP_MODEL") -> None:
    """Refuse names that MLflow does not take, or that its URIs or our texts cannot hold."""
    if not model:
        return
    marks = [mark for mark in "/:?`" if mark in model]  # MLflow's URIs end at a ?
    if not model.strip():
        why = "it is blank"
    elif marks:
        why = f"it holds a {marks[0]}"
    elif model == "." or model.startswith(".."):
        why = "it is a path"
    elif len(model) > _LONGEST:
        why = f"it has {len(model)} characters"
    elif redact_line(model) != model:
        why = "some characters are not seen, or it looks like a secret"
    else:
        return
    raise SpecError(
        f"{model!r} cannot be the name of a registered model here: {why}",
        where=where,
        fix=f"use a name of up to {_LONGEST} characters that are seen, without / : ? and `",
    )


@dataclass(frozen=True)
class Workers:
    """Where the evaluations of a request run.

    Attributes:
        ray: whether the workers are actors of a Ray cluster; else processes of this machine.
        count: how many; 0 for as many as the cluster has room for.
    """

    ray: bool
    count: int


def parse_workers(text: str) -> Workers | None:
    """`2`, `ray` or `ray:8`; None for an empty text and for 1, which mean this process.

    Raises:
        SpecError: it is something else.
    """
    if text in ("", "1"):
        return None
    found = re.fullmatch(r"(ray)(?::([1-9]\d{0,3}))?|([1-9]\d{0,3})", text)
    if found is None:
        raise SpecError(
            f"--workers {text!r} is no number of workers",
            where="--workers",
            fix="give a number of processes from 1 on, --workers 2; or --workers ray:8, or ray for "
            "as many as the cluster has room for",
        )
    return Workers(bool(found[1]), int(found[2] or found[3] or 0))
