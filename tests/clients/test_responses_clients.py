"""Clients of the Responses API in depth: Codex, the Agents SDK, LangChain, the AI SDK, openai's."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import RunningGateway, clean_environment
from helpers import tool
from hypothesis import given, settings
from random_answers import streams
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply
from test_clients import run
from test_table import settle_codex

pytest_plugins = "installing"

HERE = Path(__file__).parent
THINKING = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}


def calling(*calls: dict[str, Any]) -> Reply:
    return Reply(blocks=[THINKING, *calls], stop_reason="tool_use")


@pytest.fixture
def word(api: ScriptedApi) -> str:
    """A word that the scripted API knows in several cases."""
    word = f"mark-{uuid4().hex}"
    two = [tool("double", {"number": 3}, 1), tool("double", {"number": 40}, 2)]
    api.on(f"loop {word}", calling(two[0]))
    api.on(f"parallel {word}", calling(*two))
    api.on(f"doubled-6-{word}", text_reply("six"))
    api.on(f"doubled-80-{word}", text_reply("six and eight"))
    api.on(f"structured {word}", text_reply('{"name": "Rome"}'))
    api.on(f"handoff {word}", calling(tool("transfer_to_other", {})))
    return word


def openai_env(gateway: RunningGateway) -> dict[str, str]:
    """Return what the README's row sets."""
    base = {"OPENAI_BASE_URL": f"{gateway.url}/v1", "OPENAI_API_KEY": "any"}
    return {**base, "HTTPS_PROXY": "http://127.0.0.1:9"}


# ---- Codex


