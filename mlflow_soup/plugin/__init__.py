"""lm-eval in MLflow's own words: a dataset with its source, and an evaluator, as entry points.

    tasks = mlflow.data.from_lm_eval("arc_easy,piqa")
    mlflow.models.evaluate(data=tasks, model_id="m-…", model_type="causal-lm")

`import mlflow` imports `dataset`, and the first use of `mlflow.models` imports `evaluator`, in
every program of an environment. So both import only what MLflow has loaded by then.
"""
