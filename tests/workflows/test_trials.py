"""What methods evaluate on a real store, what they take over from others, what they register."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.utils.file_utils import local_file_uri_to_path

import mlflow_soup
from conftest import MODEL, register, use
from mlflow_soup import Spec, errors, verify
from mlflow_soup.cli import main
from mlflow_soup.evaluation import evaluator
from mlflow_soup.records import Version
from mlflow_soup.registry import naming
from mlflow_soup.request.spec import WINDOWS
from mlflow_soup.search.methods import METHODS
from mlflow_soup.weights.manifest import CARD, MANIFEST, parse_manifest
from mlflow_soup.workflows.bench import open_version
from mlflow_soup.workflows.job import open_session, settle

rows = pytest.mark.parametrize("name", METHODS)
STATISTICS = ["fisher", "regmean"]
# no gate: it is tested elsewhere
GOOD = {"tasks": "toy_letters", "ood_tasks": "", "limit": 100, "register_copies": True}


def run(method, versions="v1,v2", **said):
    return mlflow_soup.run(Spec(versions=versions, method=method, **{**GOOD, **said}))


def trial_runs(client, outcome):
    """The runs of the trials that this very call wrote down, in order."""
    experiment = client.get_run(outcome.run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{outcome.run_id}' and tags.`soup.role` = 'trial'"
    found = client.search_runs([experiment], query)
    return sorted(found, key=lambda run: int(run.data.tags["soup.number"]))


def evaluated(client, outcome):
    """The labels of what this very call evaluated."""
    return [
        run.info.run_name.removesuffix(" (chosen)")
        for run in trial_runs(client, outcome)
        if naming.ITEMS_RUN not in run.data.tags
    ]


def values(outcome):
    return {trial.recipe: trial.held_out.value for trial in outcome.trials}


def forget(client, outcome, numbers=None):
    """Delete trials for good, as `mlflow gc` does."""
    for run in trial_runs(client, outcome):
        if numbers is None or int(run.data.tags["soup.number"]) in numbers:
            client.delete_run(run.info.run_id)
            shutil.rmtree(local_file_uri_to_path(run.info.artifact_uri))


@pytest.fixture(scope="module")
def every(filled, tmp_path_factory):
    """A database in which every method has merged v1,v2, one after the other; the outcomes."""
    root = tmp_path_factory.mktemp("every")
    with pytest.MonkeyPatch.context() as patch:
        use(filled, root, patch)
        outcomes = {name: run(name) for name in METHODS}
    return root, outcomes


@pytest.fixture
def outcomes(every, client, tmp_path, monkeypatch):
    """What each method returned; `client` then sees the store as they left it."""
    root, returned = every
    use(root / "mlflow.db", tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_SOUP_CACHE", str(root / "cache"))
    return returned


@pytest.fixture(scope="module")
def session(every):
    """Versions and bench of the requests above."""
    root, _ = every
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
        spec = Spec(versions="v1,v2", **GOOD)
        return open_session(*settle(spec, spec.parents), [spec.parents], "--versions")[0]


def rescored(client, session, version):
    """The held-out score of a version as the store holds it."""
    bench, opened = session.bench, open_version(client, version, fresh=True)
    bench.live.set_weights(bench.live.link([opened.checkpoint]), [1.0])
    return bench.held_out.score()


# --- what is registered


def test_every_method_registers_one_version_that_says_how(client, outcomes):
    numbers = [outcomes[name].soup.version.number for name in METHODS]
    assert numbers == list(range(4, 4 + len(METHODS)))
    for name, outcome in outcomes.items():
        version = client.get_model_version(MODEL, str(outcome.soup.version.number))
        assert version.tags["soup.method"] == name
        assert version.tags["soup.parents"] == "1,2"
        assert naming.parse_weights(version.tags["soup.weights"]) == outcome.soup.recipe.lam
        assert client.get_run(outcome.run_id).data.tags["soup.method"] == name
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 3 + len(METHODS)


@rows
def test_the_registered_version_scores_what_its_trial_scored(client, outcomes, session, name):
    outcome = outcomes[name]
    score = rescored(client, session, outcome.soup.version)
    assert score == outcome.soup.held_out
    assert values(outcome)[outcome.soup.recipe] == score.value


# grid, random and regmean read back what they found just as bayesopt and fisher do
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("grid", "random", "regmean") else []
        )
        for name in METHODS
    ],
)
def test_the_same_command_registers_and_evaluates_nothing_again(client, outcomes, name):
    again = run(name)
    assert trial_runs(client, again) == []
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 3 + len(METHODS)
    assert again.soup == outcomes[name].soup
    assert again.trials == outcomes[name].trials


def test_weights_are_as_the_methods_say(outcomes):
    chosen = {name: outcome.soup.recipe for name, outcome in outcomes.items()}
    assert chosen["uniform"].lam == chosen["fisher"].lam == chosen["regmean"].lam == (0.5, 0.5)
    alone = list(values(outcomes["best"]).values())
    assert chosen["best"].lam == ((1, 0) if alone[0] > alone[1] else (0, 1))
    for name in ("grid", "random", "bayesopt"):
        assert chosen[name].lam[-1] >= 0.5
        assert len(outcomes[name].trials) <= 6
    digests = {name: outcomes[name].soup.digest for name in ("uniform", "fisher", "regmean")}
    assert len({*digests.values()}) == 3
    assert outcomes["best"].soup.digest in {p.digest for p in outcomes["best"].soup.parents}


def test_three_versions_by_greedy_and_uniform(client, session):
    uniform, greedy = (run(name, "v1,v2,v3") for name in ("uniform", "greedy"))
    assert uniform.soup.recipe.lam == (0.3333, 0.3333, 0.3334)
    assert naming.parse_weights(client.get_model_version(MODEL, "4").tags["soup.weights"]) == (
        0.3333,
        0.3333,
        0.3334,
    )
    members = [weight for weight in greedy.soup.recipe.lam if weight]
    assert max(members) - min(members) < 2e-4
    parents = [trial.held_out.value for trial in greedy.trials[:3]]
    assert greedy.soup.held_out.value >= max(parents)
    for outcome in (uniform, greedy):
        assert rescored(client, session, outcome.soup.version) == outcome.soup.held_out
        assert all(finding.holds for finding in verify(outcome.soup.version.uri))


ASKED = {"bayesopt", "uniform", "fisher"}  # as the next test has it


def test_of_a_parent_and_itself_every_method_makes_that_parent(client, checkpoints):
    register(client, checkpoints[0])  # v4 = v1
    for name in (name for name in METHODS if name not in ASKED):
        outcome = run(name, "v1,v4", trials=4, limit=10)
        assert outcome.soup.digest == outcome.soup.parents[0].digest, name
        assert len({*values(outcome).values()}) == 1, name


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_soup_with_the_weights_of_a_parent_is_registered_only_if_asked(client, checkpoints, name):
    register(client, checkpoints[0])  # v4 = v1
    said = {"trials": 4, "limit": 10}
    few = run(name, "v1,v4", **said, register_copies=False)
    assert (few.soup.version, few.soup.registered) == (Version(MODEL, 4), False)
    assert few.soup.digest == few.soup.parents[0].digest
    assert len({*values(few).values()}) == 1
    assert (few.verdict, few.promoted, few.exit_code) == (None, "", 0)
    assert client.get_run(few.run_id).data.tags["soup.original"] == f"{MODEL}/4"
    assert client.get_run(few.run_id).info.status == "FINISHED"
    assert "not registered, because it has the same weights as models:/toy-llm/4" in few.summary
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4
    assert not client.get_model_version(MODEL, "4").description
    many = run(name, "v1,v4", **said)
    assert (many.soup.version, many.soup.registered) == (Version(MODEL, 5), True)
    assert evaluated(client, many) == []
    again = run(name, "v1,v4", **said, register_copies=False)  # it is registered by now
    assert again.soup == many.soup


def test_the_best_parent_is_told_and_cannot_be_promoted_unless_asked(client):
    wish = {
        "ood_tasks": "toy_digits,toy_digits_bpb:bits_per_byte",
        "limit": None,
        "promote": "champion",
    }
    plain = run("best", **wish, register_copies=False)
    scores = values(plain)
    assert plain.soup.held_out.value == max(scores.values())
    assert plain.soup.version in [parent.version for parent in plain.soup.parents]
    assert (plain.promoted, plain.exit_code) == ("", 3)
    assert "nothing was promoted to champion" in plain.summary
    assert client.get_registered_model(MODEL).aliases == {}
    asked = run("best", **wish)
    assert asked.soup.version == Version(MODEL, 4)
    assert asked.exit_code == (0 if asked.promoted else 3)


def test_equal_tensors_under_another_config_are_another_model(client, checkpoints, tmp_path):
    for number, folder in enumerate(checkpoints[:2]):
        copy = shutil.copytree(folder, tmp_path / f"copy{number}")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"use_parallel_residual": False}))
        register(client, copy)
    for name in ("uniform", "fisher"):
        first, second = run(name, "v1,v2", limit=20), run(name, "v4,v5", limit=20)
        labels = [trial.recipe.label for trial in second.trials]
        # by then the parents are known
        assert evaluated(client, second) == (labels if name == "uniform" else labels[-1:])
        assert second.soup.version != first.soup.version
    places = [path.name for path in (tmp_path / "cache" / "statistics").iterdir()]
    assert len({*places}) == 4


# --- what is taken over


def test_what_one_method_has_scored_another_does_not_score_again(client, outcomes):
    first = outcomes["bayesopt"]
    assert len(evaluated(client, first)) == len(first.trials)
    by_recipe = {t.recipe: t for t in first.trials}
    runs = trial_runs(client, outcomes["uniform"])
    assert len(runs) == 3
    for run_, trial in zip(runs, outcomes["uniform"].trials, strict=True):
        same = by_recipe[trial.recipe]
        assert run_.data.tags["soup.items_run"] == same.run_id
        assert trial.held_out == same.held_out
        assert run_.data.metrics["dev/objective"] == same.held_out.value
        assert run_.data.metrics["dev/toy_letters/acc"] == same.held_out.value
        assert run_.data.metrics["dev/truncated"] == 0
        assert not client.list_artifacts(run_.info.run_id)
    assert evaluated(client, outcomes["greedy"]) == []
    assert evaluated(client, outcomes["best"]) == []
    for name in STATISTICS:
        assert evaluated(client, outcomes[name]) == [name]
    known = set().union(*(values(outcomes[name]) for name in ("bayesopt", "uniform", *WINDOWS)))
    new = values(outcomes["grid"]).keys() - known
    assert len(evaluated(client, outcomes["grid"])) == len(new)


def test_who_takes_over_what_was_taken_over_names_who_measured(client, outcomes):
    measured = {t.run_id for name in outcomes for t in outcomes[name].trials}
    for outcome in outcomes.values():
        for run_ in trial_runs(client, outcome):
            source = run_.data.tags.get("soup.items_run")
            if source is not None:
                assert source in measured
                assert "soup.items_run" not in client.get_run(source).data.tags


def test_parents_are_not_scored_again_in_another_pair(client, outcomes):
    assert evaluated(client, run("uniform", "v2,v3")) == ["λ = 1", "λ = 0.5"]
    # nor where the order is another
    assert evaluated(client, run("best", "v3,v1")) == []


@pytest.mark.parametrize(
    "said", [{"batch_size": 16}, {"limit": 50}, {"tasks": "toy_letters:acc_norm"}]
)
def test_what_was_scored_otherwise_is_scored_again(client, outcomes, said):
    assert len(evaluated(client, run("best", **said))) == 2


def test_text_and_estimator_make_other_statistics(client, outcomes, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["kam kam kam", "abc abc abc", "dig dig dig"]))
    text = {"calibration": str(path)}
    drawn = {"fisher_estimator": "sampled", **text}
    digests = {outcomes["fisher"].soup.digest}
    for said in (text, drawn, {"seed": 1, **drawn}):
        outcome = run("fisher", **said)
        assert evaluated(client, outcome) == ["fisher"]
        digests.add(outcome.soup.digest)
    assert len(digests) == 4


# --- what is gone is measured anew


def test_when_the_run_that_measured_is_gone_it_is_measured_anew(client):
    first, second = run("uniform"), run("greedy")
    assert evaluated(client, second) == []
    forget(client, first)
    again = run("greedy")
    assert len(evaluated(client, again)) == 3
    assert values(again) == values(second)
    assert again.soup == second.soup
    assert trial_runs(client, run("greedy")) == []


def test_when_one_trial_is_gone_that_one_is_measured_anew(client):
    first, second = run("best", "v1,v3"), run("uniform", "v1,v2")
    assert evaluated(client, second) == ["λ = 1", "λ = 0.5"]  # v1 was taken over
    forget(client, first, {0})
    again = run("uniform", "v1,v2")
    assert evaluated(client, again) == ["λ = 0"]
    assert [trial.number for trial in again.trials] == [0, 1, 2]
    assert values(again) == values(second)
    assert trial_runs(client, run("uniform", "v1,v2")) == []


def test_a_search_with_a_gap_fills_it_and_ends_where_it_did(client):
    whole = run("bayesopt", stop=0.0)
    forget(client, whole, {1, 3})
    again = run("bayesopt", stop=0.0)
    assert len(evaluated(client, again)) == 2
    assert [t.recipe for t in again.trials] == [t.recipe for t in whole.trials]
    assert again.soup == whole.soup
    assert trial_runs(client, run("bayesopt", stop=0.0)) == []


def test_items_that_cannot_be_read_are_measured_anew(client):
    first = run("best")
    lost, damaged = (
        Path(local_file_uri_to_path(client.get_run(t.run_id).info.artifact_uri)) / naming.ITEMS
        for t in first.trials
    )
    lost.unlink()
    damaged.write_bytes(b"PAR1")
    assert evaluated(client, run("uniform")) == ["λ = 0", "λ = 1", "λ = 0.5"]
    again = run("best")
    assert evaluated(client, again) == []
    assert values(again) == values(first)
    assert trial_runs(client, run("best")) == []


def test_a_merge_that_cannot_be_scored_ends_in_words_of_an_evaluation(client, monkeypatch):
    scores = evaluator.Evaluator.score
    calls = []

    def fail_at_the_merge(self, *parts):
        calls.append(1)
        if len(calls) == 3:
            raise errors.NonFiniteError("not finite", where="here", fix="none")
        return scores(self, *parts)

    monkeypatch.setattr(evaluator.Evaluator, "score", fail_at_the_merge)
    with pytest.raises(errors.ObjectiveError, match="the soup has no finite score") as caught:
        run("uniform")
    assert caught.value.exit_code == 1
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 3


# --- statistics


@pytest.mark.parametrize("name", STATISTICS)
def test_a_soup_by_statistics_says_so_and_is_verified_but_for_its_making(client, outcomes, name):
    version = outcomes[name].soup.version
    folder = Path(mlflow.artifacts.download_artifacts(version.uri))
    manifest = parse_manifest(json.loads((folder / MANIFEST).read_text()))
    assert manifest.method == name
    assert [source.lam for source in manifest.sources] == [0.5, 0.5]
    card = (folder / CARD).read_text()
    assert f"merged with {name}" in card
    assert "0.5 × `models:/toy-llm/1`" in card
    assert "weighted average of" not in card.lower()
    paper = {"fisher": "2111.09832", "regmean": "2212.09849"}[name]
    assert f"arXiv:{paper}" in card
    assert "2403.19390" not in card
    findings = {finding.what: finding for finding in verify(version.uri)}
    skipped = [what for what, finding in findings.items() if finding.verdict != "ok"]
    assert skipped == ["merged again"]
    assert findings["merged again"].verdict == "skipped"
    assert f"{name} needs statistics" in findings["merged again"].details[0]
    done = CliRunner().invoke(main, ["verify", version.uri])
    assert done.exit_code == 0
    assert done.output.endswith(
        f"{version.uri}: files, tags and parents are as recorded; "
        "the parents were not merged again\n"
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_a_changed_soup_by_statistics_is_found_out(client, outcomes, tmp_path, name):
    source = mlflow.artifacts.download_artifacts(outcomes[name].soup.version.uri)
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (found,) = [f for f in verify(folder) if f.what == "soup"]
    assert found.verdict == "MISMATCH"


def test_the_report_tells_what_statistics_were_taken_from(outcomes):
    assert "fisher read" in outcomes["fisher"].summary
    assert "tokens of the held-out items in 100 documents" in outcomes["fisher"].summary
    assert "regmean read" in outcomes["regmean"].summary
    assert "tokens of" not in outcomes["uniform"].summary
    assert "Nothing was merged" in outcomes["best"].summary


def test_a_soup_that_comes_out_otherwise_than_scored_is_refused(client, outcomes):
    made = outcomes["fisher"]
    client.delete_model_version(MODEL, str(made.soup.version.number))
    (run_id,) = [t.run_id for t in made.trials if t.recipe == made.soup.recipe]
    digest = "sha256:" + "0" * 64  # as if another version of a library had mixed it then
    fingerprint = client.get_run(run_id).data.tags["soup.evaluator"]
    scored = {"evaluator": fingerprint, "weights": [(digest, (1.0).hex())]}
    for tag, value in {"digest": digest, "measured": naming.key_of(scored)}.items():
        client.set_tag(run_id, f"soup.{tag}", value)
    before = len(client.search_model_versions(f"name='{MODEL}'"))
    with pytest.raises(
        errors.ObjectiveError, match="give another soup than the one that was scored"
    ) as caught:
        run("fisher")
    assert run_id in caught.value.where
    assert made.soup.digest in caught.value.where
    assert f"delete run {run_id}" in caught.value.fix
    assert len(client.search_model_versions(f"name='{MODEL}'")) == before
    # and what it tells to do helps
    client.delete_run(run_id)
    again = run("fisher")
    assert again.soup.digest == made.soup.digest
    assert again.soup.version == Version(MODEL, before + 2)
