"""Messages of a conversation: checked, made plain, tool arguments as templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cs336_alignment.data.row import is_number, parsed, wrong
from cs336_alignment.errors import Place

ROLES = ("system", "developer", "user", "assistant", "tool")
FLAGS = ("train", "weight")  # this project's own keys; a template never sees them

Message = dict[str, Any]

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
WEIGHT = f"0, or a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"


def clean_message(message: Mapping[str, Any], place: Place, joiner: str) -> Message:
    """Check a message and give it without flags, its content one string."""
    if not isinstance(message, Mapping):
        raise wrong("D405", "a message is no object", place, "an object", got=message)
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if not isinstance(role, str) or role not in ROLES:
        raise wrong("D405", "unknown role", inside(place, "role"), ", ".join(ROLES), role)
    if isinstance(content, list):
        content = joiner.join(_part(part, inside(place, "content")) for part in content)
    only_calls = role == "assistant" and content is None and calls
    if not isinstance(content, str) and not only_calls:
        wanted = "a string or a list of text parts"
        if role == "assistant" and content is None:
            wanted += ", or tool_calls beside no content"
        raise wrong("D405", "content is no text", inside(place, "content"), wanted, content)
    is_list = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    if calls is not None and not is_list:
        at = inside(place, "tool_calls")
        raise wrong("D405", "tool_calls are no list of objects", at, "a list of objects", calls)
    kept = {key: value for key, value in message.items() if key not in FLAGS}
    return kept | {"content": content}


def _part(part: Any, place: Place) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    name = f"part of type {kind}" if isinstance(kind, str) else "part without a type"
    raise wrong("D406", f"content has a {name}, and only text can be trained on", place,
                 'parts {"type": "text", "text": …}', part)  # fmt: skip


def is_weight(value: Any) -> bool:
    """Tell whether a value can weigh a token: 0, or what a 32-bit number holds."""
    return is_number(value) and (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT)


def weight_of(message: Mapping[str, Any], place: Place, allowed: bool) -> float:
    """Read the flags of a message: what its tokens weigh if its turn is trained."""
    flags = {key: message[key] for key in FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        at = inside(place, key)
        if message["role"] != "assistant":
            if value in (0, False):  # what happens anyway
                continue
            raise wrong("D407", f"{key} stands in a message of another role than assistant", at,
                        hint="what others say is never trained: remove the key")  # fmt: skip
        if not allowed:
            raise wrong("D407", f"{key} means nothing where all tokens are trained", at,
                         hint="set data.train_on=response, or remove the key")  # fmt: skip
        if key == "train" and not isinstance(value, bool):
            raise wrong("D407", "train is no truth value", at, "true or false", value)
        if key == "weight" and not is_weight(value):
            raise wrong("D407", "weight is no weight", at, WEIGHT, value)
    return float(flags.get("weight", 1.0)) if flags.get("train", True) else 0.0


def spell_arguments(messages: Sequence[Message], *, as_text: bool) -> list[Message]:
    """Give the messages with the arguments of their tool calls as objects, or as JSON."""
    spelled = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            inner = call.get("function")
            function = dict(inner if isinstance(inner, Mapping) else call)
            arguments = function.get("arguments")
            if as_text and isinstance(arguments, Mapping):
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
            elif not as_text and isinstance(arguments, str):
                value = parsed(arguments)
                function["arguments"] = value if isinstance(value, dict) else arguments
            calls.append({**call, "function": function} if inner is not None else function)
        spelled.append({**message, "tool_calls": calls} if calls else message)
    return spelled


def other_calls(message: Message) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield each tool call of a message with another name, then with other arguments: its number,
    what was changed, the call. A template that writes both writes another text then.
    """
    for number, call in enumerate(message.get("tool_calls") or ()):
        inner = call.get("function")
        function = inner if isinstance(inner, Mapping) else call
        as_text = isinstance(function.get("arguments"), str)
        other = {"name": "xyzzyQ7", "arguments": '{"xyzzyQ7": 7}' if as_text else {"xyzzyQ7": 7}}
        for part, value in other.items():
            if part in function:
                changed = {**function, part: value}
                yield number, part, {**call, "function": changed} if inner is not None else changed


def inside(place: Place, key: int | str) -> Place:
    """Name a message of a row, or a field of a message."""
    field = place.field or ""
    field = f"{field or 'messages'}[{key}]" if isinstance(key, int) else f"{field}.{key}"
    return Place(place.path, place.line, field)
