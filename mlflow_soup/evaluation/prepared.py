"""Run lm-eval's transformers model with all work done once that does not depend on the weights.

A search scores many weights on the same requests. `FrozenLM` forwards the model as lm-eval does,
but remembers the tokenisation. `PreparedLM` also sorts, batches and pads the requests once. It then
saves work at every evaluation:

- It computes logits only where a request reads them: the model's head gets those rows only.
- It forwards the common beginning of a task's requests once, where that saves a fifth of the
  tokens. This is a context with several choices, or the examples of all few-shot prompts.

Not every model supports both. `prepare` tries them on the model's own weights; if one fails, the
model is forwarded as lm-eval does it. The log-likelihoods equal those of lm-eval up to rounding,
which in lm-eval also depends on the shape of a batch.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from mlflow_soup.errors import ObjectiveError
from mlflow_soup.evaluation.batches import Input, Limits, Part, Tokens, divide, pack, unpack
from mlflow_soup.evaluation.frozen import Answered, Frozen, FrozenLM, Portion, arguments_of
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prompts import GENERATION

Answer = tuple[float, bool]  # log-likelihood; True when greedy decoding gives the continuation

# most padded tokens of a batch; more leave a CPU's cache, which costs 10 to 20 % of its speed
BATCH_TOKENS = {"cpu": 1 << 11, "other": 1 << 20}
# most logits of a batch, over all positions and the vocabulary: 1 GiB in float32
BATCH_LOGITS = 1 << 28
# most logits per call of log_softmax; on a CPU they stay in the cache, which is twice as fast
SOFTMAX_LOGITS = {"cpu": 1 << 20, "other": 1 << 26}
# fixed cost of a forward pass, in tokens × parameters; measured on a CPU and on an H100
OVERHEAD = {"cpu": 1e8, "other": 1.6e12}


@dataclass(frozen=True)
class _Batch:
    """A part as tensors on the model's device.

    B sequences are padded to T tokens on the right. Logits are read at N positions, for M tokens
    of continuations.
    """

    tokens: Tensor  # (B, T), without the prefixes
    reads: Tensor  # (N,), positions in the flattened tokens (B·T,)
    row: Tensor  # (M,), index of the position among the N
    token: Tensor  # (M,), the token itself
    numbers: tuple[int, ...]  # of the continuations, in the order of the M tokens
    lengths: tuple[int, ...]  # number of tokens of each continuation
    prefixes: Tensor | None  # (P, L)
    prefix: Tensor  # (B,), index of the prefix that each sequence continues

    @property
    def seen(self) -> int:
        """The number of positions that attention reads, padding and prefixes included."""
        length = 0 if self.prefixes is None else self.prefixes.shape[1]
        return self.tokens.numel() + len(self.prefix) * length

    def to(self, device: torch.device | str) -> "_Batch":
        """The batch with its tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return _Batch(**(values | moved))


@dataclass(frozen=True)
class _Plan:
    """The requests of one lm-eval method, ready to be forwarded."""

    asked: Sequence[tuple[Any, ...]]  # arguments of each request
    counts: Sequence[int]  # continuations of each request; a long document has several
    truncated: int
    inputs: Sequence[Input]
    batches: Sequence[_Batch] = ()


