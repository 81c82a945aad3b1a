"""Nothing of the user's changes how often or how upstream is asked, or when its events come.

The variables and settings are those of tests/VARIABLES.md.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import API_KEY, LOGIN, RunningGateway
from scripted_api import Call, Reply, ScriptedApi, text_reply
from test_reuse import said, tool_result, tool_use

import cc2api

JsonObject = dict[str, Any]
TABLE = (Path(__file__).parent / "VARIABLES.md").read_text("utf-8")
# What each pinned variable would do harm with; "1" where it is not named.
HOSTILE = {
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "0",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "0",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "0",
    "CLAUDE_CODE_NO_MODEL_FALLBACK": "0",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "0",
    "DISABLE_AUTO_COMPACT": "0",
    "DISABLE_COMPACT": "0",
    "DISABLE_INTERLEAVED_THINKING": "0",
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "0",
    "CLAUDE_CODE_EFFORT_LEVEL": "max",
    "CLAUDE_CODE_MESSAGES_PROMPT_CACHE_TTL": "1h",
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "0",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "0",
    "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS": "0",
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "0",
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "countdown",
    "CLAUDE_CODE_TOASTY_THIMBLE": "hostile words",
    "CLAUDE_CODE_GENTLE_PARASOL": "hostile words",
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    "CLAUDE_CODE_EXTRA_METADATA": '{"a": 1}',
    "API_TIMEOUT_MS": "200",
    "ENABLE_CLAUDEAI_MCP_SERVERS": "true",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "0",
    "ENABLE_TOOL_SEARCH": "true",
    "CLAUDE_CODE_MAX_MCP_DESCRIPTION_LENGTH": "10",
    # The traffic of the tests stays off: nothing but loopback is ever reached.
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
}
# What no settings win over, so that it must not be handed down at all.
FROM_THE_START = {
    "CLAUDE_CODE_STREAM_EVENT_HOLD_MS": "3000",
    "CLAUDE_CODE_MAIN_REPLY_HOLD_MS": "3000",
    "CLAUDE_CODE_ENTRYPOINT": "hostile",
    "CLAUDE_CODE_ACTION": "1",
    "CLAUDE_CODE_REMOTE": "1",
    "CLAUDE_CODE_CONTAINER_ID": "hostile",
    "CLAUDE_CODE_SKILL_PROPOSALS": "1",
    "CLAUDE_CODE_EXTRA_BODY": '{"hostile": 1}',
    "ANTHROPIC_BETAS": "hostile-2025",
}
USER_SETTINGS: JsonObject = {
    "model": "claude-haiku-4-5",
    "fallbackModel": ["claude-haiku-4-5"],
    "effortLevel": "max",
    "alwaysThinkingEnabled": True,
    "language": "japanese",
    "outputStyle": "Explanatory",
    "attribution": {"commit": "hostile", "pr": "hostile"},
    "hooks": {
        "UserPromptSubmit": [{"hooks": [{"type": "command", "command": "echo hostile words"}]}]
    },
}


def hostile_variables() -> dict[str, str]:
    return {name: HOSTILE.get(name, "1") for name in cc2api.PINNED_VARIABLES}


@pytest.fixture(scope="module", params=["key", "login"])
def pair(
    request: pytest.FixtureRequest,
    api: ScriptedApi,
    claude: str,
    gateway: RunningGateway,
    login_gateway: RunningGateway,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningGateway, RunningGateway]]:
    """A gateway of a user with everything against it, and one of a user with nothing."""
    sign_in = API_KEY if request.param == "key" else LOGIN
    config_dir = tmp_path_factory.mktemp("config")
    settings = {**USER_SETTINGS, "env": hostile_variables()}
    (config_dir / "settings.json").write_text(json.dumps(settings))
    (config_dir / "CLAUDE.md").write_text("hostile words")
    hostile = {**hostile_variables(), **FROM_THE_START, "CLAUDE_CONFIG_DIR": str(config_dir)}
    hostile |= {"SHELL": "/bin/zsh", **sign_in}
    with RunningGateway(
        "--setting-sources", "user", claude=claude, base_url=api.url, env=hostile
    ) as running:
        yield running, gateway if request.param == "key" else login_gateway


Pair = tuple[RunningGateway, RunningGateway]


def ask_both(
    pair: Pair, api: ScriptedApi, reply: Reply, words: str = "", **fields: Any
) -> tuple[Call, Call]:
    """Ask both the same; return the one call that each of them made."""
    calls = []
    for gateway in pair:
        word = f"mark-{uuid4().hex}"
        api.on(word, reply)
        gateway.ask(f"{words} {word}", **fields)
        (call,) = api.calls_with(word)
        text = json.dumps(call.body).replace(word, "")
        calls.append(Call(call.path, call.headers, json.loads(text)))
    return calls[0], calls[1]


def less_process(call: Call) -> JsonObject:
    """Return a call without what differs by process and by the words of its question."""
    of_process = ("x-claude-code-session-id", "x-client-request-id", "content-length", "host")
    headers = {name: value for name, value in call.headers.items() if name not in of_process}
    body = {**call.body, "system": call.body["system"][1:], "metadata": None}
    attribution = re.sub(r"=[^;]*", "", call.body["system"][0]["text"])
    keys = sorted(json.loads(call.body["metadata"]["user_id"]))
    return {"headers": headers, "body": body, "attribution": attribution, "metadata": keys}


ANSWERS: dict[str, Reply] = {
    "a text": text_reply("fine"),
    "overloaded": Reply(status=529, message="Overloaded"),
    "a failure": Reply(status=500, message="Internal server error"),
    "a limit": Reply(status=429, message="slow down"),
    "cut off": Reply(blocks=[{"type": "text", "text": "half of it"}], cut_after=3),
    "a refusal": text_reply("No", stop_reason="refusal", delay_s=0.1),
    "cut by max_tokens": text_reply("half", stop_reason="max_tokens", delay_s=0.1),
    "late": text_reply("at last", delay_s=0.5),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_upstream_is_asked_once_and_the_same(pair: Pair, api: ScriptedApi, name: str) -> None:
    hostile, clean = ask_both(pair, api, ANSWERS[name])
    assert less_process(hostile) == less_process(clean)


REQUESTS: dict[str, JsonObject] = {
    "an old model": {"model": "claude-opus-4-1-20250805"},
    "a new model": {"model": "claude-sonnet-5-5"},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 3000},
    "effort": {"effort": "low"},
    "marks of an hour": {
        "system": [
            {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        ]
    },
    "tools of the CLI's own names": {
        "tools": [
            {"name": name, "description": "d" * 5000, "input_schema": {"type": "object"}}
            for name in ("Bash", "Agent", "ToolSearch")
        ]
    },
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_asked_goes_upstream_the_same(pair: Pair, api: ScriptedApi, name: str) -> None:
    fields = REQUESTS[name]
    hostile, clean = ask_both(pair, api, text_reply("fine"), **fields)
    assert less_process(hostile) == less_process(clean)
    assert hostile.body["model"] == fields.get("model", "claude-sonnet-4-6")
    assert "hostile" not in json.dumps(hostile.body)


@pytest.mark.parametrize("model", ["claude-sonnet-4-6", "claude-fable-5-1"])
def test_a_tool_loop_is_a_call_for_each_request(pair: Pair, api: ScriptedApi, model: str) -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    seen = []
    for gateway in pair:
        word, step = f"mark-{uuid4().hex}", tool_use(a=1)
        api.on(word, Reply(blocks=[step], stop_reason="tool_use"))
        messages: list[JsonObject] = [{"role": "user", "content": word}]
        fields = {"tools": tools, "model": model}
        answer = gateway.post({"messages": messages, **fields})
        assert answer.status == 200, answer.json
        messages.append({"role": "assistant", "content": answer.json["content"]})
        messages.append({"role": "user", "content": [tool_result(step, "the result")]})
        api.on("the result", text_reply("done"))
        assert gateway.post({"messages": messages, **fields}).json["content"][0]["text"] == "done"
        _, second = api.calls_with(word)
        seen.append(json.dumps(said(second)["messages"]).replace(word, "").replace(step["id"], ""))
        # The result as it was sent, and nothing behind it: fable models get a sentence there.
        assert second.body["messages"][-1]["content"][0]["tool_use_id"] == step["id"]
    assert seen[0] == seen[1]


def test_events_come_as_they_are_made(pair: Pair, api: ScriptedApi) -> None:
    hostile, _ = pair
    word = f"mark-{uuid4().hex}"
    gate = threading.Event()
    api.on(word, text_reply("one two three", gate=gate, gate_after=3))
    connection = hostile.connect()
    body = {
        "model": "claude-sonnet-4-6",
        "max_tokens": 100,
        "stream": True,
        "messages": [{"role": "user", "content": word}],
    }
    connection.request("POST", "/v1/messages", json.dumps(body))
    response = connection.getresponse()
    seen = b""
    while b"text_delta" not in seen:  # upstream says no more before this has come
        seen += response.read1()
    gate.set()
    response.read()
    connection.close()


def test_every_pinned_variable_stands_in_the_table() -> None:
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| .*? \| `([^`]*)` \|", TABLE, re.MULTILINE)
    assert dict(rows) == cc2api.PINNED_VARIABLES


@pytest.mark.parametrize("name", sorted(FROM_THE_START))
def test_what_no_settings_win_over_is_not_handed_down(name: str) -> None:
    environ = {name: FROM_THE_START[name], "PATH": "/bin"}
    _, given = cc2api.command_and_environment(
        cc2api.Cli("claude", "2"), cc2api.Settings(), environ, "/tmp"
    )
    assert name not in given
