"""What a newcomer stumbles over: who pays, wrong settings, a second start, no account at all."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, FAKE_CLAUDE, GATEWAY, LOGIN, RunningGateway, clean_environment
from helpers import free_port
from scripted_api import ScriptedApi

import cc2api

BEDROCK = {"CLAUDE_CODE_USE_BEDROCK": "1"}
TOKEN = {"ANTHROPIC_AUTH_TOKEN": "dummy"}
STORED = {"accessToken": "dummy", "refreshToken": "dummy", "expiresAt": 4102444800000}
WINS = "; WINS OVER the claude.ai login that is there too"


def start_and_fail(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GATEWAY), "--claude", str(FAKE_CLAUDE), *args]
    environ = {**clean_environment(tmp_path), **env}
    return subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )


# ---- who pays


def sign_in(
    claude: str, home: Path, env: dict[str, str], *, login: bool, bare: bool = False
) -> str:
    """Return what the real CLI says of these credentials, and of a login of no account's."""
    environ = clean_environment(home, **env)
    if login:
        config = Path(environ["CLAUDE_CONFIG_DIR"])
        config.mkdir()
        stored = {**STORED, "scopes": ["user:inference"], "subscriptionType": "max"}
        (config / ".credentials.json").write_text(json.dumps({"claudeAiOauth": stored}))
    return cc2api.describe_sign_in(cc2api.Cli(claude, "2.1.331"), environ, bare=bare)


@pytest.mark.parametrize(
    ("env", "login", "text"),
    [
        ({}, True, "claude.ai login (max): draws on the plan's limits"),
        (API_KEY, False, "API key from ANTHROPIC_API_KEY: billed to the API"),
        (API_KEY, True, f"API key from ANTHROPIC_API_KEY: billed to the API{WINS}"),
        (TOKEN, False, "token from ANTHROPIC_AUTH_TOKEN: billed by whoever issued it"),
        (LOGIN, False, "token of `claude setup-token`: draws on the plan's limits"),
        (BEDROCK, False, "bedrock: billed by the cloud provider"),
    ],
)
def test_the_credential_is_named_and_who_pays(
    claude: str, tmp_path: Path, env: dict[str, str], login: bool, text: str
) -> None:
    assert sign_in(claude, tmp_path, env, login=login) == text


def test_a_login_that_bare_would_not_read_is_none(claude: str, tmp_path: Path) -> None:
    found = sign_in(claude, tmp_path, {}, login=True, bare=True)
    assert found.startswith(cc2api.NOT_SIGNED_IN)
    assert "--bare" in found


@pytest.mark.parametrize("env", [API_KEY, LOGIN, {}], ids=["key", "login", "none"])
def test_the_stand_in_for_the_sign_in_says_what_the_cli_says(
    claude: str, quick_claude: str, tmp_path: Path, env: dict[str, str]
) -> None:
    """Most tests start gateways with `quick_claude`: it must not drift from the real one."""
    environ = clean_environment(tmp_path, **env)
    described = [
        cc2api.describe_sign_in(cc2api.Cli(path, ""), environ, bare=env == API_KEY)
        for path in (claude, quick_claude)
    ]
    assert described[1].replace(quick_claude, claude) == described[0]


def test_without_a_sign_in_one_command_and_the_demo_are_named(start: Any, claude: str) -> None:
    gateway: RunningGateway = start(env={}, claude=claude)
    line = gateway.banner.partition("sign-in  ")[2].splitlines()[0]
    assert re.fullmatch("NOT SIGNED IN: run `/.* auth login`, or try `cc2api --demo` .*", line)
    status = gateway.request("GET", "/").body.decode()
    assert f"health        {line}\n" in status
    assert "cc2api_signed_in 0\n" in gateway.request("GET", "/metrics").body.decode()
    answer = gateway.ask("hello")
    assert answer.status == 401
    assert "`claude auth login`" in answer.json["error"]["message"]


def test_the_upstream_is_named_where_it_is_not_the_clis_own(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    assert f"  upstream {api.url}\n" in gateway.banner
    status = gateway.request("GET", "/").body.decode()
    assert f"upstream      {api.url}\n" in status
    assert "sign-in       API key from ANTHROPIC_API_KEY: billed to the API\n" in status
    assert "cc2api_signed_in 1\n" in gateway.request("GET", "/metrics").body.decode()


def test_an_address_is_named_without_its_password() -> None:
    environ = {"ANTHROPIC_BASE_URL": "http://user:secret@127.0.0.1:9/v1"}
    assert cc2api.upstream_url(environ) == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("said", ["", "[]", '{"loggedIn": true, "authMethod": ["x"]}', "nonsense"])
def test_an_answer_that_says_nothing_is_unknown(tmp_path: Path, said: str) -> None:
    program = tmp_path / "claude"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    cli = cc2api.Cli(str(program), "2.1.331")
    assert cc2api.describe_sign_in(cli, {"PATH": "/bin"}, bare=False) == cc2api.UNKNOWN_SIGN_IN


# ---- one line each


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]"])
@pytest.mark.parametrize("more", [[], ["--check"]])
def test_a_gateway_that_would_call_itself_does_not_start(
    tmp_path: Path, name: str, more: list[str]
) -> None:
    port = free_port()
    url = f"http://{name}:{port}"
    done = start_and_fail(tmp_path, "--port", str(port), *more, ANTHROPIC_BASE_URL=url)
    assert done.returncode == 1
    assert f"ANTHROPIC_BASE_URL={url} is this gateway, which would call itself" in (
        done.stdout if more else done.stderr
    )


