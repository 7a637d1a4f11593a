"""Say errors in the words of a Python caller, who has no command line and no policy tags."""

import contextlib
import re
from collections.abc import Iterator

from mlflow_soup.errors import SoupError

# what decides the items, as MLflow stores it; the leave for code is given by whoever loads
STORED = ("tasks", "include_path", "num_fewshot", "limit")
OF_DATASET = (*STORED, "allow_task_code")
OF_EVALUATOR = (
    *("evaluator", "batch_size", "max_length", "device", "device_map"),
    *("apply_chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs"),
    *("cluster", "margin", "confidence"),
)
_TAG = re.compile(r", (?:or|and)(?: the model's)? tag soup\.\w+(?: of the model)?")
# whole commands stay as they are
_OPTION = re.compile(r"`[^`]*`|mlflow-soup [^;,]*|--([a-z]+(?:-[a-z]+)*)")


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Tell an error that leaves the block by the names of arguments; also a decorator."""
    try:
        yield
    except SoupError as error:
        error.what, error.where, error.fix = map(_said, (error.what, error.where, error.fix))
        error.args = (error.what, error.where, error.fix)
        raise


def _said(text: str) -> str:
    return _OPTION.sub(_name, _TAG.sub("", text))


def _name(found: re.Match[str]) -> str:
    name = (found[1] or "").replace("-", "_")
    return name if name in (*OF_DATASET, *OF_EVALUATOR) else found[0]
