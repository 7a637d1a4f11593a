"""lm-eval's transformers model, with requests that are fixed once and answered any number of times.

`prepare` tokenises the requests. `forward` answers them, or a portion of them, with the current
weights. `answers` puts portions together, whoever answered them: `freeze` packs what another
process needs to answer a portion, and `thaw` unpacks it there.
"""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor

from mlflow_soup.errors import ObjectiveError, ParentError, brief
from mlflow_soup.evaluation.batches import Tokens
from mlflow_soup.evaluation.items import SEEDS
from mlflow_soup.evaluation.limits import Result
from mlflow_soup.evaluation.live import LiveModel, not_finite
from mlflow_soup.evaluation.loading import quiet, tokenize_within
from mlflow_soup.evaluation.prompts import GENERATION
from mlflow_soup.evaluation.task_folders import blaming


@dataclass(frozen=True)
class Portion:
    """A part of the requests: a run of the batches of one lm-eval method, or all its requests.

    Attributes:
        kind: the lm-eval method, such as `loglikelihood`.
        first, last: the batches from `first` to before `last`; both 0 for all requests.
    """

    kind: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Answered:
    """What a model answered under one set of weights.

    Attributes:
        found: portion → its answers, as the model that answered gives them.
        truncated: how many requests were cut while they were answered.
    """

    found: Mapping[Portion, Any]
    truncated: int = 0


@dataclass(frozen=True)
class Frozen:
    """What another process needs to answer the requests of a model; pickle can copy it.

    Attributes:
        settings: the arguments of the model, except transformers' own objects.
        tasks: the names of the tasks, for errors.
        requests: lm-eval method → the arguments of each request that has no batch.
        state: attributes of the model.
    """

    settings: Mapping[str, Any]
    tasks: str
    requests: Mapping[str, Sequence[tuple[Any, ...]]]
    state: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Seed all random numbers as the lm_eval command does; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[2])
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _quiet_copy(tokenizer: Any) -> Any:
    """A copy of the tokenizer that HFLM may change, without warnings about documents that get cut.

    HFLM sets a pad token on the tokenizer it is given.
    """
    copied = copy.deepcopy(tokenizer)
    # private door: transformers: deprecation_warnings of a tokenizer
    copied.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return copied


