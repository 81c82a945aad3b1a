"""Children that fail: what the client sees, and that nothing is lost or left. On the fake CLI."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import itertools
import json
import os
import signal
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_CLAUDE, InProcessGateway, Snapshot, children_of, wait_until
from helpers import in_parallel

import cc2api


def order(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()


def queries(tmp_path: Path) -> list[str]:
    try:
        return [json.loads(line) for line in (tmp_path / "queries").read_text().splitlines()]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("death", ["die-at-start", "die-at-initialize"])
def test_a_process_that_dies_before_the_query_is_replaced_unseen(
    start_fake: Any, tmp_path: Path, death: str
) -> None:
    gateway = start_fake("--processes", "0")
    order(tmp_path, death)
    answer = gateway.ask("hello")
    assert answer.status == 200
    assert answer.json["content"] == [{"type": "text", "text": "from the fake"}]
    assert "nothing was sent upstream" in gateway.wait_for_log("gone at")
    assert len(queries(tmp_path)) == 1


def test_processes_that_always_die_are_a_503_with_their_last_words(
    start_fake: Any, tmp_path: Path
) -> None:
    gateway = start_fake("--processes", "0")
    order(tmp_path, "always-die")
    answer = gateway.ask("hello", stream=True)
    assert answer.status == 503
    assert answer.json["error"]["type"] == "api_error"
    assert "gone at the start" in answer.json["error"]["message"]
    (tmp_path / "always-die").unlink()
    assert gateway.ask("hello").status == 200, "it recovers by itself"


def test_a_cli_that_says_why_it_cannot_start_is_heard(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, "say-why-at-start", processes=1) as gateway:
        health = gateway.request("GET", "/healthz")
        while health.status == 200:
            health = gateway.request("GET", "/healthz")
        assert "Your account is on hold" in health.json["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_upstream_that_falls_silent_ends_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(cc2api, "UPSTREAM_SILENCE_S", 0.3)
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    with InProcessGateway(tmp_path) as gateway:
        answer = gateway.ask("stall-after-start", stream=stream)
        assert b'"type": "timeout_error"' in answer.body
        assert b"upstream sent nothing for" in answer.body
        if stream:
            assert b"event: ping\n" in answer.body
        else:
            assert (answer.status, answer.headers["x-should-retry"]) == (504, "false")
        assert gateway.ask("hello").status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_process_that_dies_after_the_query_is_not_asked_again(
    start_fake: Any, tmp_path: Path, stream: bool
) -> None:
    gateway = start_fake()
    answer = gateway.ask("die-before-answer", stream=stream)
    assert answer.status == 502
    assert answer.json["error"]["type"] == "api_error"
    assert "gone before the answer" in gateway.wait_for_log("gone before")
    assert len(queries(tmp_path)) == 1, "it may have been billed: the client decides"


def test_a_process_that_dies_in_mid_answer_is_an_error_event(start_fake: Any) -> None:
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


def test_odd_lines_lose_neither_the_answer_nor_a_place(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=2, max_concurrency=1) as gateway:
        for number in range(6):
            answer = gateway.ask(f"odd-lines {number}", stream=bool(number % 2))
            assert answer.status == 200
            assert b"from the fake" in answer.body
        wait_until(lambda: gateway.now.busy == [])
        cost = [value for _, value in gateway.gateway.metrics.series("cc2api_cost_usd_total")]
        assert all(value == 0 for value in cost)


def test_a_request_whose_process_died_is_served_before_those_that_came_later(
    tmp_path: Path,
) -> None:
    with (
        InProcessGateway(tmp_path, max_concurrency=1, max_queue=1) as gateway,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        first = threads.submit(gateway.ask, "first, until told")
        wait_until(lambda: len(gateway.now.busy) == 1)
        second = threads.submit(gateway.ask, "second")
        wait_until(lambda: gateway.now.waiting == 1)
        order(tmp_path, "die-at-query")
        order(tmp_path, "told")
        wait_until(lambda: not (tmp_path / "die-at-query").exists())
        order(tmp_path, "told")
        assert [first.result().status, second.result().status] == [200, 200]
    asked_first, asked_second = queries(tmp_path)
    assert "first" in asked_first
    assert "second" in asked_second


def connection_threads() -> set[str]:
    """Return the names of the threads of this process that serve a connection."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if "process_request_thread" in name}


