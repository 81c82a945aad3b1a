"""Measure what eight bodies of 30 MB at once do to all others.

    python tests/bench/large_bodies.py [--cut 200] [--megabytes 30] [--claude PATH]

Beside them a stream runs, `/healthz` is asked, and answers are cut by max_tokens, after which the
CLI would ask again by itself if its hold came too late. Prints the longest wait of a delta and of
`/healthz` in each phase, and that of a plain server in a process of its own that is asked at the
same time: what the machine alone makes wait. Then the calls too many, and the gateway's memory
before, at most, and a minute later. The API answers after 100 ms; it looks at no body, so as to be
quick.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # cc2api.py

from harness import RunningGateway, real_claude

AT_ONCE = 8
THINKING_S = 0.1
DELTA_S = 0.02  # between the deltas of the stream that runs
LATER_S = 60.0
STREAM, CUT = b"stream-for-long", b"cut-this-answer"
USAGE = {"input_tokens": 1, "output_tokens": 1}


class Api(BaseHTTPRequestHandler):
    """Answers by what stands in the body, without parsing it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    cut = 0  # calls of CUT requests
    is_over = False

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(THINKING_S)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            for event in self.events(body):
                data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")

    def events(self, body: bytes) -> Iterator[dict[str, Any]]:
        reason = "end_turn"
        if CUT in body:
            type(self).cut += 1
            reason = "max_tokens"
        start: dict[str, Any] = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude",
        }
        start |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": USAGE}
        yield {"type": "message_start", "message": start}
        block = {"type": "text", "text": ""}
        yield {"type": "content_block_start", "index": 0, "content_block": block}
        while STREAM in body and not type(self).is_over:
            yield delta(f"{time.time():.6f} ")
            time.sleep(DELTA_S)
        yield delta("done")
        yield {"type": "content_block_stop", "index": 0}
        ended = {"stop_reason": reason, "stop_sequence": None}
        yield {"type": "message_delta", "delta": ended, "usage": USAGE}
        yield {"type": "message_stop"}


def delta(text: str) -> dict[str, Any]:
    said = {"type": "text_delta", "text": text}
    return {"type": "content_block_delta", "index": 0, "delta": said}