class Codex:
    """Codex in a directory and a home of its own, set up as the README says."""

    def __init__(self, bin_dir: Path, home: Path, url: str) -> None:
        self.home, self._command = home, str(bin_dir / "codex")
        settle_codex(url, home)

    def __call__(self, *args: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `codex exec`; the sandbox needs what a container may lack."""
        options = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        done = subprocess.run(
            [self._command, "exec", *args, *options],
            cwd=self.home,
            env={**clean_environment(self.home), "HTTPS_PROXY": "http://127.0.0.1:9", **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done


@pytest.fixture
def ask_codex(gateway: RunningGateway, codex: Path, tmp_path: Path) -> Codex:
    return Codex(codex, tmp_path, gateway.url)


def test_codex_runs_two_commands_at_once_and_resumes(
    ask_codex: Codex, api: ScriptedApi, word: str
) -> None:
    commands = [
        tool("exec_command", {"cmd": f"echo out-$((6*7))-{word}"}, 1),
        tool("exec_command", {"cmd": f"echo two-$((6*8))-{word}"}, 2),
    ]
    blocks = [THINKING, {"type": "text", "text": "running"}, *commands]
    api.on(word, Reply(blocks=blocks, stop_reason="tool_use"))
    api.on(f"out-42-{word}", text_reply("The command said it."))
    assert ask_codex(word).stdout.strip() == "The command said it."
    (last,) = api.calls_with(f"two-48-{word}")
    assert last.body["messages"][1]["content"] == blocks
    results = [block["tool_use_id"] for block in last.body["messages"][2]["content"]]
    assert results == ["toolu_1", "toolu_2"]
    more = f"mark-{uuid4().hex}"
    assert ask_codex("resume", "--last", more).stdout.strip() == DEFAULT_TEXT
    (resumed,) = api.calls_with(more)
    assert resumed.body["messages"][1]["content"] == blocks
    assert resumed.body["system"] == last.body["system"]


def test_codex_keeps_its_process_through_a_turn(
    start: Any, api: ScriptedApi, codex: Path, tmp_path: Path, word: str
) -> None:
    gateway = start("--processes", "2")
    command = tool("exec_command", {"cmd": f"echo out-$((6*7))-{word}"})
    api.on(word, Reply(blocks=[THINKING, command], stop_reason="tool_use"))
    api.on(f"out-42-{word}", text_reply("The command said it."))
    Codex(codex, tmp_path, gateway.url)(word)
    assert "process=reused" in gateway.wait_for_log("event=done", 2)


def test_codex_applies_a_patch_and_speaks_for_models_that_it_knows(
    start: Any, api: ScriptedApi, codex: Path, tmp_path: Path, word: str
) -> None:
    models = ("gpt-5.5=opus", "gpt-6.1-sol=opus")
    gateway = start(*(f"--model-map={pair}" for pair in models))
    ask_codex = Codex(codex, tmp_path, gateway.url)
    patch = f'*** Begin Patch\n*** Add File: {word}.txt\n+a "b"\n*** End Patch\n'
    api.on(word, calling(tool("apply_patch", {"input": patch})))
    api.on(f"A {word}.txt", text_reply("Patched."))
    assert ask_codex("-m", "gpt-5.5", word).stdout.strip() == "Patched."
    assert (tmp_path / f"{word}.txt").read_text() == 'a "b"\n'
    code = f"code-{word}"
    script = f"text('code-' + (6 * 7) + '-{word}')"
    api.on(code, calling(tool("functions__exec", {"input": script})))
    api.on(f"code-42-{word}", text_reply("Run."))
    assert ask_codex("-m", "gpt-6.1-sol", code).stdout.strip() == "Run."


def test_codex_gets_an_answer_in_its_schema(
    ask_codex: Codex, api: ScriptedApi, word: str, tmp_path: Path
) -> None:
    properties = {"name": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["name"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    done = ask_codex("--output-schema", "schema.json", f"structured {word}")
    assert json.loads(done.stdout) == {"name": "Rome"}
    (call,) = api.calls_with(word)
    assert call.body["output_config"]["format"]["schema"]["required"] == ["name"]


def test_codex_calls_a_tool_of_an_mcp_server(
    ask_codex: Codex, api: ScriptedApi, word: str, tmp_path: Path
) -> None:
    server = {"command": sys.executable, "args": [str(HERE / "mcp_server.py"), word]}
    lines = [f"{name} = {json.dumps(value)}" for name, value in server.items()]
    with (tmp_path / ".codex" / "config.toml").open("a") as config:
        config.write("\n".join(["[mcp_servers.greeter]", *lines, ""]))
    api.on(word, calling(tool("mcp__greeter__greet", {})))
    api.on(f"greetings-{word}", text_reply("Greeted."))
    assert ask_codex(word).stdout.strip() == "Greeted."
    (last,) = api.calls_with(f"greetings-{word}")
    assert last.body["messages"][1]["content"][-1]["name"] == "mcp__greeter__greet"


def test_codex_shows_an_image(
    ask_codex: Codex, api: ScriptedApi, word: str, tmp_path: Path
) -> None:
    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    (tmp_path / "dot.png").write_bytes(png)
    assert ask_codex(word, "--image", "dot.png").stdout.strip() == DEFAULT_TEXT
    (call,) = api.calls_with(word)
    kinds = [block["type"] for block in call.body["messages"][0]["content"]]
    assert "image" in kinds


def test_codex_is_told_of_an_upstream_that_is_overloaded(
    ask_codex: Codex, api: ScriptedApi, word: str
) -> None:
    api.on(word, Reply(status=529, message="Overloaded"))
    assert "model is at capacity" in ask_codex(word, status=1).stderr
    assert len(api.calls_with(word)) <= 6
    late = f"late-{word}"
    error = {"type": "overloaded_error", "message": "Overloaded"}
    api.on(late, text_reply("a b c", error=error, error_after=4))
    assert "model is at capacity" in ask_codex(late, status=1).stderr
    assert len(api.calls_with(late)) == 1


def test_codex_is_told_of_a_plan_that_is_used_up(
    login_gateway: RunningGateway, api: ScriptedApi, codex: Path, tmp_path: Path, word: str
) -> None:
    limit = "anthropic-ratelimit-unified"
    windows = {f"{limit}-status": "rejected", f"{limit}-reset": str(int(time.time()) + 7200)}
    api.on(word, Reply(status=429, message="used up", headers=windows))
    done = Codex(codex, tmp_path, login_gateway.url)(word, status=1)
    assert "hit your usage limit. Try again at" in done.stderr
    assert len(api.calls_with(word)) == 1


def test_codex_own_provider_comes_by_http_at_once(
    ask_codex: Codex, gateway: RunningGateway, word: str, tmp_path: Path
) -> None:
    config = f'model = "claude-sonnet-4-6"\nopenai_base_url = "{gateway.url}/v1"\n'
    (tmp_path / ".codex" / "config.toml").write_text(config)
    before = len(gateway.log)
    assert ask_codex(word, CODEX_API_KEY="any").stdout.strip() == DEFAULT_TEXT
    done = [line for line in gateway.log[before:] if "event=done" in line]
    assert [line.partition("method=")[2].split()[0] for line in done] == ["GET", "POST"]
    assert "status=426" in done[0]


# ---- SDKs


def test_the_agents_sdk(
    gateway: RunningGateway, word: str, agents_sdk: Path, tmp_path: Path
) -> None:
    command = [str(agents_sdk / "python"), str(HERE / "agents_client.py"), word]
    assert run(command, tmp_path, **openai_env(gateway)) == {
        "loop": "six",
        "streamed": ["six", 4],
        "parallel": "six and eight",
        "structured": "Rome",
        "handoff": ["other", DEFAULT_TEXT],
        "again": DEFAULT_TEXT,
    }


def test_langchain(
    gateway: RunningGateway, api: ScriptedApi, word: str, langchain_openai: Path, tmp_path: Path
) -> None:
    command = [str(langchain_openai / "python"), str(HERE / "langchain_client.py"), word]
    seen = run(command, tmp_path, **openai_env(gateway))
    assert seen == {"calls": [{"number": 3}, {"number": 40}], "text": "six and eight", "tokens": 61}
    (last,) = api.calls_with(f"doubled-80-{word}")
    assert last.body["messages"][1]["content"][0] == THINKING


def test_the_ai_sdk(gateway: RunningGateway, api: ScriptedApi, word: str, vercel: Path) -> None:
    shutil.copy(HERE / "ai_sdk.mjs", vercel)
    node = shutil.which("node")
    assert node is not None
    assert run([node, str(vercel / "ai_sdk.mjs"), word], vercel, **openai_env(gateway)) == {
        "text": "six and eight",
        "calls": [{"number": 3}, {"number": 40}],
        "streamed": "six and eight",
        "reasoning": "hm",
        "tokens": 61,
        "stored": [True, 400, True],
    }
    last = api.calls_with(f"doubled-80-{word}")[-1]
    assert last.body["messages"][1]["content"][0] == THINKING


def test_the_javascript_sdk_assembles_every_stream(openai_javascript: Path, tmp_path: Path) -> None:
    drawn: list[list[dict[str, Any]]] = []

    @settings(max_examples=500, deadline=None, database=None)
    @given(streams())
    def draw(events: list[dict[str, Any]]) -> None:
        drawn.append(events)

    draw()
    (tmp_path / "streams.json").write_text(json.dumps(drawn))
    shutil.copy(HERE / "assemble.mjs", openai_javascript)
    node = shutil.which("node")
    assert node is not None
    seen = run(
        [node, str(openai_javascript / "assemble.mjs"), str(tmp_path / "streams.json")], tmp_path
    )
    ends = [events[-1]["response"] for events in drawn]
    expected = [[end["status"], [item["type"] for item in end["output"]]] for end in ends]
    assert seen == expected
