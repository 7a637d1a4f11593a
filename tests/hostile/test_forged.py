"""Whoever may write tags, runs, files or the ledger tries to have a version promoted.

A table: what is forged × the command that is then asked × which evidence counts. Nothing may be
promoted by it. The soup of `refused` is one that the gate honestly refuses, so whoever measures it
anew refuses it too.
"""

import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.utils.file_utils import local_file_uri_to_path

import mlflow_soup
import toy
from conftest import MODEL, _run, folder_of, make_keys, register, use
from mlflow_soup import Spec, errors
from mlflow_soup.files import signing
from mlflow_soup.files.cache import cache_folder
from mlflow_soup.records import Dataset, Examination, Version
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.evaluations import log_examination, log_scores, read_examination
from mlflow_soup.registry.journal import Journal
from mlflow_soup.registry.ledger import open_ledger
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.scores import Scores
from mlflow_soup.registry.trust import trust_of
from mlflow_soup.registry.versions import find_registered, model_id, tags_of
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import MANIFEST
from mlflow_soup.workflows import bench, release
from mlflow_soup.workflows.run import run as run_soup

SOUP = Version(MODEL, 4)
DIGITS = "toy_digits,toy_digits_bpb:bits_per_byte"
PLAIN = "model.safetensors"
REQUEST = {"pair": "v3,v1", "method": "uniform"}


@pytest.fixture(scope="session")
def refused_store(filled, tmp_path_factory):
    """A copy of the store in which v4 is a soup that the gate refused."""
    folder = tmp_path_factory.mktemp("refused")
    shutil.copy(filled, folder / "filled.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/filled.db")
    mlflow.MlflowClient().set_registered_model_alias(MODEL, "champion", "2")
    return _run(Spec(**REQUEST), folder / "filled.db", folder)


@pytest.fixture
def refused(refused_store, client, tmp_path, monkeypatch):
    """What the search that was refused returned; `client` then sees its store."""
    database, returned = refused_store
    use(database, tmp_path, monkeypatch)
    return returned


def pointers(client):
    """Everything that a deployment might read, except the champion from before."""
    found = dict(find_registered(client, MODEL).aliases)
    found.pop("champion", None)
    versions = client.search_model_versions(f"name='{MODEL}'")
    found |= {v.version: v.current_stage for v in versions if v.current_stage != "None"}
    other = find_registered(client, "prod")
    return found | (dict(other.aliases) if other is not None else {})


# -- what is forged about the soup that was refused


def in_experiment(client, name):
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def honest(client):
    (run,) = tracking.find_runs(client, {"soup.role": "ood"}, status="FINISHED")[:1]
    return read_examination(trust_of(client, Spec()), run.info.run_id)


def write_examination(client, experiment, change, start_time=None, **settings):
    """An examination run as mlflow-soup writes it, with scores that somebody made up."""
    true = honest(client)
    tags = {
        naming.ROLE: "ood",
        naming.DIGEST: true.roles["soup"].digest,
        naming.VERSION: f"{MODEL}/4",
        naming.CONDITIONS: naming.key_of(
            {"held_out": true.settings["held_out"], "ood": true.settings["ood"]}
        ),
        naming.GATE: "passed",
    }
    where = in_experiment(client, experiment)
    run_id = client.begin_run(where, "OOD toy-llm v4", tags, start_time)
    roles = {role: change(role, evidence, true) for role, evidence in true.roles.items()}
    forged = Examination(run_id, roles, {**true.settings, **settings})
    scored = [s for e in roles.values() for s in (e.held_out, *dict(e.ood).values())]
    datasets = {m.task: Dataset(m.task, "12345678", 1, {}) for s in scored for m in s.metrics}
    names = dict.fromkeys(roles), {"dev": datasets, "ood": datasets}
    log_examination(client, forged, *names)
    client.set_terminated(run_id)
    return run_id


def champions_rows(role, evidence, true):
    """The rows of the champion, as if they were the soup's."""
    best = true.roles["champion 0"] if "champion 0" in true.roles else true.roles["parent 1"]
    if role != "soup":
        return evidence
    return dataclasses.replace(best, version=evidence.version, digest=evidence.digest)