ENDS = ["", "error-result", "die-before-answer", "die-mid-answer", "cut-short", "silent-end"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("end", [*ENDS, "stall"])
def test_nothing_of_a_large_request_is_kept_once_it_has_ended(
    tmp_path: Path, path: str, end: str
) -> None:
    """Not by an idle process, and not by a cycle that waits for the garbage collector."""

    def ask(size: int) -> None:
        text = "word " * (size // 5) + end
        message = {"role": "user", "content": text}
        body: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [message]}
        if path == "/v1/responses":
            body = {"model": "m", "input": text}
        connection = gateway.connect()
        connection.request("POST", path, json.dumps(body))
        if end == "stall":
            wait_until(lambda: gateway.now.busy != [])
        else:
            connection.getresponse().read()
        connection.close()
        wait_until(lambda: gateway.now.busy == gateway.now.ending == [])
        wait_until(lambda: connection_threads() <= before, "the end of the connection's thread")

    before = connection_threads()  # of other tests' gateways
    with InProcessGateway(tmp_path, processes=2) as gateway:
        ask(1_000)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            ask(1_000_000)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
        assert kept < 250_000


def state_of(pid: int) -> str:
    """Return a process's state, one letter (Linux)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_stopped_process_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with InProcessGateway(tmp_path, processes=3) as gateway:
        answers = in_parallel(gateway, ["a while 1", "a while 2"])
        assert [answer.status for answer in answers] == [200, 200]
        wait_until(lambda: len(gateway.now.idle) == 2)
        stopped = gateway.now.idle
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(state_of(pid) == "T" for pid in stopped))
        assert gateway.ask("hello").status == 200
        assert set(gateway.now.idle) - set(stopped), "by one that was not stopped"
        assert not set(gateway.now.busy) & set(stopped)
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert "was stopped" in caplog.text
    assert len(queries(tmp_path)) == 3


def test_a_process_that_falls_silent_before_its_call_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "CALL_TIMEOUT_S", 2.0)
    order(tmp_path, "stall-at-query")
    with InProcessGateway(tmp_path) as gateway:
        assert gateway.ask("hello").status == 200
    assert len(queries(tmp_path)) == 1


def test_a_process_that_calls_in_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has announced its call when it is given up, and nobody has read that yet."""
    with InProcessGateway(tmp_path) as gateway:
        late = cc2api.ProcessDied("claude did not call upstream")
        wait = cc2api.Process.wait

        def give_up_once(process: cc2api.Process, deadline: cc2api.Deadline) -> None:
            if queries(tmp_path) and not gave_up:
                gave_up.append(True)
                wait_until(process.has_lines)
                raise late
            wait(process, deadline)

        gave_up: list[bool] = []
        monkeypatch.setattr(cc2api.Process, "wait", give_up_once)
        assert gateway.ask("stall").status == 502
    assert len(queries(tmp_path)) == 1


def test_half_an_emoji_in_an_error_does_not_hide_it(start_fake: Any) -> None:
    answer = start_fake().ask("odd-error-result")
    assert (answer.status, answer.json["error"]["message"]) == (400, "no good \ud83d")


def test_a_process_that_did_not_announce_its_call_is_not_taken_for_held(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=2) as gateway:
        assert gateway.ask("cut-short, unannounced").json["stop_reason"] == "max_tokens"
        assert gateway.now.idle == []


def test_healthz_recovers_without_a_request_also_where_no_process_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.1)
    script, away = tmp_path / "claude", tmp_path / "away"
    script.write_bytes(FAKE_CLAUDE.read_bytes())
    script.chmod(0o755)
    with InProcessGateway(tmp_path, claude=str(script), processes=0) as gateway:
        script.rename(away)
        assert gateway.ask("hello").status == 503
        assert gateway.request("GET", "/healthz").status == 503
        away.rename(script)
        wait_until(lambda: gateway.request("GET", "/healthz").status == 200)


