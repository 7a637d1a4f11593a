"""Items that share a passage go together: by the field that a user names, or a known one."""

import json
from collections import Counter

import pytest
import yaml

from mlflow_soup import Spec
from mlflow_soup.decision.pairing import paired
from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.items import all_items
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import Prompting
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workflows.bench import load_suites

TEXT = "a passage of which several questions ask, long enough to be no label or a topic: number "


@pytest.fixture(scope="module")
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"))


@pytest.fixture
def write(tasks, tmp_path):
    """Write the task `mine` with more fields in its documents."""

    def write(more):
        lines = (tasks / "letters.jsonl").read_text().splitlines()[:60]
        rows = [json.loads(line) | more(number) for number, line in enumerate(lines)]
        config = yaml.safe_load((tasks / "letters.yaml").read_text()) | {"task": "mine"}
        split = config.get("validation_split") or config["test_split"]
        config["dataset_kwargs"] = {"data_files": {split: "mine.jsonl"}}
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path)

    return write


def score(live, folder, **options):
    suite = load_suite("mine", include_path=folder)
    return Evaluator(live, suite, prompting=Prompting(**options)).score()


@pytest.mark.parametrize("field", ["passage", "article"])
def test_questions_on_one_passage_are_one_cluster(live, write, field):
    folder = write(lambda number: {field: f"{TEXT * 2}{number // 3}"})
    items = score(live, folder).items[0]
    assert sorted(Counter(items.clusters).values()) == [3] * 20
    assert items.clusters[0] == items.clusters[2] != items.clusters[3]
    # the names are known without a model, and pair with themselves
    (part,) = all_items(load_suite("mine", include_path=folder), Prompting())["mine:acc"]
    assert part == (items.task, items.metric, items.ids)
    assert paired(score(live, folder), score(live, folder)).clusters == 20


@pytest.mark.parametrize(
    "more",
    [
        lambda number: {"passage": f"{TEXT * 2}{number}"},  # nothing is repeated
        lambda number: {"passage": f"short {number // 3}"},
        lambda number: {"passage": f"{TEXT * 2}{number // 30}"},  # two of them: perhaps a topic
        lambda number: {"passage": number // 3},
        lambda number: {"instruction": f"{TEXT * 2}{number // 3}"},  # an unknown field
        lambda number: {},
    ],
    ids=["unique", "short", "few", "numbers", "another field", "no field"],
)
def test_nothing_else_is_taken_for_a_passage(live, write, more):
    items = score(live, write(more)).items[0]
    assert items.clusters == list(items.ids)


def test_a_document_without_a_passage_is_one_by_itself(live, write):
    folder = write(lambda number: {"passage": f"{TEXT * 2}{number // 3}" if number else ""})
    items = score(live, folder).items[0]
    assert sorted(Counter(items.clusters).values()) == [1, 2, *[3] * 19]


def test_a_field_that_is_named_does_not_break_up_passages(live, write):
    folder = write(lambda number: {"idx": number, "passage": f"{TEXT * 2}{number // 3}"})
    assert score(live, folder, cluster="idx").items[0] == score(live, folder).items[0]


def test_a_field_that_is_named_counts_whatever_it_holds(live, write):
    folder = write(lambda number: {"topic": number // 6 or None, "passage": TEXT * 2})
    items = score(live, folder, cluster="topic").items[0]
    assert sorted(Counter(items.clusters).values()) == [1] * 6 + [6] * 9
    # another field, other names: such scores are not compared
    plain = score(live, folder)
    assert plain.value == score(live, folder, cluster="topic").value
    assert plain.items[0].ids != items.ids


def test_what_a_task_asks_changes_with_its_clusters(live, write):
    folder = write(lambda number: {"topic": number // 6})
    suite = load_suite("mine", include_path=folder)
    digests = {
        Evaluator(live, suite, prompting=Prompting(cluster=field)).fingerprint
        for field in ("", "topic", "")
    }
    assert len(digests) == 2


def test_a_field_that_no_document_has_is_refused(write):
    folder = write(lambda number: {"topic": number // 6})
    load_suites(Spec(tasks="mine", include_path=folder, cluster="topic"))
    with pytest.raises(
        SpecError, match="no document of the tasks has the field 'subject'"
    ) as found:
        load_suites(Spec(tasks="mine", include_path=folder, cluster="subject"))
    assert "topic" in found.value.fix
