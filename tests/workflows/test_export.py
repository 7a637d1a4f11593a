"""A flat folder of any version: it loads, scores as the registry says, and its card holds."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import lm_eval
import mlflow
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
from lm_eval.tasks import TaskManager
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import mlflow_soup
import toy
from conftest import MODEL, folder_of, register
from mlflow_soup import errors
from mlflow_soup.cli import main
from mlflow_soup.evaluation import loading
from mlflow_soup.files import durable
from mlflow_soup.records import Items, Manifest, Metric, Score, Source, Version
from mlflow_soup.registry.store import Store
from mlflow_soup.reporting.card import Exported, card, check_base_models
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.weights.manifest import MANIFEST
from mlflow_soup.workflows import export as workflow

SIZES = {
    "vocab_size": len(toy.tokenizer()),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "GPTNeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
CASES = [(family, layout) for family in FAMILIES for layout in ("plain", "flavoured")]
TEXT = "kat kat 12 bad"


def export(*words):
    return CliRunner().invoke(main, ["export", *map(str, words)])


def read_card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> dict[tuple[str, str], str]:
    """A store with two checkpoints and their soup in each layout, and the names of the models."""
    root = tmp_path_factory.mktemp("layouts")
    mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")
    client = Store()
    client.create_experiment("soups", artifact_location=f"{root}/artifacts")
    mlflow.set_experiment("soups")
    names = {}
    for family, layout in CASES:
        name = names[family, layout] = f"{family}-{layout}"
        client.create_registered_model(name)
        for seed in (1, 2):
            torch.manual_seed(seed)
            model = FAMILIES[family]()
            folder = toy.save(model, root / f"{name}-{seed}")
            if layout == "plain":
                register(client, folder, name)
                continue
            model.config._name_or_path = model.name_or_path = ""
            mlflow.transformers.log_model(
                {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)},
                name="checkpoint",
                task="text-generation",
                registered_model_name=name,
                pip_requirements=["transformers"],
            )
        parents = [f"models:/{name}/{number}" for number in (1, 2)]
        soup = root / f"{name}-soup"
        mlflow_soup.merge_checkpoints(parents, [0.3, 0.7], soup, digests=True)
        register(client, soup, name)
    return {"uri": f"sqlite:///{root}/mlflow.db", **names}


@pytest.fixture
def layouts(store, tmp_path, monkeypatch):
    """The names of the models; the store is the one that this test sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store["uri"])
    mlflow.set_tracking_uri(store["uri"])
    return store


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [1, 3], ids=["checkpoint", "soup"])
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_version_of_any_layout_becomes_a_folder_with_equal_logits(
    layouts, tmp_path, family, layout, number
):
    version = Version(layouts[family, layout], number)
    stored = find_checkpoint(folder_of(Store(), version), "the version")
    assert (stored.weights == stored.tokenizer) == (layout == "plain")
    done = export(version.uri, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"MLmodel", "conda.yaml", "requirements.txt", MANIFEST, "code"}

    tokens = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")
    expected = AutoTokenizer.from_pretrained(stored.tokenizer)(TEXT, return_tensors="pt")
    assert tokens["input_ids"].tolist() == expected["input_ids"].tolist()
    assert tokens["input_ids"].numel() == len(TEXT)  # transformers makes empty tokenizers, too
    ours, loading = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(loading.values())
    theirs = AutoModelForCausalLM.from_pretrained(stored.weights, dtype="auto")
    with torch.no_grad():
        assert torch.equal(ours(**tokens).logits, theirs(**expected).logits)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gives_the_scores_of_the_card(outcome, tasks, tmp_path):
    done = export(f"models:/{MODEL}@champion", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "NOT checked" not in done.output
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={tmp_path / 'out'},softmax_dtype=float32",
        tasks=["toy_digits", "toy_digits_bpb"],
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=32,
        device="cpu",
        bootstrap_iters=0,
    )
    data = read_card(tmp_path / "out").data
    assert data.model_name == f"{MODEL} v4"
    text = read_card(tmp_path / "out").text
    gate, _, held_out = text.partition("### Held-out scores of the search: no test results\n")
    assert "from the gate's examination" in gate
    (row,) = re.findall(r"^\| toy\\_letters .*$", held_out, re.M)
    score = outcome.soup.held_out
    (metric,) = score.metrics
    count = sum(len(items.ids) for items in score.items)
    assert row.endswith(f"| {metric.value:.4f} | {metric.stderr:.4f} | {count} |")
    told = {r.dataset_name: (r.metric_name, r.metric_value) for r in data.eval_results}
    assert set(told) == {"toy_digits", "toy_digits_bpb"}
    for task, (metric, value) in told.items():
        # equal here; sums of other CPUs may differ in the last digits
        assert found["results"][task][metric] == pytest.approx(value, abs=1e-6)