def of_other_items(role, evidence, true):
    evidence = champions_rows(role, evidence, true)

    def renamed(score):
        items = [dataclasses.replace(i, ids=tuple(f"x{n}" for n in i.ids)) for i in score.items]
        return dataclasses.replace(score, items=tuple(items))

    return dataclasses.replace(evidence, ood=tuple((t, renamed(s)) for t, s in evidence.ood))


def on_one_task(role, evidence, true):
    evidence = champions_rows(role, evidence, true)
    return dataclasses.replace(evidence, ood=evidence.ood[1:])


def the_tag(client, edit):
    client.set_model_version_tag(MODEL, "4", "soup.gate", "passed")


def the_tag_and_its_run(client, edit):
    the_tag(client, edit)
    run_id = client.begin_run(in_experiment(client, "mine"), "gate", {"soup.gate": "passed"})
    client.set_model_version_tag(MODEL, "4", "soup.gate_run_id", run_id)


def the_digest_of_the_champion(client, edit):
    the_tag(client, edit)
    best = digest(find_checkpoint(folder_of(client, Version(MODEL, 2)), "v2"))
    client.set_model_version_tag(MODEL, "4", "soup.digest", best)


def other_parents(client, edit):
    the_tag(client, edit)
    client.set_model_version_tag(MODEL, "4", "soup.parents", "3,3")


def an_examination_elsewhere(client, edit):
    run_id = write_examination(client, "elsewhere", champions_rows)
    client.set_model_version_tag(MODEL, "4", "soup.gate_run_id", run_id)
    the_tag(client, edit)


def an_examination_here(client, edit):
    write_examination(client, "soups", champions_rows)


def an_examination_of_other_items(client, edit):
    write_examination(client, "soups", of_other_items)


def an_examination_of_few_items(client, edit):
    write_examination(client, "soups", champions_rows, limit=5)


def an_examination_of_an_easy_task(client, edit):
    write_examination(client, "soups", on_one_task)


def an_examination_that_is_malformed(client, edit):
    run_id = write_examination(client, "soups", champions_rows)
    client.log_text(run_id, '{"schema": 2, "roles": {"soup": 3}}', "evidence.json")


def the_ledger(client, edit):
    the_tag(client, edit)
    entry = {"to": 4, "from": 1, "verdict": "passed", "at": "2026-01-01T00:00:00+00:00"}
    for series in ("promotion/alias live", "promotion/stage Production"):
        ledger = open_ledger(client, MODEL)
        ledger.append(series, 1, entry)
        ledger.mark(series, 1, "made")


def the_policy_of_the_candidates(client, edit):
    the_tag(client, edit)
    client.set_registered_model_tag(MODEL, "soup.max_length", "2")
    client.set_registered_model_tag(MODEL, "soup.margin", "9")
    client.set_registered_model_tag(MODEL, "soup.confidence", "0.51")


def a_verdict_by_looser_rules(client, edit):
    client.delete_registered_model_tag(MODEL, "soup.margin")
    release.gate(Spec(version="v4", margin=9.0))
    client.set_registered_model_tag(MODEL, "soup.margin", "0.05")


# -- the commands


def promote_alias(**more):
    release.promote(Spec(version="v4", promote="alias:live", **more))


def promote_stage(**more):
    release.promote(Spec(version="v4", promote="stage:Production", **more))


def promote_model(**more):
    release.promote(Spec(model=MODEL, version="v4", promote="model:prod@live", **more))


def run(**more):
    outcome = run_soup(Spec(**REQUEST, promote="alias:live", **more))
    if outcome.exit_code:
        raise errors.GateError("refused", where="here", fix="none")


COMMANDS = (promote_alias, promote_stage, promote_model, run)
MODES = ("experiment", "own", "signed")
FORGED = (
    the_tag,
    the_tag_and_its_run,
    the_digest_of_the_champion,
    other_parents,
    an_examination_elsewhere,
    an_examination_here,
    an_examination_of_other_items,
    an_examination_of_few_items,
    an_examination_of_an_easy_task,
    an_examination_that_is_malformed,
    the_ledger,
    the_policy_of_the_candidates,
    a_verdict_by_looser_rules,
)
REFUSALS = (errors.GateError, errors.MismatchError, errors.SpecError)


