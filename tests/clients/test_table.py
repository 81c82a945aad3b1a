"""Each row of the README's table: its command is run as it stands there, but for the port.

What the command reads (app.py, app.mjs, config.yaml) is made here, and says nothing of an address
unless the row does. The clients run with a proxy setting that leads nowhere, so none can reach
another address than loopback; Claude Code is told by its variables.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from harness import ROOT, RunningGateway, clean_environment
from scripted_api import DEFAULT_TEXT

pytest_plugins = "installing"

TABLE = (ROOT / "README.md").read_text().partition("\n## Clients\n")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| (\w.*?) \| `(.*?)` \|$", TABLE, re.MULTILINE))

ANTHROPIC_SDK = """
from anthropic import Anthropic
message = {"role": "user", "content": "Hello"}
print(Anthropic().messages.create(model="sonnet", max_tokens=9, messages=[message]).content[0].text)
"""
OPENAI_SDK = """
from openai import OpenAI
message = {"role": "user", "content": "Hello"}
answer = OpenAI().chat.completions.create(model="sonnet", messages=[message])
print(answer.choices[0].message.content)
"""
LANGCHAIN = """
from langchain_anthropic import ChatAnthropic
print(ChatAnthropic(model="sonnet").invoke("Hello").content)
"""
PYDANTIC_AI = """
from pydantic_ai import Agent
print(Agent("anthropic:claude-sonnet-4-6").run_sync("Hello").output)
"""
LITELLM = """
from litellm import completion
messages = [{"role": "user", "content": "Hello"}]
answer = completion(model="anthropic/claude-sonnet-4-6", messages=messages)
print(answer.choices[0].message.content)
"""
AI_SDK = """
import { generateText } from "ai"
import { anthropic } from "@ai-sdk/anthropic"
const {text} = await generateText({model: anthropic("claude-sonnet-4-6"), prompt: "Hello"})
console.log(text)
"""
CONTINUE = """
name: mine
version: 1.0.0
schema: v1
models:
  - {name: sonnet, provider: anthropic, model: claude-sonnet-4-6, apiKey: any, roles: [chat],
     %s"}
"""
OPENAI = "OpenAI SDK, Agents SDK, LangChain's ChatOpenAI, instructor, CrewAI"
AIDER = "--message Hello --no-git --yes-always --no-analytics --no-check-update"
AIDER += " --no-show-model-warnings"


CHAT_OPENAI = """
from langchain_openai import ChatOpenAI
print(ChatOpenAI(model="sonnet").invoke("Hello").content)
"""
AGENTS_SDK = """
from agents import Agent, Runner, set_tracing_disabled
set_tracing_disabled(True)
agent = Agent(name="a", instructions="be brief", model="claude-sonnet-4-6")
print(Runner.run_sync(agent, "Hello").final_output)
"""
AI_SDK_OPENAI = """
import { generateText } from "ai"
import { openai } from "@ai-sdk/openai"
const providerOptions = {openai: {store: false}}
const {text} = await generateText({model: openai("sonnet"), prompt: "Hello", providerOptions})
console.log(text)
"""


def here(text: str, gateway: RunningGateway) -> str:
    return text.replace("http://127.0.0.1:8080", gateway.url)


def settle_codex(url: str, home: Path) -> None:
    """Write the README's configuration of Codex."""
    (config,) = re.findall(r"```toml\n(.*?)```", TABLE, re.DOTALL)
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(config.replace("http://127.0.0.1:8080", url))


def answer(gateway: RunningGateway, command: str, bin_dir: Path, home: Path, **env: str) -> str:
    """Run a command of the README, with the client's own directory first; return what it prints."""
    assert "http://127.0.0.1:8080" in command or command.startswith(("cn ", "codex "))
    environment = clean_environment(home)
    environment["PATH"] = f"{bin_dir}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", here(command, gateway)],
        cwd=home,
        env={
            **environment,
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LLM_USER_PATH": str(home),
            **env,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("row", "client", "code"),
    [
        ("Anthropic SDK, LangChain, pydantic-ai", "anthropic_sdk", ANTHROPIC_SDK),
        ("Anthropic SDK, LangChain, pydantic-ai", "langchain", LANGCHAIN),
        ("Anthropic SDK, LangChain, pydantic-ai", "pydantic_ai", PYDANTIC_AI),
        (OPENAI, "openai_sdk", OPENAI_SDK),
        (OPENAI, "langchain_openai", CHAT_OPENAI),
        (OPENAI, "agents_sdk", AGENTS_SDK),
        ("LiteLLM", "litellm", LITELLM),
    ],
    ids=["anthropic", "langchain", "pydantic-ai", "openai", "chat-openai", "agents", "litellm"],
)
def test_python_clients(
    gateway: RunningGateway,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    row: str,
    client: str,
    code: str,
) -> None:
    (tmp_path / "app.py").write_text(code)
    bin_dir = request.getfixturevalue(client)
    assert DEFAULT_TEXT in answer(gateway, ROWS[row], bin_dir, tmp_path)


