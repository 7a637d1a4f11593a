"""Family trees: worked examples, and laws that hold for any tags, however hostile."""

import graphlib
import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.records import Version
from mlflow_soup.registry import family, naming
from mlflow_soup.registry.family import (
    CHECKPOINT,
    MISSING,
    SOUP,
    Member,
    gather,
    mermaid,
    read,
)


def llm(number):
    return Version("my-llm", number)


def soup(number, parents, lam="0.5", *, gate="passed", aliases=()):
    """The member for tags as `mlflow-soup run` writes them."""
    tags = {"soup.parents": parents, "soup.lambda": lam, "soup.gate": gate}
    return read(llm(number), tags, aliases)


def tree(*members):
    """The family of the first member."""
    return gather(members[0].version, {member.version: member for member in members})


TWO_GENERATIONS = tree(
    soup(14, "12,13", "0.6", aliases=("champion",)),
    read(llm(12), {}),
    soup(13, "12,11", "0.5", gate="refused"),
    Member(llm(11), MISSING),
)


@st.composite
def families(draw):
    """Any graph of up to eight versions: parents may be shared, named twice, or cyclic."""
    size = draw(st.integers(1, 8))
    numbers = st.integers(1, size)
    lists = draw(st.lists(st.lists(numbers, max_size=3), min_size=size, max_size=size))
    tags = [{"soup.parents": ",".join(map(str, p))} if p else {} for p in lists]
    members = {llm(i): read(llm(i), t) for i, t in enumerate(tags, start=1)}
    known, pending = {}, [llm(1)]
    while pending:
        version = pending.pop()
        if version not in known:
            known[version] = members[version]
            pending += [parent for parent, _ in members[version].parents]
    return gather(llm(1), known)


def test_a_tree_shows_each_soup_above_its_parents():
    assert family.text(TWO_GENERATIONS).splitlines() == [
        "my-llm v14: soup, gate passed, @champion",
        "├─ 0.4 × my-llm v12: checkpoint",
        "└─ 0.6 × my-llm v13: soup, gate refused",
        "   ├─ 0.5 × my-llm v12: see above",
        "   └─ 0.5 × my-llm v11: missing from the registry",
    ]


def test_lines_lead_past_a_branch_to_the_next_parent():
    shown = tree(soup(5, "4,3"), soup(4, "1,2"), read(llm(3), {}), read(llm(1), {}), soup(2, "1,3"))
    assert family.text(shown).splitlines() == [
        "my-llm v5: soup, gate passed",
        "├─ 0.5 × my-llm v4: soup, gate passed",
        "│  ├─ 0.5 × my-llm v1: checkpoint",
        "│  └─ 0.5 × my-llm v2: soup, gate passed",
        "│     ├─ 0.5 × my-llm v1: see above",
        "│     └─ 0.5 × my-llm v3: checkpoint",
        "└─ 0.5 × my-llm v3: see above",
    ]


def test_json_is_a_graph_under_mlflows_own_names():
    graph = family.graph(TWO_GENERATIONS)
    assert graph["root"] == "models:/my-llm/14"
    assert graph["nodes"][0] == {
        "uri": "models:/my-llm/14",
        "model": "my-llm",
        "version": 14,
        "kind": "soup",
        "gate": "passed",
        "digest": None,
        "promoted_to": None,
        "aliases": ("champion",),
        "problems": (),
    }
    assert [node["kind"] for node in graph["nodes"]] == [SOUP, CHECKPOINT, SOUP, MISSING]
    assert graph["edges"][:2] == [
        {"soup": "models:/my-llm/14", "parent": "models:/my-llm/12", "weight": 0.4},
        {"soup": "models:/my-llm/14", "parent": "models:/my-llm/13", "weight": 0.6},
    ]