def test_garbage_is_not_taken_for_a_line_that_is_there() -> None:
    script = "echo garbage; echo '[1]'; echo '{}'; exec sleep 60"
    process = cc2api.Process(["sh", "-c", script], os.environ, "/")
    try:
        wait_until(process.has_lines)
        assert list(process.lines) == [{}]
    finally:
        process.kill()
        wait_until(lambda: not process.is_alive())
        process.close()


def test_a_turn_that_ends_without_an_answer_is_a_502(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.ask("silent-end").status == 502


def test_processes_killed_at_one_moment_are_all_skipped_and_replaced(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=4) as gateway:
        answers = in_parallel(gateway, ["a while"] * 3)
        assert [answer.status for answer in answers] == [200] * 3
        wait_until(lambda: len(gateway.now.idle) > 1 and len(gateway.now.spare) == 1)
        killed = gateway.now.idle + gateway.now.spare
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert gateway.ask("hello").status == 200
        wait_until(lambda: len(gateway.now.spare) == 1)
        assert not set(killed) & set(gateway.now.idle + gateway.now.spare)


def test_a_process_killed_between_its_choice_and_the_query_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring = cc2api.Session.prepare
    killed: list[int] = []

    def bring_and_kill(session: cc2api.Session, *args: Any) -> None:
        was_new = session.is_new
        bring(session, *args)
        if not (killed or was_new):
            killed.append(session.process.pid)
            session.process.kill()

    with InProcessGateway(tmp_path, processes=4) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        assert gateway.ask("one").status == 200
        wait_until(lambda: len(gateway.now.spare) == 1)
        monkeypatch.setattr(cc2api.Session, "prepare", bring_and_kill)
        assert gateway.ask("hello").status == 200
    assert killed


def test_processes_of_no_use_are_ended_at_once(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path) as gateway:
        assert gateway.ask("hello").status == 200
        wait_until(lambda: gateway.now == Snapshot([], [], [], [], [], 0))


def test_a_claimed_spare_is_replaced_and_its_process_is_kept(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        first = gateway.now.spare
        assert gateway.ask("hello").status == 200
        wait_until(lambda: len(gateway.now.spare) == 1)
        assert gateway.now.idle == first


def test_a_claude_that_ends_at_once_is_not_restarted_without_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[float] = []
    start = cc2api.Process.__init__

    def note(process: cc2api.Process, *args: Any) -> None:
        started.append(time.monotonic())
        start(process, *args)

    monkeypatch.setattr(cc2api.Process, "__init__", note)
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.5)
    with InProcessGateway(tmp_path, orders="always-leave", processes=2) as gateway:
        wait_until(lambda: len(started) == 3)
        assert gateway.request("GET", "/healthz").status == 503
    assert min(b - a for a, b in itertools.pairwise(started)) >= 0.5


def test_the_supervisor_goes_on_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter(["once"])

    reap = cc2api.Fleet.reap

    def fail_once(fleet: cc2api.Fleet) -> list[cc2api.Session]:
        if next(failures, None):
            raise RuntimeError("something unheard of")
        return reap(fleet)

    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        monkeypatch.setattr(cc2api.Fleet, "reap", fail_once)
        assert gateway.ask("hello").status == 200
        wait_until(lambda: "pool thread failed, continuing" in caplog.text)
        assert gateway.ask("hello").status == 200


def test_a_stop_ends_processes_and_removes_the_temporary_directory(start_fake: Any) -> None:
    gateway = start_fake()
    answers = in_parallel(gateway, ["a while"] * 3)
    assert [answer.status for answer in answers] == [200] * 3
    wait_until(lambda: len(gateway.children()) >= 3)
    children = gateway.children()
    work_dir = Path(os.readlink(f"/proc/{children[0]}/cwd"))
    assert [path.name for path in work_dir.rglob("*")] == [".claude", ".git"]
    before = set(work_dir.parent.iterdir())
    environment = Path(f"/proc/{children[0]}/environ").read_bytes().split(b"\0")
    (temp_dir,) = (each[7:].decode() for each in environment if each.startswith(b"TMPDIR="))
    assert Path(temp_dir) in before
    assert gateway.stop() == 0
    assert not Path(temp_dir).exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_argv_and_environment_of_a_process_hold_nothing_of_a_request(start_fake: Any) -> None:
    gateway = start_fake("--setting-sources", "user")
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


def test_a_process_that_fills_its_stderr_still_answers(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.ask("fill-stderr").status == 200


def test_a_line_without_measure_ends_the_process(start_fake: Any) -> None:
    gateway = start_fake()
    answer = gateway.ask("long-line")
    assert answer.status == 502
    assert gateway.ask("hello").status == 200


def test_a_process_that_ignores_eof_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "EXIT_GRACE_S", 0.2)
    with InProcessGateway(tmp_path, orders="ignore-eof") as gateway:
        assert gateway.ask("hello").status == 200
        wait_until(lambda: len(gateway.now.ending) == 1)
        wait_until(lambda: not gateway.now.ending)


def test_a_cli_that_cannot_start_keeps_the_server_up(start_fake: Any, tmp_path: Path) -> None:
    script = tmp_path / "claude"
    fake = Path(__file__).parent / "fake_claude.py"
    script.write_text(fake.read_text())
    script.chmod(0o755)
    gateway = start_fake("--claude", str(script), "--processes", "0")
    script.rename(tmp_path / "away")
    answer = gateway.ask("hello")
    assert answer.status == 503
    assert "cannot be started" in answer.json["error"]["message"]
    (tmp_path / "away").rename(script)
    assert gateway.ask("hello").status == 200


def test_processes_grow_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.1)
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        (first,) = gateway.now.spare
        monkeypatch.setattr(cc2api, "MAX_SESSION_AGE_S", 0.2)
        wait_until(lambda: not Path(f"/proc/{first}").exists())
        monkeypatch.undo()
        assert gateway.ask("hello").status == 200


