"""Every knob: what it takes, what it refuses in which words, and who sets what is left open."""

import copy
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies as s
from mlflow_soup.errors import SpecError
from mlflow_soup.registry import naming
from mlflow_soup.registry.naming import key_of
from mlflow_soup.request import spec
from mlflow_soup.request.names import (
    Target,
    VersionRef,
    parse_pair,
    parse_target,
    parse_uri,
    parse_version,
)
from mlflow_soup.request.spec import STUDIES, Spec, policy_for, unread
from mlflow_soup.search.belief import CHOICES

KNOBS = {knob.name: knob for knob in fields(Spec)}
POLICY = sorted(name for name, knob in KNOBS.items() if knob.metadata["policy"])


@given(ref=s.version_refs())
def test_a_version_reads_back_as_it_is_written(ref):
    assert parse_version(str(ref)) == ref
    assert parse_version(f"  {ref}\n") == ref


def test_a_version_may_be_a_bare_number():
    assert parse_version("12") == parse_version("v12") == VersionRef(12, None)
    assert parse_version("@champion") == VersionRef(None, "champion")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v",
        "v0",
        "0",
        "v012",
        "-1",
        "1.5",
        "V12",
        "champion",
        "@",
        "@a b",
        "@a/b",
        "v1 v2",
        "\uff11\uff12",
    ],
)
def test_what_names_no_version_is_refused(text):
    with pytest.raises(SpecError, match="is not a version") as refusal:
        parse_version(text)
    assert repr(text) in refusal.value.what
    assert "v12, 12 or @alias" in refusal.value.fix


@given(version=s.versions(), alias=s.aliases())
def test_a_uri_reads_back_as_mlflow_writes_it(version, alias):
    name, ref = version.name, VersionRef(version.number, None)
    assert parse_uri(version.uri) == (name, ref)
    assert parse_uri(f" models:/{name}/v{version.number}\n") == (name, ref)
    assert parse_uri(f"models:/{name}@{alias}") == (name, VersionRef(None, alias))


@pytest.mark.parametrize(
    ("uri", "fix"),
    [
        ("", "write models:/my-llm/14"),
        ("my-llm/14", "write models:/my-llm/14"),
        ("models:my-llm/14", "write models:/my-llm/14"),
        ("models://my-llm/14", "write models:/my-llm/14"),
        ("models:/my-llm", "or models:/my-llm@champion"),
        ("models:/my-llm/", "or models:/my-llm@champion"),
        ("models:/my-llm/champion", "or models:/my-llm@champion"),
        ("models:/my-llm/@champion", "or models:/my-llm@champion"),
        ("models:/my-llm/14/config.json", "write models:/my-llm/14"),
        ("models:/@champion", "write models:/my-llm/14"),
        ("runs:/0123456789abcdef/model", "write models:/my-llm/14"),
        ("models:/m-0123456789abcdef0123456789abcdef", "this is a logged model"),
        ("models:/my-llm/Production", "because stages and latest move"),
        ("models:/my-llm/latest", "because stages and latest move"),
    ],
)
def test_a_uri_of_no_version_is_refused_with_one_that_is(uri, fix):
    with pytest.raises(SpecError, match="is not the URI of a registered version") as refusal:
        parse_uri(uri)
    assert refusal.value.where == "argument URI"
    assert fix in refusal.value.fix
    assert "models:/my-llm/14" in refusal.value.fix


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("models:/my-llm/0", "'0' is not a version"),
        ("models:/my-llm/012", "'012' is not a version"),
        ("models:/my-llm/1.5", "'1.5' is not a version"),
        ("models:/my-llm@a b", "'@a b' is not a version"),
        ("models:/a?b/1", "cannot be the name of a registered model here: it holds a \\?"),
        ("models:/ /1", "cannot be the name of a registered model here: it is blank"),
    ],
)
def test_the_parts_of_a_uri_are_checked(uri, why):
    with pytest.raises(SpecError, match=why) as refusal:
        parse_uri(uri, "here")
    assert refusal.value.where == "here"


