"""Measure the gateway beside a one-shot `claude -p`, in one run on one machine.

    python tests/bench/bench.py [--rounds 15] [--json FILE]

Prints tables; these machines are noisy, so only the ratios mean something, each to the one-shot CLI
of the same run. The one-shot CLI gets the flags that wrappers around it use. All talk to a scripted
API on loopback that answers at once, or where it says so after 300 ms, which are then taken off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import platform
import random
import resource
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

from harness import API_KEY, LOGIN, RunningGateway, clean_environment, real_claude
from scripted_api import Reply, ScriptedApi, text_reply

import cc2api

JsonObject = dict[str, Any]
MODELS = ("claude-sonnet-4-6", "claude-opus-4-6")
MODEL = MODELS[0]
THINKING_S = 0.3  # a quick model's time to its first token
SYSTEM = "You are a careful assistant. " * 20
SETTLE_S = 0.8  # between two measurements, so that a new spare's start is not measured
STEPS = 200  # tool calls that the scripted API has answers for
DELTAS = 60_000  # of a long stream
AT_ONCE = 4
REPEATS = 3  # of what is measured AT_ONCE at a time; the median run counts
REPLAYED = 10  # messages before the question
TURNS = 6  # of each parallel conversation
STREAMS = 8  # long streams at once


def serve(pipe: Connection) -> None:
    """Run the scripted API in a process of its own, until the other end says stop."""
    with ScriptedApi() as api:
        for step in range(STEPS):
            call = {"type": "tool_use", "id": f"toolu_{step}", "name": "look", "input": {"n": step}}
            api.on(f"step {step}.", Reply(blocks=[call], stop_reason="tool_use"))
        api.on("long stream", Reply(blocks=[{"type": "text", "text": "x"}], repeat=DELTAS))
        api.on("cut short", text_reply("half an", stop_reason="max_tokens", delay_s=THINKING_S))
        api.on("think", text_reply("done", delay_s=THINKING_S))
        pipe.send(api.url)
        pipe.recv()


# ---- the sides that are compared


def one_shot(claude: str, url: str, home: Path, prompt: str = "Hello!") -> tuple[float, float]:
    """Run `claude -p PROMPT` as other wrappers do; return the seconds to its first text delta.

    And those from there to its end.
    """
    command = [claude, "-p", prompt, "--model", MODEL, "--tools", "", "--disable-slash-commands"]
    command += ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
    command += ["--settings", '{"hooks":{},"mcpServers":{}}', "--system-prompt", SYSTEM]
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
                first = time.monotonic() - started
                process.stdout.read()
                return first, time.monotonic() - started - first
    raise RuntimeError("claude -p gave no delta")


class Talk:
    """A client in one conversation, on one connection."""

    def __init__(
        self, gateway: RunningGateway, headers: dict[str, str] | None = None, **fields: Any
    ) -> None:
        self.connection: http.client.HTTPConnection = gateway.connect()
        self.headers = headers or {}
        self.body = {"model": MODEL, "max_tokens": 100, "stream": True, "system": SYSTEM, **fields}
        self.messages: list[JsonObject] = []

    def say(self, content: Any) -> tuple[float, float]:
        """Take one turn; return the seconds to its first delta, and to its end."""
        self.messages.append({"role": "user", "content": content})
        data = json.dumps({**self.body, "messages": self.messages})
        started = time.monotonic()
        self.connection.request("POST", "/v1/messages", data, self.headers)
        response = self.connection.getresponse()
        seen = b""
        while b"content_block_delta" not in seen:
            seen += response.read1()
        first = time.monotonic() - started
        rest = response.read()
        whole = time.monotonic() - started
        self.messages.append({"role": "assistant", "content": blocks_of(seen + rest)})
        return first, whole


def blocks_of(stream: bytes) -> list[JsonObject]:
    """Put a streamed answer together."""
    writer = cc2api.MessagesEncoder()
    for line in stream.split(b"\n"):
        if line.startswith(b"data: "):
            writer.feed(json.loads(line[6:]))
    return list(writer.message["content"])


# ---- time to the first delta


def body_of(number: int) -> JsonObject:
    """Return a system prompt and tools that no request had before."""
    tools = [{"name": f"tool_{number}_{n}", "input_schema": {"type": "object"}} for n in range(3)]
    return {"system": f"You are number {number}.", "tools": tools}


def count(gateway: RunningGateway, number: int) -> float:
    """Count the tokens of a question; return the seconds."""
    started = time.monotonic()
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"question {number}"}]}
    assert gateway.request("POST", "/v1/messages/count_tokens", body).status == 200
    return time.monotonic() - started


def measure_latency(rounds: int, claude: str, url: str, home: Path) -> list[JsonObject]:
    """Measure one client's waiting; all sides in turn, round by round."""
    with (
        RunningGateway(claude=claude, base_url=url) as gateway,
        RunningGateway(claude=claude, base_url=url, env=LOGIN) as login_gateway,
    ):
        talk = Talk(gateway)
        tools = Talk(gateway, tools=[{"name": "look", "input_schema": {"type": "object"}}])
        talk.say("Hello!")
        tools.say("step 0.")
        steps, numbers = iter(range(1, STEPS)), itertools.count()

        def tool_step() -> float:
            step = next(steps)
            result = {"type": "tool_result", "tool_use_id": f"toolu_{step - 1}"}
            return tools.say([{**result, "content": f"step {step}."}])[1]

        def replay(gateway: RunningGateway) -> float:
            """Ask for the end of a conversation that no process holds anything of."""
            number = next(numbers)
            talk = Talk(gateway)
            for turn in range(REPLAYED // 2):
                talk.messages.append({"role": "user", "content": f"turn {turn} of {number}"})
                talk.messages.append({"role": "assistant", "content": "An answer."})
            return talk.say("Hello!")[0]

        def new_caller(prompt: str) -> float:
            key = {"x-api-key": f"caller number {next(numbers)}"}
            return Talk(gateway, key).say(prompt)[0]

        sides: dict[str, Callable[[], float]] = {
            "one-shot claude -p": lambda: one_shot(claude, url, home)[0],
            "fresh conversation": lambda: Talk(gateway).say("Hello!")[0],
            "  of ever new prompt and tools": lambda: Talk(gateway, **body_of(next(numbers))).say(
                "Hello!"
            )[0],
            "continued conversation": lambda: talk.say("And now?")[0],
            "replay of ten messages": lambda: replay(gateway),
            "  with a login": lambda: replay(login_gateway),
            "tool step, to its end": tool_step,
            "cut by max_tokens, to its end": lambda: Talk(gateway).say("cut short")[1] - THINKING_S,
            "count_tokens": lambda: count(gateway, next(numbers)),
            "new caller": lambda: new_caller("Hello!"),
            "  upstream thinks": lambda: new_caller("think") - THINKING_S,
            "  the next at once": lambda: new_caller("think") - THINKING_S,
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 2):
            for name, side in sides.items():
                if "at once" not in name:
                    time.sleep(SETTLE_S)
                elapsed = side()
                if number > 1:  # the first rounds warm the disk cache
                    times[name].append(elapsed * 1000)
    base = statistics.median(times["one-shot claude -p"])
    return [row(name, values, base) for name, values in times.items()]


def row(name: str, times: list[float], base: float) -> JsonObject:
    median = statistics.median(times)
    p90 = sorted(times)[int(len(times) * 0.9)]
    return {"what": name, "median": median, "p90": p90, "ratio": median / base}


# ---- several at once


def measure_parallel(claude: str, url: str, home: Path) -> list[JsonObject]:
    """Measure requests a second, each one's time to its end, and CPU-seconds, AT_ONCE at a time."""
    count = AT_ONCE * TURNS
    with RunningGateway(claude=claude, base_url=url) as gateway:

        def fresh(_: int) -> list[float]:
            return [Talk(gateway).say("Hello!")[1]]

        def conversation(_: int) -> list[float]:
            talk = Talk(gateway)
            return [talk.say(f"turn {turn}")[1] for turn in range(TURNS)]

        def mix(client: int) -> list[float]:
            """Take turns as users do: half new, the others continued, edited or branched."""
            dice, wholes = random.Random(client), []
            talks: list[Talk] = []
            for turn in range(TURNS):
                if not talks or dice.random() < 0.5:
                    kind = dice.randrange(12)
                    talks.append(Talk(gateway, **body_of(kind), model=MODELS[kind % 2]))
                    talk = talks[-1]
                else:
                    talk = changed(dice, gateway, dice.choice(talks))
                    talks.append(talk)
                wholes.append(talk.say(f"turn {turn} of client {client}")[1])
            return wholes

        def lone(_: int) -> list[float]:
            started = time.monotonic()
            one_shot(claude, url, home)
            return [time.monotonic() - started]

        sides: list[tuple[str, Callable[[int], list[float]], int]] = [
            ("one-shot claude -p", lone, count),
            ("fresh single turns", fresh, count),
            (f"conversations of {TURNS} turns", conversation, AT_ONCE),
            ("a mix: half new, others changed", mix, AT_ONCE),
        ]
        for _, side, _ in sides:  # so that each finds things as they are in a busy time
            in_parallel(side, AT_ONCE)
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _, _ in sides}
        for _ in range(REPEATS):
            for name, side, times in sides:
                time.sleep(2)
                before = cpu_s(gateway.process.pid)
                rate, wholes = in_parallel(side, times)
                used = (cpu_s(gateway.process.pid) - before) / len(wholes)
                runs[name].append((rate, statistics.median(wholes) * 1000, used))
    names = ("rate", "median", "cpu_s")
    found: list[JsonObject] = []
    for name, figures in runs.items():
        medians = map(statistics.median, zip(*figures, strict=True))
        found.append({"what": name, **dict(zip(names, medians, strict=True))})
        found[-1]["ratio"] = found[-1]["rate"] / found[0]["rate"]
    return found