def test_what_a_wrapper_around_the_cli_has_started_is_killed_too(
    start_fake: Any, tmp_path: Path
) -> None:
    wrapper = tmp_path / "claude"
    fake = Path(__file__).parent / "fake_claude.py"
    wrapper.write_text(f'#!/bin/sh\n{fake} "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    gateway = start_fake("--claude", str(wrapper))
    wait_until(lambda: len(gateway.children()) == 1)
    (shell,) = gateway.children()
    wait_until(lambda: len(children_of(shell)) == 1)
    (real,) = children_of(shell)
    assert gateway.stop() == 0
    wait_until(lambda: not Path(f"/proc/{real}").exists())


def test_the_pool_survives_whatever_starting_a_process_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InProcessGateway(tmp_path) as gateway:

        def fail(*args: Any) -> None:
            raise MemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(cc2api.Process, "__init__", fail)
            assert gateway.ask("hello").status == 503
        assert gateway.ask("hello").status == 200


def test_a_spare_that_no_thread_can_prime_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "cc2api-warmup":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    start_thread = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: bool(gateway.gateway.pool.failure))
        wait_until(lambda: not (gateway.now.starting or gateway.now.ending))
        assert gateway.ask("hi").status == 200


def test_tools_that_the_cli_does_not_take_are_not_counted_again_and_again(tmp_path: Path) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]  # this CLI tells of none
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    with InProcessGateway(tmp_path, timeout=15) as gateway:
        answer = gateway.request("POST", "/v1/messages/count_tokens", body)
    assert answer.status == 502, "not 504, when time is over"
    assert "did not take the tools" in answer.json["error"]["message"]
