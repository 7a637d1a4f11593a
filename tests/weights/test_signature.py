"""Signing a folder: every file counts, only the key counts, and anybody can check it."""

import base64
import builtins
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from model_signing import hashing, signing, verifying

from conftest import make_keys
from mlflow_soup import errors
from mlflow_soup.files.signing import open_verifier
from mlflow_soup.weights.signature import check_tree, open_tree_signer, sign_tree


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "model.safetensors").write_bytes(b"weights")
    (folder / "soup_manifest.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    return folder


@pytest.fixture
def signed(tree, keys, monkeypatch):
    """The folder, signed; and the verifier of its key."""
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(keys[0]))
    (tree / "model.sig").write_bytes(sign_tree(tree, open_tree_signer()))
    return tree, open_verifier([keys[1]])


def anybodys_check(folder, public, *options):
    command = [sys.executable, "-m", "model_signing", "verify", "key", *options]
    command += ["--public_key", public, "--signature", folder / "model.sig", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_signed_folder_holds_wherever_it_lies(signed, tmp_path):
    folder, verifier = signed
    assert check_tree(folder, verifier).wrong == ()
    elsewhere = folder.rename(tmp_path / "elsewhere")
    (elsewhere / "registered_model_meta").write_text("model_name: toy-llm")  # as MLflow does
    checked = check_tree(elsewhere, verifier)
    assert checked.wrong == ()
    assert set(checked.digests) == {
        *("hf/model.safetensors", "soup_manifest.json", ".gitattributes")
    }
    assert checked.key == open_tree_signer().name


def test_anybody_can_check_it_with_the_tool_of_model_signing(signed, keys):
    folder, _ = signed
    (folder / "registered_model_meta").write_text("model_name: toy-llm")
    # by itself it leaves out the files of git, of which a soup has none
    assert "Missing files" in anybodys_check(folder, keys[1]).stderr
    assert anybodys_check(folder, keys[1], "--no-ignore-git-paths").returncode == 0
    (folder / "hf" / "model.safetensors").write_bytes(b"others")
    assert anybodys_check(folder, keys[1], "--no-ignore-git-paths").returncode == 1


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_each_curve_of_model_signing_signs(tree, tmp_path, monkeypatch, curve):
    private, public = make_keys(tmp_path, "key", ec.generate_private_key(curve))
    monkeypatch.setenv("MLFLOW_SOUP_KEY", private.read_text())  # the text itself
    (tree / "model.sig").write_bytes(sign_tree(tree, open_tree_signer()))
    others = open_verifier([make_keys(tmp_path, "other")[1]])
    assert check_tree(tree, others).wrong == ("no key of --public-key made model.sig",)
    both = open_verifier([make_keys(tmp_path, "other")[1], public])
    assert check_tree(tree, both).wrong == ()


def changed(folder):
    (folder / "hf" / "model.safetensors").write_bytes(b"others")


def added(folder):
    (folder / "hf" / "new.txt").touch()


def added_to_git(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "hook").touch()


def added_to_what_mlflow_adds(folder):
    (folder / "registered_model_meta").mkdir()
    (folder / "registered_model_meta" / "code.py").touch()


def missing(folder):
    (folder / "soup_manifest.json").unlink()


def a_link(folder):
    (folder / "hf" / "passwd").symlink_to("/etc/passwd")


def a_pipe(folder):
    os.mkfifo(folder / "hf" / "pipe")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed, "hf/model.safetensors is changed"),
        (added, "hf/new.txt is unsigned"),
        (added_to_git, ".git/hook is unsigned"),
        (added_to_what_mlflow_adds, "registered_model_meta/code.py is unsigned"),
        (missing, "soup_manifest.json is missing"),
        (a_link, "hf/passwd is not a plain file"),
        (a_pipe, "hf/pipe is not a plain file"),
    ],
)
def test_whatever_changes_is_found_and_named(signed, change, words):
    folder, verifier = signed
    change(folder)
    assert check_tree(folder, verifier).wrong == (words,)


def rewritten(folder, change):
    bundle = json.loads((folder / "model.sig").read_text())
    (folder / "model.sig").write_text(json.dumps(change(bundle) or bundle))