def test_the_card_is_one_that_the_hub_takes(outcome, tmp_path):
    bases = "EleutherAI/pythia-14m,gpt2"
    done = export("models:/toy-llm/4", "--out", tmp_path / "out", "--base-model", bases)
    assert done.exit_code == 0, done.output
    content = (tmp_path / "out" / "README.md").read_text()
    loaded = ModelCard(content)
    assert loaded.content == content  # what huggingface_hub reads, it writes
    assert isinstance(loaded.data, ModelCardData)
    front = yaml.safe_load(content.split("---\n")[1])
    assert front["base_model"] == bases.split(",")
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "mlflow-soup"]
    assert front["library_name"] == "transformers"
    for result in front["model-index"][0]["results"]:
        # the Hub's rule, by the words of its refusal
        assert re.fullmatch(r"(?:[A-Za-z0-9_-]+/)?[A-Za-z0-9_.-]+", result["dataset"]["type"])
        assert result["task"]["type"] == "text-generation"
        for metric in result["metrics"]:
            assert isinstance(metric["value"], float)


def test_the_card_names_no_base_model_that_nobody_named(outcome, tmp_path):
    export("models:/toy-llm/4", "--out", tmp_path / "out")
    data = read_card(tmp_path / "out").data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`models:/toy-llm/1`" in text  # in the words, the parents have their names
    assert str(tmp_path) not in text
    assert "artifacts" not in text


