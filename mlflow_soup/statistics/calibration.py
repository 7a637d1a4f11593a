"""Calibration text, which statistics are measured on: read from a file, cut into token windows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.loading import tokenize_within

WINDOW = 256  # most tokens in a window; the memory for activations grows with it


@dataclass(frozen=True)
class Calibration:
    """Windows of text as tokens, at least 2 tokens each."""

    documents: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """The number of tokens in all windows."""
        return sum(map(len, self.documents))

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens; it does not depend on the order of the windows."""
        lines = sorted(json.dumps(document) for document in self.documents)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_texts(path: Path) -> list[str]:
    """The documents in a file: rows `{"text": …}` of a .jsonl file, or text between blank lines.

    Raises:
        SpecError: the file cannot be read, a row has no text, or all documents are empty.
    """
    where = f"--calibration {path}"
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            texts = [row["text"] for row in rows]
        else:
            texts = content.split("\n\n")
    except OSError as error:
        fix = "name a file that you may read"
        raise SpecError(f"{path} cannot be read: {error.strerror}", where=where, fix=fix) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(
            f"{path} is not calibration text: "
            + ('a row has no field "text"' if isinstance(error, KeyError) else str(error)),
            where=where,
            fix='write rows {"text": "…"} into a .jsonl file, or UTF-8 text into any other file',
        ) from error
    if not all(isinstance(text, str) for text in texts):
        fix = 'write each row as {"text": "…"}, with the text in quotes'
        raise SpecError(f'a field "text" in {path} is not a text', where=where, fix=fix)
    texts = [text for text in texts if text.strip()]
    if not texts:
        fix = "put text into the file; without this option the held-out items are read"
        raise SpecError(f"{path} holds no text", where=where, fix=fix)
    return texts


def calibrate(
    texts: Sequence[str], live: LiveModel, *, tokens: int, max_length: int | None = None
) -> Calibration:
    """Tokenise texts and cut them into windows, until there are enough tokens.

    Args:
        texts: the documents; tokenised only as far as needed.
        live: the model whose tokenizer is used.
        tokens: the largest number of tokens, 2 or more; there are fewer if the texts end before.
        max_length: a further limit on the tokens in a window, besides `WINDOW` and the model's own.

    Raises:
        SpecError: no text has two tokens.
        ParentError: the tokenizer takes too much time or memory, or crashes.
    """
    longest = getattr(live.model.config, "max_position_embeddings", None)
    length = min(limit for limit in (WINDOW, longest, max_length) if limit)

    def cut() -> list[tuple[int, ...]]:
        windows, left = [], tokens
        for text in texts:
            ids = live.tokenizer(text, verbose=False)["input_ids"]
            for start in range(0, len(ids), length):
                window = tuple(ids[start : start + length][:left])
                if len(window) >= 2:  # in a window of one token, nothing is predicted
                    windows.append(window)
                    left -= len(window)
            if left < 2:
                break
        return windows

    windows = tokenize_within(cut, live.tokenizer, sum(map(len, texts)))
    if not windows:
        raise SpecError(
            "the calibration text is too short: no document in it has two tokens",
            where="--calibration; without this option, the held-out items",
            fix="name a file with longer text: Fisher and RegMean need two tokens in a row",
        )
    return Calibration(tuple(windows))
