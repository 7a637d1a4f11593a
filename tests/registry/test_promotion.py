"""Promotions: simultaneous ones, interrupted ones, and targets that someone moved by hand."""

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

from conftest import MODEL, make_keys
from mlflow_soup import Spec, errors
from mlflow_soup.cli import main
from mlflow_soup.decision import gate
from mlflow_soup.files.signing import KEY_ENV, open_verifier
from mlflow_soup.records import Version
from mlflow_soup.registry import promotion
from mlflow_soup.registry.evaluations import read_examination
from mlflow_soup.registry.ledger import Ledger, open_ledger
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.trust import trust_of
from mlflow_soup.registry.versions import holder, tags_of
from mlflow_soup.request.names import Target, parse_target
from mlflow_soup.workflows import doctor, release

CHAMPION = Target("alias", "champion")
SERIES = "promotion/alias champion"


def told(client, name=MODEL):
    return open_ledger(client, name).read(SERIES)


def at(client, alias="champion", name=MODEL):
    standing = holder(client, name, alias)
    return standing.number if standing else None


def test_a_promotion_is_an_entry_of_the_ledger(client, outcome):
    (entry,) = told(client)
    assert entry.mark == promotion.MADE
    version = client.get_model_version(MODEL, "4")
    expected = {
        "to": 4,
        "from": None,
        "digest": outcome.soup.digest,
        "gate_run": version.tags["soup.gate_run_id"],
        "verdict": "passed",
        "target": "alias champion",
    }
    assert expected.items() <= entry.told.items()
    assert "@" in entry.told["by"]
    assert version.tags["soup.promotions"] == f"alias champion {entry.told['at']}"


def test_promoting_the_current_version_writes_no_entry(client, outcome):
    assert promote(client, outcome.soup.version, CHAMPION) == outcome.soup.version
    assert len(told(client)) == 1


def promote(client, version, target, covers=lambda standing: True):
    """Promote a version whose verdict somebody has computed."""
    told = {"digest": "sha256:x", "gate_run": "run", "verdict": "passed", "rules": {"tasks": {}}}
    return promotion.promote(client, version, target, told, covers).version


def soup(client, **tags):
    """A version without files."""
    tags = {"soup.digest": "sha256:x", **tags}
    return Version(MODEL, int(client.create_model_version(MODEL, "s3://x/y", tags=tags).version))


def begun(client, to, minutes_ago):
    """An entry of a process that was killed before the move."""
    at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    number = told(client)[-1].number + 1
    entry = {
        "to": to,
        "from": 4,
        "at": at.isoformat(timespec="seconds"),
        "target": "alias champion",
    }
    assert open_ledger(client, MODEL).append(SERIES, number, entry)


def test_a_promotion_during_another_one_is_overtaken(client, outcome):
    begun(client, soup(client).number, minutes_ago=1)
    with pytest.raises(errors.OvertakenError) as caught:
        promote(client, soup(client), CHAMPION)
    assert caught.value.exit_code == 5
    assert at(client) == 4
    assert [entry.mark for entry in told(client)] == ["made", ""]


def test_the_same_command_completes_a_promotion_that_was_cut_short(client, outcome):
    other = soup(client)
    begun(client, other.number, minutes_ago=0)
    assert promote(client, other, CHAMPION) == other
    assert at(client) == other.number
    assert [entry.mark for entry in told(client)] == ["made", "void", "made"]


def test_a_promotion_whose_mark_is_still_to_come_overtakes_others(client, outcome):
    other = soup(client)
    begun(client, other.number, minutes_ago=0)
    client.set_registered_model_alias(MODEL, "champion", str(other.number))  # before the mark
    with pytest.raises(errors.OvertakenError):
        promote(client, soup(client), CHAMPION, lambda standing: standing.number == 4)
    assert at(client) == other.number


