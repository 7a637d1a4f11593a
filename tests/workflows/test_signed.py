"""Sign a soup between gate and promotion, and ask for that signature."""

import json
import shutil
import subprocess
import sys

import mlflow
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import rsa
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlflow_soup
from conftest import MODEL, folder_of, make_keys, use
from mlflow_soup import Spec, errors
from mlflow_soup.cli import main
from mlflow_soup.records import Promotion, Version
from mlflow_soup.registry import trees
from mlflow_soup.registry.trees import Tree, tree_of
from mlflow_soup.registry.versions import find_registered, model_id
from mlflow_soup.workflows import release

SOUP = Version(MODEL, 4)


@pytest.fixture(scope="session")
def measured_store(examined, tmp_path_factory):
    """A copy of the store in which v4 passed, with signed scores; and the two keys."""
    folder = tmp_path_factory.mktemp("measured")
    database, _ = examined
    shutil.copy(database, folder / "measured.db")
    private, public = make_keys(folder, "gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SOUP_KEY", str(private))
        use(folder / "measured.db", folder, patch)
        release.evaluate(Spec(version="v4"))
    return folder / "mlflow.db", private, public


@pytest.fixture
def key(measured_store, monkeypatch):
    """The public key; this process has the private one."""
    _, private, public = measured_store
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(private))
    return str(public)


@pytest.fixture
def measured(measured_store, client, key, edit, tmp_path, monkeypatch):
    """The store of the passed soup; a signature is taken away in the end."""
    use(measured_store[0], tmp_path, monkeypatch)
    edit(folder_of(client, SOUP) / "model.sig", b"")
    (folder_of(client, SOUP) / "model.sig").unlink()
    return client


def sign(**more):
    return release.sign(Spec(version="v4", **more))


def promote(public, **more):
    key = str(public)
    return release.promote(Spec(version="v4", promote="alias:live", public_key=key, **more))[1]


def aliases(client):
    found = find_registered(client, MODEL).aliases
    return {alias: int(number) for alias, number in found.items()}


def signature_of(public, soup=SOUP.uri):
    first, *others = mlflow_soup.verify(soup, public_key=public)
    assert first.what == "signature"
    assert {finding.verdict for finding in others} <= {"ok", "skipped"}
    return first


def anybodys_check(public, folder):
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--public_key", public]
    command += ["--signature", f"{folder}/model.sig", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_signed_soup_is_verified_by_us_and_by_anybody_and_promoted(
    measured, key, tmp_path, monkeypatch
):
    assert signature_of([key]).verdict == "missing"
    with pytest.raises(errors.MismatchError, match=r"v4 is not signed as a whole.*no model\.sig"):
        promote(key)
    assert aliases(measured) == {}
    version, name = sign(public_key=key, promote="alias:live")
    assert version == SOUP
    assert aliases(measured) == {}
    monkeypatch.delenv("MLFLOW_SOUP_KEY")
    assert name in signature_of(key).details[0]
    assert {finding.verdict for finding in mlflow_soup.verify(SOUP.uri)} == {"ok"}
    download = mlflow.artifacts.download_artifacts(SOUP.uri, dst_path=str(tmp_path / "copy"))
    assert anybodys_check(key, download)
    made = promote(key)
    assert made == Promotion("alias live", SOUP, None, made.at)
    assert aliases(measured) == {"live": 4}


def test_a_signed_soup_is_exported_with_the_scores_that_were_signed(measured, key, tmp_path):
    with pytest.raises(errors.MismatchError, match="is not signed as a whole"):
        mlflow_soup.export(SOUP.uri, tmp_path / "out", public_key=key)
    assert not (tmp_path / "out").exists()
    _, name = sign(public_key=key)
    told = mlflow_soup.export(SOUP.uri, tmp_path / "out", public_key=key)
    assert f"All of its files are signed by the key `{name}`." in told.checked
    assert set(told.scores) == {"toy_digits:acc", "toy_digits_bpb:bits_per_byte"}
    assert not (tmp_path / "out" / "model.sig").exists()  # it is one of the tree, not of this


def test_another_key_refuses_and_a_second_signature_replaces_the_first(
    measured, key, tmp_path, monkeypatch
):
    private, public = make_keys(tmp_path, "mallory")
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(private))
    sign()
    assert signature_of(str(public)).verdict == "ok"
    found = signature_of(key)
    assert (found.verdict, found.details) == (
        "MISMATCH",
        ("no key of --public-key made model.sig",),
    )
    with pytest.raises(errors.MismatchError, match="no key of --public-key made"):
        promote(key)
    monkeypatch.setenv("MLFLOW_SOUP_KEY", key.replace(".pub", ""))
    sign()
    assert signature_of(key).verdict == "ok"
    assert signature_of(f"{public}, {key}").verdict == "ok"
    # a tag cannot name the key
    measured.set_registered_model_tag(MODEL, "soup.public_key", str(public))
    assert promote(key).version == SOUP


