"""As a newcomer does it: a clone, an environment of its own, and the README's first commands.

Nothing but Python is on the machine: no `claude` (the `claude` extra brings one), no account.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import API_KEY, ROOT, clean_environment
from installing import run_installer
from scripted_api import DEFAULT_TEXT, ScriptedApi

README = (ROOT / "README.md").read_text()
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
(VENV,) = (block.strip() for block in SHELL_BLOCKS if "-m venv" in block)
(DEMO,) = (block.strip() for block in SHELL_BLOCKS if "--demo" in block)
CURL = next(block.strip() for block in SHELL_BLOCKS if block.startswith("curl"))
INSTALL, _, START_DEMO = DEMO.partition(" && ")
START = SHELL_BLOCKS[0].strip().partition(" && ")[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds as far as it is installed, installed by the README's commands."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("cc2api.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    run_installer(["bash", "-c", f"{VENV} && {INSTALL} --quiet"], root)
    return root


@contextlib.contextmanager
def started(clone: Path, command: str, home: Path, **env: str) -> Iterator[str]:
    """Run a command in the environment that was made; yield what it prints first."""
    activate = VENV.partition(" && ")[2]
    process = subprocess.Popen(
        ["bash", "-c", f"{activate} && exec {command}"],
        cwd=clone,
        env={**clean_environment(home), "CC2API_PORT": "0", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        banner = []
        for line in process.stdout:
            banner.append(line)
            if line.startswith("  try"):
                break
        yield "".join(banner)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def answer(banner: str) -> str:
    """Ask by the README's first curl."""
    found = re.search(r"listens on (\S+)", banner)
    assert found, banner
    here = CURL.replace("http://127.0.0.1:8080", found.group(1))
    done = subprocess.run(["bash", "-c", f"{here} -sS"], capture_output=True, check=True)
    return str(json.loads(done.stdout)["content"][0]["text"])


@pytest.mark.uncounted  # its gateway is started as a user does, outside of the tests' classes
def test_the_first_command_and_the_first_curl(
    clone: Path, api: ScriptedApi, tmp_path: Path
) -> None:
    env = {**API_KEY, "ANTHROPIC_BASE_URL": api.url}
    with started(clone, START, tmp_path, **env) as banner:
        assert f"{clone}/.venv/" in banner, "the claude that came with it"
        assert answer(banner) == DEFAULT_TEXT


def test_the_demo_and_the_first_curl(clone: Path, tmp_path: Path) -> None:
    with started(clone, START_DEMO, tmp_path) as banner:
        assert "DEMO" in answer(banner)
