import json

import pytest

import toy
from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.statistics.calibration import WINDOW, Calibration, calibrate, read_texts
from mlflow_soup.weights.find import find_checkpoint


@pytest.fixture(scope="module")
def live(checkpoints):
    return LiveModel(find_checkpoint(checkpoints[0], "v1"), "cpu")


def test_plain_text_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("kam kam\nkam\n\n\n\nsüß\n")
    assert read_texts(path) == ["kam kam\nkam", "süß\n"]


def test_rows_of_json_give_their_text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a\\n\\nb"}\n\n{"text": "c", "id": 3}\n{"text": " "}\n')
    assert read_texts(path) == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jsonl", b'{"texts": "a"}', 'a row has no field "text"'),
        ("text.jsonl", b'{"text": "a"', "is not calibration text"),
        ("text.jsonl", b'["a"]', "is not calibration text"),
        ("text.jsonl", b'{"text": 3}', 'a field "text" in .* is not a text'),
        ("text.jsonl", b"", "holds no text"),
        ("text.txt", b"\n \n\n", "holds no text"),
        ("text.txt", b"\xff\xfe", "is not calibration text"),
    ],
)
def test_a_file_without_text_is_refused_with_a_reason(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=words) as refusal:
        read_texts(tmp_path / name)
    assert refusal.value.where == f"--calibration {tmp_path / name}"


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")


@pytest.mark.parametrize("length", [1000, 63, 64, 65, 2])
def test_windows_are_the_text_cut_at_the_limit_of_the_model(live, length):
    text = "kam " * (length // 4) + "kam"[: length % 4]  # each letter is one token
    calibration = calibrate([text], live, tokens=10_000)
    own = live.model.config.max_position_embeddings
    assert own == 64
    assert own < WINDOW
    sizes = [own] * (length // own) + ([length % own] if length % own > 1 else [])
    assert [len(window) for window in calibration.documents] == sizes
    ids = [token for window in calibration.documents for token in window]
    assert live.tokenizer.decode(ids) == text[: len(ids)]


def test_windows_keep_the_requested_limit(live):
    calibration = calibrate(["kam " * 10], live, tokens=100, max_length=15)
    assert [len(window) for window in calibration.documents] == [15, 15, 10]


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 20, 21, 29, 30])
def test_no_more_tokens_are_read_than_wanted(live, tokens):
    calibration = calibrate(["kam kam ka"] * 9, live, tokens=tokens)
    assert tokens - 1 <= calibration.tokens <= tokens
    assert all(len(window) >= 2 for window in calibration.documents)


@pytest.mark.parametrize("texts", [[], ["k"], [""]])
def test_text_without_two_tokens_is_refused(live, texts):
    with pytest.raises(SpecError, match="too short: no document in it has two tokens"):
        calibrate(texts, live, tokens=100)


def test_the_digest_does_not_depend_on_the_order_of_the_windows():
    first = Calibration(((1, 2, 3), (4, 5)))
    assert first.tokens == 5
    assert first.digest == Calibration(((4, 5), (1, 2, 3))).digest
    others = [((1, 2), (3, 4, 5)), ((1, 2, 3), (4, 6)), ((1, 2, 3),), ((1, 2, 3), (4, 5), (4, 5))]
    assert len({first.digest, *(Calibration(other).digest for other in others)}) == 5


def test_the_rows_of_the_toy_tasks_can_be_read(tasks):
    texts = read_texts(tasks / "text.jsonl")
    assert len(texts) == 40
    assert texts[0] == json.loads((tasks / "text.jsonl").read_text().splitlines()[0])["text"]
    assert set("".join(texts)) <= set(toy.DIGITS + " ")
