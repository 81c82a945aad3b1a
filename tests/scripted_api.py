"""A scripted Messages API on loopback: what the real CLI talks to in the tests.

It records every request that reaches it and answers with the `Reply` whose marker stands in the
last user message, so a test chooses its answer by the words it sends and tests do not disturb each
other. Without a marker the answer is the text "Hello, I am scripted.".
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import api_rules

JsonObject = dict[str, Any]

USAGE: JsonObject = {
    "input_tokens": 11,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
    "output_tokens": 1,
}
BURST = 20  # events of a long stream that are sent at once
DEFAULT_TEXT = "Hello, I am scripted."
UNKNOWN_MODEL = "claude-unheard-of-1"  # its tokens are not counted

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


@dataclass
class Reply:
    """One scripted answer: SSE events, or an error status with a message."""

    blocks: list[JsonObject] = field(default_factory=list)
    stop_reason: str = "end_turn"
    stop_sequence: str | None = None
    stop_details: JsonObject | None = None
    output_tokens: int = 42
    status: int = 200
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    error: JsonObject | None = None  # sent as an `error` event, the last one,
    error_after: int = 0  # after so many events
    cut_after: int | None = None  # close the connection after so many events
    gate: threading.Event | None = None  # waited for after `gate_after` events
    gate_after: int = 0
    gap_s: float = 0.0
    delay_s: float = 0.0  # before the first byte; a model never answers at once
    left: threading.Event = field(default_factory=threading.Event)  # set when the CLI hung up
    raw_input: str | None = None  # what a tool call's input says, in place of its JSON
    raw_body: str | None = None  # of an error, in place of the API's own
    repeat: int = 0  # times an extra text_delta is sent, for long streams

    def events(self, model: str) -> Iterator[JsonObject]:
        """Yield the API's events for this reply, as api.anthropic.com orders them."""
        if self.error is None:
            yield from self._events(model)
            return
        yield from itertools.islice(self._events(model), self.error_after)
        yield {"type": "error", "error": self.error}

    def _events(self, model: str) -> Iterator[JsonObject]:
        message: JsonObject = {
            "id": "msg_" + uuid.uuid4().hex[:24],
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "usage": dict(USAGE),
        }
        yield {"type": "message_start", "message": message}
        for index, block in enumerate(self.blocks):
            start, deltas = _opened(block)
            if self.raw_input is not None:
                deltas = [{"type": "input_json_delta", "partial_json": self.raw_input}]
            yield {"type": "content_block_start", "index": index, "content_block": start}
            for delta in deltas:
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            delta = {"type": "text_delta", "text": "word "}
            repeated = {"type": "content_block_delta", "index": index, "delta": delta}
            yield from itertools.repeat(repeated, self.repeat)
            yield {"type": "content_block_stop", "index": index}
        yield {
            "type": "message_delta",
            "delta": {
                "stop_reason": self.stop_reason,
                "stop_sequence": self.stop_sequence,
                "stop_details": self.stop_details,
            },
            "usage": {"output_tokens": self.output_tokens},
        }
        yield {"type": "message_stop"}


def _opened(block: JsonObject) -> tuple[JsonObject, list[JsonObject]]:
    """Split a finished block into its start form and its deltas."""
    kind = block["type"]
    if kind == "text":
        words = block["text"].split(" ")
        pieces = [word + " " for word in words[:-1]] + words[-1:]
        return {"type": "text", "text": ""}, [{"type": "text_delta", "text": p} for p in pieces]
    if kind == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if kind in ("tool_use", "server_tool_use"):
        text = json.dumps(block["input"])
        pieces = ["", *(text[i : i + 7] for i in range(0, len(text), 7))]
        deltas = [{"type": "input_json_delta", "partial_json": p} for p in pieces]
        return {**block, "input": {}}, deltas
    return dict(block), []


def text_reply(text: str = DEFAULT_TEXT, **more: Any) -> Reply:
    """Return a reply of one text block."""
    return Reply(blocks=[{"type": "text", "text": text}], **more)


@dataclass
class Call:
    """One request that reached the scripted API."""

    path: str
    headers: dict[str, str]
    body: JsonObject

    @functools.cached_property
    def text(self) -> str:
        return json.dumps(self.body, ensure_ascii=False)

    def last_user_text(self) -> str:
        return self._last_user_text

    @functools.cached_property
    def _last_user_text(self) -> str:
        """Return all the text of the last user message, tool results included."""
        for message in reversed(self.body.get("messages", [])):
            if message["role"] == "user":
                return json.dumps(message["content"], ensure_ascii=False)
        return ""


