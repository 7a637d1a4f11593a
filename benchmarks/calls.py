"""How many HTTP requests a job sends to an MLflow server, by kind, and how many each trial adds.

    python benchmarks/calls.py

It starts `mlflow server` on SQLite with a toy model, and counts what passes a proxy in front of it:
the main job of a pair with four trials and with eight. Artifacts go through the server. The beats
of the lease depend on the time that a job takes, and count apart.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TRIALS = (4, 8)


def kind(method: str, path: str) -> str:
    """A request in words: what is asked, without ids and names."""
    path = path.partition("?")[0]
    if "/mlflow-artifacts/" in path:
        return f"{method} artifact"
    path = re.sub(r"^.*/mlflow/", "", path)
    return re.sub(r"/(m-)?[0-9a-f]{32}\b", "/ID", path)


def count(folder: Path) -> dict[int, Counter[str]]:
    """Number of trials → kind of request → how many requests of the kind the main job sent."""
    import mlflow

    import toy
    from conftest import fill, free_port, start_server, stop_server  # as the tests have them
    from mlflow_soup import Spec
    from mlflow_soup import run as run_soup
    from proxy import Proxy

    port = free_port()
    artifacts = ("--artifacts-destination", str(folder / "artifacts"))
    server = start_server(folder / "store.db", port, *artifacts)
    proxy = Proxy(port)
    try:
        trained = toy.train()
        mlflow.set_tracking_uri(proxy.uri)
        folders = [toy.save(toy.noisy(trained, i, 0.9), folder / f"v{i}") for i in (1, 2)]
        tasks = toy.write_tasks(folder / "tasks", count=100)
        client = mlflow.MlflowClient()
        found = {}
        for trials in TRIALS:
            name = f"toy-{trials}"
            client.create_experiment(name)
            mlflow.set_experiment(name)
            fill(client, folders, tasks, name)
            seen: Counter[str] = Counter()

            def note(method: str, path: str, seen: Counter[str] = seen) -> None:
                seen[kind(method, path)] += 1

            proxy.plan = note
            run_soup(Spec(model=name, pair="v1,v2", trials=trials, stop=0.0, promote="champion"))
            proxy.plan = lambda method, path: None
            found[trials] = seen
        return found
    finally:
        stop_server(server)


def main() -> None:
    """Count, then print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_SOUP_CACHE"] = f"{temporary}/cache"
        found = count(Path(temporary))
    few, many = (found[trials] for trials in TRIALS)
    kinds = sorted({*few, *many}, key=lambda name: -few[name])
    width = max(map(len, kinds))
    print(f"{'':{width}}  {TRIALS[0]} trials  {TRIALS[1]} trials  each trial")
    for name in [*kinds, "all"]:
        numbers = [counts.total() if name == "all" else counts[name] for counts in (few, many)]
        each = (numbers[1] - numbers[0]) / (TRIALS[1] - TRIALS[0])
        print(f"{name:{width}}  {numbers[0]:8}  {numbers[1]:8}  {each:10.2f}")
    print(json.dumps({str(trials): dict(counts) for trials, counts in found.items()}))


if __name__ == "__main__":
    main()
