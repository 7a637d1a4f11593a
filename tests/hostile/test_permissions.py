"""Several users of one server with permissions: what each may do, and what each is told.

The searcher owns the experiment of the search and may edit the candidates' model. The promoter may
only read both, and owns the experiment of the gate and the model that is deployed. To the stranger
the server hides everything.
"""

import contextlib
import os

import mlflow
import pytest
import test_forged as forged
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

import forked
from conftest import MODEL, free_port, make_keys, register, start_server, stop_server
from mlflow_soup import Spec, errors
from mlflow_soup.registry import naming, tracking
from mlflow_soup.registry.ledger import open_ledger
from mlflow_soup.registry.outages import is_forbidden
from mlflow_soup.registry.store import Store
from mlflow_soup.workflows import release

pytestmark = pytest.mark.slow
PASSWORD = "not-a-Secret-{}-1"
USERS = ("admin", "searcher", "promoter", "stranger")
CONFIG = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 300
"""
TASKS = ("--ood-tasks", forged.DIGITS)
GATE = ("--model", MODEL, "--experiment", "gate", *TASKS)
PROD = ("--promote", "model:prod@champion")


class Place:
    """A server with permissions, and the users who work there."""

    def __init__(self, uri, folder):
        self.uri, self.folder = uri, folder
        self.permissions, self.searches = None, ()

    def env(self, user):
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD.format(user),
            "MLFLOW_SOUP_CACHE": str(self.folder / f"cache of {user}"),
        }

    @contextlib.contextmanager
    def user(self, name, experiment=""):
        """This process works as a user; the user's client."""
        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.env(name).items():
                patch.setenv(key, value)
            mlflow.set_tracking_uri(self.uri)
            if experiment:
                mlflow.set_experiment(experiment)
            yield Store()

    def command(self, user, *words):
        """A command in a process of its own: exit code and what it says."""
        env = {**os.environ, **self.env(user)}
        done = forked.play("mlflow_soup", *words, cwd=self.folder, env=env)
        return done.returncode, done.stdout + done.stderr

    def grant(self, user, kind, name, level):
        with self.user("admin"):
            self.permissions.grant_user_permission(user, kind, name, level)

    def revoke(self, user, kind, name):
        with self.user("admin"):
            self.permissions.revoke_user_permission(user, kind, name)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, checkpoints, tasks):
    """The server, with v1 to v3, the refused soup v4, and who may do what."""
    folder, port = tmp_path_factory.mktemp("users"), free_port()
    (folder / "auth.ini").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(folder / "auth.ini"))
        patch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", PASSWORD.format("admin"))
        patch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "for this test")
        artifacts = ("--artifacts-destination", str(folder / "artifacts"))
        process = start_server(folder / "mlflow.db", port, "--app-name", "basic-auth", *artifacts)
    place = Place(f"http://127.0.0.1:{port}", folder)
    try:
        prepare(place, checkpoints, tasks)
        yield place
    finally:
        stop_server(process)


def prepare(place, checkpoints, tasks):
    """The users and what they own; v3 comes from an experiment of the trainer, who is the admin."""
    policy = {
        "soup.tasks": "toy_letters",
        "soup.ood_tasks": forged.DIGITS,
        "soup.margin": "0.05",
        "soup.include_path": str(tasks),
        "soup.trials": "6",
    }
    with place.user("admin") as client:
        place.permissions = get_app_client("basic-auth", tracking_uri=place.uri)
        for user in USERS[1:]:
            place.permissions.create_user(user, PASSWORD.format(user))
        client.create_registered_model(MODEL, tags=policy)
        training = client.create_experiment("training")
    with place.user("searcher") as client:
        soups = client.create_experiment("soups")
    with place.user("promoter") as client:
        client.create_experiment("gate")
        client.create_registered_model("prod", tags=policy)
    place.grant("searcher", "registered_model", MODEL, "EDIT")
    place.grant("promoter", "registered_model", MODEL, "READ")
    place.grant("promoter", "experiment", soups, "READ")
    for user in ("searcher", "promoter"):
        place.grant(user, "experiment", training, "READ")
    with place.user("searcher", "soups") as client:
        for folder in checkpoints[:2]:
            register(client, folder)
        client.set_registered_model_alias(MODEL, "champion", "2")
    with place.user("admin", "training") as client:
        register(client, checkpoints[2])
    # v4, which the gate refuses, and v5, which it does not
    search = ("run", "--model", MODEL, "--experiment", "soups")
    refused = place.command("searcher", *search, "--pair", "v3,v1", "--method", "uniform")
    passed = place.command("searcher", *search, "--pair", "v1,v2")
    place.searches = refused, passed


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shared