@given(older=s.version_refs(), newer=s.version_refs())
def test_a_pair_reads_back_in_its_order_unless_it_is_one_version_twice(older, newer):
    if older != newer:
        assert parse_pair(f"{older},{newer}") == (older, newer)
        assert parse_pair(f" {older} , {newer} ") == (older, newer)
    else:
        with pytest.raises(SpecError, match="is named twice"):
            parse_pair(f"{older},{newer}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("v12", "names 1"),
        ("v12,", "names 1"),
        ("", "names 0"),
        ("v1,v2,v3", "names 3"),
        ("v12,12", "v12 is named twice"),
        ("@champion,@champion", "@champion is named twice"),
        ("v1,champion", "'champion' is not a version"),
    ],
)
def test_what_is_no_pair_is_refused(text, why):
    with pytest.raises(SpecError, match=why):
        parse_pair(text)


def written(target):
    """A target as a user writes it."""
    return {
        "alias": f"alias:{target.name}",
        "stage": f"stage:{target.name}",
        "model": f"model:{target.model}@{target.name}",
    }[target.kind]


@given(target=s.targets())
def test_a_target_reads_back_as_it_is_written(target):
    assert parse_target(written(target)) == target
    if target.kind == "alias":
        assert parse_target(target.name) == target
    if target.kind == "stage":
        assert parse_target(written(target).lower()) == target


def test_targets_say_where_they_point():
    assert str(parse_target("champion")) == "alias champion"
    assert str(parse_target("stage:production")) == "stage Production"
    assert str(parse_target("model:prod-llm@champion")) == "prod-llm@champion"


@pytest.mark.parametrize(
    "text", ["", "@champion", "alias:", "model:prod", "model:@a", "model:a@", "to:x", "a/b", "a b"]
)
def test_where_nothing_can_be_promoted_to_is_refused(text):
    with pytest.raises(SpecError, match="is not a promotion target") as refusal:
        parse_target(text)
    assert "alias:champion" in refusal.value.fix


def test_a_stage_that_mlflow_lacks_is_refused_with_those_it_has():
    with pytest.raises(SpecError, match="'prod' is not a stage") as refusal:
        parse_target("stage:prod")
    assert "Staging, Production" in refusal.value.fix


@pytest.mark.parametrize("text", ["alias:latest", "Latest", "v14", "alias:V14", "model:prod@v2"])
def test_an_alias_that_mlflow_reserves_is_refused_at_once(text):
    with pytest.raises(SpecError):
        parse_target(text)


