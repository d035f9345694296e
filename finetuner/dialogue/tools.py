"""Tools that are offered and calls that are made, from objects or from their JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetuner.dialogue.fields import absent, short
from finetuner.dialogue.message import Row, RowError, ToolCall


def tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row in OpenAI's form; a bare {"name", "parameters"} is put into one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "tools", "'tools' is not JSON") if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise RowError("tools", "'tools' is not a list", found=short(tools), fits="a list, or the JSON text of one")
    return tuple(tool_of(tool, number) for number, tool in enumerate(tools))


def tool_of(tool: Any, number: int) -> Mapping[str, Any]:
    """One tool in OpenAI's form."""
    fits = '{"type": "function", "function": {"name": ...}}'
    if not isinstance(tool, Mapping):
        raise RowError("tools", f"tools[{number}] is not an object", found=short(tool), fits=fits)
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    function = wrapped["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("tools", f"tools[{number}] has no name", found=short(tool), fits=fits)
    return wrapped


def calls_of(message: Row) -> tuple[ToolCall, ...]:
    """The calls of an assistant message; the older single "function_call" too."""
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = parsed(calls, "type", "'tool_calls' is not JSON")
    if calls is None:
        return () if absent(message, "function_call") else (call_of(message["function_call"]),)
    if not isinstance(calls, list | tuple):
        raise RowError("type", "'tool_calls' is not a list", found=short(calls), fits="[...]")
    return tuple(call_of(call) for call in calls)


def call_of(given: Any) -> ToolCall:
    """A call: {"function": {"name", "arguments"}}, {"name", "arguments"}, or the JSON text of either."""
    fits = '{"name": "f", "arguments": {...}}'
    if isinstance(given, str):
        given = parsed(given, "tool-arguments", "a tool call is not JSON")
    if not isinstance(given, Mapping):
        raise RowError("tool-arguments", "a tool call is not an object", found=short(given), fits=fits)
    function = given.get("function", given)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError("missing-field", "a tool call has no name", found=short(given), fits=fits)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = parsed(arguments, "tool-arguments", f"the arguments of {name!r} are not JSON")
    if not isinstance(arguments, Mapping):
        reason = f"the arguments of {name!r} are not an object"
        raise RowError("tool-arguments", reason, found=short(arguments), fits=fits)
    number = given.get("id")
    return ToolCall(name, arguments, number if isinstance(number, str) else None)


def parsed(text: str, kind: str, reason: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(kind, f"{reason}: {error}", found=short(text), fits="JSON") from None