def counts(forge, command, mode):
    """Whether a forgery is one that the writers of what counts could make, and so may decide."""
    ours = forge is an_examination_here and mode == "experiment"
    # whoever owns a model states the rules for its own aliases and stages
    return ours or (forge is the_policy_of_the_candidates and command is not promote_model)


def table():
    """Each forgery by one command at least here, and by all in the slow tier."""
    rows = []
    for i, (forge, command, mode) in enumerate(itertools.product(FORGED, COMMANDS, MODES)):
        if not counts(forge, command, mode):
            few = i % 12 == 5 * (i // 12) % 12 or forge is the_policy_of_the_candidates
            marks = () if few else pytest.mark.slow
            names = (forge.__name__, command.__name__, mode)
            rows.append(pytest.param(forge, command, mode, marks=marks, id="-".join(names)))
    return rows


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("forge", "command", "mode"), table())
def test_a_refused_soup_is_not_promoted_whatever_is_forged(
    client, refused, tasks, edit, keys, figures, forge, command, mode
):
    assert not refused.verdict.passed
    forge(client, edit)
    before = pointers(client)
    more = {"evidence": mode} | ({"public_key": str(keys[1])} if mode == "signed" else {})
    if command is promote_model:
        more |= {"tasks": "toy_letters", "ood_tasks": DIGITS, "include_path": str(tasks)}
    with pytest.raises(REFUSALS):
        command(**more)
    assert pointers(client) == before
    assert find_registered(client, "prod") is None
    figures["forged × command × evidence"] = int(figures.get("forged × command × evidence", 0)) + 1


# -- what is forged about files


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return bytes(content)


def manifest_with(folder, **changes):
    path = folder / "soup_manifest.json"
    return json.dumps({**json.loads(path.read_text()), **changes}).encode()


def the_soups_bytes(client, edit):
    edit(folder_of(client, SOUP) / PLAIN, flipped(folder_of(client, SOUP) / PLAIN))


def its_bytes_and_its_tag(client, edit):
    the_soups_bytes(client, edit)
    its = digest(find_checkpoint(folder_of(client, SOUP), "v4"))
    client.set_model_version_tag(MODEL, "4", "soup.digest", its)


def its_bytes_its_tag_and_its_manifest(client, edit):
    from mlflow_soup.weights.digests import digest_all

    its_bytes_and_its_tag(client, edit)
    folder = folder_of(client, SOUP)
    now = digest_all(find_checkpoint(folder, "v4"))
    changes = {"digest": now.canonical, "tensors": now.tensors, "files": now.files}
    edit(folder / "soup_manifest.json", manifest_with(folder, **changes))


def a_parents_bytes(client, edit):
    path = folder_of(client, Version(MODEL, 1)) / PLAIN
    edit(path, flipped(path))


def the_weights_in_the_manifest(client, edit):
    folder = folder_of(client, SOUP)
    parents = json.loads((folder / "soup_manifest.json").read_text())["parents"]
    for parent, weight in zip(parents, (0.25, 0.75), strict=True):
        parent["lambda"] = weight.hex()
    edit(folder / "soup_manifest.json", manifest_with(folder, parents=parents))


def the_method_in_the_manifest(client, edit):
    its_bytes_its_tag_and_its_manifest(client, edit)
    folder = folder_of(client, SOUP)
    edit(folder / "soup_manifest.json", manifest_with(folder, method="fisher"))


def the_manifest_is_gone(client, edit):
    edit(folder_of(client, SOUP) / "soup_manifest.json", b"")


def the_tokenizer(client, edit):
    path = next(folder_of(client, SOUP).rglob("tokenizer_config.json"))
    edit(path, path.read_bytes() + b"\n")


FILES = (
    the_soups_bytes,
    its_bytes_and_its_tag,
    its_bytes_its_tag_and_its_manifest,
    a_parents_bytes,
    the_weights_in_the_manifest,
    the_method_in_the_manifest,
    the_manifest_is_gone,
    the_tokenizer,
)


