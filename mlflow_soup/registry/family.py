"""The family tree of a registered version: soups of soups, down to trained checkpoints.

    my-llm v14: soup, gate passed, @champion
    ├─ 0.4 × my-llm v12: checkpoint
    └─ 0.6 × my-llm v13: soup, gate passed
       ├─ 0.5 × my-llm v12: see above
       └─ 0.5 × my-llm v11: missing from the registry

Anyone may write the registry's tags. They are shown, never trusted: an unreadable tag, or a version
that is made of itself, becomes a problem of its member and does not raise an error.
"""

import re
import reprlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow_soup.records import Version
from mlflow_soup.registry import naming
from mlflow_soup.request.names import check_name

SOUP, CHECKPOINT, MISSING = "soup", "checkpoint", "missing"


@dataclass(frozen=True)
class Member:
    """One version of a family, as its tags describe it; None where a tag is missing.

    Attributes:
        version: the version.
        kind: `soup`, `checkpoint` (a version without the tag of parents) or `missing`.
        parents: the versions it is made of, oldest first, each with its merge weight λ.
        gate: `passed`, `refused`, or any other text that someone wrote there.
        digest: canonical digest of its tensors.
        promoted_to: the target it was promoted to, such as `alias champion`; the target may point
            elsewhere now.
        aliases: the aliases that point to it now.
        problems: what is wrong with its tags.
    """

    version: Version
    kind: str
    parents: tuple[tuple[Version, float | None], ...] = ()
    gate: str | None = None
    digest: str | None = None
    promoted_to: str | None = None
    aliases: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A version and its ancestors; every parent of a member is a member."""

    root: Version
    members: Mapping[Version, Member]


def read(version: Version, tags: Mapping[str, str], aliases: tuple[str, ...] = ()) -> Member:
    """The member that a version's tags describe; unreadable tags become its problems."""
    problems = []
    told = tags.get(naming.PARENTS)
    parents = _parents(version.name, told) if told is not None else ()
    if told is not None and not parents:
        problems.append(f"{naming.PARENTS} = {reprlib.repr(told)} does not name parents")
    tag = naming.WEIGHTS if naming.WEIGHTS in tags else naming.LAMBDA
    written = tags.get(tag)
    weights = _weights(written, parents) if parents and written is not None else None
    if parents and written is not None and weights is None:
        problems.append(f"{tag} = {reprlib.repr(written)} does not give the parents' weights")
    return Member(
        version,
        SOUP if told is not None else CHECKPOINT,
        tuple(zip(parents, weights or [None] * len(parents), strict=True)),
        gate=tags.get(naming.GATE),
        digest=tags.get(naming.DIGEST),
        promoted_to=tags.get(naming.PROMOTED_TO),
        aliases=tuple(sorted(aliases)),
        problems=tuple(problems),
    )


def _parents(name: str, told: str) -> tuple[Version, ...]:
    """The parents that a tag names; empty if the tag is unreadable."""
    try:
        parents = naming.parse_parents(name, told)
        for parent in parents:
            check_name(parent.name)
    except ValueError:  # a SpecError is a ValueError, too
        return ()
    # 2³¹: MLflow keeps the number in a 32-bit column
    return parents if all(0 < parent.number < 2**31 for parent in parents) else ()


def _weights(told: str, parents: tuple[Version, ...]) -> tuple[float | None, ...] | None:
    """Each parent's weight; of two parents, the tag may hold the newer one's alone."""
    try:
        weights = naming.parse_weights(told)
    except ValueError:
        return None
    if len(weights) == len(parents):
        return weights
    if len(weights) != 1:
        return None
    # rounded: 0.3, not 0.30000000000000004
    rest = round(1.0 - weights[0], 12) if len(parents) == 2 else None
    return (*[rest] * (len(parents) - 1), *weights)


