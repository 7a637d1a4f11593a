"""Fisher information and Gram matrices, against slow references that share no code with them."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_live import FAMILIES, SMALL
from transformers import AutoModelForCausalLM

import toy
from mlflow_soup.errors import NonFiniteError, ParentError, SpecError
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.statistics import passes
from mlflow_soup.statistics.calibration import Calibration
from mlflow_soup.statistics.measure import FLOOR, Statistics, blend, measure
from mlflow_soup.weights import soup
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.mix import same_bytes

KINDS = ("fisher", "regmean")
VOCABULARY = SMALL["vocab_size"]
TEXT = tuple(
    tuple(int(i) for i in np.random.default_rng(n).integers(VOCABULARY, size=n))
    for n in (12, 7, 2, 30)
)
CALIBRATION = Calibration(TEXT)


def save(family, folder, seed=1, dtype=torch.float32):
    torch.manual_seed(seed)
    return find_checkpoint(toy.save(FAMILIES[family]().to(dtype), folder), folder.name)


@pytest.fixture
def parent(tmp_path):
    return save("gpt_neox", tmp_path / "v1")


def measured(kind, parent, folder, calibration=CALIBRATION, live=None, **options):
    live = live or LiveModel(parent, "cpu")
    return measure(kind, live, parent, f"digest of {parent.label}", calibration, folder, **options)


def exact(parent):
    """The model in double precision, where experts have no fused implementation."""
    return AutoModelForCausalLM.from_pretrained(
        parent.weights, dtype=torch.float64, experts_implementation="eager"
    )


def on_disk(model, tensors, folder):
    """One tensor per parameter of a model, as transformers would save them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def log_p(model, window):
    """log p(·|text before) at each position but the last, shape (T − 1, V)."""
    return model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)


def squares(model, value):
    """The squared derivatives of a number in all parameters."""
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if slope is None else slope**2
        for (name, p), slope in zip(parameters.items(), slopes, strict=True)
    }


def summed(parts):
    """Σ weight · tensor for each name."""
    total = {}
    for weight, tensors in parts:
        for name, tensor in tensors.items():
            total[name] = total.get(name, 0) + weight * tensor
    return total


def empirical(model, windows):
    parts = []
    for window in windows:
        value = log_p(model, window)[torch.arange(len(window) - 1), list(window[1:])].sum()
        parts.append((1 / len(windows), squares(model, value)))
    return summed(parts)


def expected(model, windows):
    """The true Fisher information: all labels at each position, weighted by their probability."""
    parts = []
    for window in windows:
        for row in log_p(model, window):
            parts += [(v.exp().item() / len(windows), squares(model, v)) for v in row]
    return summed(parts)