def gate(**more):
    release.gate(Spec(version="v4", **more))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("forge", FILES)
@pytest.mark.parametrize(
    "command",
    [
        promote_alias,
        *(pytest.param(c, marks=pytest.mark.slow) for c in (promote_stage, promote_model, gate)),
    ],
)
def test_a_judged_soup_is_not_promoted_once_a_file_has_changed(
    client, merged, tasks, edit, figures, forge, command
):
    assert merged.verdict.passed
    forge(client, edit)
    more = {"tasks": "toy_letters", "ood_tasks": DIGITS, "include_path": str(tasks)}
    with pytest.raises(REFUSALS):
        command(**(more if command is promote_model else {}))
    assert pointers(client) == {}
    figures["file × command"] = int(figures.get("file × command", 0)) + 1


def test_a_plain_checkpoint_with_the_tags_of_a_good_soup_is_not_promoted(client, merged):
    tags = tags_of(client, SOUP)
    folder = folder_of(client, Version(MODEL, 3))
    tags["soup.digest"] = digest(find_checkpoint(folder, "v3"))
    logged_id = model_id(client, Version(MODEL, 3))
    client.create_model_version(MODEL, f"models:/{logged_id}", tags=tags, model_id=logged_id)
    with pytest.raises(errors.SpecError, match="is not a soup"):
        release.promote(
            Spec(
                model=MODEL,
                version="v5",
                promote="model:prod@live",
                tasks="toy_letters",
                ood_tasks=DIGITS,
            )
        )
    assert pointers(client) == {}


# -- what is forged about a search


def a_trial(client, experiment, number, lam, score, key, **tags):
    """A trial as mlflow-soup writes it, with a score that somebody made up."""
    tags = {naming.KEY: key, naming.ROLE: "trial", naming.NUMBER: number, **tags}
    run_id = client.begin_run(in_experiment(client, experiment), "trial", tags)
    params = {"method": "linear", "weights": json.dumps(lam)}
    tracking.log(client, run_id, params=params)
    log_scores(client, run_id, Scores({"": score}), naming.ITEMS, {})
    client.set_terminated(run_id)


def bad(score):
    """The same items, all wrong."""
    items = [dataclasses.replace(i, values=(0.0,) * len(i.values)) for i in score.items]
    return dataclasses.replace(score, value=0.0, items=tuple(items))


def test_what_is_forged_about_a_search_changes_neither_lambda_nor_verdict(client, merged, caplog):
    (search,) = tracking.find_runs(client, {naming.ROLE: "search"})
    key, score = search.data.tags[naming.KEY], merged.trials[0].held_out
    (first,) = tracking.find_runs(client, {naming.NUMBER: "0"})
    measured = {naming.MEASURED: first.data.tags[naming.MEASURED]}
    for run in tracking.find_runs(client, {naming.KEY: key}):  # an empty history
        client.delete_run(run.info.run_id)
    client.delete_model_version(MODEL, "4")
    a_trial(client, "elsewhere", "0", (1.0, 0.0), bad(score), key, **measured)
    other = {naming.MEASURED: "0" * 64}
    a_trial(client, "soups", "0", (0.5, 0.5), bad(score), key, **other)
    a_trial(client, "soups", "zero", (1.0, 0.0), bad(score), key, **other)
    a_trial(client, "soups", "1", (0.0, float("nan")), bad(score), key, **other)
    a_trial(client, "soups", "1", (0.0, 1.0), bad(score), key)  # by no evaluation
    a_version = tags_of(client, Version(MODEL, 1)) | {
        naming.REQUEST: search.data.tags[naming.REQUEST],
        naming.KEY: key,
        naming.DIGEST: merged.soup.digest,
        naming.WEIGHTS: naming.format_weights(merged.soup.recipe.lam),
    }
    source = client.get_model_version(MODEL, "3").source
    client.create_model_version(
        MODEL, source, tags=a_version, model_id=source.removeprefix("models:/")
    )
    again = run_soup(Spec(pair="v1,v2"))
    assert [t.recipe for t in again.trials] == [t.recipe for t in merged.trials]
    assert [t.held_out.value for t in again.trials] == [t.held_out.value for t in merged.trials]
    assert again.soup.digest == merged.soup.digest
    assert again.soup.version == Version(MODEL, 6)
    assert again.verdict.passed
    assert "toy-llm v5 is passed over: models:/toy-llm/5 is not a soup" in caplog.text
    assert "is no trial that mlflow-soup wrote" in caplog.text
    assert run_soup(Spec(pair="v1,v2")).soup.version == Version(MODEL, 6)  # and once more


