"""Clients that leave, many at once, silence, and the end of the gateway."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Client, InProcessGateway, RunningGateway, Snapshot, is_running, wait_until
from helpers import in_parallel, marker
from scripted_api import DEFAULT_TEXT, Reply, ScriptedApi, text_reply

import cc2api

NOTICED_S = 2.0  # a second, and as much again for a busy machine


def send_request(gateway: Client, text: str, *, stream: bool) -> socket.socket:
    """Send a request on a raw socket and return the socket, nothing read."""
    body = {"model": "claude-sonnet-4-6", "max_tokens": 9, "stream": stream}
    data = json.dumps({**body, "messages": [{"role": "user", "content": text}]}).encode()
    sock = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


# ---- clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 3])
def test_a_client_that_leaves_stops_its_process_and_the_upstream_call(
    gateway: RunningGateway, api: ScriptedApi, after: int, stream: bool
) -> None:
    word = marker()
    reply = text_reply("a b c", gate=threading.Event(), gate_after=after)
    api.on(word, reply)
    sock = send_request(gateway, word, stream=stream)
    assert api.wait_for(lambda: bool(api.calls_with(word)))
    if after and stream:
        assert sock.recv(1)
    sock.close()
    assert reply.left.wait(NOTICED_S), "the upstream call goes on for nobody"
    line = gateway.wait_for_log("status=499")
    assert "error" not in line


def test_a_half_closed_client_counts_as_gone(tmp_path: Path) -> None:
    with (
        InProcessGateway(tmp_path) as gateway,
        send_request(gateway, "stall", stream=False) as sock,
    ):
        wait_until(lambda: len(gateway.now.busy) == 1)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: gateway.now.busy == [])
        assert sock.recv(1) == b""


def test_a_client_that_leaves_between_two_deltas_is_noticed(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path) as gateway:
        sock = send_request(gateway, "flood", stream=False)
        wait_until(lambda: len(gateway.now.busy) == 1)
        sock.close()
        wait_until(lambda: gateway.now == Snapshot([], [], [], [], [], 0))


# ---- load


def test_parallel_requests_at_concurrency_4_all_succeed(start: Any, api: ScriptedApi) -> None:
    gateway = start("--max-concurrency", "4")
    words = [marker() for _ in range(8)]
    answers = in_parallel(gateway, words)
    assert [a.status for a in answers] == [200] * 8
    assert all(len(api.calls_with(word)) == 1 for word in words)


def test_40_parallel_requests_at_concurrency_4_all_succeed(start_fake: Any) -> None:
    gateway = start_fake("--max-concurrency", "4")
    answers = in_parallel(gateway, [marker() for _ in range(40)])
    assert [a.status for a in answers] == [200] * 40


def test_no_more_than_max_concurrency_are_answered_at_once(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, max_concurrency=3) as gateway:
        socks = [send_request(gateway, "stall", stream=False) for _ in range(5)]
        wait_until(lambda: (len(gateway.now.busy), gateway.now.waiting) == (3, 2))
        for sock in socks:
            sock.close()
        wait_until(lambda: (len(gateway.now.busy), gateway.now.waiting) == (0, 0))


def test_beyond_the_queue_it_is_529_and_the_queue_is_in_order(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, max_concurrency=1, max_queue=2) as gateway:
        first = send_request(gateway, "stall", stream=False)
        wait_until(lambda: len(gateway.now.busy) == 1)
        second = send_request(gateway, "second", stream=False)
        wait_until(lambda: gateway.now.waiting == 1)
        third = send_request(gateway, "third", stream=False)
        wait_until(lambda: gateway.now.waiting == 2)
        refused = gateway.ask("fourth")
        assert refused.status == 529
        assert refused.json["error"]["type"] == "overloaded_error"
        assert int(refused.headers["retry-after"]) > 0
        wait_until((tmp_path / "queries").exists)  # the first has been asked
        first.close()  # makes room
        assert b"200 OK" in second.recv(100)
        assert b"200 OK" in third.recv(100)
        second.close()
        third.close()
    asked = (tmp_path / "queries").read_text()
    assert re.findall("stall|second|third", asked) == ["stall", "second", "third"]


def test_who_needs_a_new_process_keeps_its_place_and_is_not_slept_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 60.0)

    def ask(text: str, key: str) -> int:
        message = {"role": "user", "content": text}
        return gateway.post({"messages": [message]}, {"x-api-key": key}).status

    with (
        InProcessGateway(tmp_path, processes=1, max_concurrency=1) as gateway,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        answers = [threads.submit(ask, "first, until told", "a")]
        wait_until(lambda: len(gateway.now.busy) == 1)
        for number, (text, key) in enumerate((("second", "b"), ("third", "a")), 1):
            answers.append(threads.submit(ask, text, key))
            wait_until(lambda number=number: gateway.now.waiting == number)  # type: ignore[misc]
        (tmp_path / "told").touch()
        assert [answer.result() for answer in answers] == [200] * 3
    asked = (tmp_path / "queries").read_text()
    assert re.findall("first|second|third", asked) == ["first", "second", "third"]


def test_a_waiting_client_that_leaves_gives_up_its_place(tmp_path: Path) -> None:
    with (
        InProcessGateway(tmp_path, max_concurrency=1, max_queue=1) as gateway,
        send_request(gateway, "stall", stream=False),
    ):
        wait_until(lambda: len(gateway.now.busy) == 1)
        waiting = send_request(gateway, "never asked", stream=False)
        wait_until(lambda: gateway.now.waiting == 1)
        waiting.close()
        wait_until(lambda: gateway.now.waiting == 0)
    assert "never asked" not in (tmp_path / "queries").read_text()


# ---- silence


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    seen = b""
    while mark not in seen:
        data = sock.recv(65536)
        assert data, f"{mark!r} did not come, but {seen!r}"
        seen += data
    return seen


def test_a_stream_shows_life_before_and_after_its_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    with InProcessGateway(tmp_path) as gateway:
        with send_request(gateway, "stall", stream=True) as sock:
            seen = read_until(sock, b": waiting\n\n")
            assert seen.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"event:" not in seen
        with send_request(gateway, "stall-after-start", stream=True) as sock:
            seen = read_until(sock, b'event: ping\ndata: {"type": "ping"}\n\n')
            assert b"message_start" in seen


def test_chat_completions_are_kept_alive_by_comments_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    body = {
        "model": "m",
        "stream": True,
        "messages": [{"role": "user", "content": "stall-after-start"}],
    }
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with InProcessGateway(tmp_path) as gateway:
        address = ("127.0.0.1", gateway.port)
        with socket.create_connection(address, timeout=20) as sock:
            sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            seen = read_until(sock, b"chat.completion.chunk")
            seen += read_until(sock, b": waiting\n\n")
    assert b"event:" not in seen


def test_a_waiting_client_in_the_queue_is_shown_life_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(cc2api, "CLIENT_CHECK_S", 0.05)
    with (
        InProcessGateway(tmp_path, max_concurrency=1) as gateway,
        send_request(gateway, "stall", stream=True) as first,
    ):
        read_until(first, b": waiting\n\n")
        with send_request(gateway, "second", stream=True) as second:
            read_until(second, b": waiting\n\n")


@pytest.mark.parametrize("order", ["stall", "stall-after-start"])
def test_an_answer_that_takes_too_long_is_504_or_an_error_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    with InProcessGateway(tmp_path, timeout=3.0) as gateway:
        whole = gateway.ask(order)
        assert (whole.status, whole.json["error"]["type"]) == (504, "timeout_error")
        assert whole.headers["x-should-retry"] == "false", "it would only be paid for again"
        streamed = gateway.ask(order, stream=True)
        if order == "stall":
            assert streamed.status == 504
        else:
            assert streamed.events[-1]["error"]["type"] == "timeout_error"


def test_a_process_that_answers_no_control_request_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cc2api, "CONTROL_TIMEOUT_S", 3.0)  # a busy machine needs one for a start
    with InProcessGateway(tmp_path, orders="mute") as gateway:
        assert gateway.ask("hello").status == 200
    assert "did not answer initialize within" in caplog.text


def test_a_client_that_stops_reading_is_dropped(tmp_path: Path) -> None:
    with (
        InProcessGateway(tmp_path, timeout=3.0) as gateway,
        send_request(gateway, "flood", stream=True),
    ):
        wait_until(lambda: len(gateway.now.busy) == 1)
        wait_until(lambda: not gateway.now.busy)


# ---- the end


def test_a_hangup_that_nohup_has_shut_off_ends_nothing(start_fake: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the gateway inherits
    try:
        gateway = start_fake()
    finally:
        signal.signal(signal.SIGHUP, before)
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    ignored = re.search(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)
    assert ignored is not None
    assert int(ignored[1], 16) & 1 << (signal.SIGHUP - 1)


def test_sigterm_lets_running_answers_finish(start: Any, api: ScriptedApi) -> None:
    gateway = start()
    word = marker()
    gate = threading.Event()
    api.on(word, text_reply(DEFAULT_TEXT, gate=gate, gate_after=3))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answer = threads.submit(gateway.ask, word)
        assert api.wait_for(lambda: bool(api.calls_with(word)))
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(gateway.port), "the closed door")
        gate.set()
        assert answer.result().json["content"][0]["text"] == DEFAULT_TEXT
    assert gateway.process.wait(10) == 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("end", ["drain is over", "second signal"])
def test_what_does_not_finish_is_cut_off(start: Any, api: ScriptedApi, end: str) -> None:
    gateway = start("--drain", "0.2" if end == "drain is over" else "60")
    word = marker()
    reply = text_reply("a b", gate=threading.Event(), gate_after=3)
    api.on(word, reply)
    with send_request(gateway, word, stream=True) as sock:
        read_until(sock, b"message_start")
        children = gateway.children()
        gateway.process.send_signal(signal.SIGINT)
        if end == "second signal":
            wait_until(lambda: not accepts(gateway.port), "the closed door")
            gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(10) == 0
    assert reply.left.wait(NOTICED_S)
    wait_until(lambda: not any(is_running(pid) for pid in children))


@pytest.mark.uncounted  # a killed gateway tells of no request
def test_no_claude_survives_a_gateway_that_is_killed_in_mid_answer(
    start: Any, api: ScriptedApi
) -> None:
    gateway = start()
    word = marker()
    reply = Reply(blocks=[{"type": "text", "text": "x"}], repeat=100_000, gap_s=0.01)
    api.on(word, reply)
    with send_request(gateway, word, stream=True) as sock:
        read_until(sock, b"message_start")
        children = gateway.children()
        assert children
        gateway.process.kill()
        wait_until(lambda: not any(is_running(pid) for pid in children), "the children's end")
    assert reply.left.wait(NOTICED_S)


def test_a_silent_time_does_not_use_the_processor(start_fake: Any) -> None:
    gateway = start_fake()
    wait_until(lambda: len(gateway.children()) == 1)
    before = cpu_s(gateway.process.pid)
    time.sleep(1)
    assert cpu_s(gateway.process.pid) - before < 0.1


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
