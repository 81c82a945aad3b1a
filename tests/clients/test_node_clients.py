"""Clients that run on Node, against an upstream that refuses what the real one does of each model.

Each is tried on the newest model, which takes no sampling parameters, and on one that does: text, a
tool loop, structured output, an image, and upstream's errors, as far as the client has it.
"""

from __future__ import annotations

import base64
import faulthandler
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from harness import API_KEY, RunningGateway, clean_environment
from helpers import tool
from scripted_api import DEFAULT_TEXT, JsonObject, Reply, ScriptedApi, text_reply
from test_clients import run
from test_table import ROWS, answer

pytest_plugins = "installing"

HERE = Path(__file__).parent
NEWEST = "sonnet"
OLDER = pytest.param("claude-sonnet-4-6", marks=pytest.mark.thorough)
MODELS = [NEWEST, OLDER]
THINKING = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
PERSON = {"age": 40}
CITY = {"name": "Rome", "kind": "city", "size": 3, "tags": ["old"], "mayor": PERSON}
CITY["others"] = [PERSON]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
LOOPBACK_ONLY = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="module")
def api() -> Iterator[ScriptedApi]:
    """The scripted upstream of this module, a strict one."""
    with ScriptedApi() as running:
        running.is_strict = True
        running.thinking_s = 0.05
        yield running


@pytest.fixture(scope="module")
def gateway(api: ScriptedApi, quick_claude: str) -> Iterator[RunningGateway]:
    with RunningGateway(claude=quick_claude, base_url=api.url, env=API_KEY) as running:
        yield running


@pytest.fixture
def word(api: ScriptedApi) -> str:
    """A word that the scripted API knows in several cases."""
    word = f"mark-{uuid4().hex}"
    call = Reply(blocks=[THINKING, tool("double", {"number": 3}, 1)], stop_reason="tool_use")
    api.on(f"loop {word}", call)
    api.on(f"streamed {word}", call)
    api.on(f"doubled-6-{word}", text_reply("six"))
    api.on(f"structured {word}", text_reply(json.dumps(CITY)))
    api.on(f"limited {word}", Reply(status=429, message="slow down"))
    api.on(f"overloaded {word}", Reply(status=529, message="busy"))
    return word


def kinds_shown(api: ScriptedApi, word: str) -> list[str]:
    """Return the types of the blocks of the last request's first message."""
    content = api.calls_with(word)[-1].body["messages"][0]["content"]
    return [block["type"] for block in content]


def turn_given_back(api: ScriptedApi, word: str) -> list[Any]:
    """Return what the last request of a tool loop says that the model had answered."""
    return list(api.calls_with(f"doubled-6-{word}")[-1].body["messages"][1]["content"])


# ---- libraries

LIBRARIES = [
    *(f"ai_sdk {api}" for api in ("responses", "chat", "compatible", "openrouter", "messages")),
    *(f"langchain {api}" for api in ("responses", "chat", "messages")),
    *(f"agents {api}" for api in ("responses", "chat")),
]
# The others' messages have no place for a signature.
GIVES_THINKING_BACK = ("responses", "messages", "openrouter")
ERRORS = {
    "ai_sdk": ("APICallError", "APICallError", "APICallError"),
    "langchain": ("BadRequestError", "RateLimitError", "InternalServerError"),
    "agents": ("BadRequestError", "RateLimitError", "InternalServerError"),
}


