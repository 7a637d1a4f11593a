"""What we use of other libraries that they do not promise to keep.

Each use has a comment `private door: <name>`; behind an import `private door` is enough. Each name
is tried here for what we need of it, so that a test, and not a user's search, is the first to learn
that a release has changed it.
"""

import ast
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import jinja2
import lm_eval.api.metrics
import lm_eval.api.registry
import lm_eval.utils
import mlflow
import pytest
import sqlalchemy
import torch
import urllib3
from lm_eval.api.utils import maybe_delimit
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from mlflow import MlflowClient, environment_variables
from mlflow.data.evaluation_dataset import EvaluationDataset
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs
from mlflow.models import evaluation
from mlflow.models.evaluation.artifacts import ParquetEvaluationArtifact
from mlflow.store.artifact import artifact_repository_registry, models_artifact_repo
from mlflow.store.db import utils as db_utils
from mlflow.tracking.context.registry import resolve_tags
from mlflow.tracking.fluent import _get_experiment_id
from mlflow.utils import autologging_utils, mlflow_tags
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sklearn.linear_model import LinearRegression
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import toy
from mlflow_soup.evaluation.template_process import environment
from mlflow_soup.plugin.evaluator import LmEvalEvaluator
from mlflow_soup.registry import outages

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for top in ("mlflow_soup", "examples", "benchmarks") for path in (ROOT / top).rglob("*.py")
)
COMMENT = re.compile(r"# private door: (.+)$", re.M)
IMPORT = re.compile(r"^(?:from (\S+) )?import (\S+).*# private door(?:;|$)", re.M)
# their documentation describes these modules; what else is imported from a library is a door
PUBLIC = {
    *("fastapi", "fastapi.concurrency", "uvicorn"),
    *("mlflow", "mlflow.artifacts", "mlflow.data.dataset", "mlflow.data.dataset_source"),
    *("mlflow.entities", "mlflow.entities.model_registry"),
    *("mlflow.exceptions", "mlflow.models", "mlflow.server"),
    "mlflow.store.artifact.artifact_repo",
    *("lm_eval", "lm_eval.api.model", "lm_eval.evaluator", "lm_eval.models.huggingface"),
    "lm_eval.tasks",
    *("cryptography.exceptions", "cryptography.hazmat.primitives"),
    "cryptography.hazmat.primitives.asymmetric",
    *("model_signing", "model_signing.hashing", "model_signing.manifest"),
    *("model_signing.signing", "model_signing.verifying"),
    *("transformers", "torch", "torch.nn", "torch.nn.modules.module", "datasets"),
    *("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils"),
    *("tokenizers", "tqdm", "detect_secrets.plugins", "psutil"),
    *("safetensors", "safetensors.torch", "jinja2", "jinja2.sandbox", "jinja2.exceptions"),
    *("boto3.exceptions", "botocore.exceptions", "requests", "requests.exceptions"),
    *("sqlalchemy.exc", "click", "cloup", "platformdirs", "yaml", "pyarrow", "pyarrow.parquet"),
    *("numpy", "numpy.typing", "scipy.interpolate", "scipy.linalg", "scipy.optimize"),
    *("scipy.special", "scipy.stats", "sklearn.exceptions", "sklearn.gaussian_process"),
    "sklearn.gaussian_process.kernels",
    *("matplotlib", "matplotlib.artist", "matplotlib.axes", "matplotlib.figure"),
    *("matplotlib.colors", "matplotlib.lines", "matplotlib.patches"),
    *("bokeh.embed", "bokeh.layouts", "bokeh.models", "bokeh.palettes", "bokeh.plotting"),
    *("bokeh.resources", "bokeh.transform"),
}
OURS = {"mlflow_soup", "toy", "conftest", "proxy", *(path.stem for path in SOURCES)}
# benchmarks compare with them, and nothing else needs them
PEERS = {"bayes_opt", "botorch", "gpytorch", "mergekit", "optuna", "skopt"}
# beginnings of MLflow's tags and variables, in our strings
MARK = re.compile(r"\bmlflow\.(?!MlflowClient|set_)[a-z]\w+|\bMLFLOW_(?!SOUP)[A-Z_]+")
# MLflow documents these
DOCUMENTED = {
    *("mlflow.runName", "mlflow.parentRunId", "mlflow.note"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    *("MLFLOW_REGISTRY_URI", "MLFLOW_WORKSPACE"),
    *("mlflow.data", "mlflow.models", "mlflow.register_model"),
    *("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"),
}


class Door(NamedTuple):
    """Something private of a library.

    Attributes:
        name: as the comments have it; its first word, up to a dot, is the library.
        use: what we do with it.
        works: raises an error where it is no longer what we need; the arguments are fixtures.
    """

    name: str
    use: str
    works: Callable[..., None]


DOORS: list[Door] = []


def door(name: str, use: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(works: Callable[..., None]) -> Callable[..., None]:
        DOORS.append(Door(name, use, works))
        return works

    return add


@contextlib.contextmanager
def setting(owner: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


# -- MLflow ----------------------------------------------------------------------------------------


@door("mlflow.tracking.fluent._get_experiment_id", "learn where MLflow would begin a run")
def _(client: mlflow.MlflowClient) -> None:
    assert _get_experiment_id() == client.get_experiment_by_name("soups").experiment_id


@door("mlflow.tracking.context.registry.resolve_tags", "give our runs the tags of any run")
def _(client: mlflow.MlflowClient) -> None:
    with mlflow.start_run() as run:
        tags = client.get_run(run.info.run_id).data.tags
    assert resolve_tags({"a": "b"}).items() <= tags.items() | {("a", "b")}
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= resolve_tags().keys()


@door("mlflow.utils.autologging_utils", "pause the caller's autologging")
def _(client: MlflowClient) -> None:
    assert autologging_utils._AUTOLOGGING_GLOBALLY_DISABLED is False
    mlflow.sklearn.autolog(silent=True)
    try:
        for paused in (True, False):
            with (
                setting(autologging_utils, "_AUTOLOGGING_GLOBALLY_DISABLED", paused),
                mlflow.start_run() as run,
            ):
                LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
            assert ("fit_intercept" in client.get_run(run.info.run_id).data.params) != paused
    finally:
        mlflow.sklearn.autolog(disable=True)


@door("mlflow.utils.file_utils.local_file_uri_to_path", "read a local store without a copy")
def _() -> None:
    assert local_file_uri_to_path("file:///a/b%20c") == "/a/b c"
    assert local_file_uri_to_path("/a/b c") == "/a/b c"


@door("mlflow.utils.uri.is_local_uri", "read a local store without a copy")
def _() -> None:
    assert is_local_uri("file:///a")
    assert is_local_uri("/a")
    assert not is_local_uri("s3://bucket/a")
    assert not is_local_uri("mlflow-artifacts:/a")


@door(
    "mlflow.store.artifact.artifact_repository_registry",
    "reach files where they are: MLflow's client looks up models before each call",
)
def _(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("a")
    (tmp_path / "copy").mkdir()
    artifacts = artifact_repository_registry.get_artifact_repository(
        str(tmp_path / "run"), tracking_uri=None
    )
    copy = artifacts.download_artifacts("a.txt", str(tmp_path / "copy"))
    assert copy == str(tmp_path / "copy" / "a.txt")
    assert Path(copy).read_text() == "a"
    with pytest.raises(mlflow.MlflowException, match="outside the artifact directory"):
        artifacts.download_artifacts("../run/a.txt", str(tmp_path / "copy"))


@door("mlflow.sharedViewState", "prepare the page that compares the trials of a search")
def _() -> None:
    pages = (Path(mlflow.__file__).parent / "server" / "js" / "build").rglob("*.js")
    words = {"mlflow.sharedViewState", "viewStateShareKey", "compareRunsMode"}
    words |= {"compareRunCharts", "compareRunSections", "runsCountToCompare", "selectedColumns"}
    words |= {"runsHiddenMode", "isAccordionReordered", "cardHeight", "SHOWALL"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        words = {word for word in words if word not in text}
    assert not words, f"the pages no longer say {words}"


@door("mlflow.modelVersions", "show the version on the page of its logged model")
def _() -> None:
    assert mlflow_tags.MLFLOW_MODEL_VERSIONS == "mlflow.modelVersions"


@door("mlflow.utils.mlflow_tags.MLFLOW_DATASET_CONTEXT", "say what a run used a dataset for")
def _() -> None:
    assert mlflow_tags.MLFLOW_DATASET_CONTEXT == "mlflow.data.context"


@door("mlflow.data.evaluation_dataset.EvaluationDataset", "hand a dataset to our evaluator")
@door("mlflow.data.pyfunc_dataset_mixin.PyFuncConvertibleDatasetMixin", "offer our dataset")
@door("mlflow.data.pyfunc_dataset_mixin.PyFuncInputsOutputs", "say what our dataset is not")
@door("mlflow.data.dataset.Dataset._compute_digest", "give the digest of the items")
@door("mlflow.data.dataset_source.DatasetSource._get_source_type", "name the source lm_eval")
@door("mlflow.data.dataset_source.DatasetSource._can_resolve", "leave other sources alone")
@door("mlflow.data.dataset_source.DatasetSource._resolve", "leave other sources alone")
def _(tasks: Path) -> None:
    made = mlflow.data.from_lm_eval("toy_letters", include_path=str(tasks), limit=3)
    assert isinstance(made, PyFuncConvertibleDatasetMixin)
    assert PyFuncInputsOutputs in inspect.signature(made.to_pyfunc).return_annotation.__mro__
    carried = made.to_evaluation_dataset()
    assert isinstance(carried, EvaluationDataset)
    assert (carried.name, carried.digest) == (made.name, made.digest)
    sources = {source._get_source_type() for source in mlflow.data.get_registered_sources()}
    assert "lm_eval" in sources
    with pytest.raises(mlflow.MlflowException, match="Could not find a source information"):
        mlflow.data.dataset_source_registry.resolve_dataset_source(object())


@door("mlflow.models.evaluation.base.ModelEvaluator", "be found by mlflow.models.evaluate")
@door("mlflow.models.evaluation.base.EvaluationResult", "answer it")
@door("mlflow.models.evaluation.base.EvaluationArtifact", "hand out the answers to all items")
@door(
    "mlflow.models.evaluation.artifacts.ParquetEvaluationArtifact", "hand out the rows of all items"
)
def _() -> None:
    assert "lm-eval" in mlflow.models.list_evaluators()
    assert issubclass(LmEvalEvaluator, evaluation.ModelEvaluator)
    assert evaluation.EvaluationResult is mlflow.models.EvaluationResult
    kept = ParquetEvaluationArtifact("a", [1])
    assert isinstance(kept, evaluation.EvaluationArtifact)
    assert (kept.uri, kept.content) == ("a", [1])


@door("mlflow: registered_model_meta", "leave out the file that MLflow adds to a download")
def _() -> None:
    assert models_artifact_repo.REGISTERED_MODEL_META_FILE_NAME == "registered_model_meta"


@door("mlflow: variables are read at each request", "switch MLflow's own retries off")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        for value in (3, 7):
            monkeypatch.setenv(name, str(value))
            assert getattr(environment_variables, name).get() == value


@door("mlflow.store.db.utils logs the errors that it raises", "print no traceback of theirs")
def _() -> None:
    assert db_utils._logger.name == "mlflow.store.db.utils"


# -- what errors say -------------------------------------------------------------------------------


def said(error: Exception) -> mlflow.MlflowException:
    """As MLflow passes it on."""
    return mlflow.MlflowException(str(error))


@door("sqlite: words of a full disk and of denials", "tell what waiting does not change")
def _(tmp_path: Path) -> None:
    for uri, statement, judge in (
        (tmp_path / "full.db", "INSERT INTO t VALUES (zeroblob(100000))", outages.is_full),
        (tmp_path / "empty.db", "SELECT 1 FROM nowhere", outages.is_denied),
        (tmp_path / "read.db", "INSERT INTO t VALUES (1)", outages.is_denied),
    ):
        base = sqlite3.connect(uri)
        if uri.stem != "empty":
            base.execute("CREATE TABLE t (c)")
            base.commit()
        base.execute("PRAGMA max_page_count=2")
        base.execute(f"PRAGMA query_only={uri.stem == 'read'}")
        with pytest.raises(sqlite3.OperationalError) as caught:
            base.execute(statement)
        base.close()
        assert judge(said(caught.value)), str(caught.value)
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(tmp_path)  # a folder
    assert outages.is_denied(said(caught.value))


@door("sqlalchemy: QueuePool limit", "wait for a server whose connections are all in use")
def _() -> None:
    pool = sqlalchemy.pool.QueuePool(
        lambda: sqlite3.connect(":memory:"), pool_size=1, max_overflow=0, timeout=0.0
    )
    taken = pool.connect()
    with pytest.raises(sqlalchemy.exc.TimeoutError) as caught:
        pool.connect()
    taken.close()
    assert outages.is_transient(said(caught.value))


@door("mlflow: words for what is deleted", "name what somebody deleted")
def _(tmp_path: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    kept, gone = (client.create_experiment(name) for name in ("kept", "gone"))
    run_id = client.create_run(kept).info.run_id
    client.delete_run(run_id)
    client.delete_experiment(gone)
    for call in (
        lambda: client.log_param(run_id, "a", "b"),
        lambda: client.create_run(gone),
        lambda: client.get_model_version("none", "1"),
        lambda: client.get_registered_model("none"),
        lambda: client.get_logged_model("m-0"),
    ):
        with pytest.raises(mlflow.MlflowException) as caught:
            call()
        assert outages._deleted("try", caught.value) is not None, caught.value


@door("urllib3: too many 500 error responses", "give a server that breaks down less patience")
def _() -> None:
    words = urllib3.exceptions.ResponseError.SPECIFIC_ERROR
    assert "too many 500 error" in words.format(status_code=500)


@door("datasets: errors for data that is not there are OSErrors", "say what to do about the data")
def _(tmp_path: Path) -> None:
    missing = {"test": str(tmp_path / "nowhere.jsonl")}
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        datasets.load_dataset("json", data_files=missing)
    with pytest.raises((OSError, ConnectionError)):
        datasets.load_dataset("nobody/nothing")


# -- lm-eval's tasks -------------------------------------------------------------------------------


@door("lm_eval.utils.apply_template", "render templates in a process of its own")
def _(tasks: Path) -> None:
    asked = []
    manager = TaskManager(include_defaults=False, include_path=[str(tasks)])
    task = manager.load(["toy_letters"])["tasks"]["toy_letters"]
    with setting(lm_eval.utils, "apply_template", lambda text, doc: asked.append(text) or "made"):
        assert task.doc_to_text(task.eval_docs[0]) == "made"
    assert asked == [task.get_config("doc_to_text")]
    ours, its = environment(), lm_eval.utils.env
    options = inspect.signature(jinja2.Environment).parameters.keys() - {"extensions", "loader"}
    for name in options - {"cache_size", "enable_async"}:
        assert getattr(ours, name) == getattr(its, name)
    assert its.filters.keys() == ours.filters.keys()
    assert its.tests.keys() == ours.tests.keys()
    assert its.globals.keys() == ours.globals.keys()
    assert its.filters["regex_replace"]("aaab", "a", "c", 2) == "ccab"
    assert ours.filters["regex_replace"]("aaab", "a", "c", 2) == "ccab"


@door("datasets.packaged_modules._PACKAGED_DATASETS_MODULES", "tell formats from data sets")
def _() -> None:
    formats = importlib.import_module("datasets.packaged_modules")._PACKAGED_DATASETS_MODULES
    assert {"json", "csv", "text", "parquet", "pandas", "imagefolder"} <= set(formats)


@door("datasets: a prepared data set lies in cache_dir", "read files only once with limits")
def _(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    builder = datasets.load_dataset_builder(
        "json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    assert not Path(builder.cache_dir).exists()
    builder.download_and_prepare()
    assert Path(builder.cache_dir).is_dir()
    assert builder.as_dataset()["train"][0] == {"a": 1}


@door("lm_eval.tasks._factory.TaskFactory", "judge a task before it is built")
def _(tmp_path: Path) -> None:
    asked = []

    class Ours(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: Any = None) -> Any:
            asked.append(entry.name)
            return {**super()._load_full_config(entry, overrides), "custom_dataset": made}

        def _build_group_members(self, members: Any, name: str, changes: Any, known: Any) -> Any:
            asked.append(members)
            return super()._build_group_members(members, name, changes, known)

    def made(**_: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"a": "x"}])})

    task = {"task": "t", "output_type": "loglikelihood_rolling", "test_split": "test"}
    task |= {"doc_to_text": "", "doc_to_target": "{{a}}", "tag": ["g"]}
    index: dict[str, Any] = {}
    TaskIndex.process_cfg(task, tmp_path / "t.yaml", index)
    TaskIndex.process_cfg({"group": "all", "task": ["t"]}, tmp_path / "all.yaml", index)
    assert {name: entry.kind.name for name, entry in index.items()} == {
        **{"t": "TASK", "g": "TAG", "all": "GROUP"}
    }
    assert index["t"].yaml_path == tmp_path / "t.yaml"
    for name in index:  # as they were read, without their files
        index[name] = dataclasses.replace(index[name], yaml_path=None)
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(index)
    manager._factory = Ours()
    loaded = manager.load(["all"])
    assert loaded["tasks"]["t"].eval_docs[0] == {"a": "x"}
    assert asked == ["all", ["t"], "t"]


@door("lm_eval.tasks._index", "enter tasks that were read with limits, or are kept in the cache")
def _(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("task: t\n")
    made = TaskIndex.build([tmp_path])["t"]
    assert made.kind is Kind.TASK
    assert (made.name, made.yaml_path, made.tags) == ("t", tmp_path / "t.yaml", set())
    tag = Entry("tag", Kind["TAG"], None, tags={"t"})
    assert (tag.cfg, tag.tags) == (None, {"t"})


@door("lm_eval: a function is sought beside its YAML first", "know which code a digest covers")
def _(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def loads(doc): return 'mine'\n")
    (tmp_path / "t.yaml").write_text("task: t\ndoc_to_text: !function json.loads\n")
    manager = TaskManager(include_defaults=False, include_path=[str(tmp_path)])
    config = manager._factory._load_full_config(manager.task_index["t"])
    assert config["doc_to_text"]({}) == "mine"


@pytest.fixture(scope="module")
def manager(tasks: Path) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=[str(tasks)])


@door("lm_eval.tasks.TaskManager.task_index", "find tasks, groups and tags, and what is meant")
def _(manager: TaskManager, tmp_path: Path) -> None:
    assert manager.task_index["toy_letters"].kind.name == "TASK"
    assert manager.task_index["toy_all"].kind.name == "GROUP"
    assert {"toy_letters", "toy_all"} <= set(manager.all_tasks)
    text = "task: toy_tagged\ntag: [toy_tag]\ndataset_path: json\noutput_type: multiple_choice\n"
    (tmp_path / "tagged.yaml").write_text(text)
    tagged = TaskManager(include_defaults=False, include_path=[str(tmp_path)])
    assert tagged.task_index["toy_tag"].kind.name == "TAG"
    assert sorted(tagged.task_index["toy_tag"].tags) == ["toy_tagged"]


@door("lm_eval.tasks.TaskManager.load", "hold tasks and groups, loaded once")
def _(manager: TaskManager) -> None:
    loaded = manager.load(["toy_all", "toy_spelling"])
    assert set(loaded["tasks"]) == {"toy_letters", "toy_digits", "toy_spelling"}
    group = loaded["groups"]["toy_all"]
    assert {task.config.task for task in group.get_all_tasks()} == {"toy_letters", "toy_digits"}
    assert set(group.child_names) == {"toy_letters", "toy_digits"}
    assert [entry.metric for entry in group.aggregate_metric_list] == ["acc"]


@door("lm_eval: Duplicate task", "say that a task was named twice")
def _(manager: TaskManager) -> None:
    with pytest.raises(Exception, match=r"^Duplicate task"):
        manager.load(["toy_all", "toy_letters"])


@door("lm_eval.api.task.Task", "freeze its requests, and ask it for answers and choices")
def _(manager: TaskManager) -> None:
    task = manager.load(["toy_letters"])["tasks"]["toy_letters"]
    task.set_config("num_fewshot", 0)
    assert task.get_config("num_fewshot") == 0
    task.set_fewshot_seed(1)
    task.build_all_requests(limit=2)
    assert task.instances is task._instances
    assert {request.doc_id for request in task.instances} == {0, 1}
    request = task.instances[0]
    assert (request.request_type, request.repeats) == ("loglikelihood", 1)
    assert (request.resps, request.filtered_resps) == ([], {})
    assert request.doc == task.eval_docs[0]
    assert task.OUTPUT_TYPE == "multiple_choice"
    assert task.VERSION == 1.0
    assert task.dump_config()["task"] == "toy_letters"
    assert task.higher_is_better()["acc"] is True
    assert task.doc_to_choice(request.doc) == request.doc["choices"]
    answer = request.doc["answer"]
    results = [(0.0 if i == answer else -1.0, False) for i in range(4)]
    assert task.process_results(request.doc, results)["acc"] == 1.0
    assert task.config.target_delimiter == " "


@door("lm_eval.api.metrics", "know which scores are sums over items")
def _(manager: TaskManager) -> None:
    tasks = manager.load(["toy_letters", "toy_digits_bpb"])["tasks"]
    means, sums = (tasks[name].aggregation() for name in ("toy_letters", "toy_digits_bpb"))
    assert means["acc"] is lm_eval.api.metrics.mean
    assert sums["bits_per_byte"] is lm_eval.api.metrics.bits_per_byte
    assert sums["word_perplexity"] is lm_eval.api.metrics.weighted_perplexity
    assert callable(lm_eval.api.metrics.perplexity)


@door("lm_eval.api.registry", "tell its own metrics from what is fetched as code")
def _() -> None:
    assert {"acc", "exact_match"} <= set(lm_eval.api.registry.METRIC_REGISTRY)


@door("lm_eval.api.utils.maybe_delimit", "join a prompt with its reference as lm-eval does")
def _() -> None:
    assert maybe_delimit("a", "b", " ") == "a b"


@door("lm_eval.models.utils.handle_stop_sequences", "read what ends a generation")
def _() -> None:
    assert handle_stop_sequences("a", eos=None) == ["a"]
    assert handle_stop_sequences(None, eos=None) == []


@door("lm_eval.models.utils.normalize_gen_kwargs", "read how much a task generates")
def _() -> None:
    assert normalize_gen_kwargs({"max_tokens": 7}, 256)["max_gen_toks"] == 7
    assert normalize_gen_kwargs({}, 256)["max_gen_toks"] == 256


@door("transformers.utils.chat_template_utils", "reach what chat templates call")
def _() -> None:
    utils = importlib.import_module("transformers.utils.chat_template_utils")
    assert "strftime_now" in inspect.getsource(utils)


@door("transformers.utils.chat_template_utils.datetime", "stop the clock of chat templates")
def _() -> None:
    utils = importlib.import_module("transformers.utils.chat_template_utils")
    assert utils.datetime is datetime.datetime


@door("lm_eval.utils.simple_parse_args_string", "read settings of generation")
def _() -> None:
    read = lm_eval.utils.simple_parse_args_string("temperature=0.5,do_sample=True,top_k=3")
    assert read == {"temperature": 0.5, "do_sample": True, "top_k": 3}


@door("ray._private.worker.listen_error_messages", "keep a cluster's errors off stdout")
def _() -> None:
    worker = pytest.importorskip("ray._private.worker", reason="pip install -e '.[ray]'")
    assert "target=listen_error_messages" in inspect.getsource(worker.connect)


@door("lm_eval.api.group.Group", "ask a group for its tasks")
def _() -> None:
    found = importlib.import_module("lm_eval.api.group").Group
    assert {"get_all_tasks", "child_names", "aggregate_metric_list"} <= set(dir(found))


# -- lm-eval's model -------------------------------------------------------------------------------


class Watched(HFLM):  # type: ignore[misc]
    """Counts the calls of what we override; the model answers."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.calls: dict[str, list[tuple[tuple[object, ...], dict[str, object]]]] = {}


def _watch(name: str) -> Callable[..., object]:
    method = getattr(HFLM, name)

    def call(self: Watched, *args: object, **kwargs: object) -> object:
        if hasattr(self, "calls"):
            self.calls.setdefault(name, []).append((args, kwargs))
        return method(self, *args, **kwargs)

    return call


OVERRIDDEN = (
    *("_encode_pair", "tok_encode", "_loglikelihood_tokens", "tok_batch_encode"),
    "_model_generate",
)
for _name in OVERRIDDEN:
    setattr(Watched, _name, _watch(_name))


@pytest.fixture(scope="module")
def watched(trained: torch.nn.Module, manager: TaskManager) -> tuple[Watched, dict]:
    model = copy.deepcopy(trained)
    lm = Watched(pretrained=model, tokenizer=toy.tokenizer(), batch_size=4, softmax_dtype="float32")
    loaded = manager.load(["toy_letters", "toy_digits_bpb", "toy_spelling"])
    return lm, evaluate(lm, loaded, limit=2, bootstrap_iters=0)


def _calls(watched: tuple[Watched, dict], name: str) -> list[inspect.BoundArguments]:
    """How lm-eval called a method; there is at least one call."""
    signature = inspect.signature(getattr(HFLM, name))
    bound = [signature.bind(None, *args, **kw) for args, kw in watched[0].calls.get(name, ())]
    assert bound, f"lm-eval does not call {name}"
    return bound


@door("lm_eval.models.huggingface.HFLM._encode_pair", "tokenise each request once")
def _(watched: tuple[Watched, dict]) -> None:
    assert set(_calls(watched, "_encode_pair")[0].arguments) == {"self", "context", "continuation"}


@door("lm_eval.models.huggingface.HFLM.tok_encode", "tokenise each text once")
def _(watched: tuple[Watched, dict]) -> None:
    assert isinstance(_calls(watched, "tok_encode")[0].arguments["string"], str)


@door("lm_eval.models.huggingface.HFLM._loglikelihood_tokens", "learn which tokens are scored")
def _(watched: tuple[Watched, dict]) -> None:
    for call in _calls(watched, "_loglikelihood_tokens"):
        for _, context, continuation in call.arguments["requests"]:
            assert all(isinstance(token, int) for token in [*context, *continuation])


@door("lm_eval.models.huggingface.HFLM.tok_batch_encode", "count the prompts that are cut")
def _(watched: tuple[Watched, dict]) -> None:
    call = _calls(watched, "tok_batch_encode")[0].arguments
    assert isinstance(call["strings"][0], str)
    assert isinstance(call["left_truncate_len"], int)


@door("lm_eval.models.huggingface.HFLM._model_generate", "refuse logits that are not finite")
def _(watched: tuple[Watched, dict]) -> None:
    call = _calls(watched, "_model_generate")[0]
    seen = []

    def look(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.shape)
        return logits

    HFLM._model_generate(watched[0], *call.args[1:], **call.kwargs, logits_processor=[look])
    assert seen, "generate is not given the logits_processor"


@door("lm_eval.models.huggingface.HFLM._model_call", "forward a model as lm-eval does")
def _(watched: tuple[Watched, dict]) -> None:
    lm, tokens = watched[0], torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(lm._model_call(tokens), lm.model(tokens).logits)


@door("lm_eval.models.huggingface.HFLM.batch_size_per_gpu", "halve a batch that does not fit")
def _(watched: tuple[Watched, dict]) -> None:
    lm = watched[0]
    assert lm.batch_size == 4
    with setting(lm, "batch_size_per_gpu", 2):
        assert lm.batch_size == 2
    assert (lm.softmax_dtype, lm.device.type, lm.max_length) == (torch.float32, "cpu", 64)


@door("lm_eval.evaluator.evaluate: samples", "read the score and answers of each item")
def _(watched: tuple[Watched, dict]) -> None:
    rows = watched[1]["samples"]["toy_letters"]
    assert len(rows) == 2
    needed = {"doc", "doc_hash", "prompt_hash", "resps", "filter", "metrics", "acc"}
    assert needed <= set(rows[0])
    assert (rows[0]["filter"], len(rows[0]["resps"])) == ("none", 4)
    assert "acc" in rows[0]["metrics"]
    assert "acc,none" in watched[1]["results"]["toy_letters"]


@door("lm_eval.utils.handle_non_serializable", "name items as lm-eval's samples do")
def _(watched: tuple[Watched, dict]) -> None:
    row, default = watched[1]["samples"]["toy_letters"][0], lm_eval.utils.handle_non_serializable
    text = json.dumps(row["doc"], indent=2, default=default, ensure_ascii=False)
    assert row["doc_hash"] == hashlib.sha256(text.encode()).hexdigest()
    prompt = row["arguments"][0][0]
    assert row["prompt_hash"] == hashlib.sha256(prompt.encode()).hexdigest()


# -- transformers and torch ------------------------------------------------------------------------


@door("transformers.core_model_loading.revert_weight_conversion", "find each tensor in memory")
def _(trained: torch.nn.Module, checkpoints: list[Path]) -> None:
    on_disk = set(toy.load_file(checkpoints[0] / "model.safetensors"))
    numbers = {name: torch.zeros(len(p), 2) for name, p in trained.state_dict().items()}
    assert set(revert_weight_conversion(trained, numbers)) >= on_disk


@door("transformers.PreTrainedModel._load_pretrained_model", "build a model without its weights")
def _(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def stop(model: torch.nn.Module, *_: object) -> NoReturn:
        built.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(stop))
    with contextlib.suppress(KeyboardInterrupt):
        AutoModelForCausalLM.from_pretrained(checkpoints[0])
    assert all(parameter.is_meta for parameter in built[0].parameters())


@door("transformers.pytorch_utils.Conv1D", "know the linear layers that are stored turned")
def _() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    assert tuple(layer.weight.shape) == (4, 16)  # inputs, outputs


@door("transformers: deprecation_warnings of a tokenizer", "not warn of documents that are cut")
def _(caplog: pytest.LogCaptureFixture) -> None:
    encode = toy.tokenizer()
    encode.model_max_length = 4
    encode("abc abc abc", verbose=True)
    assert encode.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"]


@door("transformers: a cache can be copied and its rows selected", "forward a prefix once")
def _(trained: torch.nn.Module) -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with torch.no_grad():
        cache = trained(tokens[:, :2], use_cache=True).past_key_values
        forked = copy.deepcopy(cache)
        forked.batch_select_indices(torch.tensor([1, 0, 1]))
        logits = trained(tokens[[1, 0, 1], 2:], past_key_values=forked, use_cache=True).logits
        whole = trained(tokens).logits[[1, 0, 1], 2:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 2


@door("torch.Tensor._version", "notice that a layer's input was changed in place")
def _() -> None:
    tensor = torch.zeros(1)
    before = tensor._version
    tensor.add_(1.0)
    assert tensor._version > before


# -- the tests -------------------------------------------------------------------------------------


def doors_in(source: str) -> set[str]:
    """The names in its comments."""
    imports = {".".join(filter(None, found)) for found in IMPORT.findall(source)}
    return {*COMMENT.findall(source), *imports}


def commented() -> dict[str, list[str]]:
    """Name of a door → the files that say they use it."""
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in doors_in(path.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("at", DOORS, ids=lambda at: at.name)
def test_a_private_door_is_where_it_was(at, request):
    fixtures = {
        name: request.getfixturevalue(name) for name in inspect.signature(at.works).parameters
    }
    try:
        at.works(**fixtures)
    except Exception as error:
        library = re.split(r"[.:]", at.name)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            library += f" {importlib.metadata.version(library)}"
        users = " and ".join(commented().get(at.name, ()))
        pytest.fail(f"{library} has changed {at.name}, by which {users} can {at.use}: {error!r}")


def test_each_door_has_a_comment_where_it_is_used_and_each_comment_a_door():
    assert set(commented()) == {at.name for at in DOORS}


def library_of(module: str) -> str:
    """The library a module is of; empty for ours and Python's."""
    root = module.partition(".")[0]
    return "" if root in {*OURS, *PEERS, *sys.stdlib_module_names} else root


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


class Walk(ast.NodeVisitor):
    """What a source uses of libraries past what they document; full names, or their last part."""

    def __init__(self, source: str) -> None:
        self.found: set[str] = set()
        self._libraries: dict[str, str] = {}  # a name in the source → the library's full name
        self._of_library: dict[str, type] = {}  # our classes that derive from a library's
        tree = ast.parse(source)
        self._own = {
            *(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)),
            *(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)),
            *(str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)),  # set by name
            *(
                n.attr
                for n in ast.walk(tree)
                if isinstance(n, ast.Attribute)
                and isinstance(n.ctx, ast.Store)
                and _is_self(n.value)
            ),
        }
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if library_of(alias.name):
                self._libraries[alias.asname or alias.name.partition(".")[0]] = alias.name
                self._note(alias.name, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and library_of(node.module):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                self._libraries[alias.asname or alias.name] = full
                self._note(node.module, full)

    def _note(self, module: str, full: str) -> None:
        if is_private(full) or not {module, full} & PUBLIC:
            self.found.add(full)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        private = is_private(node.attr)
        if private and not (_is_self(node.value) and node.attr in self._own):
            self.found.add(node.attr)
        if isinstance(node.ctx, ast.Store):  # something of a library's is replaced
            whole = ast.unparse(node)
            if whole.partition(".")[0] in self._libraries:
                self.found.add(whole)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in map(ast.unparse, node.bases):
            parent = self._of_library.get(base)
            if base in self._libraries:
                module, _, name = self._libraries[base].rpartition(".")
                parent = getattr(importlib.import_module(module), name)
            if isinstance(parent, type):
                self._of_library[node.name] = parent
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and is_private(part.name):
                        self.found |= {part.name} & set(dir(parent))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found |= set(MARK.findall(node.value)) - DOCUMENTED


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_the_walk_sees_what_is_private():
    source = (
        "import lm_eval.utils\n"
        "from mlflow.entities import Run\n"
        "from mlflow.utils.uri import is_local_uri\n"
        "from lm_eval.models.huggingface import HFLM\n"
        "lm_eval.utils.apply_template = None\n"
        "class Ours(HFLM):\n"
        "    def __init__(self):\n"
        "        self._mine = 'tag mlflow.secretTag, MLFLOW_SECRET and mlflow.runName'\n"
        "    def _encode_pair(self, a):\n"
        "        return self._model_call(self._mine, a._instances, self._fresh())\n"
        "    def _fresh(self): pass\n"
    )
    assert Walk(source).found == {
        *("lm_eval.utils", "lm_eval.utils.apply_template", "mlflow.utils.uri.is_local_uri"),
        *("mlflow.secretTag", "MLFLOW_SECRET", "_encode_pair", "_model_call", "_instances"),
    }


# what the walk finds → the door that it is, where the names are not alike
CALLED = {
    "lm_eval.utils": "lm_eval.utils.apply_template",
    "_build_group_members": "lm_eval.tasks._factory.TaskFactory",
    "_load_full_config": "lm_eval.tasks._factory.TaskFactory",
    "_factory": "lm_eval.tasks._factory.TaskFactory",
    "datasets.packaged_modules": "datasets.packaged_modules._PACKAGED_DATASETS_MODULES",
    "_instances": "lm_eval.api.task.Task",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "mlflow: variables are read at each request",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "mlflow: variables are read at each request",
    "_AUTOLOGGING_GLOBALLY_DISABLED": "mlflow.utils.autologging_utils",
    "autologging_utils._AUTOLOGGING_GLOBALLY_DISABLED": "mlflow.utils.autologging_utils",
    "mlflow.store": "mlflow.store.db.utils logs the errors that it raises",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_private_is_used_without_a_door(path):
    source = path.read_text(encoding="utf-8")
    here = doors_in(source)
    for name in sorted(Walk(source).found):
        called = CALLED.get(name, name)
        assert any(door == called or door.endswith(f".{called}") for door in here), (
            f"{path.relative_to(ROOT)} uses {name}: add a door here and a comment there"
        )
