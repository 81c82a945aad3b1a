"""Each client of the README's table, installed for it and answered once through the gateway.

The clients run with a proxy setting that leads nowhere, so none can reach another address than
loopback.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from running import ROOT, RunningGateway, clean_environment
from scripted_api import DEFAULT_TEXT

PYTHON_CLIENTS = {  # each in an environment of its own: their requirements conflict
    "langchain": "langchain-anthropic",
    "pydantic-ai": "pydantic-ai-slim[anthropic]",
    "litellm": "litellm",
    "llm": "llm-anthropic",
    "aider": "aider-chat",
}
JAVASCRIPT_CLIENTS = ["ai", "@ai-sdk/anthropic", "@continuedev/cli"]
LANGCHAIN = """
from langchain_anthropic import ChatAnthropic
print(ChatAnthropic(model="sonnet", base_url="http://127.0.0.1:8080").invoke("Hello").content)
"""
PYDANTIC_AI = """
from pydantic_ai import Agent
print(Agent("anthropic:claude-sonnet-4-6").run_sync("Hello").output)
"""
LITELLM = """
from litellm import completion
messages = [{"role": "user", "content": "Hello"}]
answer = completion(
    model="anthropic/claude-sonnet-4-6", messages=messages, api_base="http://127.0.0.1:8080"
)
print(answer.choices[0].message.content)
"""
AI_SDK = """
import { generateText } from "ai"
import { createAnthropic } from "@ai-sdk/anthropic"
const anthropic = createAnthropic({baseURL: "http://127.0.0.1:8080/v1"})
const {text} = await generateText({model: anthropic("claude-sonnet-4-6"), prompt: "Hello"})
console.log(text)
"""
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
CONTINUE = """
name: mine
version: 1.0.0
schema: v1
models:
  - {name: sonnet, provider: anthropic, model: claude-sonnet-4-6, apiKey: any, roles: [chat],
     apiBase: "http://127.0.0.1:8080/v1"}
"""


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Install the clients; return the directory of each, and of the JavaScript ones."""
    root = tmp_path_factory.mktemp("clients")
    for name, package in PYTHON_CLIENTS.items():
        venv.create(root / name, with_pip=True)
        pip = [str(root / name / "bin" / "pip"), "install", "--quiet", package]
        subprocess.run(pip, check=True, timeout=900)
    (root / "js").mkdir()
    npm = ["npm", "install", "--silent", "--prefix", str(root / "js"), *JAVASCRIPT_CLIENTS]
    subprocess.run(npm, check=True, timeout=900)
    return {name: root / name for name in (*PYTHON_CLIENTS, "js")}


def answer(gateway: RunningGateway, command: list[str], home: Path, **env: str) -> str:
    """Run a client as the README sets it up, but for the port; return what it prints."""
    settings = {
        **clean_environment(home),
        "ANTHROPIC_API_KEY": "any",
        "OPENAI_API_KEY": "any",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        **{name: here(value, gateway) for name, value in env.items()},
    }
    done = subprocess.run(
        [here(part, gateway) for part in command],
        cwd=home,
        env=settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(text: str, gateway: RunningGateway) -> str:
    return text.replace("http://127.0.0.1:8080", gateway.url)


BASE = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("name", "code", "env"),
    [("langchain", LANGCHAIN, {}), ("pydantic-ai", PYDANTIC_AI, BASE), ("litellm", LITELLM, {})],
)
def test_python_clients(
    gateway: RunningGateway,
    places: dict[str, Path],
    tmp_path: Path,
    name: str,
    code: str,
    env: dict[str, str],
) -> None:
    python = str(places[name] / "bin" / "python")
    assert DEFAULT_TEXT in answer(gateway, [python, "-c", code], tmp_path, **env)


@pytest.mark.parametrize(
    ("code", "env"),
    [(ANTHROPIC_SDK, BASE), (OPENAI_SDK, {"OPENAI_BASE_URL": "http://127.0.0.1:8080/v1"})],
    ids=["anthropic", "openai"],
)
def test_the_python_sdks(
    gateway: RunningGateway, tmp_path: Path, code: str, env: dict[str, str]
) -> None:
    assert DEFAULT_TEXT in answer(gateway, [sys.executable, "-c", code], tmp_path, **env)


def test_llm(gateway: RunningGateway, places: dict[str, Path], tmp_path: Path) -> None:
    llm = str(places["llm"] / "bin" / "llm")
    command = [llm, "-m", "claude-sonnet-4.5", "Hello"]
    assert DEFAULT_TEXT in answer(gateway, command, tmp_path, LLM_USER_PATH=str(tmp_path), **BASE)


def test_aider(gateway: RunningGateway, places: dict[str, Path], tmp_path: Path) -> None:
    command = [str(places["aider"] / "bin" / "aider"), "--model", "anthropic/claude-sonnet-4-6"]
    command += ["--message", "Hello", "--no-git", "--yes-always", "--no-analytics"]
    command += ["--no-check-update", "--no-show-model-warnings"]
    base = "http://127.0.0.1:8080"
    assert DEFAULT_TEXT in answer(gateway, command, tmp_path, ANTHROPIC_API_BASE=base)


def test_the_vercel_ai_sdk(
    gateway: RunningGateway, places: dict[str, Path], tmp_path: Path
) -> None:
    script = places["js"] / "client.mjs"
    script.write_text(here(AI_SDK, gateway))
    assert DEFAULT_TEXT in answer(gateway, ["node", str(script)], tmp_path)


def test_continue(gateway: RunningGateway, places: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(here(CONTINUE, gateway))
    command = [str(places["js"] / "node_modules" / ".bin" / "cn"), "--config", str(config)]
    assert DEFAULT_TEXT in answer(gateway, [*command, "-p", "Hello"], tmp_path)


def test_the_table_names_what_is_tried_here() -> None:
    table = (ROOT / "README.md").read_text().partition("## Point your client at it")[2]
    names = re.findall(r"^\| (\w[^|]*?) \|", table.partition("\n## ")[0], re.MULTILINE)
    assert names == [
        "client",
        "Anthropic SDK, Python or JavaScript",  # the JavaScript ones in test_clients.py
        "OpenAI SDK, Python or JavaScript",
        "Claude Code",  # in test_clients.py
        "LangChain",
        "Vercel AI SDK",
        "pydantic-ai",
        "llm, with llm-anthropic",
        "LiteLLM",
        "aider",
        "Continue",
    ]