RANGES = {
    "model": (
        [
            "my-llm",
            "a",
            "My model 2.0",
            "-a",
            " a",
            "été (v2)",
            'it\'s "x"',
            "日本",
            "a@b",
            "x" * 200,
        ],
        ["/", "a/b", "a:b", "a?", "a`b", "x" * 201, " ", ".", "../a", "a\u200bb", "a\nb"],
    ),
    "pair": (["v1,v2", "@champion,3"], ["v1", "v1,v1", "x,y"]),
    "versions": (
        ["v1,v2", "v1,@champion,3"],
        ["v1", "v1,v2,v1", "x,y", ","],
    ),
    "version": (["v14", "@a"], ["v0", "a"]),
    "promote": (["champion", "stage:Staging"], ["stage:x", "@champion"]),
    "alpha": ([None, 0.0, 0.5, 0.999], [-0.01, 1.0, 2.0, float("nan")]),
    "trials": ([None, 4, 10, 1000], [3, 0, -1]),
    "stop": ([0.0, 0.05, 3.0], [-0.01, float("inf"), float("nan")]),
    "parents_in": (["mmap", "memory", "device"], ["disk", ""]),
    "device_map": (["", "auto", "balanced", "balanced_low_0"], ["no/such/map.json", os.curdir]),
    "last": ([None, 2, 20], [1, 0, -3]),
    "pairs": (
        ["", "v1,v2", "v1,v2  @champion,3"],
        ["v1", "v1,v2 v3", "v1,v1", "v1,v2 1,2"],
    ),
    "method": (["bayesopt", "greedy", "fisher", "best"], ["", "slerp", "Greedy"]),
    "methods": (["greedy", "best,fisher"], ["", "greedy,greedy", "slerp", "greedy,"]),
    "greedy_tie": (["add", "drop"], ["", "keep"]),
    "calibration": ([""], ["no/such/file.txt", os.curdir]),
    "calibration_tokens": ([2, 65536], [1, 0, -1]),
    "fisher_estimator": (["empirical", "sampled"], ["", "exact"]),
    "regmean_scale": ([0.0, 0.9, 1.0], [-0.1, 1.1, float("nan")]),
    "points": ([4, 101], [3, 0]),
    "windows": (["2", "2,3,64"], ["", "1", "65", "x", "2,"]),
    "powers": (["1", "1/2,1,16"], ["", "0", "17", "p"]),
    "space": (["auto", "simplex", "schedule"], ["", "window"]),
    "window": ([None, 2, 64], [1, 0, 65]),
    "ema": ([0.01, 0.7, 0.99], [0.0, 1.0, -0.5, float("nan")]),
    "decay": (
        ["linear", "cosine", "minus-sqrt", "2", "0.5"],
        ["", "sqrt", "0", "-1", "inf", "nan", "1/2"],
    ),
    "alphas": (["0", "0,1/2,0.9"], ["", "1", "-0.1", "x", "0.5,", "nan"]),
    "fractions": (["1", "1/4,0.5,1"], ["", "0", "1.5", "1/0", "half"]),
    "acquisition": (["landscape", "gp-hedge", "ei", "pi", "ucb"], ["EI", "", "random"]),
    "evaluator": (["prepared", "lm-eval"], ["lm_eval", ""]),
    "seed": ([0, 7], [-1]),
    "margin": (
        ["0", "0.01", "0.005", "2%", "0.01,acc=0.005,perplexity=2%,piqa:acc=0"],
        ["-0.01", "inf", "nan", "1e999", "acc", "acc=", "0.1,0.2", "acc=1,acc=2", "a=b=1", "2%%"],
    ),
    "workers": (
        ["", "1", "2", "ray", "ray:8"],
        ["0", "two", "ray:0", "ray:", "2,3", "-1", "99999"],
    ),
    "worker_patience": ([0.5, 60.0], [0.0, -1.0, float("inf"), float("nan")]),
    "store_patience": ([0.0, 0.5, 30.0], [-1.0, float("inf"), float("nan")]),
    "min_items": ([1, 200], [0, -1]),
    "evidence": (["experiment", "own"], ["", "mine", "tags"]),
    "confidence": ([0.51, 0.95, 0.999], [0.5, 1.0, 0.0, 95.0, float("nan")]),
    "num_fewshot": ([None, 0, 5], [-1]),
    "batch_size": ([1, 32], [0, -1]),
    "max_length": ([None, 2, 4096], [1, 0]),
    "limit": ([None, 1], [0, -5]),
    "allow_task_code": (["", "0" * 64, f"{'a' * 64}, {'b' * 64}"], ["yes", "A" * 64, "a" * 63]),
    "include_path": (["", os.curdir, os.pathsep.join([os.curdir, "/"])], ["no/such/folder"]),
}
UNBOUNDED = {
    "tasks",
    "ood_tasks",
    "test_tasks",
    "champion",
    "device",
    "experiment",
    "out",
    "public_key",
}
UNBOUNDED |= {"system_instruction", "gen_kwargs", "cluster", "time_tag"}
UNBOUNDED |= {name for name, knob in KNOBS.items() if "bool" in str(knob.type)}


def test_the_table_of_ranges_knows_every_knob():
    assert set(RANGES) | UNBOUNDED == set(KNOBS)


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, (good, _) in RANGES.items() for v in good]
)
def test_a_value_in_its_range_is_kept(name, value):
    assert getattr(Spec(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, (_, bad) in RANGES.items() for v in bad]
)
def test_a_value_out_of_its_range_is_refused_by_its_option(name, value):
    with pytest.raises(SpecError) as refusal:
        Spec(**{name: value})
    assert refusal.value.exit_code == 2
    assert refusal.value.fix
    assert f"--{name.replace('_', '-')}" in refusal.value.where