def test_no_password_of_an_upstream_is_told() -> None:
    port = free_port()
    environ = {"ANTHROPIC_BASE_URL": f"http://me:secret@127.0.0.1:{port}"}
    with pytest.raises(cc2api.CliUnusable, match="is this gateway") as caught:
        cc2api.check_upstream(environ, port)
    assert "secret" not in str(caught.value)


def test_another_upstream_on_this_machine_is_none_of_our_business() -> None:
    assert cc2api.check_upstream({}, 80) == "the CLI's own choice"
    for url in (
        "http://127.0.0.1:4000",
        "127.0.0.1:8080",
        "https://localhost",
        "http://no.such.host.invalid:8080",
    ):
        assert cc2api.check_upstream({"ANTHROPIC_BASE_URL": url}, 8080) == url


def test_a_second_instance_is_told_of_the_first(tmp_path: Path, start_fake: Any) -> None:
    port = str(start_fake().port)
    done = start_and_fail(tmp_path, "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"cc2api: cannot listen on 127.0.0.1 port {port}: a cc2api runs there already;"
        " choose another with --port or --host\n"
    )
    checked = start_and_fail(tmp_path, "--port", port, "--check")
    assert f"port     ok    a cc2api runs on 127.0.0.1 port {port} already\n" in checked.stdout


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        ([], {"CC2API_PORT": "abc"}, "CC2API_PORT: "),
        ([], {"CC2API_PORT": "70000"}, "CC2API_PORT: '70000' "),
        ([], {"CC2API_DEBUG": "maybe"}, "CC2API_DEBUG: 'maybe' "),
        ([], {"CC2API_CORS_ORIGIN": "https://a.b, c.d"}, "CC2API_CORS_ORIGIN: 'https://a.b, c.d' "),
        (["--cors-origin", "example.com"], {}, "--cors-origin: ['example.com'] "),
        (["--cors-origin", "https://a.b/path"], {}, "--cors-origin: ['https://a.b/path'] "),
        (["--port", "x"], {"CC2API_PORT": "8080"}, "--port: "),
    ],
)
def test_a_wrong_value_is_blamed_on_where_it_stands(
    tmp_path: Path, args: list[str], env: dict[str, str], words: str
) -> None:
    done = start_and_fail(tmp_path, *args, **env)
    assert done.returncode == 2
    assert done.stderr.startswith(f"cc2api: error: {words}")
    assert done.stderr.count("\n") == 1


def test_an_origin_may_end_with_a_slash(start_fake: Any) -> None:
    gateway = start_fake("--cors-origin", "https://app.example/")
    allowed = gateway.request("GET", "/v1/models", headers={"origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = gateway.request("GET", "/v1/models", headers={"origin": "https://other.example"})
    assert refused.status == 403
    assert "https://other.example" in refused.json["error"]["message"]


def test_an_old_python_is_told_in_one_line() -> None:
    ast.parse(GATEWAY.read_text(), feature_version=(3, 8))  # else it would say SyntaxError
    code = f"import sys; sys.version_info = (3, 9); exec(open({str(GATEWAY)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cc2api needs Python 3.10 or newer")
    assert done.stderr.count("\n") == 1


def test_what_a_flag_switches_off_no_variable_switches_on() -> None:
    environ = {"CC2API_BARE": "1", "CC2API_SETTING_SOURCES": "user"}
    settings = cc2api.parse_args(["--no-bare", "--setting-sources", ""], environ)
    assert (settings.bare, settings.setting_sources) == (False, "")


# ---- no account


def test_the_demo_answers_without_an_account(claude: str) -> None:
    with RunningGateway("--demo", claude=claude, env={"ANTHROPIC_API_KEY": "sk-of-the-user"}) as it:
        assert "DEMO" in it.banner
        assert "DEMO" in it.request("GET", "/").body.decode(), "as the page shows"
        first, second = it.ask("Hello!"), it.ask("And now?", stream=True)
        assert first.json["content"][0]["text"] == "DEMO: no model was asked. You said: Hello!"
        assert first.json["stop_reason"] == "end_turn"
        deltas = [e["delta"]["text"] for e in second.events if e["type"] == "content_block_delta"]
        assert "".join(deltas).endswith("You said: And now?")
        assert len(deltas) > 5, "word by word"
        body = {"model": "sonnet", "messages": [{"role": "user", "content": "Hello!"}]}
        assert it.request("POST", "/v1/messages/count_tokens", body).json["input_tokens"] > 0
        for pid in it.children():
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"sk-of-the-user" not in environ
            assert b"ANTHROPIC_BASE_URL=http://127.0.0.1:" in environ