# -- signatures


def signed(client, monkeypatch, private):
    monkeypatch.setenv(signing.KEY_ENV, str(private))


def test_with_a_public_key_only_what_it_signed_counts(
    client, merged, keys, edit, tmp_path, monkeypatch
):
    private, public = keys
    request = {"version": "v4", "promote": "alias:live", "public_key": str(public)}
    with pytest.raises(errors.GateError, match="no key of --public-key has signed"):
        release.promote(Spec(**request))
    signed(client, monkeypatch, make_keys(tmp_path, "mallory")[0])
    release.evaluate(Spec(version="v4"))
    with pytest.raises(errors.GateError, match="no key of --public-key has signed"):
        release.promote(Spec(**request))
    signed(client, monkeypatch, private)
    release.evaluate(Spec(version="v4", experiment="of the gate"))
    edit(folder_of(client, SOUP) / "model.sig", b"")
    release.sign(Spec(version="v4"))
    monkeypatch.delenv(signing.KEY_ENV)
    version = release.promote(Spec(**request))[1].version
    assert version == SOUP


def test_signed_scores_of_one_model_do_not_pass_for_those_of_another(
    client, refused, keys, monkeypatch
):
    private, public = keys
    signed(client, monkeypatch, private)
    release.evaluate(Spec(version="v4"))  # honest, and signed
    monkeypatch.delenv(signing.KEY_ENV)
    (run, *_) = reversed(tracking.find_runs(client, {"soup.role": "ood"}))
    folder = Path(local_file_uri_to_path(run.info.artifact_uri))
    for name in ("parquet", "parquet.dsse.json"):
        shutil.copy(folder / f"parent-1.{name}", folder / f"soup.{name}")
    with pytest.raises(errors.GateError, match="no key of --public-key has signed"):
        release.promote(Spec(version="v4", promote="alias:live", public_key=str(public)))
    assert pointers(client) == {}


# -- what a review found


def best_scores(role, evidence, true):
    """The champion's scores, as if they were the soup's, in a version that is not registered."""
    if role != "soup":
        return evidence
    forged = champions_rows(role, evidence, true)
    return dataclasses.replace(forged, version=Version(MODEL, 99))


def test_a_key_does_not_vouch_for_scores_that_others_wrote(client, refused, keys, monkeypatch):
    private, public = keys
    write_examination(client, "soups", best_scores)
    signed(client, monkeypatch, private)
    assert not run_soup(Spec(**REQUEST)).verdict.passed  # measured anew
    monkeypatch.delenv(signing.KEY_ENV)
    with pytest.raises(errors.GateError, match="the gate refuses"):
        release.promote(Spec(version="v4", promote="alias:live", public_key=str(public)))


def test_tasks_of_one_name_that_ask_something_else_are_no_evidence(
    client, refused, tasks, tmp_path
):
    """The candidates' folder has the same documents, and every choice in it is right."""
    rules = {"ood_tasks": "toy_digits", "tasks": "toy_letters", "margin": "0.05"}
    rules |= {"include_path": str(tasks)}
    client.create_registered_model("prod", {f"soup.{k}": v for k, v in rules.items()})
    rigged = toy.copy_tasks(tasks, tmp_path / "rigged")
    for path in rigged.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if path.stem in ("letters", "digits"):
            config |= {"doc_to_choice": "{{[choices[answer]]}}", "doc_to_target": "{{0}}"}
        path.write_text(yaml.safe_dump(config))
    client.set_registered_model_tag(MODEL, "soup.include_path", str(rigged))
    release.evaluate(Spec(model=MODEL, version="v4"))
    with pytest.raises(errors.GateError, match=r"toy_digits:acc asked something else|the gate ref"):
        release.promote(Spec(model=MODEL, version="v4", promote="model:prod@live"))
    assert not find_registered(client, "prod").aliases


