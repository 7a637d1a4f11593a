import hashlib
import json
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import strategies as s
import toy
from mlflow_soup.errors import ParentError
from mlflow_soup.weights.checkpoint import SINGLE
from mlflow_soup.weights.digests import digest, digest_all
from mlflow_soup.weights.find import find_checkpoint

TENSORS = {
    "half": torch.tensor([[1.0, -0.0, 3.0]], dtype=torch.float16),
    "brain": torch.tensor([0.1, 2e38], dtype=torch.bfloat16),
    "single": torch.tensor(2.5),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "mask": torch.tensor([True, False, True]),
    "steps": torch.tensor([7], dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


def by_the_formula(folder):
    """The canonical digest of one file, by the formula in the module's docstring."""
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    lines = []
    for name, info in header.items():
        begin, end = info["data_offsets"]
        row = [name, info["dtype"], info["shape"], hashlib.sha256(data[begin:end]).hexdigest()]
        lines.append(json.dumps(row))
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def sha256sum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_canonical_digest_follows_its_formula(checkpoints, tmp_path):
    for folder in (checkpoints[0], toy.bare(tmp_path / "bare", TENSORS)):
        found = find_checkpoint(folder, "v1")
        assert digest(found) == digest_all(found).canonical == by_the_formula(folder)


def test_a_known_digest(tmp_path):
    # echo -n '["w", "F32", [1], "'$(printf '\0\0\x80\x3f' | sha256sum | cut -c-64)'"]' | sha256sum
    folder = toy.bare(tmp_path / "bare", {"w": torch.tensor([1.0])})
    assert digest(find_checkpoint(folder, "v1")) == (
        "sha256:40d4b84bf3e253d4a8147dc9127a869ceed9cc333ed56fdf3ac2bfb3e1356a73"
    )


def test_each_tensor_and_each_file_has_its_own_digest(tmp_path):
    folder = toy.shard(toy.bare(tmp_path / "bare", TENSORS))
    found = digest_all(find_checkpoint(folder, "v1"))
    assert found.files == {path.name: sha256sum(path) for path in folder.glob("*.safetensors")}
    assert len(found.files) == 2
    assert found.tensors == {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in TENSORS.items()
    }


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum here")
def test_the_digest_of_a_file_is_what_sha256sum_prints(checkpoints):
    printed = subprocess.run(
        ["sha256sum", checkpoints[0] / SINGLE], capture_output=True, text=True, check=True
    )
    assert (
        printed.stdout.split()[0] == digest_all(find_checkpoint(checkpoints[0], "v1")).files[SINGLE]
    )


def test_the_digest_does_not_depend_on_sharding(checkpoints, folder):
    whole, sharded = (
        digest_all(find_checkpoint(at, "v1")) for at in (checkpoints[0], toy.shard(folder))
    )
    assert (whole.canonical, whole.tensors) == (sharded.canonical, sharded.tensors)
    assert set(whole.files) != set(sharded.files)


@given(order=st.permutations(sorted(TENSORS)))
@s.FEW
def test_the_digest_does_not_depend_on_the_order_of_tensors(order, tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    folders = [
        toy.bare(root / "one", TENSORS),
        toy.bare(root / "two", {name: TENSORS[name] for name in order}),
    ]
    first, second = (digest_all(find_checkpoint(folder, "v1")) for folder in folders)
    assert (first.canonical, first.tensors) == (second.canonical, second.tensors)


def test_every_flipped_bit_changes_the_digest(tmp_path):
    folder = toy.bare(tmp_path / "bare", {name: TENSORS[name] for name in ("half", "single")})
    path = folder / SINGLE
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    seen = {digest_all(find_checkpoint(folder, "v1")).canonical}
    flips = [(byte, bit) for byte in range(begin, len(content)) for bit in range(8)]
    for byte, bit in flips:
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        seen.add(digest_all(find_checkpoint(folder, "v1")).canonical)
    assert len(flips) == 8 * (3 * 2 + 4)
    assert len(seen) == 1 + len(flips)


@pytest.mark.parametrize(
    "changes",
    [
        {"single": None, "renamed": TENSORS["single"]},
        {"half": TENSORS["half"].reshape(3, 1)},
        {"half": TENSORS["half"].view(torch.bfloat16)},
        {"mask": TENSORS["mask"].view(torch.uint8)},
        {"steps": None},
        {"more": torch.zeros(0, 2)},
        {"empty": torch.zeros(4, 0)},
    ],
    ids=["name", "shape", "dtype", "kind", "missing", "extra", "empty shape"],
)
def test_another_name_shape_dtype_or_set_of_tensors_changes_the_digest(tmp_path, changes):
    tensors = {n: t for n, t in (TENSORS | changes).items() if t is not None}
    folders = [toy.bare(tmp_path / "one", TENSORS), toy.bare(tmp_path / "two", tensors)]
    first, second = (digest_all(find_checkpoint(folder, "v1")).canonical for folder in folders)
    assert first != second


@pytest.mark.parametrize("dtype", ["half", "brain", "single", "double"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    spoilt = TENSORS[dtype].clone().reshape(-1)
    spoilt[-1] = value
    found = find_checkpoint(toy.bare(tmp_path / "bare", TENSORS | {dtype: spoilt}), "models:/toy/1")
    with pytest.raises(ParentError, match=rf"'{dtype}' of models:/toy/1 holds NaN or inf"):
        digest(found)
    assert digest_all(found).tensors.keys() == TENSORS.keys()  # digest_all does not refuse it


def test_old_pythias_infinite_mask_is_accepted(checkpoints, folder):
    name = "gpt_neox.layers.0.attention.masked_bias"
    infinite = torch.tensor(-float("inf"), dtype=torch.float16)
    toy.edit_tensors(folder, **{name: infinite})
    assert digest(find_checkpoint(folder, "v1")) == by_the_formula(folder)
    toy.edit_tensors(folder, **{name: None})
    assert digest(find_checkpoint(folder, "v1")) == digest(find_checkpoint(checkpoints[0], "v1"))


def test_the_smallest_step_of_one_value_changes_the_digest(checkpoints, folder):
    name = "gpt_neox.final_layer_norm.bias"
    bias = load_file(folder / SINGLE)[name]
    bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
    toy.edit_tensors(folder, **{name: bias})
    assert digest(find_checkpoint(folder, "changed")) != digest(
        find_checkpoint(checkpoints[0], "v1")
    )
