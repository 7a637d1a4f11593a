"""A training loop that registers its checkpoints, in the size of a demo.

The loop itself is `train`, plain PyTorch. `pretrain` wraps it in an MLflow run of its own and hands
a checkpoint every so many steps to `register`: few calls, which any training loop can copy.
"""

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from mlflow_soup.errors import SpecError
from mlflow_soup.quickstart import tasks
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


def train(
    model: GPTNeoXForCausalLM, tokens: torch.Tensor, settings: Settings, seed: int
) -> Iterator[tuple[int, float]]:
    """Train `model` in place; yields (step, loss) after each step, from step 1.

    Args:
        model: trained with AdamW at constant learning rate after a linear warm-up. It stays as
            noisy as that rate makes it: the noise that averaging two checkpoints takes away.
        tokens: all the text as one sequence, shape (n,); a step draws random windows from it.
        settings: batch size, learning rate, steps.
        seed: of the drawing.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,  # a step of 70 ms would spend 6 of them in a loop over the tensors
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warm_up)
    )
    windows = tokens.unfold(0, settings.context, 1)
    model.train()
    for step in range(1, settings.steps + 1):
        batch = windows[torch.randint(len(windows), (settings.batch,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step, loss.item()


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
        ClickException: `name` has versions that this training did not make.
    """
    client = MlflowClient()
    there = count_registered(client, name, settings, seed)
    if there == settings.checkpoints:
        return f"{name} has its {there} versions already: not pretrained again"
    texts = training_texts(documents)
    tokenizer = train_tokenizer(texts, settings)
    encoded = tokenizer(texts, verbose=False)["input_ids"]  # longer than the context, on purpose
    tokens = torch.tensor([token for ids in encoded for token in ids])
    torch.manual_seed(seed)
    model = new_model(tokenizer, settings)
    # An explicit run: `mlflow.start_run()` would take the one `mlflow run` made for the main job.
    run_id = client.create_run(experiment_id, run_name=f"pretrain {name}").info.run_id
    status = "FAILED"
    try:
        params = [Param(key, str(value)) for key, value in vars(settings).items()]
        client.log_batch(run_id, params=[*params, Param("seed", str(seed))])
        steps = train(model, tokens, settings, seed)
        losses: list[float] = []
        for step, loss in tqdm(steps, "pretraining", settings.steps, disable=None):
            losses.append(loss)
            if step % LOG_EVERY == 0:
                recent = fmean(losses[-LOG_EVERY:])
                log_progress(client, run_id, step, recent, settings.tokens_seen(step))
            number, between = divmod(step, settings.steps_between)
            if between == 0 and number > there:
                tags = version_tags(settings, number, seed)
                register(client, run_id, name, model, tokenizer, tags)
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return f"{name} was pretrained: versions {there + 1} to {settings.checkpoints} are new"


def register(
    client: MlflowClient,
    run_id: str,
    name: str,
    model: GPTNeoXForCausalLM,
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


def count_registered(client: MlflowClient, name: str, settings: Settings, seed: int) -> int:
    """How many of the checkpoints are versions of `name` already: 1, 2, ... without a gap."""
    alike = re.sub(r"[^\w -]", "_", name)  # MLflow's filters have no escapes
    versions = client.search_model_versions(f"name LIKE '{alike}'")
    found = {int(v.version): v.tags for v in versions if v.name == name}
    there = 0
    while there < settings.checkpoints:
        wanted = version_tags(settings, there + 1, seed)
        if not wanted.items() <= found.get(there + 1, {}).items():
            break
        there += 1
    if there < settings.checkpoints and max(found, default=0) > there:
        raise SpecError(
            f"version {there + 1} of registered model {name!r} is not from this pretraining",
            where=f"models:/{name}/{there + 1}; asked for seed {seed}, {settings.steps} steps",
            fix="choose another --model, or delete that registered model",
        )
    return there


def log_progress(client: MlflowClient, run_id: str, step: int, loss: float, tokens: int) -> None:
    """Log loss and tokens in one request: a request costs more than a metric."""
    now = int(time.time() * 1000)
    metrics = [Metric("loss", loss, now, step), Metric("tokens_seen", tokens, now, step)]
    client.log_batch(run_id, metrics)


def set_policy(name: str, include_path: Path) -> None:
    """Say with the registered model itself how soups of it are searched and judged."""
    policy = {
        "soup.tasks": tasks.HELD_OUT,
        "soup.ood_tasks": ",".join(tasks.OOD),
        "soup.test_tasks": tasks.TEST,
        "soup.margin": str(tasks.MARGIN),
        "soup.include_path": str(include_path),
    }
    client = MlflowClient()
    there = client.get_registered_model(name).tags
    for key, value in policy.items():
        if key not in there:  # what somebody changed since stays
            client.set_registered_model_tag(name, key, value)
