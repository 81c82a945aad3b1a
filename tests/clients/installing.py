"""Clients that are not in the test environment: each is installed by its own fixture at first need.

`pytest -n0 tests/clients` runs them, in half an hour; plain `pytest` does not, and CI leaves out
what is marked `thorough`. It needs Node 20 or newer with npm, the Python and JavaScript package
registries, as pip and npm are set up here, nginx and Chromium (Debian: nginx-light, chromium), and
4 GB of disk. What is missing fails; it is not skipped.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

INSTALL_TIMEOUT_S = 900  # an installation is a download, at whatever speed
CODEX_VERSION = "0.169.0"  # whose ways the tests pin, as they do those of
AGENTS = [
    "cline@3.0.65",
    "@github/copilot@1.0.102",
    "@earendil-works/pi-coding-agent@1.6.0",
    "@qwen-code/qwen-code@0.24.4",
]
Installer = Callable[..., Path]


def run_installer(command: list[str], cwd: Path) -> None:
    """Install something; the stacks that pytest prints after a minute are for deadlocks."""
    faulthandler.cancel_dump_traceback_later()
    subprocess.run(command, cwd=cwd, check=True, timeout=INSTALL_TIMEOUT_S)


@pytest.fixture(scope="session")
def in_venv(tmp_path_factory: pytest.TempPathFactory) -> Installer:
    """Install Python packages into an environment of their own; return where its commands are."""

    def install(*packages: str) -> Path:
        root = tmp_path_factory.mktemp("python")
        run_installer([sys.executable, "-m", "venv", str(root)], root)
        python = str(root / "bin" / "python")
        run_installer([python, "-m", "pip", "install", "--quiet", *packages], root)
        return root / "bin"

    return install


@pytest.fixture(scope="session")
def in_node(tmp_path_factory: pytest.TempPathFactory) -> Installer:
    """Install JavaScript packages into a directory of their own, and return it."""

    def install(*packages: str) -> Path:
        root = tmp_path_factory.mktemp("javascript")
        run_installer(["npm", "install", "--silent", "--prefix", str(root), *packages], root)
        return root

    return install


@pytest.fixture(scope="session")
def anthropic_sdk() -> Path:
    """The commands of the test environment, which holds both Python SDKs."""
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def openai_sdk() -> Path:
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def old_sdk(in_venv: Installer) -> Path:
    return in_venv("anthropic==0.49.0")  # before 1.0: an accumulator with its own rules


@pytest.fixture(scope="session")
def langchain(in_venv: Installer) -> Path:
    return in_venv("langchain-anthropic")


@pytest.fixture(scope="session")
def langchain_openai(in_venv: Installer) -> Path:
    return in_venv("langchain-openai")


@pytest.fixture(scope="session")
def agents_sdk(in_venv: Installer) -> Path:
    return in_venv("openai-agents")


@pytest.fixture(scope="session")
def pydantic_ai(in_venv: Installer) -> Path:
    return in_venv("pydantic-ai-slim[anthropic,openai]")


@pytest.fixture(scope="session")
def litellm(in_venv: Installer) -> Path:
    return in_venv("litellm")


@pytest.fixture(scope="session")
def instructor(in_venv: Installer) -> Path:
    return in_venv("instructor[anthropic]")


@pytest.fixture(scope="session")
def inspect_ai(in_venv: Installer) -> Path:
    return in_venv("inspect-ai", "openai", "anthropic")


@pytest.fixture(scope="session")
def smolagents(in_venv: Installer) -> Path:
    return in_venv("smolagents[openai]")


@pytest.fixture(scope="session")
def crewai(in_venv: Installer) -> Path:
    return in_venv("crewai[anthropic]")


@pytest.fixture(scope="session")
def aiohttp(in_venv: Installer) -> Path:
    return in_venv("aiohttp", "pydantic")  # what Open WebUI asks with


@pytest.fixture(scope="session")
def llm(in_venv: Installer) -> Path:
    return in_venv("llm-anthropic")


@pytest.fixture(scope="session")
def aider(in_venv: Installer) -> Path:
    return in_venv("aider-chat")


@pytest.fixture(scope="session")
def playwright(in_venv: Installer) -> Path:
    return in_venv("playwright")


@pytest.fixture(scope="session")
def javascript_sdks(in_node: Installer) -> Path:
    return in_node("@anthropic-ai/sdk@^1.0.0", "openai@^6.0.0")


@pytest.fixture(scope="session")
def openai_javascript(in_node: Installer) -> Path:
    return in_node("openai@^7.57.0")


@pytest.fixture(scope="session")
def vercel(in_node: Installer) -> Path:
    return in_node("ai", "@ai-sdk/anthropic", "@ai-sdk/openai")


@pytest.fixture(scope="session")
def continue_cli(in_node: Installer) -> Path:
    return in_node("@continuedev/cli") / "node_modules" / ".bin"


@pytest.fixture(scope="session")
def codex(in_node: Installer) -> Path:
    """Codex' platform package, which the launcher of its own name would install: 410 MB."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}[platform.machine()]
    root = in_node(f"@openai/codex@{CODEX_VERSION}-{sys.platform}-{machine}")
    (binary,) = root.glob("node_modules/@openai/codex/vendor/*/bin/codex")
    return binary.parent


@pytest.fixture(scope="session")
def new_node(in_node: Installer) -> Path:
    """The commands of a Node that the newest clients take, whatever this machine's own is."""
    return in_node("node@22") / "node_modules" / ".bin"


@pytest.fixture(scope="session")
def in_new_node(tmp_path_factory: pytest.TempPathFactory, new_node: Path) -> Installer:
    """As `in_node`, with what that Node can run: npm takes older packages for an older Node."""

    def install(*packages: str) -> Path:
        root = tmp_path_factory.mktemp("javascript")
        path = f"PATH={new_node}{os.pathsep}{os.environ['PATH']}"
        command = ["env", path, "npm", "install", "--silent", "--prefix", str(root)]
        run_installer([*command, *packages], root)
        return root

    return install


@pytest.fixture(scope="session")
def node_sdks(in_new_node: Installer) -> Path:
    ai_sdk = ["ai", "@ai-sdk/anthropic", "@ai-sdk/openai", "@ai-sdk/openai-compatible"]
    langchain = ["@langchain/anthropic", "@langchain/core", "@langchain/openai"]
    return in_new_node(*ai_sdk, "@openrouter/ai-sdk-provider", *langchain, "@openai/agents", "zod")


@pytest.fixture(scope="session")
def node_agents(in_new_node: Installer) -> Path:
    """Four agents for the terminal: 950 MB."""
    return in_new_node(*AGENTS) / "node_modules" / ".bin"


@pytest.fixture(scope="session")
def promptfoo(in_new_node: Installer) -> Path:
    """Without its optional packages, 1.7 GB of them; its database is one for the machine."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}[platform.machine()]
    packages = ["--omit=optional", "promptfoo", f"@libsql/{sys.platform}-{machine}-gnu"]
    return in_new_node(*packages) / "node_modules" / ".bin"
