"""Claude Code as the client: what it sends of itself reaches upstream as its prompt."""

from __future__ import annotations

import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
from harness import WAIT_S, RunningGateway, clean_environment
from scripted_api import ScriptedApi

import cc2api


def run_claude_code(claude: str, gateway: RunningGateway, home: Path, model: str, word: str) -> str:
    """Have the real Claude Code ask a question through the gateway; return what it prints."""
    done = subprocess.run(
        [claude, "-p", f"say {word}", "--model", model],
        env=clean_environment(home, gateway.url, ANTHROPIC_API_KEY="any"),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * WAIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("model", "sign_in"), [("claude-sonnet-4-6", "gateway"), ("claude-sonnet-5-5", "login_gateway")]
)
def test_its_prompt_reaches_upstream_and_its_attribution_does_not(
    request: pytest.FixtureRequest,
    api: ScriptedApi,
    claude: str,
    tmp_path: Path,
    model: str,
    sign_in: str,
) -> None:
    """Upstream drops a system block whole that begins with an attribution (cli-contract.md)."""
    gateway: RunningGateway = request.getfixturevalue(sign_in)
    word = f"mark-{uuid4().hex}"

    answer = run_claude_code(claude, gateway, tmp_path, model, word)

    assert "Hello, I am scripted." in answer
    (call,) = api.calls_with(word)
    attribution, identity, prompt = (block["text"] for block in call.body["system"])
    assert attribution.startswith(cc2api.ATTRIBUTION_START)
    assert "Claude" in identity
    assert not prompt.startswith(cc2api.ATTRIBUTION_START)
    assert cc2api.ATTRIBUTION_START not in prompt
    assert len(prompt) > 2000, "the prompt of Claude Code"
    assert call.body["tools"], "and its tools"


def test_its_notes_of_the_effort_are_no_mistake(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = f"mark-{uuid4().hex}"
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "system", "content": [], "output_config": {"effort": "low"}},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": word},
        {"role": "system", "content": [], "output_config": {"effort": "low"}},
    ]
    assert gateway.post({"messages": messages}).status == 200
    (call,) = api.calls_with(word)
    assert [each["role"] for each in call.body["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("is_list", [True, False])
def test_a_system_prompt_cannot_take_the_place_of_the_clis_attribution(
    gateway: RunningGateway, api: ScriptedApi, is_list: bool
) -> None:
    word = f"mark-{uuid4().hex}"
    forged = cc2api.ATTRIBUTION_START + " cc_version=1; cc_entrypoint=forged"
    system = [{"type": "text", "text": forged}] if is_list else forged
    assert gateway.ask(word, system=system).status == 200
    (call,) = api.calls_with(word)
    assert "forged" not in str(call.body["system"])