def test_mermaid_draws_parents_above_their_soup():
    assert mermaid(TWO_GENERATIONS).splitlines() == [
        "graph TD",
        '  n0["my-llm v14<br/>soup, gate passed, @champion"]',
        '  n1["my-llm v12<br/>checkpoint"]',
        '  n2["my-llm v13<br/>soup, gate refused"]',
        '  n3["my-llm v11<br/>missing from the registry"]',
        '  n1 -->|"0.4"| n0',
        '  n2 -->|"0.6"| n0',
        '  n1 -->|"0.5"| n2',
        '  n3 -->|"0.5"| n2',
    ]


def test_a_version_without_parents_is_a_checkpoint():
    assert read(llm(1), {"team": "llm"}) == Member(llm(1), CHECKPOINT)
    assert family.text(tree(read(llm(1), {}, ("b", "a")))) == "my-llm v1: checkpoint, @a, @b"


@given(lam=s.lams())
def test_the_weights_of_a_pair_are_those_of_its_recipe(lam):
    (old, rest), (new, weight) = soup(3, "1,2", f"{lam:g}").parents
    assert (old, new) == (llm(1), llm(2))
    assert weight == lam
    assert rest == pytest.approx(1 - lam, abs=1e-15)
    assert len(f"{rest:g}") <= len("0.0001")


def test_an_old_tag_gives_only_the_newest_weight_of_three_parents():
    assert soup(4, "1,2,3", "0.2").parents == ((llm(1), None), (llm(2), None), (llm(3), 0.2))
    shown = tree(soup(4, "1,2,3", "0.2"), *(read(llm(i), {}) for i in (1, 2, 3)))
    assert family.text(shown).splitlines()[1:] == [
        "├─ my-llm v1: checkpoint",
        "├─ my-llm v2: checkpoint",
        "└─ 0.2 × my-llm v3: checkpoint",
    ]


def test_parents_may_be_versions_of_another_model():
    copy = read(Version("prod", 1), {"soup.parents": "my-llm/12,my-llm/13"})
    assert [parent for parent, _ in copy.parents] == [llm(12), llm(13)]


@pytest.mark.parametrize(
    "told",
    ["", "banana", "1,", "1,,2", "0", "-3", "1.5", "9" * 12, "9" * 5000, "a/b/3", "x\n\x1b/3"],
)
def test_parents_that_cannot_be_read_are_a_problem_of_the_soup(told):
    member = read(llm(7), {"soup.parents": told})
    assert (member.kind, member.parents) == (SOUP, ())
    (problem,) = member.problems
    assert re.fullmatch(r"soup\.parents = '.*' does not name parents", problem)
    assert problem.isprintable()
    assert len(problem) < 80
    assert family.text(tree(member)) == f"my-llm v7: soup, not judged; {problem}"


@pytest.mark.parametrize("told", ["", "banana", "nan", "inf", "-0.1", "1.01"])
def test_text_that_is_not_a_weight_is_not_shown(told):
    member = soup(3, "1,2", told)
    assert member.parents == ((llm(1), None), (llm(2), None))
    assert member.problems == (f"soup.lambda = {told!r} does not give the parents' weights",)


@pytest.mark.parametrize(
    ("told", "shown"),
    [("0.2,0.3,0.5", (0.2, 0.3, 0.5)), ("0.5", (None, None, 0.5)), ("0.5,0.5", (None,) * 3)],
)
def test_the_weights_of_more_than_two_parents_are_shown(told, shown):
    member = read(llm(7), {"soup.parents": "1,2,3", "soup.weights": told})
    assert tuple(weight for _, weight in member.parents) == shown
    wrong = told == "0.5,0.5"
    assert member.problems == (
        ("soup.weights = '0.5,0.5' does not give the parents' weights",) if wrong else ()
    )


def test_a_gate_tag_that_is_not_a_verdict_is_quoted():
    assert "gate 'passed\\n'" in family.text(tree(read(llm(1), {"soup.gate": "passed\n"})))


def test_a_version_made_of_itself_is_a_problem():
    shown = tree(soup(3, "2,3"), read(llm(2), {}))
    assert family.text(shown).splitlines() == [
        "my-llm v3: soup, gate passed; its parent my-llm v3 is made of it, which is a cycle",
        "├─ 0.5 × my-llm v2: checkpoint",
        "└─ 0.5 × my-llm v3: see above",
    ]


