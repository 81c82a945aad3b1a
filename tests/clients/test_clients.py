"""Clients in depth: the JavaScript SDKs, an old Python SDK, Claude Code's own tool loop."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import RunningGateway, clean_environment
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply

pytest_plugins = "installing"

HERE = Path(__file__).parent
CALLS = [{"a": 1}, {}]


def tool(number: int, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{number}", "name": "f", "input": given}


@pytest.fixture
def marker(api: ScriptedApi) -> str:
    """A word that the scripted API answers with two tool calls."""
    word = f"mark-{uuid4().hex}"
    blocks = [{"type": "text", "text": "two calls"}, tool(1, CALLS[0]), tool(2, CALLS[1])]
    api.on(word, Reply(blocks=blocks, stop_reason="tool_use"))
    api.on("done", text_reply("thanks"))
    return word


def run(command: list[str], tmp_path: Path, **env: str) -> Any:
    """Run a client in a clean environment; return the JSON that it prints."""
    environment = {**clean_environment(tmp_path), **env}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_javascript_sdks(
    gateway: RunningGateway, marker: str, javascript_sdks: Path, tmp_path: Path
) -> None:
    shutil.copy(HERE / "client.mjs", javascript_sdks)
    node = shutil.which("node")
    assert node is not None
    # set up as the README's table says
    base = {"ANTHROPIC_BASE_URL": gateway.url, "OPENAI_BASE_URL": f"{gateway.url}/v1"}
    keys = {"ANTHROPIC_API_KEY": "any", "OPENAI_API_KEY": "any"}
    seen = run([node, str(javascript_sdks / "client.mjs"), marker], tmp_path, **base, **keys)
    models = seen.pop("models")
    assert models
    assert len(models) == len(set(models))
    assert seen.pop("counted") >= 8
    assert seen == {
        "text": DEFAULT_TEXT,
        "usage": 42,
        "calls": CALLS,
        "after": "thanks",
        "error": ["BadRequestError", 400, "req_"],
        "completion": DEFAULT_TEXT,
        "arguments": CALLS,
        "response": ["completed", DEFAULT_TEXT],
        "openaiError": ["BadRequestError", 400, "n"],
    }


def test_an_old_python_sdk(
    gateway: RunningGateway, marker: str, old_sdk: Path, tmp_path: Path
) -> None:
    command = [str(old_sdk / "python"), str(HERE / "old_client.py"), gateway.url, marker]
    seen = run(command, tmp_path)
    assert seen.pop("version").startswith("0.")
    assert seen == {"text": DEFAULT_TEXT, "calls": CALLS, "error": ["BadRequestError", 400]}


def test_claude_code_runs_a_tool_loop_through_the_gateway(
    gateway: RunningGateway, api: ScriptedApi, claude: str, tmp_path: Path
) -> None:
    word = f"mark-{uuid4().hex}"
    command = {"command": f"echo out-$((6*7))-{word}", "description": "say"}
    bash = {"type": "tool_use", "id": "toolu_bash", "name": "Bash", "input": command}
    api.on(word, Reply(blocks=[bash], stop_reason="tool_use"))
    api.on(f"out-42-{word}", text_reply("The command said it."))
    environment = clean_environment(tmp_path, gateway.url, ANTHROPIC_API_KEY="sk-ant-of-a-client")
    done = subprocess.run(
        [claude, "-p", word, "--allowedTools", "Bash", "--output-format", "json"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout)["result"] == "The command said it."
    last = api.calls_with(f"out-42-{word}")[-1]
    assert [m["role"] for m in last.body["messages"]] == ["user", "assistant", "user"]