def check_close(found, wanted, rtol=1e-4):
    """Compare within `rtol`; elements that are tiny in their tensor only have to be tiny."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        slack = 1e-6 * float(tensor.abs().max())
        torch.testing.assert_close(
            found[name].double(),
            tensor.double(),
            rtol=rtol,
            atol=slack,
            msg=lambda m, n=name: n + m,
        )


# -- Fisher information ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher_is_the_mean_squared_gradient_of_the_windows(tmp_path, family):
    parent = save(family, tmp_path / "v1")
    made = measured("fisher", parent, tmp_path / "cache")
    model = exact(parent)
    wanted = on_disk(model, empirical(model, TEXT), tmp_path / "expected")
    check_close(made.tensors, wanted)
    mean = float(sum(t.sum() for t in wanted.values()) / sum(t.numel() for t in wanted.values()))
    assert made.mean == pytest.approx(mean, rel=1e-4)
    assert made.tokens == CALIBRATION.tokens == 51


def test_sampled_fisher_converges_to_the_true_one(tmp_path, parent):
    windows = Calibration(TEXT[:2])
    model = exact(parent)
    wanted = on_disk(model, expected(model, windows.documents), tmp_path / "expected")
    live, sums, off = LiveModel(parent, "cpu"), {}, []
    for seed in range(96):
        made = measured(
            *("fisher", parent, tmp_path / "cache", windows, live),
            estimator="sampled",
            seed=seed,
        )
        for name, tensor in made.tensors.items():
            sums[name] = sums.get(name, 0) + tensor.double()
        if seed in (5, 95):
            error = sum(float((sums[n] / (seed + 1) - wanted[n]).square().sum()) for n in wanted)
            off.append((error / sum(float(t.square().sum()) for t in wanted.values())) ** 0.5)
    assert off[1] < 0.35 * off[0]  # 1/√16 = 0.25
    assert off[1] < 0.15
    traces = [float(sum(tensor.sum() for tensor in f.values())) for f in (sums, wanted)]
    assert traces[0] / 96 == pytest.approx(traces[1], rel=0.05)


def test_only_the_empirical_estimator_takes_its_labels_from_the_text(tmp_path, parent):
    first, again, other, drawn = (
        measured("fisher", parent, tmp_path / name, estimator=estimator, seed=seed).tensors
        for name, estimator, seed in (
            ("a", "sampled", 1),
            ("b", "sampled", 1),
            ("c", "sampled", 2),
            ("d", "empirical", 1),
        )
    )
    name = "embed_out.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.isclose(first[name], other[name]).all()
    assert not torch.isclose(first[name], drawn[name]).all()


# -- Gram matrices ---------------------------------------------------------------------------------


def inputs_of(model, windows):
    """Module → all of its inputs as rows, in double precision."""
    heard = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(
                lambda _, args, out, name=name: heard.setdefault(name, []).append(
                    args[0].detach().reshape(-1, args[0].shape[-1])
                )
            )
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    return {name: torch.cat(parts) for name, parts in heard.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_matrices_are_those_of_the_layers_inputs(tmp_path, family):
    parent = save(family, tmp_path / "v1")
    made = measured("regmean", parent, tmp_path / "cache")
    model = exact(parent)
    inputs = inputs_of(model, TEXT)
    assert made.tensors.keys() <= inputs.keys()
    check_close(made.tensors, {n: inputs[n].T @ inputs[n] / len(inputs[n]) for n in made.tensors})
    # a tensor on disk belongs to the layer that changes when the tensor is changed
    modules = dict(model.named_modules())
    for module, rows in inputs.items():
        marked = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        name = f"{module}.weight"
        if name in marked:
            marked[name] += 1
        elif modules[module].weight is not model.get_input_embeddings().weight:
            raise AssertionError(f"{module} is tied to something else")
        written = on_disk(exact(parent), marked, tmp_path / "marked")
        for disk_name in (n for n, t in written.items() if t.any()):
            gram = made.tensors[made.places[disk_name]].double()
            slack = 1e-6 * float(gram.abs().max())
            torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-4, atol=slack)


def test_layers_with_the_same_input_share_a_gram_matrix(tmp_path):
    made = measured("regmean", save("llama", tmp_path / "v1"), tmp_path / "cache")
    layer = "model.layers.1"
    names = {
        "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
        "self_attn.o_proj": ("o_proj",),
        "mlp.gate_proj": ("gate_proj", "up_proj"),
        "mlp.down_proj": ("down_proj",),
    }
    for owner, sharing in names.items():
        of_owner = {n for n, key in made.places.items() if key == f"{layer}.{owner}"}
        assert of_owner == {
            n for n in made.places if n.startswith(layer) and n.split(".")[-2] in sharing
        }
    assert len(made.tensors) == 4 * 2 + 1  # and one for the head


class Recurrent(torch.nn.Module):
    """A model whose first layer is called again, with the output of another layer."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 4)
        self.first, self.second, self.third, self.fourth = (torch.nn.Linear(4, 4) for _ in "1234")

    def forward(self, input_ids, use_cache):
        inputs = self.embedding(input_ids)
        given = self.first(inputs) + self.second(inputs)
        changed = self.third(given) + self.first(given)
        given += changed  # changed in place, so it is no longer the input of the third layer
        return self.fourth(given)


def test_layers_share_nothing_if_inputs_change_or_layers_are_called_again():
    model = Recurrent()
    layers = {name: layer for name, layer in model.named_children() if name != "embedding"}
    assert passes._owners(model, layers, (1, 2)) == {name: name for name in layers}


