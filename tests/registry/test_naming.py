"""Texts about a soup, in MLflow and in its folder, can be read back."""

import hashlib
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.records import Version
from mlflow_soup.registry import naming as lineage
from mlflow_soup.registry.naming import (
    format_parents,
    key_of,
    parse_parents,
    parse_weights,
    version_tags,
)
from mlflow_soup.weights.manifest import card, format_manifest, parse_manifest

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


def test_a_key_is_the_digest_of_the_plain_text():
    # searches made by an earlier release must be found again
    text = '{"alpha":0.5,"parents":["sha256:a"],"seed":0}'
    request = {"seed": 0, "parents": ["sha256:a"], "alpha": 0.5}
    assert key_of(request) == hashlib.sha256(text.encode()).hexdigest()


@given(manifest=s.manifests())
def test_a_manifest_reads_back_as_it_is_written(manifest):
    assert parse_manifest(json.loads(json.dumps(format_manifest(manifest)))) == manifest


@given(manifest=s.manifests())
def test_a_manifest_has_its_weights_to_the_last_bit(manifest):
    written = json.loads(json.dumps(format_manifest(manifest)))
    assert [float.fromhex(p["lambda"]) for p in written["parents"]] == [
        source.lam for source in manifest.sources
    ]
    assert written["schema"] == 1
    assert "fp32" in written["kernel"]


@pytest.mark.parametrize("content", [None, [], {}, {"schema": 2}, {"schema": 1, "parents": [{}]}])
def test_other_content_is_not_read_as_a_manifest(content):
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_manifest(content)


@given(recipe=s.recipes())
def test_the_tags_of_a_version_say_what_it_is_made_of(recipe):
    tags = version_tags("12,13", recipe, "bayesopt", "key", "request", "sha256:soup")
    assert float(tags.pop("soup.lambda")) == recipe.lam[-1]
    assert parse_weights(tags.pop("soup.weights")) == recipe.lam
    assert tags == {
        "soup.parents": "12,13",
        "soup.key": "key",
        "soup.request": "request",
        "soup.method": "bayesopt",
        "soup.digest": "sha256:soup",
    }


@pytest.mark.parametrize("text", ["", "0.3,", "a,b", "nan,1", "1.2,-0.2", "inf"])
def test_text_that_is_not_weights_is_refused(text):
    with pytest.raises(ValueError, match=r"could not convert|not a list of merge weights"):
        parse_weights(text)


def test_no_two_names_are_the_same():
    names = [v for k, v in vars(lineage).items() if k.isupper() and isinstance(v, str)]
    assert len(names) == len(set(names))
    assert "soup.parents" in names


@given(manifest=s.manifests())
def test_a_card_can_be_read_by_hugging_face_tools(manifest):
    _, front, text = card(manifest).split("---\n", 2)
    fields = yaml.safe_load(front)
    names = [source.uri.removeprefix("/checkpoints/") for source in manifest.sources]
    assert fields["base_model"] == names
    assert fields["base_model_relation"] == "merge"
    assert {"merge", "mlflow-soup"} <= set(fields["tags"])
    for source, name in zip(manifest.sources, names, strict=True):
        assert f"{source.lam:g} × `{name}`" in text
