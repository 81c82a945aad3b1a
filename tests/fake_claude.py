#!/usr/bin/env python3
"""A stand-in for the CLI that misbehaves on order, for what the real one cannot be made to do.

Orders for the next process are files in the directory FAKE_CLAUDE_ORDERS, removed when taken: `die-
at-start`, `die-at-initialize`, `die-at-query`, `stall-at-query`, `die-when-held`, `stall-when-held`
(in a query that is held back), `say-why-at-start` (on stdout), `mute` (answers no control request),
`ignore-eof`; `always-die` and `always-leave` (with status 0) stay. Orders for an answer are words
in the last user message: `die-before-answer`, `die-mid-answer`, `garbage`, `error-result`, `odd-
error-result` (half an emoji), `silent-end`, `cut-short` (by max_tokens), `unannounced` (without
`requesting`), `fill-stderr`, `long-line`, `odd-lines`, `stall` (no event), `stall-after-start`,
`flood` (deltas without end), `a while` (0.3 s), `until told` (until there is a file `told`). Every
query is noted in `queries` in the same directory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ORDERS = Path(os.environ.get("FAKE_CLAUDE_ORDERS", "/nonexistent"))
HOLD = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
held = False  # from upstream, by the settings that were applied last
DONE = {"type": "result", "subtype": "success", "is_error": False, "result": ""}
# JSON that the CLI does not print; the first two only make sense behind an answer.
ODD_LINES = [
    '{"type": "result", "total_cost_usd": 1' + "0" * 400 + "}",
    '{"type": "result", "total_cost_usd": NaN}',
    '{"type": ["result"]}',
    '{"type": {}, "status": {}, "parent_tool_use_id": null}',
    '{"type": "assistant", "message": {"content": [{}]}, "error": {}}',
    '{"type": "rate_limit_event", "rate_limit_info": [1e999]}',
    '{"type": "control_request", "request": {"message": {"method": "tools/call", "params": 1}}}',
    '{"type": "control_request", "request": {"message": {"method": ["x"], "id": {}}}}',
    '{"type": "control_request", "request": "x"}',
    '{"type": "control_response", "response": [1]}',
    '{"type": "control_response", "response": {"request_id": {}, "subtype": "success"}}',
    '{"type": "user", "message": 1}',
    '"a text"',
]


def ordered(name: str) -> bool:
    """Take an order: say whether its file was there, and remove it."""
    try:
        (ORDERS / name).unlink()
    except OSError:
        return False
    return True


def die(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
    os._exit(3)


def put(line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def put_noise(text: str) -> None:
    if "odd-lines" in text:
        sys.stdout.write("\n".join([*ODD_LINES[2:], ""]))
    if "garbage" in text:
        sys.stdout.write("this is no JSON\n[1]\n\n{broken\n")


def event(event_type: str, **fields: Any) -> None:
    put(
        {
            "type": "stream_event",
            "event": {"type": event_type, **fields},
            "parent_tool_use_id": None,
        }
    )


def answer(text: str) -> None:
    """Play one answer, as the words in `text` order."""
    with (ORDERS / "queries").open("a") as log:
        log.write(json.dumps(text) + "\n")
    if "unannounced" not in text:
        put({"type": "system", "subtype": "status", "status": "requesting"})
        leaves = "2026-01-01T00:00:00.000Z [DEBUG] [API:timing] dispatching to firstParty"
        print(leaves, file=sys.stderr, flush=True)
    time.sleep(0.3 if "a while" in text else 0)
    if "die-before-answer" in text:
        die("gone before the answer")
    if "fill-stderr" in text:
        print("noise " * 200_000, file=sys.stderr, flush=True)
    if "long-line" in text:
        put("x" * 70_000_000)
    if "stall-after-start" not in text and "stall" in text:
        time.sleep(60)
    if "error-result" in text:
        said = "API Error: 400 no good" + " \ud83d" * ("odd-error-result" in text)
        put({**DONE, "is_error": True, "result": said, "api_error_status": 400})
        return
    if "silent-end" in text:
        put(DONE)
        return
    put_noise(text)
    message = {"id": "msg_fake", "type": "message", "role": "assistant", "model": "fake"}
    usage = {"input_tokens": 1, "output_tokens": 1}
    event("message_start", message={**message, "content": [], "stop_reason": None, "usage": usage})
    event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "from the fake"})
    if "stall-after-start" in text:
        time.sleep(60)
    while "flood" in text:
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x" * 1000})
    if "die-mid-answer" in text:
        die("gone in the middle")
    put({"type": "assistant", "message": {"content": [{"type": "text", "text": "from the fake"}]}})
    event("content_block_stop", index=0)
    reason = "max_tokens" if "cut-short" in text else "end_turn"
    event("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 4})
    event("message_stop")
    put(DONE)


def take(text: str) -> None:
    """Answer a query, but for those whose calls are held back."""
    while "until told" in text and not ordered("told"):
        time.sleep(0.01)
    if ordered("die-at-query"):
        die("gone at the query")
    if ordered("stall-at-query"):
        time.sleep(60)
    if held:
        if ordered("die-when-held"):
            die("gone in a held query")
        if ordered("stall-when-held"):
            time.sleep(60)
        put({**DONE, "is_error": True, "result": "Prompt is too long"})
    else:
        answer(text)
        if "odd-lines" in text:
            sys.stdout.write("\n".join([*ODD_LINES, ""]))
            sys.stdout.flush()


def respond(line: Any) -> None:
    """Answer a control request as the CLI does."""
    global held
    request, response = line["request"], {}
    if request["subtype"] == "apply_flag_settings":
        held = request["settings"]["env"].get(HOLD) == "1"
    if request["subtype"] == "rewind_conversation":
        response = {"rewound": True}
    put(
        {
            "type": "control_response",
            "response": {
                "subtype": "success",
                "request_id": line["request_id"],
                "response": response,
            },
        }
    )
    if request["subtype"] == "mcp_message":  # the tools have changed
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        request = {"subtype": "mcp_message", "server_name": "t", "message": message}
        put({"type": "control_request", "request_id": "fake", "request": request})


def say_why() -> None:
    """Say on stdout why it cannot start, and end, if so ordered."""
    if ordered("say-why-at-start"):
        print("Your account is on hold", flush=True)
        sys.exit(1)


def main() -> None:
    if "--version" in sys.argv:
        print(os.environ.get("FAKE_CLAUDE_VERSION", "2.1.999 (Fake Claude)"))
        return
    if "auth" in sys.argv:
        time.sleep(float(os.environ.get("FAKE_CLAUDE_AUTH_S", "0")))
        print('{"loggedIn": true, "authMethod": "api_key", "apiKeySource": "ANTHROPIC_API_KEY"}')
        return
    if ordered("die-at-start") or (ORDERS / "always-die").exists():
        die("gone at the start")
    if (ORDERS / "always-leave").exists():
        return
    say_why()
    mute = ordered("mute")
    ignores_eof = ordered("ignore-eof")
    for raw in sys.stdin:
        line = json.loads(raw)
        if mute:
            continue
        if line["type"] == "control_request":
            if line["request"]["subtype"] == "initialize" and ordered("die-at-initialize"):
                die("gone at initialize")
            respond(line)
        elif line["type"] == "user" and line.get("shouldQuery") is False:
            put(DONE)
        elif line["type"] == "user":
            take(json.dumps(line["message"]["content"]))
    if ignores_eof:
        time.sleep(60)


if __name__ == "__main__":
    main()
