"""Models on several devices. Here all of them are the CPU: nothing else tells two apart."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_live import FAMILIES, link, logits, save_pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM

import toy
from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.evaluation import device_map
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.limits import work_within
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.loading import skeleton
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.request.spec import DEVICE_MAPS, Spec
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.mix import same_bytes

WHOLE = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair("llama", torch.bfloat16, tmp_path_factory.mktemp("pair"))


def first_of(folders):
    return find_checkpoint(folders[0], "v1")


def write(folder, content):
    path = folder / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("asked", [*DEVICE_MAPS, {"": "cpu"}, WHOLE], ids=str)
@pytest.mark.parametrize("where", ["mmap", "device"])
def test_a_map_changes_no_bit(tmp_path, folders, asked, where):
    parents = [find_checkpoint(folder, folder.name) for folder in folders]
    plain = LiveModel(parents[0], "cpu")
    mapped = LiveModel(
        parents[0], device_map=asked if asked in DEVICE_MAPS else write(tmp_path, asked)
    )
    plain.set_weights(link(plain, folders), (0.37, 0.63))
    mapped.set_weights(mapped.link(parents, where=where), (0.37, 0.63))
    expected = plain.model.state_dict()
    for name, tensor in mapped.model.state_dict().items():
        assert same_bytes(tensor, expected[name]), name
    assert torch.equal(logits(mapped.model), logits(plain.model))
    assert mapped.placement == "cpu from model.embed_tokens.weight"
    assert not plain.placement


def test_scores_are_the_same_and_say_where_the_model_lay(checkpoints, tasks):
    suite = load_suite("toy_letters", include_path=str(tasks))
    found = find_checkpoint(checkpoints[0], "v1")
    plain, mapped = (
        Evaluator(live, suite, limit=20)
        for live in (LiveModel(found, "cpu"), LiveModel(found, device_map="auto"))
    )
    assert mapped.score() == plain.score()
    assert mapped.settings() == plain.settings() | {
        "device_map": "cpu from gpt_neox.embed_in.weight"
    }
    assert mapped.fingerprint != plain.fingerprint


REFUSED = {
    "no JSON": ("{", r"it is not JSON: JSONDecodeError"),
    "a list": (["cpu"], "no object with names of modules"),
    "empty": ({}, "no object with names of modules"),
    "a switch": ({"": True}, r"'' has the device true"),
    "a fraction": ({"": 0.5}, r"'' has the device 0.5"),
    "a list of devices": ({"model": ["cpu"]}, r"'model' has the device \[\"cpu\"\]"),
    "an unknown module": (
        WHOLE | {"model.layer.1": "cpu"},
        r"no module 'model.layer.1'; did you mean 'model.layers.1'\?",
    ),
    "a layer too many": (WHOLE | {"model.layers.2": "cpu"}, r"no module 'model.layers.2'"),
    "a missing module": (
        {name: where for name, where in WHOLE.items() if name != "model.layers.1"},
        r"no device for 'model.layers.1.self_attn.q_proj.weight'",
    ),
    "the disk": (WHOLE | {"model.layers.1": "disk"}, "'model.layers.1' is to lie on disk, where"),
    "meta": (WHOLE | {"lm_head": "meta"}, "'lm_head' is to lie on meta, where"),
    "no such GPU": (WHOLE | {"lm_head": "cuda:77"}, r"device 'cuda:77' is not available"),
    "no such number": (WHOLE | {"lm_head": 77}, r"device 77 is not available"),
    "no device": (WHOLE | {"lm_head": "gpu"}, r"device 'gpu' is not available"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused_before_anything_is_loaded(tmp_path, folders, case, monkeypatch):
    content, words = REFUSED[case]
    monkeypatch.setattr("mlflow_soup.evaluation.live.load_model", None)
    with pytest.raises(SpecError, match=words) as refusal:
        LiveModel(first_of(folders), device_map=write(tmp_path, content))
    assert refusal.value.where.startswith("--device-map")


def test_parts_on_the_cpu_beside_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(device_map, "device_of", lambda name, where: torch.device(name))
    device_map._check_devices("a.json", {"model": "cuda:0", "lm_head": "cuda:1"})
    with pytest.raises(SpecError, match=r"'model' on cuda, 'lm_head' on cpu; accelerate would"):
        device_map._check_devices("a.json", {"model": "cuda:0", "lm_head": "cpu"})


def test_tied_weights_must_lie_on_one_device(tmp_path):
    folders = save_pair("qwen2 tied", torch.float32, tmp_path)
    model = skeleton(first_of(folders))
    assert all(parameter.is_meta for parameter in model.parameters())
    one = {"": "cuda:0", "model.embed_tokens": "cuda:1", "lm_head": "cuda:1"}
    device_map._check_names("a.json", one, model)
    with pytest.raises(
        SpecError, match=r"'model.embed_tokens.weight' and 'lm_head.weight' are one tensor"
    ):
        device_map._check_names("a.json", {"model": "cuda:0", "lm_head": "cuda:1"}, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_every_family_are_known(tmp_path, family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    checkpoint = find_checkpoint(toy.save(model, tmp_path / "v1"), "v1")
    by_child = {name: "cpu" for name, _ in model.named_children()}
    assert device_map.read_map(write(tmp_path, by_child), checkpoint) == by_child
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in skeleton(checkpoint).named_modules()] == names


def test_an_architecture_that_cannot_be_built_is_refused(tmp_path, folders):
    folder = toy.save(FAMILIES["llama"](), tmp_path / "v1")
    toy.edit_json(folder / "config.json", hidden_size="x")
    with pytest.raises(ParentError, match="cannot load the model of v1"):
        skeleton(find_checkpoint(folder, "v1"))


def test_a_weight_that_was_offloaded_is_refused_by_name(folders):
    offloaded = AutoModelForCausalLM.from_pretrained(
        folders[0], device_map=WHOLE | {"model.layers.1": "disk"}
    )
    with pytest.raises(SpecError, match=r"'model.layers.1.self_attn.q_proj.weight' would be off"):
        device_map.check_reachable(offloaded)


def test_a_weight_that_is_cut_across_devices_is_refused_by_name():
    model = FAMILIES["llama"]()
    device_map.check_reachable(model)

    def check_cut():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        cut = distribute_tensor(model.lm_head.weight.data, init_device_mesh("cpu", (1,)))
        model.lm_head.weight = torch.nn.Parameter(cut)
        device_map.check_reachable(model)

    # in a fork: torch keeps the group for ever, and a thread that forks then waits for it
    with pytest.raises(SpecError, match=r"'lm_head.weight' is cut across devices"):
        work_within(check_cut, seconds=60, memory=1 << 32, file_size=1 << 20)


def test_a_placement_names_the_first_weight_of_each_run():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(4)))
    model[1].to("meta")
    model[2].to("meta")
    expected = "cpu from 0.weight, meta from 1.weight, cpu from 3.weight"
    assert device_map.placement(model) == expected


def test_a_device_and_a_map_exclude_each_other():
    with pytest.raises(SpecError, match="both say where the model lies") as refusal:
        Spec(device="cuda", device_map="auto")
    assert "--device cuda with --device-map auto" in refusal.value.where
    assert Spec(device_map=Path(__file__)).device_map == os.fspath(__file__)
