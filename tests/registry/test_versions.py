import os
import shutil

import mlflow
import pytest
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlflow_soup
import toy
from conftest import MODEL, register
from mlflow_soup import Spec, errors
from mlflow_soup.records import Version
from mlflow_soup.registry import family, promotion
from mlflow_soup.registry.pull import pull
from mlflow_soup.registry.register import _link_output, register_soup, uploads
from mlflow_soup.registry.store import Store
from mlflow_soup.registry.versions import (
    find_model,
    find_soups,
    holder,
    last,
    model_id,
    policy,
    resolve,
    tags_of,
    trace,
)
from mlflow_soup.request.names import Target, VersionRef
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint


def test_files_of_a_local_store_are_not_copied(client):
    folder = pull(client, Version(MODEL, 1))
    source = client.get_model_version(MODEL, "1").source.removeprefix("models:/")
    assert str(folder) in client.get_logged_model(source).artifact_location
    assert not (folder / "registered_model_meta").exists()


def test_a_misspelt_policy_tag_is_told(client, caplog):
    assert policy(client, MODEL)["soup.trials"] == "6"
    assert not caplog.text
    client.set_registered_model_tag(MODEL, "soup.margins", "0.5")
    policy(client, MODEL)
    said = "registered model toy-llm: tag soup.margins sets nothing; did you mean soup.margin?"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_remote_store_is_downloaded_once(server_client, checkpoints, tmp_path, server):
    server_client.create_registered_model("cached")
    register(server_client, checkpoints[0], "cached")
    register(server_client, checkpoints[0], "cached")
    first = pull(server_client, Version("cached", 1))
    assert digest(find_checkpoint(first, "v1")) == digest(find_checkpoint(checkpoints[0], "v1"))
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert pull(server_client, Version("cached", 1)) == first
    assert pull(server_client, Version("cached", 2)) == first  # the same content
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "cache" / "temporary").iterdir()) == []


def test_a_damaged_cache_entry_is_fetched_again(server_client, checkpoints):
    server_client.create_registered_model("spoilt")
    register(server_client, checkpoints[1], "spoilt")
    folder = pull(server_client, Version("spoilt", 1))
    file = folder / "model.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    again = pull(server_client, Version("spoilt", 1))
    assert (again / "model.safetensors").read_bytes() == sound
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    fresh = pull(server_client, Version("spoilt", 1), fresh=True)
    assert (fresh / "model.safetensors").read_bytes() == sound


def test_what_a_killed_pull_left_is_removed_by_the_next(server_client, checkpoints, tmp_path):
    server_client.create_registered_model("killed")
    register(server_client, checkpoints[1], "killed")
    left = tmp_path / "cache" / "temporary" / ".pull.partial-01234567"
    (left / "tree").mkdir(parents=True)
    (left / "tree" / "model.safetensors").write_bytes(b"half of it")
    pull(server_client, Version("killed", 1))
    assert not left.exists()


def test_a_cache_entry_that_names_another_folder_removes_nothing(
    server_client, checkpoints, tmp_path
):
    server_client.create_registered_model("pointed")
    register(server_client, checkpoints[1], "pointed")
    folder = pull(server_client, Version("pointed", 1))
    canary = tmp_path / "canary"
    canary.mkdir()
    (pointer,) = (
        path
        for path in (tmp_path / "cache" / "source").iterdir()
        if path.read_text() == folder.name
    )
    linked = tmp_path / "name"
    linked.write_text(str(canary))
    for spoil in (str(canary), "../../canary", "..", "", f"{folder.name}\n", linked, os.mkfifo):
        pointer.unlink()
        if isinstance(spoil, str):
            pointer.write_text(spoil)
        else:
            spoil(pointer) if spoil is os.mkfifo else pointer.symlink_to(spoil)
        assert pull(server_client, Version("pointed", 1)) == folder
        assert canary.is_dir()


