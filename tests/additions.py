"""What the CLI adds to the messages with a login: told apart from what the client sent."""

from __future__ import annotations

import json
from typing import Any

JsonObject = dict[str, Any]
# How the reminders of older models begin, each a text block in front of the first message.
_REMINDERS = (
    "<system-reminder>\n# Environment",
    "<system-reminder>\nYou are powered by",
    "<system-reminder>\nToday's date is",
)
# What the newest models get instead: one entry of `role: system` behind the first message.
_ENTRY = "# Environment\nYou have been invoked"


def split_additions(messages: list[JsonObject]) -> tuple[list[JsonObject], list[str]]:
    """Return messages as the client sent them, and the texts that the CLI has added.

    Raises AssertionError where an addition stands anywhere but with the first user message.
    """
    first = next(index for index, each in enumerate(messages) if each["role"] == "user")
    kept = list(messages)
    added: list[str] = []

    behind = kept[first + 1] if len(kept) > first + 1 else {}
    if behind.get("role") == "system":
        added.append(text_of(behind["content"]))
        del kept[first + 1]

    content = kept[first]["content"]
    if isinstance(content, list):
        while content and str(content[0].get("text", "")).startswith(_REMINDERS):
            added.append(content[0]["text"])
            content = content[1:]
        kept[first] = {**kept[first], "content": content}

    rest = json.dumps(kept)
    assert json.dumps(_ENTRY)[1:-1] not in rest, "an addition stands with another message"
    assert "You are powered by" not in rest
    return kept, added


def text_of(content: Any) -> str:
    """Return the text of a message's content in either form."""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content)