@pytest.fixture
def ask_library(
    gateway: RunningGateway, new_node: Path, node_sdks: Path, tmp_path: Path, word: str
) -> Any:
    for script in HERE.glob("*_cases.mjs"):
        shutil.copy(script, node_sdks)

    def ask(case: str, library: str, model: str) -> Any:
        name, _, of_api = library.partition(" ")
        script = str(node_sdks / f"{name}_cases.mjs")
        command = [str(new_node / "node"), script, case, of_api, model, word]
        return run(command, tmp_path, GATEWAY=gateway.url, **LOOPBACK_ONLY)

    return ask


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("library", LIBRARIES)
class TestLibraries:
    def test_text(self, ask_library: Any, library: str, model: str) -> None:
        assert ask_library("text", library, model) == DEFAULT_TEXT

    def test_sampling_parameters(self, ask_library: Any, library: str, model: str) -> None:
        seen = ask_library("sampled", library, model)
        if model == NEWEST and library.endswith("messages"):  # as the API itself answers them
            name, _, _ = ERRORS[library.split()[0]]
            assert (seen["error"], seen["status"]) == (name, 400)
            assert "`temperature` is deprecated" in seen["message"]
        else:
            assert seen == DEFAULT_TEXT

    @pytest.mark.parametrize("case", ["loop", "streamed"])
    def test_a_tool_loop(
        self, ask_library: Any, api: ScriptedApi, word: str, library: str, model: str, case: str
    ) -> None:
        assert ask_library(case, library, model) == "six"
        call = tool("double", {"number": 3}, 1)
        has_thinking = library.split()[1] in GIVES_THINKING_BACK
        expected = [THINKING, call] if has_thinking else [call]
        assert turn_given_back(api, word) == expected

    def test_structured_output(
        self, ask_library: Any, api: ScriptedApi, word: str, library: str, model: str
    ) -> None:
        assert ask_library("structured", library, model) == CITY
        (call,) = api.calls_with(word)
        assert '"note"' in call.text

    @pytest.mark.thorough
    def test_an_image(
        self, ask_library: Any, api: ScriptedApi, word: str, library: str, model: str
    ) -> None:
        assert ask_library("image", library, model) == DEFAULT_TEXT
        assert sorted(kinds_shown(api, word)) == ["image", "text"]

    @pytest.mark.thorough
    def test_upstream_limits(self, ask_library: Any, library: str, model: str) -> None:
        seen = ask_library("limited", library, model)
        _, name, _ = ERRORS[library.split()[0]]
        assert (seen["error"], seen["status"]) == (name, 429)
        assert "slow down" in seen["message"]

    @pytest.mark.thorough
    def test_upstream_is_overloaded(self, ask_library: Any, library: str, model: str) -> None:
        seen = ask_library("overloaded", library, model)
        _, _, name = ERRORS[library.split()[0]]
        status = 529 if library.endswith("messages") else 503
        assert (seen["error"], seen["status"]) == (name, status)
        assert "busy" in seen["message"]


# ---- agents for the terminal


class Terminal(NamedTuple):
    """How one is started, and what its tool for commands takes."""

    command: list[str]
    env: dict[str, str]
    shell: tuple[str, dict[str, Any]]
    image: list[str]  # what it takes besides @dot.png in the prompt


def cline(of_api: str, model: str, url: str, home: Path) -> Terminal:
    provider = "anthropic" if of_api == "messages" else "openai-compatible"
    settings = {"provider": provider, "apiKey": "any", "model": model, "baseUrl": f"{url}/v1"}
    entry = {"settings": settings, "updatedAt": "2026-01-01T00:00:00Z", "tokenSource": "manual"}
    config = {"version": 1, "lastUsedProvider": provider, "modes": {}}
    directory = home / ".cline" / "data" / "settings"
    directory.mkdir(parents=True)
    (directory / "providers.json").write_text(
        json.dumps({**config, "providers": {provider: entry}})
    )
    return Terminal(
        ["cline", "-P", provider, "-m", model, "--json"],
        {"CLINE_SESSION_BACKEND_MODE": "local"},  # else it leaves a daemon behind
        ("run_commands", {"commands": ["echo doubled-$((2*3))-%s"]}),
        [],
    )


def copilot(of_api: str, model: str, url: str, home: Path) -> Terminal:
    if of_api == "messages":
        provider = {"TYPE": "anthropic", "BASE_URL": url}
    else:
        wire = {"chat": "completions", "responses": "responses"}[of_api]
        provider = {"WIRE_API": wire, "BASE_URL": f"{url}/v1"}
    env = {f"COPILOT_PROVIDER_{name}": value for name, value in provider.items()}
    return Terminal(
        ["copilot", "--allow-all-tools", "--silent", "-p"],
        {**env, "COPILOT_MODEL": model, "COPILOT_OFFLINE": "true"},
        ("bash", {"command": "echo doubled-$((2*3))-%s", "description": "say"}),
        ["--attachment", "dot.png"],
    )


def pi(of_api: str, model: str, url: str, home: Path) -> Terminal:
    name = {"chat": "openai-completions", "messages": "anthropic-messages"}.get(
        of_api, "openai-responses"
    )
    base = url if of_api == "messages" else f"{url}/v1"
    compat = {"forceAdaptiveThinking": True} if of_api == "messages" else {}
    described = {"id": model, "reasoning": True, "input": ["text", "image"], "compat": compat}
    provider = {"baseUrl": base, "api": name, "apiKey": "any", "models": [described]}
    directory = home / ".pi" / "agent"
    directory.mkdir(parents=True)
    (directory / "models.json").write_text(json.dumps({"providers": {"here": provider}}))
    return Terminal(
        ["pi", "--offline", "--provider", "here", "--model", model, "-p"],
        {},
        ("bash", {"command": "echo doubled-$((2*3))-%s"}),
        ["@dot.png"],
    )