def test_a_version_that_was_never_uploaded_completely_is_refused(client, checkpoints):
    logged = mlflow.initialize_logged_model(name="half")
    client.log_model_artifacts(logged.model_id, str(checkpoints[0]))
    client.create_model_version(MODEL, f"models:/{logged.model_id}", model_id=logged.model_id)
    with pytest.raises(errors.ParentError, match="was never completed"):
        pull(client, Version(MODEL, 4))


def test_versions_logged_into_a_run_can_be_merged(client, checkpoints):
    for folder in checkpoints[:2]:
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(folder), "artifacts/hf")
        uri = f"runs:/{run.info.run_id}/artifacts"
        client.create_model_version(MODEL, uri, run_id=run.info.run_id)
    outcome = mlflow_soup.run(Spec(pair="v4,v5", trials=4))
    folder = mlflow.artifacts.download_artifacts(f"{outcome.soup.version.uri}")
    assert sorted(os.listdir(folder)) == ["README.md", "hf", "soup_manifest.json"]
    assert outcome.soup.parents[0].model_id is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["client", "server_client"])
def test_a_soup_of_mlflows_transformers_flavour_loads_as_its_parents_do(
    request, store, checkpoints, tasks
):
    client: MlflowClient = request.getfixturevalue(store)
    for folder in checkpoints[:2]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config._name_or_path = model.name_or_path = ""
        mlflow.transformers.log_model(
            {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)},
            name="checkpoint",
            task="text-generation",
            registered_model_name="flavoured",
            pip_requirements=["transformers"],
        )
    spec = Spec(
        model="flavoured",
        pair="v1,v2",
        trials=4,
        tasks="toy_letters",
        ood_tasks="toy_digits",
        include_path=str(tasks),
    )
    outcome = mlflow_soup.run(spec)
    assert outcome.verdict.passed
    loaded = mlflow.transformers.load_model(outcome.soup.version.uri, return_type="components")
    parent = mlflow.transformers.load_model("models:/flavoured/1", return_type="components")
    assert loaded.keys() == parent.keys()
    pyfunc = mlflow.pyfunc.load_model(outcome.soup.version.uri)
    assert (
        pyfunc.metadata.signature
        == mlflow.pyfunc.load_model("models:/flavoured/1").metadata.signature
    )
    model_id = client.get_model_version("flavoured", str(outcome.soup.version.number)).source
    assert pyfunc.metadata.model_id == model_id.removeprefix("models:/")
    assert pyfunc.metadata.metadata["soup"]["parents"] == "1,2"
    pyfunc.predict("abc abc a")


def test_an_alias_is_resolved_when_it_is_read(client):
    client.set_registered_model_alias(MODEL, "champion", "2")
    ref = VersionRef(None, "champion")
    assert resolve(client, MODEL, ref) == Version(MODEL, 2)
    assert holder(client, MODEL, "champion") == Version(MODEL, 2)
    assert holder(client, MODEL, "nobody") is None


def test_the_model_may_come_from_the_environment(client, monkeypatch):
    client.create_registered_model("other")
    monkeypatch.setenv("MLFLOW_SOUP_MODEL", MODEL)
    assert find_model(client, "", [VersionRef(1, None)]) == MODEL
    assert find_model(client, "other", [VersionRef(1, None)]) == "other"


def test_a_request_without_a_name_means_the_only_model_with_its_versions(client):
    client.create_registered_model("other")
    assert find_model(client, "", [VersionRef(1, None), VersionRef(2, None)]) == MODEL


def add(client, name, parents=None, **tags):
    """A version without files."""
    tags |= {} if parents is None else {"soup.parents": parents}
    created = client.create_model_version(name, "s3://bucket/checkpoint", tags=tags)
    return Version(name, int(created.version))


