"""Count the answers after which the CLI called upstream a second time, beside busy processors.

    python tests/bench/second_calls.py [--count 500] [--delay 0.1]

Answers cut by max_tokens, refusals and empty ones, streamed and not, first in a conversation and
not. After each the CLI would ask again by itself; the gateway holds it back. `--delay` is the
upstream's time to its first byte: with 0 the hold can come too late.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # cc2api.py

from harness import RunningGateway
from scripted_api import Reply, ScriptedApi, text_reply

AT_ONCE = 4


def spin() -> None:
    """Keep a processor busy."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--delay", type=float, default=0.1)
    args = parser.parse_args()
    kinds: dict[str, dict[str, Any]] = {
        "max_tokens": {"stop_reason": "max_tokens"},
        "refusal": {"stop_reason": "refusal"},
        "empty": {},
    }
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for loop in loops:
        loop.start()
    with (
        ScriptedApi() as api,
        RunningGateway(base_url=api.url) as gateway,
        concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        for kind, fields in kinds.items():
            words = [f"{kind}-{number:05}." for number in range(args.count)]

            def ask(number: int, words: list[str] = words) -> int:
                question: dict[str, Any] = {"role": "user", "content": words[number]}
                before = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
                messages = [*(before if number % 2 else []), question]
                stream = bool(number // 2 % 2)
                return gateway.post({"messages": messages, "stream": stream}).status

            reply = text_reply("half an", **fields) if kind != "empty" else Reply(blocks=[])
            reply.delay_s = args.delay
            api.on(f"{kind}-", reply)
            first = len(api.calls)
            statuses = list(threads.map(ask, range(args.count)))
            for _ in range(AT_ONCE * 2):  # whatever a process still does, it does before these
                gateway.ask("the end")
            calls = [call.last_user_text() for call in api.calls[first:]]
            asked = [call for call in calls if "the end" not in call]
            print(
                f"{kind:<12} {args.count} answers, {statuses.count(200)} of them 200,"
                f" {len(asked) - args.count} calls too many",
                flush=True,
            )
    for loop in loops:
        loop.kill()


if __name__ == "__main__":
    main()
