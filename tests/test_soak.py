"""Mixed requests leave the gateway as it was: memory, descriptors, threads, children, files.

On the fake CLI, to be quick; with CC2API_TEST_SOAK=real on the real one. CC2API_TEST_REQUESTS says
how many; 4,000 on the real one take some minutes.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import API_KEY, RunningGateway, leftovers, wait_until
from scripted_api import Reply, ScriptedApi, text_reply

REQUESTS = int(os.environ.get("CC2API_TEST_REQUESTS", "200"))
AT_ONCE = 4
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def resources(gateway: RunningGateway) -> dict[str, int]:
    """Return descriptors, threads and children of the gateway."""
    process = Path(f"/proc/{gateway.process.pid}")
    return {
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "children": len(gateway.children()),
    }


def rss_mb(gateway: RunningGateway) -> float:
    pages = int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cancel(gateway: RunningGateway, number: int) -> None:
    """Ask for a stream and leave before or in the middle of it."""
    body: dict[str, Any] = {"model": "m", "max_tokens": 9, "stream": True}
    body["messages"] = [{"role": "user", "content": "hello"}]
    data = json.dumps(body).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as sock:
        sock.sendall(head.encode() + data)
        if number % 2:
            sock.recv(1)


def one(gateway: RunningGateway, number: int) -> None:
    """Make one request of a kind chosen by its number."""
    match number % 6:
        case 0:
            assert gateway.ask("hello").status == 200
        case 1:
            assert gateway.ask("hello", stream=True).status == 200
        case 2:
            cancel(gateway, number // 6)
        case 3:
            assert gateway.ask("hello", stream=7).status == 400
        case 4:
            assert gateway.ask("call-a-tool", stream=True, tools=[TOOL]).status == 200
        case 5:
            assert gateway.request("POST", "/nope", {"a": "x" * 100_000}).status == 404


def run_soak(gateway: RunningGateway, files: Callable[[], int]) -> None:
    def run(count: int) -> None:
        numbers = list(range(count))
        random.Random(7).shuffle(numbers)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda number: one(gateway, number), numbers))

    run(24)  # what the first requests allocate once and for all is no leak
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:  # each in its own process
        list(threads.map(lambda number: gateway.ask(f"a while, {number}"), range(AT_ONCE)))
    wait_until(lambda: len(gateway.children()) == 5, "one spare and four idle ones")
    wait_until(lambda: resources(gateway)["threads"] == 4, "no thread of a connection")
    before, memory, found = resources(gateway), rss_mb(gateway), files()
    run(REQUESTS)
    wait_until(lambda: all(now <= before[name] for name, now in resources(gateway).items()))
    assert rss_mb(gateway) - memory < 10
    wait_until(lambda: files() <= found, "as many files as before")


def test_mixed_requests_leave_nothing_behind(
    start: Any, start_fake: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    tool_use = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
    api.on("a while", text_reply(delay_s=1.0))
    api.on("call-a-tool", Reply(blocks=[tool_use], stop_reason="tool_use"))
    is_real = os.environ.get("CC2API_TEST_SOAK") == "real"
    parent = tmp_path / "tmp"
    parent.mkdir()
    env = {"TMPDIR": str(parent), **(API_KEY if is_real else {})}
    start_one = start if is_real else start_fake
    gateway = start_one("--processes", "5", "--max-concurrency", "4", env=env)
    run_soak(gateway, lambda: leftovers(gateway, parent, gateway.dir))