def test_a_soup_of_a_soup_is_traced_to_its_checkpoints(client, outcome):
    grandchild = add(client, MODEL, "3,4", **{"soup.lambda": "0.7", "soup.gate": "refused"})
    traced = trace(client, grandchild)
    first, *_ = traced.members.values()
    assert (first.kind, first.gate, first.aliases) == (family.SOUP, "refused", ())
    assert first.parents == ((Version(MODEL, 3), 0.3), (Version(MODEL, 4), 0.7))
    soup = traced.members[outcome.soup.version]
    assert (soup.kind, soup.gate, soup.aliases) == (family.SOUP, "passed", ("champion",))
    assert (soup.digest, soup.promoted_to) == (outcome.soup.digest, "alias champion")
    recipe = outcome.soup.recipe.lam
    assert soup.parents == ((Version(MODEL, 1), recipe[0]), (Version(MODEL, 2), recipe[1]))
    assert [traced.members[Version(MODEL, i)].kind for i in (1, 2, 3)] == [family.CHECKPOINT] * 3
    assert len(traced.members) == 5


@pytest.mark.parametrize("store", ["client", "server_client"])
def test_a_family_is_traced_across_models_gaps_and_cycles(request, store):
    client: MlflowClient = request.getfixturevalue(store)
    for name in ("kin", "elders", "gone"):
        client.create_registered_model(name)
    elder, ghost = add(client, "elders"), add(client, "gone")
    odd = add(client, "kin", "banana")
    circular = add(client, "kin", "2,3")
    soup = add(client, "kin", "elders/1,1,2,gone/1,7")
    client.set_registered_model_alias("elders", "base", "1")
    client.delete_registered_model("gone")
    traced = trace(client, soup)
    deleted = Version("kin", 7)
    kinds = {version: member.kind for version, member in traced.members.items()}
    assert kinds == {
        soup: family.SOUP,
        elder: family.CHECKPOINT,
        odd: family.SOUP,
        circular: family.SOUP,
        ghost: family.MISSING,
        deleted: family.MISSING,
    }
    assert traced.members[elder].aliases == ("base",)
    assert [len(member.problems) for member in traced.members.values()] == [0, 0, 1, 2, 0, 0]


def test_a_copy_in_another_model_names_its_parents_with_their_model(client, outcome):
    target = Target("model", "champion", "prod")
    told = {"digest": outcome.soup.digest, "rules": {"tasks": {}}}
    copy = promotion.promote(client, outcome.soup.version, target, told).version
    assert copy == Version("prod", 1)
    assert tags_of(client, copy)["soup.parents"] == f"{MODEL}/1,{MODEL}/2"
    assert tags_of(client, outcome.soup.version)["soup.parents"] == "1,2"
    copied, original = (trace(client, v) for v in (copy, outcome.soup.version))
    assert copied.members[copy].parents == original.members[outcome.soup.version].parents
    client.set_model_version_tag("prod", "1", "soup.parents", "1,2")
    assert promotion.promote(client, outcome.soup.version, target, told).version == copy
    assert tags_of(client, copy)["soup.parents"] == f"{MODEL}/1,{MODEL}/2"  # repaired


def test_a_copy_among_its_parents_names_them_by_their_numbers(client, outcome):
    client.create_registered_model("prod")
    for _ in range(2):
        add(client, "prod")
    soup = add(client, MODEL, "prod/1,prod/2", **{"soup.gate": "passed", "soup.digest": "sha256:x"})
    told = {"digest": "sha256:x", "rules": {"tasks": {}}}
    copy = promotion.promote(client, soup, Target("model", "champion", "prod"), told).version
    assert tags_of(client, copy)["soup.parents"] == "1,2"


def test_models_of_different_shape_are_refused(client, tmp_path, trained):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**{**trained.config.to_dict(), "vocab_size": 26})
    register(client, toy.save(GPTNeoXForCausalLM(config), tmp_path / "wide"))
    with pytest.raises(errors.ParentError, match="vocab_size is 25 against 26"):
        mlflow_soup.run(Spec(pair="v1,v4"))