def test_a_copy_of_what_had_the_name_before_is_not_the_soup(client, merged, tasks):
    rules = {"ood_tasks": DIGITS, "tasks": "toy_letters", "margin": "0.05"}
    rules |= {"include_path": str(tasks)}
    client.create_registered_model("prod", {f"soup.{k}": v for k, v in rules.items()})
    client.create_model_version("prod", f"models:/{MODEL}/3")
    policy = dict(find_registered(client, MODEL).tags)
    client.rename_registered_model(MODEL, "old")
    client.create_registered_model(MODEL, policy)
    for number in "124":  # now v3 is the soup
        was = client.get_model_version("old", number)
        its = was.source.removeprefix("models:/")
        client.create_model_version(MODEL, was.source, tags=dict(was.tags), model_id=its)
    version = release.promote(Spec(model=MODEL, version="v3", promote="model:prod@live"))[1].version
    assert version == Version("prod", 2)


def test_own_takes_over_no_score_from_the_journal(client, refused, monkeypatch):
    seen, recall = [], Journal.recall

    def note(self, measured, evaluate):
        seen.append(self.folder)
        return recall(self, measured, evaluate)

    monkeypatch.setattr(Journal, "recall", note)
    release.evaluate(Spec(version="v4", evidence="own"))
    assert seen
    assert cache_folder() not in {parent for folder in seen for parent in folder.parents}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_versions_of_a_stage_are_rivals(client, merged):
    for number in "23":
        client.transition_model_version_stage(MODEL, number, "Production", False)
    found = bench.rivals(client, MODEL, Spec(promote="stage:Production"))
    assert [version.number for version in found] == [2, 3]


def spoil(change):
    def spoilt(role, evidence, true):
        return change(evidence) if role == "soup" else evidence

    return spoilt


def on_items(score, **changes):
    items = [
        dataclasses.replace(
            i, **{name: tuple(map(to, getattr(i, name))) for name, to in changes.items()}
        )
        for i in score.items
    ]
    return dataclasses.replace(score, items=tuple(items))


MALFORMED = {
    "no out-of-domain scores": lambda e: dataclasses.replace(e, ood=()),
    "no held-out items": lambda e: dataclasses.replace(
        e, held_out=dataclasses.replace(e.held_out, items=())
    ),
    "not finite": lambda e: dataclasses.replace(
        e, held_out=on_items(e.held_out, values=lambda v: float("nan"))
    ),
    "null": lambda e: dataclasses.replace(e, held_out=on_items(e.held_out, values=lambda v: None)),
    "large shares": lambda e: dataclasses.replace(
        e, ood=tuple((t, on_items(s, shares=lambda v: 100 * v)) for t, s in e.ood)
    ),
    "other sums": lambda e: dataclasses.replace(
        e, ood=tuple((t, dataclasses.replace(s, value=9.0)) for t, s in e.ood)
    ),
}
TEXTS = {
    "deep": "[" * 100_000,
    "infinite": '{"schema": 2, "settings": {"asked": {}}, "roles": {"soup": {"version": Infinity}'
    "}}",
    "no settings": '{"schema": 2, "settings": {"asked": {}}, "roles": {}}',
}


def gate_run(client):
    return client.get_model_version(MODEL, "4").tags[naming.GATE_RUN]


