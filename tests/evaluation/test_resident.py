"""Parents on the model's device. Here it is the CPU; `benchmarks/device.py` needs a GPU."""

from dataclasses import replace

import pytest
import torch
from test_live import FAMILIES, edit_all, save_pair

import toy
from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.evaluation import resident
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.mix import Scratch, add_up, bits, same_bytes

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHARES = (0.0, 0.3, 0.5, 0.7123, 1.0)


def opened(folders):
    return [find_checkpoint(folder, folder.name) for folder in folders]


def save_several(family, dtype, root, count):
    folders = []
    for seed in range(count):
        torch.manual_seed(seed)
        folders.append(toy.save(FAMILIES[family]().to(dtype), root / f"v{seed}"))
    return opened(folders)


def weights_of(live):
    return {name: tensor.clone() for name, tensor in live.model.state_dict().items()}


def check_bits(parents):
    """A switch with the parents on the device gives every bit that one from the files gives."""
    n = len(parents)
    live = LiveModel(parents[0], "cpu")
    mapped, moved = live.link(parents), live.link(parents, where="device")
    assert all(link.on_device for link in moved)
    for share in SHARES:
        lam = [(1.0 - share) / (n - 1)] * (n - 1) + [share]
        live.set_weights(mapped, lam)
        expected = weights_of(live)
        live.set_weights(mapped, [1.0] + [0.0] * (n - 1))
        live.set_weights(moved, lam)
        for name, tensor in live.model.state_dict().items():
            assert same_bytes(tensor, expected[name]), (name, lam)
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2 tied"])
def test_a_switch_on_the_device_has_the_bits_of_a_switch_from_the_files(tmp_path, family, dtype):
    check_bits(opened(save_pair(family, dtype, tmp_path)))


@pytest.mark.parametrize("n", range(3, 9))
def test_any_number_of_parents_may_lie_on_the_device(tmp_path, n):
    check_bits(save_several("llama", torch.bfloat16, tmp_path, n))


def test_a_tensor_in_another_precision_than_the_model_is_rounded_as_from_a_file(tmp_path):
    folders = save_pair("llama", torch.bfloat16, tmp_path)
    edit_all(folders, lambda c, g: c | {"model.norm.weight": torch.rand(32, generator=g)})
    check_bits(opened(folders))


def test_parents_that_agree_on_a_tensor_share_one_copy(tmp_path):
    moved = check_bits(opened(save_pair("llama", torch.float32, tmp_path)))
    assert {len({t.data_ptr() for t in link.parents}) for link in moved if link.same} == {1}
    assert {len({t.data_ptr() for t in link.parents}) for link in moved if not link.same} == {2}


def test_integers_that_differ_are_refused_by_name_on_the_device_too(tmp_path):
    folders = save_pair("llama", torch.float32, tmp_path)
    live = LiveModel(find_checkpoint(folders[0], "v1"), "cpu")
    links = live.link(opened(folders))
    whole = [torch.tensor([1, 2]), torch.tensor([1, 3])]
    odd = replace(links[0], live=whole[0].clone(), parents=tuple(whole), same=False)
    with pytest.raises(ParentError, match=f"differ in {links[0].name!r}"):
        live._move([odd])


# -- a device is compared with the CPU first -------------------------------------------------------


def separate(parts):
    out = torch.empty_like(parts[0][0])
    add_up(parts, out, scratch=Scratch())
    return out


def fused(parts):
    """The second product and the sum with one rounding."""
    (first, a), *rest = parts
    total = first.float() * a
    for tensor, c in rest:
        exact = tensor.double() * float(torch.tensor(c, dtype=torch.float32))
        total = (total.double() + exact).float()
    return total.to(first.dtype)


def flushing(parts):
    """The right sum, but for numbers near zero."""
    out = separate(parts)
    return torch.where(out.abs() < torch.finfo(out.dtype).smallest_normal, 0.0 * out, out)


def backwards(parts):
    return separate(parts[::-1])


