"""Children that fail: what the client sees, and that nothing is lost or left. On the fake CLI."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from running import InProcessGateway, children_of, wait_until

import cc2api


def order(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()


def queries(tmp_path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in (tmp_path / "queries").read_text().splitlines()]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("death", ["die-at-start", "die-at-initialize"])
def test_a_child_that_dies_before_the_query_is_replaced_unseen(
    start_fake: Any, tmp_path: Path, death: str
) -> None:
    gateway = start_fake("--spares", "0")
    order(tmp_path, death)
    answer = gateway.ask("hello")
    assert answer.status == 200
    assert answer.json["content"] == [{"type": "text", "text": "from the fake"}]
    assert "nothing was sent upstream" in gateway.wait_for_log("gone at")
    assert len(queries(tmp_path)) == 1


def test_children_that_always_die_are_a_503_with_their_last_words(
    start_fake: Any, tmp_path: Path
) -> None:
    gateway = start_fake("--spares", "0")
    order(tmp_path, "always-die")
    answer = gateway.ask("hello", stream=True)
    assert answer.status == 503
    assert answer.json["error"]["type"] == "api_error"
    assert "gone at the start" in answer.json["error"]["message"]
    (tmp_path / "always-die").unlink()
    assert gateway.ask("hello").status == 200, "it recovers by itself"


@pytest.mark.parametrize("stream", [True, False])
def test_a_child_that_dies_after_the_query_is_not_asked_again(
    start_fake: Any, tmp_path: Path, stream: bool
) -> None:
    gateway = start_fake()
    answer = gateway.ask("die-before-answer", stream=stream)
    assert answer.status == 502
    assert answer.json["error"]["type"] == "api_error"
    assert "gone before the answer" in gateway.wait_for_log("gone before")
    assert len(queries(tmp_path)) == 1, "it may have been billed: the client decides"


def test_a_child_that_dies_in_mid_answer_is_an_error_event(start_fake: Any) -> None:
    gateway = start_fake()
    streamed = gateway.ask("die-mid-answer", stream=True)
    assert streamed.status == 200
    assert [e["type"] for e in streamed.events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "error",
    ]
    assert streamed.events[-1]["error"]["type"] == "api_error"
    whole = gateway.ask("die-mid-answer")
    assert (whole.status, whole.json["error"]["type"]) == (502, "api_error")


def test_garbage_on_stdout_is_skipped(start_fake: Any) -> None:
    gateway = start_fake()
    answer = gateway.ask("garbage")
    assert answer.json["content"][0]["text"] == "from the fake"
    gateway.wait_for_log("not JSON")


def test_a_turn_that_ends_without_an_answer_is_a_502(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.ask("silent-end").status == 502


def test_a_killed_spare_is_skipped_and_replaced(start_fake: Any) -> None:
    gateway = start_fake("--spares", "2", "--live", "0")
    wait_until(lambda: len(gateway.children()) == 2)
    killed = gateway.children()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert gateway.ask("hello").status == 200
    wait_until(lambda: len(set(gateway.children()) - set(killed)) == 2)


def test_a_claimed_spare_is_replaced_and_each_process_serves_one_request(start_fake: Any) -> None:
    gateway = start_fake("--live", "0")
    wait_until(lambda: len(gateway.children()) == 1)
    first = gateway.children()
    assert gateway.ask("hello").status == 200
    wait_until(lambda: len(gateway.children()) == 1 and gateway.children() != first)


def test_spares_are_renewed_when_the_executable_changes(start_fake: Any, tmp_path: Path) -> None:
    script = tmp_path / "claude"
    fake = Path(__file__).parent / "fake_claude.py"
    script.write_text(fake.read_text())
    script.chmod(0o755)
    gateway = start_fake("--claude", str(script), "--live", "0")
    wait_until(lambda: len(gateway.children()) == 1)
    first = gateway.children()
    script.write_text(fake.read_text() + "# a new version\n")
    assert gateway.ask("hello").status == 200
    wait_until(lambda: len(gateway.children()) == 1)
    assert gateway.children() != first


def test_a_stop_ends_children_and_removes_the_temporary_directory(start_fake: Any) -> None:
    gateway = start_fake("--spares", "3")
    wait_until(lambda: len(gateway.children()) == 3)
    children = gateway.children()
    work_dir = Path(os.readlink(f"/proc/{children[0]}/cwd"))
    assert [path.name for path in work_dir.rglob("*")] == [".claude", ".git"]
    assert gateway.stop() == 0
    assert not work_dir.parent.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_argv_and_environment_of_a_child_hold_nothing_of_a_request(start_fake: Any) -> None:
    gateway = start_fake("--spares", "1", "--setting-sources", "user")
    wait_until(lambda: len(gateway.children()) == 1)
    (pid,) = gateway.children()
    wait_until(lambda: b"fake_claude" in Path(f"/proc/{pid}/cmdline").read_bytes())
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    environment = dict(
        pair.split(b"=", 1)
        for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if pair
    )
    assert b"--bare" in argv
    assert argv[argv.index(b"--setting-sources") + 1] == b"user"
    assert argv[argv.index(b"--tools") + 1] == b""
    assert argv[argv.index(b"--system-prompt") + 1] == b"You are a helpful assistant."
    assert b"--disable-slash-commands" in argv
    settings = json.loads(argv[argv.index(b"--settings") + 1])
    assert (settings["hooks"], settings["mcpServers"]) == ({}, {})
    assert environment[b"CLAUDE_CODE_DISABLE_AUTO_MEMORY"] == b"1"
    assert environment[b"ENABLE_CLAUDEAI_MCP_SERVERS"] == b"false"
    assert environment[b"ANTHROPIC_API_KEY"] == b"sk-ant-dummy", "the user's own sign-in"


def test_a_child_that_fills_its_stderr_still_answers(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.ask("fill-stderr").status == 200


def test_a_line_without_measure_ends_the_child(start_fake: Any) -> None:
    gateway = start_fake()
    answer = gateway.ask("long-line")
    assert answer.status == 502
    assert gateway.ask("hello").status == 200


def test_a_child_that_ignores_eof_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "EXIT_GRACE_S", 0.2)
    with InProcessGateway(tmp_path, orders="ignore-eof") as gateway:
        assert gateway.ask("hello").status == 200
        wait_until(lambda: gateway.gateway.pool.counts()["ending"] == 0)


def test_a_cli_that_cannot_start_keeps_the_server_up(start_fake: Any, tmp_path: Path) -> None:
    script = tmp_path / "claude"
    fake = Path(__file__).parent / "fake_claude.py"
    script.write_text(fake.read_text())
    script.chmod(0o755)
    gateway = start_fake("--claude", str(script), "--spares", "0")
    script.rename(tmp_path / "away")
    answer = gateway.ask("hello")
    assert answer.status == 503
    assert "cannot be started" in answer.json["error"]["message"]
    (tmp_path / "away").rename(script)
    assert gateway.ask("hello").status == 200


def test_spares_grow_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InProcessGateway(tmp_path, spares=1) as gateway:
        pool = gateway.gateway.pool
        wait_until(lambda: pool.counts()["idle"] == 1)
        (first,) = pool._idle
        monkeypatch.setattr(cc2api, "SPARE_MAX_AGE_S", 0.0)
        assert gateway.ask("hello").status == 200
        monkeypatch.undo()
        assert first not in pool._idle
        wait_until(lambda: not Path(f"/proc/{first.pid}").exists())


def test_what_a_wrapper_around_the_cli_has_started_is_killed_too(
    start_fake: Any, tmp_path: Path
) -> None:
    wrapper = tmp_path / "claude"
    fake = Path(__file__).parent / "fake_claude.py"
    wrapper.write_text(f'#!/bin/sh\n{fake} "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    gateway = start_fake("--claude", str(wrapper), "--spares", "1")
    wait_until(lambda: len(gateway.children()) == 1)
    (shell,) = gateway.children()
    wait_until(lambda: len(children_of(shell)) == 1)
    (real,) = children_of(shell)
    assert gateway.stop() == 0
    wait_until(lambda: not Path(f"/proc/{real}").exists())


def test_the_pool_survives_whatever_starting_a_child_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InProcessGateway(tmp_path) as gateway:
        start = gateway.gateway.pool._start

        def fail() -> cc2api.Child:
            raise MemoryError("no more")

        monkeypatch.setattr(gateway.gateway.pool, "_start", fail)
        assert gateway.ask("hello").status == 503
        monkeypatch.setattr(gateway.gateway.pool, "_start", start)
        assert gateway.ask("hello").status == 200