def test_examinations_that_are_malformed_or_inconsistent_are_passed_over(client, merged):
    honest_verdict, honest_run = release.gate(Spec(version="v4")).verdict, honest(client).run_id
    forged = {
        write_examination(client, "soups", spoil(change)): name
        for name, change in MALFORMED.items()
    }
    for name, text in TEXTS.items():
        run_id = write_examination(client, "soups", spoil(lambda e: e))
        client.log_text(run_id, text, "evidence.json")
        forged[run_id] = name
    assert release.gate(Spec(version="v4")).verdict == honest_verdict
    read = gate_run(client)
    assert read == honest_run, forged[read]
    assert run_soup(Spec(pair="v1,v2")).verdict == honest_verdict
    _, public = make_keys(Path.cwd(), "gate")
    client.log_text(run_id, "[" * 100_000, "evidence.json.dsse.json")
    with pytest.raises(errors.GateError, match="no key of --public-key"):
        release.gate(Spec(version="v4", public_key=str(public)))


NOW, DAY, YEAR_9999 = int(time.time() * 1000), 24 * 3600 * 1000, 253_370_764_800_000


def as_it_was(role, evidence, true):
    return evidence


def judged(client, **request):
    """The run whose examination the gate reads."""
    release.gate(Spec(version="v4", **request))
    return gate_run(client)


# the slow ones: less or more by the same clock; and in order, as in the tests below
@pytest.mark.parametrize(
    "clocks",
    [
        pytest.param((NOW + DAY, NOW), id="a day ahead", marks=pytest.mark.slow),
        pytest.param((YEAR_9999, NOW), id="never in reach"),
        pytest.param((NOW, 1), id="epoch", marks=pytest.mark.slow),
        pytest.param((NOW, NOW), id="equal"),
        pytest.param((NOW - DAY, NOW), id="right", marks=pytest.mark.slow),
    ],
)
def test_the_newest_examination_is_the_last_that_was_stored_by_any_clock(client, refused, clocks):
    for clock in clocks:
        run_id = write_examination(client, "soups", as_it_was, clock)
        assert judged(client) == run_id
    release.evaluate(Spec(version="v4"))
    assert judged(client) not in (run_id, honest(client).run_id)


@pytest.mark.parametrize("text", ["[]", "", '{"schema": 2, "earlier": [1]}', "gone", "deleted"])
def test_a_newer_examination_that_is_lost_leaves_the_one_before_it(client, refused, text):
    kept = write_examination(client, "soups", as_it_was, NOW + DAY)
    run_id = write_examination(client, "soups", as_it_was, NOW)
    folder = Path(local_file_uri_to_path(client.get_run(run_id).info.artifact_uri))
    if text == "deleted":
        client.delete_run(run_id)
    elif text == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "evidence.json").write_text(text)
    assert judged(client) == kept


def test_a_signed_examination_cannot_be_logged_again(client, refused, keys, monkeypatch):
    private, public = keys
    signed(client, monkeypatch, private)
    old = client.get_run(write_examination(client, "soups", as_it_was))
    newest = write_examination(client, "soups", as_it_was)
    monkeypatch.delenv(signing.KEY_ENV)
    assert judged(client, public_key=str(public)) == newest
    tags = {key: old.data.tags[key] for key in (naming.ROLE, naming.DIGEST, naming.CONDITIONS)}
    for start_time in (None, 1, NOW + DAY):
        again = client.begin_run(old.info.experiment_id, "OOD toy-llm v4", tags, start_time)
        client.log_artifacts(again, local_file_uri_to_path(old.info.artifact_uri))
        client.set_terminated(again)
        assert judged(client, public_key=str(public)) == newest


# -- names that are given to other tasks