class PreparedLM(FrozenLM):
    """lm-eval's model, with requests that are prepared once and answered any number of times.

    Args:
        probes: True lowers the batch size, if needed, until a batch fits into memory.
    """

    def __init__(self, *args: Any, probes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._probes = probes
        self._kind = "cpu" if self.device.type == "cpu" else "other"
        # with a device map, a cache lies on several devices: an index on the CPU fits all of them
        mapped = hasattr(self.model, "hf_device_map")
        self._index_on = torch.device("cpu") if mapped else self.device
        self._head = self.model.get_output_embeddings()
        self._vocabulary = int(self.model.config.get_text_config().vocab_size)
        self._plans: dict[str, _Plan] = {}
        self._noted: list[tuple[Tokens, Tokens]] = []
        self.selects = self.shares = False  # what `prepare` found the model to support

    def prepare(self, requests: Mapping[str, Sequence[Any]]) -> None:
        """Tokenise and batch requests, and find out how the model can be forwarded.

        Args:
            requests: lm-eval method → its requests, in the order in which `evaluate` asks them.

        Raises:
            ParentError: the tokenizer takes too much time or memory, or crashes; or the generation
                config asks for too much.
            ObjectiveError: a continuation is empty, or longer than the longest input; or a task
                generates more tokens than the model can read.
            torch.OutOfMemoryError: a batch does not fit into memory; with `probes`, not even a
                batch of one sequence does.
        """
        self.check_generation(requests.get(GENERATION, ()))
        self.requests = requests
        read = self.tokenize(lambda: self._read_all(requests), requests)
        plans = {
            kind: replace(plan, asked=[request.args for request in requests[kind]])
            for kind, plan in read.items()
        }
        while True:
            try:
                self._settle([plan.inputs for plan in plans.values()])
                self._plans = {kind: self._lay_out(plan) for kind, plan in plans.items()}
                if self._probes:
                    self._try_largest()
                return
            except torch.OutOfMemoryError:
                if not self._probes or self.batch_size == 1:
                    raise
                # private door: lm_eval.models.huggingface.HFLM.batch_size_per_gpu
                self.batch_size_per_gpu //= 2
            self._plans = {}
            # torch.accelerator has empty_cache from torch 2.9 on
            getattr(torch.get_device_module(self.device), "empty_cache", lambda: None)()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """The log-likelihood of each continuation, and whether greedy decoding gives it."""
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each document: the sum over its windows."""
        return self._answer("loglikelihood_rolling", requests)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[Answer]:
        """Record the continuations that lm-eval's own methods ask for; used to make a plan."""
        self._noted += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    # ---- in portions

    @property
    def stays_whole(self) -> bool:
        """As that of `FrozenLM`: whether text is generated."""
        return any(kind not in self._plans for kind in self.requests)

    def portions(self, count: int) -> list[tuple[Portion, ...]]:
        """As that of `FrozenLM`; batches need not stay together, so their answers are the same."""
        whole = [kind for kind in self.requests if kind not in self._plans]
        each = [(k, i, b) for k, plan in self._plans.items() for i, b in enumerate(plan.batches)]
        if self.stays_whole or count < 2:
            kinds = {kind: len(plan.batches) for kind, plan in self._plans.items()}
            return [(*map(Portion, whole), *(Portion(k, 0, n) for k, n in kinds.items()))]
        share = sum(batch.seen for *_, batch in each) / count
        found: list[dict[str, Portion]] = [{} for _ in range(count)]
        seen = 0
        for kind, i, batch in each:
            own = found[int((seen + batch.seen / 2) / share)]
            own[kind] = replace(own.get(kind, Portion(kind, i)), last=i + 1)
            seen += batch.seen
        return [tuple(own.values()) for own in found if own] or [()]

    def answer_to(self, portion: Portion) -> Any:
        """What `forward` finds for one portion; pickle can copy it."""
        plan = self._plans.get(portion.kind)
        if plan is None:
            return super().answer_to(portion)
        return self._forward(plan.batches[portion.first : portion.last])

    def answers(self, parts: Sequence[Answered]) -> dict[str, list[Any]]:
        """As that of `FrozenLM`."""
        found = {p: answer for part in parts for p, answer in part.found.items()}
        plain = Answered({p: a for p, a in found.items() if p.kind not in self._plans})
        answers = super().answers([replace(plain, truncated=sum(p.truncated for p in parts))])
        for kind, plan in self._plans.items():
            own = sorted((p for p in found if p.kind == kind), key=lambda p: p.first)
            likelihoods, hits = zip(*(found[portion] for portion in own), strict=True)
            self.truncated += plan.truncated
            answers[kind] = self._gather(kind, plan, torch.cat(likelihoods), torch.cat(hits))
        return answers

    def freeze(self) -> Frozen:
        """As that of `FrozenLM`; of requests with batches, these suffice."""
        frozen = super().freeze()
        batches = {k: tuple(b.to("cpu") for b in plan.batches) for k, plan in self._plans.items()}
        state = {"batches": batches, "selects": self.selects, "shares": self.shares}
        requests = {k: asked for k, asked in frozen.requests.items() if k not in batches}
        return replace(frozen, requests=requests, state=state)

    def thaw(self, frozen: Frozen) -> None:
        """As that of `FrozenLM`."""
        state = dict(frozen.state)
        for kind, batches in state.pop("batches").items():
            moved = tuple(batch.to(self.device) for batch in batches)
            self._plans[kind] = _Plan((), (), 0, (), moved)
        super().thaw(replace(frozen, state=state))

    # ---- run once

    def _read_all(self, requests: Mapping[str, Sequence[Any]]) -> dict[str, _Plan]:
        """A plan for each method, without the requests' own arguments."""
        self.read_generation(requests.get(GENERATION, ()))
        return {
            kind: replace(self._read(kind, asked), asked=())
            for kind, asked in requests.items()
            if kind != GENERATION
        }

    def _read(self, kind: str, requests: Sequence[Any]) -> _Plan:
        """Tokenise requests as lm-eval does, and collect each distinct sequence once."""
        method = getattr(super(), kind)
        found: dict[bytes, Input] = {}
        counts, truncated, number = [], 0, 0
        previous = None
        for request in requests:
            if request.args[0] != previous:  # the choices of a document are neighbours
                self.pairs.clear()
                self.encoded.clear()
            previous = request.args[0]
            self._noted = []
            method([request], disable_tqdm=True)
            for context, continuation in self._noted:
                self._check_length(continuation, str(request.task_name))
                whole = [*context, *continuation][-(self.max_length + 1) :]
                data = pack(whole[:-1])
                one = found.setdefault(data, Input(data, str(request.task_name)))
                one.asked.append((number, continuation))
                number += 1
                truncated += self.cuts(context, continuation)
            counts.append(len(self._noted))
        inputs = sorted(found.values(), key=lambda one: (-len(one), one.data))
        return _Plan([request.args for request in requests], counts, truncated, inputs)

    def _check_length(self, continuation: Tokens, task: str) -> None:
        count, most = len(continuation), self.max_length
        if not 0 < count <= most:
            raise ObjectiveError(
                f"task {task} has an answer of {count} tokens; an answer must have 1 to {most}",
                where=f"the data of task {task}",
                fix="shorten the answer, or raise --max-length"
                if count
                else "fill in or remove the empty answer",
            )

    def _settle(self, kinds: Sequence[Sequence[Input]]) -> None:
        """Find out whether the model supports selected rows and prefixes, on its longest inputs.

        Each test forwards two inputs at most: all logits of a whole batch may not fit into memory.
        """
        firsts = [Part(inputs[: min(2, self.batch_size)]) for inputs in kinds if inputs]
        self.selects = self._head is not None and all(map(self._agrees, firsts))
        self.shares = False
        if not self.selects:
            return
        parts = [part for inputs in kinds for part in divide(inputs, self._limits(), shares=True)]
        sharing = [part for part in parts if part.shared]
        if sharing:
            longest = max(sharing, key=lambda part: part.shared + part.size[1])
            first_and_last = longest.inputs[:: max(1, len(longest.inputs) - 1)]
            self.shares = self._agrees(Part(first_and_last, longest.shared))

    def _limits(self) -> Limits:
        return Limits(
            inputs=self.batch_size,
            tokens=BATCH_TOKENS[self._kind],
            logits=BATCH_LOGITS // self._vocabulary,
            forward=OVERHEAD[self._kind] / sum(p.numel() for p in self.model.parameters()),
            selects=self.selects,
        )

    def _agrees(self, part: Part) -> bool:
        """True when the faster way gives the same logits as lm-eval's way, up to rounding."""
        plain = self._batch(Part(part.inputs))
        expected = self._model_call(plain.tokens).flatten(0, 1)[plain.reads]
        batch = self._batch(part)
        try:
            with torch.no_grad():
                logits = self._select(batch, self._fork(self._remember(batch.prefixes), batch))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model can raise anything when it does not support this
            return False
        if logits.shape != expected.shape:
            return False
        error = spread = 0.0
        step = self._softmax_rows(logits)
        for first in range(0, len(logits), step):  # float32 copies need several times the memory
            theirs = expected[first : first + step].float()
            error += float((logits[first : first + step].float() - theirs).norm()) ** 2
            spread += float(theirs.sub_(theirs.mean(-1, keepdim=True)).norm()) ** 2
        tolerance = max(8 * torch.finfo(logits.dtype).eps, 1e-5)
        return error <= tolerance**2 * spread

    def _softmax_rows(self, logits: Tensor) -> int:
        """The number of rows of (N, V) logits that are converted to float32 at once."""
        return max(1, SOFTMAX_LOGITS[self._kind] // logits.shape[-1])

    def _lay_out(self, plan: _Plan) -> _Plan:
        parts = divide(plan.inputs, self._limits(), shares=self.shares)
        return replace(plan, batches=tuple(map(self._batch, parts)))

    def _batch(self, part: Part) -> _Batch:
        height, width = part.size
        tokens = torch.zeros(height, width, dtype=torch.long)
        reads, rows, asked = [], [], []
        read = 0
        for i, one in enumerate(part.inputs):
            own = torch.from_numpy(unpack(one.data)[part.shared :])
            tokens[i, : len(own)] = own
            end = i * width + len(own)
            reads.append(torch.arange(end - one.rows, end))
            read += one.rows
            for number, continuation in one.asked:
                rows.append(torch.arange(read - len(continuation), read))
                asked.append((number, continuation))
        where = {prefix: i for i, prefix in enumerate(part.prefixes)}
        prefixes = [torch.from_numpy(unpack(prefix)) for prefix in part.prefixes]
        prefix = [where[one.before(part.shared)] for one in part.inputs] if prefixes else []
        to = {"device": self.device}
        return _Batch(
            tokens.to(**to),
            torch.cat(reads).to(**to),
            torch.cat(rows).to(**to),
            torch.tensor(list(chain.from_iterable(c for _, c in asked)), **to),
            tuple(number for number, _ in asked),
            tuple(len(c) for _, c in asked),
            torch.stack(prefixes).to(**to) if prefixes else None,
            torch.tensor(prefix, dtype=torch.long, device=self._index_on),
        )

    def _try_largest(self) -> None:
        """Forward the batches that need the most memory, to see whether they fit."""
        for batches in filter(None, (plan.batches for plan in self._plans.values())):
            self._forward([max(batches, key=lambda batch: batch.seen)])
            self._forward([max(batches, key=lambda batch: len(batch.reads))])

    # ---- run for each λ

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """The answers to requests, by the plan that was prepared for them, or by a new plan."""
        plan = self._plans.get(kind)
        if plan is None or plan.asked != [request.args for request in requests]:
            plan = self._lay_out(self._read(kind, requests))
        self.truncated += plan.truncated
        return self._gather(kind, plan, *self._forward(plan.batches))

    def _gather(self, kind: str, plan: _Plan, picked: Tensor, hits: Tensor) -> list[Any]:
        """The answers to the requests of a plan, as lm-eval's method gives them.

        Args:
            kind: the method.
            plan: the plan.
            picked: the log-likelihood of each token of all batches, shape (M,).
            hits: whether greedy decoding gives it, shape (M,).
        """
        answers: list[Answer] = [(0.0, False)] * sum(plan.counts)
        lengths = [length for batch in plan.batches for length in batch.lengths]
        numbers = (number for batch in plan.batches for number in batch.numbers)
        pieces = zip(torch.split(picked, lengths), torch.split(hits, lengths), strict=True)
        for number, (likelihoods, equal) in zip(numbers, pieces, strict=True):
            # summed as lm-eval sums, in the same precision
            answers[number] = (float(likelihoods.sum()), bool(equal.all()))
        if kind == "loglikelihood":
            return answers
        ends = accumulate(plan.counts, initial=0)  # the windows of each document
        return [sum(value for value, _ in answers[begin:end]) for begin, end in pairwise(ends)]

    def _forward(self, batches: Sequence[_Batch]) -> tuple[Tensor, Tensor]:
        """The log-likelihood of each token, and whether greedy decoding gives it; shapes (M,)."""
        found = []
        known, cache = None, None
        with torch.no_grad():
            for batch in batches:
                if batch.prefixes is None:
                    cache = None
                elif known is None or not torch.equal(known, batch.prefixes):
                    cache = self._remember(batch.prefixes)
                known = batch.prefixes
                found.append(self._pick(self._logits(batch, cache), batch))
        if not found:
            return torch.empty(0), torch.empty(0, dtype=torch.bool)
        picked, hits = zip(*found, strict=True)
        return torch.cat(picked).cpu(), torch.cat(hits).cpu()

    def _logits(self, batch: _Batch, cache: Any) -> Tensor:
        """The logits at the positions that are read, shape (N, V)."""
        if self.selects:
            return self._select(batch, self._fork(cache, batch))
        # private door: lm_eval.models.huggingface.HFLM._model_call
        logits: Tensor = self._model_call(batch.tokens)
        return logits.flatten(0, 1)[batch.reads]

    def _select(self, batch: _Batch, cache: Any) -> Tensor:
        logits: Tensor = self._call(batch.tokens, batch.reads, cache).logits
        return logits.squeeze(0)

    def _call(self, tokens: Tensor, reads: Tensor, cache: Any, keep: bool = False) -> Any:
        """Run the model with a head that gets only the positions that are read."""

        def select(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            # with a device map, the head's input may lie on another device than the tokens
            return (args[0].flatten(0, 1)[reads.to(args[0].device)].unsqueeze(0),)

        more = {} if cache is None else {"past_key_values": cache}
        handle = self._head.register_forward_pre_hook(select)
        try:
            return self.model(tokens, use_cache=keep or cache is not None, **more)
        finally:
            handle.remove()

    def _remember(self, prefixes: Tensor | None) -> Any:
        """The cache with the keys and values of prefixes."""
        if prefixes is None:
            return None
        nothing = torch.zeros(1, dtype=torch.long, device=prefixes.device)
        return self._call(prefixes, nothing, None, keep=True).past_key_values

    def _fork(self, cache: Any, batch: _Batch) -> Any:
        """A copy of the cache with one row for each sequence of the batch."""
        if cache is None:
            return None
        # private door: transformers: a cache can be copied and its rows selected
        forked = copy.deepcopy(cache)
        forked.batch_select_indices(batch.prefix)
        return forked

    def _pick(self, logits: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The log-likelihood of each token from logits (N, V), and whether it is the argmax."""
        picked = torch.empty(len(batch.row), dtype=self.softmax_dtype, device=logits.device)
        hits = torch.empty(len(batch.row), dtype=torch.bool, device=logits.device)
        step = self._softmax_rows(logits)
        for first in range(0, len(logits), step):
            scores = torch.log_softmax(logits[first : first + step], -1, dtype=self.softmax_dtype)
            inside = (batch.row >= first) & (batch.row < first + step)
            row, token = batch.row[inside] - first, batch.token[inside]
            likelihoods = scores[row, token]
            hit = likelihoods == scores.amax(-1)[row]
            # Of equal logits the first is the argmax. argmax takes ten times as long as amax, so it
            # runs only for the rows where the token has the maximum.
            hit[hit.clone()] = scores[row[hit]].argmax(-1) == token[hit]
            picked[inside], hits[inside] = likelihoods, hit
        return picked, hits


def open_lm(live: LiveModel, frozen: Frozen) -> FrozenLM:
    """A model that answers the requests that another process froze."""
    prepared = "batches" in frozen.state
    lm = (PreparedLM if prepared else FrozenLM)(**arguments_of(live, frozen.settings))
    lm.thaw(frozen)
    return lm
