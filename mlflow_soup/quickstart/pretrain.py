"""A training loop that registers its checkpoints, in the size of a demo.

The loop itself is `Training`, plain PyTorch. `pretrain` wraps it in an MLflow run of its own and
hands a checkpoint every so many steps to `register`: few calls, which any training loop can copy.
"""

import contextlib
import copy
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mlflow_soup.errors import SpecError
from mlflow_soup.quickstart.corpus import Document, Use

END = "<|endoftext|>"
LOG_EVERY = 25  # steps, near two seconds


@dataclass(frozen=True)
class Settings:
    """The model and its training: quick on two cores, and noisy enough that merging gains."""

    # 1.3 million weights: as many as two cores can feed with 2 million tokens in about two minutes.
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    # Small, because at 2048 the output layer already costs more than any other.
    vocabulary: int = 2048
    # All passages of the tasks fit; rolling tasks are cut into windows of it.
    context: int = 128
    # 8 x 128 tokens: a small batch makes noisy steps, and many of them in the time.
    batch: int = 8
    # Higher than a single checkpoint would like. At a constant rate the weights circle around
    # a better point than any they visit; the mean of two checkpoints is nearer to it.
    learning_rate: float = 8e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    # As many as the versions of the paper's Baichuan2: the last pair is v12, v13.
    checkpoints: int = 13
    # Far enough apart that the noise of two neighbours is independent.
    steps_between: int = 150

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.checkpoints * self.steps_between

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on after `step` steps."""
        return step * self.batch * self.context


def tell(words: str) -> None:
    """Say in a log file what is going on; in a terminal, progress bars do."""
    if not sys.stderr.isatty():
        tqdm.write(words, file=sys.stderr)


def training_texts(documents: Sequence[Document]) -> list[str]:
    """The prose and the code of the training documents, each ended by `END`."""
    parts = (part for d in documents if d.use is Use.TRAIN for part in (d.prose, d.code))
    return ["\n".join(part) + END for part in parts if part]


def train_tokenizer(texts: Sequence[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts: any text can be encoded, none is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> GPTNeoXForCausalLM:
    """A small Pythia with random weights, drawn from torch's global generator."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=4 * settings.hidden,
            max_position_embeddings=settings.context,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class Training:
    """A model in training, at a constant learning rate after a linear warm-up.

    The model stays as noisy as that rate makes it: the noise that averaging two checkpoints takes
    away.

    Args:
        model: trained in place, with AdamW.
        tokens: all the text as one sequence, shape (n,); a step draws random windows from it.
        settings: batch size, learning rate, warm-up.
        seed: of the drawing.

    Attributes:
        model: the model as it is after `step` steps.
        step: how many steps were made.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: torch.Tensor, settings: Settings, seed: int
    ) -> None:
        self.model = model
        self.step = 0
        self._settings = settings
        self._windows = tokens.unfold(0, settings.context, 1)
        self.draw = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,  # a step of 70 ms would spend 6 of them in a loop over the tensors
        )

    def advance(self, steps: int, *, anneal: bool = False) -> Iterator[float]:
        """Make so many steps; yields the loss of each after it was made.

        Args:
            steps: how many.
            anneal: True lowers the rate in a straight line, so that it is zero after the last step.
        """
        self.model.train()
        for number in range(1, steps + 1):
            self.step += 1
            share = min(1.0, self.step / self._settings.warm_up)
            if anneal:
                share *= 1.0 - number / (steps + 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self._settings.learning_rate * share
            count, size = len(self._windows), (self._settings.batch,)
            batch = self._windows[torch.randint(count, size, generator=self.draw)]
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield loss.item()

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far."""
        return self._settings.tokens_seen(self.step)

    def copy(self) -> "Training":
        """Another training that goes on from here; neither changes the other."""
        other = copy.copy(self)
        # in one go, so that the optimizer's copy trains the model's copy
        other.model, other.optimizer = copy.deepcopy((self.model, self.optimizer))
        other.draw = torch.Generator()
        other.draw.set_state(self.draw.get_state())
        return other


def pretrain(
    name: str,
    documents: Sequence[Document],
    settings: Settings,
    *,
    seed: int,
    experiment_id: str,
) -> str:
    """Train a model and register its checkpoints as versions 1, 2, ... of `name`.

    Nothing is done when they are there. After an interruption the training starts again, from the
    same seed along the same way, and registers only what is missing.

    Returns:
        What was done, in a sentence.

    Raises:
        SpecError: `name` has versions that this training did not make.
    """
    client = MlflowClient()
    wanted = [version_tags(settings, n + 1, seed) for n in range(settings.checkpoints)]
    there = count_registered(client, name, wanted)
    if there == settings.checkpoints:
        return f"{name} has its {there} versions already: not pretrained again"
    tell("training the tokenizer")
    tokenizer, tokens = encode(training_texts(documents), settings)
    torch.manual_seed(seed)
    tell(f"pretraining: {settings.steps} steps, {settings.checkpoints} checkpoints")
    training = Training(new_model(tokenizer, settings), tokens, settings, seed)
    with training_run(client, experiment_id, f"pretrain {name}", settings, seed) as run_id:
        for step in log_steps(client, run_id, training, settings.steps):
            number, between = divmod(step, settings.steps_between)
            if between == 0 and number > there:
                register(client, run_id, name, training.model, tokenizer, wanted[number - 1])
                tell(f"step {step} of {settings.steps}: {name} v{number} is registered")
    return f"{name} was pretrained: versions {there + 1} to {settings.checkpoints} are new"