def changed(dice: random.Random, gateway: RunningGateway, talk: Talk) -> Talk:
    """Return a conversation to go on with: as it is, back at an earlier question, or a branch."""
    change = dice.randrange(3)
    if change == 0:
        del talk.messages[dice.randrange(0, len(talk.messages), 2) :]
    if change != 1:
        return talk
    branch = Talk(gateway)
    branch.body, branch.messages = talk.body, list(talk.messages)
    return branch


def in_parallel(side: Callable[[int], list[float]], times: int) -> tuple[float, list[float]]:
    """Run something AT_ONCE at a time; return requests a second, and all their times."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        firsts = list(itertools.chain.from_iterable(threads.map(side, range(times))))
    return len(firsts) / (time.monotonic() - started), firsts


def cpu_s(pid: int) -> float:
    """Return the CPU-seconds of this process's ended children, of a gateway, and its children."""
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                ticks += int(fields[11]) + int(fields[12])
            elif stat.parent.name == str(pid):
                ticks += sum(map(int, fields[11:15]))
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


# ---- long streams


QUESTION = {"role": "user", "content": "long stream"}


def gateway_stream_s(talk: Talk) -> float:
    """Ask the gateway, and read as it comes; return the seconds for all deltas."""
    talk.connection.request(
        "POST", "/v1/messages", json.dumps({**talk.body, "messages": [*talk.messages, QUESTION]})
    )
    response = talk.connection.getresponse()
    started, tail = 0.0, b""
    while b"event: message_stop" not in tail:
        data = response.read1(1 << 16)
        if not started and b"content_block_delta" in data:
            started = time.monotonic()
        tail = tail[-100:] + data
    response.read()
    return time.monotonic() - started


