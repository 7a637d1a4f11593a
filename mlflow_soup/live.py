"""A transformers model in memory whose weights are any mix of open checkpoints.

Parents are opened through `from_pretrained` as well, so that whatever renaming or fusing the
installed transformers does between disk and memory happens to all alike; linear merges commute
with it. Same-dtype checkpoints are memory-mapped, so parents cost page cache, not memory.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_soup.checkpoint import Checkpoint
from mlflow_soup.errors import ParentError, SpecError
from mlflow_soup.merge import mix

Weights = Mapping[str, Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notes of libraries, which cannot be switched off one by one."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _load(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint, every weight accounted for."""
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.weights),
                dtype="auto",
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ParentError(
            f"transformers cannot load {checkpoint.label}: {error}",
            where=str(checkpoint.weights),
            fix="register a checkpoint that AutoModelForCausalLM.from_pretrained loads",
        ) from error
    model, info = loaded
    # missing weights would be initialised at random, with only a warning
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ParentError(
                f"{checkpoint.label} has {problem.replace('_', ' ')}: {sorted(info[problem])[:5]}",
                where=str(checkpoint.weights),
                fix="register the checkpoint again, as save_pretrained writes it",
            )
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once (by storage, not by name)."""
    seen: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if seen.setdefault(tensor.data_ptr(), name) == name
    }


def open_weights(checkpoint: Checkpoint) -> Weights:
    """A checkpoint's tensors under the names they have in memory; not to be written into.

    Raises:
        ParentError: transformers cannot load it, or some weight is missing or left over.
    """
    return _tensors(_load(checkpoint))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"there is no device {name!r}: {str(error).splitlines()[0]}",
            where="--device",
            fix="cpu, cuda, cuda:1 …; auto takes a GPU if there is one",
        ) from error


class LiveModel:
    """The one model that evaluations run on.

    Args:
        checkpoint: whose architecture and tokenizer it takes.
        device: `cpu`, `cuda`, …; `auto` takes a GPU if there is one.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto") -> None:
        self.model = _load(checkpoint).to(_device(device)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.tokenizer), trust_remote_code=False, local_files_only=True
        )
        self._tensors = _tensors(self.model)

    @torch.no_grad()
    def set_weights(self, sources: Sequence[Weights], lam: Sequence[float]) -> None:
        """Write Σ λ_i·Θ_i into the model, always from the parents: moving from λ to λ' drifts."""
        for name, tensor in self._tensors.items():
            tensor.copy_(mix([source[name] for source in sources], lam, name=name))
        self.model.eval()
