"""Finding the CLI and checking it, and the environment it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_CLAUDE, GATEWAY, clean_environment

import cc2api


def run_gateway(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a gateway that is expected to end by itself."""
    environment = {**clean_environment(tmp_path), "PATH": "/usr/bin:/bin", **env}
    return subprocess.run(
        [sys.executable, str(GATEWAY), "--port", "0", *args],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_an_old_cli_is_refused_with_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    done = run_gateway(tmp_path, "--claude", str(FAKE_CLAUDE), FAKE_CLAUDE_VERSION="2.1.299 (x)")
    line = one_line(done)
    for words in ("2.1.299", "2.1.300 or newer", "claude update", str(FAKE_CLAUDE)):
        assert words in line


def test_a_named_cli_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert "/no/such/claude" in one_line(run_gateway(tmp_path, CC2API_CLAUDE="/no/such/claude"))


def test_a_cli_that_prints_no_version_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text("#!/bin/sh\necho no claude\n")
    script.chmod(0o755)
    assert "--version printed 'no claude'" in one_line(
        run_gateway(tmp_path, "--claude", str(script))
    )


@pytest.fixture
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def install(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(FAKE_CLAUDE)
    return path


def test_the_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sdk: None) -> None:
    chosen = install(tmp_path / "chosen" / "any-name")
    on_path = install(tmp_path / "bin" / "claude")
    local_bin = install(tmp_path / ".local" / "bin" / "claude")
    local = install(tmp_path / ".claude" / "local" / "claude")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/local/bin:/usr/bin:/bin")
    environ = dict(os.environ)

    def found(choice: str | None = None) -> str:
        return cc2api.find_cli(choice, environ).path

    assert found(str(chosen)) == str(chosen)
    assert found() == str(on_path)
    on_path.unlink()
    assert found() == str(local_bin)
    local_bin.unlink()
    assert found() == str(local)
    local.unlink()
    with pytest.raises(cc2api.CliUnusable, match="no executable claude on PATH, nor at"):
        found()


def test_the_cli_inside_the_agent_sdk_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claude: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cli = cc2api.find_cli(None, {**clean_environment(tmp_path)})
    assert cli.path.endswith("claude_agent_sdk/_bundled/claude")
    assert tuple(map(int, cli.version.split("."))) >= cc2api.MIN_CLI_VERSION


BARE = [
    (None, {}, False),
    (None, {"ANTHROPIC_API_KEY": "k"}, True),
    (None, {"ANTHROPIC_API_KEY": ""}, False),
    (None, {"ANTHROPIC_AUTH_TOKEN": "t"}, True),
    (None, {"CLAUDE_CODE_USE_BEDROCK": "1"}, True),
    (None, {"CLAUDE_CODE_USE_VERTEX": "true"}, True),
    (None, {"CLAUDE_CODE_USE_FOUNDRY": "0"}, False),
    (None, {"CLAUDE_CODE_OAUTH_TOKEN": "t"}, False),
    (True, {}, True),
    (False, {"ANTHROPIC_API_KEY": "k"}, False),
]


@pytest.mark.parametrize(("choice", "environ", "bare"), BARE)
def test_bare_is_for_keys_and_providers(
    choice: bool | None, environ: dict[str, str], bare: bool
) -> None:
    assert cc2api.uses_bare(choice, environ) is bare


def test_a_process_inherits_the_environment_less_the_clis_own_switches() -> None:
    handed_down = {
        "PATH": "/bin",
        "HTTPS_PROXY": "p",
        "ANTHROPIC_API_KEY": "k",
        "CLAUDE_CODE_OAUTH_TOKEN": "t",
        "CLAUDE_CONFIG_DIR": "/c",
        "CLAUDE_CODE_USE_BEDROCK": "1",
        "CLAUDE_CODE_SKIP_BEDROCK_AUTH": "1",
        "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE": "x",
    }
    dropped = {"CLAUDECODE": "1", "MAX_THINKING_TOKENS": "9", "CLAUDE_NEXT_YEAR": "1"}
    cli = cc2api.Cli("claude", "2.1.300")
    environ = {**handed_down, **dropped}
    _, given = cc2api.command_and_environment(cli, cc2api.Settings(), environ, "/tmp/x")
    assert given == {
        **handed_down,
        "TMPDIR": "/tmp/x",
        "XDG_CACHE_HOME": "/dev/null",
        **cc2api.PINNED_VARIABLES,
        "SHELL": "/bin/sh",
    }


def test_models_are_resolved_by_the_clis_own_list() -> None:
    models = [
        {"value": "default", "resolvedModel": "claude-opus-5-5"},
        {"value": "sonnet", "resolvedModel": "claude-sonnet-5-5"},
        {"value": "opus[1m]", "resolvedModel": "claude-opus-5-5[1m]"},
    ]
    names = ["claude-code", "sonnet", "opus[1m]", "claude-x", "claude-x[1m]"]
    resolved = [cc2api.resolve_model(name, models) for name in names]
    assert resolved == [
        *("claude-opus-5-5", "claude-sonnet-5-5", "claude-opus-5-5[1m]"),
        *("claude-x", "claude-x[1m]"),
    ]


STARTS: list[tuple[list[str], dict[str, str], int, str]] = [
    (["--port", "70000"], {}, 2, "--port: '70000' does not fit: a number from 0 to 65535"),
    (["--processes", "-1"], {}, 2, "--processes: '-1' does not fit: a number from 0"),
    (["--timeout", "inf"], {}, 2, "--timeout: 'inf' does not fit: a number"),
    (["--nope"], {}, 2, "unrecognized arguments"),
    ([], {"CC2API_PROCESSES": "many"}, 2, "CC2API_PROCESSES: 'many' does not fit: a number"),
    ([], {"CC2API_NOPE": "1"}, 2, "CC2API_NOPE: there is no such option"),
    (
        ["--host", "203.0.113.7"],
        {},
        1,
        "it holds no key, and --host is not loopback; see --keys and --allow-open",
    ),
    (
        ["--host", "203.0.113.7", "--allow-open", "--claude", str(FAKE_CLAUDE)],
        {},
        1,
        "cannot listen on",
    ),
]


@pytest.mark.parametrize(("args", "env", "status", "words"), STARTS)
def test_a_wrong_start_ends_with_a_message_and_a_status(
    tmp_path: Path, args: list[str], env: dict[str, str], status: int, words: str
) -> None:
    done = run_gateway(tmp_path, *args, **env)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_flags_beat_variables_beat_defaults() -> None:
    environ = {"CC2API_PORT": "9001", "CC2API_DEBUG": "1", "CC2API_BARE": "0"}
    settings = cc2api.parse_args(["--processes", "3"], environ)
    assert settings == cc2api.Settings(port=9001, debug=True, bare=False, processes=3)
    assert cc2api.parse_args(["--port", "1", "--bare"], environ).port == 1
    assert cc2api.parse_args([], {}) == cc2api.Settings()
    assert cc2api.parse_args([], {"CC2API_BARE": "", "CC2API_PORT": ""}) == cc2api.Settings()
    origins = {"CC2API_CORS_ORIGIN": "https://a, https://b"}
    assert cc2api.parse_args([], origins).cors_origin == ("https://a", "https://b")
    assert cc2api.parse_args(["--cors-origin", "https://c"], origins).cors_origin == ("https://c",)


def test_a_port_in_use_is_one_line(tmp_path: Path, start_fake: Any) -> None:
    first = start_fake("--processes", "0")
    done = run_gateway(tmp_path, "--claude", str(FAKE_CLAUDE), "--port", str(first.port))
    assert "cannot listen on 127.0.0.1 port" in one_line(done)