def begun(gateway: RunningGateway, count: int) -> list[Talk]:
    """Return conversations that are one turn old, so that their processes are there."""
    talks = [Talk(gateway) for _ in range(count)]
    for number, talk in enumerate(talks):
        talk.say(f"Hello, {number}!")
    time.sleep(SETTLE_S)
    return talks


def measure_streams(rounds: int, claude: str, url: str, home: Path) -> list[JsonObject]:
    """Measure deltas a second, for one long stream and for STREAMS at once."""
    direct, through = [], []
    with (
        RunningGateway(claude=claude, base_url=url) as gateway,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as threads,
    ):
        for _ in range(rounds):
            time.sleep(SETTLE_S)
            direct.append(one_shot(claude, url, home, "long stream")[1])
            through.append(gateway_stream_s(begun(gateway, 1)[0]))
        jobs = [threads.submit(one_shot, claude, url, home, "long stream") for _ in range(STREAMS)]
        direct_all = statistics.mean(job.result()[1] for job in jobs)
        talks = begun(gateway, STREAMS)
        through_all = statistics.mean(threads.map(gateway_stream_s, talks))
    one, ours = statistics.median(direct), statistics.median(through)
    all_ratio = direct_all / through_all
    return [
        {"what": "one, of claude -p", "rate": DELTAS / one, "ratio": 1.0},
        {"what": "one, through the gateway", "rate": DELTAS / ours, "ratio": one / ours},
        {
            "what": f"{STREAMS}, of claude -p each",
            "rate": STREAMS * DELTAS / direct_all,
            "ratio": 1,
        },
        {
            "what": f"{STREAMS}, through the gateway",
            "rate": STREAMS * DELTAS / through_all,
            "ratio": all_ratio,
        },
    ]