def arguments_of(live: LiveModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of lm-eval's model for a live model.

    Args:
        live: the model and its tokenizer.
        settings: `batch_size`; and `max_length`, None for the model's own limit.
    """
    tokenizer = _quiet_copy(live.tokenizer)
    fixed = {"pretrained": live.model, "tokenizer": tokenizer, "softmax_dtype": "float32"}
    return fixed | dict(settings)


class FrozenLM(HFLM):  # type: ignore[misc]
    """lm-eval's model, which tokenises each text once and counts the requests that it cuts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: Mapping[str, Sequence[Any]] = {}
        self.tasks = ""  # whose requests these are
        self.pairs: dict[tuple[str, str], Any] = {}
        self.encoded: dict[Any, list[int]] = {}
        self._only_reads = False  # True in the fork that tokenises the requests
        self.truncated = 0  # requests cut to max_length since it was last set to 0

    def prepare(self, requests: Mapping[str, Sequence[Any]]) -> None:
        """Tokenise the requests, and check that what they generate has an end.

        Args:
            requests: lm-eval method → its requests, in the order in which `evaluate` asks them.

        Raises:
            ParentError: the tokenizer takes too much time or memory, or crashes; or the generation
                config asks for too much.
            ObjectiveError: a task generates more tokens than the model can read.
        """
        self.check_generation(requests.get(GENERATION, ()))
        self.pairs, self.encoded = self.tokenize(lambda: self._read_all(requests), requests)
        self.requests = requests
        asked = (request for each in requests.values() for request in each)
        self.tasks = " or ".join(dict.fromkeys(str(request.task_name) for request in asked))

    @property
    def stays_whole(self) -> bool:
        """Whether the requests cannot be divided: lm-eval chooses the batches as it answers."""
        return True

    def portions(self, count: int) -> list[tuple[Portion, ...]]:
        """The requests in at most `count` shares that cost about the same.

        What one call of lm-eval answers together stays together: generated text may depend on it.
        """
        return [tuple(Portion(kind) for kind in self.requests)]

    def forward(self, portions: Sequence[Portion]) -> Answered:
        """Answer portions with the current weights.

        Raises:
            NonFiniteError: logits that text is generated from are not finite.
            ObjectiveError: memory ran out.
            SpecError: lm-eval cannot ask an item.
        """
        self.truncated = 0
        self.model.eval()
        blame = blaming(self.tasks, "could not be answered", "while the model answered its items")
        with blame, self.enough_memory(), quiet(), seeded(self.device):
            found = {portion: self.answer_to(portion) for portion in portions}
        return Answered(found, self.truncated)

    def answer_to(self, portion: Portion) -> Any:
        """What `forward` finds for one portion; pickle can copy it."""
        method = getattr(self, portion.kind)
        return method(self.requests[portion.kind], disable_tqdm=True)

    def answers(self, parts: Sequence[Answered]) -> dict[str, list[Any]]:
        """lm-eval method → its answers, from all portions; `truncated` is set, too."""
        self.truncated = sum(part.truncated for part in parts)
        return {portion.kind: found for part in parts for portion, found in part.found.items()}

    def freeze(self) -> Frozen:
        """What another process needs to answer these requests."""
        requests = {kind: [r.args for r in asked] for kind, asked in self.requests.items()}
        state = {"pairs": self.pairs, "encoded": self.encoded}
        return Frozen(self._settings(), self.tasks, requests, state)

    def thaw(self, frozen: Frozen) -> None:
        """Take the requests of another process over."""
        self.tasks = frozen.tasks
        self.requests = {
            kind: [SimpleNamespace(args=args) for args in asked]
            for kind, asked in frozen.requests.items()
        }
        for name, value in frozen.state.items():
            setattr(self, name, value)

    def _settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "max_length": self.max_length}

    @contextlib.contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Say what to do where memory runs out.

        Raises:
            ObjectiveError: it did.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ObjectiveError(
                f"the evaluation ran out of memory: {brief(error)}",
                where=f"batch size {self.batch_size}",
                fix="choose a smaller --batch-size",
            ) from error

    def tokenize(self, work: Callable[[], Result], requests: Mapping[str, Sequence[Any]]) -> Result:
        """What work returns that tokenises requests; they decide how long it may take."""
        arguments = [request.args for asked in requests.values() for request in asked]
        return tokenize_within(work, self.tokenizer, sum(len(str(each)) for each in arguments))

    def _read_all(self, requests: Mapping[str, Sequence[Any]]) -> Any:
        """What is remembered once lm-eval's methods have tokenised the requests."""
        self._only_reads = True
        for kind, asked in requests.items():
            if kind == GENERATION:
                self.read_generation(asked)
            else:
                getattr(self, kind)(asked, disable_tqdm=True)
        return self.pairs, self.encoded

    def read_generation(self, requests: Sequence[Any]) -> None:
        """Tokenise prompts and the texts that end a generation."""
        for request in requests:
            context, settings = request.args
            self.tok_encode(context)
            # private door: lm_eval.models.utils.handle_stop_sequences
            for stop in handle_stop_sequences(settings.get("until"), eos=None):
                self.tokenizer.encode(stop, add_special_tokens=False)

    def check_generation(self, requests: Sequence[Any]) -> None:
        """Refuse requests for more text than the model can read, and configs that ask for it.

        Raises:
            ParentError, ObjectiveError: as `prepare`.
        """
        for request in requests:
            # private door: lm_eval.models.utils.normalize_gen_kwargs
            count = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if count >= self.max_length:
                raise ObjectiveError(
                    f"task {request.task_name} generates up to {count} tokens, but the model reads "
                    f"{self.max_length} in all, with the prompt",
                    where=f"max_gen_toks in the generation_kwargs of task {request.task_name}",
                    fix="lower max_gen_toks, or raise --max-length",
                )
        if not requests:
            return
        most_of = {"max_new_tokens": self.max_length - 1, "num_return_sequences": 1}
        for setting, most in most_of.items():
            value = getattr(self.model.generation_config, setting, None)
            if value is not None and value > most:
                raise ParentError(
                    f"the model generates with {setting} = {value}, but {most} is the most",
                    where=f"generation_config.json in {self.model.name_or_path}",
                    fix=f"register the versions with a {setting} of {most} or less, or without one",
                )

    # private door: lm_eval.models.huggingface.HFLM._encode_pair
    def _encode_pair(self, context: str, continuation: str) -> Any:
        key = (context, continuation)
        if key not in self.pairs:
            self.pairs[key] = super()._encode_pair(context, continuation)
        return self.pairs[key]

    # private door: lm_eval.models.huggingface.HFLM.tok_encode
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        """The tokens that lm-eval's method gives; each text is tokenised once."""
        key = (string, add_special_tokens, *sorted(kwargs.items()))
        if key not in self.encoded:
            self.encoded[key] = super().tok_encode(string, add_special_tokens, **kwargs)
        return list(self.encoded[key])

    # private door: lm_eval.models.huggingface.HFLM._loglikelihood_tokens
    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if self._only_reads:
            return [(0.0, False)] * len(requests)
        self.truncated += sum(self.cuts(context, asked) for _, context, asked in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def cuts(self, context: Tokens, continuation: Tokens) -> bool:
        """Whether a request is longer than the longest input."""
        # the model never reads the last token, it only predicts it
        return bool(len(context) + len(continuation) - 1 > self.max_length)

    # private door: lm_eval.models.huggingface.HFLM.tok_batch_encode
    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> Any:
        """The batch that lm-eval's method gives for generation; cut prompts are counted."""
        if left_truncate_len:
            self.truncated += sum(len(self.tok_encode(s)) > left_truncate_len for s in strings)
        return super().tok_batch_encode(
            strings, *args, left_truncate_len=left_truncate_len, **kwargs
        )

    # private door: lm_eval.models.huggingface.HFLM._model_generate
    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        """The text that lm-eval's method generates; NaN or infinite logits raise NonFiniteError.

        Text alone would not show that the logits it was chosen by are not finite.
        """
        return super()._model_generate(*args, logits_processor=[_check_logits], **kwargs)


def _check_logits(_: Tensor, logits: Tensor) -> Tensor:
    """Return the logits (B, V) of a next token unchanged, after checking that they are finite."""
    if not torch.isfinite(logits.amax(-1)).all():  # NaN and +infinity reach the maximum
        what = "the logits that the next token is chosen by are not finite"
        raise not_finite(what, "while the model generated text")
    return logits
