# ruff: noqa: E402 (what comes before an import is for that import)
"""All that a command imports, also late; for processes of which commands are forked.

A search imports for two seconds more than its modules do: MLflow's stores when one is opened, and
much of torch and transformers when a model is loaded. So one is loaded here. lm-eval's index of its
tasks is made here too: a command whose cache is empty would take six seconds for it.
"""

import gc
import tempfile
from pathlib import Path

gc.disable()  # as the commands do

import git
import lm_eval.api.task
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import mlflow.projects
import mlflow.store.model_registry.sqlalchemy_workspace_store
import mlflow.store.tracking.sqlalchemy_workspace_store
import mlflow.transformers
import opentelemetry.sdk.metrics.export
import scipy.io
import sqlalchemy.dialects.sqlite
from transformers import AutoModelForCausalLM, AutoTokenizer

import toy
from mlflow_soup.evaluation.library import library
from mlflow_soup.workflows import doctor, merge, release, run, study, verify

USED = (
    *(git, lm_eval, matplotlib, mlflow, opentelemetry, scipy, sqlalchemy),
    *(doctor, merge, release, run, study, verify),
)

with tempfile.TemporaryDirectory() as folder:
    saved = toy.save(toy.train(0), Path(folder, "model"))
    AutoModelForCausalLM.from_pretrained(saved)
    AutoTokenizer.from_pretrained(saved)
library()

gc.freeze()  # the forks need not look through it
gc.enable()
