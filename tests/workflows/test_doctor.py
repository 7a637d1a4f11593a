"""What disagrees, how that can be, and what --fix does about it."""

import time
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from conftest import MODEL, make_keys
from mlflow_soup import Spec, errors
from mlflow_soup.cli import main
from mlflow_soup.records import Version
from mlflow_soup.registry import lease, promotion, tracking
from mlflow_soup.registry.cache import lease_folder
from mlflow_soup.registry.ledger import open_ledger
from mlflow_soup.registry.register import find_upload
from mlflow_soup.registry.versions import holder, model_id, tags_of, versions_of
from mlflow_soup.request.names import Target, parse_target
from mlflow_soup.workflows import doctor

SERIES = "promotion/alias champion"
TOLD = {"digest": "sha256:x", "gate_run": "run", "verdict": "passed", "rules": {"tasks": {}}}


def complaints(client, **options):
    return list(doctor.examine(Spec(model=MODEL), **options)[1])


def said(client, **options):
    return [complaint.what for complaint in complaints(client, digests=False, **options)]


def mended(client):
    """What complaints are left after all repairs."""
    for complaint in complaints(client, digests=False):
        doctor.mend(complaint)
    return said(client)


def told(client):
    return open_ledger(client, MODEL).read(SERIES)


def at(client, alias="champion"):
    standing = holder(client, MODEL, alias)
    return standing.number if standing else None


def again(client, outcome, name=MODEL, **tags):
    """The soup once more, as a process registers it that was killed right afterwards."""
    tags = {**tags_of(client, outcome.soup.version), **tags}
    logged_id = model_id(client, outcome.soup.version)
    created = client.create_model_version(
        name, f"models:/{logged_id}", tags=tags, model_id=logged_id
    )
    return Version(name, int(created.version))


def numbers(client):
    return sorted(int(v.version) for v in versions_of(client, MODEL))


def experiment(client):
    return client.get_experiment_by_name("soups").experiment_id


def search(client, **tags):
    """A search run at which nobody works."""
    of = {"soup.model": MODEL, "soup.role": "search", "soup.key": "k", "soup.request": "r"}
    return client.begin_run(experiment(client), "search", {**of, **tags})


def upload(client, run_id, status=None):
    """A logged model as `register` makes one."""
    tags = {"soup.model": MODEL, "soup.key": "k", "soup.request": "r"}
    made = client.create_logged_model(experiment(client), "soup", run_id, tags)
    if status:
        client.finalize_logged_model(made.model_id, status)
    return made.model_id


def test_a_sound_model_has_no_complaints(client, outcome):
    assert complaints(client) == []


# -- promotions


def begun(client, outcome):
    """A promotion whose process was killed before it moved anything."""
    other = again(client, outcome, **{"soup.request": "another"})
    open_ledger(client, MODEL).append(SERIES, 2, {"to": other.number, "from": 4})
    return other


def test_what_was_begun_and_moved_nothing_is_void(client, outcome):
    begun(client, outcome)
    (complaint,) = complaints(client, digests=False)
    assert "was begun and not finished" in complaint.what
    assert "as void; it moves nothing; promote again" in complaint.remedy
    assert mended(client) == []
    assert (at(client), told(client)[-1].mark) == (4, promotion.VOID)


def test_a_promotion_under_way_is_left_alone(client, outcome):
    now = datetime.now(UTC).isoformat(timespec="seconds")
    open_ledger(client, MODEL).append(SERIES, 2, {"to": 3, "from": 4, "at": now})
    (complaint,) = complaints(client, digests=False)
    assert (complaint.repair, complaint.remedy[-14:]) == (None, "in ten minutes")


def test_what_was_moved_and_not_marked_is_made(client, outcome):
    other = begun(client, outcome)
    client.set_registered_model_alias(MODEL, "champion", str(other.number))
    (complaint,) = complaints(client, digests=False)
    assert complaint.remedy == "--fix marks the promotion as made; it moves nothing"
    assert mended(client) == []
    assert (at(client), told(client)[-1].mark) == (other.number, promotion.MADE)


def test_what_was_moved_by_hand_is_written_down(client, outcome):
    client.set_registered_model_alias(MODEL, "champion", "2")
    found = complaints(client, digests=False)
    assert "points to v2" in found[0].what
    assert "by hand" in found[0].why
    assert "the late request" in found[0].why
    assert mended(client) == []
    assert at(client) == 2
    assert told(client)[-1].told.items() >= {"to": 2, "from": 4}.items()
    client.delete_registered_model_alias(MODEL, "champion")
    (complaint,) = complaints(client)
    assert "points to nothing" in complaint.what
    assert mended(client) == []