def test_llm(gateway: RunningGateway, llm: Path, tmp_path: Path) -> None:
    assert DEFAULT_TEXT in answer(gateway, ROWS["llm-anthropic"], llm, tmp_path)


def test_aider(gateway: RunningGateway, aider: Path, tmp_path: Path) -> None:
    assert DEFAULT_TEXT in answer(gateway, f"{ROWS['aider']} {AIDER}", aider, tmp_path)


def test_the_vercel_ai_sdk(gateway: RunningGateway, vercel: Path) -> None:
    (vercel / "app.mjs").write_text(AI_SDK)
    assert DEFAULT_TEXT in answer(gateway, ROWS["Vercel AI SDK"], vercel, vercel)


def test_the_ai_sdks_openai(gateway: RunningGateway, vercel: Path) -> None:
    (vercel / "app.mjs").write_text(AI_SDK_OPENAI)
    row = ROWS["AI SDK's `openai`, `store: false`"]
    assert DEFAULT_TEXT in answer(gateway, row, vercel, vercel)


def test_codex(gateway: RunningGateway, codex: Path, tmp_path: Path) -> None:
    settle_codex(gateway.url, tmp_path)
    environment = clean_environment(tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, env=environment, check=True)
    row = ROWS["Codex, see below"]
    assert DEFAULT_TEXT in answer(gateway, row, codex, tmp_path)


def test_continue(gateway: RunningGateway, continue_cli: Path, tmp_path: Path) -> None:
    ((row, command),) = ((r, c) for r, c in ROWS.items() if r.startswith("Continue, "))
    setting = row.partition("`")[2].rstrip("`").replace(": ", ': "')
    (tmp_path / "config.yaml").write_text(here(CONTINUE % setting, gateway))
    assert DEFAULT_TEXT in answer(gateway, command, continue_cli, tmp_path)


def test_claude_code(gateway: RunningGateway, claude: str, tmp_path: Path) -> None:
    bin_dir, no_proxy = Path(claude).parent, {"HTTPS_PROXY": ""}  # for a dead one it waits
    assert DEFAULT_TEXT in answer(gateway, ROWS["Claude Code"], bin_dir, tmp_path, **no_proxy)


def test_the_table_names_what_is_tried_here() -> None:
    assert list(ROWS) == [
        "Anthropic SDK, LangChain, pydantic-ai",  # the SDK in JavaScript in test_clients.py
        "Vercel AI SDK",
        OPENAI,  # in JavaScript in test_clients.py; more of it all in the files of clients
        "AI SDK's `openai`, `store: false`",
        "Codex, see below",
        "Claude Code",
        "LiteLLM",
        "llm-anthropic",
        "aider",
        "Continue, `apiBase: http://127.0.0.1:8080/v1`",
        "Qwen Code",  # this and the next in test_node_clients.py
        "GitHub Copilot CLI",
    ]