def aliases(place, name):
    with place.user("admin") as client:
        return client.get_registered_model(name).aliases


def runs(place):
    """All runs but the ledgers', by id."""
    with place.user("admin") as client:
        found = tracking.find_runs(client, {})
    return {r.info.run_id for r in found if r.data.tags.get(naming.ROLE) != "ledger"}


def test_the_searcher_searches_without_writing_to_the_experiment_of_the_training(place):
    (refused, said), (passed, without) = place.searches
    assert (refused, passed) == (3, 0), said + without
    links = "is not linked to the logged models"  # of both parents: the search run and the OOD run
    shown = "MLflow's pages of these models do not show the scores: parent 0;"
    assert (said.count(links), said.count(shown)) == (2, 1), said
    assert "that needs EDIT on" not in without
    with place.user("searcher") as client:
        (run,) = tracking.find_runs(client, {naming.ROLE: "search", naming.METHOD: "uniform"})
        (ood,) = tracking.find_runs(client, {naming.ROLE: "ood", naming.VERSION: f"{MODEL}/4"})
        shown = client.get_logged_model(client.get_model_version(MODEL, "4").source.split("/")[1])
    assert naming.OBJECTIVE in run.data.metrics
    assert any(key.startswith("ood/") for key in ood.data.metrics)
    assert any(metric.key.startswith("ood/") for metric in shown.metrics)


def test_a_promoter_who_may_only_read_the_candidates_promotes_to_a_model_of_their_own(place):
    judge = ("--version", "v5", *GATE, *PROD)
    code, said = place.command("promoter", "evaluate", *judge, "--evidence", "own")
    assert code == 0, said
    assert said.count("do not show the scores: soup, parent 0, parent 1, champion 0") == 1
    code, said = place.command("promoter", "gate", *judge)
    assert code == 0, said
    assert "you may not write the tags of toy-llm v5, so the verdict is only on run" in said
    code, said = place.command("promoter", "promote", *judge)
    assert code == 0, said
    assert aliases(place, "prod") == {"champion": "1"}
    with place.user("admin") as client:
        assert client.get_model_version("prod", "1").source == f"models:/{MODEL}/5"
        runs = tracking.find_runs(client, {naming.ROLE: "ood", naming.VERSION: f"{MODEL}/5"})
        (ours,) = (r for r in runs if client.get_experiment(r.info.experiment_id).name == "gate")
    assert ours.data.tags[naming.GATE] == "passed"
    assert any(key.startswith("ood/") for key in ours.data.metrics)