def qwen(of_api: str, model: str, url: str, home: Path) -> Terminal:
    described = {"model": {"generationConfig": {"modalities": {"image": True}}}}
    (home / ".qwen").mkdir()
    (home / ".qwen" / "settings.json").write_text(json.dumps(described))
    return Terminal(
        ["qwen", "--auth-type", "openai", "--yolo"],
        {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "any", "OPENAI_MODEL": model},
        ("run_shell_command", {"command": "echo doubled-$((2*3))-%s", "is_background": False}),
        [],
    )


AGENTS = {"cline": cline, "copilot": copilot, "pi": pi, "qwen": qwen}
ROUTES = {
    "cline": ("chat", "messages"),
    "copilot": ("chat", "responses", "messages"),
    "pi": ("chat", "responses", "messages"),
    "qwen": ("chat",),
}
TERMINALS = [f"{name} {of_api}" for name, apis in ROUTES.items() for of_api in apis]
GIVE_THINKING_BACK = ("copilot", "pi")


class Agent:
    """One of them, in a home of its own."""

    def __init__(
        self, name: str, model: str, url: str, node_dir: Path, bin_dir: Path, home: Path
    ) -> None:
        program, _, of_api = name.partition(" ")
        self.terminal = AGENTS[program](of_api, model, url, home)
        self.path = f"{node_dir}:{bin_dir}"
        self.home = home

    def __call__(self, prompt: str, *args: str) -> subprocess.CompletedProcess[str]:
        faulthandler.cancel_dump_traceback_later()  # some try again for a minute
        environment = clean_environment(self.home)
        environment["PATH"] = f"{self.path}:{environment['PATH']}"
        return subprocess.run(
            [*self.terminal.command, prompt, *args],
            cwd=self.home,
            env={**environment, **LOOPBACK_ONLY, **self.terminal.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )


@pytest.fixture
def agent(
    gateway: RunningGateway,
    new_node: Path,
    node_agents: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Agent:
    (tmp_path / "dot.png").write_bytes(PNG)
    name, model = request.param
    return Agent(name, model, gateway.url, new_node, node_agents, tmp_path)


@pytest.mark.parametrize("row", ["Qwen Code", "GitHub Copilot CLI"])
def test_a_row_of_the_readme(
    gateway: RunningGateway, new_node: Path, node_agents: Path, tmp_path: Path, row: str
) -> None:
    bin_dirs = Path(f"{new_node}:{node_agents}")
    # Without this they would go by the proxy to loopback too.
    direct = {"NO_PROXY": "127.0.0.1"}
    assert DEFAULT_TEXT in answer(gateway, ROWS[row], bin_dirs, tmp_path, **direct)


def with_agents(
    *terminals: str, models: tuple[str, ...] = (NEWEST, "claude-sonnet-4-6")
) -> pytest.MarkDecorator:
    params = [
        pytest.param(
            (terminal, model),
            id=f"{terminal}-{model}",
            marks=[] if model == NEWEST else [pytest.mark.thorough],
        )
        for terminal in terminals
        for model in models
        # It sets a temperature itself, which Anthropic refuses.
        if (terminal, model) != ("copilot messages", NEWEST)
    ]
    return pytest.mark.parametrize("agent", params, indirect=True)


@with_agents(*TERMINALS)
def test_an_agent_runs_a_command(
    agent: Agent, api: ScriptedApi, word: str, request: pytest.FixtureRequest
) -> None:
    name, given = agent.terminal.shell
    filled = json.loads(json.dumps(given).replace("%s", word))
    call = tool(name, filled, 1)
    blocks = [THINKING, {"type": "text", "text": "running"}, call]
    api.on(f"command {word}", Reply(blocks=blocks, stop_reason="tool_use"))
    done = agent(f"run command {word}")
    assert done.returncode == 0, done.stderr
    assert "six" in done.stdout
    has_thinking = request.node.callspec.id.startswith(GIVE_THINKING_BACK)
    assert turn_given_back(api, word) == (blocks if has_thinking else blocks[1:])


@pytest.mark.thorough
@with_agents(*(name for name in TERMINALS if not name.startswith("cline")))  # which takes none
def test_an_agent_shows_an_image(agent: Agent, api: ScriptedApi, word: str) -> None:
    done = agent(f"see image {word} @dot.png", *agent.terminal.image)
    assert done.returncode == 0, done.stderr
    assert DEFAULT_TEXT in done.stdout
    # Some turn it into a JPEG, or mention the word in a second request.
    assert any('"media_type": "image/' in call.text for call in api.calls_with(word))


@with_agents("qwen chat")
def test_qwen_gets_an_answer_in_its_schema(agent: Agent, api: ScriptedApi, word: str) -> None:
    size = {"type": "integer", "minimum": 0, "maximum": 10}
    schema = {"type": "object", "properties": {"size": size}, "required": ["size"]}
    call = tool("structured_output", {"size": 3}, 1)
    api.on(f"fill {word}", Reply(blocks=[call], stop_reason="tool_use"))
    done = agent(f"please fill {word}", "--json-schema", json.dumps(schema))
    assert json.loads(done.stdout) == {"size": 3}


@pytest.mark.thorough
@with_agents("copilot chat", "pi chat", "pi responses", "cline chat", models=(NEWEST,))
def test_an_agent_is_told_of_upstreams_limit(agent: Agent, word: str) -> None:
    done = agent(f"please limited {word}")
    assert "slow down" in done.stdout + done.stderr
    assert done.returncode == 1


# ---- promptfoo


def promptfoo_tests(of_api: str, word: str) -> list[JsonObject]:
    """Return its tests, each with options in the form of an API."""
    size = {"type": "integer", "minimum": 0, "maximum": 10}
    schema = {"type": "object", "properties": {"size": size}, "required": ["size"]}
    function = {"name": "double", "parameters": schema}
    data = base64.b64encode(PNG).decode("ascii")
    url = f"data:image/png;base64,{data}"
    text, tools, image = {
        "openai:chat": (
            "text",
            {"type": "function", "function": function},
            {"type": "image_url", "image_url": {"url": url}},
        ),
        "openai:responses": (
            "input_text",
            {"type": "function", **function},
            {"type": "input_image", "image_url": url},
        ),
        "anthropic:messages": (
            "text",
            {"name": "double", "input_schema": schema},
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": data},
            },
        ),
    }[of_api]
    content = [{"type": text, "text": f"image {word}"}, image]
    options: JsonObject = {
        f"text {word}": {},
        f"loop {word}": {"tools": [tools]},
        json.dumps([{"role": "user", "content": content}]): {},
        f"limited {word}": {},
        f"overloaded {word}": {},
    }
    if of_api.startswith("openai"):
        named = {"type": "json_schema", "json_schema": {"name": "Size", "schema": schema}}
        options[f"fill {word}"] = {"response_format": named}
    return [{"vars": {"ask": ask}, "options": more} for ask, more in options.items()]


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["claude-sonnet-5-5", "claude-sonnet-4-6"])
@pytest.mark.parametrize("of_api", ["openai:chat", "openai:responses", "anthropic:messages"])
def test_promptfoo(
    gateway: RunningGateway,
    api: ScriptedApi,
    new_node: Path,
    promptfoo: Path,
    tmp_path: Path,
    word: str,
    of_api: str,
    model: str,
) -> None:
    """By the model's whole name: to one that it does not know it sends a temperature."""
    api.on(f"fill {word}", text_reply('{"size": 3}'))
    base = gateway.url if of_api == "anthropic:messages" else f"{gateway.url}/v1"
    config = {"apiBaseUrl": base, "apiKey": "any", "maxRetries": 0}
    provider = {"id": f"{of_api}:{model}", "config": config}
    told = {"prompts": ["{{ask}}"], "providers": [provider], "tests": promptfoo_tests(of_api, word)}
    (tmp_path / "told.json").write_text(json.dumps(told))
    environment = clean_environment(tmp_path)
    off = ["TELEMETRY", "UPDATE", "REMOTE_GENERATION"]
    done = subprocess.run(
        ["promptfoo", "eval", "-c", "told.json", "-o", "out.json", "--no-cache", "--no-table"],
        cwd=tmp_path,
        env={
            **environment,
            "PATH": f"{new_node}:{promptfoo}:{environment['PATH']}",
            **LOOPBACK_ONLY,
            **{f"PROMPTFOO_DISABLE_{name}": "true" for name in off},
            "PROMPTFOO_REQUEST_BACKOFF_MS": "10",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 100, done.stderr  # as two of its tests fail
    results = json.loads((tmp_path / "out.json").read_text())["results"]["results"]
    seen = [result.get("error") or result["response"]["output"] for result in results]
    assert [seen[0], seen[2]] == [DEFAULT_TEXT, DEFAULT_TEXT]
    assert "double" in json.dumps(seen[1])
    assert "RateLimitExhaustedError" in seen[3]
    assert "Overloaded" in seen[4] or "overloaded" in seen[4]
    assert seen[5:] in ([], [{"size": 3}])
    assert any('"media_type": "image/png"' in call.text for call in api.calls_with(word))