def test_others_void_a_promotion_that_was_cut_short_long_ago(client, outcome):
    other = soup(client)
    begun(client, soup(client).number, minutes_ago=30)
    assert promote(client, other, CHAMPION) == other
    assert [entry.mark for entry in told(client)] == ["made", "void", "made"]
    assert told(client)[-1].told["from"] == 4


def test_a_rollback_by_hand_after_a_crash_is_not_undone(client, outcome):
    bad, other = soup(client), soup(client)
    begun(client, bad.number, minutes_ago=30)
    client.set_registered_model_alias(MODEL, "champion", str(bad.number))  # killed before the mark
    client.set_registered_model_alias(MODEL, "champion", "4")  # someone moves it by hand

    assert promote(client, other, CHAMPION, lambda standing: standing.number == 4) == other
    assert [entry.mark for entry in told(client)] == ["made", "void", "made"]


def test_an_entry_is_marked_as_made_if_the_target_was_moved(client, outcome):
    other = soup(client)
    begun(client, other.number, minutes_ago=30)
    client.set_registered_model_alias(MODEL, "champion", str(other.number))
    assert promote(client, other, CHAMPION) == other
    assert [entry.mark for entry in told(client)] == ["made", "made"]


def test_a_process_that_was_overtaken_before_its_move_moves_nothing(client, outcome, monkeypatch):
    slow, quick = soup(client), soup(client)
    append = Ledger.append

    def hold_up(self, series, number, entry):
        done = append(self, series, number, entry)
        monkeypatch.setattr(Ledger, "append", append)
        promotion.settle(self, series, self.read(series)[-1])
        promote(client, quick, CHAMPION)
        return done

    monkeypatch.setattr(Ledger, "append", hold_up)
    with pytest.raises(errors.OvertakenError):
        promote(client, slow, CHAMPION)
    assert at(client) == quick.number
    assert [entry.mark for entry in told(client)] == ["made", "void", "made"]


@pytest.mark.parametrize("meanwhile", ["settled", "moved by hand", "another begun"])
def test_a_process_that_was_held_up_moves_nothing_that_others_have_settled_moved_or_begun(
    client, outcome, monkeypatch, meanwhile
):
    slow, append = soup(client), Ledger.append

    def hold_up(self, series, number, entry):
        done = append(self, series, number, entry)
        if meanwhile == "moved by hand":
            client.set_registered_model_alias(MODEL, "champion", "3")
        else:
            promotion.settle(self, series, self.read(series)[-1])
        if meanwhile == "another begun":  # it has not moved the target yet
            append(self, series, number + 1, {**entry, "to": 3})
        return done

    monkeypatch.setattr(Ledger, "append", hold_up)
    with pytest.raises(errors.OvertakenError):
        promote(client, slow, CHAMPION)
    assert at(client) == (3 if meanwhile == "moved by hand" else 4)
    assert [entry.mark for entry in told(client)][:2] == ["made", "void"]


def test_a_version_that_is_put_there_by_hand_meanwhile_still_shows_its_promotion(
    client, outcome, monkeypatch
):
    slow, append = soup(client), Ledger.append

    def hold_up(self, series, number, entry):
        client.set_registered_model_alias(MODEL, "champion", str(slow.number))
        return append(self, series, number, entry)

    monkeypatch.setattr(Ledger, "append", hold_up)
    assert promote(client, slow, CHAMPION) == slow
    assert told(client)[-1].mark == promotion.MADE
    assert told(client)[-1].told["from"] == 4


def test_promoting_a_version_that_someone_put_there_by_hand_writes_an_entry(client, outcome):
    other = soup(client)
    client.set_registered_model_alias(MODEL, "champion", str(other.number))
    assert promote(client, other, CHAMPION) == other
    assert (told(client)[-1].told["to"], told(client)[-1].mark) == (other.number, "made")
    assert promote(client, other, CHAMPION) == other
    assert len(told(client)) == 2


def test_a_target_that_was_moved_by_hand_stays_and_is_a_gate_error(client, outcome):
    client.set_registered_model_alias(MODEL, "champion", "3")
    with pytest.raises(errors.GateError, match="toy-llm v3 was not scored together with it"):
        release.promote(Spec(version="v4", promote="champion"))
    assert at(client) == 3