def test_the_commands_say_what_they_found(measured, key):
    def command(*words):
        done = CliRunner().invoke(main, words)
        return done.exit_code, done.output.splitlines()

    code, lines = command("verify", SOUP.uri, "--public-key", key)
    assert (code, lines[0]) == (3, "missing   signature: there is no model.sig")
    assert lines[-1] == f"{SOUP.uri}: NOT signed as a whole by a key of --public-key"
    code, (line,) = command("sign", "--version", "v4", "--promote=", "--public-key", key)
    assert code == 0
    assert line.startswith("toy-llm v4: signed by the key ")
    code, lines = command("verify", SOUP.uri, "--public-key", key)
    assert code == 0
    assert lines[0].startswith("ok        signature: ")
    assert lines[-1] == f"{SOUP.uri}: verified"
    assert command("verify", SOUP.uri, "--public-key", "absent.pem")[0] == 2


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "config.json"])
def test_a_file_that_changed_after_the_signature_is_found(measured, key, edit, name):
    sign()
    path = folder_of(measured, SOUP) / name
    edit(path, path.read_bytes() + b"\n" if path.exists() else b"")
    first, *_ = mlflow_soup.verify(SOUP.uri, public_key=key)
    word = "unsigned" if name == "notes.txt" else "changed"
    assert (first.verdict, first.details) == ("MISMATCH", (f"{name} is {word}",))
    with pytest.raises(errors.MismatchError):
        promote(key)
    assert aliases(measured) == {}


def test_what_the_gate_refuses_is_not_signed(measured, key):
    with pytest.raises(errors.GateError, match="the gate refuses"):
        sign(margin=0.0, confidence=0.999)
    measured.set_registered_model_alias(MODEL, "champion", "3")
    with pytest.raises(errors.GateError, match="was not scored together"):
        sign()
    with pytest.raises(errors.SpecError, match="is not a soup"):
        release.sign(Spec(version="v1"))
    assert not (folder_of(measured, SOUP) / "model.sig").exists()


def test_without_a_fitting_key_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/else.db")
    monkeypatch.delenv("MLFLOW_SOUP_KEY", raising=False)
    with pytest.raises(errors.SpecError, match="no key to sign with"):
        sign()
    private, _ = make_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(private))
    with pytest.raises(errors.SpecError, match="RSAPrivateKey"):
        sign()