@pytest.mark.parametrize(
    ("named", "budget", "least"),
    [
        ({"pair": "v1,v2"}, 8, 4),
        ({"versions": "v1,v2"}, 8, 4),
        ({"versions": "v1,v2,v3"}, 12, 5),
        ({"versions": "v1,v2,v3,v4"}, 16, 6),
    ],
)
def test_more_parents_take_more_trials(named, budget, least):
    assert Spec(**named).budget == budget
    assert Spec(**named).least == 1 / (least - 2)
    assert Spec(**named, alpha=0.25).least == 0.25
    assert Spec(**named, trials=least).budget == least


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("last", "3", "last is '3', which is not a whole number"),
        ("versions", ["v1", b"v2"], r"\['v1', b'v2'\], which is not a text or a list of texts"),
        ("tasks", {"piqa"}, r"tasks is \{'piqa'\}, which is not a text or a list of texts"),
        ("pair", [1, True], r"pair is \[1, True\], which is not a text or a list of texts"),
        ("tasks", ["piqa", 1], r"tasks is \['piqa', 1\], which is not a text"),
        ("model", ["my-llm"], r"model is \['my-llm'\], which is not a text"),
        ("device", Path("cuda"), r"device is .*'cuda'\), which is not a text"),
        ("alpha", "0.5", "alpha is '0.5', which is not a number"),
        ("trials", 8.0, "trials is 8.0, which is not a whole number"),
        ("stop", 10**400, "--stop of 1329 bits"),
        pytest.param("trials", 10**5000, "--trials of 16610 bits", id="endless"),
        ("register_copies", 1, "register_copies is 1, which is not True or False"),
        ("register_copies", "yes", "register_copies is 'yes', which is not True or False"),
        ("seed", True, "seed is True, which is not a whole number"),
        ("margin", None, "margin is None, which is not a text"),
        ("tasks", None, "tasks is None, which is not a text or a list of texts"),
        ("model", b"m", "model is b'm', which is not a text"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, what):
    with pytest.raises(SpecError, match=what) as refusal:
        Spec(**{name: value})
    assert f"--{name.replace('_', '-')}" in refusal.value.where


LISTS = [
    ("pair", [12, 13], "12,13"),
    ("pair", ("v12", "@champion"), "v12,@champion"),
    ("versions", ["v1", 2, "v3"], "v1,2,v3"),
    ("version", 14, "14"),
    ("workers", 2, "2"),
    ("pairs", [[11, 12], ("v12", "v13")], "11,12 v12,v13"),
    ("pairs", ["v11,v12", "v12,v13"], "v11,v12 v12,v13"),
    ("methods", ["greedy", "best"], "greedy,best"),
    ("alphas", [0, 0.5, "2/3"], "0,0.5,2/3"),
    ("alphas", 0.5, "0.5"),
    ("windows", [2, "3"], "2,3"),
    ("powers", ["1/2", 1], "1/2,1"),
    ("fractions", ("1/4", 1), "1/4,1"),
    ("tasks", ["arc_easy:acc,none", "piqa"], "arc_easy:acc,none,piqa"),
    ("ood_tasks", [], ""),
    ("test_tasks", ["boolq", "sciq:acc"], "boolq,sciq:acc"),
    ("allow_task_code", ["0" * 64, "1" * 64], f"{'0' * 64},{'1' * 64}"),
    ("include_path", Path("/"), "/"),
    ("include_path", [Path("/"), os.curdir], os.pathsep.join(["/", os.curdir])),
    ("public_key", [Path(__file__)], __file__),
    ("public_key", [__file__, Path(__file__)], f"{__file__},{__file__}"),
    ("calibration", Path(__file__), __file__),
    ("out", Path("figures"), "figures"),
    ("device_map", Path(__file__), __file__),
    ("margin", 0.05, "0.05"),
    ("margin", 1, "1"),
]


@pytest.mark.parametrize(("name", "value", "text"), LISTS)
def test_a_list_a_path_or_a_number_is_the_text_of_the_command_line(name, value, text):
    asked = Spec(**{name: value})
    assert asked == Spec(**{name: text})
    assert getattr(asked, name) == text
    assert asked.named == {name}


def test_every_knob_that_takes_several_takes_a_list():
    assert {name for name, _, _ in LISTS} == {
        knob.name for knob in KNOBS.values() if knob.metadata["several"] or knob.metadata["parts"]
    }