def encode(
    texts: Sequence[str], settings: Settings
) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """A tokenizer of the texts, and their tokens as one sequence."""
    tokenizer = train_tokenizer(texts, settings)
    encoded = tokenizer(texts, verbose=False)["input_ids"]  # longer than the context, on purpose
    return tokenizer, torch.tensor([token for ids in encoded for token in ids])


@contextlib.contextmanager
def training_run(
    client: MlflowClient,
    experiment_id: str,
    title: str,
    settings: Settings,
    seed: int,
    more: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """An MLflow run of its own with the settings as params; gives its ID, and ends it."""
    # An explicit run: `mlflow.start_run()` would take the one `mlflow run` made for the main job.
    run_id: str = client.create_run(experiment_id, run_name=title).info.run_id
    status = "FAILED"
    try:
        values = {**vars(settings), "seed": seed, **(more or {})}
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in values.items()])
        yield run_id
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)


def log_steps(
    client: MlflowClient, run_id: str, training: Training, steps: int, *, anneal: bool = False
) -> Iterator[int]:
    """Make so many steps and log them; yields the number of each step since the very first."""
    losses: list[float] = []
    title = "annealing" if anneal else "pretraining"
    for loss in tqdm(training.advance(steps, anneal=anneal), title, steps, disable=None):
        losses.append(loss)
        if training.step % LOG_EVERY == 0:
            tokens = training.tokens_seen
            log_progress(client, run_id, training.step, fmean(losses[-LOG_EVERY:]), tokens)
        yield training.step


def register(
    client: MlflowClient,
    run_id: str,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tags: dict[str, str],
) -> None:
    """Register `model` as it is now as the next version of `name`, linked to its training run."""
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id, f"step-{tags['step']}", run_id, params=tags, model_type="causal-lm"
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    mlflow.register_model(logged.model_uri, name, tags=tags)


def version_tags(settings: Settings, number: int, seed: int) -> dict[str, str]:
    """What tells the checkpoint that becomes version `number` from all others."""
    step = number * settings.steps_between
    values = {"tokens_seen": settings.tokens_seen(step), "step": step, "seed": seed}
    return {key: str(value) for key, value in values.items()}


def count_registered(client: MlflowClient, name: str, wanted: Sequence[dict[str, str]]) -> int:
    """How many of the checkpoints are versions of `name` already: 1, 2, ... without a gap.

    Args:
        client: of the registry.
        name: the registered model.
        wanted: the tags of versions 1, 2, ...

    Raises:
        SpecError: `name` has versions with other tags.
    """
    alike = re.sub(r"[^\w -]", "_", name)  # MLflow's filters have no escapes
    versions = client.search_model_versions(f"name LIKE '{alike}'")
    found = {int(v.version): v.tags for v in versions if v.name == name}
    there = 0
    while there < len(wanted) and wanted[there].items() <= found.get(there + 1, {}).items():
        there += 1
    if there < len(wanted) and max(found, default=0) > there:
        asked = f"seed {wanted[-1]['seed']}, {wanted[-1]['step']} steps"
        raise SpecError(
            f"version {there + 1} of registered model {name!r} is not from this pretraining",
            where=f"models:/{name}/{there + 1}; asked for {asked}",
            fix="choose another --model, or delete that registered model",
        )
    return there


def log_progress(client: MlflowClient, run_id: str, step: int, loss: float, tokens: int) -> None:
    """Log loss and tokens in one request: a request costs more than a metric."""
    now = int(time.time() * 1000)
    metrics = [Metric("loss", loss, now, step), Metric("tokens_seen", tokens, now, step)]
    client.log_batch(run_id, metrics)


def set_policy(name: str, policy: Mapping[str, str]) -> None:
    """Say with the registered model itself how soups of it are searched and judged.

    Args:
        name: the registered model.
        policy: tags such as `soup.tasks`; a tag that is there already stays.
    """
    client = MlflowClient()
    there = client.get_registered_model(name).tags
    for key, value in policy.items():
        if key not in there:  # what somebody changed since stays
            client.set_registered_model_tag(name, key, value)
