"""What changes the prompts of tasks, besides the tasks: options that lm_eval has, too."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.utils import simple_parse_args_string  # private door

from mlflow_soup.errors import ParentError, SpecError, brief
from mlflow_soup.evaluation.limits import LimitError
from mlflow_soup.evaluation.loading import read_within, stop_clock
from mlflow_soup.evaluation.task_folders import generation_problems

GENERATION = "generate_until"  # the method of lm-eval that generates text
_LONGEST = 64  # characters that a template may make of one character of a conversation
_LEAST = 1 << 16  # characters that it may make of any conversation

Messages = Sequence[Mapping[str, str]]  # role and content of each turn


class ChatTemplate:
    """Writes conversations as a tokenizer's chat template says, in a fork, within limits.

    The template is a program that somebody else wrote. A fork costs more than a conversation takes,
    so one fork writes all conversations of a task: `write` lets lm-eval build the requests once to
    learn the conversations, and a second time with the texts.

    Args:
        tokenizer: the tokenizer of the model.

    Raises:
        SpecError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise SpecError(
                "the tokenizer of the versions has no chat template",
                where="--apply-chat-template, or tag soup.apply_chat_template of the model",
                fix="leave the option out; or save the template with the tokenizer, and register "
                "the versions again",
            )
        self._tokenizer = tokenizer
        self._texts: dict[str, str] = {}
        self._missing: dict[str, tuple[Messages, bool]] = {}

    def write(self, build: Callable[[], None]) -> None:
        """Call `build`, which asks for texts, until all of them are written.

        Raises:
            ParentError: the template fails, or takes too much time, memory or text.
        """
        build()
        if self._missing:
            missing, self._missing = self._missing, {}
            characters = sum(map(len, missing))
            try:
                texts = read_within(lambda: self._render(list(missing.values())), characters)
            except LimitError as error:
                raise self._refused(str(error)) from error
            if sum(map(len, texts)) > _LEAST * len(texts) + _LONGEST * characters:
                raise self._refused("it makes texts that are too long")
            self._texts.update(zip(missing, texts, strict=True))
            build()
        if self._missing:
            raise self._refused("the tasks ask for other texts each time")

    def __call__(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; an empty text for one that is not written yet."""
        key = json.dumps([messages, add_generation_prompt])
        if key not in self._texts:
            self._missing[key] = (messages, add_generation_prompt)
        return self._texts.get(key, "")

    def _render(self, conversations: Sequence[tuple[Messages, bool]]) -> list[str]:
        """The texts of conversations; only in a fork, whose clock stands still."""
        stop_clock()
        try:
            return [self._render_one(*each) for each in conversations]
        except Exception as error:  # a template can raise anything
            raise self._refused(brief(error)) from error

    def _render_one(self, messages: Messages, add_generation_prompt: bool) -> str:
        """As HFLM of lm-eval does: a template that refuses a system prompt gets none."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), **options))
        except TemplateError:
            rest = [message for message in messages if message["role"] != "system"]
            return str(self._tokenizer.apply_chat_template(rest, **options))

    def _refused(self, why: str) -> ParentError:
        return ParentError(
            f"the chat template of the versions cannot write the texts of the tasks: {why}",
            where=str(self._tokenizer.name_or_path),
            fix="correct the template, and register the versions again; or leave "
            "--apply-chat-template out",
        )


@dataclass(frozen=True)
class Prompting:
    """How the requests of tasks are built.

    Attributes:
        num_fewshot: the number of few-shot examples, for tasks that do not set it.
        system_instruction: a text before each prompt; with a chat template, the system's turn.
        chat: the chat template; None for plain text.
        fewshot_as_multiturn: with a chat template, whether each few-shot example is two turns.
        gen_kwargs: settings of generation that replace those of the tasks.
        cluster: the field of the documents that names the cluster of an item, where `items` finds
            no passages; empty for none.
    """

    num_fewshot: int | None = None
    system_instruction: str = ""
    chat: ChatTemplate | None = None
    fewshot_as_multiturn: bool = True
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""

    def configure(self, task: Any) -> None:
        """Change a task's config as `lm_eval` does: a 0 of its YAML stays 0."""
        # private door: lm_eval.api.task.Task
        fixed = task.get_config("num_fewshot")
        if self.num_fewshot is not None and fixed != 0:
            task.set_config("num_fewshot", self.num_fewshot)
        elif fixed is None:
            task.set_config("num_fewshot", 0)
        if self.gen_kwargs and task.OUTPUT_TYPE == GENERATION:
            task.set_config("generation_kwargs", dict(self.gen_kwargs), update=True)

    def build(self, build: Callable[..., None]) -> None:
        """Build the requests of a task with its method, which takes lm-eval's options.

        Raises:
            ParentError: as `ChatTemplate.write`.
        """
        instruction = self.system_instruction or None
        if self.chat is None:
            build(system_instruction=instruction)
            return
        chat = self.chat
        chat.write(
            lambda: build(
                system_instruction=instruction,
                apply_chat_template=True,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                chat_template=chat,
            )
        )


PLAIN = Prompting()


def parse_generation(text: str, where: str) -> dict[str, Any]:
    """The settings of generation in a text: JSON, or `temperature=0.7,top_p=0.9` as for lm_eval.

    Raises:
        SpecError: it is neither, or a setting could name code or take too much.
    """
    fix = 'write temperature=0.7,top_p=0.9, or JSON such as {"until": ["\\n\\n"]}'
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else _pairs(text)
    except (ValueError, RecursionError) as error:
        what = f"--gen-kwargs {text:.60} cannot be read: {brief(error)}"
        raise SpecError(what, where=where, fix=fix) from error
    if problem := next(iter(generation_problems(found)), ""):
        raise SpecError(f"--gen-kwargs {problem}", where=where, fix=fix)
    return found


def _pairs(text: str) -> dict[str, Any]:
    if odd := [part for part in text.split(",") if part.strip() and "=" not in part]:
        raise ValueError(f"{odd[0]!r} is not a setting and its value")
    return {key.strip(): value for key, value in simple_parse_args_string(text).items()}