@pytest.mark.parametrize(
    ("name", "mark"), [("include_path", os.pathsep), ("public_key", ",")], ids=["colon", "comma"]
)
def test_a_path_with_the_mark_between_paths_is_refused_and_not_cut(tmp_path, name, mark):
    odd = tmp_path / f"a{mark}b"
    for value in (odd, [odd], [str(odd)]):
        with pytest.raises(SpecError, match="which separates several paths") as refusal:
            Spec(**{name: value})
        assert f"--{name.replace('_', '-')}" in refusal.value.where


def test_a_pair_and_versions_at_once_are_refused():
    with pytest.raises(SpecError, match="2 options say which versions to merge") as refusal:
        Spec(pair="v1,v2", versions="v1,v2,v3")
    assert refusal.value.where.startswith("--pair and --versions")
    with pytest.raises(SpecError, match="2 options say which versions to merge"):
        Spec(versions="v1,v2,v3", last=3)


def test_the_defaults_are_in_range_and_ask_for_nothing():
    assert Spec() == Spec(**{name: knob.default for name, knob in KNOBS.items()})


@pytest.mark.parametrize("name", sorted(KNOBS))
def test_every_knob_has_help_and_a_command(name):
    metadata = KNOBS[name].metadata
    assert metadata["help"].endswith(".")
    assert metadata["commands"]
    steps = {"run", "track", "watch", "evaluate", "gate", "sign", "promote"}
    assert metadata["commands"] <= {*steps, *STUDIES}


def test_the_acquisitions_a_user_may_name_are_those_of_the_search():
    assert spec.ACQUISITIONS == CHOICES
    assert KNOBS["acquisition"].metadata["choices"] == CHOICES


# in a model's tags everything is text
TAGS = {
    "method": ("greedy", "greedy"),
    "space": (" schedule", "schedule"),
    "time_tag": ("step", "step"),
    "window": ("6", 6),
    "ema": ("0.9", 0.9),
    "decay": ("cosine", "cosine"),
    "greedy_tie": ("drop", "drop"),
    "calibration": (__file__, __file__),
    "calibration_tokens": ("512", 512),
    "fisher_estimator": ("sampled", "sampled"),
    "regmean_scale": ("0.5", 0.5),
    "tasks": ("arc_easy", "arc_easy"),
    "ood_tasks": ("piqa,sciq", "piqa,sciq"),
    "test_tasks": ("boolq", "boolq"),
    "include_path": (os.curdir, os.curdir),
    "alpha": ("0.7", 0.7),
    "trials": (" 12 ", 12),
    "stop": ("0.1", 0.1),
    "acquisition": (" ei ", "ei"),
    "margin": (" 1e-3,acc=2 % ", "0.001,acc=2%"),
    "confidence": ("0.9", 0.9),
    "min_items": ("200", 200),
    "champion": ("prod", "prod"),
    "num_fewshot": ("5", 5),
    "apply_chat_template": ("yes", True),
    "fewshot_as_multiturn": ("no", False),
    "system_instruction": (" Be brief. ", "Be brief."),
    "cluster": (" passage ", "passage"),
    "gen_kwargs": ("max_gen_toks=8", "max_gen_toks=8"),
    "evaluator": (" lm-eval", "lm-eval"),
    "batch_size": ("8", 8),
    "max_length": ("2048", 2048),
    "register_copies": (" Yes", True),
}


@pytest.mark.parametrize("name", POLICY)
def test_the_policy_sets_a_knob_that_was_left_open(name):
    text, value = TAGS[name]
    assert Spec(seed=3).settle({f"soup.{name}": text}) == replace(Spec(seed=3), **{name: value})


@pytest.mark.parametrize("name", POLICY)
def test_a_default_that_was_named_wins_over_the_policy(name):
    text, value = TAGS[name]
    default = KNOBS[name].default
    assert value != default
    settled = Spec(**{name: default}).settle({f"soup.{name}": text})
    assert getattr(settled, name) == default


def test_folders_of_tasks_are_those_of_the_caller_and_then_those_of_the_policy(tmp_path):
    ours, theirs, both = (tmp_path / name for name in ("ours", "theirs", "both"))
    for folder in (ours, theirs, both):
        folder.mkdir()
    spec = Spec(include_path=os.pathsep.join(map(str, (both, ours))))
    policy = {"soup.include_path": f"{theirs}{os.pathsep}{both}\n"}
    settled = spec.settle(policy)
    assert settled.include_path == os.pathsep.join(map(str, (ours, theirs, both)))
    assert settled.settle(policy) == settled
    assert Spec(include_path="").settle(policy).include_path == ""


