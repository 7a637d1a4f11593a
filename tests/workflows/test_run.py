"""The main job on a real store, in process: what a user finds in MLflow afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow.utils.file_utils import local_file_uri_to_path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import toy
from conftest import MODEL, fill, register
from mlflow_soup import Spec, errors, verify
from mlflow_soup import run as run_soup
from mlflow_soup.evaluation import evaluator
from mlflow_soup.registry import naming, scores, tracking
from mlflow_soup.search import methods
from mlflow_soup.weights.manifest import MANIFEST
from mlflow_soup.workflows import release


def children(client, run_id):
    experiment = client.get_run(run_id).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")


def trial_runs(client, outcome):
    found = [c for c in children(client, outcome.run_id) if c.data.tags["soup.role"] == "trial"]
    return sorted(found, key=lambda run: int(run.data.tags["soup.number"]))


def test_the_soup_is_a_new_version_with_its_lineage(client, outcome):
    assert outcome.soup.version.number == 4
    version = client.get_model_version(MODEL, "4")
    assert version.tags["soup.parents"] == "1,2"
    assert float(version.tags["soup.lambda"]) == outcome.soup.recipe.lam[-1]
    assert version.tags["soup.gate"] == "passed"
    assert version.tags["soup.digest"] == outcome.soup.digest
    assert version.run_id == outcome.run_id
    assert "Soup of [toy-llm v1](#/models/toy-llm/versions/1)" in version.description
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 4

    run = client.get_run(outcome.run_id)
    inputs = {i.model_id for i in run.inputs.model_inputs}
    assert inputs == {p.model_id for p in outcome.soup.parents}
    (output,) = run.outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"


def test_each_lambda_is_a_child_run_with_metrics_and_item_rows(client, outcome, tmp_path):
    trials = trial_runs(client, outcome)
    assert 4 <= len(trials) <= 6
    assert len(trials) == len(outcome.trials)
    for run in trials:
        assert run.info.status == "FINISHED"
        assert 0.0 <= float(run.data.params["lambda"]) <= 1.0
        assert run.data.metrics["dev/objective"] == run.data.metrics["dev/toy_letters/acc"]
        assert run.data.metrics["seconds/evaluate"] > 0
        file = tracking.fetch(client, run.info.run_id, naming.ITEMS, tmp_path)
        score = scores.read(file).mean
        assert score.value == run.data.metrics["dev/objective"]
        assert np.mean(score.items[0].values) == pytest.approx(score.value)
        assert len(score.items[0].log_likelihoods[0]) == 4


def test_the_search_run_tells_the_story(client, outcome):
    run = client.get_run(outcome.run_id)
    assert run.data.tags["soup.gate"] == "passed"
    assert "against the better parent" in run.data.tags["mlflow.note.content"].lower()
    files = {f.path for f in client.list_artifacts(outcome.run_id)}
    assert {"report.md", "landscape.png", "landscape.svg"} <= files
    curve = client.get_metric_history(outcome.run_id, "curve/objective")
    assert {m.step for m in curve} == {round(1000 * t.recipe.lam[-1]) for t in outcome.trials}
    best = [m.value for m in client.get_metric_history(outcome.run_id, "search/best")]
    assert best == sorted(best)


def test_the_soup_beats_both_parents_and_says_by_how_much(outcome):
    by_lam = {t.recipe.lam[-1]: t.held_out.value for t in outcome.trials}
    assert outcome.soup.held_out.value > max(by_lam[0.0], by_lam[1.0])
    assert outcome.gain.value == pytest.approx(
        outcome.soup.held_out.value - max(by_lam[0.0], by_lam[1.0])
    )
    assert f"{outcome.gain.value:+.4f}" in outcome.summary
    assert "gate passed" in outcome.summary


def test_the_registered_file_is_the_recipe_applied_to_the_parents(client, outcome):
    folders = [p.folder for p in outcome.soup.parents]
    old, new = (load_file(f / "model.safetensors") for f in folders)
    soup = load_file(mlflow.artifacts.download_artifacts("models:/toy-llm/4/model.safetensors"))
    c_old, c_new = (np.float32(lam) for lam in outcome.soup.recipe.lam)
    assert soup.keys() == old.keys()
    for name, tensor in soup.items():
        expected = old[name].numpy() * c_old + new[name].numpy() * c_new
        if torch.equal(old[name], new[name]):  # copied, not multiplied
            expected = old[name].numpy()
        np.testing.assert_array_equal(tensor.numpy(), expected)


def test_the_soup_loads_where_its_parents_did(client, outcome):
    folder = mlflow.artifacts.download_artifacts("models:/toy-llm/4")
    model = AutoModelForCausalLM.from_pretrained(folder)
    encode = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**encode("abc abc ab", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    manifest = json.loads((Path(folder) / MANIFEST).read_text())
    assert manifest["digest"] == outcome.soup.digest
    assert [float.fromhex(p["lambda"]) for p in manifest["parents"]] == list(
        outcome.soup.recipe.lam
    )


def test_the_same_request_registers_nothing_and_evaluates_nothing_again(client, outcome):
    again = run_soup(Spec(pair="v1,v2", promote="alias:champion"))
    assert again.soup.version == outcome.soup.version
    assert again.run_id != outcome.run_id
    assert children(client, again.run_id) == []
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 4
    assert again.gain == outcome.gain
    assert again.verdict.passed


def test_a_search_cut_short_continues_to_the_same_soup(client, merged):
    whole = merged
    client.delete_model_version(MODEL, "4")
    for run in trial_runs(client, whole):
        if int(run.data.tags["soup.number"]) >= 3:
            client.delete_run(run.info.run_id)
    rest = run_soup(Spec(pair="v1,v2"))
    assert [t.recipe for t in rest.trials] == [t.recipe for t in whole.trials]
    assert rest.soup.digest == whole.soup.digest
    repeated = [c for c in children(client, rest.run_id) if c.data.tags["soup.role"] == "trial"]
    assert len(repeated) == len(whole.trials) - 3 > 0


def test_a_parent_that_changes_during_the_search_makes_no_soup(client, tmp_path, monkeypatch):
    location = tmp_path / "weights"
    for seed in (1, 2):
        folder = toy.save(toy.noisy(toy.train(1), seed, 0.1), tmp_path / f"v{seed}")
        register(client, folder)  # v4, v5
    uri = client.get_model_version_download_uri(MODEL, "4")
    location = Path(local_file_uri_to_path(uri)) / "model.safetensors"
    recommend = methods.recommend

    def train_on(*args, **options):
        if options:  # the last time
            shutil.copy(tmp_path / "v2" / "model.safetensors", location)
        return recommend(*args, **options)

    monkeypatch.setattr(methods, "recommend", train_on)
    with pytest.raises(errors.ParentError, match="toy-llm v4 were changed during the search"):
        run_soup(Spec(pair="v4,v5"))
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 5


def test_a_gate_that_refuses_moves_no_alias(client):
    client.set_registered_model_alias(MODEL, "champion", "1")
    outcome = run_soup(Spec(pair="v3,v1", method="uniform", promote="alias:champion"))
    assert outcome.exit_code == 3
    assert outcome.promoted == ""
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 1
    assert client.get_model_version(MODEL, "4").tags["soup.gate"] == "refused"
    assert client.get_run(outcome.run_id).data.tags["soup.gate"] == "refused"
    refused = [c for c in outcome.verdict.checks if not c.passed]
    assert refused
    for check in refused:
        assert f"{check.difference.value:+.4f}" in outcome.summary
        assert f"{check.bound:+.4f}" in client.get_model_version(MODEL, "4").description


def test_the_stages_can_be_run_one_by_one(client, merged):
    client.delete_model_version_tag(MODEL, "4", "soup.gate")
    roles = release.evaluate(Spec(version="v4")).roles
    assert set(roles) == {"soup", "parent 0", "parent 1"}
    assert roles["soup"].held_out == merged.soup.held_out
    verdict = release.gate(Spec(version="v4")).verdict
    assert verdict == merged.verdict
    strict = Spec(version="v4", margin=0.0, confidence=0.999999, promote="champion")
    assert not release.gate(strict).verdict.passed
    with pytest.raises(errors.GateError, match=r"the gate refuses toy-llm v4: .* REFUSED"):
        release.promote(strict)
    version = release.promote(Spec(version="v4", promote="champion"))[1].version
    assert version.number == 4


def test_an_evaluation_takes_the_tasks_from_the_search(client, tasks, caplog):
    for tag in ("tasks", "ood_tasks", "include_path"):
        client.delete_registered_model_tag(MODEL, f"soup.{tag}")
    with pytest.raises(errors.SpecError, match="no tasks to score a soup on"):
        run_soup(Spec(pair="v1,v2"))
    said = {"tasks": "toy_letters:acc_norm", "include_path": str(tasks), "batch_size": 16}
    outcome = run_soup(Spec(pair="v1,v2", ood_tasks="", trials=4, **said))
    with pytest.raises(errors.SpecError, match="no out-of-domain tasks"):
        release.evaluate(Spec(version="v4"))
    roles = release.evaluate(Spec(version="v4", ood_tasks="toy_digits")).roles
    assert roles["soup"].held_out == outcome.soup.held_out
    assert "--tasks toy_letters:acc_norm" in caplog.text
    run_id = outcome.run_id
    # what the caller or a tag states stays, also if it is the default
    client.log_param(run_id, "cfg.max_length", "-5")
    manifest = release.read_manifest(release.fetch("models:/toy-llm/4", "here", client=client))
    stated = {"soup.batch_size": "32"}
    for spec, size in (
        (Spec(batch_size=32).settle({}), 32),
        (Spec().settle(stated), 32),
        (Spec().settle({}), 16),
    ):
        filled = release._as_searched(client, spec, manifest)
        assert (filled.batch_size, filled.max_length) == (size, None)
    assert "cfg.max_length is '-5'" in caplog.text
    client.set_tag(run_id, "soup.key", "of another search")
    with pytest.raises(errors.SpecError, match="no tasks to score a soup on"):
        release.evaluate(Spec(version="v4", ood_tasks="toy_digits"))
    client.delete_run(run_id)


def test_conversations_are_searched_examined_and_judged_alike(client, checkpoints, tmp_path):
    for number, folder in enumerate(checkpoints[:2]):
        chatty = shutil.copytree(folder, tmp_path / f"chatty{number}")
        template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        toy.edit_json(chatty / "tokenizer_config.json", chat_template=template)
        register(client, chatty)
    said = {"apply_chat_template": True, "system_instruction": "Spell."}
    outcome = run_soup(Spec(pair="v4,v5", trials=4, **said))
    assert outcome.soup.version.number == 6
    assert release.gate(Spec(version="v6", **said)).verdict == outcome.verdict
    for other in ({}, said | {"system_instruction": "Say."}):
        with pytest.raises(errors.GateError, match=r"asked something else|not scored"):
            release.gate(Spec(version="v6", **other))
    roles = release.evaluate(Spec(version="v6", **said)).roles
    assert roles["soup"].held_out == outcome.soup.held_out
    with pytest.raises(errors.SpecError, match="has no chat template"):
        run_soup(Spec(pair="v1,v2", **said))


@pytest.mark.usefixtures("merged")
def test_a_verdict_is_void_once_the_champion_has_moved(client):
    client.set_registered_model_alias(MODEL, "champion", "3")
    for step in (release.gate, release.promote):
        with pytest.raises(errors.GateError, match="toy-llm v3 was not scored together with it"):
            step(Spec(version="v4", promote="champion"))
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 3
    assert "champion 0" in release.evaluate(Spec(version="v4")).roles
    release.gate(Spec(version="v4"))
    release.promote(Spec(version="v4", promote="champion"))
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 4


def test_what_stands_at_the_target_must_be_matched_too(client):
    client.set_registered_model_alias(MODEL, "live", "3")
    outcome = run_soup(Spec(pair="v1,v2", method="uniform", promote="alias:live"))
    assert {check.against.number for check in outcome.verdict.checks} >= {3}


def test_a_second_call_keeps_the_checks_against_the_champion_it_replaced(client):
    client.set_registered_model_alias(MODEL, "champion", "3")
    first = run_soup(Spec(pair="v1,v2", trials=4, promote="champion"))
    again = run_soup(Spec(pair="v1,v2", trials=4, promote="champion"))
    assert again.verdict == first.verdict
    assert {check.against.number for check in again.verdict.checks} >= {3}
    assert children(client, again.run_id) == []


@pytest.mark.usefixtures("merged")
def test_a_soup_that_was_deleted_is_registered_and_examined_under_its_new_number(client):
    client.delete_model_version(MODEL, "4")
    again = run_soup(Spec(pair="v1,v2"))
    assert again.soup.version.number == 5
    assert "| soup (toy-llm v5) |" in client.get_model_version(MODEL, "5").description
    assert release.gate(Spec(version="v5")).verdict.passed


def test_the_ood_run_shows_the_soups_numbers(client, outcome):
    (run,) = [c for c in children(client, outcome.run_id) if c.data.tags["soup.role"] == "ood"]
    ours = client.get_run(outcome.run_id).data.metrics
    for key in ("ood/toy_digits/acc", "ood/toy_digits_bpb/bits_per_byte"):
        assert run.data.metrics[key] == ours[key]


def test_a_lambda_without_a_finite_score_is_a_failed_trial_that_stays_one(client, monkeypatch):
    scores = evaluator.Evaluator.score

    def fail_at_the_middle(self, *parts):
        score = scores(self, *parts)
        if fail_at_the_middle.calls == 2:
            fail_at_the_middle.calls += 1
            raise errors.NonFiniteError("not finite", where="here", fix="none")
        fail_at_the_middle.calls += 1
        return score

    fail_at_the_middle.calls = 0
    monkeypatch.setattr(evaluator.Evaluator, "score", fail_at_the_middle)
    outcome = run_soup(Spec(pair="v1,v2", trials=5, ood_tasks=""))
    assert [t.held_out is None for t in outcome.trials] == [False, False, True, False, False]
    assert "| 2 | 0.5 | failed |" in client.get_run(outcome.run_id).data.tags["mlflow.note.content"]
    (failed,) = [r for r in trial_runs(client, outcome) if r.info.status == "FAILED"]
    assert failed.data.tags["soup.failed"] == "not finite"
    monkeypatch.setattr(evaluator.Evaluator, "score", scores)
    again = run_soup(Spec(pair="v1,v2", trials=5, ood_tasks=""))
    assert again.soup.version == outcome.soup.version
    assert children(client, again.run_id) == []


def test_a_larger_budget_continues_the_search(client):
    search = {"pair": "v1,v2", "ood_tasks": ""}
    few = run_soup(Spec(**search, stop=0.0))
    assert len(few.trials) == 6
    more = run_soup(Spec(**search, stop=0.0, trials=8))
    assert more.trials[:6] == few.trials
    assert len(trial_runs(client, more)) == 2
    same = more.soup.recipe == few.soup.recipe
    assert (more.soup.version == few.soup.version) is same
    again = run_soup(Spec(**search, stop=0.0, trials=8))
    assert again.soup.version == more.soup.version
    assert trial_runs(client, again) == []


def test_a_search_ends_early_and_says_so(client):
    outcome = run_soup(Spec(pair="v1,v2", ood_tasks="", stop=100.0))
    assert len(outcome.trials) < 6
    measured = [t.recipe for t in outcome.trials]
    assert outcome.soup.recipe in measured
    assert f"The search ended after {len(measured)} of 6 evaluations" in outcome.summary


def test_a_soup_of_three_is_searched_registered_and_verified(client):
    outcome = run_soup(Spec(versions="v1,v2,v3", trials=7, promote="champion"))
    lam = outcome.soup.recipe.lam
    assert len(lam) == 3
    assert sum(lam) == pytest.approx(1.0)
    assert lam[-1] >= 0.3334  # as the uniform soup has it
    assert [t.recipe.lam for t in outcome.trials[:4]] == [
        (1.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 0.0, 1.0),
        (0.3333, 0.3333, 0.3334),
    ]
    version = client.get_model_version(MODEL, "4")
    assert version.tags["soup.parents"] == "1,2,3"
    assert naming.parse_weights(version.tags["soup.weights"]) == lam
    assert [p.version.number for p in outcome.soup.parents] == [1, 2, 3]
    assert all(finding.holds for finding in verify("models:/toy-llm/4"))
    known = release.evaluate(Spec(version="v4")).roles
    assert known["soup"].held_out == outcome.soup.held_out
    assert run_soup(Spec(versions="v1,v2,v3", trials=7)).soup.version.number == 4


def test_where_items_do_not_tell_the_report_says_why(client, outcome):
    assert "not reconstructed" not in outcome.summary
    client.delete_registered_model_tag(MODEL, "soup.ood_tasks")  # its documents are those
    request = {"tasks": "toy_spelling", "ood_tasks": "toy_letters", "limit": 20}
    outcome = run_soup(Spec(pair="v1,v2", **request))
    assert "the items of toy_spelling have no log-likelihoods" in outcome.summary


def test_an_evaluation_that_broke_off_is_repeated(client, monkeypatch):
    scores = evaluator.Evaluator.score

    def break_off(self, *parts):
        raise errors.ObjectiveError("no memory left", where="here", fix="none")

    monkeypatch.setattr(evaluator.Evaluator, "score", break_off)
    with pytest.raises(errors.ObjectiveError, match="no memory"):
        run_soup(Spec(pair="v1,v2", trials=4, ood_tasks=""))
    monkeypatch.setattr(evaluator.Evaluator, "score", scores)
    assert all(t.held_out for t in run_soup(Spec(pair="v1,v2", trials=4, ood_tasks="")).trials)


def test_documents_in_both_sets_are_refused_whatever_their_task_is_called(client, tasks, tmp_path):
    config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "other_name"}
    toy.write_task(tmp_path / "other.yaml", config)
    path = os.pathsep.join([str(tasks), str(tmp_path)])
    ood_tasks = "toy_digits,toy_digits_bpb:bits_per_byte,other_name"
    with pytest.raises(errors.SpecError, match="100 documents are in both held-out and out-of"):
        run_soup(Spec(pair="v1,v2", ood_tasks=ood_tasks, include_path=path))


def test_a_champion_of_another_architecture_is_examined_on_a_bench_of_its_own(
    client, trained, tmp_path
):
    config = GPTNeoXConfig(**{**trained.config.to_dict(), "num_hidden_layers": 1})
    number = register(client, toy.save(GPTNeoXForCausalLM(config), tmp_path / "small"))
    client.set_registered_model_alias(MODEL, "champion", str(number))
    outcome = run_soup(Spec(pair="v1,v2", method="uniform"))
    assert outcome.verdict.passed  # it is untrained
    assert number in {check.against.number for check in outcome.verdict.checks}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_promotion_to_a_stage_and_to_another_model(client, outcome, tasks):
    release.promote(Spec(version="v4", promote="stage:staging"))
    assert client.get_model_version(MODEL, "4").current_stage == "Staging"
    with pytest.raises(errors.SpecError, match="nobody states the held-out tasks"):
        release.promote(Spec(version="v4", promote="model:prod-llm@live"))
    own = {"tasks": "toy_letters", "ood_tasks": "toy_digits", "include_path": str(tasks)}
    elsewhere = {"promote": "model:prod-llm@live", **own}
    version = release.promote(Spec(version="@champion", **elsewhere))[1].version
    assert str(version) == "prod-llm v1"
    assert client.get_model_version_by_alias("prod-llm", "live").source == "models:/toy-llm/4"
    again = release.promote(Spec(model=MODEL, version="v4", **elsewhere))[1].version
    assert again == version


def test_what_was_changed_in_a_remote_store_is_seen_past_the_cache(
    server_client, server, checkpoints, tasks
):
    server_client.create_registered_model("remote")
    for folder in checkpoints[:2]:
        register(server_client, folder, "remote")
    said = {"tasks": "toy_letters", "ood_tasks": "toy_digits", "include_path": str(tasks)}
    outcome = run_soup(Spec(model="remote", pair="v1,v2", trials=4, **said))
    assert outcome.verdict.passed
    source = server_client.get_model_version("remote", "3").source.removeprefix("models:/")
    folder = mlflow.artifacts.download_artifacts(f"models:/{source}")
    file = Path(folder) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    server_client.log_model_artifacts(source, folder)
    with pytest.raises(errors.MismatchError, match="v3 is not what its manifest says"):
        release.promote(Spec(model="remote", version="v3", promote="champion"))


def test_what_was_changed_after_the_gate_is_not_promoted(client):
    assert run_soup(Spec(pair="v1,v2", trials=4)).verdict.passed  # its own: it is spoilt below
    version = client.get_model_version(MODEL, "4")
    location = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    file = Path(location.removeprefix("file://")) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(errors.MismatchError, match="v4 is not what its manifest says"):
        release.promote(Spec(version="v4", promote="champion"))
    assert not client.get_registered_model(MODEL).aliases


def test_a_champion_from_elsewhere_is_examined_and_must_be_matched(client, outcome):
    again = run_soup(Spec(pair="v3,v1", method="uniform"))
    against = {check.against.number for check in again.verdict.checks}
    assert 4 in against  # the champion
    assert not again.verdict.passed


def test_the_main_job_over_http(server_client, checkpoints, tasks):
    fill(server_client, checkpoints, tasks)
    outcome = run_soup(Spec(model=MODEL, pair="v1,v2", promote="champion"))
    version = server_client.get_model_version(MODEL, "4")
    assert version.tags["soup.gate"] == "passed"
    assert version.aliases == ["champion"]
    assert outcome.summary.count("http://127.0.0.1") == 3
    again = run_soup(Spec(model=MODEL, pair="@champion,v2"))
    assert again.soup.version.number == 5
    assert server_client.get_model_version(MODEL, "5").tags["soup.parents"] == "4,2"


WRONG = [
    ({"pair": "v1,v9"}, errors.ParentError, "toy-llm has no v9", "its versions: 1, 2, 3"),
    ({"pair": "@gone,v1"}, errors.ParentError, "no alias @gone", "its aliases: none"),
    ({"pair": "v1,v2", "model": "nope"}, errors.ParentError, "no registered model 'nope'", MODEL),
    (
        {"pair": "v1,v2", "limit": 2, "promote": "x"},
        errors.SpecError,
        "does not judge on the first",
        "drop one",
    ),
    ({}, errors.SpecError, "the request names no versions", "--pair v12,v13"),
    ({"pair": "v1,v2", "tasks": "toy_leters"}, errors.SpecError, "no task", "toy_letters"),
    ({"pair": "v1,v2", "tasks": "toy_letters:ac"}, errors.SpecError, "no metric 'ac'", "acc"),
    (
        {"pair": "v1,v2", "tasks": "toy_letters:acc,nune"},
        errors.SpecError,
        "'nune' is neither an lm-eval task nor a filter",
        "none",
    ),
    ({"pair": "v1,v2", "tasks": "toy_digits"}, errors.SpecError, "overlap", "one option only"),
    (
        {"pair": "v1,v2", "tasks": "toy_all"},
        errors.SpecError,
        "overlap: toy_digits",
        "one option only",
    ),
]


@pytest.mark.parametrize(("said", "error", "what", "fix"), WRONG)
def test_a_wrong_request_is_refused_before_anything_is_touched(client, said, error, what, fix):
    with pytest.raises(error) as caught:
        run_soup(Spec(**said))
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert client.search_runs([client.get_experiment_by_name("soups").experiment_id]) == []
    assert len(client.search_model_versions(f"name='{MODEL}'")) == 3


def test_an_alias_of_the_same_version_is_no_pair(client):
    client.set_registered_model_alias(MODEL, "champion", "2")
    with pytest.raises(errors.SpecError, match="are the same version"):
        run_soup(Spec(pair="@champion,v2"))


def test_without_policy_and_tasks_there_is_nothing_to_score_on(client):
    client.delete_registered_model_tag(MODEL, "soup.tasks")
    with pytest.raises(errors.SpecError, match="no tasks to score"):
        run_soup(Spec(pair="v1,v2"))


def test_a_promotion_needs_out_of_domain_tasks(client):
    client.delete_registered_model_tag(MODEL, "soup.ood_tasks")
    with pytest.raises(errors.SpecError, match="promotion needs"):
        run_soup(Spec(pair="v1,v2", promote="champion"))
    outcome = run_soup(Spec(pair="v1,v2", method="uniform"))
    assert outcome.verdict is None
    assert "gate not run" in outcome.summary
    twin = run_soup(Spec(pair="v1,v2", method="uniform", limit=50))
    assert (twin.soup.digest, twin.soup.version.number) == (outcome.soup.digest, 5)
    words = "toy-llm v4 has the same weights, by another request."
    assert (words in outcome.summary, words in twin.summary) == (False, True)


def test_two_models_with_these_versions_must_be_told_apart(client, checkpoints):
    client.create_registered_model("other")
    for folder in checkpoints[:2]:
        register(client, folder, "other")
    with pytest.raises(errors.SpecError, match="other, toy-llm have v1 and v2"):
        run_soup(Spec(pair="v1,v2"))


def test_non_finite_parents_are_refused_by_tensor_name(client, trained, tmp_path):
    broken = toy.noisy(trained, 5, 0.5)
    with torch.no_grad():
        broken.gpt_neox.layers[0].mlp.dense_4h_to_h.weight[0, 0] = float("nan")
    register(client, toy.save(broken, tmp_path / "broken"))
    with pytest.raises(errors.ParentError, match=r"layers\.0\.mlp\.dense_4h_to_h\.weight"):
        run_soup(Spec(pair="v1,v4"))


def test_a_tracking_server_that_is_not_there_is_said_quickly(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    mlflow.set_tracking_uri("http://user:hunter2@127.0.0.1:9")
    with pytest.raises(errors.StoreError, match="does not answer") as caught:
        run_soup(Spec(pair="v1,v2"))
    assert "hunter2" not in str(caught.value)
    assert caught.value.where == "http://127.0.0.1:9"


def test_the_lm_eval_command_gives_the_numbers_that_mlflow_shows(client, outcome, tasks, tmp_path):
    folder = mlflow.artifacts.download_artifacts("models:/toy-llm/4", dst_path=str(tmp_path))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},softmax_dtype=float32", "--batch_size", "32"]
    command += ["--tasks", "toy_letters,toy_digits,toy_digits_bpb", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    shown = client.get_run(outcome.run_id).data.metrics
    assert shown["dev/toy_letters/acc"] == theirs["toy_letters"]["acc,none"]
    assert shown["ood/toy_digits/acc"] == theirs["toy_digits"]["acc,none"]
    # to more digits than it prints
    assert shown["ood/toy_digits_bpb/bits_per_byte"] == pytest.approx(
        theirs["toy_digits_bpb"]["bits_per_byte,none"], rel=1e-6
    )


def test_the_models_page_compares_the_soup_with_its_parents(client, outcome):
    experiment = client.get_experiment_by_name("soups").experiment_id
    found = client.search_logged_models([experiment])
    shown = {
        m.model_id: {metric.key: metric.value for metric in m.metrics} for m in found if m.metrics
    }
    assert {p.model_id for p in outcome.soup.parents} < set(shown)
    soup = client.get_model_version(MODEL, "4").source.removeprefix("models:/")
    ours = client.get_run(outcome.run_id).data.metrics
    assert shown[soup]["ood/toy_digits/acc"] == ours["ood/toy_digits/acc"]
    assert all("ood/toy_digits_bpb/bits_per_byte" in metrics for metrics in shown.values())
