"""A thousand turns of unrelated conversations in one process: time, memory and descriptors.

    python tests/bench/soak.py [--turns 1000]

What it prints justifies MAX_SESSION_TURNS.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # cc2api.py

from bench import body_of, rss_mb
from harness import RunningGateway, wait_until
from scripted_api import ScriptedApi

BLOCK = 100  # turns to a line
LONG = "word " * 40_000  # 200 KB, in every tenth turn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=1000)
    turns = parser.parse_args().turns
    with (
        ScriptedApi() as api,
        RunningGateway("--max-concurrency", "1", base_url=api.url) as gateway,
    ):
        wait_until(lambda: len(gateway.children()) == 1)
        (pid,) = gateway.children()
        gateway.ask("warm up")
        print(f"{'turns':>6} {'median ms':>10} {'memory MB':>10} {'descriptors':>12}")
        dice, times = random.Random(7), []
        for turn in range(1, turns + 1):
            text = LONG if turn % 10 == 0 else f"question {turn}"
            history = [
                {"role": role, "content": f"{role} {number} of {turn}"}
                for number in range(dice.randrange(4))
                for role in ("user", "assistant")
            ]
            started = time.monotonic()
            question = {"role": "user", "content": text}
            answer = gateway.post({"messages": [*history, question], **body_of(turn % 50)})
            assert answer.status == 200, answer.body
            times.append((time.monotonic() - started) * 1000)
            if turn % BLOCK == 0:
                if pid not in gateway.children():
                    return print(f"{turn:6} it was retired by MAX_SESSION_TURNS")
                descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                median = statistics.median(times[-BLOCK:])
                print(f"{turn:6} {median:10.0f} {rss_mb(pid):10.0f} {descriptors:12}", flush=True)


if __name__ == "__main__":
    main()