def native(parts):
    """Each step rounded to the parents' dtype."""
    total = parts[0][0] * parts[0][1]
    for tensor, c in parts[1:]:
        total = total + tensor * c
    return total


def towards_zero(parts):
    """The right sum, rounded by cutting the bits off."""
    wide = [(tensor.float(), c) for tensor, c in parts]
    return (bits(separate(wide)) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_operations_have_the_same_bits_in_the_sample(dtype, n):
    count, of = resident.differing(dtype, dtype, n, separate)
    assert count == 0
    assert of > 100_000


@pytest.mark.parametrize(
    ("way", "dtype", "n"),
    [
        *((fused, dtype, 2) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((flushing, dtype, n) for dtype in DTYPES for n in (1, 2)),
        *((backwards, dtype, 3) for dtype in DTYPES),
        *((native, dtype, 2) for dtype in (torch.bfloat16, torch.float16)),
        (towards_zero, torch.bfloat16, 2),
    ],
)
def test_the_sample_shows_a_device_that_computes_in_another_way(way, dtype, n):
    count, _ = resident.differing(dtype, dtype, n, way)
    assert count > 0


def test_a_device_with_other_bits_is_refused_in_words(tmp_path, monkeypatch):
    parents = opened(save_pair("llama", torch.bfloat16, tmp_path))
    live = LiveModel(parents[0], "cpu")
    before = weights_of(live)

    differing = resident.differing
    monkeypatch.setattr(resident, "differing", lambda d, live_, n, _: differing(d, live_, n, fused))
    with pytest.raises(SpecError, match=r"^cpu mixes other bits than the CPU: torch.bfloat16 into"):
        live.link(parents, where="device")
    assert all(same_bytes(t, before[n]) for n, t in live.model.state_dict().items())


def test_a_dtype_that_the_device_does_not_have_is_refused_in_words():
    meta = torch.device("meta")  # computes nothing
    with pytest.raises(SpecError, match=r"^meta cannot mix torch.float32 .*NotImplementedError"):
        resident.check_arithmetic(meta, torch.float32, torch.float32, 2)


def test_a_tensor_that_another_one_took_the_place_of_is_found(tmp_path):
    parents = opened(save_pair("llama", torch.bfloat16, tmp_path))
    live = LiveModel(parents[0], "cpu")
    links = live.link(parents)
    swapped = [replace(link, parents=link.parents[::-1]) for link in links]
    with pytest.raises(SpecError, match=r"mixes other bits than the CPU: '.*' of the parents"):
        live._compare(swapped, links)
    live._compare(links, links)


def test_parents_that_do_not_fit_are_refused_with_the_numbers(tmp_path, monkeypatch):
    parents = opened(save_pair("llama", torch.bfloat16, tmp_path))
    live = LiveModel(parents[0], "cpu")
    monkeypatch.setattr(resident, "_free", lambda device: 50_000_000)
    with pytest.raises(SpecError, match=r"need 0.10 GB on cpu, and 0.05 GB are free") as refusal:
        live.link(parents, where="device")
    assert "--parents-in memory" in refusal.value.fix
    monkeypatch.setattr(resident, "_free", lambda device: 200_000_000)
    live.link(parents, where="device")


def test_memory_that_the_batches_took_is_left_to_them():
    resident.check_room({CPU: 10}, {CPU: 5})  # nothing tells how much a CPU has
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "_free", lambda device: 15)
        resident.check_room({CPU: 10}, {CPU: 5})
        with pytest.raises(SpecError, match="do not fit"):
            resident.check_room({CPU: 10}, {CPU: 6})


def test_the_first_tensor_that_is_not_finite_is_named():
    large = torch.full((9,), torch.finfo(torch.float32).max)
    named = [("sum overflows", large), ("integers", torch.tensor([1]))]
    assert resident.first_not_finite(named) is None
    bad = torch.tensor([1.0, float("nan")]).bfloat16()
    assert resident.first_not_finite([*named, ("bad", bad), ("worse", bad)]) == "bad"