def test_the_recipe_is_exact_and_that_of_mergekit_is_marked_approximate(outcome, tmp_path):
    told = mlflow_soup.export("models:/toy-llm/4", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block.startswith("# approximate: ")
    recipe = yaml.safe_load(block)
    assert recipe["merge_method"] == "linear"
    assert recipe["parameters"] == {"normalize": False}
    assert recipe["dtype"] == recipe["out_dtype"] == "float32"
    weights = [model["parameters"]["weight"] for model in recipe["models"]]
    assert weights == [source.lam for source in told.manifest.sources]
    for source in told.manifest.sources:
        assert f"| `{source.uri}` | {source.lam!r} |" in text
    assert "merged again, and gave exactly these weights" in text
    assert told.digest in text


def test_a_trained_checkpoint_is_told_as_one(client, tmp_path):
    done = export("models:/toy-llm/1", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "NOT checked: It is no soup" in done.output
    loaded = read_card(tmp_path / "out")
    assert loaded.data.tags == ["mlflow-soup"]
    assert "mergekit" not in loaded.text
    assert loaded.data.eval_results is None


def test_the_last_line_says_what_serves_the_folder(client, tmp_path):
    done = export("models:/toy-llm/1", "--out", tmp_path / "my folder")
    last = done.output.splitlines()[-1]
    assert f"transformers serve '{tmp_path / 'my folder'}'" in last
    assert f"vllm serve '{tmp_path / 'my folder'}'" in last


def test_shards_stay_shards(checkpoints, client, tmp_path):
    folder = toy.shard(shutil.copytree(checkpoints[0], tmp_path / "shards"))
    done = export(folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for file in sorted(folder.glob("model*")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_no_model_needs_and_what_is_code_stays_behind(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}))
    (folder / "a.py").write_text("raise SystemExit")
    (folder / "code").mkdir()
    (folder / "code" / "loader.py").write_text("raise SystemExit")
    (folder / "optimizer.pt").write_bytes(b"\x80")
    (folder / "model.sig").write_text("{}")
    (folder / "README.md").write_text("the words of the training")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    done = export(folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert found == {
        *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("additional_chat_templates", "additional_chat_templates/tools.jinja"),
    }
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def split(folder: Path) -> Path:
    """The checkpoint with its tokenizer in a folder of its own."""
    (folder / "components" / "tokenizer").mkdir(parents=True)
    for path in folder.glob("tokenizer*"):
        path.rename(folder / "components" / "tokenizer" / path.name)
    return folder


def test_two_licences_of_one_name_are_not_mixed_up(folder, tmp_path):
    split(folder)
    for text, code in (("Apache-2.0", 0), ("MIT", 4)):
        (folder / "LICENSE").write_text("Apache-2.0")
        (folder / "components" / "tokenizer" / "LICENSE").write_text(text)
        done = export(folder, "--out", tmp_path / f"out {text}")
        assert done.exit_code == code, done.output
    assert "two different files LICENSE" in done.stderr


def test_a_tokenizer_that_reads_otherwise_beside_the_config_is_refused(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "reads_alike", lambda one, other: one.tokenizer == other.weights)
    assert export(folder, "--out", tmp_path / "plain").exit_code == 0
    done = export(split(folder), "--out", tmp_path / "out")
    assert done.exit_code == 4
    assert "makes other tokens beside the model's config" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_version_on_a_server_is_exported_too(server_client, checkpoints, tmp_path):
    server_client.create_registered_model("exported")
    for folder in checkpoints[:2]:
        register(server_client, folder, "exported")
    parents = ["models:/exported/1", "models:/exported/2"]
    mlflow_soup.merge_checkpoints(parents, [0.5, 0.5], tmp_path / "soup")
    register(server_client, tmp_path / "soup", "exported")
    done = export("models:/exported/3", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "merged again, and gave exactly these weights" in done.output
    assert "NOT checked: Its manifest records no digests" in done.output
    soup = tmp_path / "soup" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == soup.read_bytes()
    assert "registered_model_meta" not in left(tmp_path / "out")


# -- refusals --------------------------------------------------------------------------------------


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (("models:/toy-llm/99",), 4, "has no v99"),
        (("models:/toy-llm@nobody",), 4, "has no alias"),
        (("models:/nobody/1",), 4, "there is no registered model"),
        (("models:/toy-llm/Production",), 2, ""),
        (("nowhere",), 4, "there is no folder nowhere"),
        (("models:/toy-llm/1", "--base-model", "models:/toy-llm/1"), 2, "is not the id of a model"),
        (("models:/toy-llm/1", "--base-model", "a--b"), 2, "is not the id of a model"),
        (("models:/toy-llm/1", "--out", "s3://bucket/x"), 2, "is not a folder"),
        (("models:/toy-llm/1", "--out", "/proc/out"), 2, "cannot be written"),
        (("models:/toy-llm/1", "--public-key", "nokey.pem"), 2, "there is no file"),
    ],
)
def test_a_wrong_request_is_refused_in_words(client, tmp_path, words, code, complaint):
    before = left(tmp_path)
    uri, *more = words
    done = export(uri, "--out", "out", *more)
    assert done.exit_code == code, done.output
    assert complaint in done.stderr
    assert left(tmp_path) - before <= {"cache"}


def test_an_existing_folder_is_left_alone_and_nothing_is_fetched(client, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(workflow, "fetch", None)
    done = export("models:/toy-llm/1", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert left(tmp_path / "out") == {"thesis.tex"}


def test_the_store_is_not_written_into(client):
    folder = folder_of(client, Version(MODEL, 1))
    before = left(folder)
    done = export("models:/toy-llm/1", "--out", folder / "out")
    assert done.exit_code == 2
    assert "--out is inside the folder of" in done.stderr
    assert left(folder) == before


def forge_weights(content: str) -> str:
    manifest = json.loads(content)
    manifest["parents"][0]["lambda"], manifest["parents"][1]["lambda"] = "0x1p-3", "0x1.cp-1"
    return json.dumps(manifest)


def forge_parent(content: str) -> str:
    return content.replace("models:/toy-llm/1", "models:/toy-llm/3")


@pytest.mark.parametrize(
    ("file", "forge"),
    [
        (MANIFEST, forge_weights),
        (MANIFEST, forge_parent),
        (MANIFEST, lambda content: "{"),
        ("config.json", lambda content: content.replace("{", '{"rope_theta": 1, ', 1)),
        ("tokenizer.json", lambda content: content + " "),
    ],
    ids=["weights", "parent", "no manifest", "config", "tokenizer"],
)
def test_a_soup_that_is_not_what_its_manifest_says_is_refused(
    outcome, client, edit, tmp_path, file, forge
):
    path = folder_of(client, outcome.soup.version) / file
    edit(path, forge(path.read_text()).encode())
    done = export("models:/toy-llm/4", "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert not any(name.startswith(("out", ".out")) for name in left(tmp_path))


def test_a_soup_without_its_manifest_is_no_plain_version(outcome, client, edit, tmp_path):
    path = folder_of(client, outcome.soup.version) / MANIFEST
    edit(path, b"")
    path.unlink()
    done = export("models:/toy-llm/4", "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert "its tags are those of a soup" in done.stderr


def test_a_file_that_changes_between_check_and_copy_is_refused(
    outcome, client, edit, tmp_path, monkeypatch
):
    path = folder_of(client, outcome.soup.version) / "config.json"
    content, inspect = path.read_bytes(), workflow.inspect

    def then_change(*args, **more):
        yield from inspect(*args, **more)
        edit(path, content.replace(b"{", b"{ ", 1))

    monkeypatch.setattr(workflow, "inspect", then_change)
    done = export("models:/toy-llm/4", "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert "config.json: it was changed while it was exported" in done.stderr
    assert not any(name.startswith(("out", ".out")) for name in left(tmp_path))


def test_a_soup_whose_parent_is_gone_needs_a_word(outcome, client, tmp_path):
    client.delete_model_version(MODEL, "1")
    done = export("models:/toy-llm/4", "--out", tmp_path / "out")
    assert done.exit_code == 4
    assert "--allow-missing" in done.stderr
    assert not (tmp_path / "out").exists()
    done = export("models:/toy-llm/4", "--out", tmp_path / "out", "--allow-missing")
    assert done.exit_code == 0, done.output
    assert "NOT checked: Its parents were not merged again" in done.output
    assert "**Not checked**: Its parents were not" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_not_signed_is_refused_with_a_public_key(outcome, keys, tmp_path):
    done = export("models:/toy-llm/4", "--out", tmp_path / "out", "--public-key", keys[1])
    assert done.exit_code == 3
    assert "is not signed as a whole" in done.stderr


@pytest.mark.parametrize("hostile", ["link", "pickle", "quantised", "code"])
def test_hostile_files_are_refused(folder, tmp_path, hostile):
    if hostile == "link":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").symlink_to("/etc/passwd")
    elif hostile == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        more = {"quantised": {"quantization_config": {"bits": 4}}}
        more["code"] = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}}
        toy.edit_json(folder / "config.json", **more[hostile])
    done = export(folder, "--out", tmp_path / "out")
    assert done.exit_code == 4, done.output
    assert "fix: " in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(
    client, tmp_path, monkeypatch, stop
):
    def interrupt(*_):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "card", interrupt)
        done = export("models:/toy-llm/1", "--out", tmp_path / "out")
        assert done.exit_code == (130 if stop is KeyboardInterrupt else 1)
    assert not any(name.startswith(("out", ".out")) for name in left(tmp_path))
    assert export("models:/toy-llm/1", "--out", tmp_path / "out").exit_code == 0
    content = load_file(folder_of(client, Version(MODEL, 1)) / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in content.items())


def test_a_full_disk_is_found_before_anything_is_written(client, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: usage)
    done = export("models:/toy-llm/1", "--out", tmp_path / "out")
    assert done.exit_code == 6
    assert "are free" in done.stderr
    assert not any(name.startswith(("out", ".out")) for name in left(tmp_path))


# -- scores and words ------------------------------------------------------------------------------


def test_scores_of_an_experiment_that_does_not_count_are_not_told(outcome, client, tmp_path):
    client.create_experiment("elsewhere")
    more = ("--experiment", "elsewhere")
    done = export("models:/toy-llm/4", "--out", tmp_path / "out", *more)
    assert done.exit_code == 0, done.output
    assert "scores in the card: none" in done.output
    assert read_card(tmp_path / "out").data.eval_results is None


TOLD = Exported(
    "models:/x/1",
    "x v1",
    None,
    ("Fine.",),
    (),
    {},
    "nobody scored it",
    "sha256:0",
    "F32",
    {"a": "0"},
)


def test_a_held_out_score_is_no_result_of_the_model_index():
    def scored(task, value):
        items = Items(task, "acc,none", 1.0, ("a",), (value,), (1.0,))
        return Score(value, 0.0, (items,), (Metric(task, "acc,none", value, 0.0, True),))

    told = replace(TOLD, scores={"ood": scored("ood", 0.25)}, held_out=scored("dev", 0.75))
    read = ModelCard(card(told))
    assert [(r.dataset_name, r.metric_value) for r in read.data.eval_results] == [("ood", 0.25)]
    gate, _, held_out = read.text.partition("### Held-out scores of the search: no test results")
    assert ("0.2500" in gate, "0.7500" in gate) == (True, False)
    assert ("0.2500" in held_out, "0.7500" in held_out) == (False, True)
    assert "Held-out" not in card(replace(told, held_out=None))


def test_names_of_others_stay_text_in_the_card():
    odd = "*x* <script>alert(1)</script> [link](http://x) a`b``c|d"
    source = Source(f"models:/{odd}/1", 0.25, None)
    manifest = Manifest(
        "", "linear", (source, Source("/home/me/step-2", 0.75, None)), None, {}, {}, {}
    )
    told = replace(TOLD, name=odd, title=odd, manifest=manifest, weights={odd: "00"})
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(card(told)).text)
    for tag in ("<script", "<em>", 'href="http://x"'):
        assert tag not in html
    assert html.count("alert(1)") == 5  # title, recipe, table, mergekit, files
    assert "/home/me" not in html  # the layout of a machine
    assert "step-2" in html


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_recipe_with_statistics_is_none_of_mergekit(method):
    sources = (Source("models:/x/1", 0.5, None), Source("models:/x/2", 0.5, None))
    manifest = Manifest("", method, sources, None, {}, {}, {})
    text = card(replace(TOLD, manifest=manifest))
    assert "mergekit" not in text
    assert "Statistics of the parents" in text


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-160m", "a.b/c_d-e"])
def test_ids_of_the_hub_are_taken(name):
    check_base_models([name])


def test_an_id_cannot_be_a_path_or_a_uri():
    for name in ("/tmp/model", "models:/x/1", "a/b/c", "", "x" * 97, ".."):
        with pytest.raises(errors.SpecError, match="is not the id of a model"):
            check_base_models([name])