def test_regmean_solves_the_normal_equations_of_both_parents(tmp_path):
    for family, name, turned in (
        ("llama", "model.layers.1.self_attn.k_proj.weight", False),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", True),
    ):
        parents = [save(family, tmp_path / f"{family}{seed}", seed) for seed in (1, 2)]
        made = [measured("regmean", parent, tmp_path / "cache") for parent in parents]
        left, right = 0, 0
        for parent in parents:
            model = exact(parent)
            rows = inputs_of(model, TEXT)[name.removesuffix(".weight")].numpy()
            weight = dict(model.named_parameters())[name].detach().numpy()
            gram = rows.T @ rows / len(rows)
            gram = 0.9 * gram + 0.1 * np.diag(np.diag(gram))
            left, right = left + gram, right + gram @ (weight if turned else weight.T)
        wanted = np.linalg.solve(left, right)
        tensors = [dict(parent.read())[name] for parent in parents]
        found = blend(made, ridge=0.0)(name, tensors)
        wanted = wanted if turned else wanted.T
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)


# -- laws of both ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["empirical", "sampled"])
def test_the_order_of_the_text_does_not_matter(tmp_path, parent, kind, estimator):
    first, other = (
        measured(kind, parent, tmp_path / name, Calibration(windows), estimator=estimator)
        for name, windows in (("a", TEXT), ("b", TEXT[::-1]))
    )
    check_close(first.tensors, other.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_parts_of_the_text_add_up(tmp_path, parent, kind):
    parts = [Calibration(TEXT[:1]), Calibration(TEXT[1:])]
    counts = [len(part.documents) if kind == "fisher" else part.tokens for part in parts]
    tensors = [measured(kind, parent, tmp_path, part).tensors for part in parts]
    shares = [count / sum(counts) for count in counts]
    whole = measured(kind, parent, tmp_path).tensors
    check_close(whole, summed(zip(shares, tensors, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_parent_averaged_with_itself_does_not_change(tmp_path, family, kind):
    parent = save(family, tmp_path / "v1", dtype=torch.bfloat16)
    made = [measured(kind, parent, tmp_path / "cache")] * 2
    (tmp_path / "soup").mkdir()
    soup.write([parent, parent], (0.5, 0.5), tmp_path / "soup", blend=blend(made))
    written = dict(find_checkpoint(tmp_path / "soup", "soup").read())
    assert all(same_bytes(written[name], tensor) for name, tensor in parent.read())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_statistics_or_a_note(tmp_path, family, kind):
    parents = [save(family, tmp_path / f"v{seed}", seed) for seed in (1, 2)]
    made = [measured(kind, parent, tmp_path / "cache") for parent in parents]
    averaged = [re.match(r"(\d+) .* (?:was|were) averaged: ", note) for note in made[0].notes]
    told = sum(int(match[1]) for match in averaged if match)
    assert len(made[0].places) + told == len(parents[0].tensors)
    assert told == 0 or kind == "regmean"
    average = blend(made)
    weights = [dict(parent.read()) for parent in parents]
    for name in parents[0].tensors:
        tensors = [own[name] for own in weights]
        merged = average(name, tensors)
        assert (merged is None) == (name not in made[0].places)
        if merged is not None:
            assert (merged.shape, merged.dtype) == (tensors[0].shape, tensors[0].dtype)


def test_a_written_soup_equals_the_average_and_its_comparison_passes(tmp_path):
    parents = [save("llama", tmp_path / f"v{seed}", seed, torch.bfloat16) for seed in (1, 2)]
    average = blend([measured("regmean", parent, tmp_path / "cache") for parent in parents])
    (tmp_path / "soup").mkdir()
    written = soup.write(parents, (0.5, 0.5), tmp_path / "soup", blend=average).checkpoint
    weights = [dict(parent.read()) for parent in parents]
    plain = 0
    for name, tensor in written.read():
        wanted = average(name, [own[name] for own in weights])
        plain += wanted is None
        assert wanted is None or same_bytes(tensor, wanted)
    assert plain == 6  # the embedding and five norms
    assert list(soup.compare(parents, (0.5, 0.5), written, blend=average)) == []
    assert list(soup.compare(parents, (0.5, 0.5), written)) != []


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_measured_in_single_precision(tmp_path, kind):
    half = save("llama", tmp_path / "half", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(half.weights, dtype=torch.float32)
    single = find_checkpoint(toy.save(model, tmp_path / "single"), "single")
    first, other = (measured(kind, p, tmp_path / "cache").tensors for p in (half, single))
    assert first.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_live_model_is_left_as_it_was(tmp_path, kind, dtype):
    parents = [save("qwen2 tied", tmp_path / f"v{seed}", seed, dtype) for seed in (1, 2)]
    live = LiveModel(parents[0], "cpu")
    links = live.link(parents)
    live.set_weights(links, (0.3, 0.7))
    state = live.model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    frozen, graded, *_ = live.model.parameters()
    frozen.requires_grad_(False)
    graded.grad = torch.ones_like(graded)
    with torch.no_grad():
        made = measured(kind, parents[1], tmp_path / "cache", live=live)
    after = live.model.state_dict()
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert live.model.dtype == dtype
    assert not live.model.training
    assert [p.requires_grad for p in live.model.parameters()][:2] == [False, True]
    assert torch.equal(graded.grad, torch.ones_like(graded))
    assert all(p.grad is None for p in live.model.parameters() if p is not graded)
    live.set_weights(links, (0.0, 1.0))
    loaded = LiveModel(parents[1], "cpu")
    wanted = loaded.model.state_dict()
    assert all(same_bytes(wanted[name], tensor) for name, tensor in after.items())
    # the parent was measured, not the model's earlier weights
    check_close(made.tensors, measured(kind, parents[1], tmp_path / "new", live=loaded).tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_kept(tmp_path, parent, kind):
    live = LiveModel(parent, "cpu")
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    spoilt = dict(parent.read())[name].clone()
    spoilt[0, 0] = float("nan")
    toy.edit_tensors(parent.weights, **{name: spoilt})
    with pytest.raises(NonFiniteError, match=rf"'{name}' of the mixture is not finite"):
        measured(kind, find_checkpoint(parent.root, "v1"), tmp_path / "cache", live=live)
    assert list((tmp_path / "cache").iterdir()) == []
    after = live.model.state_dict()
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items())


def test_weights_that_the_text_does_not_reach_are_noted_and_averaged(tmp_path):
    parents = [save("mixtral", tmp_path / f"v{seed}", seed) for seed in (1, 2)]
    one = Calibration(((1, 2),))  # each of the two tokens uses two experts of four
    made = [measured("fisher", parent, tmp_path / "cache", one) for parent in parents]
    unmoved = [{n for n, t in own.tensors.items() if not t.any()} for own in made]
    told = "tensors were without influence on the likelihood of the calibration text."
    assert f"{len(unmoved[0])} {told}" in made[0].notes
    name = min(unmoved[0] & unmoved[1])
    tensors = [dict(parent.read())[name] for parent in parents]
    torch.testing.assert_close(blend(made)(name, tensors), sum(tensors) / 2)


def test_too_little_text_for_a_layer_is_noted(tmp_path, parent):
    notes = measured("regmean", parent, tmp_path / "cache").notes
    assert (
        "2 linear layers were given fewer tokens than inputs (51 tokens, up to 64 inputs)." in notes
    )


def test_buffers_that_the_model_does_not_use_are_noted(tmp_path, parent):
    toy.edit_tensors(
        parent.weights, **{"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.rand(4)}
    )
    for kind in KINDS:
        made = measured(kind, find_checkpoint(parent.root, "v1"), tmp_path / "cache")
        assert "1 tensor was averaged: not used by the model." in made.notes


def test_the_floor_is_relative_to_the_mean_of_all_parents():
    def one(value, mean):
        return Statistics("fisher", {"w": "w"}, (), mean, 1, (), {"w": torch.tensor([value])})

    average = blend([one(0.0, 1.0), one(2e-6, 3.0)])
    # the floor is 2e-6
    found = average("w", [torch.tensor([0.0]), torch.tensor([3.0])])
    assert FLOOR == 1e-6
    assert found.item() == pytest.approx(2.0)


# -- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_measured_statistics_are_not_measured_again(tmp_path, parent, kind):
    first = measured(kind, parent, tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat() for path in place.iterdir()}
    again = measure(kind, None, parent, "digest of v1", CALIBRATION, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    check_close(again.tensors, first.tensors, rtol=0)
    for field in ("kind", "places", "turned", "mean", "tokens", "notes"):
        assert getattr(again, field) == getattr(first, field)


def test_any_other_request_is_measured_anew(tmp_path, parent):
    live, cache = LiveModel(parent, "cpu"), tmp_path / "cache"
    asked = [
        ("fisher", "a", CALIBRATION, {}),
        ("regmean", "a", CALIBRATION, {}),
        ("fisher", "b", CALIBRATION, {}),
        ("fisher", "a", Calibration(TEXT[1:]), {}),
        ("fisher", "a", CALIBRATION, {"estimator": "sampled"}),
        ("fisher", "a", CALIBRATION, {"estimator": "sampled", "seed": 1}),
    ]
    for count, (kind, digest, calibration, options) in enumerate(asked, start=1):
        measure(kind, live, parent, digest, calibration, cache, **options)
        assert len(list(cache.iterdir())) == count
    measure("fisher", None, parent, "a", CALIBRATION, cache, seed=1)  # the seed is not used
    measure("regmean", None, parent, "a", CALIBRATION, cache, estimator="sampled")


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    """Change the last byte of a file: of the data, or the closing brace of the JSON."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def spoil(path):
    path.write_bytes(b"{}" + path.read_bytes()[2:])


@pytest.mark.parametrize("file", ["tensors.safetensors", "statistics.json"])
@pytest.mark.parametrize("damage", [cut, spoil, flip, lambda path: path.unlink()])
def test_damaged_statistics_are_measured_anew(tmp_path, parent, file, damage):
    first = measured("regmean", parent, tmp_path / "cache")
    wanted = {name: tensor.clone() for name, tensor in first.tensors.items()}
    del first  # release the mapping before the file is cut
    (place,) = (tmp_path / "cache").iterdir()
    damage(place / file)
    again = measured("regmean", parent, tmp_path / "cache")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in wanted.items())
    assert list((tmp_path / "cache").iterdir()) == [place]


def test_safetensors_can_read_the_file(tmp_path, parent):
    made = measured("fisher", parent, tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    read = load_file(place / "tensors.safetensors")
    assert read.keys() == made.tensors.keys()
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in read.items())
    assert json.loads((place / "statistics.json").read_text())["tokens"] == 51


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, parent):
    (tmp_path / "cache").write_text("")
    with pytest.raises(SpecError) as refusal:
        measured("fisher", parent, tmp_path / "cache")
    assert refusal.value.where == "the cache of statistics"


@pytest.mark.parametrize(("kind", "estimator"), [("trace", "empirical"), ("fisher", "true")])
def test_an_unknown_kind_or_estimator_is_refused(tmp_path, parent, kind, estimator):
    with pytest.raises(SpecError, match=f"there are no {estimator} {kind} statistics"):
        measured(kind, parent, tmp_path / "cache", estimator=estimator)


def test_a_parent_that_does_not_fit_the_model_is_refused(tmp_path):
    parents = [save("qwen2 tied", tmp_path / f"v{seed}", seed) for seed in (1, 2)]
    for factor, own in zip((1, 2), parents, strict=True):
        embedding = dict(own.read())["model.embed_tokens.weight"]
        toy.edit_tensors(own.weights, **{"lm_head.weight": embedding * factor})
    live = LiveModel(find_checkpoint(parents[0].root, "v1"), "cpu")
    other = find_checkpoint(parents[1].root, "v2")
    with pytest.raises(ParentError, match="but the model uses one tensor"):
        measured("fisher", other, tmp_path / "cache", live=live)