@pytest.mark.parametrize("put", [lambda path: path.symlink_to("/etc/passwd"), os.mkfifo])
def test_only_plain_files_are_uploaded(client, checkpoints, tmp_path, put):
    folder = shutil.copytree(checkpoints[0], tmp_path / "soup")
    put(folder / "notes.txt")
    with (
        mlflow.start_run() as run,
        pytest.raises(errors.StoreError, match=r"notes\.txt") as refusal,
    ):
        register_soup(
            client,
            folder,
            name=MODEL,
            run_id=run.info.run_id,
            parents=[Version(MODEL, 1)],
            tags={"soup.request": "r"},
            params={},
            description="",
            check=lambda tree: None,
        )
    assert str(folder / "notes.txt") in refusal.value.where
    assert last(client, MODEL, 2)[-1] == Version(MODEL, 3)


def test_a_soup_is_linked_with_its_run_once_though_the_call_is_repeated(client, checkpoints):
    with mlflow.start_run() as run:
        logged = mlflow.initialize_logged_model(name="soup")
    for _ in range(2):
        _link_output(client, run.info.run_id, logged.model_id)
    (output,) = client.get_run(run.info.run_id).outputs.model_outputs
    assert output.model_id == logged.model_id


class Between(Store):
    """A client that lets another process act before one of its calls."""

    def __init__(self, name, act):
        super().__init__()
        self._name, self._act = name, act

    def __getattribute__(self, name):
        acts = name != "_name" and name == self._name
        if acts:
            self._name = ""
            self._act()
        return super().__getattribute__(name)


def soup_of(client, folder, request):
    """The arguments of `register_soup` for a soup."""
    experiment = client.get_experiment_by_name("soups").experiment_id
    return {
        "folder": folder,
        "name": MODEL,
        "run_id": client.create_run(experiment).info.run_id,
        "parents": [],
        "tags": {"soup.request": request},
        "params": {},
        "description": "",
        "check": lambda tree: None,
    }


def test_a_version_that_another_process_deletes_meanwhile_does_no_harm(client, folder):
    first, vain = (add(client, MODEL, **{"soup.request": "r"}) for _ in range(2))
    other = MlflowClient()
    acting = Between("get_model_version", lambda: other.delete_model_version(MODEL, "5"))
    assert vain == Version(MODEL, 5)
    assert register_soup(acting, **soup_of(client, folder, "r")) == first


def test_a_version_that_another_process_registered_first_stays_and_ours_goes(client, folder):
    first = []

    def overtake():
        first.append(register_soup(client, **soup_of(client, folder, "r")))

    acting = Between("create_model_version", overtake)
    assert [register_soup(acting, **soup_of(client, folder, "r"))] == first
    assert find_soups(client, MODEL, {"soup.request": "r"}) == first
    experiment = client.get_experiment_by_name("soups").experiment_id
    (upload,) = uploads(client, experiment, {"soup.request": "r"})
    assert upload.model_id == model_id(client, first[0])


def test_a_later_version_of_another_process_is_left_to_it(client, folder):
    versions = [add(client, MODEL, **{"soup.request": "r"}) for _ in range(2)]
    assert register_soup(client, **soup_of(client, folder, "r")) == versions[0]
    assert find_soups(client, MODEL, {"soup.request": "r"}) == versions


def test_an_upload_that_another_process_took_for_cut_short_is_completed(client, folder):
    other = MlflowClient()

    def declare_failed():
        (upload,) = uploads(client, experiment, {"soup.request": "r"})
        other.finalize_logged_model(upload.model_id, "FAILED")

    experiment = client.get_experiment_by_name("soups").experiment_id
    acting = Between("log_inputs", declare_failed)
    version = register_soup(acting, **soup_of(client, folder, "r"))
    assert pull(client, version).is_dir()