SEARCH = ("run", "--model", MODEL, "--pair", "v1,v2")
V5 = ("--model", MODEL, "--version", "v5")
NEEDS = {  # who asks for what → the permission that the error names
    "the searcher searches for the promoter's model": (
        *("searcher", (*SEARCH, "--experiment", "soups", *PROD, *TASKS)),
        "EDIT on registered model 'prod', if there is one",
    ),
    "the searcher promotes to the promoter's model": (
        *("searcher", ("promote", *V5, "--experiment", "soups", *PROD, *TASKS)),
        "EDIT on registered model 'prod', if there is one",
    ),
    "the searcher measures anew in the promoter's experiment": (
        *("searcher", ("evaluate", *V5, "--experiment", "gate")),
        "EDIT on experiment 'gate'",
    ),
    "the promoter moves an alias of the candidates": (
        *("promoter", ("promote", *V5, "--experiment", "gate", "--promote", "alias:live")),
        "EDIT on registered model 'toy-llm'",
    ),
    "the promoter searches": (
        *("promoter", (*SEARCH, "--experiment", "gate")),
        "EDIT on registered model 'toy-llm'",
    ),
    "the promoter measures anew in the searcher's experiment": (
        *("promoter", ("evaluate", *V5, "--experiment", "soups")),
        "EDIT on experiment 'soups'",
    ),
    "the promoter judges by a measurement there": (
        *("promoter", ("gate", *V5, "--experiment", "soups", "--evidence", "own")),
        "EDIT on experiment 'soups'",
    ),
    "the promoter asks for what the searcher's ledger says": (
        *("promoter", ("doctor", "--model", MODEL)),
        "READ on experiment 'soup-ledger/toy-llm'",
    ),
    "the stranger searches": (
        *("stranger", (*SEARCH, "--experiment", "mine")),
        "READ on registered model 'toy-llm', if there is one",
    ),
    "the stranger promotes": (
        *("stranger", ("promote", *V5, "--promote", "alias:live")),
        "READ on registered model 'toy-llm', if there is one",
    ),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_is_forbidden_fails_before_anything_is_evaluated_and_names_the_permission(place, what):
    user, words, need = NEEDS[what]
    before = runs(place)
    code, said = place.command(user, *words)
    assert code == 7, said
    assert f": this needs {need}\n" in said
    assert f", user {user}\n    fix: ask whoever has MANAGE on it, or an administrator" in said
    assert runs(place) == before
    assert aliases(place, MODEL) == {"champion": "2"}


def test_a_user_whose_search_may_not_write_to_its_ledger_hears_it_before_the_search(place):
    with place.user("admin") as client:
        ledger = client.get_experiment_by_name(f"soup-ledger/{MODEL}").experiment_id
    place.grant("promoter", "registered_model", "*", "EDIT")
    try:
        before = runs(place)
        code, said = place.command("promoter", *SEARCH, "--experiment", "gate")
        assert (code, runs(place)) == (7, before)
        assert "this needs EDIT on experiment 'soup-ledger/toy-llm'" in said
        place.grant("promoter", "experiment", ledger, "READ")
        code, said = place.command("promoter", *SEARCH, "--experiment", "gate")
        assert (code, runs(place)) == (7, before)
        assert "this needs EDIT on experiment 'soup-ledger/toy-llm'" in said
        place.revoke("promoter", "experiment", ledger)
    finally:
        place.revoke("promoter", "registered_model", "*")


def test_to_whom_everything_is_hidden_the_store_is_not_called_empty(place):
    code, said = place.command("stranger", "run", "--pair", "v1,v2")
    assert code == 4
    assert "you may read no registered model here, or there is none" in said


def test_an_unknown_user_hears_which_variables_to_set(place):
    code, said = place.command("nobody", *SEARCH)
    assert code == 7
    assert "the server does not know this user and password" in said
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said


def test_who_may_not_read_the_files_hears_which_permission_that_needs(place):
    with place.user("admin") as client:
        soups = client.get_experiment_by_name("soups").experiment_id
    place.revoke("promoter", "experiment", soups)
    try:
        code, said = place.command("promoter", "verify", f"models:/{MODEL}/5")
    finally:
        place.grant("promoter", "experiment", soups, "READ")
    assert code == 7, said
    assert "you may not fetch toy-llm v5: this needs READ on the experiment of logged model" in said


def test_a_verdict_on_evidence_that_may_only_be_read_is_told_and_nowhere_recorded(place):
    with place.user("admin") as client:
        before = client.get_model_version(MODEL, "5")
    code, said = place.command("promoter", "gate", *V5, "--experiment", "soups")
    assert code == 0, said
    assert "toy-llm v5: gate passed" in said
    assert "this verdict is not recorded: you may not write to its OOD run" in said
    with place.user("admin") as client:
        after = client.get_model_version(MODEL, "5")
        run = client.get_run(after.tags[naming.GATE_RUN])
    assert (after.tags, after.description) == (before.tags, before.description)
    assert after.last_updated_timestamp == before.last_updated_timestamp
    assert run.data.tags[naming.GATE] == "passed"  # by the search


def test_a_target_that_is_not_there_looks_hidden_so_its_owner_makes_it_first(place):
    words = ("promote", "--version", "v5", *GATE, "--promote", "model:fresh@live")
    code, said = place.command("promoter", *words)
    assert code == 7, said
    assert "if there is none, check the name, or create it" in said
    with place.user("promoter") as client:
        client.create_registered_model("fresh", tags=client.get_registered_model("prod").tags)
    code, said = place.command("promoter", *words)
    assert code == 0, said
    assert aliases(place, "fresh") == {"live": "1"}


# -- the searcher forges


def promote(**more):
    release.promote(
        Spec(
            **{"model": MODEL, "version": "v4", "experiment": "gate", "ood_tasks": forged.DIGITS},
            **{"promote": "model:prod@champion", **more},
        )
    )


def judge(**more):
    decision = release.gate(
        Spec(
            **{"model": MODEL, "version": "v4", "experiment": "gate", "ood_tasks": forged.DIGITS},
            **{"promote": "model:prod@champion", **more},
        )
    )
    if not decision.verdict.passed:
        raise errors.GateError("refused", where="here", fix="none")


FORGED = [f for f in forged.FORGED if f is not forged.the_digest_of_the_champion]  # reads a folder
COMMANDS = ((promote, "experiment"), (promote, "own"), (judge, "experiment"))
ATTACKS = {  # what the server itself forbids
    "alias": lambda client: client.set_registered_model_alias("prod", "champion", "1"),
    "version": lambda client: client.create_model_version("prod", f"models:/{MODEL}/4"),
    "rules": lambda client: client.set_registered_model_tag("prod", "soup.margin", "9"),
    "ledger": lambda client: open_ledger(client, "prod").append("promotion/alias x", 1, {}),
    "examination": lambda client: forged.write_examination(client, "gate", forged.champions_rows),
}


def test_nothing_that_the_searcher_may_write_promotes_a_refused_soup(place, figures):
    with place.user("promoter") as client:
        open_ledger(client, "prod")  # whoever opens it first owns it
        release.evaluate(
            Spec(
                **{"model": MODEL, "version": "v4", "experiment": "gate"},
                **{"ood_tasks": forged.DIGITS, "promote": "model:prod@champion"},
            )
        )
    before, count = aliases(place, "prod"), 0
    for attack in ATTACKS.values():
        with place.user("searcher", "soups") as client:
            with pytest.raises((MlflowException, errors.DeniedError)) as caught:
                attack(client)
            assert isinstance(caught.value, errors.DeniedError) or is_forbidden(caught.value)
    for forge in FORGED:
        with place.user("searcher", "soups") as client, as_they_were(place):
            forge(client, None)
            for command, mode in COMMANDS:
                with place.user("promoter"), pytest.raises(forged.REFUSALS):
                    command(evidence=mode)
                count += 1
        assert aliases(place, "prod") == before
    with place.user("admin") as client:
        copies = client.search_model_versions("name='prod'")
    assert {copy.source for copy in copies} <= {f"models:/{MODEL}/5"}
    figures["forged by the searcher × command × evidence, on a server with permissions"] = count
    figures["writes that the server forbids the searcher"] = len(ATTACKS)


@contextlib.contextmanager
def as_they_were(place):
    """The tags of the model and of v4 are restored in the end."""

    def tags(client):
        return [
            (client.get_registered_model(MODEL).tags, client.set_registered_model_tag, (MODEL,)),
            (client.get_model_version(MODEL, "4").tags, client.set_model_version_tag, (MODEL, "4")),
        ]

    with place.user("admin") as client:
        before = tags(client)
    yield
    with place.user("admin") as client:
        for (was, write, of), (now, _, _) in zip(before, tags(client), strict=True):
            for key in was.items() - now.items():
                write(*of, *key)
            for key in now.keys() - was.keys():
                delete = write.__name__.replace("set_", "delete_")
                getattr(client, delete)(*of, key)


def test_a_trial_of_another_user_that_may_not_be_marked_is_told_and_ends_no_search(
    place, tmp_path, monkeypatch
):
    private, _ = make_keys(tmp_path, "pipeline")
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(private))  # what it signed counts wherever it is
    search = ("run", "--model", MODEL, "--pair", "v1,v3")
    for user, experiment in (("admin", "training"), ("searcher", "soups")):
        code, said = place.command(user, *search, "--experiment", experiment)
        assert code in (0, 3), said  # whatever the gate says
    assert "you may not mark run" in said
    assert "run: http" in said
