"""The chat template's text of conversations: what stands before an answer, and what it writes of the answer itself."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from workers.data.messages import REASONING, Message
from workers.data.rows import Answer
from workers.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[Any] | None


class ChatTemplate:
    """A tokenizer's chat template, under a run's settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        arguments: dict[str, Any] | None = None,
        started: datetime | None = None,
    ) -> None:
        """arguments: further variables of the template. started: the time that templates may write (none: now)."""
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        # Templates that write today's date call strftime_now. A run writes the date of its start, also after midnight.
        self.arguments = {"strftime_now": (started or datetime.now()).strftime, **(arguments or {})}

    @property
    def source(self) -> str:
        return str(self.tokenizer.name_or_path)

    def conversation(self, messages: list[Message]) -> list[Message]:
        """The messages, with the run's system prompt where they have none."""
        if self.system_prompt is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def prompt(self, messages: list[Message], tools: Tools) -> str:
        """The text up to where the assistant's answer begins."""
        return self._render(messages, tools, to_answer=True)

    def answer(self, messages: list[Message], before: str, answer: Answer, tools: Tools) -> str:
        """What follows the prompt's text `before` where the assistant gives this answer, the end of its turn included.

        Raises DataError where the template leaves part of the answer out, or begins answers in a way that this one does not.
        """
        message = as_message(answer)
        whole = self._render([*messages, message], tools, to_answer=False)
        if whole.startswith(before) and _holds(text := whole[len(before) :], message):
            return text
        prefill, ending = self._prefill(messages, before, tools)
        if not prefill:
            shown = whole[_common(before, whole) :]
            raise DataError(
                f"{self.source}: the chat template drops part of the answer or writes it otherwise than after its own "
                f"generation prompt: {_said(message)[:60]!r} became {shown[:60]!r}"
            )
        said, tag = _said(message).lstrip(), prefill.strip()
        if not said.startswith(tag):
            raise DataError(
                f"{self.source}: the chat template begins every answer with {prefill!r}, and the answer {said[:40]!r} does "
                "not begin so"
            )
        # White space after the tag stands in the prompt already.
        return said[len(tag) :].removeprefix(prefill[len(prefill.rstrip()) :]) + ending

    def turns(self, messages: list[Message], learnt: list[int], tools: Tools) -> list[str]:
        """Prompts of the assistant's turns `learnt` (indices), and last the text up to the next answer: each begins with the one
        before, and what follows it there is the turn, and what was said until the next.

        Raises DataError where the template writes an earlier turn otherwise once others follow.
        """
        texts = [*(self._render(messages[:k], tools, to_answer=True) for k in learnt), self.prompt(messages, tools)]
        for k, text, following in zip(learnt, texts, texts[1:], strict=False):
            if not following.startswith(text) or not _holds(following[len(text) :], messages[k]):
                raise DataError(
                    f"{self.source}: the chat template writes message {k + 1} otherwise once others follow it, so that it "
                    "cannot be learnt in its place; sft.turns=last learns the last turn alone"
                )
        return texts

    def _prefill(self, messages: list[Message], before: str, tools: Tools) -> tuple[str, str]:
        """With what the prompt already begins the answer, and what the template writes after an answer."""
        probe = "x"
        whole = self._render([*messages, as_message(probe)], tools, to_answer=False)
        common = _common(before, whole)
        after = whole[common:].lstrip()
        return (before[common:], after[len(probe) :]) if after.startswith(probe) else ("", "")

    def _render(self, messages: list[Message], tools: Tools, to_answer: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.source}: the tokenizer has no chat template, which messages need")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=to_answer, tokenize=False, **self.arguments
            )
            return text
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # what templates raise, or run into
            raise DataError(f"{self.source}: the chat template refuses messages: {error}") from error


def _common(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((k for k, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def as_message(answer: Answer) -> Message:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _said(message: Message) -> str:
    """An assistant's text, its reasoning before it between the tags that most models know."""
    reasoning = "".join(message.get(key, "") for key in REASONING)
    return f"<think>{reasoning}\n</think>\n\n{message['content']}" if reasoning else message["content"]


def _holds(text: str, message: Message) -> bool:
    """Whether a rendered turn has all that its message says, white space apart."""
    parts = [message.get(key, "") for key in REASONING] + [message["content"]]
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        parts += [function["name"], *function["arguments"]]
    rendered = "".join(text.split())
    return all("".join(part.split()) in rendered for part in parts)