def easy_tasks(tasks, folder, *names):
    """Tasks of one item that every model solves, by other tasks' names."""
    folder.mkdir()
    rows = {"question": "x", "choices": ["y", "y", "y", "y"], "answer": 0}
    for number, name in enumerate(names):
        config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": name}
        row = rows | {"question": f"x{number}"}
        (folder / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
        files = {"validation": str(folder / f"{number}.jsonl")}
        config["dataset_kwargs"] = {"data_files": files}
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.usefixtures("refused")
def test_a_command_line_gives_no_name_of_the_policy_to_another_task(client, tasks, tmp_path):
    easy = easy_tasks(tasks, tmp_path / "easy", "toy_digits", "toy_digits_bpb")
    policy = "toy_digits,toy_digits_bpb:bits_per_byte"
    for said in (
        {"ood_tasks": f"{policy},{easy}/0.yaml:acc_norm"},
        {"ood_tasks": f"{policy},{easy}/*.yaml:acc_norm"},
    ):
        for step in (release.gate, release.promote, release.evaluate):
            with pytest.raises(errors.SpecError, match="a name that the policy of toy-llm gives"):
                step(Spec(version="v4", promote="live", **said))
    # folders of the policy come last, so that its tasks stay
    for said in ({}, {"include_path": str(easy)}):
        assert not release.gate(Spec(version="v4", promote="live", **said)).verdict.passed
    with pytest.raises(errors.GateError, match="the gate refuses"):
        release.promote(Spec(version="v4", promote="live", include_path=str(easy)))
    assert pointers(client) == {}
    # the policy may state a pattern or a file, too
    for stated in ("toy_digits*", f"{tasks}/digits*.yaml"):
        client.set_registered_model_tag(MODEL, "soup.ood_tasks", stated)
        said = Spec(version="v4", promote="live", ood_tasks=f"{stated},{easy}/0.yaml:acc_norm")
        with pytest.raises(errors.SpecError, match="a name that the policy of toy-llm gives"):
            release.promote(said)
    # a shipped task of lm-eval's is as little to be replaced
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", "arc_easy")
    shipped = easy_tasks(tasks, tmp_path / "shipped", "arc_easy")
    with pytest.raises(errors.SpecError, match="defines arc_easy, a name that the policy"):
        release.promote(Spec(version="v4", promote="live", include_path=str(shipped)))
    # what has a new name may be added
    new = easy_tasks(tasks, tmp_path / "new", "toy_new")
    client.set_registered_model_tag(MODEL, "soup.ood_tasks", policy)
    more = f"{policy},toy_new"
    with pytest.raises(errors.GateError):
        release.gate(Spec(version="v4", ood_tasks=more, include_path=str(new)))


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("tag", "stated", "said"),
    [
        ("num_fewshot", "0", {"num_fewshot": 1}),
        ("max_length", "64", {"max_length": 8}),
        ("system_instruction", "Spell.", {"system_instruction": "Guess."}),
        ("apply_chat_template", "yes", {"apply_chat_template": False}),
        ("gen_kwargs", "max_gen_toks=8", {"gen_kwargs": "max_gen_toks=1"}),
    ],
)
def test_how_the_policy_scores_is_a_rule_too(client, tag, stated, said):
    client.set_registered_model_tag(MODEL, f"soup.{tag}", stated)
    for step in (release.gate, release.promote):
        with pytest.raises(errors.SpecError, match="is looser than the policy of toy-llm"):
            step(Spec(version="v4", promote="live", **said))


def test_a_version_of_other_weights_is_not_taken_for_the_result(client, merged, tmp_path, caplog):
    """Somebody registers a worse merge of the same parents, with the tags of the result."""
    (worst,) = {t.recipe for t in merged.trials if t.recipe.lam == (1.0, 0.0)}
    true = client.get_model_version(MODEL, "4")
    out = tmp_path / "forged"
    manifest = mlflow_soup.merge_checkpoints(
        [parent.version.uri for parent in merged.soup.parents], worst.lam, out, digests=True
    )
    told = json.loads((out / MANIFEST).read_text())
    theirs = json.loads(Path(pull(client, merged.soup.version), MANIFEST).read_text())
    told |= {"model": theirs["model"], "search": {**theirs["search"], "run_id": "0" * 32}}
    (out / MANIFEST).write_text(json.dumps(told))
    forged = register(client, out)
    tags = dict(true.tags) | {
        naming.WEIGHTS: naming.format_weights(worst.lam),
        naming.LAMBDA: "0.0",
        naming.DIGEST: manifest.digests.canonical,
    }
    for key, value in tags.items():
        client.set_model_version_tag(MODEL, str(forged), key, value)
    client.delete_model_version(MODEL, "4")
    again = mlflow_soup.run(Spec(pair="v1,v2"))
    assert again.soup.version.number == forged + 1
    assert again.soup.recipe == merged.soup.recipe
    assert "chose other weights" in caplog.text