@pytest.mark.parametrize("name", sorted(set(KNOBS) - set(POLICY)))
def test_the_policy_cannot_set_what_belongs_to_the_request(name):
    assert Spec().settle({f"soup.{name}": "7"}) == Spec()


def test_tags_that_are_no_knobs_are_not_read():
    assert (
        Spec().settle({"alpha": "0.7", "soup.lambda": "x", "team": "llm", "soup.": "y"}) == Spec()
    )


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("soup.margins", "did you mean soup.margin?"),
        ("soup.ood-tasks", "did you mean soup.ood_tasks?"),
        ("soup.oodtasks", "did you mean soup.ood_tasks?"),
        ("soup.Tasks", "did you mean soup.tasks?"),
        ("soup_tasks", "did you mean soup.tasks?"),
        ("Soup.trials", "did you mean soup.trials?"),
        ("soup.confidance", "did you mean soup.confidence?"),
        ("soup.limit", "no tag can set --limit"),
        ("soup.allow_task_codes", "no tag can set --allow-task-code"),
        ("soup.xyz", "no knob has this name"),
        ("soup.", "no knob has this name"),
        *((f"soup.{name}", "") for name in POLICY),
        *(("soup.gate", ""), ("soup.model", ""), ("team", ""), ("souper.margins", "")),
    ],
)
def test_a_tag_that_sets_nothing_is_told_with_the_one_that_was_meant(tag, said):
    ours = {value for value in vars(naming).values() if isinstance(value, str)}
    told = list(unread([tag], ours))
    assert len(told) == bool(said)
    assert all(words.startswith(f"tag {tag} sets nothing") and said in words for words in told)


@given(named=st.sets(st.sampled_from(POLICY)))
def test_a_policy_is_settled_once(named):
    policy = {f"soup.{name}": text for name, (text, _) in TAGS.items()}
    settled = Spec(**{name: KNOBS[name].default for name in named}).settle(policy)
    for name, (_, value) in TAGS.items():
        assert getattr(settled, name) == (KNOBS[name].default if name in named else value)
    assert settled.settle({"soup.alpha": "0.25"}) == settled


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("trials", "ten", "a whole number"),
        ("trials", "10.0", "a whole number"),
        ("alpha", "half", "a number"),
        ("max_length", "", "a whole number"),
        ("register_copies", "maybe", "yes or no"),
        ("num_fewshot", "None", "a whole number"),
    ],
)
def test_a_policy_tag_that_cannot_be_read_is_refused(name, text, kind):
    with pytest.raises(SpecError) as refusal:
        Spec().settle({f"soup.{name}": text})
    assert refusal.value.what == f"policy tag soup.{name} is {text!r}, which is not {kind}"
    assert f"--{name.replace('_', '-')}" in refusal.value.fix


@pytest.mark.parametrize(
    ("name", "text"),
    [("alpha", "1.0"), ("trials", "3"), ("acquisition", "best"), ("margin", "nan")],
)
def test_a_policy_tag_out_of_range_is_refused_by_its_name(name, text):
    with pytest.raises(SpecError) as refusal:
        Spec().settle({f"soup.{name}": text})
    assert f"tag soup.{name}" in refusal.value.where


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_remembers_what_was_named(copied):
    policy = {"soup.alpha": "0.7", "soup.trials": "12"}
    original = Spec(alpha=0.5, pair="v1,v2")
    assert copied(original) == original
    assert copied(original).settle(policy) == original.settle(policy)
    assert (original.settle(policy).alpha, original.settle(policy).trials) == (0.5, 12)


def test_a_request_cannot_be_changed():
    with pytest.raises(AttributeError):
        Spec().alpha = 0.7


def test_equal_requests_have_equal_keys_however_their_numbers_are_written():
    whole, point = Spec(alpha=0, margin=0), Spec(alpha=0.0, margin=0.0)
    assert whole == point
    assert key_of({"alpha": whole.alpha}) == key_of({"alpha": point.alpha})