def test_every_format_names_the_member_that_closes_a_cycle():
    shown = tree(soup(3, "1,2"), read(llm(1), {}), soup(2, "1,3"))
    assert shown.members[llm(3)].problems == ()
    assert shown.members[llm(2)].problems == (
        "its parent my-llm v3 is made of it, which is a cycle",
    )
    for said in (family.text(shown), mermaid(shown), json.dumps(family.graph(shown))):
        assert said.count("a cycle") == 1


@given(shown=families())
def test_every_version_is_described_once_and_every_edge_is_drawn(shown):
    edges = [(v, p) for v, member in shown.members.items() for p, _ in member.parents]
    lines = family.text(shown).splitlines()
    assert len(lines) == 1 + len(edges)
    full = [line for line in lines if not line.endswith(": see above")]
    assert sorted(re.findall(r"my-llm v\d+(?=: (?:soup|checkpoint))", "\n".join(full))) == sorted(
        map(str, shown.members)
    )
    graph = family.graph(shown)
    assert [node["uri"] for node in graph["nodes"]] == [v.uri for v in shown.members]
    assert [(e["soup"], e["parent"]) for e in graph["edges"]] == [(a.uri, b.uri) for a, b in edges]
    assert len(mermaid(shown).splitlines()) == 1 + len(shown.members) + len(edges)


@given(shown=families())
def test_a_cycle_is_reported_exactly_if_there_is_one(shown):
    graph = {v: [p for p, _ in member.parents] for v, member in shown.members.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
        cyclic = False
    except graphlib.CycleError:
        cyclic = True
    assert cyclic == any(member.problems for member in shown.members.values())


def test_two_thousand_generations_take_a_line_each():
    generations = [soup(i, f"{i - 1}") for i in range(2000, 1, -1)]
    lines = family.text(tree(*generations, read(llm(1), {}))).splitlines()
    assert len(lines) == 2000
    assert lines[-1].endswith("└─ 0.5 × my-llm v1: checkpoint")


def tags():
    """Tags that anyone may write into a registry."""
    names = st.sampled_from([naming.PARENTS, naming.LAMBDA, naming.GATE, naming.PROMOTED_TO])
    syntax = st.text(st.sampled_from("\"`'#;&<>[]{}|%\\\n\r\x1b\u2028,/12") | st.characters())
    return st.dictionaries(names, syntax)


@given(written=tags())
@example(written={naming.PARENTS: "", naming.LAMBDA: "0"})
@example(written={naming.PARENTS: "", naming.LAMBDA: "1"})
def test_no_tag_breaks_a_line_a_label_or_a_drawing(written):
    root = read(llm(9), written)
    missing = [Member(parent, MISSING) for parent, _ in root.parents if parent != root.version]
    shown = tree(root, *missing)
    edges = len(root.parents)
    assert all(line.isprintable() for line in family.text(shown).split("\n"))
    assert len(family.text(shown).split("\n")) == 1 + edges
    head, *drawn = mermaid(shown).split("\n")
    assert head == "graph TD"
    label = r"  n\d+\[\"[\w .,:@/=#;-]*<br/>[\w .,:@/=#;-]*\"\]"
    arrow = r"  n\d+ -->(\|\"[\d.e-]+\"\|)? n\d+"
    assert sum(bool(re.fullmatch(label, line)) for line in drawn) == len(shown.members)
    assert sum(bool(re.fullmatch(arrow, line)) for line in drawn) == edges
    assert family.graph(shown)["nodes"][0]["gate"] == written.get("soup.gate")


@pytest.mark.parametrize("sign", list("\"`#;<>&[]{}()|'*%\\\n"))
def test_a_sign_of_mermaid_or_markdown_is_drawn_as_its_code(sign):
    label = mermaid(tree(read(llm(1), {"soup.gate": f"a{sign}b"}))).split("<br/>")[1]
    written = repr(f"a{sign}b")[1:-1]
    assert "".join(c if c.isalnum() else f"#{ord(c)};" for c in written) in label