def gather(root: Version, members: Mapping[Version, Member]) -> Family:
    """The family of a version; a cycle becomes a problem of the member that closes it."""
    told = dict(members)
    for step in _walk(Family(root, members)):
        if step.cycle:
            member = told[step.soup]
            problem = f"its parent {step.parent} is made of it, which is a cycle"
            told[step.soup] = replace(member, problems=(*member.problems, problem))
    return Family(root, told)


@dataclass(frozen=True)
class _Step:
    """A step from a soup to one of its parents; `again` if the walk met the parent before."""

    soup: Version
    parent: Version
    weight: float | None
    rail: str
    again: bool
    cycle: bool


def _walk(family: Family) -> Iterator[_Step]:
    """Every edge once, depth first; without recursion, since families may be of any depth."""
    met, way = {family.root}, {family.root}
    stack = [(family.root, "", deque(family.members[family.root].parents))]
    while stack:
        soup, rail, left = stack[-1]
        if not left:
            stack.pop()
            way.remove(soup)
            continue
        parent, weight = left.popleft()
        elbow, below = ("├─ ", "│  ") if left else ("└─ ", "   ")
        yield _Step(soup, parent, weight, rail + elbow, parent in met, parent in way)
        if parent not in met:
            met.add(parent)
            way.add(parent)
            stack.append((parent, rail + below, deque(family.members[parent].parents)))


def _words(member: Member) -> str:
    """One line about a member: its kind, gate, aliases and problems."""
    if member.kind == MISSING:
        return "missing from the registry"
    words = [member.kind]
    if member.gate in (naming.PASSED, naming.REFUSED):
        words.append(f"gate {member.gate}")
    elif member.gate is not None:
        words.append(f"gate {reprlib.repr(member.gate)}")
    elif member.kind == SOUP:
        words.append("not judged")
    words += [f"@{alias}" for alias in member.aliases]
    return "; ".join([", ".join(words), *member.problems])


def text(family: Family) -> str:
    """A tree for the terminal, each soup above its parents; a repeated version says `see above`."""
    lines = [f"{family.root}: {_words(family.members[family.root])}"]
    for step in _walk(family):
        share = "" if step.weight is None else f"{step.weight:g} × "
        words = "see above" if step.again else _words(family.members[step.parent])
        lines.append(f"{step.rail}{share}{step.parent}: {words}")
    return "\n".join(lines)


def graph(family: Family) -> dict[str, Any]:
    """A graph for programs; each version is one node, named by its MLflow URI."""
    nodes = [
        {
            "uri": version.uri,
            "model": version.name,
            "version": version.number,
            "kind": member.kind,
            "gate": member.gate,
            "digest": member.digest,
            "promoted_to": member.promoted_to,
            "aliases": member.aliases,
            "problems": member.problems,
        }
        for version, member in family.members.items()
    ]
    edges = [
        {"soup": soup.uri, "parent": parent.uri, "weight": weight}
        for soup, member in family.members.items()
        for parent, weight in member.parents
    ]
    return {"root": family.root.uri, "nodes": nodes, "edges": edges}


def mermaid(family: Family) -> str:
    """A Mermaid graph for Markdown pages; each parent above its soups."""
    ids = {version: f"n{i}" for i, version in enumerate(family.members)}
    lines = ["graph TD"]
    for version, member in family.members.items():
        label = "<br/>".join(map(_entities, (str(version), _words(member))))
        lines.append(f'  {ids[version]}["{label}"]')
    for soup, member in family.members.items():
        for parent, weight in member.parents:
            arrow = "-->" if weight is None else f'-->|"{weight:g}"|'
            lines.append(f"  {ids[parent]} {arrow} {ids[soup]}")
    return "\n".join(lines)


def _entities(label: str) -> str:
    """The label; characters that Mermaid, Markdown or HTML read as syntax become `#code;`."""
    return re.sub(r"[^\w .,:@/=-]", lambda match: f"#{ord(match[0])};", label)
