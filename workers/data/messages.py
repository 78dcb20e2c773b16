"""Messages of a conversation: checks, and conversion to the form of chat templates.

The template gets the whole message: role, content, name, tool calls, reasoning. Unknown keys are refused, since a template would
silently drop them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from workers.data.sources import DataError

Message = dict[str, Any]
"""role, and optionally content, name, tool_calls, tool_call_id and the reasoning."""
Prompt = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates expect an assistant's reasoning."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_messages(value: Any, name: str) -> list[Message]:
    """The messages of a column: a list, a list as JSON text, or a dialogue in the form of Anthropic's HH data.

    Messages have the keys of chat templates (role, content ...) or of ShareGPT (from, value). Content is text or a list of
    text parts. Raises DataError.
    """
    if isinstance(value, str):
        value = hh_dialogue(value) or _from_json(value) or value
    if not isinstance(value, list) or not value:
        raise DataError(f"{name}: must be text or a list of messages, was {brief(value)}")
    return [_message(message, f"{name}.{index}") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not ({"role", "from"} & value.keys()):
        raise DataError(f"{where}: must have role and content, was {brief(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message:
        message = _from_sharegpt(message, where)
    if unknown := [key for key in message if key not in KEYS]:
        raise DataError(f"{where}.{unknown[0]}: no such key of a message; there are {', '.join(KEYS)}")
    if message.get("role") not in ROLES:
        raise DataError(f"{where}.role: must be {', '.join(ROLES)}, was {brief(message.get('role'))}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message, where)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        if "content" not in message:
            raise DataError(f"{where}: must have role and content, was {brief(value)}")
    message["content"] = _text(message.get("content", ""), f"{where}.content")
    for key in (*REASONING, "name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise DataError(f"{where}.{key}: must be text, was {brief(message[key])}")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
    if role is None:
        raise DataError(f"{where}.from: must be {', '.join(_SHAREGPT_ROLES)}, was {brief(message['from'])}")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": role, **({"content": message["value"]} if "value" in message else {}), **rest}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: must be text or a list of parts, was {brief(content)}")
    texts = []
    for index, part in enumerate(content):
        present = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else part
        if isinstance(present, str):
            texts.append(present)
        elif (
            isinstance(present, dict)
            and present.keys() == {"type", "text"}
            and present["type"] in ("text", "input_text")
        ):
            texts.append(str(present["text"]))
        else:
            raise DataError(f"{where}.{index}: must be a part of text ({{type: text, text: ...}}), was {brief(part)}")
    return "".join(texts)


def _tool_calls(message: Message, where: str) -> list[Any]:
    """The calls with arguments as mappings, as templates expect. In OpenAI's API they are JSON text."""
    if message.get("role") != "assistant":
        raise DataError(f"{where}.tool_calls: only messages of the assistant may have them")
    calls = _from_json(message["tool_calls"]) if isinstance(message["tool_calls"], str) else message["tool_calls"]
    if not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls: must be a list, was {brief(calls)}")
    normalised = []
    for index, call in enumerate(without_none(calls)):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"{where}.tool_calls.{index}: must have function.name, was {brief(call)}")
        arguments = inner.get("arguments", {})
        parsed = _from_json(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(parsed, dict):
            raise DataError(f"{where}.tool_calls.{index}.function.arguments: must be a mapping, was {brief(arguments)}")
        function = {**inner, "arguments": parsed}
        normalised.append({**call, "function": function} if "function" in call else function)
    return normalised


def read_tools(value: Any) -> list[Any] | None:
    """The functions that a row's assistant may call, as JSON schemas; None where there are none. Raises DataError."""
    tools = _from_json(value) if isinstance(value, str) else value
    tools = without_none(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools: must be a list of mappings, was {brief(value)}")
    return tools


def hh_dialogue(text: str) -> list[Message] | None:
    """Messages of a dialogue of Anthropic's HH data, "\\n\\nHuman: ...\\n\\nAssistant: ..."; None for other texts."""
    if not text.startswith("\n\nHuman:"):
        return None
    _, *parts = _HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": turn.strip()} for who, turn in zip(parts[::2], parts[1::2], strict=True)]


def without_none(value: Any) -> Any:
    """The value without keys whose value is None: a columnar table adds them where another row has the key."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def as_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt; a text becomes a message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def brief(value: Any) -> str:
    """A value as JSON, cut after 60 characters, for errors."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _from_json(text: str) -> Any:
    """The list or mapping that a JSON text holds; None for other texts."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
