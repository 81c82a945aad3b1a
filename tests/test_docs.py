"""What the README says is so: its commands are run, its options are the program's."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from running import GATEWAY, ROOT, RunningGateway
from scripted_api import DEFAULT_TEXT

import cc2api

README = (ROOT / "README.md").read_text()
SHELL_BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
CURLS = [block for block in SHELL_BLOCKS if block.startswith("curl")]


@pytest.mark.parametrize("command", CURLS)
def test_every_curl_of_the_readme_gets_an_answer(gateway: RunningGateway, command: str) -> None:
    here = command.replace("http://127.0.0.1:8080", gateway.url)
    assert here != command
    done = subprocess.run(["bash", "-c", f"{here.strip()} -sS"], capture_output=True, check=True)
    if '"stream": true' in command:
        text = "".join(
            json.loads(t) for t in re.findall(r'"text": (".*?[^\\]")', done.stdout.decode())
        )
        assert b"event: message_stop" in done.stdout
    elif "chat" in command:
        text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    else:
        text = json.loads(done.stdout)["content"][0]["text"]
    assert text == DEFAULT_TEXT


def test_the_readme_has_one_command_to_run_and_one_to_test() -> None:
    others = [block.strip() for block in SHELL_BLOCKS if block not in CURLS]
    assert others == ["pip install -e . && cc2api", "pip install -e '.[test]' && pytest"]


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\npip install -e '.[test]' && pytest\n" in (ROOT / ".ci" / "run").read_text()


def help_text() -> str:
    command = [sys.executable, str(GATEWAY), "--help"]
    done = subprocess.run(
        command, env={"COLUMNS": "200"}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_readme_help_and_settings_list_the_same_options() -> None:
    rows = re.findall(r"^\| `--([\w-]+)` \| .*? \| (.*?) \|$", README, re.MULTILINE)
    fields = dataclasses.fields(cc2api.Settings)
    assert rows == [(f.name.replace("_", "-"), f.metadata["help"]) for f in fields]
    shown = help_text()
    for name, text in rows:
        assert f"--{name}" in shown
        assert text in re.sub(r"\s+", " ", shown)


def test_each_row_of_what_happens_when_is_a_test() -> None:
    table = README.partition("## What happens when")[2].partition("\n## ")[0]
    named = re.findall(r"\| `(test_\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(re.findall(r"^\| (?!this|---)", table, re.MULTILINE)) > 20
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_the_seeds_example_answers_as_the_seed_shows(gateway: RunningGateway) -> None:
    answer = gateway.ask(
        "Translate this into bash: list all Python files recursively.",
        system="You are a helpful assistant.",
        effort="high",
    )
    message: dict[str, Any] = answer.json
    assert message["type"] == "message"
    assert message["role"] == "assistant"
    assert message["id"].startswith("msg_")
    assert message["content"] == [{"type": "text", "text": DEFAULT_TEXT}]
    assert message["stop_reason"] == "end_turn"
    assert message["stop_sequence"] is None
    assert message["usage"]["input_tokens"] > 0


def test_the_version_is_told() -> None:
    command = [sys.executable, str(GATEWAY), "--version"]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=True)
    assert done.stdout == f"cc2api {cc2api.__version__}\n"


def test_the_banner_says_where_how_and_what_to_try(gateway: RunningGateway) -> None:
    banner = gateway.banner
    assert f"listens on {gateway.url}\n" in banner
    assert re.search(r"claude   2\.1\.\d+ at /", banner)
    assert "sign-in  api_key\n" in banner
    assert "keys     open" in banner
    command = banner.partition("try      ")[2]
    done = subprocess.run(["bash", "-c", f"{command.strip()} -sS"], capture_output=True, check=True)
    assert json.loads(done.stdout)["type"] == "message"
