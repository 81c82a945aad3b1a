"""Python clients in depth, against an API that refuses what the real one refuses of that model.

Each client's script runs the same cases once for each model. The scripted API answers as a model
would: it calls the tool that it is given, fills in the schema, and says which images it sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, RunningGateway
from helpers import tool
from scripted_api import DEFAULT_TEXT, Call, Reply, ScriptedApi, text_reply
from test_clients import run

pytest_plugins = "installing"

HERE = Path(__file__).parent
MODELS = ("sonnet", pytest.param("claude-sonnet-4-6", marks=pytest.mark.thorough))
PERSON = {
    "name": "Ann Lee",
    "age": 30,
    "height_m": None,
    "colour": "blue",
    "home": {"name": "Rome", "founded": -753},
    "towns": [{"name": "Bonn", "founded": None}],
}


class ScriptedModel(ScriptedApi):
    """Answers each case of the clients, whatever form they give it."""

    def record(self, call: Call) -> Reply:
        super().record(call)
        if "case-limited" in call.text:
            return Reply(status=429, message="slow down")
        if "case-overloaded" in call.text:
            return Reply(status=529, message="Overloaded")
        if "case-structured" in call.text:
            return filled_in(call.body, PERSON)
        if "case-loop" in call.text:
            return looped(call)
        if "case-image" in call.text:
            has_image = '"media_type": "image/png"' in call.text
            return text_reply("An image." if has_image else "No image.")
        return text_reply()


def is_formatted(body: dict[str, Any]) -> bool:
    return "format" in (body.get("output_config") or {})


def looped(call: Call) -> Reply:
    """Call the tool, then say what it returned."""
    names = [each["name"] for each in call.body.get("tools") or []]
    if "doubled-42" not in call.text:
        return filled_in(call.body, {"number": 21}, *{"double"}.intersection(names))
    if "final_answer" in names:
        return filled_in(call.body, {"answer": "It is 42."}, "final_answer")
    is_forced = (call.body.get("tool_choice") or {}).get("type", "auto") != "auto"
    if is_forced or is_formatted(call.body) or not names:
        return filled_in(call.body, {"number": 42})
    return text_reply("It is 42.")


def filled_in(body: dict[str, Any], given: dict[str, Any], name: str | None = None) -> Reply:
    """Call a tool: the one named, chosen, or last. Without tools say the same as JSON."""
    if is_formatted(body) or not body.get("tools"):
        return text_reply(json.dumps(given))
    name = name or (body.get("tool_choice") or {}).get("name") or body["tools"][-1]["name"]
    return Reply(blocks=[tool(name, given)], stop_reason="tool_use")


@pytest.fixture(scope="module")
def api() -> Iterator[ScriptedModel]:
    model = ScriptedModel()
    model.is_strict = True
    model.thinking_s = 0.05
    with model:
        yield model


@pytest.fixture(scope="module")
def gateway(api: ScriptedModel, quick_claude: str) -> Iterator[RunningGateway]:
    with RunningGateway(claude=quick_claude, base_url=api.url, env=API_KEY) as running:
        yield running


def client_env(gateway: RunningGateway) -> dict[str, str]:
    """Return the variables by which a client finds the gateway, and reaches nothing else."""
    return {
        "OPENAI_BASE_URL": f"{gateway.url}/v1",
        "OPENAI_API_KEY": "any",
        "ANTHROPIC_BASE_URL": gateway.url,
        "ANTHROPIC_API_KEY": "any",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "CREWAI_DISABLE_TELEMETRY": "true",
        "OTEL_SDK_DISABLED": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


OPENAI = {"limited": ["RateLimitError", 429], "overloaded": ["InternalServerError", 503]}
ANTHROPIC = {**OPENAI, "overloaded": ["OverloadedError", 529]}
OPEN_WEBUI = {"limited": ["AnswerError", 429], "overloaded": ["AnswerError", 503]}
LANGCHAIN = {"limited": ["OpenAIRateLimitError", 429], "overloaded": ["OpenAIAPIError", 503]}
PYDANTIC = {"limited": ["ModelRateLimitError", 429], "overloaded": ["ModelOverloadedError", 503]}
UNAVAILABLE = {**OPENAI, "overloaded": ["ServiceUnavailableError", 503]}
INTERNAL = {**OPENAI, "overloaded": ["InternalServerError", 500]}  # which LiteLLM makes of 529
CLIENTS = {
    # by script and kind: the fixture, the errors, and whether the client asks for its schema to be
    # enforced as structured output; else a tool has it, or the prompt
    "openai chat": ("openai_sdk", OPENAI, True),
    "openai responses": ("openai_sdk", OPENAI, True),
    "anthropic messages": ("anthropic_sdk", ANTHROPIC, True),
    "openwebui chat": ("aiohttp", OPEN_WEBUI, False),
    "chatopenai chat": ("langchain_openai", LANGCHAIN, True),
    "chatopenai functions": ("langchain_openai", LANGCHAIN, False),
    "chatopenai responses": ("langchain_openai", LANGCHAIN, True),
    "litellm openai": ("litellm", UNAVAILABLE, True),
    "litellm anthropic": ("litellm", INTERNAL, False),
    "pydantic chat-tool": ("pydantic_ai", PYDANTIC, False),
    "pydantic chat-native": ("pydantic_ai", PYDANTIC, True),
    "pydantic responses-native": ("pydantic_ai", PYDANTIC, True),
    "instructor openai-tools": ("instructor", OPENAI, False),
    "instructor openai-json_schema": ("instructor", OPENAI, True),
    "instructor anthropic-tools": ("instructor", ANTHROPIC, False),
    "inspect openai": ("inspect_ai", OPENAI, True),
    "inspect openai-api": ("inspect_ai", OPENAI, True),
    "inspect anthropic": ("inspect_ai", ANTHROPIC, True),
    "smolagents chat": ("smolagents", OPENAI, True),
    "crewai openai": ("crewai", OPENAI, True),
    "crewai anthropic": ("crewai", ANTHROPIC, False),
}


LARGE = ("crewai", "inspect", "smolagents")  # to install
CLIENT_PARAMS = [
    pytest.param(client, marks=[pytest.mark.thorough] if client.startswith(LARGE) else [])
    for client in CLIENTS
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("client", CLIENT_PARAMS)
def test_a_client(
    api: ScriptedModel,
    gateway: RunningGateway,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    client: str,
    model: str,
) -> None:
    script, kind = client.split()
    installed, errors, enforces = CLIENTS[client]
    python = request.getfixturevalue(installed) / "python"
    before = len(api.calls)
    command = [str(python), str(HERE / f"{script}_client.py"), kind, model]
    assert run(command, tmp_path, **client_env(gateway)) == {
        "text": DEFAULT_TEXT,
        "loop": "It is 42.",
        "structured": ["Ann Lee", 30, "blue", "Rome", 1],
        "image": "An image.",
        **errors,
    }
    if enforces:
        structured = [c.body for c in api.calls[before:] if "case-structured" in c.text]
        assert all(map(is_formatted, structured))
