"""Measure the gateway beside a one-shot `claude -p`, in one run on one machine.

    python tests/bench/bench.py [--rounds 15] [--json FILE]

Prints a table: time to the first delta in milliseconds (median, 90th percentile), and its ratio to
the one-shot CLI of the same run; these machines are noisy, so only the ratios mean something. The
one-shot CLI gets the flags that wrappers around it use. Both talk to a scripted API on loopback
that answers at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # cc2api.py

from running import API_KEY, RunningGateway, clean_environment, real_claude
from scripted_api import ScriptedApi

MODEL = "claude-sonnet-4-6"
SETTLE_S = 0.7  # between two measurements, so that a new spare's start is not measured


def serve(pipe: Connection) -> None:
    """Run the scripted API in a process of its own, until the other end says stop."""
    with ScriptedApi() as api:
        pipe.send(api.url)
        pipe.recv()


def one_shot_delta_ms(claude: str, url: str, home: Path) -> float:
    """Run `claude -p PROMPT` as other wrappers do; return the time to its first text delta."""
    command = [claude, "-p", "Hello!", "--model", MODEL, "--tools", "", "--disable-slash-commands"]
    command += ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
    command += ["--settings", '{"hooks":{},"mcpServers":{}}']
    command += ["--system-prompt", "You are a helpful assistant."]
    started = time.monotonic()
    with subprocess.Popen(
        command,
        env=clean_environment(home, url, **API_KEY),
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"content_block_delta" in line:
                elapsed = time.monotonic() - started
                process.stdout.read()
                return elapsed * 1000
    raise RuntimeError("claude -p gave no delta")


def gateway_delta_ms(gateway: RunningGateway) -> float:
    """Ask the gateway in a new conversation on a new connection; return the time to the delta."""
    body = {"model": MODEL, "max_tokens": 100, "stream": True}
    body["messages"] = [{"role": "user", "content": "Hello!"}]
    connection = gateway.connect()
    started = time.monotonic()
    connection.request("POST", "/v1/messages", json.dumps(body))
    response = connection.getresponse()
    seen = b""
    while b"content_block_delta" not in seen:
        seen += response.read1()
    elapsed = time.monotonic() - started
    response.read()
    connection.close()
    return elapsed * 1000


def rss_mb(pid: int) -> float:
    """Return a process's resident memory (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def row(name: str, times: list[float], base: float) -> dict[str, Any]:
    ordered = sorted(times)
    median = statistics.median(times)
    p90 = ordered[int(len(ordered) * 0.9)]
    return {"what": name, "median": median, "p90": p90, "ratio": median / base}


def measure(rounds: int, url: str, home: Path) -> dict[str, Any]:
    claude = real_claude()
    with RunningGateway(claude=claude, base_url=url) as gateway:
        sides: dict[str, Callable[[], float]] = {
            "one-shot claude -p": lambda: one_shot_delta_ms(claude, url, home),
            "gateway, fresh conversation": lambda: gateway_delta_ms(gateway),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                time.sleep(SETTLE_S)
                elapsed = side()
                if number:  # the first round warms the disk cache
                    times[name].append(elapsed)
        memory = rss_mb(gateway.process.pid)
    base = statistics.median(times["one-shot claude -p"])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "machine": f"{machine}, Python {platform.python_version()}",
        "first_delta_ms": [row(name, values, base) for name, values in times.items()],
        "gateway_rss_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=[theirs], daemon=True)
    process.start()
    try:
        with tempfile.TemporaryDirectory() as home:
            result = measure(args.rounds, ours.recv(), Path(home))
    finally:
        ours.send("stop")
        process.join()
    print(f"{result['machine']}; {args.rounds} rounds")
    print(f"{'time to first delta, ms':<30} {'median':>7} {'p90':>7} {'ratio':>6}")
    for line in result["first_delta_ms"]:
        print(f"{line['what']:<30} {line['median']:7.0f} {line['p90']:7.0f} {line['ratio']:6.2f}")
    print(f"resident memory of the gateway: {result['gateway_rss_mb']:.0f} MB")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
