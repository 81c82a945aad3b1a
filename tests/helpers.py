"""Small words that many tests use: messages and blocks, markers, requests side by side."""

from __future__ import annotations

import concurrent.futures
import socket
from typing import Any
from uuid import uuid4

JsonObject = dict[str, Any]


def marker() -> str:
    """Return a word that stands in one test's prompts only."""
    return f"mark-{uuid4().hex}"


def user(*content: Any) -> JsonObject:
    """Return a message of the user's: of one text, or of blocks."""
    is_text = bool(content) and isinstance(content[0], str)
    return {"role": "user", "content": content[0] if is_text else list(content)}


def assistant(*content: Any) -> JsonObject:
    """Return an answer: of one text, or of blocks."""
    return {**user(*content), "role": "assistant"}


def text(words: str, **more: Any) -> JsonObject:
    """Return a text block."""
    return {"type": "text", "text": words, **more}


def tool(name: str, given: JsonObject, number: int = 1) -> JsonObject:
    """Return a tool call, with its number as its id."""
    return {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": given}


def in_parallel(gateway: Any, texts: list[str], **fields: Any) -> list[Any]:
    """Ask for answers to some texts at once; return them in that order."""
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as threads:
        return list(threads.map(lambda words: gateway.ask(words, **fields), texts))


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