def another_statement(bundle):
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"].pop()
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    bundle["dsseEnvelope"]["payload"] = payload


def two_envelopes(bundle):
    """Ours says what the files are now, and the other one is the one that was signed."""
    bundle["dsse_envelope"] = dict(bundle["dsseEnvelope"])
    another_statement(bundle)


def no_signature(bundle):
    bundle["dsseEnvelope"]["signatures"] = []


def a_list(bundle):
    return [bundle]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_statement, "no key of --public-key made"),
        (two_envelopes, "it has a field 'dsse_envelope'"),
        (no_signature, "no key of --public-key made"),
        (a_list, "is no signature"),
        (lambda bundle: "text", "is no signature"),
        (lambda bundle: {"dsseEnvelope": {"payload": "*"}}, "is no signature"),
        (lambda bundle: {"dsseEnvelope": {"payload": ""}}, "no key of --public-key made"),
    ],
)
def test_a_forged_signature_does_not_hold(signed, change, words):
    folder, verifier = signed
    rewritten(folder, change)
    (wrong,) = check_tree(folder, verifier).wrong
    assert words in wrong


def test_a_signature_that_is_a_link_or_no_json_does_not_hold(signed, tmp_path):
    folder, verifier = signed
    (folder / "model.sig").rename(tmp_path / "model.sig")
    assert check_tree(folder, verifier) is None
    (folder / "model.sig").symlink_to(tmp_path / "model.sig")
    assert "it is a link" in check_tree(folder, verifier).wrong[0]
    (folder / "model.sig").unlink()
    (folder / "model.sig").write_bytes(b"\x00" * 100)
    assert "is no signature" in check_tree(folder, verifier).wrong[0]


def test_a_signature_by_the_key_that_leaves_files_out_does_not_hold(tree, keys):
    ignoring = hashing.Config().set_ignored_paths(paths=[tree / "hf", tree / "model.sig"])
    config = signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(ignoring).sign(tree, tree / "model.sig")
    verifying.Config().use_elliptic_key_verifier(public_key=keys[1]).verify(
        tree, tree / "model.sig"
    )
    wrong = check_tree(tree, open_verifier([keys[1]])).wrong
    assert wrong == (".gitattributes is unsigned", "hf/model.safetensors is unsigned")


def encrypted(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(b"secret")
    pkcs8 = serialization.PrivateFormat.PKCS8
    path = tmp_path / "locked.pem"
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, locked))
    return str(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: "", "there is no key to sign with"),
        (lambda path: str(path / "absent.pem"), "no private key can be read"),
        (encrypted, "no private key can be read"),
        (
            lambda path: str(make_keys(path, "rsa", rsa.generate_private_key(65537, 2048))[0]),
            "the key is a RSAPrivateKey",
        ),
        (
            lambda path: str(make_keys(path, "ed", ed25519.Ed25519PrivateKey.generate())[0]),
            "the key is a Ed25519PrivateKey",
        ),
        (
            lambda path: str(make_keys(path, "k1", ec.generate_private_key(ec.SECP256K1()))[0]),
            "on the curve secp256k1",
        ),
    ],
)
def test_a_key_that_cannot_sign_a_folder_is_refused(tmp_path, monkeypatch, make, words):
    monkeypatch.setenv("MLFLOW_SOUP_KEY", make(tmp_path))
    with pytest.raises(errors.SpecError, match=words) as caught:
        open_tree_signer()
    assert "openssl ecparam" in caught.value.fix


def test_a_link_is_not_signed(tree, keys, monkeypatch):
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(keys[0]))
    a_link(tree)
    with pytest.raises(errors.MismatchError, match="hf/passwd is not a plain file"):
        sign_tree(tree, open_tree_signer())


def test_without_the_extra_the_error_says_how_to_install_it(tree, keys, monkeypatch):
    monkeypatch.setenv("MLFLOW_SOUP_KEY", str(keys[0]))
    real = builtins.__import__

    def without(name, *more):
        if name.startswith("model_signing"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.SpecError, match="not installed") as caught:
        open_tree_signer()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["sign"]
    assert shlex.split(caught.value.fix) == ["pip", "install", *extra]
    with pytest.raises(errors.SpecError, match="not installed"):
        check_tree(tree, open_verifier([keys[1]]))
