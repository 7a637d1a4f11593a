"""A small Llama, pretrained at a constant rate, and its twins, whose rate is annealed to zero."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from mlflow import MlflowClient
from text import Document, Use
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlflow_soup.quickstart import pretrain
from mlflow_soup.quickstart.pretrain import END, Training


@dataclass(frozen=True)
class Settings(pretrain.Settings):
    """What differs from the quickstart: the architecture, and how long it trains."""

    intermediate: int = 256
    key_value_heads: int = 2
    learning_rate: float = 6e-3
    # Twice as many as the quickstart, so that windows of up to 12 end at several places.
    checkpoints: int = 24
    steps_between: int = 120
    # Where the twins leave: after so many checkpoints.
    annealed: tuple[int, ...] = (8, 14, 20)
    # How long a twin takes to its rate of zero. At its end it has seen as much as the checkpoint
    # that came as many later: 12, 18 and 24.
    annealed_over: int = 4


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> LlamaForCausalLM:
    """A small Llama with random weights, drawn from torch's global generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            intermediate_size=settings.intermediate,
            max_position_embeddings=settings.context,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@dataclass(frozen=True)
class Plan:
    """What is registered: the checkpoints as versions of `name`, the twins of `name`-annealed.

    Attributes:
        name: the registered model.
        settings: of the training.
        seed: of the weights and the drawing of text.
        versions: `name==version` of the packages that the text is of.
    """

    name: str
    settings: Settings
    seed: int
    versions: tuple[str, ...]

    @property
    def twins_name(self) -> str:
        """The registered model of the annealed twins."""
        return f"{self.name}-annealed"

    @property
    def checkpoints(self) -> list[dict[str, str]]:
        """The tags of versions 1, 2, ... of `name`."""
        numbers = range(1, self.settings.checkpoints + 1)
        return [self._tags(n) for n in numbers]

    @property
    def twins(self) -> list[dict[str, str]]:
        """The tags of versions 1, 2, ... of `name`-annealed."""
        over = self.settings.annealed_over
        return [
            {
                **self._tags(origin + over),
                "annealed_from": f"models:/{self.name}/{origin}",
                "annealed_steps": str(over * self.settings.steps_between),
            }
            for origin in self.settings.annealed
        ]

    def _tags(self, number: int) -> dict[str, str]:
        digest = hashlib.sha256("\n".join(self.versions).encode()).hexdigest()[:16]
        return pretrain.version_tags(self.settings, number, self.seed) | {"text": digest}

    def missing(self, client: MlflowClient) -> tuple[int, int]:
        """How many checkpoints and twins are not registered yet.

        Raises:
            SpecError: one of the two has versions of another training.
        """
        there = pretrain.count_registered(client, self.name, self.checkpoints)
        twins = pretrain.count_registered(client, self.twins_name, self.twins)
        return len(self.checkpoints) - there, len(self.twins) - twins


def train(plan: Plan, documents: Sequence[Document], experiment_id: str) -> str:
    """Register what is missing of the checkpoints and of the twins.

    After an interruption the training starts again, from the same seed along the same way.

    Returns:
        What was done, in a sentence.
    """
    client, settings = MlflowClient(), plan.settings
    missing, twins_missing = plan.missing(client)
    if not missing and not twins_missing:
        return f"{plan.name} and {plan.twins_name} have all their versions already: not trained"
    texts = [d.text + END for d in documents if d.use is Use.TRAIN]
    tokenizer, tokens = pretrain.encode(texts, settings)
    torch.manual_seed(plan.seed)
    training = Training(new_model(tokenizer, settings), tokens, settings, plan.seed)
    checkpoints, twins = plan.checkpoints, plan.twins
    packages = {"packages": ",".join(plan.versions), "tokens": str(len(tokens))}
    title = f"pretrain {plan.name}"
    with pretrain.training_run(
        client, experiment_id, title, settings, plan.seed, packages
    ) as run_id:
        for step in pretrain.log_steps(client, run_id, training, settings.steps):
            number, between = divmod(step, settings.steps_between)
            if between:
                continue
            if number > len(checkpoints) - missing:
                tags = checkpoints[number - 1]
                pretrain.register(client, run_id, plan.name, training.model, tokenizer, tags)
            if number in settings.annealed:
                twin = settings.annealed.index(number)
                if twin >= len(twins) - twins_missing:
                    anneal(plan, training, tokenizer, twins[twin], experiment_id)
    return f"{missing} versions of {plan.name} and {twins_missing} of {plan.twins_name} are new"


def anneal(
    plan: Plan,
    training: Training,
    tokenizer: PreTrainedTokenizerFast,
    tags: dict[str, str],
    experiment_id: str,
) -> None:
    """Let a copy of the training go on until its rate is zero, and register what came out."""
    client, twin = MlflowClient(), training.copy()
    steps, title = int(tags["annealed_steps"]), f"anneal {tags['annealed_from']}"
    with pretrain.training_run(client, experiment_id, title, plan.settings, plan.seed) as run_id:
        for _ in pretrain.log_steps(client, run_id, twin, steps, anneal=True):
            pass
        pretrain.register(client, run_id, plan.twins_name, twin.model, tokenizer, tags)


def tiny(settings: Settings, steps: int) -> Settings:
    """The same training with so many steps in all, for a quick look."""
    return replace(settings, steps_between=max(1, steps // settings.checkpoints))