def test_behind_a_void_promotion_the_last_that_was_made_counts(client, outcome):
    book = open_ledger(client, MODEL)
    book.append(SERIES, 2, {"to": 9, "from": 4})
    book.mark(SERIES, 2, promotion.VOID)
    assert complaints(client, digests=False) == []
    client.set_registered_model_alias(MODEL, "champion", "2")
    (complaint,) = complaints(client, digests=False)
    assert "the last promotion, number 1 by" in complaint.what
    assert mended(client) == []
    last = told(client)[-1]
    assert (last.number, last.told["to"], last.told["from"]) == (3, 2, 4)


def test_entries_that_somebody_else_wrote_are_void(client, outcome):
    book = open_ledger(client, MODEL)
    book.append(SERIES, 2, {"to": 3, "from": 4})  # never marked, and others follow
    book.append(SERIES, 3, {"to": "v4; rm", "by": "mallory"})
    book.mark(SERIES, 3, promotion.MADE)
    book.append(SERIES, 5, {"to": 2, "from": 4})
    found = [c.what for c in complaints(client, digests=False)]
    assert "the ledger of alias champion has no entry 4" in found
    assert "entry 2 in the ledger of alias champion was never settled" in found
    assert "entry 3 in the ledger of alias champion cannot be read" in found
    assert mended(client) == []
    assert [entry.mark for entry in told(client)] == ["made", *4 * ["void"]]
    assert at(client) == 4


def test_with_a_public_key_promotions_that_nobody_signed_are_told(client, outcome, tmp_path):
    _, public = make_keys(tmp_path, "gate")
    spec = Spec(model=MODEL, public_key=str(public))
    found = [c.what for c in doctor.examine(spec, digests=False)[1]]
    assert found == ["entry 1 in the ledger of alias champion is signed by no key of --public-key"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_version_that_moved_from_one_stage_to_the_next_is_no_complaint(client, outcome):
    for stage in ("Staging", "Production"):
        told = {**TOLD, "digest": outcome.soup.digest}
        promotion.promote(client, outcome.soup.version, Target("stage", stage), told)
    assert complaints(client, digests=False) == []


def test_a_search_that_has_ended_meanwhile_is_not_ended_as_killed(client, outcome):
    run_id = search(client)
    (complaint,) = complaints(client, digests=False)
    client.set_terminated(run_id, "FINISHED")  # by the process, on another machine
    doctor.mend(complaint)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_verdicts_are_computed_again(client, merged):
    assert complaints(client) == []
    client.set_registered_model_tag(MODEL, "soup.margin", "0.0000001")
    client.set_registered_model_tag(MODEL, "soup.confidence", "0.9999999")
    (complaint,) = complaints(client)
    assert (
        "says passed, but its scores say refused by today's rules (margin 1e-07" in complaint.what
    )
    for ood in tracking.find_runs(client, {"soup.role": "ood"}):
        client.delete_run(ood.info.run_id)
    client.begin_run(experiment(client), "OOD", {"soup.digest": merged.soup.digest})
    assert any("was never scored out of domain" in c.what for c in complaints(client))


# -- versions


def test_what_was_registered_twice_is_deleted_unless_an_alias_points_to_it(client, outcome):
    again(client, outcome)
    live = again(client, outcome)
    client.set_registered_model_alias(MODEL, "live", str(live.number))
    assert [c.repair is not None for c in complaints(client, digests=False)] == [True, False]
    assert mended(client) == ["toy-llm v6 and toy-llm v4 are soups of the same request"]
    assert numbers(client) == [1, 2, 3, 4, 6]


def in_production(client, twin):
    client.transition_model_version_stage(MODEL, str(twin.number), "Production")


def promoted(client, twin):
    promotion.promote(client, twin, Target("alias", "staging"), TOLD)
    client.delete_registered_model_alias(MODEL, "staging")


def a_parent(client, twin):
    tags = {"soup.parents": f"3,{twin.number}", "soup.digest": "sha256:x"}
    client.create_model_version(MODEL, "s3://x/y", tags=tags)


def a_parent_elsewhere(client, twin):
    client.create_registered_model("other")
    tags = {"soup.parents": f"1,{MODEL}/{twin.number}"}
    client.create_model_version("other", "s3://x/y", tags=tags)


def copied(client, twin):
    promotion.promote(client, twin, parse_target("model:prod@champion"), TOLD)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("use", "word"),
    [
        (in_production, "stage Production"),
        (promoted, "promotion 1 to alias staging"),
        (a_parent, "parent of toy-llm v6"),
        (a_parent_elsewhere, "parent of other v1"),
        (copied, "copied as prod v1"),
    ],
)
def test_what_was_registered_twice_stays_while_it_is_used(client, outcome, use, word):
    twin = again(client, outcome)
    use(client, twin)
    (complaint,) = (c for c in complaints(client, digests=False) if "of the same request" in c.what)
    assert (word in complaint.remedy, complaint.repair) == (True, None)
    mended(client)
    assert twin.number in numbers(client)


