"""What the key of a request depends on, and what is refused before anything is touched."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

import toy
from conftest import MODEL, register, use
from mlflow_soup.cli import main
from mlflow_soup.request.spec import Spec
from mlflow_soup.search.methods import METHODS
from mlflow_soup.workflows.job import open_session, settle

rows = pytest.mark.parametrize("name", METHODS)


def prepare(**said):
    """The job of a request, as the main job makes it; on few items."""
    spec = Spec(**{"limit": 20, **said})
    client, name, settled = settle(spec, spec.parents)
    session, (versions,) = open_session(client, name, settled, [spec.parents], "--versions")
    return session.job(versions)


@pytest.fixture(scope="module")
def job(filled, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use(filled, tmp_path_factory.mktemp("job"), patch)
        yield prepare(versions="v1,v2")


def other(job, **said):
    """The same request but for some knobs."""
    session = replace(job.session, spec=replace(job.session.spec, **said))
    return session.job(job.versions)


CHANGES = {
    "alpha": 0.7,
    "acquisition": "ei",
    "seed": 5,
    "trials": 5,
    "greedy_tie": "drop",
    "fisher_estimator": "sampled",
    "regmean_scale": 0.5,
    "calibration_tokens": 60,
    "stop": 0.5,
    "margin": 0.3,
    "champion": "other",
    "parents_in": "memory",
    "space": "schedule",
    "ema": 0.5,
    "decay": "cosine",
}
DEPENDS = {
    "bayesopt": {"alpha", "acquisition", "seed", "space"},
    "uniform": set(),
    "wma": {"space"},
    "ema": {"space", "ema"},
    "wsm": {"space", "decay"},
    "greedy": {"greedy_tie"},
    "fisher": {"fisher_estimator", "calibration_tokens"},
    "regmean": {"regmean_scale", "calibration_tokens"},
    "grid": {"alpha", "trials"},
    "random": {"alpha", "seed"},
    "best": set(),
}


def test_the_key_of_a_method_changes_with_what_it_depends_on_and_with_nothing_else(job):
    assert set(DEPENDS) == set(METHODS)
    for name, method in METHODS.items():
        assert set(method.knobs) <= DEPENDS[name]
        known = other(job, method=name).key
        found = {n for n, v in CHANGES.items() if other(job, method=name, **{n: v}).key != known}
        assert found == DEPENDS[name], name


def test_drawn_tokens_make_the_seed_count(job):
    keys = {other(job, method="fisher", fisher_estimator="sampled", seed=i).key for i in (0, 1)}
    assert len(keys) == 2


def test_methods_parents_and_their_order_have_keys_of_their_own(job):
    keys = [other(job, method=name).key for name in METHODS]
    assert len({*keys}) == len(METHODS)
    first, second = job.versions
    assert job.session.job((second, first)).key != job.key


@rows
def test_a_request_is_another_when_it_ends_otherwise(job, name):
    known = other(job, method=name)
    for said in ({"trials": 5}, {"stop": 0.5}):
        assert other(job, method=name, **said).request != known.request
    assert other(job, method=name, margin=0.3).request == known.request


def test_calibration_text_is_in_the_key_by_its_tokens(job, tmp_path):
    rows_of_json = tmp_path / "text.jsonl"
    rows_of_json.write_text('{"text": "abc abc"}\n{"text": "kam kam"}\n')
    plain = tmp_path / "text.txt"
    plain.write_text("kam kam\n\nabc abc")
    keys = [
        other(job, method="regmean", calibration=str(path)).key for path in (rows_of_json, plain)
    ]
    assert keys[0] == keys[1] != other(job, method="regmean").key


def test_without_a_file_the_held_out_items_are_the_calibration_text(job):
    session = job.session
    decoded = {session.bench.live.tokenizer.decode(ids) for ids in session.calibration.documents}
    assert decoded == {*session.bench.held_out.texts()}
    assert not decoded & {*session.bench.ood.texts()}


def test_the_last_versions_need_not_be_named(client):
    named = prepare(versions="v2,v3")
    assert prepare(last=2).key == named.key
    assert prepare(last=2).request == named.request
    assert prepare(last=3).key == prepare(versions="v1,v2,v3").key


def test_soups_are_none_of_the_last_versions(client):
    source = client.get_model_version(MODEL, "1").source
    client.create_model_version(MODEL, source, tags={"soup.digest": "sha256:0"})  # v4
    assert [version.number for version in prepare(last=2).versions] == [2, 3]
    client.create_model_version(MODEL, source)  # v5
    assert [version.number for version in prepare(last=2).versions] == [3, 5]


# --- refused


def refused(client, *words, command="run"):
    """What the command says of a wrong request; and that it touched nothing."""
    versions = len(client.search_model_versions(f"name='{MODEL}'"))
    done = CliRunner().invoke(main, [*command.split(), "--limit", "20", *words])
    assert done.exit_code == 2, done.output
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert client.search_runs(experiments) == []
    assert len(client.search_model_versions(f"name='{MODEL}'")) == versions
    what, where, fix = done.stderr.strip().splitlines()[-3:]
    return (
        what.removeprefix("error: "),
        where.removeprefix("  where: "),
        fix.removeprefix("    fix: "),
    )


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.searches])
def test_a_search_takes_eight_versions_at_most(client, name):
    source = client.get_model_version(MODEL, "1").source
    for _ in range(6):
        client.create_model_version(MODEL, source)
    what, where, fix = refused(
        client, "--last", "9", "--method", name, "--trials", "20", "--space", "simplex"
    )
    assert what == f"--method {name} cannot search the weights of 9 versions"
    assert name in where
    assert "at most 8" in fix
    assert "uniform or greedy" in fix
    if name == "grid":
        assert prepare(last=9, method="greedy").versions[-1].number == 9
        assert prepare(last=8, method=name, trials=20).versions[0].number == 2


def test_a_budget_must_cover_the_parents_and_two_more(client):
    what, where, fix = refused(client, "--versions", "v1,v2,v3", "--trials", "4")
    assert what == "--trials 4 is too small"
    assert "soup.trials" in where
    assert fix.startswith("set at least 5: 3 parents")
    assert prepare(versions="v1,v2,v3", trials=5).spec.budget == 5
    assert prepare(versions="v1,v2,v3", trials=4, method="uniform").spec.method == "uniform"


def test_there_must_be_as_many_versions_as_are_asked_for(client):
    what, where, fix = refused(client, "--last", "4")
    assert what == "toy-llm has only 3 versions that are not soups"
    assert (where, fix) == ("--last 4", "ask for at most --last 3")


def test_with_several_models_the_last_versions_are_of_one_that_is_named(client, checkpoints):
    client.create_registered_model("other")
    register(client, checkpoints[0], "other")
    what, _, fix = refused(client, "--last", "2")
    assert what == "no model was named, and other, toy-llm have versions"
    assert "--model NAME" in fix


def test_one_version_under_two_names_is_none_to_merge(client):
    client.set_registered_model_alias(MODEL, "live", "2")
    what, where, fix = refused(client, "--versions", "@live,v2", "--method", "uniform")
    assert what == "@live and v2 are the same version, toy-llm v2"
    assert (where, fix) == ("--versions", "name each version once")


def test_pairs_may_share_a_version_under_any_name(client):
    client.set_registered_model_alias(MODEL, "live", "2")
    spec = Spec(pairs="v1,v2 @live,v3", limit=20)
    refs = [ref for pair in spec.couples for ref in pair]
    session, pairs = open_session(*settle(spec, refs), spec.couples, "--pairs")
    assert [[version.number for version in pair] for pair in pairs] == [[1, 2], [2, 3]]
    assert [version.number for version in session.opened] == [1, 2, 3]


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_no_method_calibrates_on_what_the_gate_judges_by(client, tasks, name):
    words = ["--pair", "v1,v2", "--method", name, "--calibration", str(tasks / "text.jsonl")]
    what, where, fix = refused(client, *words)
    assert what == "the calibration text contains 20 out-of-domain items"
    assert where == f"--calibration {tasks / 'text.jsonl'}"
    assert "remove them" in fix


def test_one_item_out_of_domain_is_enough(client, tmp_path):
    item, *_ = toy._choice_items(toy.DIGITS, 1, 2)  # the first of toy_digits
    text = f"{item['question']} {item['choices'][item['answer']]}"
    path = tmp_path / "text.txt"
    path.write_text(f"kam kam kam\n\n{text}")
    what, *_ = refused(client, "--pair", "v1,v2", "--method", "fisher", "--calibration", str(path))
    assert what == "the calibration text contains 1 out-of-domain items"


def test_white_space_hides_no_item_out_of_domain(client, tmp_path):
    items = toy._choice_items(toy.DIGITS, 3, 2)
    lines = [f"{i['question']}   {i['choices'][i['answer']]}" for i in items]
    path = tmp_path / "text.txt"
    path.write_text("\r\n".join(["kam kam", *lines]) + "\n")
    what, *_ = refused(client, "--pair", "v1,v2", "--method", "fisher", "--calibration", str(path))
    assert what == "the calibration text contains 3 out-of-domain items"


def test_checkpoints_that_are_not_named_by_age_are_told_aloud(client, caplog):
    prepare(pair="v2,v1", method="uniform")
    assert (
        "v2,v1 is not by age: λ is the weight of the last version, v1. Did you mean" in caplog.text
    )
    caplog.clear()
    prepare(pair="v1,v2", method="uniform")
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "words"), [("\n\n\n", "holds no text"), ("k", "the calibration text is too short")]
)
def test_a_calibration_file_must_hold_text(client, tmp_path, content, words):
    path = tmp_path / "text.txt"
    path.write_text(content)
    what, where, fix = refused(
        client, "--pair", "v1,v2", "--method", "regmean", "--calibration", str(path)
    )
    assert words in what
    assert where.startswith("--calibration")
    assert "text" in fix


def test_a_calibration_file_must_be_there(client):
    words = ["--pair", "v1,v2", "--method", "fisher", "--calibration", "none.txt"]
    what, where, fix = refused(client, *words)
    assert what == "there is no file none.txt"
    assert where.startswith("--calibration")
    assert "held-out items" in fix


@pytest.mark.parametrize(
    ("command", "option", "value", "words"),
    [
        ("run --pair v4,v5", "--workers", "4096", "4096 workers are more than the "),
        ("run --pair v4,v5", "--device", "cuda:99", "device 'cuda:99' is not available"),
        ("study pairs --versions v4,v5", "--workers", "4096", "4096 workers are more than the "),
        ("track --versions v4,v5", "--device", "cuda:99", "device 'cuda:99' is not available"),
    ],
)
def test_what_this_machine_has_not_is_told_before_any_file_is_asked_for(
    client, tmp_path, command, option, value, words
):
    for name in ("v4", "v5"):
        client.create_model_version(MODEL, str(tmp_path / name))  # there are no such files
    what, where, _ = refused(client, option, value, command=command)
    assert what.startswith(words)
    assert where == option


def test_what_needs_no_text_reads_none(client, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("")
    assert prepare(versions="v1,v2", method="uniform", calibration=str(path)).key