def test_a_target_of_another_model_keeps_its_alias_and_model_apart():
    assert parse_target("model:prod llm@champion") == Target("model", "champion", "prod llm")


@pytest.mark.parametrize(
    ("knob", "policy", "stricter", "looser"),
    [
        ("margin", "0.01", "0.005", "0.2"),
        ("margin", "0.01", 0.005, 0.2),
        ("margin", "0.01,piqa=0.005", "0.005,piqa=0", "0.01"),
        ("margin", "0.01,piqa=0.005", "0.01,piqa=0.001", "0.01,piqa:acc=0.01"),
        ("margin", "0.01,acc=2%", "0,acc=1%", "0.01,acc=0.01"),
        ("margin", "0.01", "0.01,perplexity=1%", "0.01,perplexity=3%"),
        ("confidence", "0.9", 0.99, 0.8),
        ("min_items", "200", 500, 60),
        ("ood_tasks", "piqa,lambada_openai:acc", "lambada_openai:acc piqa,boolq", "piqa"),
        ("champion", "live", "live", "other"),
    ],
)
def test_a_command_line_may_be_stricter_than_the_policy_and_never_looser(
    knob, policy, stricter, looser
):
    rules = {f"soup.{knob}": policy}
    assert getattr(Spec(**{knob: stricter}).settle(rules, "prod-llm"), knob) in (
        stricter,
        str(stricter),
    )
    with pytest.raises(SpecError) as caught:
        Spec(**{knob: looser}).settle(rules, "prod-llm")
    unjudged = Spec(**{knob: looser}).settle(rules)  # nobody judges by it
    assert getattr(unjudged, knob) in (looser, str(looser))
    assert caught.value.exit_code == 2
    for words in (str(looser), policy, "prod-llm"):  # both values, and whose policy it is
        assert words in caught.value.what


@pytest.mark.parametrize("value", ["nan", "-1", "a lot"])
def test_a_rule_that_the_policy_states_wrongly_is_no_rule_to_be_stricter_than(value):
    with pytest.raises(SpecError, match="margin"):
        Spec(margin=0.2).settle({"soup.margin": value}, "prod-llm")


def test_the_rules_of_another_model_are_its_own():
    candidates = {
        **{"soup.margin": "0.5", "soup.ood_tasks": "easy", "soup.tasks": "piqa"},
        **{"soup.max_length": "2", "soup.include_path": "/their/own", "soup.method": "uniform"},
    }
    held = policy_for(candidates, {"soup.margin": "0.02", "soup.trials": "99"})
    assert held == {"soup.method": "uniform", "soup.margin": "0.02"}
    assert policy_for(candidates, {"soup.tasks": "arc_easy"})["soup.tasks"] == "arc_easy"


def test_a_public_key_means_that_only_signed_scores_count(tmp_path):
    key = tmp_path / "gate.pub.pem"
    with pytest.raises(SpecError, match="there is no file"):
        Spec(public_key=str(key))
    key.write_text("")
    assert Spec(public_key=str(key)).believed == "signed"
    assert Spec(public_key=str(key), evidence="own").believed == "own"
    assert Spec().believed == "experiment"
    with pytest.raises(SpecError, match="no public key was named"):
        Spec(evidence="signed")


def test_another_command_repeats_what_the_caller_named_and_it_takes():
    spec = Spec(
        model="my llm",
        pair="v1,v2",
        ood_tasks="piqa, sciq",
        margin=0.05,
        batch_size=4,
        num_fewshot=None,
        system_instruction="",
        apply_chat_template=True,
    )
    assert spec.words_of("promote") == (
        "--model 'my llm' --ood-tasks 'piqa, sciq' --apply-chat-template True --margin 0.05"
    )
    assert spec.words_of("evaluate", "model", "ood_tasks") == (
        "--apply-chat-template True --batch-size 4"
    )
    assert Spec().words_of("run") == ""


def test_a_command_has_defaults_of_its_own_for_what_nobody_named():
    assert Spec(model="m").with_defaults_of("run") == Spec(model="m")
    study = Spec(model="m").with_defaults_of("pairs")
    assert (study.model, study.method) == ("m", "uniform")
    assert "method" in study.named  # so no tag of the policy sets it
    assert Spec(method="greedy").with_defaults_of("pairs").method == "greedy"