def test_copies_from_two_models_are_no_duplicates(client, outcome):
    client.create_registered_model("candidate")
    other = again(client, outcome, "candidate", **{"soup.parents": f"{MODEL}/1,{MODEL}/2"})
    judged = tags_of(client, outcome.soup.version)["soup.gate_run_id"]
    told = {**TOLD, "digest": outcome.soup.digest, "gate_run": judged}
    for version in (outcome.soup.version, other):
        promotion.promote(client, version, parse_target("model:prod@champion"), told)
    assert len(versions_of(client, "prod")) == 2
    assert list(doctor.examine(Spec(model="prod"), digests=False)[1]) == []


def test_forged_verdicts_and_misplaced_aliases_are_told(client, outcome):
    client.set_model_version_tag(MODEL, "4", "soup.gate", "refused")
    found = said(client)
    assert len(found) == 2
    assert "@champion points to soup toy-llm v4, which has the gate verdict refused" in found
    client.set_model_version_tag(MODEL, "4", "soup.gate", "passed")
    client.set_model_version_tag(MODEL, "4", "soup.gate_run_id", "nowhere")
    (complaint,) = complaints(client, digests=False)
    assert "there is no run that judged it" in complaint.what


def test_parents_that_are_gone_are_told(client, outcome):
    client.delete_model_version(MODEL, "1")
    (complaint,) = complaints(client)
    assert complaint.what == "toy-llm v4 was made of toy-llm v1, which no longer exists"


def test_a_quote_in_a_digest_stops_nobody(client, outcome):
    client.set_model_version_tag(MODEL, "4", "soup.digest", "sha256:' or '")
    client.delete_model_version(MODEL, "1")
    found = said(client)
    assert "there is no run that judged it" in found[0]
    assert "no longer exists" in found[1]


def test_a_deleted_logged_model_is_told_and_the_rest_examined(client, outcome):
    logged_id = model_id(client, outcome.soup.version)
    client.delete_logged_model(logged_id)
    client.delete_model_version(MODEL, "1")
    found = said(client)
    assert found[0] == f"toy-llm v4 is registered, but its logged model {logged_id} is gone"
    assert "made of toy-llm v1" in found[1]
    (of_bytes,) = (c.what for c in complaints(client) if c.what not in found)
    assert "toy-llm v4 could not be fetched" in of_bytes


# -- runs and uploads


def test_what_nobody_works_on_is_ended(client, outcome):
    run_id = search(client)
    ood = client.begin_run(experiment(client), "ood", {"mlflow.parentRunId": run_id})
    upload(client, run_id)
    assert len(complaints(client)) == 3
    assert mended(client) == []
    assert [client.get_run(run).info.status for run in (run_id, ood)] == ["KILLED", "KILLED"]


def test_what_is_left_below_a_killed_search_is_ended_too(client, outcome):
    run_id = search(client)
    tags = {"mlflow.parentRunId": run_id, "soup.role": "trial"}
    trial = client.begin_run(experiment(client), "trial", tags)
    logged_id = upload(client, run_id)
    client.set_terminated(run_id, "KILLED")
    of_run, of_upload = said(client)
    assert of_run == f"trial run {trial} is RUNNING, but no process works on it"
    assert f"logged model {logged_id} of run {run_id} is PENDING" in of_upload
    assert mended(client) == []
    assert client.get_run(trial).info.status == "KILLED"
    assert client.get_logged_model(logged_id).status == "FAILED"


def test_an_upload_that_no_version_is_made_of_is_deleted(client, outcome):
    logged_id = upload(client, search(client), "READY")
    assert any(f"{logged_id}" in what and "READY" in what for what in said(client))
    assert mended(client) == []
    assert find_upload(client, logged_id) is None


