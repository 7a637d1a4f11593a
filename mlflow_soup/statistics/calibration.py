"""The text that statistics are measured on: read from a file, cut into windows of tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlflow_soup.errors import SpecError
from mlflow_soup.evaluation.live import LiveModel

WINDOW = 256  # tokens that are read together: memory for activations grows with them


@dataclass(frozen=True)
class Calibration:
    """Windows of text in a tokenizer's tokens, each at least 2, and their digest."""

    documents: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """In all windows."""
        return sum(map(len, self.documents))

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens; the order of the windows does not matter."""
        lines = sorted(json.dumps(document) for document in self.documents)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_texts(path: Path) -> list[str]:
    """Documents: the rows `{"text": …}` of a .jsonl file, or plain text with blank lines between.

    Raises:
        SpecError: it cannot be read, a row has no text, or there is none at all.
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
            + ("a row has no field text" if isinstance(error, KeyError) else str(error)),
            where=where,
            fix='write rows {"text": "…"} into a .jsonl file, or UTF-8 text into any other',
        ) from error
    if not all(isinstance(text, str) for text in texts):
        fix = 'make it rows {"text": "…"}'
        raise SpecError(f"a text in {path} is not a string", where=where, fix=fix)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise SpecError(f"{path} holds no text", where=where, fix="put some text into it")
    return texts


def calibrate(
    texts: Iterable[str], live: LiveModel, *, tokens: int, max_length: int | None = None
) -> Calibration:
    """Texts in the model's tokens, cut into windows, until there are as many as wanted.

    Args:
        texts: read no further than needed.
        live: whose tokenizer it is.
        tokens: most of them; fewer when the texts end before.
        max_length: most in a window, besides `WINDOW` and the model's own limit.

    Raises:
        SpecError: the texts are shorter than two tokens.
    """
    longest = getattr(live.model.config, "max_position_embeddings", None)
    length = min(limit for limit in (WINDOW, longest, max_length) if limit)
    windows, left = [], tokens
    for text in texts:
        ids = live.tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            window = tuple(ids[start : start + length][:left])
            if len(window) >= 2:  # of a single one, nothing is predicted
                windows.append(window)
                left -= len(window)
        if left < 2:
            break
    if not windows:
        raise SpecError(
            "there is no calibration text to speak of: not two tokens",
            where=f"--calibration, {tokens} tokens wanted, windows of {length}",
            fix="give it more text; Fisher and RegMean weights are measured on it",
        )
    return Calibration(tuple(windows))
