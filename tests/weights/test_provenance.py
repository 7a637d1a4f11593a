"""Soups with a manifest, and `verify`, which checks a soup against it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mlflow_soup
import toy
from conftest import MODEL, register
from mlflow_soup import errors
from mlflow_soup.weights.digests import digest_all
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import MANIFEST, parse_manifest
from mlflow_soup.workflows import release
from mlflow_soup.workflows.merge import fetch

WEIGHTS = "model.safetensors"


@pytest.fixture
def folders(checkpoints, tmp_path):
    """The folders of two checkpoints that a test may spoil."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in checkpoints[:2]]


def flip(path: Path, name: str, element: int, bit: int = 0) -> None:
    """Flip one bit of one element of a tensor in a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    info = json.loads(content[8 : 8 + length])[name]
    size = {"F32": 4, "BF16": 2, "F16": 2}[info["dtype"]]
    at = 8 + length + info["data_offsets"][0] + element * size + bit // 8
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ (1 << bit % 8)]))


def failures(findings):
    return {f.what: "; ".join(f.details) for f in findings if not f.holds}


def test_folders_are_merged_with_given_weights(folders, tmp_path):
    manifest = mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    old, new = (load_file(folder / WEIGHTS) for folder in folders)
    made = load_file(tmp_path / "soup" / WEIGHTS)
    for name in old:
        expected = old[name].numpy() * np.float32(0.3) + new[name].numpy() * np.float32(0.7)
        if torch.equal(old[name], new[name]):
            expected = old[name].numpy()
        np.testing.assert_array_equal(made[name].numpy(), expected)
    assert [source.uri for source in manifest.sources] == [str(folder) for folder in folders]
    written = json.loads((tmp_path / "soup" / MANIFEST).read_text())
    assert parse_manifest(written) == manifest
    assert [p["lambda"] for p in written["parents"]] == [(0.3).hex(), (0.7).hex()]
    assert written["digest"] is None


def test_four_parents_are_merged_like_two(checkpoints, tmp_path):
    parents = [*checkpoints, checkpoints[0]]
    lam = (0.1, 0.2, 0.3, 0.4)
    mlflow_soup.merge_checkpoints(parents, lam, tmp_path / "soup")
    tensors = [load_file(folder / WEIGHTS)["gpt_neox.embed_in.weight"] for folder in parents]
    total = tensors[0].numpy() * np.float32(lam[0])
    for tensor, weight in zip(tensors[1:], lam[1:], strict=True):
        total = total + tensor.numpy() * np.float32(weight)
    made = load_file(tmp_path / "soup" / WEIGHTS)["gpt_neox.embed_in.weight"]
    np.testing.assert_array_equal(made.numpy(), total)


def test_digests_are_those_of_the_files(folders, tmp_path):
    manifest = mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup", digests=True)
    assert manifest.digests == digest_all(find_checkpoint(tmp_path / "soup", "soup"))
    for source, folder in zip(manifest.sources, folders, strict=True):
        assert source.digests == digest_all(find_checkpoint(folder, "parent"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.3, 0.3], "sum to 0.6"),
        ([1.0], "2 parents need 2 weights, not 1"),
        ([0.2, 0.3, 0.5], "2 parents need 2 weights, not 3"),
        ([-0.5, 1.5], "not between 0 and 1"),
        ([float("nan"), 1.0], "not between 0 and 1"),
        ([float("inf"), -float("inf")], "not between 0 and 1"),
        ([1e308, 1e308], "not between 0 and 1"),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_touched(folders, tmp_path, weights, words):
    with pytest.raises(errors.SpecError, match=words) as refusal:
        mlflow_soup.merge_checkpoints(folders, weights, tmp_path / "soup")
    assert refusal.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "v2"}


def test_the_fix_for_wrong_weights_shows_right_ones(folders, tmp_path):
    with pytest.raises(errors.SpecError, match=r"0\.25,0\.75"):
        mlflow_soup.merge_checkpoints(folders, [0.1, 0.3], tmp_path / "soup")


def test_one_parent_as_a_string_is_not_taken_for_a_list_of_letters(folders, tmp_path):
    with pytest.raises(errors.SpecError, match="a list of at least two"):
        mlflow_soup.merge_checkpoints(str(folders[0]), [1.0], tmp_path / "soup")


@pytest.mark.parametrize("uri", ["s3://bucket/12", "runs:/0a/model", "model:/toy/1", "file:///tmp"])
def test_a_uri_that_is_not_a_registered_version_is_not_taken_for_a_folder(folders, tmp_path, uri):
    with pytest.raises(errors.SpecError, match="neither a folder nor a registered version"):
        mlflow_soup.merge_checkpoints([folders[0], uri], [0.5, 0.5], tmp_path / "soup")
    with pytest.raises(errors.SpecError, match="is not a folder"):
        mlflow_soup.merge_checkpoints(folders, [0.5, 0.5], uri)


def test_a_disk_that_is_full_at_any_step_is_reported(folders, mount):
    codes = set()
    for kilobytes in range(60, 400, 4):  # full at the weights, config, manifest or card
        full = mount("tmpfs", f"size={kilobytes}k")
        try:
            mlflow_soup.merge_checkpoints(folders, [0.5, 0.5], full / "soup", digests=True)
        except errors.StoreError as error:
            codes.add(error.exit_code)
            left = list(full.iterdir())
        else:
            break
        assert left == []
    assert codes == {6}
    assert 100 < kilobytes < 396


def test_a_merge_of_one_parent_is_refused(folders, tmp_path):
    with pytest.raises(errors.SpecError, match="two parents"):
        mlflow_soup.merge_checkpoints(folders[:1], [1.0], tmp_path / "soup")


def test_a_missing_folder_is_a_missing_parent(folders, tmp_path):
    with pytest.raises(errors.ParentError, match="no folder") as refusal:
        mlflow_soup.merge_checkpoints([folders[0], tmp_path / "v9"], [0.5, 0.5], tmp_path / "soup")
    assert refusal.value.exit_code == 4


def test_an_existing_folder_is_not_overwritten(folders, tmp_path):
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.SpecError, match="exists already"):
        mlflow_soup.merge_checkpoints(folders, [0.5, 0.5], tmp_path / "soup")
    assert (tmp_path / "soup" / "thesis.tex").read_text() == "years of work"


def test_a_parent_is_not_written_into(folders):
    before = sorted(folders[1].iterdir())
    with pytest.raises(errors.SpecError, match="inside the folder of parent"):
        mlflow_soup.merge_checkpoints(folders, [0.5, 0.5], folders[1] / "soup")
    assert sorted(folders[1].iterdir()) == before


def test_unlike_parents_leave_nothing_behind(folders, tmp_path):
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(errors.ParentError, match="hidden_act is 'relu' against"):
        mlflow_soup.merge_checkpoints(folders, [0.5, 0.5], tmp_path / "soup")
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "v2"}


def test_registered_versions_are_merged_by_their_uris(client, checkpoints, tmp_path):
    client.set_registered_model_alias(MODEL, "newest", "2")
    manifest = mlflow_soup.merge_checkpoints(
        [f"models:/{MODEL}/1", f"models:/{MODEL}@newest"], [0.5, 0.5], tmp_path / "soup"
    )
    # the alias is resolved now, because it may have moved when the soup is verified
    assert [s.uri for s in manifest.sources] == [f"models:/{MODEL}/1", f"models:/{MODEL}/2"]
    assert manifest.sources[0].location
    mlflow_soup.merge_checkpoints(checkpoints[:2], [0.5, 0.5], tmp_path / "same")
    assert (tmp_path / "soup" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()


def test_a_merged_folder_verifies(folders, tmp_path):
    for digests in (False, True):
        out = tmp_path / f"soup {digests}"
        mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], out, digests=digests)
        findings = list(mlflow_soup.verify(out))
        assert not failures(findings)
        assert [f.what for f in findings][-1] == "merged again"
        assert {f.verdict for f in findings} == ({"ok", "skipped"} if not digests else {"ok"}) | {
            "skipped"  # the tags: a folder has none
        }


@pytest.fixture(scope="module")
def large(tmp_path_factory, checkpoints):
    """Two parents of 100 MB in BF16, and their soup."""
    root = tmp_path_factory.mktemp("large")
    for i in (1, 2):
        folder = shutil.copytree(checkpoints[0], root / f"v{i}")
        generator = torch.Generator().manual_seed(i)
        content = {
            f"layers.{n}.weight": torch.randn(500, 10_000, generator=generator).bfloat16()
            for n in range(10)
        }
        save_file(content, folder / WEIGHTS, {"format": "pt"})
    parents = [root / "v1", root / "v2"]
    mlflow_soup.merge_checkpoints(parents, [0.3, 0.7], root / "soup", digests=True)
    mlflow_soup.merge_checkpoints(parents, [0.3, 0.7], root / "plain")
    return root


@pytest.mark.parametrize("where", ["soup", "plain"])
def test_one_flipped_bit_in_a_soup_of_100_megabytes_is_found_and_named(large, where):
    assert (large / where / WEIGHTS).stat().st_size > 100e6
    place = ("layers.7.weight", 123_456, 3)
    flip(large / where / WEIGHTS, *place)
    try:
        found = failures(mlflow_soup.verify(str(large / where)))
    finally:
        flip(large / where / WEIGHTS, *place)
    assert "layers.7.weight[12, 3456] is 0x" in found["merged again"]
    assert "(1 element of this tensor differ" in found["merged again"]
    if where == "soup":
        assert found["soup"] == "layers.7.weight is changed"
        assert set(found) == {"soup", "merged again"}


def test_one_flipped_bit_in_a_parent_is_found_and_named(large):
    place = ("layers.2.weight", 4_999_999, 14)
    flip(large / "v1" / WEIGHTS, *place)
    try:
        found = failures(mlflow_soup.verify(str(large / "soup")))
    finally:
        flip(large / "v1" / WEIGHTS, *place)
    assert found[f"parent {large / 'v1'}"] == "layers.2.weight is changed"
    assert "layers.2.weight[499, 9999] is 0x" in found["merged again"]
    assert set(found) == {f"parent {large / 'v1'}", "merged again"}


def test_a_flipped_bit_in_a_header_is_found(folders, tmp_path):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup", digests=True)
    for folder in (tmp_path / "soup", folders[0]):
        before = (folder / WEIGHTS).read_bytes()
        # the metadata of a parent may change, those of a soup may not
        metadata = [before.index(b'"pt"') + 1] if folder.name == "soup" else []
        for at in (*metadata, 0, before.index(b"embed_in"), before.index(b'"dtype":"F32"') + 9):
            (folder / WEIGHTS).write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            assert failures(mlflow_soup.verify(str(tmp_path / "soup"))), at
        (folder / WEIGHTS).write_bytes(before)
    assert not failures(mlflow_soup.verify(str(tmp_path / "soup")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("config.json", "config.json is changed"),
        ("tokenizer.json", "tokenizer.json is changed"),
        ("evil.py", "evil.py is new"),
        ("code/extra.safetensors", "code/extra.safetensors is new"),
        ("generation_config.json", "generation_config.json is missing"),
    ],
)
def test_files_other_than_the_weights_are_checked_too(folders, tmp_path, change, words):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    path = tmp_path / "soup" / change
    if change.startswith("generation"):
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "\n")
    found = failures(mlflow_soup.verify(str(tmp_path / "soup")))
    assert found.pop("other files") == words
    theirs = found.pop("inherited files", None)  # a file that is missing is only missed once
    assert (theirs is None) == words.endswith("missing")
    assert not found


def test_a_config_that_its_manifest_vouches_for_must_be_the_parents_too(folders, tmp_path):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    config, manifest = tmp_path / "soup" / "config.json", tmp_path / "soup" / MANIFEST
    config.write_text(config.read_text() + "\n")
    content = json.loads(manifest.read_text())
    content["inherited"]["config.json"] = hashlib.sha256(config.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    found = failures(mlflow_soup.verify(str(tmp_path / "soup")))
    assert found == {"inherited files": "config.json is unlike that of the newest parent"}


def test_a_soup_that_inherited_more_still_matches_its_manifest(folders, tmp_path):
    # soups of 0.1.0 took all files but those of a list
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    manifest = tmp_path / "soup" / MANIFEST
    content = json.loads(manifest.read_text())
    for name in ("train.log", "runs/1/events.out", "checkpoint-500/config.json"):
        for root in (folders[-1], tmp_path / "soup"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("{}")
        content["inherited"][name] = hashlib.sha256(b"{}").hexdigest()
    manifest.write_text(json.dumps(content))
    assert not failures(mlflow_soup.verify(str(tmp_path / "soup")))
    (tmp_path / "soup" / "train.log").write_text("no")
    found = failures(mlflow_soup.verify(str(tmp_path / "soup")))
    assert found["other files"] == "train.log is changed"


def test_resharding_a_parent_is_not_a_mismatch(folders, tmp_path):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup", digests=True)
    content = load_file(folders[0] / WEIGHTS)
    save_file(dict(reversed(content.items())), folders[0] / WEIGHTS, {"format": "pt", "by": "us"})
    findings = list(mlflow_soup.verify(str(tmp_path / "soup")))
    assert not failures(findings)
    assert any("in other files than recorded" in f.details[0] for f in findings)


def test_a_checkpoint_that_is_not_a_soup_cannot_be_verified(checkpoints):
    with pytest.raises(errors.SpecError, match=r"is not a soup.*soup_manifest"):
        list(mlflow_soup.verify(checkpoints[0]))


@pytest.mark.parametrize(
    "change",
    [
        *("{", "[]", {"inherited": [[1, 2]]}, {"versions": {"torch": 2}}, {"schema": 99}),
        *({"parents": []}, {"method": "slerp"}, {"kernel": "lerp"}),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_a_mismatch(folders, tmp_path, change):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    path = tmp_path / "soup" / MANIFEST
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(errors.MismatchError, match="cannot be read") as refusal:
        list(mlflow_soup.verify(tmp_path / "soup"))
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("lam", ["0x1p99999", "abc", "-0x1p-1", "nan", "half"])
def test_a_wrong_weight_in_the_manifest_is_a_mismatch(folders, tmp_path, lam):
    mlflow_soup.merge_checkpoints(folders, [0.3, 0.7], tmp_path / "soup")
    path = tmp_path / "soup" / MANIFEST
    content = json.loads(path.read_text())
    content["parents"][0]["lambda"] = lam
    path.write_text(json.dumps(content))
    with pytest.raises(errors.MismatchError, match="cannot be read"):
        list(mlflow_soup.verify(tmp_path / "soup"))


def test_the_name_of_a_tensor_cannot_forge_a_line_of_verify(checkpoints, tmp_path):
    forged = "w\nok        merged again: gives its bytes"
    for number in (1, 2):
        folder = toy.bare(tmp_path / f"v{number}", {forged: torch.ones(2) * number})
        with pytest.raises(errors.ParentError, match="name cannot be printed") as refusal:
            find_checkpoint(folder, "v")
        assert "\nok " not in str(refusal.value)


def test_many_shards_do_not_use_up_the_file_descriptors(tmp_path, checkpoints):
    folders = []
    for number in (1, 2):
        content = {f"t{i}": torch.full((4,), float(number)) for i in range(40)}
        folder = toy.shard(toy.bare(tmp_path / f"v{number}", content))
        folders.append(find_checkpoint(folder, folder.name, with_tokenizer=False))
    before = len(os.listdir("/proc/self/fd"))
    kept = [dict(checkpoint.read()) for checkpoint in folders for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) - before == 4  # two parents of two shards
    del kept


def test_a_registered_soup_verifies(client, outcome):
    findings = list(mlflow_soup.verify(f"models:/{MODEL}/4"))
    assert not failures(findings)
    assert [f.what for f in findings] == [
        "tags",
        "other files",
        "soup",
        f"parent models:/{MODEL}/1",
        f"parent models:/{MODEL}/2",
        "inherited files",
        "flavours",
        "merged again",
    ]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}/4"))
    manifest = parse_manifest(json.loads((folder / MANIFEST).read_text()))
    assert manifest.digests.canonical == outcome.soup.digest
    assert manifest.search["run_id"]
    assert len(manifest.search["held_out"]) == len(outcome.trials)
    assert manifest.search["evaluator"]
    assert manifest.versions["torch"] == torch.__version__


def test_the_copy_of_a_soup_in_another_model_verifies(client, outcome, tasks):
    own = {"tasks": "toy_letters", "ood_tasks": "toy_digits", "include_path": str(tasks)}
    release.promote(mlflow_soup.Spec(version="v4", promote="model:prod@live", **own))
    assert not failures(mlflow_soup.verify("models:/prod@live"))


@pytest.mark.parametrize(
    ("tag", "value"),
    [("soup.lambda", "0.99"), ("soup.parents", "1,3"), ("soup.parents", "?"), ("soup.digest", "x")],
)
def test_tags_that_differ_from_the_manifest_are_a_mismatch(client, outcome, tag, value):
    client.set_model_version_tag(MODEL, "4", tag, value)
    found = failures(mlflow_soup.verify(f"models:/{MODEL}/4"))
    assert set(found) == {"tags"}
    assert tag in found["tags"]


def test_a_deleted_soup_is_missing(client, outcome):
    client.delete_model_version(MODEL, "4")
    with pytest.raises(errors.ParentError, match="has no v4") as refusal:
        list(mlflow_soup.verify(f"models:/{MODEL}/4"))
    assert refusal.value.exit_code == 4


def test_a_deleted_parent_is_missing_and_the_rest_is_still_checked(client, outcome):
    client.delete_model_version(MODEL, "1")
    client.set_model_version_tag(MODEL, "4", "soup.lambda", "0.99")
    verdicts = {f.what: f.verdict for f in mlflow_soup.verify(f"models:/{MODEL}/4")}
    assert verdicts == {
        "tags": "MISMATCH",
        "other files": "ok",
        "soup": "ok",
        f"parent models:/{MODEL}/1": "missing",
        f"parent models:/{MODEL}/2": "ok",
        "merged again": "skipped",
    }


def test_a_merged_folder_verifies_once_it_is_registered(client, tmp_path):
    parents = [f"models:/{MODEL}/{number}" for number in (1, 2, 3)]
    mlflow_soup.merge_checkpoints(parents, [0.2, 0.3, 0.5], tmp_path / "soup")
    assert register(client, tmp_path / "soup") == 4
    verdicts = {f.what: f.verdict for f in mlflow_soup.verify(f"models:/{MODEL}/4")}
    assert verdicts["tags"] == verdicts["soup"] == "skipped"
    assert verdicts["other files"] == verdicts["merged again"] == "ok"


def test_a_registered_manifest_cannot_make_verify_read_a_local_folder(client, folders, tmp_path):
    mlflow_soup.merge_checkpoints(folders, [0.2, 0.8], tmp_path / "soup")
    register(client, tmp_path / "soup")
    findings = {f.what: f for f in mlflow_soup.verify(f"models:/{MODEL}/4")}
    assert findings[f"parent {folders[0]}"].verdict == "missing"
    assert "a local folder of the machine" in findings[f"parent {folders[0]}"].details[0]
    assert findings["merged again"].verdict == "skipped"


def test_the_mlflow_flavours_of_a_soup_are_checked_too(client, checkpoints, tmp_path):
    for number, folder in enumerate(checkpoints[:2], start=4):
        flavoured = shutil.copytree(folder, tmp_path / f"flavoured {number}")
        flavour = {
            "flavors": {"transformers": {"task": "text-generation"}},
            "model_id": str(number),
        }
        (flavoured / "MLmodel").write_text(yaml.safe_dump(flavour))
        assert register(client, flavoured) == number
    parents = [f"models:/{MODEL}/4", f"models:/{MODEL}/5"]
    mlflow_soup.merge_checkpoints(parents, [0.5, 0.5], tmp_path / "soup")
    assert not failures(mlflow_soup.verify(tmp_path / "soup"))
    path = tmp_path / "soup" / "MLmodel"
    path.write_text(path.read_text().replace("model_id: '5'", "model_id: mine"))
    assert not failures(mlflow_soup.verify(tmp_path / "soup"))
    path.write_text(path.read_text().replace("text-generation", "evil"))
    assert failures(mlflow_soup.verify(tmp_path / "soup")) == {"flavours": "flavors of MLmodel"}


def test_a_parent_that_is_trained_further_in_its_folder_is_a_mismatch(client, tmp_path):
    folders = []
    for seed in (1, 2):
        folder = toy.save(toy.noisy(toy.train(1), seed, 0.1), tmp_path / f"train-{seed}")
        register(client, folder)
        folders.append(folder)
    mlflow_soup.merge_checkpoints(
        [f"models:/{MODEL}/4", f"models:/{MODEL}/5"], [0.5, 0.5], tmp_path / "soup", digests=True
    )
    location = Path(fetch(f"models:/{MODEL}/4", "").folder)
    shutil.copy(folders[1] / WEIGHTS, location / WEIGHTS)
    found = failures(mlflow_soup.verify(str(tmp_path / "soup")))
    assert set(found) == {f"parent models:/{MODEL}/4", "merged again"}