def test_the_main_job_refuses_to_promote_what_nobody_can_have_signed(key, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/else.db")
    with pytest.raises(errors.SpecError, match="cannot be signed already") as caught:
        mlflow_soup.run(Spec(pair="v1,v2", promote="alias:live", public_key=key))
    assert "gate, sign and promote" in caught.value.fix


def test_a_soup_of_a_signed_parent_has_no_signature_and_a_signed_parent_still_fits(
    measured, key, edit, tmp_path
):
    sign()
    out = tmp_path / "soup"
    mlflow_soup.merge_checkpoints([f"models:/{MODEL}/1", SOUP.uri], (0.5, 0.5), out, digests=True)
    assert not (out / "model.sig").exists()
    assert "model.sig" not in json.loads((out / "soup_manifest.json").read_text())["inherited"]
    assert signature_of(key, str(out)).verdict == "missing"
    # of the soup's own parents
    path = folder_of(measured, Version(MODEL, 2)) / "model.sig"
    edit(path, b"whatever")
    assert {finding.verdict for finding in mlflow_soup.verify(SOUP.uri)} == {"ok"}


def test_files_that_change_between_verdict_and_signature_are_not_signed(
    measured, key, edit, monkeypatch
):
    folder = folder_of(measured, SOUP)
    manifest = folder / "soup_manifest.json"
    judge = release._decide
    for path in (folder / "model.safetensors", folder / "config.json", manifest):

        def judge_and_swap(*request, path=path):
            decision = judge(*request)
            content = path.read_bytes()
            at = content.index(b"0")
            edit(path, content[:at] + b"1" + content[at + 1 :])
            return decision

        monkeypatch.setattr(release, "_decide", judge_and_swap)
        before = path.read_bytes()
        with pytest.raises((errors.MismatchError, errors.ParentError)):
            sign()
        path.write_bytes(before)
        assert not (folder / "model.sig").exists()


def test_a_file_joins_the_tree_that_a_version_shows(client, tmp_path):
    with mlflow.start_run() as run:
        mlflow.log_text("weights", "artifacts/hf/weights.txt")
    run_id, root = run.info.run_id, run.info.artifact_uri
    mine = {"run_id": run_id}
    sources = {
        f"runs:/{run_id}/artifacts/hf": Tree(run_id=run_id, folder="artifacts/hf"),
        f"{root}/artifacts": Tree(run_id=run_id, folder="artifacts"),
        f"models:/{MODEL}/1": Tree(model_id=model_id(client, Version(MODEL, 1))),
    }
    file = tmp_path / "signature.txt"
    for number, (source, tree) in enumerate(sources.items()):
        created = client.create_model_version(MODEL, source, **mine)
        version = Version(MODEL, int(created.version))
        assert tree_of(client, version) == tree
        if tree.run_id:
            for content in (f"{number}", f"{number}, again"):
                file.write_text(content)
                trees.add_file(client, tree, file)
                assert trees.read_file(client, version, file.name) == content.encode()
    created = client.create_model_version(MODEL, "s3://bucket/checkpoint")
    with pytest.raises(errors.SpecError, match="neither a logged model nor a folder of a run"):
        tree_of(client, Version(MODEL, int(created.version)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["client", pytest.param("server_client", marks=pytest.mark.slow)])
def test_a_soup_of_mlflows_own_flavour_keeps_its_signature(
    request, store, checkpoints, tasks, key, tmp_path
):
    request.getfixturevalue(store)
    for folder in checkpoints[:2]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config._name_or_path = model.name_or_path = ""
        mlflow.transformers.log_model(
            {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)},
            name="checkpoint",
            task="text-generation",
            registered_model_name="flavoured-and-signed",
            pip_requirements=["transformers"],
        )
    common = {"ood_tasks": "toy_digits", "include_path": str(tasks), "margin": 0.05}
    outcome = mlflow_soup.run(
        Spec(
            model="flavoured-and-signed", pair="v1,v2", method="uniform", tasks="toy_letters",
            **common,
        )
    )  # fmt: skip
    soup = outcome.soup.version
    release.sign(Spec(model=soup.name, version=f"v{soup.number}", public_key=key, **common))
    for target in ("first", "second"):
        into = shutil.copytree(
            mlflow.artifacts.download_artifacts(soup.uri, dst_path=str(tmp_path / target)),
            tmp_path / f"{target} elsewhere",
        )
        assert (into / "registered_model_meta").exists()
        assert anybodys_check(key, into)
    assert signature_of(key, soup.uri).verdict == "ok"
    mlflow.pyfunc.load_model(soup.uri)
    assert signature_of(key, soup.uri).verdict == "ok"