def test_an_upload_that_was_registered_meanwhile_stays(client, outcome):
    run_id = search(client)
    client.set_terminated(run_id)
    made = [upload(client, run_id, status) for status in ("READY", None)]
    found = complaints(client, digests=False)
    for logged_id in made:
        client.create_model_version(MODEL, f"models:/{logged_id}", model_id=logged_id)
    assert [doctor.mend(complaint) for complaint in found] == [True, True]
    assert [client.get_logged_model(i).status for i in made] == ["READY", "PENDING"]
    assert said(client) == []


def test_uploads_of_soups_say_of_which_model_they_are(client, outcome):
    logged_id = model_id(client, outcome.soup.version)
    assert client.get_logged_model(logged_id).tags["soup.model"] == MODEL
    client.delete_model_version_tag(MODEL, "4", "soup.gate")
    client.delete_registered_model_alias(MODEL, "champion")
    client.delete_model_version(MODEL, "4")
    assert any(logged_id in what for what in said(client))


def test_what_somebody_works_on_is_left_alone(client, outcome, monkeypatch):
    upload(client, search(client))
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    with lease.hold(client, MODEL, "k", lease_folder()):
        assert said(client) == []


@pytest.mark.parametrize(
    "tags",
    [
        {"soup.role": "ood", "soup.version": f"{MODEL}/4"},
        {"soup.role": "study", "soup.model": MODEL},
        {"soup.role": "search", "soup.model": MODEL, "soup.study": "s", "soup.key": "k"},
    ],
)
def test_of_runs_without_a_lease_nobody_can_tell(client, outcome, tags):
    now = int(time.time() * 1000)
    run_id = client.begin_run(experiment(client), "long ago", tags, now - 90_000_000)
    client.begin_run(experiment(client), "just now", tags, now)
    others = {**tags, "soup.version": "other/4", "soup.model": "other"}
    client.begin_run(experiment(client), "of another model", others, now - 90_000_000)
    (complaint,) = complaints(client, digests=False)
    assert complaint.what == f"{tags['soup.role']} run {run_id} is RUNNING for more than a day"
    assert "cannot tell" in complaint.why
    assert complaint.repair is None


# -- bytes


def test_the_bytes_are_read(client, outcome):
    client.set_model_version_tag(MODEL, "4", "soup.digest", "sha256:0")
    changed = "is not what its manifest says: tags: soup.digest is"
    assert any(changed in c.what for c in complaints(client))
    assert not any(changed in what for what in said(client))


def test_beside_a_version_that_cannot_be_fetched_the_others_are_read(client, outcome):
    tags = {"soup.digest": "sha256:x"}
    client.create_model_version(MODEL, "nowhere://x/y", tags=tags)
    again(client, outcome, **{"soup.digest": "sha256:0", "soup.request": "another"})
    found = [c.what for c in complaints(client)]
    assert any("toy-llm v5 could not be fetched" in what for what in found)
    assert any("toy-llm v6 is not what its manifest says" in what for what in found)


def test_a_store_that_is_away_says_nothing_of_versions(client, outcome, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    client.create_model_version(MODEL, "s3://x/y", tags={"soup.digest": "sha256:x"})
    with pytest.raises(errors.StoreError):
        complaints(client)


# -- the command


def test_the_command_says_what_disagrees_and_repairs_it(client, outcome):
    client.set_registered_model_alias(MODEL, "champion", "2")
    command = ["doctor", "--model", MODEL, "--digests", "no"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 3
    assert "alias champion points to v2" in found.stdout
    assert "    why: someone moved alias champion by hand" in found.stdout
    assert "    fix: --fix records in the ledger" in found.stdout
    assert found.stdout.endswith("toy-llm: 1 complaint\n")
    mended = CliRunner().invoke(main, [*command, "--fix"])
    assert (mended.exit_code, "    done: records in the ledger" in mended.stdout) == (0, True)
    assert mended.stdout.endswith("toy-llm: no complaints\n")
    assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(main, ["doctor", "--model", "nobody"]).exit_code == 4
    assert "6 store" in CliRunner().invoke(main, ["doctor", "--help"]).stdout


def test_what_it_repairs_on_the_way_is_not_examined_any_more(client, outcome):
    again(client, outcome)
    begun(client, outcome)
    found = CliRunner().invoke(main, ["doctor", "--model", MODEL, "--fix"])
    assert found.exit_code == 0, found.output
    assert "    done: marks the promotion as void" in found.stdout
    assert "    done: deletes toy-llm v5: nothing uses it" in found.stdout
