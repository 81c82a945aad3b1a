"""Fixtures: one scripted API and one gateway for each kind of sign-in, shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, FAKE_CLAUDE, LOGIN, Client, RunningGateway, real_claude, wait_until
from scripted_api import ScriptedApi

import cc2api


@pytest.fixture(scope="session")
def claude() -> str:
    """The real CLI; where it is missing the tests fail, they do not skip."""
    path = real_claude()
    assert Path(path).is_file(), f"the end-to-end tests need the real CLI, not found at {path}"
    return path


@pytest.fixture(scope="session")
def quick_claude(claude: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real CLI, whose answers on how it is signed in are known: each takes 0.15 s."""
    script = tmp_path_factory.mktemp("quick") / "claude"
    key = '{"loggedIn": true, "authMethod": "api_key", "apiKeySource": "ANTHROPIC_API_KEY"}'
    token = '{"loggedIn": true, "authMethod": "oauth_token"}'
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = auth ] || exec {claude} "$@"\n'
        f"if [ -n \"$ANTHROPIC_API_KEY\" ]; then echo '{key}'\n"
        f"elif [ -n \"$CLAUDE_CODE_OAUTH_TOKEN\" ]; then echo '{token}'\n"
        'else echo \'{"loggedIn": false, "authMethod": "none"}\'; fi\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="session")
def api() -> Iterator[ScriptedApi]:
    """The scripted upstream."""
    with ScriptedApi() as running:
        running.thinking_s = 0.05
        yield running


@pytest.fixture(scope="session")
def gateway(api: ScriptedApi, quick_claude: str) -> Iterator[RunningGateway]:
    """A gateway on the real CLI, signed in with an API key."""
    with RunningGateway(claude=quick_claude, base_url=api.url, env=API_KEY) as running:
        yield running


@pytest.fixture(scope="session")
def lone_gateway(api: ScriptedApi, quick_claude: str) -> Iterator[RunningGateway]:
    """A gateway that keeps no process: any that is there is answering."""
    with RunningGateway(
        "--processes", "0", claude=quick_claude, base_url=api.url, env=API_KEY
    ) as running:
        yield running


@pytest.fixture(scope="session")
def login_gateway(api: ScriptedApi, quick_claude: str) -> Iterator[RunningGateway]:
    """A gateway on the real CLI, signed in with a claude.ai token."""
    with RunningGateway(claude=quick_claude, base_url=api.url, env=LOGIN) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick_farewells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the fake CLI, which cannot be interrupted while it sleeps, less time to end its turn."""
    monkeypatch.setattr(cc2api, "INTERRUPT_TIMEOUT_S", 0.2)


@pytest.fixture(autouse=True)
def _one_call_for_one_request(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail any test in which more calls reached the scripted API than gateways had requests."""
    if "api" not in request.fixturenames or request.node.get_closest_marker("uncounted"):
        yield
        return

    api: ScriptedApi = request.getfixturevalue("api")

    def calls_too_many() -> int:
        return len(api.calls) - sum(gateway.answered() for gateway in Client.started)

    before = calls_too_many()
    yield
    wait_until(lambda: calls_too_many() <= before, "one call upstream for one request")


Starter = Callable[..., RunningGateway]


@pytest.fixture
def start(api: ScriptedApi, quick_claude: str) -> Iterator[Starter]:
    """Start further gateways on the real CLI; they are stopped after the test."""
    with ExitStack() as stack:

        def start_one(*args: str, **more: Any) -> RunningGateway:
            # A spare beside a used process would take half a second of a processor each time.
            frugal = () if "--processes" in args else ("--processes", "1")
            given = {"claude": quick_claude, "base_url": api.url, **more}
            return stack.enter_context(RunningGateway(*args, *frugal, **given))

        yield start_one


@pytest.fixture
def start_fake(tmp_path: Path) -> Iterator[Starter]:
    """Start gateways on the fake CLI, which takes orders from files in `tmp_path`."""
    with ExitStack() as stack:

        def start_one(*args: str, **more: Any) -> RunningGateway:
            env = {**API_KEY, "FAKE_CLAUDE_ORDERS": str(tmp_path), **more.pop("env", {})}
            running = RunningGateway(*args, claude=str(FAKE_CLAUDE), env=env, **more)
            return stack.enter_context(running)

        yield start_one
