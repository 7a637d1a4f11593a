"""What MLflow and the checkpoint folder say of a soup can be read back."""

import hashlib
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup import lineage
from mlflow_soup.lineage import (
    card,
    format_parents,
    key_of,
    manifest,
    parse_parents,
    version_tags,
)
from mlflow_soup.records import Recipe, Version

several = st.lists(s.versions(), min_size=1, max_size=4).map(tuple)


@given(name=s.model_names(), parents=several)
def test_parents_read_back_as_they_are_written(name, parents):
    assert parse_parents(name, format_parents(name, parents)) == parents


@given(name=s.model_names(), numbers=st.lists(st.integers(1, 999), min_size=1))
def test_versions_of_the_same_model_are_bare_numbers(name, numbers):
    text = format_parents(name, tuple(Version(name, number) for number in numbers))
    assert text == ",".join(map(str, numbers))


def test_versions_of_other_models_bring_their_names():
    parents = (Version("a", 12), Version("b", 3))
    assert format_parents("a", parents) == "12,b/3"
    assert format_parents("c", parents) == "a/12,b/3"
    assert parse_parents("c", "a/12,b/3,4") == (*parents, Version("c", 4))


@given(request_=s.requests(), order=st.randoms(use_true_random=False))
def test_the_order_of_a_requests_fields_does_not_matter_to_its_key(request_, order):
    fields = list(request_.items())
    order.shuffle(fields)
    assert key_of(dict(fields)) == key_of(request_)


@given(request_=s.requests(), drawn=st.data())
def test_every_value_of_a_request_matters_to_its_key(request_, drawn):
    field = drawn.draw(st.sampled_from(sorted(request_)))
    assert key_of({**request_, field: "something else"}) != key_of(request_)
    assert key_of({k: v for k, v in request_.items() if k != field}) != key_of(request_)
    assert key_of({**request_, "another field": 1}) != key_of(request_)


def test_the_order_of_parents_matters_to_a_key():
    assert key_of({"parents": ["sha256:a", "sha256:b"]}) != key_of(
        {"parents": ["sha256:b", "sha256:a"]}
    )


def test_a_key_is_that_of_the_plain_text():
    # searches made by an earlier release must be found again
    text = '{"alpha":0.5,"parents":["sha256:a"],"seed":0}'
    request = {"seed": 0, "parents": ["sha256:a"], "alpha": 0.5}
    assert key_of(request) == hashlib.sha256(text.encode()).hexdigest()


@given(lam=st.floats(0, 1), versions=st.lists(s.versions(), min_size=2, max_size=2, unique=True))
def test_a_manifest_gives_back_the_exact_recipe_from_json(lam, versions):
    recipe = Recipe("linear", (1.0 - lam, lam))
    digests = {version: f"sha256:{i}" for i, version in enumerate(versions)}
    written = json.dumps(manifest("toy", recipe, digests, "key", "run", "sha256:soup"))
    read = json.loads(written)
    assert tuple(float.fromhex(p["lambda"]) for p in read["parents"]) == recipe.lam
    assert [p["uri"] for p in read["parents"]] == [version.uri for version in versions]
    assert [p["digest"] for p in read["parents"]] == ["sha256:0", "sha256:1"]
    assert (read["schema"], read["model"], read["method"]) == (1, "toy", "linear")
    assert (read["search_key"], read["run_id"], read["digest"]) == ("key", "run", "sha256:soup")


def test_a_manifest_needs_one_weight_for_each_parent():
    with pytest.raises(ValueError, match="zip"):
        manifest(
            "toy", Recipe("linear", (1.0,)), {Version("a", 1): "", Version("a", 2): ""}, *"krd"
        )


@given(recipe=s.recipes())
def test_the_tags_of_a_version_say_what_it_is_made_of(recipe):
    tags = version_tags("12,13", recipe, "key", "run", "sha256:soup")
    assert float(tags["soup.lambda"]) == recipe.lam[-1]
    assert {name: text for name, text in tags.items() if name != "soup.lambda"} == {
        "soup.parents": "12,13",
        "soup.key": "key",
        "soup.run_id": "run",
        "soup.digest": "sha256:soup",
    }


def test_no_two_names_are_the_same():
    names = [v for k, v in vars(lineage).items() if k.isupper() and isinstance(v, str)]
    assert len(names) == len(set(names))
    assert "soup.parents" in names


@given(name=s.model_names(), recipe=s.recipes(), parents=st.tuples(s.versions(), s.versions()))
def test_the_cards_front_matter_names_the_parents_as_base_models(name, recipe, parents):
    _, front, words = card(name, recipe, parents).split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == [version.uri for version in parents]
    assert matter["base_model_relation"] == "merge"
    assert matter["library_name"] == "transformers"
    assert "merge" in matter["tags"]
    for lam, version in zip(recipe.lam, parents, strict=True):
        assert f"{lam:g} × {version}" in words
