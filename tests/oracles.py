"""What a training row must be, worked out by hand: each family's text piece by piece, and what of it is learned.

Imports nothing from finetuner. A piece is (text, learned, control): control pieces are the template's own tokens, and
only they may become control tokens. Messages are dicts in OpenAI's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Any

Piece = tuple[str, bool, bool]
Messages = list[dict[str, Any]]

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
LLAMA_TOOLS = (
    "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def said(text: str, learned: bool = False) -> Piece:
    return (text, learned, False)


def token(text: str, learned: bool = False) -> Piece:
    return (text, learned, True)


def im_turn(role: str, body: list[Piece], learned: bool = False) -> list[Piece]:
    return [token("<|im_start|>"), said(role + "\n"), *body, token("<|im_end|>", learned), said("\n")]


def chatml(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = []
    for m in messages:
        pieces += im_turn(m["role"], [said(m["content"], m["role"] == "assistant")], m["role"] == "assistant")
    return pieces


def internlm2(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]
    offered = im_turn_plugin("system", "[" + ", ".join(written(t["function"]) for t in tools) + "]") if tools else []
    if messages[0]["role"] != "system":
        pieces, offered = pieces + offered, []
    for m in messages:
        if m["role"] == "tool":
            pieces += im_turn_plugin("environment", m["content"])
            continue
        learned = m["role"] == "assistant"
        body = [said(m["content"], learned)]
        for call in m.get("tool_calls", []):
            f = call["function"]
            text = f'\n{{"name": "{f["name"]}", "parameters": {written(f["arguments"])}}}'
            body += [token("<|action_start|>", True), token("<|plugin|>", True), said(text, True)]
            body += [token("<|action_end|>", True)]
        pieces += im_turn(m["role"], body, learned) + offered
        offered = []
    return pieces


def im_turn_plugin(role: str, text: str) -> list[Piece]:
    return [
        token("<|im_start|>"),
        said(role + " name="),
        token("<|plugin|>"),
        said("\n" + text),
        token("<|im_end|>"),
        said("\n"),
    ]


def qwen2_5(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    return qwen(messages, tools, QWEN, lambda k, m: ("", m["content"]))


def qwen3(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    asked = max(k for k, m in enumerate(messages) if m["role"] == "user")

    def thought(k: int, m: dict[str, Any]) -> tuple[str, str] | None:
        thinking, content = m.get("reasoning_content") or "", m["content"]
        if "reasoning_content" not in m and "</think>" in content:
            before, _, content = content.partition("</think>")
            thinking, content = before.replace("<think>", "").strip("\n"), content.lstrip("\n")
        if k > asked and (thinking or k == len(messages) - 1):
            return "<think>\n" + thinking.strip("\n") + "\n</think>\n\n", content.lstrip("\n")
        return None if thinking else ("", content)

    return qwen(messages, tools, "", thought)


def qwen(
    messages: Messages, tools: list[Any], usual: str, thought: Callable[[int, dict[str, Any]], tuple[str, str] | None]
) -> list[Piece]:
    """Both Qwens; `thought` parts a message into thinking and answer, None where the thinking is left out."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else usual
    if tools:
        offered = QWEN_TOOLS.format("".join("\n" + written(t) for t in tools))
        pieces = im_turn("system", [said((system + "\n\n" if system else "") + offered)])
    else:
        pieces = im_turn("system", [said(system)]) if system else []
    for k, m in enumerate(messages):
        if m["role"] == "system":
            continue
        if m["role"] == "tool":
            if messages[k - 1]["role"] != "tool":
                pieces += [token("<|im_start|>"), said("user")]
            pieces += [said("\n<tool_response>\n" + m["content"] + "\n</tool_response>")]
            if k + 1 == len(messages) or messages[k + 1]["role"] != "tool":
                pieces += [token("<|im_end|>"), said("\n")]
        elif m["role"] == "user":
            pieces += im_turn("user", [said(m["content"])])
        else:
            parted = thought(k, m)
            learned = parted is not None
            thinking, content = parted or ("", m["content"].rpartition("</think>")[2].lstrip("\n"))
            calls = [
                f'<tool_call>\n{{"name": "{f["name"]}", "arguments": {written(f["arguments"])}}}\n</tool_call>'
                for f in (call["function"] for call in m.get("tool_calls", []))
            ]
            text = thinking + "\n".join(([content] if content else []) + calls)
            pieces += im_turn("assistant", [said(text, learned)], learned)
    return pieces