# ---- memory


def measure_memory(claude: str, url: str) -> JsonObject:
    """Return the resident memory of a gateway, a spare and a used process, in MB."""
    with RunningGateway(claude=claude, base_url=url) as gateway:
        time.sleep(SETTLE_S)
        (spare,) = gateway.children()
        spare_mb = rss_mb(spare)
        Talk(gateway).say("Hello!")
        return {"gateway": rss_mb(gateway.process.pid), "spare": spare_mb, "used": rss_mb(spare)}


def rss_mb(pid: int) -> float:
    """Return a process's resident memory (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- the report


def report(result: JsonObject) -> None:
    print(f"{result['machine']}; {result['rounds']} rounds\n")
    print(f"{'time to first delta, ms':<32} {'median':>7} {'p90':>7} {'ratio':>6}")
    for line in result["first_delta_ms"]:
        print(f"{line['what']:<32} {line['median']:7.0f} {line['p90']:7.0f} {line['ratio']:6.2f}")
    print(f"\n{f'{AT_ONCE} at a time':<32} {'req/s':>7} {'ratio':>7} {'ms':>6} {'CPU s':>6}")
    for line in result["parallel"]:
        print(
            f"{line['what']:<32} {line['rate']:7.1f} {line['ratio']:7.2f} {line['median']:6.0f}"
            f" {line['cpu_s']:6.2f}"
        )
    print(f"\n{'long streams':<32} {'deltas/s':>8} {'ratio':>6}")
    for line in result["streams"]:
        print(f"{line['what']:<32} {line['rate']:8.0f} {line['ratio']:6.2f}")
    memory = result["memory_mb"]
    print(
        f"\nresident memory, MB: gateway {memory['gateway']:.0f}, spare {memory['spare']:.0f},"
        f" used process {memory['used']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=[theirs], daemon=True)
    process.start()
    claude = real_claude()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result: JsonObject = {"machine": machine, "rounds": args.rounds}
    try:
        with tempfile.TemporaryDirectory() as name:
            url, home = ours.recv(), Path(name)
            result["first_delta_ms"] = measure_latency(args.rounds, claude, url, home)
            result["parallel"] = measure_parallel(claude, url, home)
            result["streams"] = measure_streams(max(3, args.rounds // 5), claude, url, home)
            result["memory_mb"] = measure_memory(claude, url)
    finally:
        ours.send("stop")
        process.join()
    report(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
