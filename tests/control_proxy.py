#!/usr/bin/env python3
"""Stands between the gateway and the real CLI, and answers some of its control requests otherwise.

PROXY_ORDER is `MODE SUBTYPE N`: from the N-th request of that subtype on, in each process, it is
`refuse`d, answered with `rewound: false` (`keep`), never answered (`silent`), or answered a second
later (`late`). The CLI sees only those of `late`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

CLI = [os.environ["PROXY_CLAUDE"], *sys.argv[1:]]
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)
lock = threading.Lock()


def die_with_parent() -> None:
    """The gateway kills this process: the CLI must not live on, or it could call upstream again."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def put(line: bytes) -> None:
    with lock:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def respond(request: Any, **response: Any) -> None:
    response["request_id"] = request["request_id"]
    put(json.dumps({"type": "control_response", "response": response}).encode() + b"\n")


def main() -> int:
    if "--version" in CLI or "auth" in CLI:
        os.execv(CLI[0], CLI)
    mode, subtype, first = os.environ["PROXY_ORDER"].split()
    process = subprocess.Popen(
        CLI, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent
    )
    assert process.stdin is not None
    assert process.stdout is not None
    late: set[str] = set()

    def pass_on() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if any(request_id.encode() in line for request_id in late):
                threading.Timer(1.0, put, [line]).start()
            else:
                put(line)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    seen = 0
    for raw in sys.stdin.buffer:
        line = json.loads(raw)
        is_meant = line.get("type") == "control_request" and line["request"]["subtype"] == subtype
        seen += is_meant
        if is_meant and seen >= int(first):
            if mode == "refuse":
                respond(line, subtype="error", error="not with me")
            if mode == "keep":
                respond(line, subtype="success", response={"rewound": False, "reason": "no"})
            if mode == "late":
                late.add(line["request_id"])
            if mode != "late":
                continue
        process.stdin.write(raw)
        process.stdin.flush()
    process.stdin.close()
    reader.join()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
