"""What counts as evidence: the experiment, and all that an examination must tell."""

import json
from dataclasses import replace

import pytest

from mlflow_soup import Spec
from mlflow_soup.registry import naming
from mlflow_soup.registry.evaluations import read_examination
from mlflow_soup.registry.trust import Trust, Unbelieved, trust_of


def test_a_file_of_another_experiment_does_not_count(client, tmp_path):
    here, there = (client.create_experiment(name) for name in ("here", "there"))
    run_id = client.create_run(there).info.run_id
    client.log_text(run_id, "x", "scores.txt")
    with pytest.raises(Unbelieved, match="another experiment"):
        Trust(client, "experiment", here).read(run_id, "scores.txt", tmp_path, "scores", {})
    path = Trust(client, "experiment", there).read(run_id, "scores.txt", tmp_path, "scores", {})
    assert path.read_text() == "x"


def test_an_examination_that_does_not_tell_how_it_scored_does_not_count(client, outcome, tmp_path):
    trust = trust_of(client, Spec())
    (run,) = trust.runs({naming.ROLE: "ood"})
    examination = read_examination(trust, run.info.run_id)
    assert {"asked", "inherited", "held_out", "ood", "limit"} <= examination.settings.keys()
    source = trust.read(run.info.run_id, naming.EVIDENCE, tmp_path, "", {})
    whole = json.loads(source.read_text())
    for name in ("asked", "inherited", "held_out", "ood", "limit"):
        settings = {key: value for key, value in whole["settings"].items() if key != name}
        copy = client.create_run(trust.experiment).info.run_id
        for role in whole["roles"].values():
            path = trust.read(run.info.run_id, role["scores"], source.parent, "", {})
            client.log_artifact(copy, str(path))
        client.log_text(copy, json.dumps(whole), naming.EVIDENCE)
        assert read_examination(trust, copy) == replace(examination, run_id=copy)
        client.log_text(copy, json.dumps(whole | {"settings": settings}), naming.EVIDENCE)
        assert read_examination(trust, copy) is None, name
