"""Odd surroundings: a log that nobody reads, a full disk, signals while it starts."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, FAKE_CLAUDE, GATEWAY, WAIT_S, clean_environment, wait_until
from helpers import free_port

import cc2api


class Started:
    """A gateway on the fake CLI, whose output goes where a test says."""

    def __init__(self, home: Path, stdout: Any, stderr: Any, **env: str) -> None:
        self.start(home, stdout, stderr, **env)
        wait_until(lambda: self.answers() or self.process.poll() is not None, "an answer or an end")
        if self.process.poll() is not None:  # another test was given that port meanwhile
            self.start(home, stdout, stderr, **env)
            wait_until(self.answers, "an answer")

    def start(self, home: Path, stdout: Any, stderr: Any, **env: str) -> None:
        self.port = free_port()
        command = [sys.executable, str(GATEWAY), "--port", str(self.port), "--claude"]
        more = {**API_KEY, "FAKE_CLAUDE_ORDERS": str(home), **env}
        self.process = subprocess.Popen(
            [*command, str(FAKE_CLAUDE)],
            env=clean_environment(home, **more),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.status("GET", "/healthz") in (200, 503)
        return False

    def status(self, method: str, path: str, body: Any = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            connection.request(method, path, json.dumps(body))
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    def ask(self) -> int:
        message = {"role": "user", "content": "hello"}
        return self.status(
            "POST", "/v1/messages", {"model": "m", "max_tokens": 5, "messages": [message]}
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def started(home: Path, stdout: Any, stderr: Any, **env: str) -> Iterator[Started]:
    one = Started(home, stdout, stderr, **env)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    try:
        with started(tmp_path, subprocess.DEVNULL, theirs) as gateway:
            for _ in range(600):  # a pipe holds some 300 lines
                assert gateway.status("GET", "/nothing/" + "x" * 100) == 404
            assert gateway.ask() == 200
            assert gateway.stop() == 0
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_a_full_disk_under_its_output_ends_nothing(tmp_path: Path, full: str) -> None:
    with open("/dev/full", "wb") as disk:
        stdout = disk if full != "stderr" else subprocess.DEVNULL
        stderr = disk if full != "stdout" else subprocess.DEVNULL
        with started(tmp_path, stdout, stderr) as gateway:
            assert gateway.ask() == 200
            assert gateway.stop() == 0


def test_a_signal_while_the_cli_is_asked_how_it_is_signed_in_ends_it(tmp_path: Path) -> None:
    """The CLI may take CONTROL_TIMEOUT_S for that, twice."""
    null = subprocess.DEVNULL
    with started(tmp_path, null, null, FAKE_CLAUDE_AUTH_S="60") as gateway:
        assert gateway.stop() == 0


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The reading end of what log handlers write to."""
    ours, theirs = os.pipe()
    monkeypatch.setattr(cc2api, "STDERR", theirs)
    yield ours
    os.close(theirs)
    os.close(ours)


def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelname": "INFO"})


def test_log_lines_that_are_too_many_are_dropped_and_counted(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "MAX_LOG_BACKLOG_CHARS", 200_000)
    handler = cc2api.LogHandler()
    handler.setFormatter(cc2api.LogFormatter())
    for number in range(300):
        handler.handle(record(f"event=test number={number} {'x' * 1000}"))
    seen = b""

    def read() -> None:
        nonlocal seen
        while b"number=last" not in seen:
            seen += os.read(pipe, 65536)

    reader = threading.Thread(target=read)
    reader.start()
    handler.flush()
    handler.handle(record("event=test number=last"))
    reader.join(WAIT_S)
    assert not reader.is_alive()
    lines = seen.decode().splitlines()
    assert all(line.startswith("time=") for line in lines)
    notes = re.findall(r"(\d+) log lines were dropped", "\n".join(lines))
    kept = sum("number=" in line for line in lines) - 1
    assert sum(int(count) for count in notes) == 300 - kept


def test_a_line_that_is_larger_than_all_that_may_wait_is_written(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "MAX_LOG_BACKLOG_CHARS", 100)
    handler = cc2api.LogHandler()
    handler.setFormatter(cc2api.LogFormatter())
    handler.handle(record(f"event=test body={'x' * 1000}"))
    handler.flush()
    assert os.read(pipe, 65536).endswith(b"x\n")


def test_the_log_is_written_whole_at_the_end(pipe: int) -> None:
    handler = cc2api.LogHandler()
    handler.setFormatter(cc2api.LogFormatter())
    for number in range(20):
        handler.handle(record(f"event=test number={number}"))
    handler.flush()
    assert os.read(pipe, 65536).count(b"\n") == 20