class ScriptedApi:
    """The server: `with ScriptedApi() as api`, then `api.url`, `api.calls`, `api.on(...)`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.counted = 0  # count_tokens requests
        # Before answers after which the CLI asks again by itself. No model answers at once, and
        # meanwhile the CLI is held back; at once that may come too late (bench/second_calls.py).
        self.thinking_s = 0.0
        self.is_strict = False  # refuses what the real API refuses of that model (api_rules)
        self.counts = True  # else they are refused
        self.counts_at_most: int | None = None  # as `counted`; what is beyond is refused
        self._replies: dict[str, Reply] = {}
        self._lock = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.api = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedApi:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def on(self, marker: str, reply: Reply) -> None:
        """Answer requests whose last user message holds `marker` with `reply`."""
        self._replies[marker] = reply

    def calls_with(self, marker: str) -> list[Call]:
        """Return the recorded generations whose messages hold `marker`, oldest first."""
        with self._lock:
            return [c for c in self.calls if marker in c.text]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until `condition()` holds; it is looked at after every recorded request."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._lock:
                self._lock.wait(min(left, 0.05))
        return True

    def count(self, body: JsonObject) -> int:
        """Count the words of a request, and 7 for each message and 346 for having tools."""
        self.counted += 1
        words = sum(
            len(re.findall(r"\w+", block["text"]))
            if block["type"] == "text"
            else len(json.dumps(block)) // 10
            for message in body["messages"]
            for block in (
                [{"type": "text", "text": message["content"]}]
                if isinstance(message["content"], str)
                else message["content"]
            )
        )
        tools = body.get("tools") or []
        in_tools = sum(len(re.findall(r"\w+", json.dumps(tool))) for tool in tools)
        return words + 7 * len(body["messages"]) + in_tools + (346 if tools else 0)

    def record(self, call: Call) -> Reply:
        """Note a request and choose its reply."""
        with self._lock:
            self.calls.append(call)
            self._lock.notify_all()
        text = call.last_user_text()
        hits = [marker for marker in self._replies if marker in text]
        return self._replies[max(hits, key=len)] if hits else text_reply()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    api: ScriptedApi

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that left


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a reused connection waits 40 ms for an ACK
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:  # the CLI opens its connection early with HEAD /api/hello
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self._json(404, _error(404, self.path), {})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(raw)
        if self.path.startswith("/v1/messages/count_tokens"):
            api = self.server.api
            most = api.counts_at_most
            if not api.counts or (most is not None and api.counted >= most):
                return self._json(529, _error(529, "Overloaded"), {})
            if body["model"] == UNKNOWN_MODEL:
                return self._json(404, _error(404, f"model: {UNKNOWN_MODEL}"), {})
            return self._json(200, {"input_tokens": self.server.api.count(body)}, {})
        if not self.path.startswith("/v1/messages"):
            return self._json(404, _error(404, self.path), {})
        headers = {k.lower(): v for k, v in self.headers.items()}
        reply = self.server.api.record(Call(self.path, headers, body))
        if self.server.api.is_strict:
            refusal = api_rules.refusal(body)
            if refusal is not None:
                return self._json(400, _error(400, refusal), {})
        if reply.gate is not None and reply.gate_after == 0:
            try:
                self._wait_or_leave(reply.gate)
            except OSError:
                reply.left.set()
                self.close_connection = True
                return None
        is_plain = reply.stop_reason == "end_turn" and bool(reply.blocks)
        time.sleep(reply.delay_s or (0 if is_plain else self.server.api.thinking_s))
        if reply.status != 200:
            message = reply.message or f"scripted {reply.status}"
            if reply.raw_body is not None:
                return self._send(
                    reply.status, reply.raw_body.encode(), {"content-type": "text/html"}
                )
            return self._json(reply.status, _error(reply.status, message), reply.headers)
        return self._stream(reply, body.get("model", ""))

    def _json(self, status: int, body: JsonObject, headers: dict[str, str]) -> None:
        self._send(status, json.dumps(body).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        all_headers = {
            "content-type": "application/json",
            "request-id": "req_" + uuid.uuid4().hex[:20],
            "content-length": str(len(data)),
            **headers,
        }
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, reply: Reply, model: str) -> None:
        try:
            self._send_stream(reply, model)
        except OSError:
            self.close_connection = True
            reply.left.set()

    def _send_stream(self, reply: Reply, model: str) -> None:
        """Send a reply's events. Raises OSError where the CLI hangs up, at whatever point."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", "req_" + uuid.uuid4().hex[:20])
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for count, (event, times) in enumerate(self._grouped(reply, model), 1):
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() * times
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            if reply.cut_after == count:
                self.close_connection = True
                return
            if reply.gate is not None and reply.gate_after == count:
                self._wait_or_leave(reply.gate)
            if reply.gap_s:
                time.sleep(reply.gap_s)
        self.wfile.write(b"0\r\n\r\n")

    def _grouped(self, reply: Reply, model: str) -> Iterator[tuple[JsonObject, int]]:
        """Yield events with how often to send them at once: a long stream must not wait for us."""
        for _, same in itertools.groupby(reply.events(model), key=id):
            events = list(same)
            step = 1 if reply.gap_s else BURST
            for start in range(0, len(events), step):
                yield events[0], len(events[start : start + step])

    def _wait_or_leave(self, gate: threading.Event) -> None:
        """Wait for the gate, noticing a client that hangs up meanwhile."""
        self.connection.settimeout(0.02)
        deadline = time.monotonic() + 30
        try:
            while not gate.is_set() and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    if self.connection.recv(1) == b"":
                        raise OSError("client left")
        finally:
            self.connection.settimeout(None)


def _error(status: int, message: str) -> JsonObject:
    kind = ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