def serve(pipe: Connection) -> None:
    """Run the API in a process of its own; tell its port, and at the end its calls."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    while pipe.recv() == "calls":
        pipe.send(Api.cut)
    Api.is_over = True
    time.sleep(10 * DELTA_S)


def body_of(content: Any, **more: Any) -> bytes:
    messages = [{"role": "user", "content": content}]
    fields = {"model": "claude-sonnet-5-5", "max_tokens": 100, "messages": messages, **more}
    return json.dumps(fields, ensure_ascii=False).encode()


def kinds_of_bodies(megabytes: int) -> dict[str, Callable[[int], bytes]]:
    """Return makers of bodies, each other by a number."""
    size = megabytes * 1_000_000
    line = "some words of a line, as long as lines are in most files of text\n"
    image = {"type": "base64", "media_type": "image/gif", "data": "R0lGODlh" * 5000}
    images = [{"type": "image", "source": image}] * (size // 40_100)
    return {
        "text": lambda number: body_of(f"{number} " + line * (size // (len(line) + 1))),
        "other letters": lambda number: body_of(f"{number} " + "жизнь " * (size // 11)),
        "many texts": lambda number: body_of(
            [{"type": "text", "text": f"{number} " + line * 4}] * (size // 320)
        ),
        "many images": lambda number: body_of(
            [*images[:550], {"type": "text", "text": str(number)}]
        ),
        "lists alone": lambda number: b"[" + b"[]," * (size // 3) + b"%d]" % number,
    }


class Watch:
    """The longest waits since it was last asked, in seconds."""

    def __init__(self) -> None:
        self._waits: dict[str, list[float]] = {"delta": [], "healthz": [], "plain": []}
        self.is_over = threading.Event()

    def take(self) -> str:
        told = []
        for name in self._waits:
            taken, self._waits[name] = self._waits[name], []
            middle = statistics.median(taken) if taken else 0
            told.append(
                f"{name} {max(taken, default=0) * 1000:.0f} ms (median {middle * 1000:.0f})"
            )
        return ", ".join(told)

    def follow(self, gateway: RunningGateway) -> None:
        """Read the stream that runs, and compare when a delta was said and came."""
        connection = gateway.connect()
        connection.request("POST", "/v1/messages", body_of(STREAM.decode(), stream=True))
        response = connection.getresponse()
        while not self.is_over.is_set() and (line := response.readline()):
            if b'"text_delta"' in line and b"done" not in line:
                said = json.loads(line[6:])["delta"]["text"].split()
                self._waits["delta"].append(time.time() - float(said[0]))
        connection.close()

    def probe(self, name: str, port: int, method: str, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not self.is_over.is_set():
            started = time.monotonic()
            connection.request(method, path)
            connection.getresponse().read()
            self._waits[name].append(time.monotonic() - started)
            time.sleep(0.01)
        connection.close()


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def rss_mb(gateway: RunningGateway) -> float:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cut", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--claude", default=real_claude())
    parser.add_argument("--kinds", default="", help="some of the kinds, by commas")
    parser.add_argument(
        "--later", type=float, default=LATER_S, help="seconds until the memory counts"
    )
    args = parser.parse_args()

    here, there = multiprocessing.Pipe()
    plain, plain_there = multiprocessing.Pipe()
    api = multiprocessing.Process(target=serve, args=(there,), daemon=True)
    api.start()
    beside = multiprocessing.Process(target=serve, args=(plain_there,), daemon=True)
    beside.start()
    url = f"http://127.0.0.1:{here.recv()}"
    most = ["--max-concurrency", str(AT_ONCE + 4)]
    with RunningGateway(*most, claude=args.claude, base_url=url) as gateway:
        run(gateway, here, plain.recv(), args)
    for pipe, server in ((here, api), (plain, beside)):
        pipe.send("stop")
        server.join()


def run(
    gateway: RunningGateway, api: Connection, plain_port: int, args: argparse.Namespace
) -> None:
    watch = Watch()
    threads = [
        threading.Thread(target=watch.follow, args=(gateway,)),
        threading.Thread(target=watch.probe, args=("healthz", gateway.port, "GET", "/healthz")),
        threading.Thread(target=watch.probe, args=("plain", plain_port, "HEAD", "/")),
    ]
    for thread in threads:
        thread.start()
    time.sleep(3)
    before = most = rss_mb(gateway)
    print(f"{'alone':<14} {watch.take()}", flush=True)
    with busy_processes(AT_ONCE):  # as many as there will be CLIs that read large bodies
        time.sleep(5)
    print(f"{'busy machine':<14} {watch.take()}", flush=True)

    cut = 0
    kinds = kinds_of_bodies(args.megabytes)
    if args.kinds:
        kinds = {name: kinds[name] for name in args.kinds.split(",")}
    for name, make in kinds.items():
        bodies = [make(number) for number in range(AT_ONCE)]
        statuses: list[int] = []

        def post(body: bytes, statuses: list[int] = statuses) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=300)
            connection.request("POST", "/v1/messages", body)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
            connection.close()

        rounds = 0
        wanted = args.cut // len(kinds)
        done = 0
        while done < wanted:
            rounds += 1
            large = [threading.Thread(target=post, args=(body,)) for body in bodies]
            for thread in large:
                thread.start()
            while any(thread.is_alive() for thread in large):
                answer = gateway.post(json.loads(body_of(f"{CUT.decode()} {name} {done}")))
                assert answer.status == 200, answer.json
                done += 1
                most = max(most, rss_mb(gateway))
            for thread in large:
                thread.join()
        cut += done
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"{name:<14} {watch.take()}; {rounds} x {AT_ONCE}: {counts}", flush=True)

    for number in range(AT_ONCE):  # whatever a process still does, it does before these
        gateway.ask(f"the end {number}")
    api.send("calls")
    print(f"{cut} answers cut by max_tokens, {api.recv() - cut} calls too many")
    time.sleep(args.later)
    print(f"memory {before:.0f} MB, at most {most:.0f}, later {rss_mb(gateway):.0f}")
    watch.is_over.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