def test_the_promotion_of_a_copy_is_in_the_ledger_of_its_own_model(client, outcome):
    target = parse_target("model:prod@champion")
    assert promote(client, outcome.soup.version, target) == Version("prod", 1)
    (entry,) = told(client, "prod")
    assert (entry.told["to"], entry.told["target"]) == (1, "prod@champion")
    assert len(told(client)) == 1


def test_a_stage_has_a_series_of_its_own(client, outcome):
    with pytest.warns(FutureWarning, match="stages"):
        promote(client, outcome.soup.version, Target("stage", "Production"))
    (entry,) = open_ledger(client, MODEL).read("promotion/stage Production")
    assert (entry.told["to"], entry.mark) == (4, "made")


def one_round(client, count):
    """Promote several soups at once; the winners, and the errors of the others."""
    champion = at(client)
    racers = [soup(client) for _ in range(count)]
    barrier, results = threading.Barrier(count), [None] * count

    def race(i):
        own = Store(60.0)
        barrier.wait()
        try:
            # their verdicts were computed against the version that stood there before the race
            results[i] = promote(own, racers[i], CHAMPION, lambda v: v.number == champion)
        except errors.SoupError as error:
            results[i] = error

    threads = [threading.Thread(target=race, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losers = [found for found in results if not isinstance(found, Version)]
    (winner,) = (found for found in results if isinstance(found, Version))
    assert winner.number == at(client)
    assert {type(error) for error in losers} == {errors.OvertakenError}
    return champion, winner.number


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_of_eight_promotions_at_once_one_wins_and_the_ledger_is_complete(
    client, outcome, rounds, capsys
):
    moves = [one_round(client, 8) for _ in range(rounds)]
    entries = told(client)
    assert [(e.told["from"], e.told["to"]) for e in entries[1:]] == moves
    assert [e.number for e in entries] == list(range(1, rounds + 2))
    assert {e.mark for e in entries} == {promotion.MADE}
    with capsys.disabled():
        print(f"\n8 promotion racers x {rounds} rounds: one winner each, ledger complete")


def test_a_promotion_records_the_verdict_of_the_gate(client, outcome):
    (entry,) = told(client)
    trust = trust_of(client, Spec())
    roles = read_examination(trust, entry.told["gate_run"]).roles
    parents = [evidence for role, evidence in roles.items() if role.startswith("parent")]
    rules = outcome.verdict.rules
    said = entry.told["rules"]
    assert (said["margin"], said["confidence"], said["min_items"]) == ("0.05", 0.95, 1)
    assert said["tasks"] == {"toy_digits:acc": 100, "toy_digits_bpb:bits_per_byte": 40}
    soup_again = replace(roles["soup"], version=outcome.soup.version)
    assert gate.judge(soup_again, parents, [], rules) == outcome.verdict


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_version_with_several_targets_names_them_all(client, outcome):
    version = outcome.soup.version
    promote(client, version, Target("alias", "live"))
    for stage in ("Staging", "Production"):
        promote(client, version, Target("stage", stage))
    tags = client.get_model_version(MODEL, "4").tags
    targets = ["alias champion", "alias live", "stage Staging", "stage Production"]
    told = dict(part.rsplit(" ", 1) for part in tags["soup.promotions"].split("; "))
    assert list(told) == targets
    assert tags["soup.promoted_to"] == "stage Production"
    assert datetime.fromisoformat(told["stage Production"]).tzinfo is not None


def test_a_copy_inherits_neither_promotions_nor_description(client, outcome):
    copy = promote(client, outcome.soup.version, parse_target("model:prod@live"))
    found = client.get_model_version("prod", str(copy.number))
    assert found.tags["soup.promotions"].startswith("prod@live ")
    assert found.tags["soup.promoted_to"] == "prod@live"
    assert "Promoted: not yet" in found.description
    assert "toy-llm v4" in found.description
    original = client.get_model_version(MODEL, "4")
    assert original.tags["soup.promoted_to"] == "alias champion"


def test_an_alias_that_cannot_be_moved_leaves_the_tags_as_they_were(client, outcome, monkeypatch):
    other = soup(client)

    def refuse(*args):
        assert tags_of(client, other)["soup.promoted_to"] == "alias champion"  # the alias is last
        raise MlflowException("no")

    monkeypatch.setattr(Store, "set_registered_model_alias", refuse)
    with pytest.raises(errors.RegistryError):
        promote(client, other, CHAMPION)
    assert tags_of(client, other).get("soup.promoted_to", "") == ""
    assert at(client) == 4


def test_a_stage_that_cannot_be_reached_gets_no_tags(client, outcome, monkeypatch):
    other = soup(client)

    def refuse(*args, **kwargs):
        raise MlflowException("no")

    monkeypatch.setattr(Store, "transition_model_version_stage", refuse)
    with pytest.raises(errors.RegistryError):
        promote(client, other, Target("stage", "Production"))
    assert "soup.promoted_to" not in tags_of(client, other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_where_mlflow_cannot_archive_the_others_are_archived_one_by_one(
    client, outcome, monkeypatch
):
    """As on PostgreSQL with psycopg 3, where MLflow compares a number with a text."""
    move = Store.transition_model_version_stage

    def on_postgres(self, name, version, stage, archive_existing_versions=False):
        if archive_existing_versions:
            raise MlflowException("operator does not exist: integer <> character varying")
        return move(self, name, version, stage)

    first, second = soup(client), soup(client)
    monkeypatch.setattr(Store, "transition_model_version_stage", on_postgres)
    for version in (first, second):
        promote(client, version, Target("stage", "Production"))
    stages = [client.get_model_version(MODEL, str(v.number)).current_stage for v in (first, second)]
    assert stages == ["Archived", "Production"]


def test_one_promotion_after_the_other_to_another_model_is_made(client, outcome):
    target, second = parse_target("model:prod@live"), soup(client, **{"soup.digest": "sha256:y"})
    assert promote(client, outcome.soup.version, target) == Version("prod", 1)
    assert promote(client, second, target) == Version("prod", 2)
    assert at(client, "live", "prod") == 2
    marks = [entry.mark for entry in open_ledger(client, "prod").read("promotion/alias live")]
    assert marks == ["made", "made"]


def test_what_was_copied_for_a_promotion_that_was_overtaken_is_cleared_up(
    client, outcome, monkeypatch
):
    target, second = parse_target("model:prod@live"), soup(client)
    promote(client, outcome.soup.version, target)
    append = Ledger.append

    def overtake(self, series, number, entry):
        append(self, series, number, {"to": 1, "from": 1, "nonce": "another"})
        return append(self, series, number, entry)

    monkeypatch.setattr(Ledger, "append", overtake)
    with pytest.raises(errors.OvertakenError):
        promote(client, second, target)
    assert [int(v.version) for v in client.search_model_versions("name='prod'")] == [1]


def test_entries_are_signed_for_their_place(client, outcome, tmp_path, monkeypatch):
    private, public = make_keys(tmp_path, "gate")
    monkeypatch.setenv(KEY_ENV, str(private))
    other = soup(client)
    promote(client, other, CHAMPION)
    first, entry = told(client)
    verifier = open_verifier([public])
    assert promotion.is_signed(verifier, MODEL, SERIES, entry)
    assert not promotion.is_signed(verifier, MODEL, SERIES, first)  # before there was a key
    assert not promotion.is_signed(verifier, "prod", SERIES, entry)
    assert not promotion.is_signed(verifier, MODEL, SERIES, replace(entry, number=3))
    assert not promotion.is_signed(
        verifier, MODEL, SERIES, replace(entry, told={**entry.told, "to": 3})
    )
    mallory = open_verifier([make_keys(tmp_path, "mallory")[1]])
    assert not promotion.is_signed(mallory, MODEL, SERIES, entry)


def by_hand(client):
    client.set_registered_model_alias(MODEL, "champion", "1")
    client.set_model_version_tag(MODEL, "1", "soup.gate", "passed")


def another_alias(client):
    client.delete_registered_model_alias(MODEL, "champion")
    client.set_registered_model_alias(MODEL, "champion", "4")  # where it was promoted to: no matter
    client.set_registered_model_alias(MODEL, "live", "4")


def another_is_begun(client):
    begun(client, 5, 0)  # and has not moved the alias yet


def moved_and_not_marked_yet(client):
    entry = {**told(client)[-1].told, "target": "alias live", "nonce": "another"}
    assert open_ledger(client, MODEL).append("promotion/alias live", 1, entry)
    client.set_registered_model_alias(MODEL, "live", "4")


def recorded_by_doctor(client):
    by_hand(client)
    _, complaints = doctor.examine(Spec(), digests=False)
    assert [doctor.mend(one) for one in complaints if "points to v1" in one.what] == [True]


def another_digest(client):
    entry = {**told(client)[-1].told, "nonce": "another", "digest": "sha256:x"}
    assert open_ledger(client, MODEL).append(SERIES, 2, entry)
    open_ledger(client, MODEL).mark(SERIES, 2, promotion.MADE)


@pytest.mark.parametrize(
    ("does", "alias", "said"),
    [
        (lambda client: None, "champion", ""),
        (another_is_begun, "champion", ""),
        (another_alias, "champion", ""),
        (another_alias, "live", "no promotion to @live was ever made"),
        (by_hand, "champion", "the last promotion to @champion, 1, is of v4"),
        (recorded_by_doctor, "champion", "entry 2 of the ledger records no verdict about these"),
        (moved_and_not_marked_yet, "live", ""),
        (another_digest, "champion", "entry 2 of the ledger records no verdict about these"),
    ],
)
def test_the_ledger_says_whether_a_promotion_put_an_alias_there(client, outcome, does, alias, said):
    does(client)
    version, digest = holder(client, MODEL, alias), outcome.soup.digest
    objection = promotion.objection(client, version, alias, digest)
    assert objection.startswith(said)
    assert bool(objection) == bool(said)


def test_a_promotion_that_was_never_made_is_told_where_there_is_no_ledger(client):
    client.set_registered_model_alias(MODEL, "champion", "1")
    said = promotion.objection(client, Version(MODEL, 1), "champion", "sha256:x")
    assert said == "no promotion to @champion was ever made"


def test_a_copy_in_another_model_stands_by_the_ledger_of_that_model(client, outcome):
    digest, target = outcome.soup.digest, parse_target("model:prod@live")
    told = {"digest": digest, "gate_run": "run", "verdict": "passed", "rules": {"tasks": {}}}
    copy = promotion.promote(client, outcome.soup.version, target, told).version
    assert promotion.objection(client, copy, "live", digest) == ""
    assert "no promotion to @live" in promotion.objection(
        client, outcome.soup.version, "live", digest
    )


def test_with_a_key_only_an_entry_that_it_signed_counts(client, outcome, keys, monkeypatch):
    private, public = keys
    verifier = open_verifier([public])
    at_champion = (client, outcome.soup.version, "champion", outcome.soup.digest, verifier)
    assert promotion.objection(*at_champion) == "none of the keys signed a promotion to @champion"
    monkeypatch.setenv(KEY_ENV, str(private))
    # the alias stands there already, by a promotion for which the key does not vouch
    release.promote(Spec(version="v4", promote="alias:champion", evidence="own"))
    assert promotion.objection(*at_champion) == ""
    release.promote(Spec(version="v4", promote="alias:champion", evidence="own"))
    assert [promotion.is_signed(verifier, MODEL, SERIES, entry) for entry in told(client)] == [
        False,
        True,
    ]


def every_mark(client, old, new):
    """All entries but the older one are void."""
    for entry in told(client):
        mark = promotion.MADE if entry.told["to"] == old.number else promotion.VOID
        open_ledger(client, MODEL).mark(SERIES, entry.number, mark)


def no_mark(client, old, new):
    client.delete_tag(open_ledger(client, MODEL).run_id, f"{SERIES}/00003")


def a_copy_of_the_older_entry(client, old, new):
    ledger, entry = open_ledger(client, MODEL), told(client)[1]
    ledger.append(SERIES, 4, entry.told)
    ledger.mark(SERIES, 4, promotion.MADE)


def an_unsigned_entry(client, old, new):
    entry = {key: value for key, value in told(client)[1].told.items() if key != "signed"}
    ledger = open_ledger(client, MODEL)
    ledger.append(SERIES, 4, entry)
    ledger.mark(SERIES, 4, promotion.MADE)


def an_entry_by_another_key(client, old, new):
    ledger, entry = open_ledger(client, MODEL), told(client)[1]
    content = {key: value for key, value in entry.told.items() if key != "signed"}
    ledger.append(SERIES, 4, promotion.sign(MODEL, SERIES, 4, content))
    ledger.mark(SERIES, 4, promotion.MADE)


def another_entry_of_the_same_number(client, old, new):
    for digits in ("3", "0000003"):
        client.log_param(open_ledger(client, MODEL).run_id, f"{SERIES}/{digits}", '{"to": 1}')


def another_series(client, old, new):
    ledger, entry = open_ledger(client, MODEL), told(client)[1]
    ledger.append(f"{SERIES}/00003", 1, entry.told)


FORGERIES = (
    every_mark,
    no_mark,
    a_copy_of_the_older_entry,
    an_unsigned_entry,
    an_entry_by_another_key,
    another_entry_of_the_same_number,
    another_series,
)


@pytest.mark.parametrize("forges", FORGERIES)
def test_with_a_key_nothing_that_others_write_leads_back_to_an_older_promotion(
    client, outcome, keys, tmp_path, monkeypatch, forges
):
    private, public = keys
    verifier = open_verifier([public])
    old, new = soup(client), soup(client)
    monkeypatch.setenv(KEY_ENV, str(private))
    promote(client, old, CHAMPION)
    promote(client, new, CHAMPION)
    monkeypatch.setenv(KEY_ENV, str(make_keys(tmp_path, "mallory")[0]))
    forges(client, old, new)
    assert promotion.objection(client, new, "champion", "sha256:x", verifier) == ""
    client.set_registered_model_alias(MODEL, "champion", str(old.number))
    said = promotion.objection(client, old, "champion", "sha256:x", verifier)
    assert said.startswith(f"the last signed promotion to @champion, 3, is of v{new.number}")
    found = doctor.examine(Spec(model=MODEL, public_key=str(public)), digests=False)[1]
    assert any(
        f"pointed it to v{new.number}" in one.what or "was begun and not" in one.what
        for one in found
    )


def test_verify_tells_of_an_alias_that_was_moved_by_hand(client, outcome):
    uri = f"models:/{MODEL}@champion"

    def ask(*words):
        done = CliRunner().invoke(main, ["verify", *words, "--format", "json"])
        return done.exit_code, json.loads(done.stdout)

    code, document = ask(uri, "--promoted")
    assert (code, document["status"]) == (0, "verified")
    assert {"promotion", "merged again"} <= {its["what"] for its in document["findings"]}
    client.set_registered_model_alias(MODEL, "live", "4")
    code, document = ask(f"models:/{MODEL}@live", "--promoted")
    assert (code, document["status"]) == (3, "unpromoted")
    assert ask(f"models:/{MODEL}@live")[0] == 0
    for no_alias in (f"models:/{MODEL}/4", "folder"):
        code, document = ask(no_alias, "--promoted")
        assert (code, document["error"]["where"]) == (2, "--promoted")