def llama3(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]

    def turn(role: str, text: str, learned: bool = False) -> list[Piece]:
        head = [token("<|start_header_id|>"), said(role), token("<|end_header_id|>"), said("\n\n")]
        return [*head, said(text, learned), token("<|eot_id|>", learned)]

    if tools:
        offered = "".join(json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in tools)
        system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        pieces += turn("system", LLAMA_TOOLS + offered + system)
        messages = messages[messages[0]["role"] == "system" :]
    for m in messages:
        if m.get("tool_calls"):
            f = m["tool_calls"][0]["function"]
            text = f'{{"name": "{f["name"]}", "parameters": {written(f["arguments"])}}}'
            pieces += turn("assistant", text, True)
        elif m["role"] == "tool":
            pieces += turn("ipython", written(m["content"]))
        else:
            pieces += turn(m["role"], m["content"].strip(), m["role"] == "assistant")
    return pieces


def folded(messages: Messages) -> Messages:
    """The system message in front of the first question."""
    if messages[0]["role"] != "system":
        return messages
    first = messages[1]
    return [{"role": "user", "lead": messages[0]["content"] + "\n\n", "content": first["content"]}, *messages[2:]]


def mistral(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]
    for m in folded(messages):
        if m["role"] == "user":
            pieces += [token("[INST]"), said(" " + m.get("lead", "") + m["content"]), token("[/INST]")]
        else:
            pieces += [said(" " + m["content"].strip(), True), token(eos, True)]
    return pieces


def gemma(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]
    for m in folded(messages):
        learned = m["role"] == "assistant"
        role = "model" if learned else "user"
        body = said(m.get("lead", "") + m["content"].strip(), learned)
        pieces += [token("<start_of_turn>"), said(role + "\n"), body, token("<end_of_turn>", learned), said("\n")]
    return pieces


def phi3(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = []
    for m in messages:
        learned = m["role"] == "assistant"
        pieces += [token(f"<|{m['role']}|>"), said("\n"), said(m["content"], learned), token("<|end|>", learned)]
        pieces += [said("\n")]
    return [*pieces, token(eos)]


def vicuna(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos), said("" if messages[0]["role"] == "system" else VICUNA)]
    for m in messages:
        match m["role"]:
            case "system":
                pieces += [said(m["content"] + " ")]
            case "user":
                pieces += [said("USER: " + m["content"] + " ")]
            case _:
                pieces += [said("ASSISTANT:"), said(" " + m["content"], True), token(eos, True)]
    return pieces


def deepseek(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]
    asked = max(k for k, m in enumerate(messages) if m["role"] == "user")
    for k, m in enumerate(messages):
        match m["role"]:
            case "system":
                pieces += [said(m["content"])]
            case "user":
                pieces += [token("<｜User｜>"), said(m["content"])]
            case _:
                old = k < asked and "</think>" in m["content"]
                content = m["content"].split("</think>")[-1] if old else m["content"]
                pieces += [token("<｜Assistant｜>"), said(content, not old), token(eos, not old)]
    return pieces


def zephyr(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = []
    for m in messages:
        learned = m["role"] == "assistant"
        head = [token(f"<|{m['role']}|>"), said("\n")]
        pieces += [*head, said(m["content"], learned), token(eos, learned), said("\n")]
    return pieces


def plain(messages: Messages, tools: list[Any], bos: str, eos: str) -> list[Piece]:
    pieces = [token(bos)]
    for m in messages:
        learned = m["role"] == "assistant"
        pieces += [said(m["content"], True), token(eos, True)] if learned else [said(m["content"] + "\n")]
    return pieces


FAMILIES: dict[str, Callable[[Messages, list[Any], str, str], list[Piece]]] = {
    f.__name__: f
    for f in (chatml, llama3, internlm2, qwen2_5, qwen3, mistral, gemma, phi3, vicuna, deepseek, zephyr, plain)
}  # fmt: skip


def tokens(pieces: list[Piece], tokenizer: Any, *, rstrip: Container[str] = ()) -> list[tuple[int, bool]]:
    """(id, learned) of the pieces, by a `tokenizers.Tokenizer`: runs of ordinary text apart, control tokens by name.

    `rstrip`: the control tokens that swallow the blanks behind them.
    """
    rows: list[tuple[int, bool]] = []
    run: list[Piece] = []
    before = ""

    def close() -> None:
        text = "".join(piece[0] for piece in run)
        learned = [piece[1] for piece in run for _ in piece[0]]
        blanks = len(text) - len(text.lstrip()) if before in rstrip else 0
        text, learned = text[blanks:], learned[blanks:]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        rows.extend((number, all(learned[a:b])) for number, (a, b) in zip(encoding.ids, encoding.offsets))
        run.clear()

    was, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    for piece in pieces:
        if piece[2]:
            close()
            before = piece[0]
            rows.append((tokenizer.token_to_id(before), piece[1]))
        else:
            run.append(piece)
    close()
    tokenizer.encode_special_tokens = was
    return rows
