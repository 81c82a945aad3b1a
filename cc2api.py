"""cc2api: the Claude Code CLI on this machine as a faithful Anthropic Messages API.

A request comes in over HTTP, is checked once, and is played to a `claude` process over the CLI's
own stream-json protocol. The CLI makes the call with the user's own sign-in. The API's events come
back through it and go out as they arrive. Nothing here talks to Anthropic or sees a credential.

    client ──HTTP bytes──> Exchange ──JSON──> Turn ──> Session ──lines──> `claude` ──> Anthropic
      ^                 (request thread, one per connection)                |
      └──SSE frames / one message <── events <── StreamParser <────lines────┘

A process can serve any later request of the same caller: its conversation is rewound to the longest
prefix that it shares with the request (`Conversation.reusable_prefix`), and the missing messages
are appended. The pool lends each request the session in which that costs least (`Fleet.nearest`).
It also keeps one spare ready: a process that has served nobody yet, initialised, and warmed up by a
query that never went upstream. One thread, the supervisor, starts all processes and reaps them.

    starting ──warm up──> spare (pool) ──acquire──> busy (request) ──release──> idle (pool)
                                                         ^────────acquire──────────┘

Rules that hold throughout:

 1. Data goes one way: HTTP bytes, Turn, lines, events, frames. Raw client JSON is looked at only in
    the section Turn and in those of the three APIs.
 2. A process serves one caller, and one set of betas, for life. A message that was rewound is never
    sent again. Where a CLI cannot rewind, or cannot take another system prompt, each conversation
    gets its own process.
 3. One request is one call upstream. After some answers, and after many refusals, the CLI would
    call again by itself. BLOCK_UPSTREAM_CALLS prevents that as soon as a call has left; where it is
    not certain that the block took effect in time, the process is killed.
 4. Prompts and keys go through pipes only: never into argv, files, an environment or the log.
 5. Upstream gets what the client sent, in the same bytes whichever process sends it. With a login
    the CLI adds reminders of its own, which stay with the first message
    (`Session._append_blocked`). No variable or setting of the user's changes how upstream is asked
    (PINNED_VARIABLES).
 6. A stream's status 200 goes out with its first event, so that an earlier failure keeps its true
    status. After KEEPALIVE_S of silence it goes out without one.

To follow one request, read `Exchange.answer`, then `Gateway.answer`, then `Session.prepare`.

tests/CLI.md lists the facts about the CLI that this file relies on, each with the test that pins
it; "seen" in a comment means observed on the CLI talking to a scripted API, with the versions.
Sections, each using only what stands above it: Settings, Errors and deadlines, JSON, HTTP,
Log and metrics, API keys, Turn, Models, CLI program, CLI messages, Process, Control channel,
Session, Pool, Gateway, Messages API, Schemas, OpenAI, Chat completions, Responses, Status page,
Routes, Demo, Command line.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import collections
import contextlib
import ctypes
import dataclasses
import email.utils
import fcntl
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any, Final, NamedTuple, TypeVar

if sys.version_info < (3, 10):  # noqa: UP036 - the file is valid in 3.8, so that this line runs
    sys.exit("cc2api needs Python 3.10 or newer, and this is " + sys.version.partition(" ")[0])

__version__ = "0.1.0"

JsonObject = dict[str, Any]
_T = TypeVar("_T")
log = logging.getLogger("cc2api")

# The polling interval for conditions that send no signal, such as the end of a process.
POLL_INTERVAL_S: Final = 0.02


# ===================================================================== Settings
# One frozen dataclass, the only place where a default lives. Flags beat CC2API_* variables, and
# those beat defaults. The command line is built from these fields, so help and code cannot differ.

DEFAULT_KEY_FILE: Final = "apikeys.txt"

# 1e9 means no limit. Infinity is excluded because waits raise OverflowError on it.
_NO_LIMIT: Final = 1e9
_ORIGIN: Final = r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+"


def _option(
    default: Any, text: str, form: str = ".*", low: float = 0, high: float = _NO_LIMIT
) -> Any:
    """Return a field of Settings: its default, its help, and which values are accepted.

    `form` is a regular expression for each item of a list, `low` and `high` bound a number.
    """
    return field(default=default, metadata={"help": text, "low": low, "high": high, "form": form})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user can choose; one field, one flag, one CC2API_ variable."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8080, "port to listen on; 0 picks a free one", high=65535)
    claude: str | None = _option(None, "the claude executable (default: searched for)")
    keys: str | None = _option(
        None, f"file of API keys, one a line, re-read every time (default: {DEFAULT_KEY_FILE})"
    )
    allow_open: bool = _option(False, "listen on other addresses than loopback without any key")
    cors_origin: tuple[str, ...] = _option((), "web origin that may call, * for any", _ORIGIN)
    allowed_host: tuple[str, ...] = _option((), "another host name of this server")
    model_map: tuple[str, ...] = _option((), "NAME=MODEL: serve model NAME with MODEL", "[^=]+=.+")
    processes: int = _option(4, "claude processes kept when idle, one of them spare; 0 keeps none")
    max_concurrency: int = _option(8, "requests answered at once", low=1)
    max_queue: int = _option(64, "requests that may wait for their turn")
    timeout: float = _option(600.0, "seconds for a whole answer", low=1)
    drain: float = _option(30.0, "seconds that running answers get at the end")
    bare: bool | None = _option(None, "run claude with --bare (default: with an API key or cloud)")
    setting_sources: str = _option("", "settings to load: user,project,local (default: none)")
    check: bool = _option(False, "check the CLI, sign-in, keys, port and a start, then end")
    demo: bool = _option(False, "answer from a script, without an account")
    debug: bool = _option(False, "log requests and responses whole, prompts included")


# ========================================================= Errors and deadlines
# Everything that a client can be told, as exceptions: raised anywhere, answered in one place
# (Exchange.run). And how every wait ends: by a deadline.

# platform.claude.com/docs: API, Errors
STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402,
    "permission_error": 403, "not_found_error": 404, "conflict_error": 409,
    "request_too_large": 413, "rate_limit_error": 429, "api_error": 500,
    "timeout_error": 504, "overloaded_error": 529,
}  # fmt: skip
_TYPE_BY_STATUS: Final = {status: error_type for error_type, status in STATUS_BY_TYPE.items()}

# Longest time between two looks at whether the client is still there: its leaving is noticed
# within a second.
CLIENT_CHECK_S: Final = 0.5


@dataclass(eq=False)
class ApiError(Exception):
    """An error that the client is shown.

    `type` is Anthropic's error type; where it is not given, the status decides.
    """

    message: str
    status: int = 500
    type: str = ""
    more: JsonObject = field(default_factory=dict)  # further members of the error, as `details`
    retry_after_s: int | None = None
    should_retry: bool | None = None  # False: SDKs would only pay for the same again
    is_for_operator: bool = False  # the message says what to do on the gateway's machine

    def __post_init__(self) -> None:
        super().__init__(self.message)
        if not self.type:
            fallback = "api_error" if self.status >= 500 else "invalid_request_error"
            self.type = _TYPE_BY_STATUS.get(self.status, fallback)


@dataclass(eq=False)
class InvalidRequest(ApiError):
    """The request is at fault; the message starts with the path of the field."""

    status: int = 400


@dataclass(eq=False)
class CliFailed(ApiError):
    """The CLI could not be started, died, or broke its protocol."""

    status: int = 502


def field_path(error: ApiError) -> str:
    """Return the path of the field that a 400 names at the start of its message, "" for none."""
    path = re.match(r"[a-z_]+(?:\.[^\s.:]+)*(?=: )", str(error))
    return path[0] if path and error.status == 400 else ""


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def forget_frames(exc: BaseException | None) -> None:
    """Drop the frames that an exception has passed; to be called where it is handled.

    A frame that names the exception in a variable makes a reference cycle with it, which only the
    garbage collector undoes, perhaps much later; and a request's frames hold a body of 32 MB.
    """
    while exc is not None:
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


class Deadline:
    """A time limit, with a hook that is called while waiting.

    Whoever waits calls `check` before each wait, and waits for `next_wait_s` at most.
    """

    def __init__(
        self, seconds: float, on_wait: Callable[[], None], timeout_error: Exception
    ) -> None:
        self._on_wait = on_wait
        self._timeout_error = timeout_error
        self._at = time.monotonic() + seconds

    def check(self) -> None:
        """Call the hook, which may raise ClientGone; after the time raise `timeout_error`."""
        self._on_wait()
        if time.monotonic() >= self._at:
            raise self._timeout_error

    def next_wait_s(self) -> float:
        """Return for how many seconds to wait before the next `check`."""
        left_s = self._at - time.monotonic()
        return max(0.0, min(left_s, CLIENT_CHECK_S))

    def capped(self, seconds: float, timeout_error: Exception) -> Deadline:
        """Return the earlier of this deadline and one in `seconds` from now, with the same hook."""
        capped = Deadline(seconds, self._on_wait, timeout_error)
        return capped if capped._at < self._at else self


def no_hook() -> None:
    """Do nothing: the hook of a deadline for which no client waits."""


# ========================================================================= JSON
# JSON in slices. The interpreter runs one thread at a time and does not interrupt a function that
# is written in C: to parse or write 30 MB with one call would stop every stream for half a second,
# and the settings that block a second call upstream would come too late. So what is large goes in
# slices, and other threads have their turn in between. The result is the same. Pure.

# What is written as JSON goes in slices from this size on. One slice takes the functions in C some
# two milliseconds.
LARGE_CHARS: Final = 256 * 1024
SLICE_CHARS: Final = 256 * 1024
# What is parsed goes in slices from this size on, which is as much as agents send in a long
# conversation. It takes the functions in C 10 ms.
MAX_BYTES_AT_ONCE: Final = 1024 * 1024
MAX_CONTAINERS_AT_ONCE: Final = 10_000
# Lists and objects in one body. The API takes 100,000 messages, which have three each.
MAX_CONTAINERS: Final = 400_000
# What a value takes in JSON beside its text: quotation marks, commas, short numbers.
_CHARS_AROUND_VALUE: Final = 10

_STRING_PART: Final = re.compile(r'[^"\\]*(?:\\(?:[^u]|u[0-9A-Fa-f]{4})[^"\\]*)*', re.DOTALL)
_HIGH_SURROGATE: Final = re.compile(r"\\u[Dd][89ABab][0-9A-Fa-f]{2}")
_HIGH_SURROGATE_CHARS: Final = 6


def fits_at_once(raw: bytes | bytearray) -> bool:
    """Return whether JSON is so small that the parser in C may have it at once."""
    if len(raw) > MAX_BYTES_AT_ONCE:
        return False

    containers = raw.count(b"[") + raw.count(b"{")
    return containers <= MAX_CONTAINERS_AT_ONCE


def load_json(raw: bytes | bytearray) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, RecursionError."""
    if fits_at_once(raw):
        return json.loads(raw.decode("utf-8"))
    return load_in_slices(raw)


def load_in_slices(raw: bytes | bytearray) -> Any:
    """Parse JSON in UTF-8, however large. Raises ValueError, RecursionError.

    It may hold MAX_CONTAINERS lists and objects, and no half emoji, NaN or infinity.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for start in range(0, len(raw), SLICE_CHARS):
        # This grows in place. To join the parts at the end would be one call that touches 30 MB of
        # new memory, which was seen to take 100 ms on a busy machine.
        text += decoder.decode(raw[start : start + SLICE_CHARS])
    text += decoder.decode(b"", final=True)
    return _SlicedDecoder().decode(text)


class _SlicedDecoder(json.JSONDecoder):
    """The standard library's JSON parser written in Python, with our own scanner for strings.

    The standard library keeps that form as a fallback, and does not document it (tried with Python
    3.10 to 3.14).
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=self._refuse_constant, parse_float=self._to_finite_float)
        undocumented: Any = json.decoder
        self._containers = 0
        self.parse_string = _scan_string
        self.parse_array = self._counting(undocumented.JSONArray)
        self.parse_object = self._counting(undocumented.JSONObject)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _counting(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_counted(*arguments: Any) -> Any:
            self._containers += 1
            if self._containers > MAX_CONTAINERS:
                raise ValueError(f"over {MAX_CONTAINERS} lists and objects")
            return parse(*arguments)

        return parse_counted

    @staticmethod
    def _refuse_constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    @staticmethod
    def _to_finite_float(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits[:20]} is out of range")
        return number


def _scan_string(text: str, begin: int, strict: bool = True) -> tuple[str, int]:
    """Return the string whose text starts at `begin`, and the index after its closing quote."""
    string = ""
    start = begin
    while text[start : start + 1] != '"':
        part = _STRING_PART.match(text, start, start + SLICE_CHARS)
        end = part.end() if part else start

        # Do not cut between the two escapes of one emoji: the first one waits for the next slice.
        last_escape = end - _HIGH_SURROGATE_CHARS
        is_followed_by_escape = text[end : end + 1] == "\\"
        is_first_half = _HIGH_SURROGATE.fullmatch(text, last_escape, end)
        if last_escape > start and is_followed_by_escape and is_first_half:
            end = last_escape
        if end == start:
            raise json.JSONDecodeError("Unterminated string, or a bad escape in it", text, start)

        quoted = text[start:end] + '"'
        unescaped, _ = json.decoder.scanstring(quoted, 0, strict)  # type: ignore[attr-defined]
        if not unescaped.isascii():
            # Refuse half an emoji here, and not when it is sent.
            unescaped.encode("utf-8")
        # This grows in place, as in `load_in_slices`.
        string += unescaped
        start = end
    return string, start + 1


def is_small(value: Any) -> bool:
    """Return whether a value is so small that the functions in C may write it as JSON at once."""
    left = LARGE_CHARS
    unseen = [value]
    while unseen:
        node = unseen.pop()
        left -= _CHARS_AROUND_VALUE
        if isinstance(node, str):
            left -= len(node)
        elif isinstance(node, dict):
            unseen.extend(node.values())
        elif isinstance(node, list):
            unseen.extend(node)
        if left < 0:
            return False
    return True


def json_pieces(value: Any, *, sort_keys: bool = False) -> Iterator[str]:
    """Yield a value as `json.dumps` would write it, in ASCII, in pieces of some SLICE_CHARS."""
    if is_small(value):
        yield json.dumps(value, sort_keys=sort_keys)
    elif isinstance(value, str):
        yield '"'
        for start in range(0, len(value), SLICE_CHARS):
            yield json.dumps(value[start : start + SLICE_CHARS])[1:-1]
        yield '"'
    elif isinstance(value, dict):
        members = sorted(value.items()) if sort_keys else value.items()
        separator = "{"
        for name, member in members:
            yield f"{separator}{json.dumps(name)}: "
            yield from json_pieces(member, sort_keys=sort_keys)
            separator = ", "
        yield "}"
    else:
        separator = "["
        for member in value:
            yield separator
            yield from json_pieces(member, sort_keys=sort_keys)
            separator = ", "
        yield "]"


def dump_json(value: Any) -> str:
    """Return a value as `json.dumps` writes it."""
    return "".join(json_pieces(value))


def is_blank(text: str, white_space: str | None = None) -> bool:
    """Return whether a text is empty or white space alone.

    `white_space` are the characters that count as such; by default those that Python knows.
    """
    for start in range(0, len(text), SLICE_CHARS):
        if text[start : start + SLICE_CHARS].strip(white_space):
            return False
    return True


def as_object(value: Any) -> JsonObject:
    """Return a value if it is an object, else an empty one: for optional parts of foreign JSON."""
    return value if isinstance(value, dict) else {}


def without_nulls(owner: JsonObject) -> JsonObject:
    """Return an object less its fields that are null."""
    return {name: value for name, value in owner.items() if value is not None}


# ========================================================================= HTTP
# Sockets, framing, and the writing of one response; knows nothing of models. Framing is strict: a
# proxy in front that reads it differently could be made to smuggle requests in. No response header
# is built from client text. Each connection has a thread of its own.

MAX_BODY_BYTES: Final = 32 * 1024 * 1024  # the Messages API's own limit
MAX_CONNECTIONS: Final = 512  # open at once, each a thread; far below the usual 1024 descriptors
MAX_HEADERS: Final = 100  # http.server's own limit
MAX_HEAD_BYTES: Final = 64 * 1024  # request line and headers together
HEAD_TIMEOUT_S: Final = 15.0  # for a whole head, so that half-open connections go
BODY_TIMEOUT_S: Final = 120.0  # for a whole body: 32 MB at 2 Mbit/s
IDLE_CONNECTION_S: Final = 120.0  # longer than proxies keep theirs (60 s)
# After an early answer the rest of the request is read and dropped for so long: a reset, sent
# because of unread bytes, would destroy the answer on its way.
LINGER_S: Final = 2.0
ACCEPT_INTERVAL_S: Final = 0.1  # how soon a signal is noticed, and the end of the last answer
LISTEN_BACKLOG: Final = 128  # socketserver's 5 refuses a burst of parallel clients
READ_BYTES: Final = 64 * 1024  # a Linux pipe's capacity
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's status for a client that left; nobody is sent it

# No pattern may match a byte in two ways: backtracking on hostile input would take minutes.
_REQUEST_LINE: Final = re.compile(r"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])")
# The forms of a target (RFC 9112, 3.2): a path, the same with a host before it as proxies are sent
# it, or * for the whole server. After a host the path may be empty.
_TARGET: Final = re.compile(
    r"(?:[Hh][Tt][Tt][Pp][Ss]?://(?P<host>[^/?#@]+))?"
    r"(?P<path>/[^?]*|(?=\?|\Z))(?:\?.*)?"
    r"|(?P<server>\*)"
)
_HEADER_LINE: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_CHUNK_LINE: Final = re.compile(r"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_HANGUP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_TOO_LARGE: Final = f"Request exceeds the maximum size of {MAX_BODY_BYTES} bytes"


class Head(NamedTuple):
    """A request line and its headers, by names in lower case; those of one name are joined."""

    method: str
    path: str  # without the query, percent-decoded
    is_http_11: bool
    headers: Mapping[str, str]

    def get(self, name: str) -> str:
        """Return a header, "" where it is absent."""
        return self.headers.get(name, "")


class ClientStream(io.RawIOBase):
    """The client's end of a connection: `read_head`, `parse_framing`, then perhaps `read_body`.

    All of them raise ClientGone, and for bad framing InvalidRequest, with status 408 where the
    bytes do not come in time.
    """

    def __init__(self, sock: socket.socket, send_timeout_s: float) -> None:
        """`send_timeout_s`: how long a client may read nothing of what it is sent."""
        self.body_length: int | None = 0  # bytes still to be read; None: unknown
        self._sock = sock
        self._send_timeout_s = send_timeout_s
        self._read_until = 0.0  # monotonic; deadline of what is being read
        self._reader = io.BufferedReader(self)
        self._watch = select.poll()
        self._watch.register(sock, select.POLLIN | _HANGUP)

    def read_head(self, idle_s: float) -> Head:
        """Read the next request's head, waiting up to `idle_s` for its first byte."""
        self.body_length = None
        self._read_until = time.monotonic() + idle_s
        self._reader.peek(1)

        self._read_until = time.monotonic() + HEAD_TIMEOUT_S
        lines = self._read_lines()
        if not lines:
            # One empty line may come before a request (RFC 9112, 2.2).
            lines = self._read_lines()
        request_line = lines[0] if lines else ""
        request = _REQUEST_LINE.fullmatch(request_line)
        if request is None:
            raise InvalidRequest("malformed request line")
        method = request[1]
        is_http_11 = request[3] == "1"

        headers = _parse_headers(lines[1:])
        has_two_hosts = "," in headers.get("host", "")
        lacks_host = is_http_11 and "host" not in headers
        if has_two_hosts or lacks_host:
            raise InvalidRequest("exactly one Host header is needed")

        target = _TARGET.fullmatch(request[2])
        if target is None or (target["server"] and method != "OPTIONS"):
            raise InvalidRequest("malformed request target")
        if target["host"]:
            # It wins over the header (RFC 9112, 3.2.2).
            headers["host"] = target["host"]
        path = urllib.parse.unquote(target["server"] or target["path"] or "/")
        return Head(method, path, is_http_11, headers)

    def parse_framing(self, head: Head) -> None:
        """Learn how long the body is. Raises InvalidRequest where two readers could disagree."""
        length = head.headers.get("content-length", "0")
        if "transfer-encoding" in head.headers:
            is_chunked = head.is_http_11 and head.get("transfer-encoding").lower() == "chunked"
            if not is_chunked or "content-length" in head.headers:
                raise InvalidRequest("Transfer-Encoding must be chunked, without a Content-Length")
        elif not re.fullmatch("[0-9]+", length):
            raise InvalidRequest("Content-Length must be given once, as a decimal number")
        elif len(length) > len(str(MAX_BODY_BYTES)) or int(length) > MAX_BODY_BYTES:
            raise InvalidRequest(_TOO_LARGE, status=413)
        else:
            self.body_length = int(length)

    def read_body(self) -> bytes:
        self._read_until = time.monotonic() + BODY_TIMEOUT_S
        if self.body_length is None:
            body = self._read_chunks()
        else:
            body = self._reader.read(self.body_length)
        self.body_length = 0
        return body

    def _read_chunks(self) -> bytes:
        body = bytearray()
        while chunk := _CHUNK_LINE.fullmatch(self._read_line()):
            size = int(chunk[1], 16)
            if len(body) + size > MAX_BODY_BYTES:
                raise InvalidRequest(_TOO_LARGE, status=413)
            if size == 0:
                # Trailers are read and dropped.
                self._read_lines()
                return bytes(body)
            body += self._reader.read(size)
            if self._reader.read(2) != b"\r\n":
                raise InvalidRequest("a chunk is longer than announced")
        raise InvalidRequest("malformed chunk")

    def _read_lines(self) -> list[str]:
        """Read the lines of a head, or of trailers, up to an empty one."""
        lines: list[str] = []
        left = MAX_HEAD_BYTES
        while line := self._read_line(left):
            lines.append(line)
            left -= len(line) + len("\r\n")
            # One more than headers, for the request line.
            if len(lines) > MAX_HEADERS + 1:
                raise InvalidRequest(f"over {MAX_HEADERS} headers", status=431)
        return lines

    def _read_line(self, limit: int = MAX_HEAD_BYTES) -> str:
        line = self._reader.readline(limit)
        if not line.endswith(b"\r\n"):
            status = 400 if line.endswith(b"\n") else 431
            raise InvalidRequest("a line is too long, or does not end with CR LF", status)
        return line[:-2].decode("latin-1")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what comes before the deadline; io.BufferedReader calls this."""
        too_late = InvalidRequest("timed out reading the request", status=408)
        left_s = self._read_until - time.monotonic()
        if left_s <= 0:
            raise too_late
        try:
            self._sock.settimeout(left_s)
            count = self._sock.recv_into(buffer)
        except TimeoutError:
            raise too_late from None
        except OSError as exc:
            raise ClientGone from exc
        if count == 0:
            raise ClientGone
        return count

    def check(self) -> None:
        """Raise ClientGone where the client has closed its end. Does not block."""
        try:
            for _, events in self._watch.poll(0):
                if events & _HANGUP:
                    raise ClientGone
                # Readable, and nothing to be read: it was closed.
                if not self._sock.recv(1, socket.MSG_PEEK):
                    raise ClientGone
        except OSError as exc:
            raise ClientGone from exc

    def send(self, data: bytes) -> None:
        self._sock.settimeout(self._send_timeout_s)
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise ClientGone from exc

    def linger(self) -> None:
        """Say that nothing more comes, and read on for a moment what the client still sends."""
        self._read_until = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError, InvalidRequest, ClientGone):
            self._sock.shutdown(socket.SHUT_WR)
            while True:
                self.readinto(bytearray(READ_BYTES))


def _inflate(raw: bytes) -> Iterator[bytes]:
    """Yield the parts of a body in gzip or deflate. Raises zlib.error where it is broken."""
    is_gzip_or_zlib = zlib.MAX_WBITS | 32
    decoder = zlib.decompressobj(is_gzip_or_zlib)
    # In slices: the decoder copies what it has not used of its input each time.
    for start in range(0, len(raw), READ_BYTES):
        left = raw[start : start + READ_BYTES]
        while left and not decoder.eof:
            yield decoder.decompress(left, READ_BYTES)
            left = decoder.unconsumed_tail
        if decoder.eof and (decoder.unused_data or start + READ_BYTES < len(raw)):
            raise zlib.error("there is more behind its end")
    yield decoder.flush()
    if not decoder.eof:
        raise zlib.error("it is cut short")


def _inflate_zstd(raw: bytes) -> Iterator[bytes]:
    """Yield the parts of a body in zstd. Raises ZstdError where it is broken."""
    decoder = _zstd.ZstdDecompressor()
    while not decoder.eof:
        yield decoder.decompress(raw, READ_BYTES)
        # The decoder keeps what it has not decoded yet.
        raw = b""
        if decoder.needs_input and not decoder.eof:
            raise _zstd.ZstdError("it is cut short")
    if decoder.unused_data:
        raise _zstd.ZstdError("there is more behind its end")


# How bodies may come, beside plainly, and how a broken one is told.
_DECODERS: Final = {"gzip": _inflate, "x-gzip": _inflate, "deflate": _inflate}
_BROKEN_BODY: list[type[Exception]] = [zlib.error]
_zstd: Any = None
with contextlib.suppress(ImportError):
    # Python has it from 3.14 on, where it was built with it.
    _zstd = importlib.import_module("compression.zstd")
    _DECODERS["zstd"] = _inflate_zstd
    _BROKEN_BODY.append(_zstd.ZstdError)


def check_encoding(encoding: str) -> None:
    """Refuse a Content-Encoding that cannot be read. Raises InvalidRequest."""
    if encoding not in ("", "identity", *_DECODERS):
        problem = f"Content-Encoding: only {', '.join(_DECODERS)} and identity are taken"
        hint = "have the client send its requests uncompressed"
        if encoding == "zstd":
            hint = "set features.enable_request_compression = false for Codex, or use Python 3.14"
        details = {"error_code": "request_body_encoding_unsupported"}
        raise InvalidRequest(f"{problem}: {hint}", more={"details": details})


def decode_body(raw: bytes, encoding: str) -> bytes:
    """Return a body as it was before it was compressed. Raises InvalidRequest."""
    if encoding not in _DECODERS:
        return raw

    body = bytearray()
    try:
        for part in _DECODERS[encoding](raw):
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise InvalidRequest(_TOO_LARGE, status=413)
    except tuple(_BROKEN_BODY) as exc:
        raise InvalidRequest(f"The request body is not valid {encoding}: {exc}") from None
    return bytes(body)


def _parse_headers(lines: Iterable[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise InvalidRequest("malformed header line")
        name = header[1].lower()
        value = header[2].strip(" \t")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


class Response:
    """The response to one request, whole or a stream."""

    def __init__(self, stream: ClientStream, head: Head, headers: Mapping[str, str]) -> None:
        self.status = 0  # what was sent, 0 while nothing was
        self.closes = True  # the connection ends with it
        self.written_at = time.monotonic()  # when something was last written
        self._stream = stream
        self._head = head
        self._headers = dict(headers)

    def add_headers(self, headers: Mapping[str, str]) -> None:
        self._headers.update(headers)

    def send(
        self, status: int, body: JsonObject | str, content_type: str = "application/json"
    ) -> bytes:
        """Write a whole response; return its body. HEAD and status 204 go without one."""
        if isinstance(body, str):
            data = body.encode()
        else:
            data = json.dumps(body).encode("ascii") + b"\n"

        headers = {}
        if status != 204:
            headers = {"content-type": content_type, "content-length": str(len(data))}
        head = self._to_head(status, headers)
        self._stream.send(head if self._head.method == "HEAD" else head + data)
        return data

    def write_chunk(self, data: bytes, *, is_last: bool = False) -> None:
        """Write a part of a stream with one write, the first one after its head."""
        # An empty chunk would end the body.
        if not data:
            return
        headers = {"content-type": "text/event-stream; charset=utf-8"}
        # With HTTP/1.0 the end of the connection is the end of the body.
        if self._head.is_http_11:
            headers["transfer-encoding"] = "chunked"
            end = b"0\r\n\r\n" if is_last else b""
            data = b"%x\r\n%b\r\n%b" % (len(data), data, end)
        if not self.status:
            data = self._to_head(200, headers) + data
        self._stream.send(data)
        self.written_at = time.monotonic()

    def _to_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the status line and headers; all names and values are our own."""
        self.status = status
        keeps_alive = self._head.is_http_11 and "close" not in self._head.get("connection").lower()
        # After a body that was not read, nobody knows where the next request begins.
        has_unread_body = self._stream.body_length != 0
        self.closes = not keeps_alive or has_unread_body

        phrases = BaseHTTPRequestHandler.responses
        phrase = phrases[status][0] if status in phrases else "Error"
        lines = [
            f"HTTP/1.1 {status} {phrase}",
            f"server: cc2api/{__version__}",
            f"date: {email.utils.formatdate(usegmt=True)}",
            f"connection: {'close' if self.closes else 'keep-alive'}",
            "cache-control: no-store",
        ]
        for name, value in {**self._headers, **headers}.items():
            lines.append(f"{name}: {value}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def to_sse_frames(events: Iterable[JsonObject]) -> bytes:
    """Return events as SSE frames, each named by its type where it has one.

    They are ASCII, because some clients also split lines at U+2028.
    """
    frames = []
    for event in events:
        if "type" in event:
            frames.append(f"event: {event['type']}\n")
        frames.append(f"data: {json.dumps(event)}\n\n")
    return "".join(frames).encode("ascii")


class Server(ThreadingHTTPServer):
    """The listening socket; every connection gets a thread that runs the handler it is given."""

    allow_reuse_port = False  # some Pythons would let a second gateway listen on the same port
    request_queue_size = LISTEN_BACKLOG
    server_bind = TCPServer.server_bind  # HTTPServer's asks DNS for our own name

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        """Bind and listen. Raises OSError. `serve` comes next."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.gateway: Any = None  # what the handlers serve
        self.running_responses = 0
        self.parsing_lock = threading.Lock()  # whoever holds it parses a large body
        self._count_lock = threading.Lock()  # guards running_responses where it is written
        super().__init__(address, handler)
        self.server_port: int = self.server_address[1]

    def serve(self, gateway: object) -> None:
        """Have the handlers serve this, each in a thread, until `shutdown` and `server_close`."""
        self.gateway = gateway
        threading.Thread(
            target=self.serve_forever, args=[ACCEPT_INTERVAL_S], name="cc2api-accept", daemon=True
        ).start()

    def is_closed(self) -> bool:
        """Return whether `server_close` was called: no request is answered any more."""
        return self.fileno() < 0

    @contextlib.contextmanager
    def track_response(self) -> Iterator[None]:
        """Count a response as running."""
        with self._count_lock:
            self.running_responses += 1
        try:
            yield
        finally:
            with self._count_lock:
                self.running_responses -= 1

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Run a connection's handler; over MAX_CONNECTIONS it is closed at once."""
        if threading.active_count() <= MAX_CONNECTIONS:
            super().finish_request(request, client_address)
        else:
            log.warning("over %d connections: one was turned away", MAX_CONNECTIONS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A connection that broke is not worth a line.
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("connection from %s failed", client_address)


# ============================================================== Log and metrics
# What is told of each request, in the log and in numbers since the start. Callers go by name, never
# by key, and no label holds what a client made up. Any thread.

MAX_LOG_BACKLOG_CHARS: Final = 4_000_000  # of lines that wait to be written; some 20,000
STDOUT: Final = 1  # the descriptors
STDERR: Final = 2
LOG_FLUSH_S: Final = 1.0  # at the end of the program, for a stderr that is read
MAX_LOGGED_PATH_CHARS: Final = 200
MAX_LOGGED_MODEL_CHARS: Final = 100
MAX_LOGGED_ERROR_CHARS: Final = 200


class MetricFamily(NamedTuple):
    """The metrics of one name."""

    type: str  # "counter", "histogram" or "gauge"
    help: str


METRIC_FAMILIES: Final = {
    "cc2api_processes": MetricFamily("gauge", "Processes of claude by state."),
    "cc2api_waiting_requests": MetricFamily("gauge", "Requests that wait for a process."),
    "cc2api_signed_in": MetricFamily("gauge", "0 where claude says that it is not signed in."),
    "cc2api_requests_total": MetricFamily("counter", "Requests answered."),
    "cc2api_tokens_total": MetricFamily("counter", "Tokens as upstream counted them."),
    "cc2api_cost_usd_total": MetricFamily("counter", "Cost as the CLI reported it, one turn late."),
    "cc2api_time_to_first_token_seconds": MetricFamily(
        "histogram", "From the request to its answer's first delta."
    ),
    "cc2api_request_duration_seconds": MetricFamily(
        "histogram", "From the request to the end of its answer."
    ),
}
_BUCKETS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, math.inf)
# The fields of upstream's `usage` that are counted, each with its label in the metrics.
TOKEN_KINDS: Final = {
    "input_tokens": "input", "output_tokens": "output",
    "cache_read_input_tokens": "cache_read", "cache_creation_input_tokens": "cache_write",
}  # fmt: skip

Labels = tuple[tuple[str, str], ...]  # pairs of a name and a value
Gauges = Mapping[str, Sequence[tuple[dict[str, str], int]]]  # by name: labels and value of each


def sanitized(text: str, limit: int) -> str:
    """Make client text fit for a key=value log line: no spaces, quotes or control characters."""
    return re.sub(r"[^\x21-\x7e]|[\"\\=]", "_", text[:limit]) or "-"


class Metrics:
    """Counters and histograms since the start."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self._lock = threading.Lock()  # guards what follows
        # family -> (suffix of its name, labels) -> value
        self._samples: dict[str, dict[tuple[str, Labels], float]] = {
            name: collections.defaultdict(float)
            for name, family in METRIC_FAMILIES.items()
            if family.type != "gauge"
        }

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter, or an observation in seconds to a histogram."""
        pairs: Labels = tuple(labels.items())
        with self._lock:
            samples = self._samples[name]
            if METRIC_FAMILIES[name].type == "counter":
                samples["", pairs] += value
                return

            for bound in _BUCKETS_S:
                bucket: Labels = (*pairs, ("le", _format_number(bound)))
                samples["_bucket", bucket] += 1 if value <= bound else 0
            samples["_sum", pairs] += value
            samples["_count", pairs] += 1

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return the values of a family, each with its labels."""
        with self._lock:
            return [(dict(labels), value) for (_, labels), value in self._samples[name].items()]

    def render(self, gauges: Gauges) -> str:
        """Return all in Prometheus' text format (prometheus.io: exposition formats)."""
        lines: list[str] = []
        for name, values in gauges.items():
            lines += _family_lines(name)
            for labels, value in values:
                lines.append(_sample_line(name, tuple(labels.items()), value))

        with self._lock:
            for name, samples in self._samples.items():
                lines += _family_lines(name)
                for (suffix, pairs), total in samples.items():
                    lines.append(_sample_line(name + suffix, pairs, total))
        return "\n".join(lines) + "\n"


def _family_lines(name: str) -> list[str]:
    family = METRIC_FAMILIES[name]
    return [f"# HELP {name} {family.help}", f"# TYPE {name} {family.type}"]


def _sample_line(name: str, labels: Labels, value: float) -> str:
    quoted = ",".join(f"{label}={json.dumps(text, ensure_ascii=False)}" for label, text in labels)
    braces = f"{{{quoted}}}" if labels else ""
    return f"{name}{braces} {_format_number(value)}"


def _format_number(value: float) -> str:
    return "+Inf" if value == math.inf else f"{value:.12g}"


class RequestLog:
    """What is told of one request: its log lines, and its part in the metrics."""

    def __init__(self, metrics: Metrics, route: str, client: str, method: str, path: str) -> None:
        self.request_id = "req_" + uuid.uuid4().hex[:24]
        self.asks_model = False
        self._metrics = metrics
        self._route = route
        self._model = "none"
        self._caller = "none"
        self._fields: dict[str, object] = {
            "method": method,
            "path": sanitized(path, MAX_LOGGED_PATH_CHARS),
            "id": self.request_id,
            "client": client,
        }
        self._usage: dict[str, int] = {}  # tokens as upstream counts them
        self._started_at = time.monotonic()
        self._has_first_token = False

    def add(self, **fields: object) -> None:
        """Add fields to the line that is logged at the end."""
        self._fields.update(fields)

    def add_caller(self, name: str) -> None:
        self._caller = name
        self.add(caller=name)

    def add_model(self, model: str, *, stream: bool, is_known: bool) -> None:
        """Add which model is asked; one that the CLI does not list counts as `other`."""
        self.asks_model = True
        self._model = model if is_known else "other"
        self.add(model=sanitized(model, MAX_LOGGED_MODEL_CHARS), stream=int(stream))

    def add_events(self, batch: Sequence[JsonObject]) -> None:
        """Add what a batch of Anthropic's events tells: tokens, and that the answer has begun."""
        for event in batch:
            usage = event.get("usage") or (event.get("message") or {}).get("usage") or {}
            for name in TOKEN_KINDS:
                if isinstance(usage.get(name), int):
                    self._usage[name] = usage[name]

            stop_reason = as_object(event.get("delta")).get("stop_reason")
            if stop_reason:
                self.add(stop_reason=sanitized(str(stop_reason), MAX_LOGGED_MODEL_CHARS))
            if event["type"] == "content_block_delta" and not self._has_first_token:
                self._has_first_token = True
                seconds = time.monotonic() - self._started_at
                log.info("event=first_token id=%s duration_ms=%d", self.request_id, seconds * 1000)
                self.add(first_token_ms=round(seconds * 1000))
                self._metrics.add("cc2api_time_to_first_token_seconds", seconds)

    def debug(self, event: str, data: bytes) -> None:
        """Log a request or a response whole, under --debug; a line stays a line."""
        if log.isEnabledFor(logging.DEBUG):
            text = json.dumps(data.decode("utf-8", "replace"), ensure_ascii=False)
            log.debug("event=%s id=%s body=%s", event, self.request_id, text)

    def finish(self, status: int) -> None:
        """Count the request, and log the line of its end."""
        seconds = time.monotonic() - self._started_at
        self._metrics.add(
            "cc2api_requests_total",
            route=self._route,
            model=self._model,
            caller=self._caller,
            status=str(status),
        )
        if self.asks_model:
            self._metrics.add("cc2api_request_duration_seconds", seconds, route=self._route)
        for name, count in self._usage.items():
            kind = TOKEN_KINDS[name]
            self._metrics.add("cc2api_tokens_total", count, kind=kind, caller=self._caller)

        self.add(**self._usage, status=status, duration_ms=round(seconds * 1000))
        pairs = " ".join(f"{name}={value}" for name, value in self._fields.items())
        # Requests that watch the gateway itself come every few seconds, and agents look for some
        # twenty routes of other servers before each message (/api/tags, /props, /version).
        is_monitoring = self._route in ("status", "healthz", "metrics") and status == 200
        is_probe = self._route == "none" and status == 404 and self._fields["method"] == "GET"
        is_minor = is_monitoring or is_probe
        log.log(logging.DEBUG if is_minor else logging.INFO, "event=done %s", pairs)


class LogHandler(logging.Handler):
    """Writes log lines to stderr, on a thread of its own.

    Nothing waits for whoever reads them: a terminal that is stopped, or a pager. Up to
    MAX_LOG_BACKLOG_CHARS wait to be written; lines over that are dropped and counted. A stderr that
    cannot be written to, as on a full disk, loses lines and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()  # guards what follows
        self._lines: collections.deque[str] = collections.deque()
        self._backlog_chars = 0  # of the lines that wait, and of the one that is being written
        self._dropped = 0
        threading.Thread(target=self._write_all, name="cc2api-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        with self._changed:
            # A line larger than the whole backlog, a body under --debug, may still be the only one.
            if self._lines and self._backlog_chars + len(line) > MAX_LOG_BACKLOG_CHARS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._backlog_chars += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, up to LOG_FLUSH_S. Called at the end of the program."""
        with self._changed:
            self._changed.wait_for(lambda: not self._backlog_chars, LOG_FLUSH_S)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                dropped = self._dropped
                self._dropped = 0

            text = line
            if dropped:
                message = f"{dropped} log lines were dropped: nobody read them"
                record = logging.makeLogRecord({"levelname": "WARNING", "msg": message})
                text = f"{self.format(record)}\n{line}"
            with contextlib.suppress(OSError):
                write_whole(STDERR, text.encode("utf-8", "backslashreplace"))

            with self._changed:
                self._backlog_chars -= len(line)
                self._changed.notify_all()


def write_whole(descriptor: int, data: bytes) -> None:
    """Write to STDOUT or STDERR, waiting as long as it takes. Raises OSError.

    Not by `sys.stderr`: the lock of its buffer would still be held at the end of the program, and
    what a buffer could not write would be tried again then.
    """
    while data:
        try:
            written = os.write(descriptor, data)
        except BlockingIOError:
            # Another process that shares the descriptor may have made it non-blocking.
            select.select([], [descriptor], [])
        else:
            data = data[written:]


class LogFormatter(logging.Formatter):
    """Formats lines as `time=... level=info event=done status=200 ...`.

    A message that does not start with `event=` becomes `event=log msg="..."`.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not str(record.msg).startswith("event="):
            text = f"event=log msg={json.dumps(text, ensure_ascii=False)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"time={when}.{record.msecs:03.0f}Z level={record.levelname.lower()} {text}"


# ===================================================================== API keys
# Who may call. The file is read on every request, so a change takes effect at once. Fails closed:
# everybody may call (open mode) only where no key file was named, where the default one is not
# there or holds no key, and where the gateway listens on loopback (or --allow-open was given).

MIN_NAMED_KEY_CHARS: Final = 12  # the last four characters of a shorter key would tell too much
KEY_TAIL_CHARS: Final = 4  # of a key without a name, to name its caller by
# A file that held keys and holds none is perhaps being written anew: its keys go on for so long.
KEY_FILE_GRACE_S: Final = 2.0
# Localhost and IP addresses: no name in the DNS has one of these forms.
_OWN_NAME: Final = re.compile(r"localhost|[0-9.]+|\[[0-9a-f:.]+\]")


class Caller(NamedTuple):
    """Who makes a request."""

    name: str  # for the log and the metrics
    key_digest: bytes  # what tells one caller's conversations from another's


# The gateway itself as a caller. In open mode its name is that of all callers.
NOBODY: Final = Caller("open", b"")


class KeyFile:
    """The file of keys: one a line, a name may follow; blank lines and # lines are ignored.

    Its methods may be called on any thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = Path(settings.keys or DEFAULT_KEY_FILE)
        self.summary = ""  # who may call, in a few words, as of the last load
        self.is_named = settings.keys is not None
        is_loopback = re.fullmatch(r"localhost|127\.[\d.]+|::1", settings.host)
        may_be_open = bool(is_loopback) or settings.allow_open
        self.is_needed = self.is_named or not may_be_open
        self._lock = threading.Lock()  # guards what follows, and `summary` where it is written
        self._keys: dict[str, str] = {}  # names by key, as last read
        self._emptied_at: float | None = None  # monotonic; since when the file holds no key
        self.load()

    def load(self) -> dict[str, str] | None:
        """Return the callers' names by key: {} where anybody may call, None where nobody may."""
        with self._lock:
            return self._load()

    def _load(self) -> dict[str, str] | None:
        keys: dict[str, str] | None = None
        problem = "it holds no key"
        if not self.is_named:
            problem += ", and --host is not loopback"
        try:
            keys = self._read()
        except UnicodeDecodeError:
            problem = "it is not UTF-8"
        except OSError as exc:
            problem = str(exc.strerror)

        if keys:
            summary = f"{len(keys)} in {self.path}"
        elif keys is not None and not self.is_needed:
            summary = "open: anyone who can connect may call"
        else:
            keys = None
            summary = f"NOBODY CAN CALL: {self.path}: {problem}; see --keys and --allow-open"

        if self.summary not in ("", summary):
            log.warning("keys changed: %s", summary)
        self.summary = summary
        return keys

    def _read(self) -> dict[str, str]:
        """Return the callers' names by key. Raises OSError, UnicodeDecodeError.

        A file that held keys and holds none is being written anew, perhaps slowly, by a shell or an
        editor, with its comments first: what it held goes on for KEY_FILE_GRACE_S.
        """
        # To read a pipe, for example, could block for ever.
        if self.path.exists() and not self.path.is_file():
            raise OSError(0, "it is not a regular file")

        text = ""
        with contextlib.suppress(FileNotFoundError):
            text = self.path.read_text("utf-8-sig")
        keys = parse_keys(text)

        now = time.monotonic()
        if keys:
            self._keys = keys
            self._emptied_at = None
        elif self._emptied_at is None:
            self._emptied_at = now
        if self._emptied_at is not None and now - self._emptied_at >= KEY_FILE_GRACE_S:
            self._keys = {}
        return self._keys


def parse_keys(text: str) -> dict[str, str]:
    """Return the keys of a file's text, each with its name, or with its last characters.

    Only blanks and tabs part a key from its name: other white space, as Unicode has it, may be a
    byte of the key.
    """
    keys: dict[str, str] = {}
    for line in text.split("\n"):
        key, _, words = line.strip(" \t").replace("\t", " ").partition(" ")
        if not key or key.startswith("#"):
            continue
        name = re.sub(r"[^\w.@-]+", "_", words.strip())
        if not name:
            tail = key[-KEY_TAIL_CHARS:] if len(key) >= MIN_NAMED_KEY_CHARS else ""
            name = f"…{tail}"
        keys[key] = name
    return keys


def authenticate(keys: Mapping[str, str] | None, api_key: str, authorization: str) -> Caller:
    """Return who calls, by the header `x-api-key`, or else by a bearer token.

    `keys` is what KeyFile.load returns. Raises ApiError with status 401. Where both headers are
    sent `x-api-key` wins, as on the public API.
    """
    scheme, _, token = authorization.strip(" \t").partition(" ")
    presented = api_key.strip(" \t")
    if not presented and scheme.lower() == "bearer":
        presented = token.strip(" \t")
    # These are the bytes as they came over the wire.
    raw = presented.encode("latin-1", "replace")
    digest = hashlib.sha256(raw).digest()

    if keys is not None and not keys:
        return Caller(NOBODY.name, digest)

    # Every key is compared, in constant time: neither a prefix nor a position can be timed.
    caller: Caller | None = None
    for key, name in (keys or {}).items():
        is_match = hmac.compare_digest(raw, key.encode())
        if is_match and caller is None:
            caller = Caller(name, digest)
    if caller is None:
        raise ApiError("missing or invalid x-api-key header or bearer token", status=401)
    return caller


def cors_headers(head: Head, settings: Settings) -> dict[str, str]:
    """Return the headers that let a page of this origin read the answer; none for others."""
    for allowed in settings.cors_origin:
        if allowed in ("*", head.get("origin")):
            return {
                "access-control-allow-origin": allowed,
                "vary": "origin",
                "access-control-allow-methods": "GET, POST, OPTIONS",
                "access-control-allow-headers": "authorization, *",  # the star does not cover it
                "access-control-expose-headers": "request-id, x-request-id, retry-after",
                "access-control-max-age": "600",
            }
    return {}


def check_origin(head: Head, settings: Settings) -> None:
    """Refuse web pages of other origins, which a browser would let call. Raises ApiError (403).

    A page of another site is known by its `origin`. A page whose name was made to resolve to this
    machine (DNS rebinding) has the right origin, and is known by the name in `host`.
    """
    host = head.get("host")
    host_name = re.sub(r":\d*\Z", "", host).lower()
    allowed_names = [name.lower() for name in settings.allowed_host]
    is_own_name = not host_name or _OWN_NAME.fullmatch(host_name)
    if not is_own_name and host_name not in allowed_names:
        raise ApiError(f"Host {sanitized(host_name, 100)} is not served; see --allowed-host", 403)

    origin = head.get("origin")
    is_own_origin = origin in ("", f"http://{host}", f"https://{host}")
    if not is_own_origin and not cors_headers(head, settings):
        raise ApiError(f"pages of {sanitized(origin, 100)} may not call; see --cors-origin", 403)


# ========================================================================= Turn
# A checked, frozen request, the same for all three APIs, and what checks it. Refused is only what
# the CLI would silently repair, drop or choke on, and what the code itself would stumble over. All
# else goes upstream, whose own error comes back. Pure: no I/O, any thread.

MAX_JSON_DEPTH: Final = 128  # deep enough for any schema; far from both languages' stack limits
EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
# Models for which the CLI takes `effort` out of the body (read, 2.1.300 and 2.1.332). The API
# refuses it for them.
_LACKS_EFFORT: Final = re.compile(
    r"claude-(3-|opus-4-[01]\b|sonnet-4-[05]\b|haiku-4-5\b|(opus|sonnet)-4([-@]20|\Z))"
)
# Models that think only by a budget. Later ones decide by themselves (`adaptive`).
_LACKS_ADAPTIVE: Final = re.compile(
    r"claude-(3|(opus|sonnet|haiku)-4(-[0-5](?!\d)|[-@]20\d{6}|\Z))"
)
# Models that take `temperature`, `top_p` and `top_k`. Later ones refuse even the presence of such a
# field ("`temperature` is deprecated for this model."), so it is the old ones that are named.
_TAKES_SAMPLING: Final = re.compile(
    r"claude-(instant|[123]\b|(opus|sonnet|haiku)-4(-[0-6](?!\d)|[-@]20\d{6}|\Z))"
)
# How the block begins in which Claude Code says who it is (code.claude.com: llm-gateway-protocol).
ATTRIBUTION_START: Final = "x-anthropic-billing-header:"
# Top-level fields that are not merged into the CLI's own body. Each of the first five is sent in
# another way. The CLI sends metadata of its own, and sets a breakpoint on the last block anyway.
# The last two are older spellings of `output_config`.
_NOT_IN_EXTRA_BODY: Final = (
    "model", "messages", "system", "stream", "tools", "metadata", "cache_control",
    "output_format", "effort",
)  # fmt: skip
_TYPE_NAMES: Final = {str: "string", bool: "boolean", dict: "dictionary", list: "list"}
_BASE64: Final = re.compile("[A-Za-z0-9+/]*")
_IMAGE_STARTS: Final = {  # the formats' magic numbers in base64
    "image/png": "iVBORw0KGgo", "image/jpeg": "/9j/", "image/gif": "R0lGOD", "image/webp": "UklGR",
}  # fmt: skip
# What JavaScript's `trim` and `\s` take for white space, and so what is blank for the CLI.
JS_WHITE_SPACE: Final = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
# Words of the CLI's own for an empty answer; it drops an answer that says only these.
_EMPTY_ANSWERS: Final = ("", "(no content)", "[Empty text removed]")
# The CLI drops the oldest images and documents that are over the API's number, which is higher for
# models with a window of a million tokens. Those it knows by their names, and for others goes by
# this beta (seen, 2.1.300 and 2.1.332: all names that they list, and others).
MAX_MEDIA: Final = 100
MAX_MEDIA_IN_LONG_WINDOW: Final = 600
_HAS_LONG_WINDOW: Final = re.compile(
    r"claude-(opus-4-[78]|opus-5|sonnet-5|fable-5|haiku-5-5)(?!\d)|.*\[1m\]\Z"
)
_LONG_WINDOW_BETA: Final = "context-1m-2025-08-07"
_MEDIA_TYPES: Final = ("image", "document")
THINKING_TYPES: Final = ("thinking", "redacted_thinking")
# What the CLI would drop, or make a text of (seen, 2.1.300 and 2.1.332).
_DROPPED_TYPES: Final = ("advisor_tool_result", "tool_reference")
_FALLBACK_BETA: Final = "server-side-fallback-"  # without it the CLI drops `fallback` blocks too
_ADVISOR: Final = "advisor"  # a tool that upstream runs itself
_NOT_CARRIED: Final = "the CLI does not carry this"
# With them an answer could not be read to its end, or not be sent back.
_UNUSABLE_TOOLS: Final = ("mcp_toolset", "advisor_")
_CALLING_TYPES: Final = ("tool_use", "server_tool_use", "mcp_tool_use")  # blocks that call a tool
_CONTINUE: Final = "Continue."  # stands behind an answer that was paused (`_ends_paused`)
# Betas that are passed on: not those that the CLI sends for itself.
_BETA: Final = re.compile(r"(?!claude-code-|oauth-)[A-Za-z0-9][A-Za-z0-9_.-]*\Z")

Block = JsonObject  # of a message's content, as the Messages API has it
Located = tuple[str, JsonObject]  # an object, after the path under which the client sent it


class Message(NamedTuple):
    """One message, its blocks as the client sent them but for cache breakpoints."""

    role: str  # "user" or "assistant"
    content: list[Block]


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked request: what is sent to a process, and how the answer is wanted."""

    model: str
    stream: bool
    system: str  # "" means the default system prompt
    messages: tuple[Message, ...]  # roles alternating; the last one is the user's
    digests: tuple[bytes, ...]  # one for each message (`digest_message`)
    tools: list[JsonObject]
    extra_body: JsonObject  # merged by the CLI into the top level of its request
    betas: tuple[str, ...]
    cache_breakpoint: JsonObject | None  # the very block or tool that is sent with cache_control
    cache_ttl: str  # "5m" or "1h", for every cache breakpoint of the request
    media_count: int  # images and documents
    # OpenAI's clients send some fields unasked: they are left out where the model refuses them.
    is_lenient: bool = False
    is_login: bool = False  # the CLI runs on a claude.ai login


def parse_json(raw: bytes) -> JsonObject:
    """Parse a request body: a JSON object in UTF-8 that every later step can carry.

    Raises InvalidRequest.
    """
    try:
        if fits_at_once(raw):
            body = json.loads(raw.decode("utf-8"))
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
        else:
            body = load_in_slices(raw)
    except (RecursionError, ValueError) as exc:
        # Also raised for a lone surrogate, for NaN, and for an integer of over 4,300 digits.
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from None

    if not isinstance(body, dict) or is_deeper_than(MAX_JSON_DEPTH, body):
        raise InvalidRequest(f"The body is no JSON object, or nested deeper than {MAX_JSON_DEPTH}")
    return body


def is_deeper_than(depth: int, value: Any) -> bool:
    """Return whether lists and objects are nested deeper than that. Does not recurse."""
    level = [value]  # lists and objects that are equally deep
    for _ in range(depth):
        children: list[Any] = []
        for container in level:
            members = container.values() if isinstance(container, dict) else container
            children.extend(member for member in members if isinstance(member, (dict, list)))
        level = children
    return bool(level)


def require(owner: JsonObject, name: str, expected: type[_T], path: str = "") -> _T:
    """Return a field that must be there. Raises InvalidRequest with the field's path.

    `path` is that of the owner, "" for the whole body.
    """
    field_path = f"{path}.{name}" if path else name
    value = owner.get(name)
    if value is None:
        raise InvalidRequest(f"{field_path}: Field required")
    if not isinstance(value, expected):
        raise InvalidRequest(f"{field_path}: Input should be a valid {_TYPE_NAMES[expected]}")
    return value


def optional(owner: JsonObject, name: str, expected: type[_T], path: str = "") -> _T | None:
    """Return a field, None where it is absent or null. Raises InvalidRequest."""
    if owner.get(name) is None:
        return None
    return require(owner, name, expected, path)


def located_objects(owner: JsonObject, name: str, path: str = "") -> Iterator[Located]:
    """Yield the objects of a list, each with its path; none where the list is absent.

    Raises InvalidRequest where it is no list, or holds anything else.
    """
    list_path = f"{path}.{name}" if path else name
    for index, item in enumerate(optional(owner, name, list, path) or []):
        item_path = f"{list_path}.{index}"
        if item is None:
            raise InvalidRequest(f"{item_path}: Field required")
        if not isinstance(item, dict):
            raise InvalidRequest(f"{item_path}: Input should be a valid dictionary")
        yield item_path, item


def as_blocks(content: Any) -> Any:
    """Return content as a list of blocks: for a string one text block, or none."""
    if not isinstance(content, str):
        return content
    return [{"type": "text", "text": content}] if content else []


def to_turn(
    body: JsonObject,
    messages: Iterable[Located],
    betas: str = "",
    *,
    is_count: bool = False,
    is_lenient: bool = False,
) -> Turn:
    """Return the Turn of a Messages API body. Raises InvalidRequest.

    `messages` stand in for the body's own, so that an error names the path that the client knows.
    `betas` is the anthropic-beta header. A turn whose tokens are counted may end with an answer.
    """
    model = require(body, "model", str)
    if not model.strip():
        raise InvalidRequest("model: String should have at least 1 character")
    extra_body = _parse_extra_body(body)
    if "effort" in as_object(extra_body.get("output_config")) and not is_lenient:
        # The CLI leaves it out for these models, by a list of names of its own.
        if _LACKS_EFFORT.search(model):
            raise InvalidRequest("This model does not support the effort parameter.")

    system_blocks = _parse_system(body)
    system = "\n\n".join(block["text"] for block in system_blocks)
    entries = list(_parse_messages(messages))
    sent_betas = _parse_betas(betas)
    _check_fallbacks(entries, sent_betas)
    if is_count and system:
        # The CLI counts with a system prompt of its own (`Gateway.count_tokens`): the client's is
        # counted as a message.
        entries.insert(0, Entry("user", "system", {"type": "text", "text": system}))

    breakpoints: list[Breakpoint] = []
    tools = _parse_tools(body, breakpoints)

    go_on: list[Entry] = []
    if _ends_paused(entries) and not is_count:
        go_on = [Entry("user", entries[-1].path, {"type": "text", "text": _CONTINUE})]
    merged = _merge_by_role([*_drop_paused_calls(entries), *go_on], breakpoints)
    if merged[-1].role == "assistant" and not is_count:
        problem = "This gateway does not support assistant message prefill."
        raise InvalidRequest(f"messages: {problem} The conversation must end with a user message.")

    # The API takes four breakpoints, and the CLI sets three: on two system blocks and the last of
    # the messages (seen, 2.1.330). The fourth is the client's latest that is not on one of those.
    last_block = merged[-1].content[-1]
    client_only = [each.owner for each in breakpoints if each.owner is not last_block]

    for owner in (body, *system_blocks):
        # Only the ttl is of interest: the CLI sets breakpoints on these itself.
        strip_cache_control(owner, breakpoints)
    # One for all: the API takes no 1h after a 5m, and the CLI's own breakpoints stand before and
    # after the client's.
    cache_ttl = "1h" if any(each.ttl == "1h" for each in breakpoints) else "5m"

    return Turn(
        model=model,
        stream=bool(optional(body, "stream", bool)),
        system=system,
        messages=tuple(merged),
        digests=tuple(digest_message(message) for message in merged),
        tools=tools,
        extra_body=extra_body,
        betas=sent_betas,
        cache_breakpoint=client_only[-1] if client_only else None,
        cache_ttl=cache_ttl,
        media_count=_count_media(merged),
        is_lenient=is_lenient,
    )


def with_login_caching(turn: Turn) -> Turn:
    """Return a turn for a CLI on a claude.ai login, whose breakpoints are 1h (seen, 2.1.330)."""
    return dataclasses.replace(turn, cache_ttl="1h", is_login=True)


def _parse_betas(header: str) -> tuple[str, ...]:
    """Return the betas of an anthropic-beta header that are passed on, each once."""
    names = [name.strip() for name in header.split(",")]
    return tuple(dict.fromkeys(name for name in names if _BETA.match(name)))


def _parse_extra_body(body: JsonObject) -> JsonObject:
    """Return the fields that the CLI merges into its own request; absent and null are alike."""
    extra_body = dict(body)
    for name in _NOT_IN_EXTRA_BODY:
        extra_body.pop(name, None)
    extra_body["output_config"] = _parse_output_config(body)
    extra_body["thinking"] = optional(body, "thinking", dict)
    return without_nulls(extra_body)


def _parse_output_config(body: JsonObject) -> JsonObject | None:
    """Return `output_config`, joined with its older spellings; None where there is nothing."""
    effort = body.get("effort")
    if effort not in (None, *EFFORTS):
        choices = " or ".join(repr(each) for each in EFFORTS)
        raise InvalidRequest(f"effort: Input should be {choices}")

    given = without_nulls(optional(body, "output_config", dict) or {})
    output_config = {"format": body.get("output_format"), "effort": effort}
    output_config.update(given)
    return without_nulls(output_config) or None


def _parse_tools(body: JsonObject, breakpoints: list[Breakpoint]) -> list[JsonObject]:
    """Return the tools less their cache breakpoints, which are appended to `breakpoints`."""
    tools = []
    for path, tool in located_objects(body, "tools"):
        check_callers(f"{path}.allowed_callers", tool.get("allowed_callers"))
        if str(tool.get("type")).startswith(_UNUSABLE_TOOLS):
            raise InvalidRequest(f"{path}.type: {tool['type']}: {_NOT_CARRIED} in answers")
        tools.append(strip_cache_control(tool, breakpoints))
    return tools


def fields_for_model(turn: Turn, model: str) -> JsonObject:
    """Return what a turn merges into the CLI's request. `model` is an id, not an alias.

    A lenient turn leaves out what OpenAI's clients send unasked and the model refuses.
    """
    fields = dict(turn.extra_body)
    if not turn.is_lenient:
        return fields

    if _LACKS_ADAPTIVE.search(model):
        fields.pop("thinking", None)
    # While a model thinks it takes no temperature but 1, and no low top_p.
    if "thinking" in fields or not _TAKES_SAMPLING.search(model):
        fields.pop("temperature", None)
        fields.pop("top_p", None)
    # Models from opus-4-1 on refuse the two together, and OpenAI advises against it.
    if "temperature" in fields:
        fields.pop("top_p", None)
    if _LACKS_EFFORT.search(model):
        output_config = dict(fields.pop("output_config", {}))
        output_config.pop("effort", None)
        if output_config:
            fields["output_config"] = output_config
    return fields


def _parse_system(body: JsonObject) -> list[Block]:
    """Return the system prompt's text blocks; none for a blank string.

    The attribution block of a Claude Code that is the client is left out: the CLI sends its own,
    and upstream drops the entire block that begins so, including a prompt that was joined to it.
    """
    system = body.get("system")
    if isinstance(system, str):
        blocks: list[Block] = [] if is_blank(system) else as_blocks(system)
    else:
        blocks = [block for _, block in located_objects(body, "system")]

    for number, block in enumerate(blocks):
        if is_blank(require(block, "text", str, f"system.{number}")):
            raise InvalidRequest("system: text content blocks must be non-empty")
    return [block for block in blocks if not block["text"].startswith(ATTRIBUTION_START)]


class Entry(NamedTuple):
    """A block of a message, with the message's role and the block's own path."""

    role: str
    path: str
    block: Block


def _parse_messages(messages: Iterable[Located]) -> Iterator[Entry]:
    """Check messages and yield their blocks.

    A `system` message becomes user text, because a system line on stdin makes the CLI exit.
    """
    for path, message in messages:
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise InvalidRequest(f"{path}.role: Input should be 'user' or 'assistant'")

        owner = {"content": as_blocks(message.get("content"))}
        content = require(owner, "content", list, path)
        if not content and role == "system" and "output_config" in message:
            # Claude Code's own note of the effort from here on; the request's fields have it too.
            continue
        if not content:
            raise InvalidRequest(f"{path}: all messages must have non-empty content")

        is_answer = role == "assistant"
        for block_path, block in located_objects(owner, "content", path):
            check_block(block_path, block, is_answer=is_answer)
            is_text = block["type"] == "text"
            if is_text and is_answer and not block["text"]:
                # Answers with a web search have such blocks, and the CLI drops them.
                continue
            if is_text and not is_answer and is_blank(block["text"], JS_WHITE_SPACE):
                # The CLI drops what is blank for JavaScript, as U+FEFF is; but in a tool result it
                # hands it on (seen).
                raise InvalidRequest(f"{block_path}: text content blocks must be non-empty")
            if role == "system":
                block = _to_reminder(block_path, block)
            yield Entry(role, block_path, block)


def _check_fallbacks(entries: Iterable[Entry], betas: Iterable[str]) -> None:
    """Refuse `fallback` blocks without their beta: the CLI would drop them."""
    if any(beta.startswith(_FALLBACK_BETA) for beta in betas):
        return
    for entry in entries:
        if entry.block["type"] == "fallback":
            raise InvalidRequest(f"{entry.path}.type: fallback: {_NOT_CARRIED} without its beta")


def _ends_paused(entries: Sequence[Entry]) -> bool:
    """Return whether a conversation ends with an answer that stopped by `pause_turn`.

    It ends with a call of a tool that upstream runs itself, or with its result. The API goes on
    from there when it is sent back; but the CLI starts from a user's message.
    """
    if not entries or entries[-1].role != "assistant":
        return False
    last_type = str(entries[-1].block["type"])
    return last_type == "server_tool_use" or last_type.endswith("_tool_result")


def _drop_paused_calls(entries: Iterable[Entry]) -> list[Entry]:
    """Return blocks less the calls at whose result an answer was paused.

    The CLI drops a call without its result. Where the answer was continued the model has made it
    again, so that it is not missed.
    """
    kept: list[Entry] = []
    for is_answer, group in itertools.groupby(entries, lambda entry: entry.role == "assistant"):
        joined = list(group)
        if not is_answer:
            kept += joined
            continue
        results = {str(entry.block.get("tool_use_id")) for entry in joined}
        answer = []
        for entry, following in itertools.zip_longest(joined, joined[1:]):
            # It is the last block of the client's message.
            is_last = not following or _message_path(following.path) != _message_path(entry.path)
            is_call = entry.block["type"] == "server_tool_use"
            if not (is_last and is_call and entry.block["id"] not in results):
                answer.append(entry)
        # The CLI drops an answer that says nothing.
        is_left = len(answer) == len(joined) or not all(_says_nothing(e.block) for e in answer)
        kept += answer if is_left else []
    return kept


def _to_reminder(path: str, block: Block) -> Block:
    """Return a block of a system message in the form in which Claude Code sends such text."""
    if block["type"] != "text":
        # `tool_addition` and the like: the CLI takes no line of the role `system`.
        raise InvalidRequest(f"{path}.type: {block['type']}: {_NOT_CARRIED} in a system message")
    text = require(block, "text", str, path)
    return {"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}


def check_block(path: str, block: Block, *, is_answer: bool = False) -> None:
    """Check one content block for what the CLI would not hand on as it is.

    Raises InvalidRequest with the path as the API names it: a block's path ends with its type.
    """
    block_type = require(block, "type", str, path)
    inside = f"{path}.{block_type}"
    if block_type in _DROPPED_TYPES:
        raise InvalidRequest(f"{path}.type: {block_type}: {_NOT_CARRIED}")
    if block_type == "text":
        is_said = not is_blank(require(block, "text", str, inside))
        # The model itself writes blank texts, between its blocks.
        if not is_said and not is_answer:
            raise InvalidRequest(f"{path}: text content blocks must be non-empty")
    elif block_type == "image":
        check_image(f"{inside}.source", require(block, "source", dict, inside))
    elif block_type in _CALLING_TYPES:
        require(block, "id", str, inside)
        name = require(block, "name", str, inside)
        if block_type == "server_tool_use" and name == _ADVISOR:
            raise InvalidRequest(f"{inside}.name: {name}: {_NOT_CARRIED}")
        if block_type == "tool_use":
            caller = optional(block, "caller", dict, inside) or {}
            check_callers(f"{inside}.caller", [caller.get("type", "direct")])
    elif block_type == "tool_result":
        _check_tool_result(inside, block)


def _check_tool_result(path: str, block: Block) -> None:
    require(block, "tool_use_id", str, path)
    if isinstance(block.get("content"), str):
        return
    for part_path, part in located_objects(block, "content", path):
        check_block(part_path, part)
        # The CLI would drop anything else.
        if block.get("is_error") and part["type"] != "text":
            raise InvalidRequest(f"{part_path}: all content must be type `text` in an error")


def check_callers(path: str, callers: Any) -> None:
    """Refuse tools that only other tools may call: the CLI drops the field `caller` (seen)."""
    if isinstance(callers, list) and callers and "direct" not in callers:
        problem = "programmatic tool calling does not pass through the CLI; only `direct` calls do"
        raise InvalidRequest(f"{path}: {problem}")


def check_image(path: str, source: JsonObject) -> None:
    """Refuse data that is not an image of its media type: the CLI would make a text note of it."""
    if source.get("type") != "base64":
        return
    media_type = str(source.get("media_type"))
    data = require(source, "data", str, f"{path}.base64")
    is_image = media_type in _IMAGE_STARTS and data.startswith(_IMAGE_STARTS[media_type])
    if not is_image or not _is_base64(data):
        raise InvalidRequest(f"{path}.base64.data: Could not process image as {media_type}")


def _is_base64(data: str) -> bool:
    if len(data) % 4 != 0:
        return False

    end = len(data)
    if data.endswith("=="):
        end -= 2
    elif data.endswith("="):
        end -= 1
    for start in range(0, end, SLICE_CHARS):
        if not _BASE64.fullmatch(data, start, min(start + SLICE_CHARS, end)):
            return False
    return True


def _merge_by_role(entries: Iterable[Entry], breakpoints: list[Breakpoint]) -> list[Message]:
    """Return messages whose roles alternate: consecutive ones of one role are joined.

    The API does so, and the CLI too, but it would add a newline. A system message joins the
    user's. Raises InvalidRequest.
    """
    merged: list[Message] = []
    seen_ids: set[str] = set()
    pending: dict[str, str] = {}  # the tool calls of the message before, each with its path
    for is_answer, group in itertools.groupby(entries, lambda entry: entry.role == "assistant"):
        joined = list(group)
        if any(entry.role == "system" for entry in joined):
            # Tool results must stay in front of what became text. The sort is stable.
            joined.sort(key=lambda entry: entry.block["type"] != "tool_result")
        if is_answer:
            _check_says_something(joined)
        pending = _check_tool_pairs(joined, pending, seen_ids)
        content = [strip_cache_control(entry.block, breakpoints) for entry in joined]
        merged.append(Message("assistant" if is_answer else "user", content))

    if not merged:
        raise InvalidRequest("messages: at least one message is required")
    return merged


def _check_says_something(answer: list[Entry]) -> None:
    """Refuse an answer that counts for nothing in the CLI.

    The CLI drops an answer that has only thinking or empty text, and joins what stands before and
    after it (seen).
    """
    if not all(_says_nothing(entry.block) for entry in answer):
        return

    problem = "The final block in an assistant message cannot be `thinking`."
    if any(entry.block["type"] == "text" for entry in answer):
        problem = "an answer of `(no content)` or `[Empty text removed]` alone cannot be sent"
    raise InvalidRequest(f"{_message_path(answer[-1].path)}: {problem}")


def _says_nothing(block: Block) -> bool:
    if block["type"] == "text":
        is_short = len(block["text"]) < SLICE_CHARS
        return is_short and block["text"].strip(JS_WHITE_SPACE) in _EMPTY_ANSWERS
    return block["type"] in THINKING_TYPES


def _message_path(block_path: str) -> str:
    return block_path.rpartition(".content.")[0]


def _check_tool_pairs(
    entries: list[Entry], pending: dict[str, str], seen_ids: set[str]
) -> dict[str, str]:
    """Return a message's tool calls, each id with its path.

    `pending` are those of the message before. Raises InvalidRequest for a call without its result
    and a result without its call, which the CLI would silently repair, and for an id that was
    `seen` before.
    """
    calls: dict[str, str] = {}
    unanswered = dict(pending)
    # Also the results of tools that upstream runs itself: they stand in the same message.
    answered_here = {str(entry.block.get("tool_use_id")) for entry in entries}
    for _, path, block in entries:
        call_id = str(block.get("id"))
        if block["type"] == "tool_result":
            if unanswered.pop(block["tool_use_id"], None) is None:
                problem = "unexpected `tool_use_id` found in `tool_result` blocks"
                raise InvalidRequest(f"{path}: {problem}: {block['tool_use_id']}")
        elif block["type"] == "tool_use":
            if call_id in seen_ids:
                raise InvalidRequest(f"{path}: `tool_use` ids must be unique")
            seen_ids.add(call_id)
            calls[call_id] = path
        elif block["type"] in _CALLING_TYPES and call_id not in answered_here:
            raise InvalidRequest(f"{path}: {call_id}, a call without its result: {_NOT_CARRIED}")

    if unanswered:
        path = _message_path(next(iter(unanswered.values())))
        problem = "`tool_use` ids were found without `tool_result` blocks immediately after"
        raise InvalidRequest(f"{path}: {problem}: {', '.join(unanswered)}")
    return calls


class Breakpoint(NamedTuple):
    """A cache breakpoint that the client set."""

    owner: JsonObject  # the block or tool, in its copy without cache_control
    ttl: Any


def strip_cache_control(owner: JsonObject, breakpoints: list[Breakpoint]) -> JsonObject:
    """Return a copy of a block or tool without its cache breakpoint.

    Each breakpoint found, also those inside a tool result, is appended to `breakpoints` as one of
    this copy.
    """
    stripped = dict(owner)
    found: list[Breakpoint] = []
    if stripped.get("type") == "tool_result" and isinstance(stripped.get("content"), list):
        stripped["content"] = [
            strip_cache_control(as_object(part), found) for part in stripped["content"]
        ]

    cache_control = as_object(stripped.get("cache_control"))
    if cache_control.get("type") == "ephemeral":
        del stripped["cache_control"]
        found.append(Breakpoint(stripped, cache_control.get("ttl")))

    # Breakpoints found inside count as ones of this block.
    breakpoints.extend(Breakpoint(stripped, each.ttl) for each in found)
    return stripped


def digest_message(message: Message) -> bytes:
    """Return a hash that is equal for messages that mean the same to the model.

    How they are spelled in JSON makes no difference.
    """
    digest = hashlib.sha256()
    canonical = [message.role, _canonical(message.content)]
    for piece in json_pieces(canonical, sort_keys=True):
        digest.update(piece.encode("ascii"))
    return digest.digest()


def _canonical(node: Any) -> Any:
    """Drop null and false fields, and `caller`, which the CLI drops; a tool's input is verbatim."""
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, dict):
        return node

    if node.get("type") == "tool_result":
        node = {**node, "content": as_blocks(node.get("content") or "")}
    canonical = {}
    for name, value in node.items():
        if value is None or value is False or name == "caller":
            continue
        is_verbatim = isinstance(value, str) or name == "input"
        canonical[name] = value if is_verbatim else _canonical(value)
    return canonical


def check_media(turn: Turn, model: str) -> None:
    """Refuse more images and documents than the CLI hands on. Raises InvalidRequest.

    `model` is an id, not an alias.
    """
    has_long_window = _LONG_WINDOW_BETA in turn.betas or _HAS_LONG_WINDOW.match(model)
    limit = MAX_MEDIA_IN_LONG_WINDOW if has_long_window else MAX_MEDIA
    if turn.media_count > limit:
        problem = f"{turn.media_count} images and documents, where {model} takes {limit}"
        raise InvalidRequest(f"messages: too many of them: {problem} in a request")


def _count_media(messages: Iterable[Message]) -> int:
    """Count images and documents, those in tool results too."""
    count = 0
    for message in messages:
        for block in message.content:
            parts = [block]
            if block["type"] == "tool_result" and isinstance(block.get("content"), list):
                parts += block["content"]
            count += sum(1 for part in parts if as_object(part).get("type") in _MEDIA_TYPES)
    return count


# ======================================================================= Models
# The names under which clients ask for models, and the list that they are shown. Pure.

DEFAULT_MODEL_NAME: Final = "claude-code"  # the name under which clients ask for the CLI's default
# The CLI lists a model with this ending where it may use a window of a million tokens.
LONG_WINDOW_SUFFIX: Final = "[1m]"
_MODEL_LINES: Final = ("haiku", "sonnet", "opus", "fable", "mythos")
_VENDOR: Final = "anthropic/"
_UNKNOWN_DATE: Final = "1970-01-01T00:00:00Z"  # what the API's documentation says for unknown


def resolve_model(name: str, models: Iterable[JsonObject]) -> str:
    """Return the id that the CLI will use for a model's name or alias.

    `models` is the CLI's own list, of objects with `value`, `resolvedModel` and `displayName`. A
    name that it does not list is an id.
    """
    wanted = "default" if name == DEFAULT_MODEL_NAME else name
    for model in models:
        if model.get("value") == wanted:
            return str(model.get("resolvedModel") or name)
    return name


def to_model_list(models: Iterable[JsonObject]) -> list[JsonObject]:
    """Return the CLI's models in a form that Anthropic's and OpenAI's SDKs parse, newest first."""
    items: dict[str, JsonObject] = {}
    for model in models:
        model_id = resolve_model(str(model.get("value")), [model])
        model_id = model_id.removesuffix(LONG_WINDOW_SUFFIX)
        items[model_id] = to_model_item(model_id, model)
    return sorted(items.values(), key=_version_numbers, reverse=True)


def to_model_item(model_id: str, model: JsonObject) -> JsonObject:
    """Return a model's entry with all fields of both SDKs' types, null where nothing is known.

    `model` is what the CLI says of it, {} where it does not list it. What is not known to have gone
    is active: SDKs want a word there.
    """
    line = next((line for line in _MODEL_LINES if line in model_id), None)
    return {
        "type": "model",
        "object": "model",
        "id": model_id,
        "owned_by": "anthropic",
        "created_at": _UNKNOWN_DATE,
        "created": 0,
        "display_name": model.get("displayName") or model_id,
        "description": model.get("description"),
        "line": line,
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "shutdown_date": None,
        "max_input_tokens": None,
        "max_tokens": None,
        "capabilities": None,
    }


def _version_numbers(item: JsonObject) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", item["id"])]


# ================================================================== CLI program
# Where the CLI is, its version and sign-in; the flags, the environment and the directories that its
# processes run with.

MIN_CLI_VERSION: Final = (2, 1, 300)  # older leave `/model` text in a used process (2.1.248)
DEFAULT_SYSTEM_PROMPT: Final = "You are a helpful assistant."
CONTROL_TIMEOUT_S: Final = 15.0  # for an answer of the CLI; it needs 0.1 s, and 1 s to start
TOOL_SERVER: Final = "t"  # the MCP server under which a request's tools are registered

INSTALL_HINT: Final = (
    "Install it from https://claude.com/claude-code, or `pip install claude-agent-sdk`, which"
    " carries it; update an old one with `claude update`; name its path with --claude."
)
# Variables of the CLI with the value that every process has, whatever the user has. They bear on
# how often upstream is called, on the body and headers of a call, and on when its events come.
# Empty means the CLI's default. tests/VARIABLES.md says of each what it does.
PINNED_VARIABLES: Final = {
    # One request is one call: the client decides about retries, and no other model answers.
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "CLAUDE_CODE_RETRY_WATCHDOG": "",
    "CLAUDE_CODE_OVERLOADED_RETRY_MAX_WAIT_MS": "",
    "CLAUDE_CODE_OVERLOADED_RETRY_BASE_DELAY_MS": "",
    "CLAUDE_CODE_OVERLOADED_RETRY_MAX_DELAY_MS": "",
    "CLAUDE_CODE_NONSTREAMING_TIMEOUT_RETRIES": "",
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK": "1",
    "CLAUDE_CODE_NO_MODEL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
    "FALLBACK_FOR_ALL_PRIMARY_MODELS": "",
    "CLAUDE_CODE_MAX_TURNS": "",
    "CLAUDE_CODE_EMIT_TOOL_USE_SUMMARIES": "",
    "DISABLE_AUTO_COMPACT": "1",
    "DISABLE_COMPACT": "1",
    "CLAUDE_CODE_EXIT_AFTER_STOP_DELAY": "",
    "CLAUDE_CODE_SUBPROCESS_ENV_SCRUB": "",
    # What runs is what is tested: nothing is fetched that could change prompts.
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    # The client's betas, thinking and effort, and none of the CLI's own.
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
    "DISABLE_INTERLEAVED_THINKING": "1",
    "CLAUDE_CODE_THINKING_DISPLAY_UPDATES": "0",
    "CLAUDE_CODE_DISABLE_THINKING": "",
    "CLAUDE_CODE_DISABLE_ADAPTIVE_THINKING": "",
    "MAX_THINKING_TOKENS": "",
    "CLAUDE_CODE_EFFORT_LEVEL": "",
    "CLAUDE_CODE_ALWAYS_ENABLE_EFFORT": "",
    "CLAUDE_CODE_MAX_EFFORT_REMINDER": "",
    # Cache breakpoints as each request sets them.
    "DISABLE_PROMPT_CACHING": "",
    "DISABLE_PROMPT_CACHING_FABLE": "",
    "DISABLE_PROMPT_CACHING_HAIKU": "",
    "DISABLE_PROMPT_CACHING_OPUS": "",
    "DISABLE_PROMPT_CACHING_SONNET": "",
    "CLAUDE_CODE_MESSAGES_PROMPT_CACHE_TTL": "",
    "ENABLE_PROMPT_CACHING_1H": "",
    "FORCE_PROMPT_CACHING_5M": "",
    # No texts of the CLI's or the user's own in prompt and messages.
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS": "1",
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER_AFTER_USER_TURN": "",
    "CLAUDE_CODE_ENABLE_TOKEN_USAGE_ATTACHMENT": "",
    "CLAUDE_CODE_FORCE_MID_CONVERSATION_SYSTEM": "",
    "CLAUDE_CODE_WEBSEARCH_CITATIONS": "",
    "CLAUDE_CODE_TOASTY_THIMBLE": "0",
    "CLAUDE_CODE_GENTLE_PARASOL": "0",
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "",
    "CLAUDE_CODE_OVERRIDE_DATE": "",
    # Headers and metadata as the CLI itself sends them.
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "",
    "CLAUDE_CODE_EXTRA_METADATA": "",
    "CLAUDE_CODE_SIMULATE_PROXY_USAGE": "",
    "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "",
    "CLAUDE_CODE_ADDITIONAL_PROTECTION": "",
    "CLAUDE_AGENT_SDK_CLIENT_APP": "",
    "CLAUDE_AGENT_SDK_VERSION": "",
    # The CLI's own time-outs: a stream is silent as long as the model thinks.
    "API_TIMEOUT_MS": "",
    "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "",
    "CLAUDE_STREAM_FIRST_BYTE_TIMEOUT_MS": "",
    "CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS": "",
    "CLAUDE_ENABLE_STREAM_WATCHDOG": "",
    "CLAUDE_ENABLE_BYTE_WATCHDOG": "",
    # The tools' names and descriptions as given, all of them, and any number called at once.
    "ENABLE_CLAUDEAI_MCP_SERVERS": "false",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "ENABLE_TOOL_SEARCH": "false",
    "CLAUDE_CODE_MAX_MCP_DESCRIPTION_LENGTH": "1000000",
    "CLAUDE_CODE_MAX_TOOL_USE_CONCURRENCY": "1000",
}
# They stand on the command line. That beats the user's settings files, which --setting-sources may
# load; and those beat the environment.
PINNED_SETTINGS: Final[JsonObject] = {
    "hooks": {},
    "mcpServers": {},
    "disableAllHooks": True,
    "fallbackModel": [],
    "language": "",
    "outputStyle": "default",
    "attribution": {"commit": "", "pr": ""},
    "env": PINNED_VARIABLES,
}
PROCESS_FLAGS: Final = (
    "-p", "--input-format", "stream-json", "--output-format", "stream-json",
    "--verbose", "--include-partial-messages",
    "--tools", "", "--disable-slash-commands", "--strict-mcp-config",
    "--no-session-persistence",  # no transcript on disk
    "--settings", json.dumps(PINNED_SETTINGS),
    "--system-prompt", DEFAULT_SYSTEM_PROMPT,
    "--allowedTools", f"mcp__{TOOL_SERVER}", "--permission-mode", "dontAsk",
    # Its log to stderr, of these categories only: that a call leaves, and that a call or a count
    # has failed.
    "--debug-to-stderr", "--debug=api:timing,api error (attempt 1/1),counttokens api call failed",
)  # fmt: skip
# Of the variables that start with CLAUDE only those about the sign-in and the provider are passed
# on. The others are the CLI's own switches, and settings cannot override some of them
# (STREAM_EVENT_HOLD_MS, REMOTE, ENTRYPOINT: seen, 2.1.300 and 2.1.332).
_HANDED_DOWN: Final = re.compile(
    r"CLAUDE_CONFIG_DIR|CLAUDE_SECURESTORAGE_CONFIG_DIR"
    r"|CLAUDE_CODE_OAUTH_\w+|CLAUDE_CODE_API_KEY_HELPER_TTL_MS|CLAUDE_CODE_ORGANIZATION_UUID"
    r"|CLAUDE_CODE_USE_(BEDROCK|VERTEX|FOUNDRY|MANTLE|GATEWAY|ANTHROPIC_\w+)"
    r"|CLAUDE_CODE_SKIP_\w+_AUTH"
    r"|CLAUDE_CODE_CLIENT_(CERT|KEY|KEY_PASSPHRASE)|CLAUDE_CODE_CERT_STORE"
    r"|CLAUDE_CODE_(HTTPS?_PROXY|PROXY_\w+|ENABLE_PROXY_AUTH_HELPER)"
)
# Variables that are not handed down because each request sets them.
_SET_BY_REQUESTS: Final = ("ANTHROPIC_BETAS",)
_MAX_SHOWN_OUTPUT_CHARS: Final = 200  # of what was not a version


class CliUnusable(Exception):
    """No CLI, or one that is too old; the message is for the person who starts the gateway."""


class Cli(NamedTuple):
    """A CLI that was found and answered `--version`."""

    path: str
    version: str

    def __str__(self) -> str:
        return f"{self.version} at {self.path}"


def find_cli(choice: str | None, environ: Mapping[str, str]) -> Cli:
    """Find `choice`, or else the first claude there is, new enough. Raises CliUnusable."""
    if choice:
        places = [choice]
    else:
        places = ["claude", "~/.local/bin/claude", "~/.claude/local/claude"]
        sdk = importlib.util.find_spec("claude_agent_sdk")
        if sdk and sdk.submodule_search_locations:
            places += [f"{root}/_bundled/claude" for root in sdk.submodule_search_locations]
    places = [os.path.expanduser(place) for place in places]

    executables = [shutil.which(place) for place in places]
    found = next((executable for executable in executables if executable), None)
    if found is None:
        where = choice or f"claude on PATH, nor at {', '.join(places[1:])}"
        raise CliUnusable(f"found no executable {where}. {INSTALL_HINT}")

    path = os.path.abspath(found)
    output = _cli_output(path, ["--version"], environ)
    version = re.search(r"(\d+)\.(\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < MIN_CLI_VERSION:
        shown = output.strip()[:_MAX_SHOWN_OUTPUT_CHARS]
        needed = ".".join(str(number) for number in MIN_CLI_VERSION)
        raise CliUnusable(
            f"{path} --version printed {shown!r}; {needed} or newer is needed. {INSTALL_HINT}"
        )
    return Cli(path, version.group())


def _cli_output(path: str, args: list[str], environ: Mapping[str, str]) -> str:
    """Run the CLI, and return what it printed. Raises CliUnusable."""
    try:
        done = subprocess.run(
            [path, *args], env=environ, input=b"", capture_output=True, timeout=CONTROL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CliUnusable(f"{path} does not run: {exc}. {INSTALL_HINT}") from exc
    return (done.stdout or done.stderr).decode("utf-8", "replace")


IN_DEMO: Final = "DEMO: a script answers, no account is used"
UNKNOWN_SIGN_IN: Final = "unknown (`claude auth status` does not say)"
NOT_SIGNED_IN: Final = "NOT SIGNED IN: "  # the prefix of a description: requests will fail
# By `authMethod` of `claude auth status` (seen, 2.1.300 and 2.1.331).
_BILLING_BY_AUTH_METHOD: Final = {
    "claude.ai": "claude.ai login ({subscriptionType}): draws on the plan's limits",
    "api_key": "API key from {apiKeySource}: billed to the API",
    "api_key_helper": "API key from apiKeyHelper: billed to the API",
    "ANTHROPIC_AUTH_TOKEN": "token from ANTHROPIC_AUTH_TOKEN: billed by whoever issued it",
    "oauth_token": "token of `claude setup-token`: draws on the plan's limits",
    "third_party": "{apiProvider}: billed by the cloud provider",
}
_CREDENTIAL_VARIABLES: Final = (
    "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN",
)  # fmt: skip


def describe_sign_in(cli: Cli, environ: Mapping[str, str], *, bare: bool) -> str:
    """Return which credential the CLI will use, and who pays. Raises CliUnusable."""
    status = _auth_status(cli, environ)
    method = str(status["authMethod"])
    if status["loggedIn"] is False:
        return f"{NOT_SIGNED_IN}run `{cli.path} auth login`, or try `cc2api --demo` without one"
    if method == "claude.ai" and bare:
        return f"{NOT_SIGNED_IN}with --bare claude reads no claude.ai login"

    if method == "oauth_token" and "ANTHROPIC_AUTH_TOKEN" in environ:
        # `auth status` does not tell the two apart.
        method = "ANTHROPIC_AUTH_TOKEN"
    if method not in _BILLING_BY_AUTH_METHOD:
        return UNKNOWN_SIGN_IN
    billing = _BILLING_BY_AUTH_METHOD[method].format_map(status)

    # A variable that was left in the environment wins over a login, which people do not expect.
    without_variables = {
        name: value for name, value in environ.items() if name not in _CREDENTIAL_VARIABLES
    }
    if method != "claude.ai" and len(without_variables) < len(environ):
        if _auth_status(cli, without_variables)["authMethod"] == "claude.ai":
            billing += "; WINS OVER the claude.ai login that is there too"
    return billing


def _auth_status(cli: Cli, environ: Mapping[str, str]) -> JsonObject:
    """Return what `claude auth status` says; a field that it lacks is ""."""
    status: object = None
    with contextlib.suppress(ValueError):
        status = json.loads(_cli_output(cli.path, ["auth", "status"], environ))
    return collections.defaultdict(str, as_object(status))


def upstream_url(environ: Mapping[str, str]) -> str:
    """Return the API's address where the CLI is told one, without a password, else ""."""
    return re.sub("//[^/]*@", "//", environ.get("ANTHROPIC_BASE_URL", ""))


def uses_bare(choice: bool | None, environ: Mapping[str, str]) -> bool:
    """Return whether to run the CLI with `--bare`.

    It then adds nothing of its own to the messages, and never reads a claude.ai login. So without a
    choice it is used where an API key or a cloud provider is configured.
    """
    if choice is not None:
        return choice
    names = [
        "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK",
        "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY",
    ]  # fmt: skip
    return any(
        environ.get(name, "").lower() not in ("", "0", "false", "no", "off") for name in names
    )


# Run in place of the CLI and turned into it: asks Linux to kill it when the thread that forked it
# is gone. An idle CLI ends when its stdin does, but a busy one was seen to go on for 8 s after its
# parent's death. Not by preexec_fn, which is unsafe beside threads.
_DIE_WITH_PARENT: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # the parent was quicker
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def command_and_environment(
    cli: Cli, settings: Settings, environ: Mapping[str, str], temp_dir: str
) -> tuple[list[str], dict[str, str]]:
    """Return with what a process is started; nothing of a request is in it."""
    command = [cli.path, *PROCESS_FLAGS, "--setting-sources", settings.setting_sources]
    if uses_bare(settings.bare, environ):
        command.append("--bare")
    if sys.platform == "linux":
        shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        command = shim + command

    environment = {}
    for name, value in environ.items():
        is_foreign = not name.startswith("CLAUDE")
        if name not in _SET_BY_REQUESTS and (is_foreign or _HANDED_DOWN.fullmatch(name)):
            environment[name] = value
    environment.update(PINNED_VARIABLES)
    # With a login the model is told the name of the shell.
    environment["SHELL"] = "/bin/sh"
    # The CLI leaves sockets and probe files: they go where we clean up.
    environment["TMPDIR"] = temp_dir
    # It keeps notes on its tool servers, with the names of a request's tools and the text of failed
    # results, in a file for each process. Below /dev/null no directory can be made, so it keeps
    # none (seen).
    environment["XDG_CACHE_HOME"] = os.devnull
    return command, environment


class Workplace:
    """The directories of a gateway's processes: the one they run in, and one for their files.

    With a login the model is told the name of the first. So that name says nothing, and is the same
    after a restart, or every conversation would miss the API's prompt cache. All gateways of one
    user share it. The second is this gateway's own, and goes with it. While it is in use it is
    locked, so that the next gateway can tell what a killed one has left.
    """

    def __init__(self, parent: Path, config_dir: Path) -> None:
        """`parent`: where temporary files go; `config_dir`: where the CLI has its own files."""
        self._sessions_dir = config_dir / "sessions"
        self._root = parent / f"cc-{os.getuid()}"
        self.work_dir = self._root / "work"
        self.temp_dir = self._root / f"tmp-{uuid.uuid4().hex[:8]}"
        self._lock_descriptor: int | None = None  # a descriptor of temp_dir, once it is locked

    def prepare(self) -> None:
        """Make the directories that are missing, and remove what killed gateways have left.

        It is called before each start, because a cleaner may have removed them. Raises OSError.
        """
        _make_private(self._root)
        _make_private(self.work_dir)
        # At every apply_flag_settings the CLI runs git, to see whether the directory's settings are
        # tracked. An empty .git file makes it assume that, without git (seen: 7 ms, then 4.5).
        settings_dir = self.work_dir / ".claude"
        settings_dir.mkdir(exist_ok=True)
        (settings_dir / ".git").touch()

        if not self._holds_temp_dir():
            self._take_temp_dir()
        # A CLI may have made it again, readable by others.
        _make_private(self.temp_dir)
        self.remove_leftovers()

    def clean_up(self) -> None:
        """Remove what is this gateway's own, once its processes have ended."""
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self._unlock()
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what killed processes have left: their entries in the CLI's list, and sockets.

        A CLI that ends by itself removes its entry, and a key beside it (seen, 2.1.300 and
        2.1.332). Only entries of what ran in `work_dir` are looked at. Does not raise.
        """
        for entry in self._sessions_dir.glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError):
                ran_in = as_object(json.loads(entry.read_bytes())).get("cwd")
                if ran_in == str(self.work_dir) and not _has_process(int(entry.stem)):
                    entry.unlink(missing_ok=True)
                    for key in self._sessions_dir.glob(f"{entry.stem}.*.key"):
                        key.unlink(missing_ok=True)

        for socket_path in (self.temp_dir / "cc-socks").glob("[0-9]*.sock"):
            with contextlib.suppress(OSError, ValueError):
                if not _has_process(int(socket_path.stem)):
                    socket_path.unlink(missing_ok=True)

    def _holds_temp_dir(self) -> bool:
        """Return whether the directory is there, and is the one that was locked."""
        if self._lock_descriptor is None:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._lock_descriptor), self.temp_dir.lstat())
        return False

    def _take_temp_dir(self) -> None:
        """Make this gateway's directory and lock it; remove those that nobody has locked."""
        self._unlock()
        root = os.open(self._root, os.O_RDONLY)
        try:
            # Without this, another gateway that starts now could remove ours before it is locked.
            fcntl.flock(root, fcntl.LOCK_EX)
            for path in self._root.glob("tmp-*"):
                _remove_unlocked(path)
            _make_private(self.temp_dir)
            self._lock_descriptor = os.open(self.temp_dir, os.O_RDONLY)
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(root)

    def _unlock(self) -> None:
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def process_state(pid: int) -> str:
    """Return a process's state as proc(5) has it, one letter. Raises OSError off Linux."""
    return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0]


def _has_process(pid: int) -> bool:
    """Return whether there is a process with this number that has not ended, ours or another's."""
    with contextlib.suppress(OSError):
        # A zombie has ended; only its parent has not asked for its status yet.
        is_zombie = process_state(pid) == "Z"
        return not is_zombie
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def config_dir_of(environ: Mapping[str, str]) -> Path:
    """Return where the CLI keeps its own files."""
    named = environ.get("CLAUDE_CONFIG_DIR")
    return Path(named) if named else Path(environ.get("HOME", "/")) / ".claude"


def _remove_unlocked(path: Path) -> None:
    """Remove a directory of a gateway that has ended. Does not raise."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _make_private(path: Path) -> None:
    """Make a directory of this user's alone, if it is not there. Raises OSError if it is another's.

    Its name can be foreseen: where others may write, somebody could have made it first.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)

    found = path.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    is_writable_by_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_own or is_writable_by_others:
        raise OSError(f"{path} must be a directory that is yours alone: remove it, or set TMPDIR")
    # A CLI has made it again, readable by others.
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


# ================================================================= CLI messages
# What is written to a process and what is read from it, in the CLI's own protocol: settings, stdin
# messages, tool results; stream lines to Anthropic's events, and error lines to API errors. Pure.

# Through the tool channel: the CLI saves larger results to disk, and shortens longer errors
# (10,000 characters).
MAX_TOOL_RESULT_CHARS: Final = 100_000
MAX_TOOL_ERROR_CHARS: Final = 5_000
MAX_FOREIGN_ERROR_CHARS: Final = 1000  # of a proxy's page of HTML
# From this size in tokens on the CLI refuses to call upstream ("Prompt is too long").
BLOCKING_LIMIT_VARIABLE: Final = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
# Settings for when a call has left, so that the process makes no other one, whatever comes back.
# A prompt limit of 1 token ends a turn that would go on after its answer ("Prompt is too long").
# The repeated call after an upstream error does not look at that limit: for it, the newline makes
# the anthropic-beta header one that no HTTP client sends, so it fails inside the CLI. Both are
# certain once the CLI has acknowledged them; before that, only a kill helps.
BLOCK_UPSTREAM_CALLS: Final[JsonObject] = {
    "env": {
        BLOCKING_LIMIT_VARIABLE: "1",
        "CLAUDE_CODE_EXTRA_BODY": json.dumps({"betas": ["held\nback"]}),
    }
}

Event = JsonObject  # of Anthropic's stream
Line = JsonObject  # one JSON line of the CLI's protocol
LOG_LINE: Final = "cc2api_log"  # the type of a line that stands for a message of the CLI's log
_LOG_FORMAT: Final = re.compile(rb"\d{4}-\d\d-\d\dT[\d:.]+Z \[(?:DEBUG|ERROR)\] (.*)", re.DOTALL)
# How the messages of the CLI's log begin that PROCESS_FLAGS ask for (seen, 2.1.300 and 2.1.332).
_CALL_LEAVES: Final = "[API:timing] dispatching to "
_CALL_FAILED: Final = "API error (attempt "
_COUNT_FAILED: Final = "countTokens API call failed: "

_TOOL_RESULT_FIELDS: Final = frozenset(("type", "tool_use_id", "content", "is_error"))
# For failures that carry no status: the CLI's own word for them, on its `assistant` line. By
# `server_error` it means that the connection was lost: upstream's own failures have a status.
_STATUS_BY_CLI_ERROR: Final = {
    "authentication_failed": 401, "cloud_credential_error": 401, "billing_error": 402,
    "oauth_org_not_allowed": 403, "account_on_hold": 403, "verification_required": 403,
    "invalid_request": 400, "max_output_tokens": 400, "model_not_found": 404, "rate_limit": 429,
    "server_error": 502, "overloaded": 529,
}  # fmt: skip
# What the CLI puts around upstream's message (seen, 2.1.330 and 2.1.248).
_DECORATION: Final = re.compile(
    r"(?s)\A(?:Failed to authenticate\. |Please run /login · )?API Error: "
    r"(?:(?:Request rejected|Server is temporarily limiting requests) \([^)]*\) · |\d{3} )?"
    r"|\. This is a server-side issue, usually temporary.*"
)


def with_cache_control(turn: Turn, owners: Iterable[JsonObject]) -> list[JsonObject]:
    """Return blocks or tools, the turn's `cache_breakpoint` among them with its cache_control."""
    cache_control = {"type": "ephemeral"}
    if turn.cache_ttl != "5m":
        cache_control["ttl"] = turn.cache_ttl

    marked = []
    for owner in owners:
        if owner is turn.cache_breakpoint:
            owner = {**owner, "cache_control": cache_control}
        marked.append(owner)
    return marked


def to_flag_settings(turn: Turn, model: str) -> JsonObject:
    """Return the settings of `apply_flag_settings` for a turn: {"env": {...}, "model": ...}.

    Every setting that a request can change is always included, so none is left over from the turn
    before. `model` is an id: with an alias the CLI refuses a later change of the system prompt.
    """
    body = fields_for_model(turn, model)
    # Every body says which tools there are, because the CLI goes on sending tools that were taken
    # off its list.
    body["tools"] = with_cache_control(turn, turn.tools)

    # With thinking off the CLI sends `temperature: 1` to models that take one, and upstream refuses
    # that beside top_p. So the CLI is left with thinking on, and then sends `thinking`, which the
    # body overrides. That changes nothing: models that take top_p do not think by default.
    is_top_p_alone = "top_p" in body and "temperature" not in body
    if is_top_p_alone:
        body.setdefault("thinking", {"type": "disabled"})
    thinking = as_object(body.get("thinking")).get("type", "disabled")
    disables_thinking = thinking == "disabled" and not is_top_p_alone
    has_effort = "effort" in as_object(body.get("output_config"))
    variables = {
        "CLAUDE_CODE_EXTRA_BODY": dump_json(body),
        "ANTHROPIC_BETAS": ",".join(turn.betas),
        "CLAUDE_CODE_PROMPT_CACHE_TTL": turn.cache_ttl,
        "CLAUDE_CODE_DISABLE_THINKING": "1" if disables_thinking else "",
        # "unset" keeps the CLI's own effort out of the body; empty leaves it to the CLI.
        "CLAUDE_CODE_EFFORT_LEVEL": "unset" if has_effort else "",
        # The body's max_tokens is in extra_body; this is for the CLI's own sums.
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(turn.extra_body.get("max_tokens", "")),
        "MCP_TOOL_TIMEOUT": "100000000",  # ms; tool calls wait as long as they must
        BLOCKING_LIMIT_VARIABLE: "1000000000",  # what is too long is for upstream to say
    }
    return {"env": variables, "model": model}


def to_tool_name(tool: JsonObject) -> str:
    """Return the name under which a tool is registered: its own, else its type."""
    return str(tool.get("name") or tool.get("type"))


def to_stdin_message(turn: Turn, index: int, model: str, *, is_query: bool = False) -> Line:
    """Return the stdin line of a turn's message; one that `is_query` starts the call."""
    role, content = turn.messages[index]
    line_uuid = str(uuid.uuid4())
    message: JsonObject = {"role": role, "content": with_cache_control(turn, content)}
    line: Line = {
        "type": role,
        "message": message,
        "uuid": line_uuid,
        "parent_tool_use_id": None,
        "session_id": "",
    }
    if role == "user":
        # The text is then taken verbatim: no @paths, no commands.
        line["client_composed"] = True
        line["shouldQuery"] = is_query
        return line

    message["id"] = line_uuid
    message["type"] = "message"
    message["stop_reason"] = "end_turn"
    # With another model the CLI would drop thinking blocks.
    message["model"] = model.removesuffix(LONG_WINDOW_SUFFIX)
    # Other figures would be counted as real.
    message["usage"] = {"input_tokens": 0, "output_tokens": 0}
    return line


def to_tool_results(query: Message, call_ids: Sequence[str]) -> list[JsonObject] | None:
    """Return a message's tool results in MCP's form, in the order of their calls.

    None where the CLI would alter them on the way; the turn is then replayed as a user message. It
    orders results by their calls, strips and joins errors, words empty results, and writes large
    ones to disk (all seen). Images, and text beside the results, go no better.
    """
    answered_ids = [block.get("tool_use_id") for block in query.content]
    if answered_ids != list(call_ids):
        return None

    results: list[JsonObject] = []
    chars = 0
    for block in query.content:
        if not block.keys() <= _TOOL_RESULT_FIELDS:
            # MCP has no place for a field that is newer than this file.
            return None

        parts = as_blocks(block.get("content") or [])
        texts = [part.get("text") for part in parts]
        is_plain_text = parts == [{"type": "text", "text": text} for text in texts]
        if not parts or not is_plain_text:
            return None
        if any(is_blank(text, JS_WHITE_SPACE) for text in texts):
            return None

        is_error = bool(block.get("is_error"))
        if is_error:
            text = texts[0]
            is_altered = len(text) > MAX_TOOL_ERROR_CHARS or text.strip(JS_WHITE_SPACE) != text
            if len(texts) > 1 or is_altered:
                return None
        chars += sum(len(text) for text in texts)
        results.append({"content": parts, "isError": is_error})
    return results if chars <= MAX_TOOL_RESULT_CHARS else None


def read_log_line(raw: bytes) -> str | None:
    """Return the message of a line of the CLI's log; None for anything else on stderr."""
    match = _LOG_FORMAT.fullmatch(raw.rstrip())
    if match is None:
        return None
    text = match[1].decode("utf-8", "replace")
    # A message of several lines is written as one JSON string.
    if text.startswith('"'):
        with contextlib.suppress(ValueError):
            text = str(json.loads(text))
    return text


# get_context_usage reports for all tools together: the true count, less 500, plus a message of 8.
COUNTED_TOOLS_DEDUCTION: Final = 492
# Counted with the tools, so that their sum is never below the deduction, and by themselves.
PADDING_TOOLS: Final[list[JsonObject]] = [
    {"name": name, "description": "word " * 1000, "input_schema": {"type": "object"}}
    for name in ("cc2api_padding", "cc2api_padding2")
]
# The random system prompt that is counted along has at least 64 tokens; a guess has fewer than 32.
_MIN_COUNTED_SYSTEM_TOKENS: Final = 32


class TokenCounts(NamedTuple):
    """What the CLI's context usage says."""

    messages: int
    tools: int  # less COUNTED_TOOLS_DEDUCTION


def to_token_counts(usage: JsonObject) -> TokenCounts:
    """Return the counts of a `get_context_usage` response. Raises CliFailed.

    Where upstream does not count, the CLI silently guesses a token for four characters.
    """
    counts: dict[str, int] = {}
    for category in usage.get("categories") or []:
        counts[str(category.get("name"))] = int(category.get("tokens") or 0)
    if counts.get("System prompt", 0) < _MIN_COUNTED_SYSTEM_TOKENS:
        raise CliFailed("upstream did not count the tokens")
    return TokenCounts(counts.get("Messages", 0), counts.get("MCP tools", 0))


@contextlib.contextmanager
def malformed_as_502() -> Iterator[None]:
    """Turn errors that a malformed upstream event causes into a 502: they are no bugs of ours."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise CliFailed(f"upstream broke the protocol of its answers: {exc!r}") from exc


class StreamParser:
    """Turns the lines of one answer into Anthropic's events, and knows when it is complete."""

    def __init__(self) -> None:
        # Three marks on a call's way upstream, in this order; is_calling may be missed.
        self.is_calling = False  # the CLI said that it is about to call
        self.has_left = False  # the call has left: its body and headers are made
        self.is_done = False  # its stop_reason came
        self.upstream_error: ApiError | None = None  # as the CLI's log has it
        self.called_again = False  # the CLI has gone on by itself after an error
        self.has_failed = False  # the CLI has ended its turn without an answer
        self.content: list[Block] = []  # the finished blocks, as the CLI remembers them
        self.rate_limits: dict[str, str] = {}  # the plan's state as headers, where it was sent
        self.has_started = False  # message_start was seen
        self._blocks_started = 0
        self._stop_reason: str | None = None
        self._cli_error: str | None = None

    @property
    def can_go_on(self) -> bool:
        """Whether the CLI's conversation equals the client's, and the CLI will not call again.

        After any other stop reason (max_tokens, refusal, model_context_window_exceeded), and after
        an empty answer, the CLI calls upstream again by itself (seen, 2.1.330).
        """
        if self.tool_calls:
            return self._stop_reason == "tool_use"
        has_text = any(str(block.get("text") or "").strip() for block in self.content)
        return has_text and self._stop_reason in ("end_turn", "stop_sequence")

    @property
    def tool_calls(self) -> dict[str, str]:
        """The ids of the answer's tool calls in order, each with the tool's name."""
        return {call["id"]: call["name"] for call in self.content if call["type"] == "tool_use"}

    def feed(self, line: Line) -> list[Event]:
        """Return the events that a line brings. Raises the ApiError that a failure line means."""
        if line.get("parent_tool_use_id") is not None or self.is_done:
            return []

        line_type = line.get("type")
        if line_type == "stream_event":
            return self._feed_event(line["event"])
        if line_type == LOG_LINE:
            self._feed_log_message(line["text"])
        elif line_type == "result":
            self.has_failed = True
            error = to_api_error(line, self._cli_error)
            if self.upstream_error and not error.is_for_operator:
                raise self.upstream_error
            raise error
        elif line.get("status") == "requesting":
            self.is_calling = True
        elif line_type == "rate_limit_event":
            self.rate_limits = to_rate_limit_headers(line.get("rate_limit_info"))
        elif line_type == "assistant":
            self._cli_error = line.get("error") or self._cli_error
            blocks = as_object(line.get("message")).get("content") or []
            self.content.extend(dict(block) for block in blocks)
        return []

    def _feed_log_message(self, text: str) -> None:
        """Learn from the CLI's log that a call leaves, or has failed.

        Some errors the CLI mends by itself, and calls again without what was refused (images,
        signatures of thinking, effort, a stream: seen on 2.1.300 and 2.1.332). Then a second call
        leaves, or fails, after the error.
        """
        leaves = text.startswith(_CALL_LEAVES)
        has_failed = text.startswith(_CALL_FAILED)
        if self.upstream_error and (leaves or has_failed):
            self.called_again = True
        elif leaves:
            # The line that announces the call may still be unread: it comes by the other pipe.
            self.is_calling = True
            self.has_left = True
        elif has_failed:
            self.upstream_error = to_upstream_error(text)

    def _feed_event(self, event: Event) -> list[Event]:
        event_type = event["type"]
        stop_reason = as_object(event.get("delta")).get("stop_reason")
        if self._cli_error and not stop_reason:
            # After a failure come closing events of the CLI's own making, without a stop reason,
            # and then `result`. A model's own refusal ends with a real message_delta.
            return []
        if event_type == "message_start" and self.has_started:
            return []
        # Nothing counts before the start.
        if event_type != "message_start" and not self.has_started:
            return []

        if event_type == "message_start":
            self.has_started = True
            self.is_calling = True
            self.has_left = True
        elif event_type == "message_delta" and isinstance(stop_reason, str):
            self._stop_reason = stop_reason
            self.is_done = True
            # message_stop always follows. It is made here, so that the process can be stopped
            # before it goes on.
            return [event, {"type": "message_stop"}]
        elif event_type == "message_stop":
            # Without a stop reason: upstream's stream broke between two blocks, and the CLI is
            # about to ask for the rest by a second call (seen, 2.1.330).
            raise CliFailed("upstream's stream ended before its answer was complete")
        elif event_type == "content_block_start":
            self._blocks_started += 1
        if "index" in event:
            # The CLI leaves some blocks out of the stream (`fallback`), which SDKs find by index.
            event = {**event, "index": self._blocks_started - 1}
        return [event]


def to_upstream_error(text: str) -> ApiError | None:
    """Return upstream's own error, by the CLI's log message of a call or a count that failed.

    It reads `API error (attempt 1/1): 400 400 {"type":"error","error":{...}}`: the status, and the
    SDK's message, which is the status and the body (seen, 2.1.300 and 2.1.332). None where there is
    no status: the call did not reach upstream, and the `result` line says why.
    """
    match = re.match(r"[^:]*: ([45]\d\d)(?: \1)? (.*)", text, re.DOTALL)
    if match is None:
        return None

    status = int(match[1])
    body: object = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(match[2])
    error = as_object(as_object(body).get("error"))
    message = error.get("message")
    # Without a message it is from something between the CLI and upstream.
    if not isinstance(message, str):
        return ApiError(match[2][:MAX_FOREIGN_ERROR_CHARS], status)
    more = {name: value for name, value in error.items() if name not in ("type", "message")}
    return ApiError(message, status, str(error.get("type") or ""), more)


def to_api_error(result: Line, cli_error: str | None = None) -> ApiError:
    """Return the error that a `result` line means.

    That is upstream's, else one by `cli_error`, the CLI's own word for it, else a 502.
    """
    text = str(result.get("result") or f"claude gave no answer: {result.get('errors')}")
    # Without `is_error` the text is the model's own.
    if not result.get("is_error"):
        return CliFailed("claude ended its turn without an answer")
    if text.startswith(("Not logged in", "Invalid API key")):
        problem = "claude is not signed in on the gateway's machine, or its sign-in was refused"
        hint = f"{problem}: run `claude auth login` there"
        return ApiError(hint, status=401, is_for_operator=True)
    # This is what the CLI says where the block took effect before the turn's call had left.
    if result.get("terminal_reason") == "blocking_limit":
        return CliFailed("claude held its call back; nothing was sent upstream", status=503)
    if text.startswith("Prompt is too long"):
        return InvalidRequest("prompt is too long for the model's context window")
    model = re.match(r"(?s)There's an issue with the selected model \((.*?)\)", text)
    if model:
        return ApiError(f"model: {model.group(1)}", status=404)

    error_type = str(result.get("api_error_type"))
    status = result.get("api_error_status")
    if not isinstance(status, int) or not 400 <= status <= 599:
        by_cli_error = _STATUS_BY_CLI_ERROR.get(str(cli_error), 502)
        status = STATUS_BY_TYPE.get(error_type) or by_cli_error
    known_type = error_type if error_type in STATUS_BY_TYPE else ""
    return ApiError(_DECORATION.sub("", text), status, known_type)


_RATE_LIMIT_PREFIX: Final = "anthropic-ratelimit-unified"
LONGEST_RETRY_S: Final = 60  # clients may wait so long without seeming to hang


def to_rate_limit_headers(info: Any) -> dict[str, str]:
    """Return a plan's state as the headers that upstream sends and Claude Code reads.

    `info` is {"status", "resetsAt", "unifiedWindows": {"five_hour": {"status", "resetsAt",
    "utilization"}, "seven_day": {...}}}, all of it optional.
    """
    windows = as_object(as_object(info).get("unifiedWindows"))
    sources = (
        ("", "status", info, "status"),
        ("", "reset", info, "resetsAt"),
        ("-5h", "status", windows.get("five_hour"), "status"),
        ("-5h", "reset", windows.get("five_hour"), "resetsAt"),
        ("-5h", "utilization", windows.get("five_hour"), "utilization"),
        ("-7d", "status", windows.get("seven_day"), "status"),
        ("-7d", "reset", windows.get("seven_day"), "resetsAt"),
        ("-7d", "utilization", windows.get("seven_day"), "utilization"),
    )
    headers = {}
    for window, ending, state, name in sources:
        value = str(as_object(state).get(name, ""))
        # Nothing else may get into a header.
        if re.fullmatch(r"[a-z_]+|[0-9.]+", value):
            headers[f"{_RATE_LIMIT_PREFIX}{window}-{ending}"] = value
    return headers


def with_retry_after(error: ApiError, rate_limits: Mapping[str, str]) -> ApiError:
    """Add to an error when a plan's used-up window opens again; until then retries are in vain."""
    reset = rate_limits.get(f"{_RATE_LIMIT_PREFIX}-reset", "")
    is_rejected = rate_limits.get(f"{_RATE_LIMIT_PREFIX}-status") == "rejected"
    if error.status != 429 or not is_rejected or not reset.isdigit():
        return error

    left_s = max(1, int(reset) - int(time.time()))
    return dataclasses.replace(error, retry_after_s=left_s, should_retry=left_s <= LONGEST_RETRY_S)


# ====================================================================== Process
# One running `claude`: its pipes, whole lines, and its end. Used by one thread at a time (the pool
# hands it over). That thread moves all three pipes while it waits for a line, so neither side can
# block the other, and no pipe needs a thread of its own.

# An answer of 128k tokens is about 1 MB. But where a message is rewound the CLI prints its text,
# which is at most one body long; as much again is for escaping and wrapping.
MAX_LINE_BYTES: Final = 2 * MAX_BODY_BYTES
MAX_LOG_LINE_BYTES: Final = 64 * 1024  # of the CLI's log; upstream's errors are far shorter
TAIL_BYTES: Final = 2000  # enough for a stack trace's first lines in an error message
EXIT_STATUS_S: Final = 1.0  # from a closed stdout to the exit status; a dying process needs 0.01 s


class ProcessDied(Exception):
    """The process ended, fell silent, or broke the protocol: it cannot be used any more."""


class CliRefused(ProcessDied):
    """The CLI does not do what a used process needs, or does not answer: take a fresh one."""


class Process:
    """One running CLI.

    Its owner ends it, by `kill` or `close_stdin`, and calls `close` once it has ended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: str) -> None:
        """Start it. Raises OSError."""
        self.started_at = time.monotonic()
        self._popen = subprocess.Popen(
            command,
            env=environment,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # A Ctrl-C at the terminal is the gateway's, not the process's.
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self.lines: collections.deque[Line] = collections.deque()  # read and not yet taken

        # The pipes are raw and do not block: `read` and `write` return None where nothing can be
        # moved now.
        self._stdin: Any = self._popen.stdin
        self._stdout: Any = self._popen.stdout
        self._stderr: Any = self._popen.stderr
        self._pipes: list[Any] = [self._stdin, self._stdout, self._stderr]
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self._open_outputs: list[Any] = [self._stdout, self._stderr]  # that are not at their end
        self._unwritten: collections.deque[Iterator[str]] = collections.deque()  # lines, in pieces
        self._write_buffer = bytearray()  # the next pieces, as bytes
        self._partial_line = bytearray()  # of stdout
        self._partial_log_line = b""  # of stderr
        self._tail = b""  # what it has printed as plain text
        self._has_spoken = False  # a line of the protocol was read

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def is_stopped(self) -> bool:
        """Return whether it was stopped by a signal or a debugger, where the system says so."""
        with contextlib.suppress(OSError):
            return process_state(self.pid) in ("T", "t")
        return False

    def send(self, line: Line) -> None:
        """Queue a line, and write what goes without waiting; `wait` writes the rest."""
        self._unwritten.append(itertools.chain(json_pieces(line), ["\n"]))
        self._write_some()

    def wait(self, deadline: Deadline) -> None:
        """Wait until there are lines. Raises ProcessDied, CliFailed, what the deadline raises."""
        while not self.lines:
            poll = select.poll()
            for pipe in self._open_outputs:
                poll.register(pipe, select.POLLIN)
            if self._write_buffer or self._unwritten:
                poll.register(self._stdin, select.POLLOUT)

            deadline.check()
            poll.poll(deadline.next_wait_s() * 1000)
            self._write_some()
            self._read_some()

    def has_lines(self) -> bool:
        """Return whether there is a line, after one look. Raises ProcessDied, CliFailed."""
        if not self.lines:
            self._read_some()
        return bool(self.lines)

    def kill(self) -> None:
        """End it at once, and what it has started; `close` comes after."""
        # A reaped pid, and the group of that number, may be another process's.
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def close_stdin(self) -> None:
        """Let the CLI end by itself, after what it is doing. Nothing may be sent any more."""
        self._stdin.close()

    def close(self) -> None:
        """Close the pipes of an ended process; it must not be used any more."""
        for pipe in self._pipes:
            pipe.close()

    def _write_some(self) -> None:
        """Write what goes without waiting."""
        try:
            self._fill_write_buffer()
            while self._write_buffer:
                written = self._stdin.write(self._write_buffer[:READ_BYTES])
                if not written:
                    return
                del self._write_buffer[:written]
                self._fill_write_buffer()
        except (OSError, ValueError):
            # stdin is closed; the reason is read from what the process still prints.
            self._write_buffer.clear()
            self._unwritten.clear()

    def _fill_write_buffer(self) -> None:
        """Encode the next pieces, as many as one write may take."""
        while self._unwritten and len(self._write_buffer) < READ_BYTES:
            piece = next(self._unwritten[0], None)
            if piece is None:
                self._unwritten.popleft()
            else:
                self._write_buffer += piece.encode("ascii")

    def _read_some(self) -> None:
        """Take what both pipes hold: stdout first, so that no log line comes too late."""
        chunk: bytes | None = self._stdout.read(READ_BYTES)
        self._read_stderr()
        if chunk == b"":
            raise ProcessDied(self._explain_death())

        first, *others = (chunk or b"").split(b"\n")
        self._partial_line += first
        if len(self._partial_line) > MAX_LINE_BYTES:
            raise CliFailed(f"claude printed a line of over {MAX_LINE_BYTES} bytes")
        for start_of_next in others:
            line: object = None
            with contextlib.suppress(ValueError, RecursionError):
                line = load_json(self._partial_line)
            if isinstance(line, dict):
                self.lines.append(line)
                self._has_spoken = True
            elif not self._has_spoken:
                # A CLI that cannot start says why as plain text. Later such a line is skipped.
                self._add_to_tail(self._partial_line)
            self._partial_line = bytearray(start_of_next)

    def _read_stderr(self) -> None:
        chunk: bytes | None = self._stderr.read(READ_BYTES)
        if chunk == b"":
            self._open_outputs = [self._stdout]

        *lines, partial = (self._partial_log_line + (chunk or b"")).split(b"\n")
        for raw in lines:
            text = read_log_line(raw)
            if text is not None:
                self.lines.append({"type": LOG_LINE, "text": text})
            else:
                self._add_to_tail(raw)
        self._partial_log_line = partial[-MAX_LOG_LINE_BYTES:]

    def _add_to_tail(self, raw: bytes | bytearray) -> None:
        """Keep a line of plain text, in which it may say why it ends."""
        self._tail = (self._tail + raw + b"\n")[-TAIL_BYTES:]

    def _explain_death(self) -> str:
        """Describe how it ended; waits a moment for its exit status."""
        how = "claude closed its output"
        with contextlib.suppress(subprocess.TimeoutExpired):
            how = f"claude ended with status {self._popen.wait(EXIT_STATUS_S)}"
        # What it printed last may still be in the pipe.
        self._read_stderr()

        # On one line, and nothing in it that could pass for a log line of its own.
        tail = self._tail + self._partial_log_line[-TAIL_BYTES:]
        words = " ".join(tail.decode("ascii", "replace").split())
        return f"{how}: {words}" if words else how


# ============================================================== Control channel
# The CLI's control protocol: requests to it with their responses, and its requests to the MCP
# server that the gateway plays, where the model's tool calls wait for the client's results.

REUSE_TIMEOUT_S: Final = 5.0  # for a rewind, prompt, tools, the end of a turn; they take 0.01 s
INTERRUPT_TIMEOUT_S: Final = 2.0  # for a turn to end when its client has left; it needs 0.01 s
MAX_COST_USD: Final = 1e9  # of a process, to keep nonsense out of the sums
# Requests that a used process depends on, and that a later CLI may not know.
REUSE_REQUESTS: Final = ("rewind_conversation", "set_model", "mcp_message")
SERVER_INFO: Final[JsonObject] = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {"listChanged": True}},
    "serverInfo": {"name": TOOL_SERVER, "version": __version__},
}


class ToolServer:
    """The MCP server of one process: a request's tools are listed there, and their calls wait.

    What the model is told of the tools goes upstream in CLAUDE_CODE_EXTRA_BODY. They are listed
    here so that the CLI hands the calls on, and counts the tools.
    """

    def __init__(self, process: Process) -> None:
        self.manifest: list[JsonObject] = []  # the tools in MCP's form, as last set
        # By name, as the CLI first saw each: for a count it remembers them.
        self.known_descriptions: dict[str, str] = {}
        self.waiting_calls: dict[str, Line] = {}  # tools/call lines by tool_use id
        self.is_listed = False  # the CLI has asked for the tools since they were last set
        self._process = process

    def set_manifest(self, manifest: list[JsonObject]) -> None:
        self.manifest = manifest
        self.is_listed = False
        for entry in manifest:
            self.known_descriptions.setdefault(entry["name"], entry["description"])

    def initialize_fields(self) -> JsonObject:
        """Return the fields of the CLI's `initialize` request that describe this server."""
        manifest = {"initializeResult": SERVER_INFO, "toolsListResult": {"tools": self.manifest}}
        return {"sdkMcpServers": [TOOL_SERVER], "sdkMcpServerManifests": {TOOL_SERVER: manifest}}

    def feed(self, line: Line) -> bool:
        """Answer an MCP request, or let a tool call wait; return whether it was one of them."""
        message = as_object(as_object(line.get("request")).get("message"))
        method = message.get("method")
        if method == "tools/call":
            meta = as_object(as_object(message.get("params")).get("_meta"))
            self.waiting_calls[str(meta.get("claudecode/toolUseId"))] = line
            return True
        # Without an id a line is not MCP, or is a notification, which wants no answer.
        if "id" not in message:
            return False

        result: JsonObject = {}
        if method == "initialize":
            result = SERVER_INFO
        elif method == "tools/list":
            result = {"tools": self.manifest}
            self.is_listed = True
        self._reply(line, result)
        return True

    def send_result(self, tool_use_id: str, result: JsonObject) -> None:
        """Answer a waiting call: {"content": [blocks], "isError": bool}."""
        self._reply(self.waiting_calls.pop(tool_use_id), result)

    def _reply(self, line: Line, result: JsonObject) -> None:
        reply = {"jsonrpc": "2.0", "id": line["request"]["message"]["id"], "result": result}
        response = {
            "subtype": "success",
            "request_id": line.get("request_id"),
            "response": {"mcp_response": reply},
        }
        self._process.send({"type": "control_response", "response": response})


def to_manifest(tools: Iterable[JsonObject], *, is_count: bool) -> list[JsonObject]:
    """Return tools in MCP's form. Only a count needs the true schemas of their inputs.

    The CLI takes no tools at all where one has a schema that MCP does not take, and leaves out one
    whose schema is invalid further inside (seen): both are for upstream to judge.
    """
    manifest = []
    for tool in tools:
        # Anthropic's own tools have neither a description nor a schema.
        has_schema = "input_schema" in tool
        description = tool.get("description") or ("" if has_schema else dump_json(tool))
        entry = {
            "name": to_tool_name(tool),
            "description": str(description),
            "inputSchema": {"type": "object"},
            "annotations": {"readOnlyHint": True},  # else calls wait for each other
            "_meta": {"anthropic/maxResultSizeChars": 2 * MAX_TOOL_RESULT_CHARS},
        }
        if is_count:
            entry["inputSchema"] = _to_mcp_schema(tool.get("input_schema"))
        manifest.append(entry)
    return manifest


def _to_mcp_schema(schema: Any) -> JsonObject:
    """Return a schema that MCP takes: the same where it does, else one with all the same text."""
    fields = without_nulls(as_object(schema)) or {"type": "object", "properties": {}}
    properties = fields.get("properties", {})
    required = fields.get("required", [])
    is_object = fields.get("type") == "object" and isinstance(properties, dict)
    has_schemas = is_object and all(isinstance(each, (dict, bool)) for each in properties.values())
    has_names = isinstance(required, list) and all(isinstance(each, str) for each in required)
    if has_schemas and has_names:
        return fields
    return {"type": "object", "properties": {"schema": {"const": fields}}}


class ControlChannel:
    """The control protocol of one process. Its methods raise ProcessDied and CliFailed."""

    def __init__(self, process: Process) -> None:
        self.tool_server = ToolServer(process)
        self.pending_results = 0  # `result` lines that the CLI has still to print, one a user line
        self.settings: JsonObject = {}  # as last sent
        self.cost_usd = 0.0  # of all turns whose `result` was read
        self.count_error: ApiError | None = None  # upstream's, since it was last asked for a count
        self._process = process
        self._pending_settings_id = ""  # of the last `apply`, until it is acknowledged

    @property
    def is_applying(self) -> bool:
        """Whether settings that were sent are not yet acknowledged."""
        return bool(self._pending_settings_id)

    @property
    def is_blocked(self) -> bool:
        """Whether the CLI has acknowledged BLOCK_UPSTREAM_CALLS: it makes no call any more."""
        return self.settings is BLOCK_UPSTREAM_CALLS and not self.is_applying

    def read_line(self, deadline: Deadline | None = None) -> Line:
        """Take the next line, and do what the protocol needs. No deadline: it must be there."""
        if deadline:
            self._process.wait(deadline)
        line = self._process.lines.popleft()
        if self.tool_server.feed(line):
            return line

        response = as_object(line.get("response"))
        if line.get("type") == "result":
            self.pending_results -= 1
            cost = line.get("total_cost_usd")
            # Infinity, and an integer beyond all floats, would spoil the sum.
            if isinstance(cost, (int, float)) and 0 <= cost < MAX_COST_USD:
                self.cost_usd = float(cost)
        # Settings that are refused stay pending: `is_blocked` is then never true, and who waits for
        # them times out.
        elif response.get("request_id") == self._pending_settings_id:
            if response.get("subtype") == "success":
                self._pending_settings_id = ""
        elif line.get("type") == LOG_LINE and line["text"].startswith(_COUNT_FAILED):
            self.count_error = to_upstream_error(line["text"])
        return line

    def send(self, line: Line) -> None:
        """Send a message's line; each of the user's ends in a `result`."""
        if line["type"] == "user":
            self.pending_results += 1
        self._process.send(line)

    def request(self, subtype: str, deadline: Deadline, **fields: Any) -> JsonObject:
        """Send a control request and wait for its response.

        Raises CliRefused if one of REUSE_REQUESTS is refused or not answered. Any other failure
        raises ProcessDied.
        """
        failure: type[ProcessDied] = ProcessDied
        timeout_s = CONTROL_TIMEOUT_S
        if subtype in REUSE_REQUESTS:
            failure = CliRefused
            timeout_s = REUSE_TIMEOUT_S

        request_id = self._send_control_request(subtype, **fields)
        too_late = failure(f"claude did not answer {subtype} within {timeout_s:.0f} s")
        capped = deadline.capped(timeout_s, too_late)

        response: JsonObject = {}
        while response.get("request_id") != request_id:
            response = as_object(self.read_line(capped).get("response"))

        if response.get("subtype") != "success":
            raise failure(f"claude refused {subtype}: {response.get('error')}")
        return as_object(response.get("response"))

    def count_context(self, deadline: Deadline) -> JsonObject:
        """Have upstream count the conversation and tools; return the `get_context_usage` response.

        Where upstream refuses, `count_error` says why, and the response holds guesses.
        """
        self.count_error = None
        usage = self.request("get_context_usage", deadline)
        # The log comes by another pipe: its line may stand behind the response.
        while self._process.has_lines():
            self.read_line()
        return usage

    def apply_settings(self, settings: JsonObject, deadline: Deadline) -> None:
        """Change settings, and wait until the CLI has taken them."""
        self.settings = settings
        self.request("apply_flag_settings", deadline, settings=settings)

    def start_applying(self, settings: JsonObject) -> None:
        """Change settings without waiting; `is_applying` until they are acknowledged."""
        self.settings = settings
        request_id = self._send_control_request("apply_flag_settings", settings=settings)
        self._pending_settings_id = request_id

    def interrupt(self) -> bool:
        """End the turn whose answer nobody wants any more; return whether nothing is left of it."""
        too_late = ProcessDied("claude did not stop its answer")
        deadline = Deadline(INTERRUPT_TIMEOUT_S, no_hook, too_late)
        reply = self.request("interrupt", deadline)
        self.wait_until_idle(deadline)
        return not reply.get("still_queued")

    def wait_until_idle(self, deadline: Deadline) -> None:
        """Wait for every result and acknowledgement. Raises ProcessDied where one does not come."""
        too_late = ProcessDied("claude did not end its turn")
        capped = deadline.capped(CONTROL_TIMEOUT_S, too_late)
        while self.pending_results or self.is_applying:
            self.read_line(capped)

    def rewind(self, fields: JsonObject, deadline: Deadline) -> None:
        """Take back a message and what follows it; nothing of it is ever sent upstream again.

        `fields` are those of `rewind_conversation` (`Conversation.rewind`). Raises CliRefused.
        """
        reply = self.request("rewind_conversation", deadline, **fields)
        if reply.get("rewound") is not True:
            raise CliRefused(f"claude did not rewind its conversation: {reply}")
        self.wait_until_idle(deadline)
        self.tool_server.waiting_calls.clear()

    def wait_for_turn_end(self, tool_calls: set[str], deadline: Deadline) -> None:
        """Wait until the turn has ended, or until these tool calls of it wait for results.

        Raises ProcessDied if the CLI goes on in place of that: its conversation would then differ
        from the client's.
        """
        capped = deadline.capped(REUSE_TIMEOUT_S, ProcessDied("claude did not settle"))
        while True:
            if tool_calls:
                has_ended = self.tool_server.waiting_calls.keys() >= tool_calls
            else:
                has_ended = self.pending_results == 0
            if has_ended and not self.is_applying and not self._process.has_lines():
                return

            line = self.read_line(capped)
            is_failure = line.get("type") == "result" and line.get("is_error")
            went_on = bool(tool_calls) and line.get("type") in ("result", "user")
            if is_failure or went_on:
                raise ProcessDied("claude did not keep its conversation")

    def replace_tools(self, manifest: list[JsonObject], deadline: Deadline) -> None:
        """List other tools, and wait until the CLI has asked for them. Raises CliRefused."""
        self.tool_server.set_manifest(manifest)
        message = {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}
        self.request("mcp_message", deadline, server_name=TOOL_SERVER, message=message)

        too_late = CliRefused("claude did not ask for its tools")
        capped = deadline.capped(REUSE_TIMEOUT_S, too_late)
        while not self.tool_server.is_listed:
            self.read_line(capped)

    def send_tool_results(self, results: Mapping[str, JsonObject], deadline: Deadline) -> None:
        """Answer the waiting tool calls, by tool_use id, in this order."""
        too_late = ProcessDied("claude took no tool result")
        capped = deadline.capped(CONTROL_TIMEOUT_S, too_late)
        for number, (tool_use_id, result) in enumerate(results.items(), 1):
            self.tool_server.send_result(tool_use_id, result)
            # One at a time: the CLI puts results in the order in which it has dealt with them.
            if number < len(results):
                self._wait_for_echo(tool_use_id, capped)

    def _wait_for_echo(self, tool_use_id: str, deadline: Deadline) -> None:
        """Wait until the CLI prints the user message that it has made of a tool result."""
        while True:
            line = self.read_line(deadline)
            if line.get("type") == "user" and tool_use_id in json.dumps(line.get("message")):
                return

    def _send_control_request(self, subtype: str, **fields: Any) -> str:
        """Send a request; return its id."""
        request_id = f"{subtype} {uuid.uuid4()}"
        request = {"subtype": subtype, **fields}
        self._process.send(
            {"type": "control_request", "request_id": request_id, "request": request}
        )
        return request_id


# ====================================================================== Session
# A process and the conversation in it, and how a request is brought to it: rewind to the part that
# both share, tell what differs (settings, system prompt, tools), append the rest, then call or
# count. To go on with a conversation rewinds nothing, to edit or branch it rewinds to the middle,
# to begin another one rewinds all.

# From one event of an answer to the next. The CLI hands no pings on, and a model may think for
# minutes without a word; the CLI's own limit is the same (read, 2.1.332).
UPSTREAM_SILENCE_S: Final = 300.0
CALL_TIMEOUT_S: Final = 60.0  # from the query to the call; 0.02 s, and some for 32 MB of images
SETUP_ATTEMPTS: Final = 3  # for one request; see `SessionRequest.count_failure`
COUNT_ATTEMPTS: Final = 10  # the tools that the CLI was just given may take it a moment


class PoolKey(NamedTuple):
    """What a process is bound to with its first request; it never serves another one."""

    caller: Caller
    betas: tuple[str, ...]


class PrefixKey(NamedTuple):
    """What a turn must have in common with the one before, for any message to be reused.

    Kept in place of the turn, whose messages may take 32 MB.
    """

    model: str
    system: str
    cache_ttl: str

    @classmethod
    def of(cls, turn: Turn) -> PrefixKey:
        return cls(turn.model, turn.system, turn.cache_ttl)


class HeldMessage(NamedTuple):
    """One message inside a process."""

    digest: bytes
    # Of the user line that added it. None for answers, and for results that answered tool calls.
    uuid: str | None = None
    is_rewind_point: bool = False  # a user message without tool results


class Conversation:
    """The messages that a process holds. What is done to the process is Session's part."""

    def __init__(self) -> None:
        self.messages: list[HeldMessage] = []
        # The last message is a query whose answer was not kept: it is rewound before the next turn.
        self.has_unanswered_query = False
        self.pending_tool_calls: list[str] = []  # ids of the calls that the last answer makes

    def reusable_prefix(self, turn: Turn, previous: PrefixKey | None) -> int:
        """Return how many of the held messages a turn can go on from; the others are rewound.

        `previous` is that of the turn before. There are three cases:

        1. Nothing, because the model, the system prompt or the ttl differs, or the turn before was
           prepared only in part (`previous` is None).
        2. All of it, because the turn goes on where the conversation ended. If that was with tool
           calls, the turn has to bring their results, in a form that passes through MCP.
        3. A part. From the first difference it is gone back to the nearest rewind point: a message
           can be rewound only together with those that follow it, and only if it is a user's own.
           What stands before that message is reused.
        """
        if previous != PrefixKey.of(turn):
            return 0

        held = self.messages[:-1] if self.has_unanswered_query else self.messages
        common = 0
        # The turn's last message is the query, which is always sent anew.
        for message, digest in zip(held, turn.digests[:-1], strict=False):
            if message.digest != digest:
                break
            common += 1

        if common == len(self.messages) and self._can_be_followed_by(turn.messages[common:]):
            return common
        for index in range(min(common, len(self.messages) - 1), -1, -1):
            if self.messages[index].is_rewind_point:
                return index
        return 0

    def _can_be_followed_by(self, following: Sequence[Message]) -> bool:
        """Return whether messages can be appended: after tool calls only results MCP can carry."""
        if not self.pending_tool_calls:
            return True
        if len(following) != 1:
            return False
        return to_tool_results(following[0], self.pending_tool_calls) is not None

    def rewind(self, length: int) -> JsonObject:
        """Hold only the first messages; return the fields of the `rewind_conversation` request."""
        uuids = [message.uuid for message in self.messages if message.uuid]
        fields = {
            "target_message_uuid": self.messages[length].uuid,
            "last_seen_user_message_uuid": uuids[-1],
            "interrupt_if_running": True,  # ends a turn whose tool calls wait
        }
        del self.messages[length:]
        self.has_unanswered_query = False
        self.pending_tool_calls = []
        return fields

    def add(self, turn: Turn, index: int, line: Line | None) -> None:
        """Hold a message of a turn. `line` added it; None: it answered the pending tool calls."""
        is_user_line = line is not None and line["type"] == "user"
        added_by = line["uuid"] if line is not None and is_user_line else None
        has_results = any(b["type"] == "tool_result" for b in turn.messages[index].content)
        is_rewind_point = is_user_line and not has_results
        self.messages.append(HeldMessage(turn.digests[index], added_by, is_rewind_point))

        self.has_unanswered_query = line is None or line.get("shouldQuery", False)
        self.pending_tool_calls = []

    def add_answer(self, parser: StreamParser) -> None:
        # A client's empty texts are left out too (`_parse_messages`).
        said = [b for b in parser.content if b.get("type") != "text" or b.get("text")]
        digest = digest_message(Message("assistant", said))
        self.messages.append(HeldMessage(digest))
        self.has_unanswered_query = False
        self.pending_tool_calls = list(parser.tool_calls)


@dataclass(eq=False)
class SessionRequest:
    """What a request needs a session for, and what has failed so far."""

    turn: Turn
    key: PoolKey
    deadline: Deadline
    is_count: bool = False  # only its tokens are counted, with a random system prompt
    failed_attempts: int = 0
    arrived_at: float = field(default_factory=time.monotonic)  # its place among those who wait

    @property
    def wants_new(self) -> bool:
        """Whether only a new process will do: one that was lent has died."""
        return self.failed_attempts > 0

    def count_failure(self, death: ProcessDied) -> None:
        """Count a process that died before anything was sent upstream, which has cost nothing.

        So SETUP_ATTEMPTS are made: one with a process of the pool's, then with new ones. After them
        CliFailed is raised.
        """
        self.failed_attempts += 1
        if self.failed_attempts == SETUP_ATTEMPTS:
            log.warning("%s; nothing was sent upstream, giving up", death)
            raise CliFailed(str(death), status=503) from death
        log.warning("%s; nothing was sent upstream, retrying on a new process", death)


def _warmup_turn(**fields: Any) -> Turn:
    body = {"model": DEFAULT_MODEL_NAME, "max_tokens": 1024, **fields}
    return to_turn(body, [("messages.0", {"role": "user", "content": "rehearsal"})])


# Two turns of no meaning. They differ in system prompt and tools, so a warm-up tests both changes.
WARMUP_TURNS: Final = (
    _warmup_turn(),
    _warmup_turn(system="rehearsal", tools=[{"name": "rehearsal", "input_schema": {}}]),
)


class Session:
    """A process and the conversation in it. One owner at a time; nobody else writes its fields.

    A request calls `prepare`, `start_call` and `read_events`, or `count_tokens`; then
    `finish_turn`. All raise ProcessDied and CliFailed, and what their deadline raises.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.key: PoolKey | None = None  # None: it is spare, it has served nobody
        self.is_new = True  # not initialised
        self.models: list[JsonObject] = []  # as the CLI lists them
        self.turns = 0
        self.parser = StreamParser()  # of the turn that is answered, or was last
        self._channel = ControlChannel(process)
        self._conversation = Conversation()
        self._previous: PrefixKey | None = None  # of the last turn; None while one is prepared
        self._turn: Turn | None = None  # that turn, from `prepare` to `start_call`
        self._settings: JsonObject = {}  # that turn's
        self._counted_tools: dict[str, JsonObject] = {}  # by name, as the CLI has counted each
        self._booked_usd = 0.0  # the part of the cost that `take_cost` has returned

    def distance(self, request: SessionRequest, *, may_rewind: bool) -> int | None:
        """Return how many messages a turn would append and lose here; None: it cannot be served.

        With a login a lost message counts double, because a cached prefix is lost with it.
        """
        turn = request.turn
        if self.key not in (None, request.key):
            return None
        if request.wants_new and not self.is_new:
            return None
        manifest = to_manifest(turn.tools, is_count=request.is_count)
        if request.is_count and not self._can_count(turn.tools, manifest):
            return None
        # A session that was used and waits in the pool has its `_previous`; only a spare has not.
        if self.key is None or self._previous is None:
            return len(turn.messages)

        held = len(self._conversation.messages)
        reusable = self._conversation.reusable_prefix(turn, self._previous)
        lost = held - reusable
        differs = turn.system != self._previous.system or manifest != self._manifest()
        if not may_rewind and (lost or differs):
            return None
        if lost == 1 and self._conversation.has_unanswered_query:
            # Only a query without an answer is lost, which is worth nothing.
            lost = 0
        weight = 2 if turn.is_login else 1
        return len(turn.messages) - reusable + weight * lost

    def _can_count(self, tools: Iterable[JsonObject], manifest: Iterable[JsonObject]) -> bool:
        """Return whether the CLI has not seen or counted another tool under one of these names."""
        known = self._channel.tool_server.known_descriptions
        for entry in manifest:
            if known.get(entry["name"], entry["description"]) != entry["description"]:
                return False
        counted = self._counted_tools
        return all(counted.get(to_tool_name(tool), tool) == tool for tool in tools)

    def _manifest(self) -> list[JsonObject]:
        return self._channel.tool_server.manifest

    def take_cost(self) -> float:
        """Return the dollars that the process has newly reported, in the lines that were read."""
        new_usd = self._channel.cost_usd - self._booked_usd
        self._booked_usd = self._channel.cost_usd
        return new_usd

    def read_last_lines(self) -> None:
        """Read what an ended process has still printed; its cost may be there. Does not raise."""
        with contextlib.suppress(ProcessDied, CliFailed):
            while self.process.has_lines():
                self._channel.read_line()

    def warm_up(self, deadline: Deadline) -> None:
        """Warm up a new process by a blocked query, and prove that it can be used again and again.

        Raises CliRefused where it cannot.
        """
        first, second = WARMUP_TURNS
        key = PoolKey(NOBODY, ())

        self.prepare(SessionRequest(first, key, deadline))
        self._channel.apply_settings(BLOCK_UPSTREAM_CALLS, deadline)
        self.start_call(deadline)
        self._wait_for_blocked_end(deadline)

        self.prepare(SessionRequest(second, key, deadline))

        self.turns = 0
        self.key = None
        self._turn = None

    def prepare(self, request: SessionRequest) -> None:
        """Make the process hold all messages but the last one, or all of them to be counted.

        Nothing goes upstream. With a login one message is sent by a blocked query.
        """
        if self.key not in (None, request.key):
            raise RuntimeError("a session must never change its caller")
        # From now on the process is bound to this caller and these betas.
        self.key = request.key
        self.turns += 1
        turn = request.turn
        deadline = request.deadline

        previous = self._previous
        # Until the last line of this method has run, nothing here can be reused.
        self._previous = None

        manifest = to_manifest(turn.tools, is_count=request.is_count)
        if self.is_new:
            self._initialize(turn, manifest, deadline)

        conversation = self._conversation
        reusable = conversation.reusable_prefix(turn, previous)
        if reusable < len(conversation.messages):
            fields = conversation.rewind(reusable)
            self._channel.rewind(fields, deadline)
        else:
            self._channel.wait_for_turn_end(set(conversation.pending_tool_calls), deadline)

        if reusable:
            # The CLI's own breakpoints are on the messages that it holds. With one more of the
            # client's in each turn they would soon be over the four that the API takes.
            turn = dataclasses.replace(turn, cache_breakpoint=None)

        end = len(turn.messages) if request.is_count else len(turn.messages) - 1
        blocked_index = None
        if turn.is_login and reusable == 0 and not request.is_count:
            blocked_index = _first_user_index(turn.messages[:end])
        # The tools come first, because they take the CLI a moment.
        if manifest != self._manifest():
            self._channel.replace_tools(manifest, deadline)
        self._apply_settings(turn, previous, deadline, blocked=blocked_index is not None)

        for index in range(reusable, end):
            if index == blocked_index:
                self._append_blocked(turn, index, deadline)
            else:
                self._append(turn, index)
                # User lines are queued but assistant lines applied at once: without a wait the
                # order would be lost.
                self._channel.wait_until_idle(deadline)

        self._turn = turn
        self._previous = PrefixKey.of(turn)

    def start_call(self, deadline: Deadline) -> None:
        """Start the call: send the results of the tool calls that wait, or the last message."""
        if self._turn is None:
            raise RuntimeError("`prepare` comes first")
        turn = self._turn
        # An idle process must keep nothing of a large request.
        self._turn = None
        self.parser = StreamParser()

        last = len(turn.messages) - 1
        call_ids = self._conversation.pending_tool_calls
        if not call_ids:
            self._append(turn, last, is_query=True)
            return

        # None cannot come here: `reusable_prefix` kept the calls because MCP carries the results.
        results = to_tool_results(turn.messages[last], call_ids) or []
        self._conversation.add(turn, last, None)
        self._channel.send_tool_results(dict(zip(call_ids, results, strict=True)), deadline)

    def read_events(self, deadline: Deadline) -> Generator[list[Event], None, list[Event]]:
        """Yield the answer's events in batches of those that were ready together.

        Returns the last batch. Raises ApiError; ProcessDied only while nothing went upstream.
        """
        parser = self.parser
        not_called = ProcessDied(f"claude did not call upstream within {CALL_TIMEOUT_S:.0f} s")
        until_called = deadline.capped(CALL_TIMEOUT_S, not_called)
        fell_silent = ApiError(
            f"upstream sent nothing for {UPSTREAM_SILENCE_S:.0f} s in the middle of its answer",
            status=504,
            should_retry=False,
        )

        batch: list[Event] = []
        while not parser.is_done:
            if batch and not self.process.lines:
                yield batch
                batch = []

            until = deadline if parser.is_calling else until_called
            if parser.has_started:
                until = deadline.capped(UPSTREAM_SILENCE_S, fell_silent)
            try:
                line = self._channel.read_line(until)
                with malformed_as_502():
                    batch += parser.feed(line)

                if parser.has_left and self._channel.settings is not BLOCK_UPSTREAM_CALLS:
                    self._channel.start_applying(BLOCK_UPSTREAM_CALLS)
                if parser.upstream_error:
                    if not self._channel.is_blocked:
                        # At once, because `finish_turn` then has to end the process.
                        raise parser.upstream_error
                    deadline = deadline.capped(INTERRUPT_TIMEOUT_S, parser.upstream_error)
            except ApiError:
                # The client gets what came just before the error.
                yield batch
                raise
            except ProcessDied as exc:
                self._kill_and_read_the_rest()
                if not parser.is_calling:
                    # The CLI announces each call, so nothing was sent upstream.
                    raise
                log.error("%s", exc)
                yield batch
                raise CliFailed("claude ended before its answer was complete") from exc
        return batch

    def count_tokens(self, request: SessionRequest) -> TokenCounts:
        """Return the CLI's count of a turn; for it the CLI asks upstream's count_tokens."""
        self.prepare(request)
        previous = self._previous
        self._previous = None
        self._turn = None

        tools = {to_tool_name(tool): tool for tool in request.turn.tools}
        taken: set[Any] = set()
        for _ in range(COUNT_ATTEMPTS):
            usage = self._channel.count_context(request.deadline)
            if self._channel.count_error:
                # The conversation is not at fault, so the process can go on.
                self._previous = previous
                raise self._channel.count_error
            taken = {tool.get("name") for tool in usage.get("mcpTools") or []}
            for name in taken & tools.keys():
                self._counted_tools.setdefault(name, tools[name])
            if taken == tools.keys():
                self._previous = previous
                return to_token_counts(usage)
            time.sleep(POLL_INTERVAL_S)

        # It takes all tools at once, but for those whose schemas are invalid.
        if taken and taken < tools.keys():
            index = next(index for index, name in enumerate(tools) if name not in taken)
            raise InvalidRequest(f"tools.{index}: the JSON schema of its input is invalid")
        raise CliFailed("claude did not take the tools that are to be counted")

    def finish_turn(self) -> bool:
        """End a turn, however it went; return whether the session can be used again.

        It can where nothing of this turn can reach upstream any more. Raises ProcessDied,
        CliFailed; takes up to INTERRUPT_TIMEOUT_S.
        """
        channel = self._channel
        conversation = self._conversation
        parser = self.parser

        if self._previous is None:
            # A turn is prepared only in part.
            return False
        if conversation.messages and not conversation.messages[0].is_rewind_point:
            # No other conversation could begin: there is nothing to rewind to.
            return False
        if not conversation.has_unanswered_query:
            # Nothing was called.
            return True

        if parser.upstream_error:
            # Where the CLI has repaired the request and called again, it goes on to leave out what
            # was refused, and its conversation differs from the client's.
            return parser.has_failed and not parser.called_again
        if parser.has_failed:
            return True
        if not parser.is_done:
            # Before the call the CLI cannot be interrupted: it is killed.
            if not parser.is_calling:
                return False
            return channel.interrupt()

        tool_names = {tool["name"] for tool in self._manifest()}
        if not parser.can_go_on or not tool_names.issuperset(parser.tool_calls.values()):
            # The CLI would call again: by itself, or because the model called an unknown tool. It
            # is kept only if it has acknowledged the block.
            return channel.is_blocked

        conversation.add_answer(parser)
        # The settings are likely those of the next turn too. But while tool calls wait the block
        # stays: when its stdin ends the CLI lets them fail, and calls upstream.
        if not channel.is_applying and not conversation.pending_tool_calls:
            channel.start_applying(self._settings)
        return True

    def _initialize(self, turn: Turn, manifest: list[JsonObject], deadline: Deadline) -> None:
        """Send the first request of a process, which can set the system prompt and tools."""
        tool_server = self._channel.tool_server
        tool_server.set_manifest(manifest)
        fields: JsonObject = {"hooks": None}
        if turn.system:
            fields["systemPrompt"] = [turn.system]
        fields.update(tool_server.initialize_fields())

        response = self._channel.request("initialize", deadline, **fields)
        self.models = response.get("models") or []
        self.is_new = False

    def _apply_settings(
        self, turn: Turn, previous: PrefixKey | None, deadline: Deadline, *, blocked: bool
    ) -> None:
        """Tell what a turn needs, as far as it differs from before.

        `blocked`: until the next settings no call goes upstream (`_append_blocked`).
        """
        channel = self._channel
        model = resolve_model(turn.model, self.models)
        self._settings = to_flag_settings(turn, model)
        settings = self._settings
        if blocked:
            settings = {**settings, "env": settings["env"] | BLOCK_UPSTREAM_CALLS["env"]}
        if settings != channel.settings:
            channel.apply_settings(settings, deadline)

        if previous and turn.system != previous.system:
            channel.request(
                "set_model",
                deadline,
                model=model,
                system_prompt=turn.system or DEFAULT_SYSTEM_PROMPT,
                only_if_model_is_current=True,
            )

    def _append(self, turn: Turn, index: int, *, is_query: bool = False) -> None:
        line = to_stdin_message(turn, index, self._settings["model"], is_query=is_query)
        self._conversation.add(turn, index, line)
        self._channel.send(line)

    def _append_blocked(self, turn: Turn, index: int, deadline: Deadline) -> None:
        """Append a message by a query that cannot go upstream: `_apply_settings` blocked it.

        With a login the CLI adds its reminders (environment, model, date) to the message that is
        queried first, for good. That has to be the first message of the user's in any process:
        another one would change the bytes that upstream has cached, and the text of tool results.
        """
        self._append(turn, index, is_query=True)
        self._wait_for_blocked_end(deadline)
        self._channel.apply_settings(self._settings, deadline)

    def _wait_for_blocked_end(self, deadline: Deadline) -> None:
        """Wait until a blocked query has ended. Raises CliRefused if it was answered."""
        while self._channel.pending_results:
            if self._channel.read_line(deadline).get("type") == "stream_event":
                raise CliRefused("claude does not hold its calls back")

    def _kill_and_read_the_rest(self) -> None:
        """Kill the process, and learn from its last lines whether it has called upstream."""
        self.process.kill()
        too_late = ProcessDied("claude did not end")
        with contextlib.suppress(ProcessDied, ApiError), malformed_as_502():
            while True:  # until ProcessDied says that there is no more
                deadline = Deadline(INTERRUPT_TIMEOUT_S, no_hook, too_late)
                self.parser.feed(self._channel.read_line(deadline))


def _first_user_index(messages: Sequence[Message]) -> int | None:
    for index, message in enumerate(messages):
        if message.role == "user":
            return index
    return None


# ========================================================================= Pool
# Who has which session, and who waits. A session is owned by the pool or by one request, never by
# both, and nothing blocks while the lock is held. One thread, the supervisor, starts and reaps
# processes. A spare is warmed up on a thread of its own. The public methods run on request threads.

MAX_SESSION_AGE_S: Final = 3600.0  # old processes may hold stale sign-ins, or be an old CLI's
MAX_SESSION_TURNS: Final = 1000  # measured: time and memory stay flat over as many turns
IDLE_TIMEOUT_S: Final = 300.0  # after a burst, for processes beyond --processes
# Wait for so long before the next spare is started, so that its 0.45 s of processor time do not
# delay the call of the request that took the last one.
SPARE_DELAY_S: Final = 0.1
# What using a spare costs, in messages: its first turn is slower by as much as replaying so many.
SPARE_COST_MESSAGES: Final = 25
SUPERVISOR_INTERVAL_S: Final = 5.0  # how soon a dead or stale spare is noticed without a request
REUSE_RETRY_S: Final = 600.0  # a warm-up may have failed from load alone, so it is tried again
EXIT_GRACE_S: Final = 5.0  # from EOF on stdin to SIGKILL; the CLI needs 0.04 s
OVERLOADED_RETRY_AFTER_S: Final = 5  # told to clients that find the queue full

CLOSING: Final = "the gateway is shutting down"
STATES: Final = ("spare", "starting", "idle", "busy", "ending")


class Fleet:
    """A pool's sessions, each in one of STATES. Guarded by the pool's lock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Session -> (state, time.monotonic() when it was entered), oldest entry first.
        self._states: dict[Session, tuple[str, float]] = {}

    def move(self, session: Session, state: str) -> None:
        """Put a session into a state; a new one is added."""
        self._states.pop(session, None)
        self._states[session] = (state, time.monotonic())

    def in_state(self, *states: str) -> list[Session]:
        """Return the sessions in these states, the longest there first."""
        return [session for session, (state, _) in self._states.items() if state in states]

    def free_slots(self) -> int:
        """Return how many more sessions may be lent."""
        return self.settings.max_concurrency - len(self.in_state("busy"))

    def nearest(self, request: SessionRequest, *, may_rewind: bool) -> Session | None:
        """Return the session in which a request costs least, the longest idle of equal ones.

        A spare costs 1 extra while fewer than --processes - 1 are busy or idle, so that no
        conversation is thrown away needlessly. From that number on it costs SPARE_COST_MESSAGES,
        because it means one more process.
        """
        kept_in_use = min(self.settings.processes - 1, self.settings.max_concurrency)
        has_room = len(self.in_state("busy", "idle")) < kept_in_use
        spare_cost = 1 if has_room else SPARE_COST_MESSAGES

        nearest: Session | None = None
        lowest_cost = 0
        for session in self.in_state("spare", "idle"):
            cost = session.distance(request, may_rewind=may_rewind)
            if cost is None:
                continue
            if session.key is None:
                cost += spare_cost
            if nearest is None or cost < lowest_cost:
                nearest = session
                lowest_cost = cost

        if nearest and nearest.process.is_stopped():
            log.warning("claude (pid %d) was stopped, and is ended", nearest.process.pid)
            nearest.process.kill()
            self.move(nearest, "ending")
            return self.nearest(request, may_rewind=may_rewind)
        return nearest

    def end(self, session: Session) -> None:
        """Let an idle process end by itself; kill one that may be in the middle of a turn."""
        if session in self.in_state("spare", "idle"):
            session.process.close_stdin()
        else:
            session.process.kill()
        self.move(session, "ending")

    def evict(self, *, incoming: bool = False) -> None:
        """End idle sessions: the dead, the old, and those over the numbers to be kept.

        `incoming`: one more is about to be started for a request, and needs a slot.
        """
        now = time.monotonic()
        for session in self.in_state("spare", "idle"):
            is_old = now - session.process.started_at >= MAX_SESSION_AGE_S
            if is_old or not session.process.is_alive():
                self.end(session)

        kept = self.settings.processes
        candidates = self.in_state("idle") if kept else self.in_state("spare", "idle")
        surplus = len(self.in_state("spare", "idle", "starting")) - kept
        free_slots = self.free_slots()
        if incoming:
            free_slots -= 1
        without_slot = len(candidates) - free_slots

        for rank, session in enumerate(candidates):  # the longest idle first
            _, idle_since = self._states[session]
            was_long_idle = now - idle_since > IDLE_TIMEOUT_S
            if rank < without_slot or (rank < surplus and was_long_idle):
                self.end(session)

    def reap(self) -> list[Session]:
        """Return the ending sessions whose process has ended; kill those whose grace is over."""
        now = time.monotonic()
        ended = []
        for session in self.in_state("ending"):
            _, ending_since = self._states[session]
            if not session.process.is_alive():
                del self._states[session]
                ended.append(session)
            elif now >= ending_since + EXIT_GRACE_S:
                session.process.kill()
        return ended


class Pool:
    """Sessions, interchangeable but for their key, and the requests that wait for one."""

    def __init__(
        self, start: Callable[[], Session], fleet: Fleet, on_end: Callable[[Session], None]
    ) -> None:
        """`start` may raise anything; `on_end` is called with each session that has ended."""
        # Why the last process could not start, "" once one does. While it is set the pool keeps
        # trying, even with --processes 0, so that /healthz recovers.
        self.failure = ""
        # Why the CLI's processes cannot be used again; meanwhile no spares are made.
        self.reuse_problem = ""
        self._start = start
        self._fleet = fleet
        self._on_end = on_end
        # Guarded by _changed: all that follows, and those above where they are written.
        self._changed = threading.Condition()
        self._waiters: dict[SessionRequest, Future[Session]] = {}  # in the order of their arrival
        self._next_spare_at = 0.0  # monotonic; no spare is started before
        self._is_closed = False
        # One thread forks all processes, since on Linux they die with the thread that forked them.
        self._supervisor = threading.Thread(
            target=self._supervise, name="cc2api-supervisor", daemon=True
        )
        self._supervisor.start()

    def acquire(self, waiter: SessionRequest) -> Session:
        """Take the nearest session; wait in order. Raises ApiError, and what the deadline does."""
        assigned: Future[Session] = Future()
        try:
            with self._changed:
                self._enqueue(waiter, assigned)
                self._assign_sessions()
                # Where a session was assigned at once, the supervisor need not wake up.
                if not assigned.done():
                    self._changed.notify_all()
            while True:
                waiter.deadline.check()
                with contextlib.suppress(FutureTimeout):
                    return assigned.result(waiter.deadline.next_wait_s())
        except BaseException:
            with self._changed:
                self._waiters.pop(waiter, None)
            # A session that was assigned in the last moment must not be lost. A new one is ended:
            # it is not warmed up, and was started for this request alone.
            if assigned.done() and not assigned.exception():
                session = assigned.result()
                self.release(session, usable=not session.is_new)
            raise

    def release(self, session: Session, *, usable: bool) -> None:
        """Take a session back: keep it where it can be used again, else end it at once."""
        with self._changed:
            if usable:
                if not session.is_new:
                    self.failure = ""
                self._fleet.move(session, "spare" if session.key is None else "idle")

            # With --processes 0 a used session is ended. One without a key is for a waiter.
            is_used = session.key is not None
            is_surplus = is_used and self._fleet.settings.processes == 0
            is_worn_out = session.turns >= MAX_SESSION_TURNS
            if not usable or is_surplus or is_worn_out or self._is_closed:
                self._fleet.end(session)
                self._changed.notify_all()
            self._assign_sessions()

    def snapshot(self) -> tuple[dict[str, list[int]], int]:
        """Return the pids of the processes by state, and how many requests wait."""
        with self._changed:
            pids = {}
            for state in STATES:
                pids[state] = [session.process.pid for session in self._fleet.in_state(state)]
            return pids, len(self._waiters)

    def close(self) -> None:
        """End every process, lent ones too, and wait for that, up to EXIT_GRACE_S and a little."""
        with self._changed:
            self._is_closed = True

            for session in self._fleet.in_state("spare", "idle"):
                self._fleet.end(session)
            for session in self._fleet.in_state("busy", "starting"):
                # Whoever holds it notices, and releases it.
                session.process.kill()
            while self._waiters:
                _, assigned = self._waiters.popitem()
                assigned.set_exception(CliFailed(CLOSING, status=503))
            self._changed.notify_all()
        self._supervisor.join(EXIT_GRACE_S + 1)

    # ---- The next methods need the lock held by the caller; those after them take it. It may be
    # taken twice by one thread.

    def _enqueue(self, waiter: SessionRequest, assigned: Future[Session]) -> None:
        """Add a request to the queue. Raises ApiError where it is full or closed."""
        if self._is_closed:
            raise CliFailed(CLOSING, status=503)
        limit = self._fleet.settings.max_queue + self._fleet.free_slots()
        if len(self._waiters) >= limit and not waiter.wants_new:
            message = "Overloaded: too many requests are waiting"
            raise ApiError(message, status=529, retry_after_s=OVERLOADED_RETRY_AFTER_S)

        self._waiters[waiter] = assigned
        # One whose process died has waited already, and gets back the place that it had.
        if waiter.wants_new:
            in_order = sorted(self._waiters, key=lambda each: each.arrived_at)
            self._waiters = {each: self._waiters[each] for each in in_order}

    def _assign_sessions(self) -> None:
        """Give idle sessions to the requests that wait, in order, each the nearest one.

        A request for which there is none keeps its place in the queue; the supervisor starts one.
        """
        self._fleet.evict()
        may_rewind = not self.reuse_problem
        for waiter in list(self._waiters)[: self._fleet.free_slots()]:
            session = self._fleet.nearest(waiter, may_rewind=may_rewind)
            if session is None:
                self._changed.notify_all()
                continue
            # Where it is a spare, its successor is due soon.
            if session.key is None:
                due_at = time.monotonic() + SPARE_DELAY_S
                self._next_spare_at = max(self._next_spare_at, due_at)
                self._changed.notify_all()
            self._fleet.move(session, "busy")
            self._waiters.pop(waiter).set_result(session)

    def _note_failure(self, problem: str) -> None:
        if problem != self.failure:
            log.error("%s: try `cc2api --check`", problem)
        self.failure = problem
        retry_at = time.monotonic() + SUPERVISOR_INTERVAL_S
        self._next_spare_at = max(self._next_spare_at, retry_at)

    def _waiter_needs_process(self) -> bool:
        """Return whether a process is to be started for a request that waits."""
        if self._fleet.free_slots() <= 0:
            return False
        if any(waiter.wants_new for waiter in self._waiters):
            return True
        # A spare that is starting will serve one of them.
        return len(self._waiters) > len(self._fleet.in_state("starting"))

    def _spare_is_due(self) -> bool:
        """Return whether a spare is to be started now."""
        if self._is_closed or time.monotonic() < self._next_spare_at:
            return False
        if self._fleet.in_state("starting", "spare"):
            return False
        # One of the processes that are kept is the spare. With --processes 1 a spare is kept only
        # while nothing else runs.
        is_any_used = bool(self._fleet.in_state("busy", "idle"))
        needed = 2 if is_any_used else 1
        return self._fleet.settings.processes >= needed or bool(self.failure)

    def _next_look_s(self) -> float:
        """Return how long the supervisor waits where nothing is due."""
        interval_s = SUPERVISOR_INTERVAL_S
        if self._fleet.in_state("ending"):
            interval_s = POLL_INTERVAL_S
        until_spare_s = self._next_spare_at - time.monotonic()
        return min(interval_s, until_spare_s) if until_spare_s > 0 else interval_s

    # ---- The supervisor's own methods, without the lock.

    def _supervise(self) -> None:
        """Run the supervisor thread, until the pool is closed and all processes are gone."""
        is_over = False
        while not is_over:
            try:
                is_over = self._supervise_once()
            except Exception:
                # Without this thread nothing would work any more.
                log.exception("pool thread failed, continuing")
                time.sleep(POLL_INTERVAL_S)

    def _supervise_once(self) -> bool:
        """Reap, and start what is due: for waiters first, then a spare; else wait.

        Returns whether the pool is closed and all processes are gone.
        """
        with self._changed:
            ended = self._fleet.reap()
            left = self._fleet.in_state("ending", "busy", "starting")
            if self._is_closed and not ended and not left:
                return True

            self._assign_sessions()

            is_for_waiter = self._waiter_needs_process()
            self._fleet.evict(incoming=is_for_waiter)
            starts_one = is_for_waiter or self._spare_is_due()
            if not starts_one and not ended:
                self._changed.wait(self._next_look_s())

        for session in ended:
            with contextlib.closing(session.process):
                session.read_last_lines()
                self._on_end(session)
        if starts_one:
            self._start_process(for_waiter=is_for_waiter)
        return False

    def _start_process(self, *, for_waiter: bool) -> None:
        """Start a process: without a warm-up for a request that waits, as a spare with one."""
        session: Session | None = None
        try:
            session = self._start()
            if not for_waiter:
                with self._changed:
                    self._fleet.move(session, "starting")
                threading.Thread(
                    target=self._warm_up, args=[session], name="cc2api-warmup", daemon=True
                ).start()
        except Exception as exc:  # noqa: BLE001 - the message says what it was
            with self._changed:
                self._note_failure(f"claude cannot be started: {exc}")
                if session:
                    self.release(session, usable=False)
                elif self._waiters and for_waiter:
                    longest_waiting = next(iter(self._waiters))
                    assigned = self._waiters.pop(longest_waiting)
                    assigned.set_exception(CliFailed(self.failure, status=503))
            return
        if for_waiter:
            self.release(session, usable=True)

    def _warm_up(self, session: Session) -> None:
        """Warm up a spare, on a thread of its own."""
        too_late = ProcessDied("claude is too slow")
        deadline = Deadline(CONTROL_TIMEOUT_S, no_hook, too_late)
        problem: Exception | None = None
        try:
            session.warm_up(deadline)
        except Exception as exc:  # noqa: BLE001 - whatever it is, nobody else would tell of it
            problem = exc

        with self._changed:
            if problem is None:
                self.reuse_problem = ""
            elif isinstance(problem, CliRefused):
                # To say so once is enough.
                if not self.reuse_problem:
                    log.warning("%s: each new conversation takes a process of its own", problem)
                self.reuse_problem = str(problem)
                self._next_spare_at = time.monotonic() + REUSE_RETRY_S
            elif not self._is_closed:
                self._note_failure(str(problem) or repr(problem))
            self.release(session, usable=problem is None)
            self._changed.notify_all()


# ====================================================================== Gateway
# What the routes ask: a turn in, batches of events out. Owns the pool, the account, the list of
# models and the key file; knows nothing of sockets. Runs on request threads.

MAX_SERVED_MODELS: Final = 100  # that the list has beside the CLI's own; there are some 20
SIGN_IN_TTL_S: Final = 60.0  # until the CLI is asked again how it is signed in; it takes 0.2 s
TRY_BODY: Final = (
    '{"model":"sonnet","max_tokens":100,"messages":[{"role":"user","content":"Hello!"}]}'
)


class Account:
    """The CLI in use, how it is signed in, and which API it calls."""

    def __init__(self, settings: Settings, cli: Cli, environ: Mapping[str, str]) -> None:
        self.is_login = not uses_bare(settings.bare, environ)
        self.upstream = "" if settings.demo else upstream_url(environ)
        self._cli = cli
        self._environ = environ
        self._sign_in = IN_DEMO if settings.demo else UNKNOWN_SIGN_IN
        # monotonic; when the CLI is asked next, in a demo never
        self._next_look_at = math.inf if settings.demo else 0.0

    def sign_in(self) -> str:
        """Return how the CLI is signed in; it and its version are asked every SIGN_IN_TTL_S."""
        now = time.monotonic()
        if now >= self._next_look_at:
            self._next_look_at = now + SIGN_IN_TTL_S
            with contextlib.suppress(CliUnusable):
                self._cli = find_cli(self._cli.path, self._environ)
                self._sign_in = describe_sign_in(self._cli, self._environ, bare=not self.is_login)
        return self._sign_in

    def is_signed_in(self) -> bool:
        """Return whether requests can succeed, as far as the CLI says."""
        return not self.sign_in().startswith(NOT_SIGNED_IN)

    def cli(self) -> Cli:
        """Return the CLI, whose version changes when it updates itself."""
        return self._cli


class ModelList:
    """The models that there are: the CLI's own list, those that were served, and mapped names."""

    def __init__(self, model_map: Iterable[str]) -> None:
        """`model_map`: "NAME=MODEL" each."""
        self.listed: list[JsonObject] = []  # as the last process listed them
        self._served: set[str] = set()  # ids that have answered
        self._model_by_name = dict(pair.split("=", 1) for pair in model_map)

    def update(self, models: list[JsonObject]) -> None:
        """Take a process's list; an empty one says nothing."""
        if models:
            self.listed = models

    def add_served(self, model_id: str) -> None:
        """Note an id that the CLI need not list, and that has answered."""
        if len(self._served) < MAX_SERVED_MODELS:
            self._served.add(model_id)

    def items(self) -> list[JsonObject]:
        """Return all entries for clients, those of the CLI's own list first."""
        items = to_model_list(self.listed)
        by_id = {item["id"]: item for item in items}
        for model_id in sorted(self._served - by_id.keys()):
            items.append(to_model_item(model_id, {}))
        for name in self._model_by_name:
            if name not in by_id:
                target = by_id.get(self.resolve(name), to_model_item(name, {}))
                items.append({**target, "id": name, "display_name": name})
        return items

    def mapped(self, name: str) -> str:
        """Return the model that a name stands for by --model-map, else the name.

        OpenRouter's names begin with the vendor's, and have dots in their versions.
        """
        plain_name = name
        if name.startswith(_VENDOR):
            plain_name = name.removeprefix(_VENDOR).replace(".", "-")
        by_plain_name = self._model_by_name.get(plain_name, plain_name)
        return self._model_by_name.get(name, by_plain_name)

    def resolve(self, name: str) -> str:
        """Return the id behind an alias, a mapped name, or an id itself."""
        return resolve_model(self.mapped(name), self.listed).removesuffix(LONG_WINDOW_SUFFIX)

    def knows(self, name: str) -> bool:
        """Return whether a model is listed, by its name or its id."""
        if name == DEFAULT_MODEL_NAME or name in self._model_by_name:
            return True
        for model in self.listed:
            if name in (str(model.get("value")), str(model.get("resolvedModel"))):
                return True
        return False


class Gateway:
    """The running gateway behind the HTTP server."""

    def __init__(self, settings: Settings, cli: Cli, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = KeyFile(settings)
        self.account = Account(settings, cli, environ)
        self.models = ModelList(settings.model_map)
        self.rate_limits: dict[str, str] = {}  # the plan's state as headers, as last reported
        self._padding_tokens: dict[str, int] = {}  # of a padding tool, by model
        self._workplace = Workplace(Path(tempfile.gettempdir()), config_dir_of(environ))
        temp_dir = str(self._workplace.temp_dir)
        command, environment = command_and_environment(cli, settings, environ, temp_dir)

        def start() -> Session:
            # This raises the OSError that the shim around the CLI would hide.
            os.stat(cli.path)
            self._workplace.prepare()
            return Session(Process(command, environment, str(self._workplace.work_dir)))

        self.pool = Pool(start, Fleet(settings), self._on_process_end)

    def close(self) -> None:
        """End all processes and remove their temporary directory."""
        self.pool.close()
        self._workplace.clean_up()

    def answer(
        self, turn: Turn, caller: Caller, on_wait: Callable[[], None], request_log: RequestLog
    ) -> Generator[list[Event], None, None]:
        """Yield the answer's events, in batches of those that were ready together, to message_stop.

        Raises ApiError, and what `on_wait` does, which is called at least every CLIENT_CHECK_S. To
        close the generator ends the turn.
        """
        request = self._session_request(turn, caller, on_wait)
        while True:
            session = self.pool.acquire(request)
            try:
                last_batch = yield from self._answer_with(session, request, request_log)
                break
            except ProcessDied as death:
                # Nothing was sent upstream, so the request is tried again on a new process.
                request.count_failure(death)
                forget_frames(death)
            finally:
                self._release(session)
        # The last events go out when the session is back in the pool, so that the client's next
        # request finds it there.
        yield last_batch

    def _answer_with(
        self, session: Session, request: SessionRequest, request_log: RequestLog
    ) -> Generator[list[Event], None, list[Event]]:
        """Yield the answer's events but for the last batch, which is returned."""
        if session.is_new:
            request_log.add(process="cold")
        else:
            request_log.add(process="reused" if session.turns else "spare")
        waited_s = time.monotonic() - request.arrived_at
        request_log.add(waited_ms=round(waited_s * 1000))

        check_media(request.turn, resolve_model(request.turn.model, session.models))
        session.prepare(request)
        session.start_call(request.deadline)
        try:
            last_batch = yield from session.read_events(request.deadline)
            model_id = resolve_model(request.turn.model, session.models)
            self.models.add_served(model_id.removesuffix(LONG_WINDOW_SUFFIX))
            return last_batch
        finally:
            self.rate_limits = session.parser.rate_limits or self.rate_limits

    def count_tokens(self, turn: Turn, caller: Caller, on_wait: Callable[[], None]) -> int:
        """Return how many input tokens a turn has, by the API's own count; nothing is generated."""
        request = self._session_request(turn, caller, on_wait)
        if not turn.tools:
            return self._count(request, []).messages

        model = request.turn.model
        if model not in self._padding_tokens:
            both = self._count(request, PADDING_TOOLS).tools
            first = self._count(request, PADDING_TOOLS[:1]).tools
            self._padding_tokens[model] = both - first

        counts = self._count(request, [*turn.tools, PADDING_TOOLS[0]])
        tools = counts.tools + COUNTED_TOOLS_DEDUCTION - self._padding_tokens[model]
        return counts.messages + max(0, tools)

    def _count(self, request: SessionRequest, tools: list[JsonObject]) -> TokenCounts:
        """Count a turn's messages, with these tools in place of its own."""
        # 32 separate characters make over 32 tokens, so that a guess of the CLI's can be told from
        # a count (`to_token_counts`). They are random, so that no earlier count is remembered.
        system = " ".join(uuid.uuid4().hex)
        turn = dataclasses.replace(request.turn, system=system, tools=tools, cache_breakpoint=None)
        counting = dataclasses.replace(request, turn=turn, is_count=True)

        def count(session: Session) -> TokenCounts:
            check_media(turn, resolve_model(turn.model, session.models))
            return session.count_tokens(counting)

        return self._with_session(counting, count)

    def list_models(self, caller: Caller, on_wait: Callable[[], None]) -> list[JsonObject]:
        """Return the models' entries. Every request that is served refreshes the CLI's list."""
        if self.models.listed:
            return self.models.items()
        request = self._session_request(WARMUP_TURNS[0], caller, on_wait)

        def read_models(session: Session) -> list[JsonObject]:
            if session.is_new:
                session.prepare(request)
            return session.models

        self.models.update(self._with_session(request, read_models))
        return self.models.items()

    def describe(self, url: str) -> dict[str, str]:
        """Return what it runs on, who pays, who may call, and how.

        `url` is where clients see it.
        """
        sign_in = self.account.sign_in()
        is_open = self.keys.load() == {}
        key_header = "" if is_open else " -H 'x-api-key: YOUR-KEY'"
        lines = {
            "claude": str(self.account.cli()),
            "sign-in": sign_in,
            "upstream": self.account.upstream,
            "keys": self.keys.summary,
            "page": f"{url}/",
            "try": f"curl {url}/v1/messages{key_header} -d '{TRY_BODY}'",
        }
        return {name: text for name, text in lines.items() if text}

    def gauges(self) -> Gauges:
        """Return what /metrics says of now."""
        pids, waiting = self.pool.snapshot()
        processes = [({"state": state}, len(pids[state])) for state in pids]
        return {
            "cc2api_processes": processes,
            "cc2api_waiting_requests": [({}, waiting)],
            "cc2api_signed_in": [({}, 1 if self.account.is_signed_in() else 0)],
        }

    def _with_session(self, request: SessionRequest, use: Callable[[Session], _T]) -> _T:
        """Return what `use` returns for a session.

        Where its process dies, `use` is called again with another one, as in `answer`.
        """
        while True:
            session = self.pool.acquire(request)
            try:
                return use(session)
            except ProcessDied as death:
                request.count_failure(death)
                forget_frames(death)
            finally:
                self._release(session)

    def _release(self, session: Session) -> None:
        """Give a session back to the pool, whatever became of its turn."""
        usable = False
        try:
            usable = session.finish_turn()
        except Exception as exc:  # noqa: BLE001 - whatever it is, there may be a whole answer
            log.warning("discarding process: %s", str(exc) or repr(exc))
            forget_frames(exc)
        if not usable:
            # First of all it is killed, because it may be about to call upstream again.
            session.process.kill()

        try:
            self.models.update(session.models)
            self._book_cost(session)
        finally:
            self.pool.release(session, usable=usable)

    def _on_process_end(self, session: Session) -> None:
        self._workplace.remove_leftovers()
        self._book_cost(session)

    def _book_cost(self, session: Session) -> None:
        """Add the cost that a process has reported since last time.

        A turn's cost arrives with its `result` line, so one turn late.
        """
        if session.key is None:
            return
        cost_usd = session.take_cost()
        if cost_usd:
            self.metrics.add("cc2api_cost_usd_total", cost_usd, caller=session.key.caller.name)

    def _session_request(
        self, turn: Turn, caller: Caller, on_wait: Callable[[], None]
    ) -> SessionRequest:
        if self.account.is_login:
            turn = with_login_caching(turn)
        turn = dataclasses.replace(turn, model=self.models.mapped(turn.model))
        limit_s = self.settings.timeout
        too_late = ApiError(
            f"the answer was not complete within {limit_s:g} s (--timeout)",
            status=504,
            should_retry=False,
        )
        deadline = Deadline(limit_s, on_wait, too_late)
        return SessionRequest(turn, PoolKey(caller, turn.betas), deadline)


# ================================================================= Messages API
# Anthropic's own API: what reads its requests, and writes its answers and errors. The other two
# APIs are translated to it and from it. Pure.

# Lists and objects around a tool's input in a whole answer of any of the three APIs.
ANSWER_LEVELS: Final = 6


def parse_messages_request(body: JsonObject, betas: str = "", *, is_count: bool = False) -> Turn:
    """Check a Messages API request, with the anthropic-beta header, and return it as a Turn.

    Raises InvalidRequest.
    """
    if body.get("thread") is not None:
        # With this code the SDKs' tool runners send the whole history instead.
        problem = "thread: message threads are not supported; send the whole history"
        details = {"error_code": "thread_unsupported_request"}
        raise InvalidRequest(problem, more={"details": details})
    if body.get("mcp_servers"):
        # The CLI cannot read an answer with a call of the MCP connector, and it would be paid.
        raise InvalidRequest("mcp_servers: the CLI does not carry the MCP connector's calls")
    # Without max_tokens the CLI would put in a number of its own.
    if body.get("max_tokens") is None and not is_count:
        raise InvalidRequest("max_tokens: Field required")
    require(body, "messages", list)
    return to_turn(body, located_objects(body, "messages"), betas, is_count=is_count)


_DELTA_TEXTS: Final = ("text", "thinking", "partial_json")  # they add up to a block's own
_OF_DELTAS_ALONE: Final = ("type", "estimated_tokens")  # a whole block does not have them


class MessagesEncoder:
    """Encodes one answer, as a stream or whole: here as the Messages API does.

    The encoders of the other APIs derive from it: it also assembles the message from the events.
    """

    stream_end = b""  # what follows the last event of a stream
    fails_in_stream = False  # a failure is an event with status 200, even where none came before

    def __init__(self, call_fields: Mapping[str, JsonObject] | None = None) -> None:
        """`call_fields`: for each tool, by its name upstream, the fields with which the client's
        API begins a call of it: `type`, `name`, `namespace`.
        """
        self.call_fields = call_fields or {}
        self.message: JsonObject = {}  # as far as it has come
        self.delta_texts: list[str] = []  # of the latest block; it gets them when it is finished

    def result(self) -> JsonObject:
        """Return the answer, once all events have been fed."""
        return self.message

    def keepalive(self) -> Sequence[JsonObject]:
        """Return events that show life in a silent stream; without any an SSE comment is sent."""
        # Before message_start an event would confuse some clients.
        if not self.message:
            return []
        return [{"type": "ping"}]

    def error_events(self, error: ApiError, body: JsonObject) -> list[JsonObject]:
        """Return what ends a stream that fails; `body` is the error in the API's envelope."""
        return [body]

    def feed(self, event: Event) -> list[JsonObject]:
        """Take the next event of a StreamParser's; return what the client's stream says of it."""
        event_type = event["type"]
        delta = as_object(event.get("delta"))
        if event_type == "message_start":
            usage = dict(event["message"].get("usage") or {})
            self.message = {**event["message"], "content": [], "usage": usage}
        elif event_type == "content_block_start":
            self.message.get("content", []).append(dict(event["content_block"]))
            self.delta_texts = []
        elif event_type == "content_block_delta":
            self._add_delta(delta)
        elif event_type == "content_block_stop":
            self._finish_block()
        elif event_type == "message_delta":
            self.message.update(delta)
            # What else the event says is of the message: `context_management` and the like.
            for name, value in event.items():
                if name not in ("type", "delta", "usage"):
                    self.message[name] = value
            self.message["usage"].update(without_nulls(event.get("usage") or {}))
        return [event]

    def _add_delta(self, delta: JsonObject) -> None:
        block = self.message.get("content", [])[-1]
        for name, value in delta.items():
            if name in _DELTA_TEXTS:
                self.delta_texts.append(value)
            elif name == "citation":
                block["citations"] = [*(block.get("citations") or []), value]
            elif name not in _OF_DELTAS_ALONE:
                # A signature, the content of a compaction, or what a delta of next year brings.
                block[name] = value

    def _finish_block(self) -> None:
        """Give the latest block the text of its deltas."""
        text = "".join(self.delta_texts)
        if not text:
            return
        block = self.message.get("content", [])[-1]
        if block["type"] in ("text", "thinking"):
            block[block["type"]] += text
            return

        # It stays empty where it was cut short, and is no JSON.
        block["input"] = {}
        with contextlib.suppress(ValueError, RecursionError):
            tool_input = json.loads(text)
            if can_be_sent(tool_input, ANSWER_LEVELS):
                block["input"] = tool_input


def can_be_sent(value: Any, levels: int) -> bool:
    """Return whether json.dumps takes a value that stands `levels` deep in another one."""
    for _ in range(levels):
        value = [value]
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def to_anthropic_error(error: ApiError, request_id: str) -> tuple[int, JsonObject]:
    """Return an error's status, and the Messages API's envelope."""
    inner = {**error.more, "type": error.type, "message": str(error)}
    body = {"type": "error", "error": inner, "request_id": request_id}
    return error.status, body


class Dialect(NamedTuple):
    """An API that asks a model: how its requests are read, and its errors written."""

    # From a body, the anthropic-beta header, and whether only tokens are counted.
    read: Callable[[JsonObject, str, bool], tuple[Turn, MessagesEncoder]]
    # From an error and the request's id: status and envelope.
    to_error: Callable[[ApiError, str], tuple[int, JsonObject]]
    count_object: str | None = None  # the `object` of a count of tokens


def _read_messages(body: JsonObject, betas: str, is_count: bool) -> tuple[Turn, MessagesEncoder]:
    return parse_messages_request(body, betas, is_count=is_count), MessagesEncoder()


ANTHROPIC: Final = Dialect(_read_messages, to_anthropic_error)


# ====================================================================== Schemas
# OpenAI's clients describe what they want in any JSON Schema, and Anthropic holds a model only to
# a part of it (platform.claude.com/docs: structured outputs). As in Anthropic's own SDKs, what is
# beyond that part is said in the descriptions. Pure.

_STRING_FORMATS: Final = (
    "date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid",
)  # fmt: skip
_SCHEMA_TYPES: Final = ("object", "array", "string", "integer", "number", "boolean", "null")
# They say nothing about the values; the definitions are taken from the root where they are used.
_SCHEMA_NOTES: Final = ("$schema", "$id", "$anchor", "$comment", "$defs", "definitions")
_KEYWORDS_OF_MEMBERS: Final = frozenset(
    ("type", "properties", "required", "additionalProperties", "title", "description")
)
# What the schemas of a request may have together; the API refuses more as too complex to compile.
MAX_STRICT_TOOLS: Final = 20
_MAX_OPTIONAL_PROPERTIES: Final = 24
_MAX_UNIONS: Final = 16


class Unenforceable(Exception):
    """A valid schema to which the API has no means of holding a model."""


class SchemaTranslator:
    """Translates JSON schemas to what Anthropic enforces, and counts what is limited."""

    def __init__(self) -> None:
        self._optional_properties = 0
        self._unions = 0
        # Of the schema that is being translated:
        self._root: Any = None
        self._defs: dict[str, JsonObject] = {}  # the parts that a `$ref` names, by their new names
        self._names: dict[str, str] = {}  # those names, by the pointers of the `$ref`s
        self._unfinished: set[str] = set()  # pointers of the parts that are being translated

    def translate(self, schema: Any, path: str) -> JsonObject:
        """Return a schema in Anthropic's form. `path` is where the client has it.

        Raises Unenforceable, and InvalidRequest for what is no JSON schema.
        """
        self._root = schema
        self._defs = {}
        self._names = {}
        self._unfinished = {"#"}
        counts_before = self._optional_properties, self._unions
        try:
            translated = self._translate(schema, path)
        except (Unenforceable, RecursionError) as exc:
            # It will not be sent, so it does not count.
            self._optional_properties, self._unions = counts_before
            raise Unenforceable from exc
        if self._defs:
            translated["$defs"] = self._defs
        return translated

    def is_over_limits(self) -> bool:
        """Return whether all that was translated is too much for one request."""
        return self._optional_properties > _MAX_OPTIONAL_PROPERTIES or self._unions > _MAX_UNIONS

    def _translate(self, schema: Any, path: str) -> JsonObject:
        if isinstance(schema, bool):
            # Any value fits, or none.
            raise Unenforceable
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{path}: Input should be a JSON schema")

        # What is translated is taken out of `rest`.
        rest = {}
        for name, value in schema.items():
            is_absent = value is None and name not in ("const", "default")
            if name not in _SCHEMA_NOTES and not is_absent:
                rest[name] = value
        if "$ref" in rest:
            return {"$ref": self._define(require(rest, "$ref", str, path), path)}
        members = optional(rest, "allOf", list, path)
        if members:
            del rest["allOf"]
            return self._translate(self._join(rest, members, path), path)

        translated = self._take_literals(rest, path) or self._take_type(rest, path)
        for name in ("description", "title"):
            if rest.get(name) is not None:
                translated[name] = rest[name]
            rest.pop(name, None)
        if rest:
            # The model may follow it, though it is not held to it.
            words = ", ".join(f"{name}: {_in_words(value)}" for name, value in rest.items())
            before = f"{translated['description']}\n\n" if "description" in translated else ""
            translated["description"] = f"{before}{{{words}}}"
        return translated

    def _take_literals(self, rest: JsonObject, path: str) -> JsonObject:
        """Return the values that are listed; nothing where they are not."""
        literals: JsonObject = {}
        if optional(rest, "enum", list, path):
            literals["enum"] = rest.pop("enum")
        if "const" in rest:
            literals["const"] = rest.pop("const")
        if any(isinstance(value, (dict, list)) for value in literals.get("enum") or []):
            raise Unenforceable
        if isinstance(literals.get("const"), (dict, list)):
            raise Unenforceable
        if literals:
            rest.pop("type", None)
        return literals

    def _take_type(self, rest: JsonObject, path: str) -> JsonObject:
        given = rest.pop("type", None)
        if given is None and "properties" in rest:
            given = "object"
        if given is None:
            return self._take_variants(rest, path)
        types = given if isinstance(given, list) else [given]
        if not types or any(each not in _SCHEMA_TYPES for each in types):
            raise InvalidRequest(f"{path}.type: Input should be a type of JSON Schema")
        # One that is named twice is one.
        first, *others = dict.fromkeys(types)
        if others:
            return self._take_types([first, *others], rest, path)

        if first == "object":
            return self._take_object(rest, path)
        translated: JsonObject = {"type": first}
        if first == "array":
            if isinstance(rest.get("items"), dict):
                translated["items"] = self._translate(rest.pop("items"), f"{path}.items")
            if rest.get("minItems") in (0, 1):
                translated["minItems"] = rest.pop("minItems")
        elif first == "string" and rest.get("format") in _STRING_FORMATS:
            translated["format"] = rest.pop("format")
        return translated

    def _take_variants(self, rest: JsonObject, path: str) -> JsonObject:
        for name in ("anyOf", "oneOf"):
            variants = optional(rest, name, list, path)
            if variants:
                del rest[name]
                self._unions += 1
                translated = [
                    self._translate(variant, f"{path}.{name}.{index}")
                    for index, variant in enumerate(variants)
                ]
                return {"anyOf": translated}
        # Any value fits.
        raise Unenforceable

    def _take_types(self, types: list[str], rest: JsonObject, path: str) -> JsonObject:
        """Return a variant for each type; what else is said of the value stands in each."""
        shared = {
            name: rest.pop(name) for name in list(rest) if name not in ("description", "title")
        }
        variants = []
        for schema_type in types:
            keywords = {} if schema_type == "null" else shared
            variants.append(self._translate({**keywords, "type": schema_type}, path))
        self._unions += 1
        return {"anyOf": variants}

    def _take_object(self, rest: JsonObject, path: str) -> JsonObject:
        # A model is held only to an object all of whose properties are named.
        is_open = rest.pop("additionalProperties", None) not in (None, False)
        properties = optional(rest, "properties", dict, path)
        if is_open or properties is None or rest.get("patternProperties"):
            raise Unenforceable

        required = _required_names(rest, path)
        rest.pop("properties", None)
        rest.pop("required", None)
        translated: JsonObject = {
            "type": "object",
            "properties": {
                name: self._translate(member, f"{path}.properties.{name}")
                for name, member in properties.items()
            },
            "additionalProperties": False,
        }
        if required is not None:
            translated["required"] = required
        self._optional_properties += len(properties.keys() - set(required or []))
        return translated

    def _join(self, rest: JsonObject, members: list[Any], path: str) -> JsonObject:
        """Return the members of an `allOf` as one schema, together with what stands beside them."""
        says_nothing = rest.keys() <= {"title", "description", "default"}
        if len(members) == 1 and isinstance(members[0], dict) and says_nothing:
            return {**members[0], **rest}

        # Each by itself would allow no properties but its own, so they become one object.
        properties: JsonObject = {}
        required: list[str] = []
        for index, member in enumerate([rest, *members]):
            member_path = f"{path}.allOf.{index - 1}"
            if isinstance(member, dict) and isinstance(member.get("$ref"), str):
                member = self._resolve(member["$ref"], member_path)
            if not isinstance(member, dict) or not _KEYWORDS_OF_MEMBERS.issuperset(member):
                raise Unenforceable
            if member.get("additionalProperties") or member.get("type", "object") != "object":
                raise Unenforceable
            properties.update(optional(member, "properties", dict, member_path) or {})
            required += _required_names(member, member_path) or []
        required = list(dict.fromkeys(required))
        return {**rest, "type": "object", "properties": properties, "required": required}

    def _define(self, pointer: str, path: str) -> str:
        """Translate the part that a `$ref` names; return a `$ref` to the translation."""
        if pointer in self._unfinished:
            # A recursive schema cannot be compiled.
            raise Unenforceable
        if pointer not in self._names:
            name = re.sub(r"[^\w-]", "_", pointer.rpartition("/")[2])
            while name in self._defs:
                name = f"{name}_{len(self._defs)}"
            self._names[pointer] = name
            self._defs[name] = {}
            self._unfinished.add(pointer)
            self._defs[name] = self._translate(self._resolve(pointer, path), path)
            self._unfinished.discard(pointer)
        return f"#/$defs/{self._names[pointer]}"

    def _resolve(self, pointer: str, path: str) -> Any:
        """Return the part of the whole schema that a `$ref` names (RFC 6901)."""
        start, *names = urllib.parse.unquote(pointer).split("/")
        part = self._root
        for escaped in names:
            name = escaped.replace("~1", "/").replace("~0", "~")
            if isinstance(part, list):
                is_index = re.fullmatch("[0-9]{1,6}", name) and int(name) < len(part)
                part = part[int(name)] if is_index else None
            else:
                part = as_object(part).get(name)
        if start != "#" or part is None:
            raise InvalidRequest(f"{path}.$ref: the schema has no {pointer}")
        return part


def _required_names(schema: JsonObject, path: str) -> list[str] | None:
    names = optional(schema, "required", list, path)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"{path}.required: Input should be a list of names")
    return names


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else dump_json(value)


# ======================================================================= OpenAI
# What its two APIs have in common, to a Turn and back: a translation, not a second pipeline. Pure.
# Both bring a conversation as items and tools in the form of the Responses API, each with the path
# under which the client sent it. What Anthropic's own OpenAI layer ignores is ignored here too.

_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=-]+)*;base64,(.*)\Z", re.DOTALL)
_JSON_OBJECT_PROMPT: Final = "Answer with one bare JSON object and nothing else: no code fences."
_JSON_SCHEMA_PROMPT: Final = (
    "Answer with bare JSON and nothing else: no code fences. It has to fit this JSON schema:"
)
# Stands for a message without text where a user has to say something: Anthropic takes no blank one.
_BLANK_MESSAGE: Final = "(blank message)"
# A custom tool takes raw text, which a model here can only give as a field of a JSON object.
_RAW_INPUT_SCHEMA: Final = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
_RAW_INPUT_HINT: Final = "`input` is the raw text itself: not wrapped in JSON, not quoted."
_SEAL: Final = "cc2api:"  # before a thinking block that went out as `encrypted_content`
_ITEM_HINTS: Final = {
    "item_reference": "items are not persisted here: set store to false"
    " (AI SDK: providerOptions.openai.store), so that they are sent whole",
    "compaction_trigger": "Codex compacts by itself with a provider of your own in its config",
}
# The tools that clients run: the type of the item that calls each.
CALL_TYPES: Final = {
    "function": "function_call",
    "custom": "custom_tool_call",
    "tool_search": "tool_search_call",
    "apply_patch": "apply_patch_call",
    "shell": "shell_call",
    "local_shell": "local_shell_call",
}
# OpenAI's own tools that clients send unasked, and that are left out. Codex always sends the first.
_LEFT_OUT_TOOLS: Final = ("web_search", "web_search_preview", "image_generation")


class _OwnTool(NamedTuple):
    """A tool of OpenAI's own that the client runs, told to a model that does not know it."""

    description: str
    schema: JsonObject  # of what stands in the call's `field_name`
    field_name: str
    defaults: JsonObject  # what stands there beside what the model says


_TEXT_SCHEMA: Final = {"type": "string"}
_TEXTS_SCHEMA: Final = {"type": "array", "items": _TEXT_SCHEMA}
_TIMEOUT_SCHEMA: Final = {"type": "integer", "description": "in milliseconds"}
_OWN_TOOLS: Final = {
    "apply_patch": _OwnTool(
        "Creates, updates or deletes a file. `diff` is in the V4A format: lines that start with"
        " `+`, `-` or a blank, in hunks after `@@` lines that name where they are; a new file has"
        " `+` lines alone, and a deletion no diff.",
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["create_file", "update_file", "delete_file"]},
                "path": _TEXT_SCHEMA,
                "diff": _TEXT_SCHEMA,
            },
            "required": ["type", "path"],
        },
        "operation",
        {},
    ),
    "shell": _OwnTool(
        "Runs shell commands, each by itself, and returns the output of each.",
        {
            "type": "object",
            "properties": {
                "commands": _TEXTS_SCHEMA,
                "timeout_ms": _TIMEOUT_SCHEMA,
                "max_output_length": {"type": "integer", "description": "in characters"},
            },
            "required": ["commands"],
        },
        "action",
        {"commands": [], "timeout_ms": None, "max_output_length": None},
    ),
    "local_shell": _OwnTool(
        "Runs a command, given as the list of its arguments, and returns its output.",
        {
            "type": "object",
            "properties": {
                "command": _TEXTS_SCHEMA,
                "working_directory": _TEXT_SCHEMA,
                "timeout_ms": _TIMEOUT_SCHEMA,
            },
            "required": ["command"],
        },
        "action",
        {"type": "exec", "command": [], "env": {}},
    ),
}
FINISH_REASONS: Final = {  # by stop_reason; any other is "stop"
    "tool_use": "tool_calls", "refusal": "content_filter",
    "max_tokens": "length", "model_context_window_exceeded": "length",
}  # fmt: skip

Item = JsonObject  # of a Responses API conversation


def to_blocks(owner: JsonObject, name: str, path: str) -> list[Block]:
    """Return a text or a list of parts as blocks, less blank texts.

    Anthropic refuses them but in answers, where they say nothing either.
    """
    content = {name: as_blocks(owner.get(name))}
    blocks = [
        _to_block(part, part_path) for part_path, part in located_objects(content, name, path)
    ]
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _to_block(part: JsonObject, path: str) -> Block:
    """Return a part of a message's content, in either API's form, as a block."""
    part_type = str(part.get("type"))
    if part_type in ("text", "input_text", "output_text"):
        return {"type": "text", "text": require(part, "text", str, path)}
    if part_type == "refusal":
        return {"type": "text", "text": require(part, "refusal", str, path)}
    if part_type == "image_url":
        image = require(part, "image_url", dict, path)
        return _to_image(image, "url", f"{path}.image_url")
    if part_type == "input_image":
        return _to_image(part, "image_url", path)
    if part_type == "file":
        return _to_document(require(part, "file", dict, path), f"{path}.file")
    if part_type == "input_file":
        return _to_document(part, path)
    raise InvalidRequest(f"{path}.type: Input should be a type of text, image or file")


def _to_image(owner: JsonObject, name: str, path: str) -> Block:
    source = _to_source(require(owner, name, str, path))
    check_image(f"{path}.{name}", source)
    return {"type": "image", "source": source}


def _to_document(file: JsonObject, path: str) -> Block:
    url = optional(file, "file_url", str, path)
    if not url:
        data = require(file, "file_data", str, path)
        url = data if data.startswith("data:") else f"data:application/pdf;base64,{data}"
    title = file.get("filename") or None
    return without_nulls({"type": "document", "title": title, "source": _to_source(url)})


def _to_source(url: str) -> JsonObject:
    """Return an http or data URL as the source of an image or document."""
    data_url = _DATA_URL.match(url)
    if data_url is None:
        return {"type": "url", "url": url}

    media_type = data_url[1].replace("image/jpg", "image/jpeg")
    encoded = data_url[2]
    if not media_type.startswith(("image/", "application/pdf")):
        # Upstream refuses what is not text.
        with contextlib.suppress(ValueError):
            text = base64.b64decode(encoded, validate=True).decode("utf-8")
            return {"type": "text", "media_type": "text/plain", "data": text}
    return {"type": "base64", "media_type": media_type, "data": encoded}


class ItemReader:
    """Turns the items of a conversation into messages, one each, which `to_turn` joins.

    Items of tools that OpenAI runs, and those that point to something kept, are refused with their
    path. Raises InvalidRequest.
    """

    def __init__(self, system: list[Block], *, hoists: bool = False) -> None:
        """`hoists`: a developer's message joins the system prompt wherever it stands."""
        self.system = system
        self.tools: list[Located] = []  # that came with items
        self.messages: list[Located] = []
        self._hoists = hoists
        self._system_start = len(system)  # behind it stand the developer's messages,
        self._hoisted: list[Located] = []  # which are these
        self._results_end = 0  # index in messages: behind the last answer and its results
        self._thinking: list[Block] = []  # that comes before the next item of the same answer
        self._blank_path = ""  # of a user's message without text, until the user says something
        # The ids upstream of the calls without an output, by the client's id. Clients may use an
        # id again in a later turn, or one with characters that Anthropic does not take.
        self._unanswered_calls: dict[str, list[str]] = {}
        self._upstream_ids: set[str] = set()

    def read_all(self, items: Iterable[Located]) -> None:
        """Take the whole conversation."""
        for path, item in items:
            self._read(path, item)

        if not self.messages and not self._blank_path:
            # Only the developer has spoken: then that is what is to be answered.
            del self.system[self._system_start :]
            self.messages += self._hoisted
        self._say_something()

    def _read(self, path: str, item: Item) -> None:
        default_type = "message" if "role" in item else "item_reference"
        item_type = str(item.get("type") or default_type)
        if item_type not in ITEM_READERS:
            hint = _ITEM_HINTS.get(item_type, "this type is not supported by this gateway")
            raise InvalidRequest(f"{path}.type: {item_type}: {hint}")
        # Such an item is a search that OpenAI ran.
        if item.get("execution") == "server":
            raise InvalidRequest(f"{path}.execution: Input should be 'client'")
        ITEM_READERS[item_type](self, path, item)

    def _say_something(self) -> None:
        """Put something in a blank message's place, where there is nothing else to be answered."""
        is_unanswered = bool(self.messages) and self.messages[-1][1]["role"] != "assistant"
        if self._blank_path and not is_unanswered:
            message = {"role": "user", "content": as_blocks(_BLANK_MESSAGE)}
            self.messages.append((self._blank_path, message))
        self._blank_path = ""

    def _add_answer(self, path: str, blocks: list[Block]) -> None:
        """Add a part of an answer, after the thinking that came before it."""
        self._say_something()
        content = self._thinking + blocks
        self._thinking = []
        self.messages.append((path, {"role": "assistant", "content": content}))
        self._results_end = len(self.messages)

    def _add(self, role: str, path: str, blocks: list[Block]) -> None:
        """Add a message that is no answer."""
        # Thinking that no answer followed is dropped: the API takes none at the end of an answer.
        self._thinking = []
        self.messages.append((path, {"role": role, "content": blocks}))

    def read_message(self, path: str, item: Item) -> None:
        role = str(item.get("role"))
        if role == "user":
            require(item, "content", object, path)
        blocks = to_blocks(item, "content", path)
        if role in ("developer", "system"):
            if any(block["type"] != "text" for block in blocks):
                raise InvalidRequest(f"{path}.content: Input should be text")
            if self._hoists or not self.messages:
                self.system += blocks
                if blocks:
                    self._hoisted.append((path, {"role": "user", "content": blocks}))
            elif blocks:
                # It stays where it is. In the system prompt, a late message of Codex' would end
                # the caching, and the process could not go on.
                self._add("system", path, blocks)
        elif role == "assistant":
            if blocks:
                self._add_answer(path, blocks)
        elif role == "user" and not blocks:
            self._thinking = []
            self._blank_path = path
        else:
            self._add(role, path, blocks)

    def read_reasoning(self, path: str, item: Item) -> None:
        """Take a thinking block of ours; those of other providers are of no use here."""
        self._thinking += _unseal(item.get("encrypted_content"))

    def ignore(self, path: str, item: Item) -> None:
        """Leave out what a provider's own tools did."""

    def read_call(self, path: str, item: Item) -> None:
        call_id = require(item, "call_id", str, path)
        own_name = item["type"].removesuffix("_call")
        if own_name == "tool_search":
            name = own_name
            arguments = require(item, "arguments", dict, path)
        elif own_name in _OWN_TOOLS:
            name = own_name
            arguments = require(item, _OWN_TOOLS[own_name].field_name, dict, path)
        elif item["type"] == "custom_tool_call":
            name = _upstream_name(item, path)
            arguments = {"input": require(item, "input", str, path)}
        else:
            name = _upstream_name(item, path)
            arguments = _parse_arguments(item, path)
        upstream_id = self._to_upstream_id(call_id)
        self._unanswered_calls.setdefault(call_id, []).append(upstream_id)
        block = {"type": "tool_use", "id": upstream_id, "name": name, "input": arguments}
        self._add_answer(path, [block])

    def _to_upstream_id(self, call_id: str) -> str:
        """Return an id that Anthropic takes and that no earlier call has; the same where it can."""
        upstream_id = re.sub("[^a-zA-Z0-9_-]", "_", call_id) or "call"
        while upstream_id in self._upstream_ids:
            upstream_id = f"{upstream_id}_{len(self._upstream_ids)}"
        self._upstream_ids.add(upstream_id)
        return upstream_id

    def read_output(self, path: str, item: Item) -> None:
        call_id = require(item, "call_id", str, path)
        field_name = "output"
        # Items of chat completions have the output in `content`.
        if item.get("content") is not None:
            field_name = "content"
        require(item, field_name, object, path)
        if call_id not in self._unanswered_calls:
            problem = f"No tool call found for function call output with call_id {call_id}."
            raise InvalidRequest(f"{path}: {problem}")

        upstream_id = self._unanswered_calls[call_id].pop(0)
        if not self._unanswered_calls[call_id]:
            del self._unanswered_calls[call_id]
        self._thinking = []
        result = {
            "type": "tool_result",
            "content": to_blocks(item, field_name, path),
            "tool_use_id": upstream_id,
        }
        message = {"role": "user", "content": [result]}
        # Results stand before what the user says.
        self.messages.insert(self._results_end, (path, message))
        self._results_end += 1

    def read_tools(self, path: str, item: Item) -> None:
        """Take an item's tools."""
        self.tools += located_objects(item, "tools", path)

    def read_search_output(self, path: str, item: Item) -> None:
        """Take the tools that a search of the client's found; they are the search's result too."""
        tools = list(located_objects(item, "tools", path))
        self.tools += tools
        output = json.dumps([tool for _, tool in tools])
        self.read_output(path, {**item, "output": output})

    def read_own_output(self, path: str, item: Item) -> None:
        """Take the output of a tool of OpenAI's own, in whose form the client has it."""
        output = item.get("output")
        if item["type"] == "apply_patch_call_output":
            # It may say nothing but how it went.
            output = output or item.get("status")
        if not isinstance(output, str):
            output = json.dumps(output)
        # For a local shell the field is called `id` (openai's types).
        call_id = item.get("call_id") or item.get("id")
        self.read_output(path, {**item, "call_id": call_id, "output": output})


ITEM_READERS: Final[dict[str, Callable[[ItemReader, str, Item], None]]] = {
    "message": ItemReader.read_message,
    "reasoning": ItemReader.read_reasoning,
    "function_call": ItemReader.read_call,
    "custom_tool_call": ItemReader.read_call,
    "tool_search_call": ItemReader.read_call,
    "apply_patch_call": ItemReader.read_call,
    "shell_call": ItemReader.read_call,
    "local_shell_call": ItemReader.read_call,
    "function_call_output": ItemReader.read_output,
    "custom_tool_call_output": ItemReader.read_output,
    "tool_search_output": ItemReader.read_search_output,
    "apply_patch_call_output": ItemReader.read_own_output,
    "shell_call_output": ItemReader.read_own_output,
    "local_shell_call_output": ItemReader.read_own_output,
    "additional_tools": ItemReader.read_tools,
    "web_search_call": ItemReader.ignore,
    "file_search_call": ItemReader.ignore,
    "code_interpreter_call": ItemReader.ignore,
    "image_generation_call": ItemReader.ignore,
}


def _parse_arguments(item: Item, path: str) -> JsonObject:
    """Return a function call's arguments, which are JSON in a string; some clients do without."""
    arguments = item.get("arguments")
    if isinstance(arguments, dict):
        return arguments
    try:
        text = optional(item, "arguments", str, path) or ""
        return {} if text.strip() in ("", "null") else parse_json(text.encode())
    except InvalidRequest:
        problem = "Input should be a JSON object in a string"
        raise InvalidRequest(f"{path}.arguments: {problem}") from None


def seal(block: Block) -> str:
    """Return a thinking block as `encrypted_content`: whole, since clients split summaries."""
    return _SEAL + base64.urlsafe_b64encode(json.dumps(block).encode("ascii")).decode("ascii")


def _unseal(sealed: Any) -> list[Block]:
    """Return the block that was sealed; none where it is not our own, or damaged."""
    if not isinstance(sealed, str) or not sealed.startswith(_SEAL):
        return []
    try:
        block = parse_json(base64.urlsafe_b64decode(sealed[len(_SEAL) :]))
    except (ValueError, InvalidRequest):
        return []
    return [block] if block.get("type") in THINKING_TYPES else []


def _upstream_name(tool: JsonObject, path: str) -> str:
    """Return the name under which a tool goes upstream, by its own and its namespace's."""
    name = require(tool, "name", str, path)
    namespace = optional(tool, "namespace", str, path)
    return f"{namespace}__{name}" if namespace else name


def _flatten_namespaces(tools: Iterable[Located]) -> Iterator[Located]:
    """Yield each tool with its `namespace`, and the `description` that the model is to get."""
    for path, tool in tools:
        if tool.get("type") != "namespace":
            texts = [optional(tool, "description", str, path), *_describe_custom_tool(tool, path)]
            yield path, _with_description(tool, texts, None)
            continue

        namespace = require(tool, "name", str, path)
        for inner_path, inner in located_objects(tool, "tools", path):
            texts = [
                optional(tool, "description", str, path),
                optional(inner, "description", str, inner_path),
                *_describe_custom_tool(inner, inner_path),
            ]
            yield inner_path, _with_description(inner, texts, namespace)


def _with_description(
    tool: JsonObject, texts: Iterable[str | None], namespace: str | None
) -> JsonObject:
    description = "\n\n".join(text for text in texts if text) or None
    return {**tool, "namespace": namespace, "description": description}


def _describe_custom_tool(tool: JsonObject, path: str) -> list[str]:
    """Return what the model has to know of a custom tool's raw input; nothing of other tools."""
    if tool.get("type") != "custom":
        return []
    tool_format = optional(tool, "format", dict, path) or {}
    # Chat completions have the grammar one level deeper.
    if as_object(tool_format.get("grammar")):
        tool_format = tool_format["grammar"]
    grammar = optional(tool_format, "definition", str, f"{path}.format")
    if not grammar:
        return [_RAW_INPUT_HINT]
    return [_RAW_INPUT_HINT, f"Its {tool_format.get('syntax')} grammar:\n{grammar}"]


def _is_left_out(tool: JsonObject) -> bool:
    """Return whether a tool of OpenAI's own is left out."""
    if tool["type"] == "tool_search":
        return tool.get("execution") != "client"
    return str(tool["type"]).startswith(_LEFT_OUT_TOOLS)


def _is_run_by_client(tool: JsonObject) -> bool:
    """Return whether the client runs a tool: a shell may also be one in OpenAI's container."""
    environment = as_object(tool.get("environment")).get("type", "local")
    return tool["type"] in CALL_TYPES and environment == "local"


def _to_tools(
    tools: Iterable[Located], translator: SchemaTranslator
) -> tuple[list[JsonObject], dict[str, JsonObject]]:
    """Return tools in Anthropic's form, and by name the fields with which their calls begin."""
    translated: dict[str, JsonObject] = {}
    call_fields: dict[str, JsonObject] = {}
    strict_schemas: dict[str, JsonObject] = {}
    for path, tool in _flatten_namespaces(tools):
        tool_type = require(tool, "type", str, path)
        if _is_left_out(tool):
            continue
        if not _is_run_by_client(tool):
            raise InvalidRequest(
                f"{path}.type: {tool_type}: such a tool is run by OpenAI, not here"
            )

        name, fields = _to_call_fields(tool, path)
        # A later search may find a tool described anew, but `tools` names each once.
        is_named_twice = name in translated and path.startswith("tools.")
        is_of_other_type = call_fields.setdefault(name, fields) != fields
        if is_named_twice or is_of_other_type:
            raise InvalidRequest(f"{path}.name: there is another tool of the name {name}")

        description, schema = _to_schema(tool, path)
        translated[name] = without_nulls(
            {"name": name, "description": description, "input_schema": schema}
        )
        if tool_type == "function" and optional(tool, "strict", bool, path):
            with contextlib.suppress(Unenforceable):
                strict_schema = translator.translate(schema, f"{path}.parameters")
                # The API takes nothing else at the top.
                if strict_schema.get("type") == "object":
                    strict_schemas[name] = strict_schema

    # A model that is not held to the schemas still follows them.
    if len(strict_schemas) <= MAX_STRICT_TOOLS and not translator.is_over_limits():
        for name, schema in strict_schemas.items():
            translated[name].update(strict=True, input_schema=schema)
    return list(translated.values()), call_fields


def _to_call_fields(tool: JsonObject, path: str) -> tuple[str, JsonObject]:
    """Return a tool's name upstream, and the fields with which its calls begin."""
    call_type = CALL_TYPES[tool["type"]]
    if tool["type"] == "tool_search":
        return tool["type"], {"type": call_type, "execution": "client"}
    if tool["type"] in _OWN_TOOLS:
        return tool["type"], {"type": call_type}

    name = _upstream_name(tool, path)
    fields = {"type": call_type, "name": tool["name"]}
    if tool["namespace"] is not None:
        fields["namespace"] = tool["namespace"]
    return name, fields


def _to_schema(tool: JsonObject, path: str) -> tuple[str | None, JsonObject]:
    """Return a tool's description and the schema of its input."""
    if tool["type"] == "custom":
        return tool["description"], _RAW_INPUT_SCHEMA
    own_tool = _OWN_TOOLS.get(tool["type"])
    if own_tool:
        return own_tool.description, own_tool.schema
    parameters = without_nulls(optional(tool, "parameters", dict, path) or {"properties": {}})
    return tool["description"], {"type": "object", **parameters}


def _to_tool_choice(
    body: JsonObject, tools: list[JsonObject]
) -> tuple[JsonObject, list[JsonObject]]:
    """Return tool_choice and parallel_tool_calls in Anthropic's form, and the tools they leave."""
    choice: Any = body.get("tool_choice") or "auto"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = located_objects(choice, "tools", "tool_choice")
        names = [
            tool["type"] if str(tool.get("type")) in _OWN_TOOLS else _upstream_name(tool, path)
            for path, tool in allowed
        ]
        tools = [tool for tool in tools if tool["name"] in names]
        choice = choice.get("mode") or "auto"
        if isinstance(choice, dict):
            raise InvalidRequest("tool_choice.mode: Input should be 'auto' or 'required'")

    translated: JsonObject
    if isinstance(choice, dict):
        choice_type = str(choice.get("type"))
        if choice_type in _OWN_TOOLS:
            translated = {"type": "tool", "name": choice_type}
        elif choice_type in ("function", "custom"):
            translated = {"type": "tool", "name": _upstream_name(choice, "tool_choice")}
        else:
            problem = "Input should be 'function', 'custom' or 'allowed_tools'"
            raise InvalidRequest(f"tool_choice.type: {problem}")
    elif choice == "required":
        translated = {"type": "any"}
    else:
        translated = {"type": choice}
    if body.get("parallel_tool_calls") is False and choice != "none":
        translated["disable_parallel_tool_use"] = True
    return translated, tools


def to_output_format(
    text_format: Located, translator: SchemaTranslator
) -> tuple[JsonObject | None, str]:
    """Return `output_format` for a format of OpenAI's, and what is asked for in words.

    `text_format` is {"type", "schema"}.
    """
    path, wanted = text_format
    format_type = wanted.get("type", "text")
    schema = wanted.get("schema")
    if format_type == "text":
        return None, ""
    if format_type == "json_object" or (format_type == "json_schema" and schema is None):
        return None, _JSON_OBJECT_PROMPT
    if format_type != "json_schema":
        raise InvalidRequest(f"{path}.type: Input should be 'text', 'json_object' or 'json_schema'")

    with contextlib.suppress(Unenforceable):
        translated = translator.translate(schema, f"{path}.schema")
        if not translator.is_over_limits():
            return {"type": format_type, "schema": translated}, ""
    return None, f"{_JSON_SCHEMA_PROMPT}\n{dump_json(schema)}"


def to_messages_fields(
    body: JsonObject, items: ItemReader, tools: Iterable[Located], text_format: Located
) -> tuple[JsonObject, dict[str, JsonObject]]:
    """Return the fields of a Messages API body that both APIs ask for, and their `call_fields`."""
    temperature = body.get("temperature")
    if isinstance(temperature, (int, float)) and 1 < temperature <= 2:
        # OpenAI's scale goes to 2, Anthropic's to 1.
        temperature = 1

    translator = SchemaTranslator()
    output_format, prompt = to_output_format(text_format, translator)
    items.system += as_blocks(prompt)
    translated, call_fields = _to_tools([*tools, *items.tools], translator)
    choice, translated = _to_tool_choice(body, translated)
    fields = {
        "model": body.get("model"),
        "system": items.system,
        "stream": body.get("stream"),
        "temperature": temperature,
        "top_p": body.get("top_p"),
        "tools": translated,
        "tool_choice": choice if translated else None,
        "output_format": output_format,
    }
    return fields, call_fields


def to_effort(owner: JsonObject, name: str, path: str = "") -> str | None:
    """Return an effort as Anthropic has it, the highest for one that is not yet known here."""
    effort = optional(owner, name, str, path) or "none"
    if effort == "none":
        return None
    if effort == "minimal":
        return "low"
    return effort if effort in EFFORTS else EFFORTS[-1]


def to_raw_input(tool_input: Any) -> str:
    """Return the text that a custom tool is called with; the model may have written anything."""
    raw = as_object(tool_input).get("input")
    return raw if isinstance(raw, str) else json.dumps(tool_input)


def to_openai_usage(usage: JsonObject, input_name: str, output_name: str) -> JsonObject:
    """Return a message's usage as OpenAI counts it, under an API's two names for tokens."""
    counts = collections.defaultdict(int, without_nulls(usage))
    cached = counts["cache_read_input_tokens"]
    written = counts["cache_creation_input_tokens"]
    input_tokens = counts["input_tokens"] + cached + written
    output_tokens = counts["output_tokens"]
    thinking_tokens = as_object(usage.get("output_tokens_details")).get("thinking_tokens") or 0
    return {
        f"{input_name}_tokens": input_tokens,
        f"{output_name}_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        f"{input_name}_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        f"{output_name}_tokens_details": {"reasoning_tokens": thinking_tokens},
    }


class OpenAIError(NamedTuple):
    """How OpenAI's APIs tell of a kind of error."""

    status: int
    type: str
    code: str | None


# By Anthropic's status. Other errors keep the status, and have no code.
_OPENAI_ERRORS: Final = {
    401: OpenAIError(401, "invalid_request_error", "invalid_api_key"),
    402: OpenAIError(429, "insufficient_quota", "insufficient_quota"),
    404: OpenAIError(404, "invalid_request_error", None),
    413: OpenAIError(413, "invalid_request_error", None),
    429: OpenAIError(429, "rate_limit_error", "rate_limit_exceeded"),
    529: OpenAIError(503, "server_error", "overloaded"),
}


def to_openai_error(error: ApiError, request_id: str = "") -> tuple[int, JsonObject]:
    """Return OpenAI's status and envelope for an error; `param` is the field that it names.

    The envelope has no place for the request's id, which stands in a header.
    """
    message = str(error)
    fallback_type = "server_error" if error.status >= 500 else error.type
    fallback = OpenAIError(error.status, fallback_type, None)
    status, error_type, code = _OPENAI_ERRORS.get(error.status, fallback)
    if "prompt is too long" in message or "context limit" in message:
        code = "context_length_exceeded"
    elif status == 404 and message.startswith("model: "):
        code = "model_not_found"
    if code is None:
        code = as_object(error.more.get("details")).get("error_code")

    path = field_path(error)
    param = re.sub(r"\.(\d+)", r"[\1]", path) if path else None
    inner = {"message": message, "type": error_type, "param": param, "code": code}
    return status, {"error": inner}


# ============================================================= Chat completions
# OpenAI's chat completions: requests are read as items of the Responses API, answers are written
# from Anthropic's events. Pure.

# Fields that must not be ignored, each with the only value that is accepted beside an empty one.
_ONLY_VALUES: Final = {
    "n": 1, "modalities": ["text"], "audio": None, "functions": None, "function_call": None,
    "logprobs": None, "top_logprobs": None,
}  # fmt: skip
_REASONING_FORMAT: Final = "anthropic-claude-v1"  # OpenRouter's name for Anthropic's signatures
_REASONING_ID: Final = "cc2api-"  # how the ids of thinking that went out begin


def parse_chat_request(body: JsonObject) -> tuple[Turn, ChatEncoder]:
    """Check a request; return its Turn, and what encodes its answer. Raises InvalidRequest."""
    if body.get("messages") is None and body.get("input"):
        raise InvalidRequest("messages: Field required; `input` goes to POST /v1/responses")
    for name, accepted in _ONLY_VALUES.items():
        if body.get(name) and body[name] != accepted:
            raise InvalidRequest(f"{name}: this value is not supported by this gateway")

    items = ItemReader([], hoists=True)
    items.read_all(_to_items(body))

    text_format = optional(body, "response_format", dict) or {}
    format_path = "response_format"
    if text_format.get("type") == "json_schema":
        inner = require(text_format, "json_schema", dict, format_path)
        text_format = {**inner, "type": "json_schema"}
        format_path += ".json_schema"
    tools = [_flatten(tool, path) for path, tool in located_objects(body, "tools")]
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        choice = _flatten_choice(choice)
    fields, call_fields = to_messages_fields(
        {**body, "tool_choice": choice}, items, tools, (format_path, text_format)
    )

    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else optional(body, "stop", list) or []
    fields["max_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
    # OpenAI takes blank ones, and Anthropic does not.
    fields["stop_sequences"] = [text for text in stops if str(text).strip()] or None
    fields["effort"] = to_effort(body, "reasoning_effort")

    include_usage = bool(as_object(body.get("stream_options")).get("include_usage"))
    turn = to_turn(fields, items.messages, is_lenient=True)
    return turn, ChatEncoder(call_fields, include_usage=include_usage)


def _flatten(owner: JsonObject, path: str) -> Located:
    """Return a tool or a call flat: what stands in it under the name of its type."""
    inner_type = "function" if owner.get("custom") is None else "custom"
    inner = require(owner, inner_type, dict, path)
    return f"{path}.{inner_type}", {**inner, "type": inner_type, "namespace": None}


def _flatten_choice(choice: JsonObject) -> JsonObject:
    """Return a tool_choice in the form of the Responses API, which has no inner objects."""
    if choice.get("type") != "allowed_tools":
        return _flatten(choice, "tool_choice")[1]

    allowed = require(choice, "allowed_tools", dict, "tool_choice")
    path = "tool_choice.allowed_tools"
    tools = [
        _flatten(tool, tool_path)[1] for tool_path, tool in located_objects(allowed, "tools", path)
    ]
    return {"type": "allowed_tools", "mode": allowed.get("mode"), "tools": tools}


def _to_items(body: JsonObject) -> Iterator[Located]:
    """Yield the messages as items of the Responses API, so that one reader does for both APIs.

    A message with tool calls becomes several items; a tool's message becomes an output item.
    """
    for path, message in located_objects(body, "messages"):
        role = message.get("role")
        if role == "tool":
            call_id = require(message, "tool_call_id", str, path)
            content = message.get("content") or ""
            yield path, {"type": "function_call_output", "content": content, "call_id": call_id}
            continue

        content = message.get("content")
        if not content and message.get("refusal"):
            content = message["refusal"]
        if role != "assistant":
            yield path, {"role": role, "type": "message", "content": content}
            continue

        calls: list[Located] = []
        for call_path, call in located_objects(message, "tool_calls", path):
            flat_path, flat = _flatten(call, call_path)
            call_id = require(call, "id", str, call_path)
            call_type = CALL_TYPES[flat["type"]]
            calls.append((flat_path, {**flat, "type": call_type, "call_id": call_id}))

        items: list[Located] = []
        if isinstance(content, list):
            content = _take_calls(message, path, calls)
        if content:
            items.append((path, {"role": role, "type": "message", "content": content}))
        items += calls
        for index, block in _read_reasoning_fields(message):
            place = min(index, len(items))
            items.insert(place, (path, {"type": "reasoning", "encrypted_content": seal(block)}))
        yield from items


def to_reasoning_fields(thinking: Iterable[tuple[int, Block]]) -> JsonObject:
    """Return the fields of a message or a delta that hold thinking blocks, each with its index.

    Clients send them back with the calls of a tool loop: `reasoning_details`, OpenRouter's form, by
    its own provider of the AI SDK, pi and Copilot's CLI; `thinking_blocks` by LiteLLM.
    `reasoning_content`, which more of them show, has no place for the signature.
    """
    details = []
    blocks = []
    for index, block in thinking:
        detail: JsonObject = {"format": _REASONING_FORMAT, "index": index}
        if block["type"] == "redacted_thinking":
            detail["type"] = "reasoning.encrypted"
            detail["data"] = block["data"]
        elif block.get("signature"):
            detail["type"] = "reasoning.text"
            detail["text"] = block["thinking"]
            detail["signature"] = block["signature"]
            detail["id"] = _to_reasoning_id(block)
        else:
            # It was cut short. Without its signature it cannot come back.
            continue
        details.append(detail)
        blocks.append({**block, "index": index})
    return {"reasoning_details": details, "thinking_blocks": blocks} if blocks else {}


def _to_reasoning_id(block: Block) -> str:
    """Return an id by which a block that a client has changed is known.

    The AI SDK's provider joins the texts of neighbours, and keeps the first one's signature.
    """
    digest = hashlib.sha256(json.dumps([block["thinking"], block["signature"]]).encode("ascii"))
    return f"{_REASONING_ID}{digest.hexdigest()[:32]}"


def _read_reasoning_fields(message: JsonObject) -> Iterator[tuple[int, Block]]:
    """Yield the thinking blocks that came back with an answer, each with its index in it.

    What is damaged, or another provider's, is left out.
    """
    # LiteLLM's form of what it does not know.
    sources = (message, as_object(message.get("provider_specific_fields")))
    for name in ("thinking_blocks", "reasoning_details"):
        for source in sources:
            entries = source.get(name)
            if isinstance(entries, list) and entries:
                for number, entry in enumerate(map(as_object, entries)):
                    block = _to_thinking_block(entry)
                    index = entry.get("index")
                    if block:
                        yield max(0, index) if isinstance(index, int) else number, block
                return


def _to_thinking_block(entry: JsonObject) -> Block | None:
    entry_type = entry.get("type")
    if entry_type in ("redacted_thinking", "reasoning.encrypted"):
        data = entry.get("data")
        is_block = isinstance(data, str) and data != ""
        return {"type": "redacted_thinking", "data": data} if is_block else None
    if entry_type not in ("thinking", "reasoning.text"):
        return None

    text = entry.get("thinking" if entry_type == "thinking" else "text") or ""
    signature = entry.get("signature")
    if not isinstance(text, str) or not isinstance(signature, str) or not signature:
        return None
    block = {"type": "thinking", "thinking": text, "signature": signature}
    entry_id = str(entry.get("id"))
    is_changed = entry_id.startswith(_REASONING_ID) and entry_id != _to_reasoning_id(block)
    return None if is_changed else block


def _take_calls(message: JsonObject, path: str, calls: list[Located]) -> list[JsonObject]:
    """Return the parts of an answer's content that are no calls.

    LangChain's messages have a call as a part too, in Anthropic's form or its own, mostly beside
    the same in `tool_calls`. A call that is not yet among `calls` is added.
    """
    told_ids = {call["call_id"] for _, call in calls}
    parts = []
    for part_path, part in located_objects(message, "content", path):
        if part.get("type") not in ("tool_use", "tool_call", "function_call"):
            parts.append(part)
            continue
        call_id = part.get("call_id") or part.get("id")
        if str(call_id) not in told_ids:
            arguments = part.get("input") or part.get("args") or part.get("arguments")
            call = {"name": part.get("name"), "arguments": arguments, "call_id": call_id}
            calls.append((part_path, {"type": "function_call", **call}))
    return parts


class ChatEncoder(MessagesEncoder):
    """Encodes an answer as a chat completion, whole or in chunks."""

    stream_end = b"data: [DONE]\n\n"

    def __init__(
        self, call_fields: Mapping[str, JsonObject], *, include_usage: bool = False
    ) -> None:
        super().__init__(call_fields)
        self._created = int(time.time())
        self._include_usage = include_usage

    def keepalive(self) -> Sequence[JsonObject]:
        return []

    def feed(self, event: Event) -> list[JsonObject]:
        super().feed(event)
        delta = self._to_delta(event)
        if delta is None:
            return []

        chunk = self._to_completion("chat.completion.chunk", "delta", delta)
        if not self._include_usage:
            return [chunk]
        chunk["usage"] = None
        if event["type"] != "message_stop":
            return [chunk]
        return [chunk, {**chunk, "choices": [], "usage": self._usage()}]

    def result(self) -> JsonObject:
        texts: list[str] = []
        thinking: list[tuple[int, Block]] = []
        tool_calls = []
        for index, block in enumerate(self.message["content"]):
            if block["type"] == "text":
                texts.append(block["text"])
            elif block["type"] in THINKING_TYPES:
                thinking.append((index, block))
            elif block["type"] == "tool_use":
                arguments = json.dumps(block["input"])
                tool_calls.append(self._to_tool_call(block, arguments))

        text = "".join(texts)
        reply: JsonObject = {
            "role": "assistant",
            "content": text or (None if tool_calls else ""),
            "refusal": as_object(self.message.get("stop_details")).get("explanation"),
        }
        thinking_text = "".join(block.get("thinking", "") for _, block in thinking)
        if thinking_text:
            reply["reasoning_content"] = thinking_text
        reply.update(to_reasoning_fields(thinking))
        if tool_calls:
            reply["tool_calls"] = tool_calls
        completion = self._to_completion("chat.completion", "message", reply)
        completion["usage"] = self._usage()
        return completion

    def _usage(self) -> JsonObject:
        return to_openai_usage(self.message["usage"], "prompt", "completion")

    def _to_completion(self, object_type: str, field_name: str, choice: JsonObject) -> JsonObject:
        """Return a completion, or a chunk of one, whose one choice has this in that field."""
        stop_reason = self.message.get("stop_reason")
        finish_reason = FINISH_REASONS.get(stop_reason, "stop") if stop_reason else None
        return {
            "id": "chatcmpl-" + str(self.message["id"]).removeprefix("msg_"),
            "object": object_type,
            "created": self._created,
            "model": self.message.get("model"),
            "system_fingerprint": None,
            "choices": [
                {"index": 0, field_name: choice, "logprobs": None, "finish_reason": finish_reason}
            ],
        }

    def _is_custom(self, block: Block) -> bool:
        fields = self.call_fields.get(block["name"])
        return fields is not None and fields["type"] == CALL_TYPES["custom"]

    def _to_tool_call(self, block: Block, arguments: str) -> JsonObject:
        """Return a tool call; the arguments of a custom tool's are always whole."""
        if self._is_custom(block):
            custom = {"name": block["name"], "input": to_raw_input(block["input"])}
            return {"id": block["id"], "type": "custom", "custom": custom}
        function = {"name": block["name"], "arguments": arguments}
        return {"id": block["id"], "type": "function", "function": function}

    def _to_delta(self, event: Event) -> JsonObject | None:
        """Return the delta of an event's chunk; None: there is no chunk."""
        event_type = event["type"]
        delta = as_object(event.get("delta"))
        if event_type == "message_start":
            return {"role": "assistant", "content": ""}
        if event_type == "message_stop":
            return {}
        if delta.get("text"):
            return {"content": delta["text"]}
        if delta.get("thinking"):
            return {"reasoning_content": delta["thinking"]}

        content = self.message["content"]
        block_type = content[-1].get("type") if content else None
        if block_type in THINKING_TYPES and event_type == "content_block_stop":
            # Once and whole: Copilot's CLI keeps the latest list alone.
            return to_reasoning_fields([(len(content) - 1, content[-1])])
        if block_type != "tool_use":
            return None
        call = self._to_call_delta(event_type, content[-1], delta.get("partial_json"))
        if call is None:
            return None
        number = sum(1 for block in content if block["type"] == "tool_use")
        return {"tool_calls": [{"index": number - 1, **call}]}

    def _to_call_delta(
        self, event_type: str, block: Block, arguments: str | None
    ) -> JsonObject | None:
        """Return what an event adds to a tool call; None: nothing."""
        if self._is_custom(block):
            # The text is inside JSON until the block is whole.
            return self._to_tool_call(block, "") if event_type == "content_block_stop" else None
        if event_type == "content_block_start":
            return self._to_tool_call(block, "")
        if arguments:
            return {"function": {"arguments": arguments}}
        if event_type == "content_block_stop" and not any(self.delta_texts):
            return {"function": {"arguments": json.dumps(block["input"])}}
        return None


def _read_chat(body: JsonObject, betas: str, is_count: bool) -> tuple[Turn, MessagesEncoder]:
    return parse_chat_request(body)


CHAT_COMPLETIONS: Final = Dialect(_read_chat, to_openai_error)


# ==================================================================== Responses
# OpenAI's Responses API. Pure, and without a memory: a request brings its whole conversation, and
# what refers to anything kept is refused.

_NOT_KEPT: Final = "nothing is kept here; send the whole conversation as `input`"
# Fields that must not be ignored, each with the problem.
_REFUSED_FIELDS: Final = {
    "previous_response_id": f"Previous response not found: {_NOT_KEPT}",
    "conversation": _NOT_KEPT,
    "prompt": "prompts are not kept here; send what it says",
    "background": "answers are not kept here",
    "top_logprobs": "no model here tells these",
    "stop": "the Responses API has no such field",
    "response_format": "the Responses API has this as `text.format`",
}
DEFAULT_REFUSAL: Final = "The model refused to answer."
DEFAULT_RETRY_S: Final = 5  # where upstream does not say when to come again


def parse_responses_request(
    body: JsonObject, *, is_count: bool = False
) -> tuple[Turn, ResponsesEncoder]:
    """Check a request; return its Turn, and what encodes its answer. Raises InvalidRequest."""
    for name, problem in _REFUSED_FIELDS.items():
        if body.get(name):
            raise InvalidRequest(f"{name}: {problem}")
    if "message.output_text.logprobs" in (optional(body, "include", list) or []):
        raise InvalidRequest("include: logprobs are not supported by this gateway")

    items = _read_input(body)
    last_role = items.messages[-1][1]["role"] if items.messages else None
    if last_role is None or (last_role == "assistant" and not is_count):
        raise InvalidRequest("input: The last item must be a user's message or a tool's output")

    reasoning = optional(body, "reasoning", dict) or {}
    text = optional(body, "text", dict) or {}
    text_format = optional(text, "format", dict, "text") or {}
    fields, call_fields = to_messages_fields(
        body, items, located_objects(body, "tools"), ("text.format", text_format)
    )
    fields["max_tokens"] = body.get("max_output_tokens")
    fields["effort"] = to_effort(reasoning, "effort", "reasoning")
    fields["thinking"] = None
    if _shows_thinking(reasoning, fields["tool_choice"]):
        fields["thinking"] = {"type": "adaptive", "display": "summarized"}

    turn = to_turn(fields, items.messages, is_count=is_count, is_lenient=True)
    return turn, ResponsesEncoder(_to_empty_response(body), call_fields)


def _read_input(body: JsonObject) -> ItemReader:
    """Return the conversation of a request, whose input is a text or a list of items."""
    given = body.get("input")
    if given is None and body.get("messages"):
        raise InvalidRequest("input: Field required; `messages` go to POST /v1/chat/completions")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    owner = {"input": given or None}
    require(owner, "input", list)

    items = ItemReader(to_blocks(body, "instructions", ""))
    items.read_all(located_objects(owner, "input"))
    return items


def _shows_thinking(reasoning: JsonObject, tool_choice: Any) -> bool:
    """Return whether a request wants summaries of the model's thinking, and may have them."""
    wants_summary = bool(reasoning.get("summary") or reasoning.get("generate_summary"))
    # The API refuses thinking beside a forced tool.
    is_forced = as_object(tool_choice).get("type") in ("any", "tool")
    return wants_summary and not is_forced and reasoning.get("effort") != "none"


def _to_empty_response(body: JsonObject) -> JsonObject:
    """Return a response object before anything is answered, with what was asked for.

    It has every field that the Open Responses schema requires (openresponses.org), and null only
    where the schema has it; what was not asked for is OpenAI's default.
    """
    text = {"format": {"type": "text"}, **without_nulls(as_object(body.get("text")))}
    if as_object(text["format"]).get("type") == "json_schema":
        text["format"] = {"description": None, "strict": False, **text["format"]}
    tools = []
    for tool in body.get("tools") or []:
        if tool.get("type") == "function":
            tool = {"description": None, "parameters": None, "strict": None, **tool}
        tools.append(tool)
    tool_choice: Any = body.get("tool_choice") or "auto"
    if as_object(tool_choice).get("type") == "allowed_tools":
        tool_choice = {**tool_choice, "mode": tool_choice.get("mode") or "auto"}
    reasoning = as_object(body.get("reasoning"))
    numbers = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "status": "in_progress",
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "created_at": int(time.time()),
        "output": [],
        "store": False,
        "background": False,
        "truncation": "disabled",
        "service_tier": "default",
        "top_logprobs": 0,
        "previous_response_id": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "safety_identifier": body.get("safety_identifier"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "user": body.get("user"),
        "model": body.get("model"),
        "metadata": body.get("metadata") or {},
        "tools": tools,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tool_choice": tool_choice,
        "text": text,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        **numbers,
        **{name: body[name] for name in numbers if body.get(name) is not None},
    }


class _ItemForm(NamedTuple):
    """How items of a type are streamed."""

    id_prefix: str
    delta_name: str  # the field of upstream's deltas with their text; "": they do not have it
    text_name: str  # the field of the item, or of its part, that holds the text
    event_name: str  # what the events with the text are called; "": there are none
    opening: JsonObject  # the item as it is added, less the fields of a call
    part: JsonObject | None = None  # what holds the text, where that is not the item itself
    part_list: str = ""  # the field of the item that holds the part
    part_event: str = ""  # what the events of the part are called


_MESSAGE_OPENING: Final = {
    "type": "message", "status": "in_progress", "role": "assistant", "content": [],
}  # fmt: skip
_CALL_OPENING: Final = {"status": "in_progress"}
_ITEM_FORMS: Final = {
    "message": _ItemForm(
        id_prefix="msg",
        delta_name="text",
        text_name="text",
        event_name="output_text",
        opening=_MESSAGE_OPENING,
        part={"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        part_list="content",
        part_event="content_part",
    ),
    "refusal": _ItemForm(
        id_prefix="msg",
        delta_name="text",
        text_name="refusal",
        event_name="refusal",
        opening=_MESSAGE_OPENING,
        part={"type": "refusal", "refusal": ""},
        part_list="content",
        part_event="content_part",
    ),
    "reasoning": _ItemForm(
        id_prefix="rs",
        delta_name="thinking",
        text_name="text",
        event_name="reasoning_summary_text",
        opening={"type": "reasoning", "summary": []},
        part={"type": "summary_text", "text": ""},
        part_list="summary",
        part_event="reasoning_summary_part",
    ),
    "function_call": _ItemForm(
        id_prefix="fc",
        delta_name="partial_json",
        text_name="arguments",
        event_name="function_call_arguments",
        opening=_CALL_OPENING,
    ),
    "custom_tool_call": _ItemForm(
        id_prefix="ctc",
        delta_name="",
        text_name="input",
        event_name="custom_tool_call_input",
        opening=_CALL_OPENING,
    ),
    "tool_search_call": _ItemForm(
        id_prefix="tsc", delta_name="", text_name="arguments", event_name="", opening=_CALL_OPENING
    ),
    "apply_patch_call": _ItemForm(
        id_prefix="apc", delta_name="", text_name="operation", event_name="", opening=_CALL_OPENING
    ),
    "shell_call": _ItemForm(
        id_prefix="sh", delta_name="", text_name="action", event_name="", opening=_CALL_OPENING
    ),
    "local_shell_call": _ItemForm(
        id_prefix="lsh", delta_name="", text_name="action", event_name="", opening=_CALL_OPENING
    ),
}


class _OutputItem:
    """An output item as it comes, made of a block; `add_text` and `finish` yield its events."""

    def __init__(
        self, item_type: str, block: Block, call: JsonObject, response_name: str, index: int
    ) -> None:
        """`call` are the fields of a call; `index` is the item's own in the output."""
        self.type = item_type
        self.form = _ITEM_FORMS[item_type]
        self._block = block
        self._index = index
        item_id = f"{self.form.id_prefix}_{response_name}{index}"
        self._place: JsonObject = {"item_id": item_id}  # fields of the events that say where
        self._item: JsonObject = {"id": item_id, **call, **self.form.opening}
        if not self.form.part:
            self._item[self.form.text_name] = ""
        self._texts: list[str] = []
        self._has_begun = False

    def add_text(self, text: str) -> Iterator[JsonObject]:
        """Add text. The item begins with the first that is not blank."""
        if text:
            self._texts.append(text)
        if not self._has_begun:
            # This includes blank text that was held back.
            text = "".join(self._texts)
            if not text.strip():
                return
            self._has_begun = True
            yield self._item_event("added")
            if self.form.part:
                self._place[f"{self.form.part_list}_index"] = 0
                yield self._event(f"{self.form.part_event}.added", part=self.form.part)
        if text:
            yield self._text_event("delta", delta=text)

    def finish(self) -> Iterator[JsonObject]:
        """End the item; a message without text is none."""
        tool_input = self._block.get("input")
        # The text of a custom call was inside JSON until now.
        if self.type == "custom_tool_call":
            yield from self.add_text(to_raw_input(tool_input))
        elif self.type == "function_call" and not self._texts:
            yield from self.add_text(json.dumps(tool_input))
        elif self.type in CALL_TYPES.values() and not self.form.event_name:
            own_tool = _OWN_TOOLS.get(self.type.removesuffix("_call"))
            defaults = own_tool.defaults if own_tool else {}
            self._item[self.form.text_name] = {**defaults, **as_object(tool_input)}

        if not self._has_begun:
            if self.type == "message":
                return
            yield self._item_event("added")
        if self.form.part:
            if self._has_begun:
                yield from self._finish_part(self.form.part)
        elif self.form.event_name:
            text = "".join(self._texts)
            self._item[self.form.text_name] = text
            fields = {self.form.text_name: text}
            if self.type == "function_call":
                fields["name"] = self._item["name"]
            yield self._text_event("done", **fields)

        if self.type == "reasoning":
            self._item["encrypted_content"] = seal(self._block)
        else:
            self._item["status"] = "completed"
        yield self._item_event("done")

    def _finish_part(self, empty_part: JsonObject) -> Iterator[JsonObject]:
        text = "".join(self._texts)
        part = {**empty_part, self.form.text_name: text}
        yield self._text_event("done", **{self.form.text_name: text})
        yield self._event(f"{self.form.part_event}.done", part=part)
        self._item[self.form.part_list] = [part]

    def _text_event(self, ending: str, **fields: Any) -> JsonObject:
        logprobs: JsonObject = {"logprobs": []} if self.type == "message" else {}
        return self._event(f"{self.form.event_name}.{ending}", **logprobs, **fields)

    def _event(self, ending: str, /, **fields: Any) -> JsonObject:
        event = {"type": f"response.{ending}", "output_index": self._index}
        return {**event, **self._place, **fields}

    def _item_event(self, ending: str) -> JsonObject:
        return {
            "type": f"response.output_item.{ending}",
            "output_index": self._index,
            "item": dict(self._item),
        }


class ResponsesEncoder(MessagesEncoder):
    """Encodes an answer as a response; the last event of a stream holds the whole.

    The end of an item is held back until more is known: the next block may go on with its text, and
    a call that max_tokens cut short must not look whole.
    """

    # An answer that has failed may have been paid for. By its status, Codex would repeat the
    # request up to thirty times.
    fails_in_stream = True

    def __init__(self, empty_response: JsonObject, call_fields: Mapping[str, JsonObject]) -> None:
        super().__init__(call_fields)
        self._response = empty_response  # as it was last sent
        self._events_sent = 0
        self._output: list[JsonObject] = []  # the finished items
        self._item: _OutputItem | None = None  # the unfinished one

    def feed(self, event: Event) -> list[JsonObject]:
        super().feed(event)
        event_type = event["type"]
        events: Iterable[JsonObject] = []
        if event_type == "message_start":
            events = self._begin()
        elif event_type == "content_block_start":
            events = self._start_item(self.message["content"][-1])
        elif event_type == "content_block_delta" and self._item:
            text = event["delta"].get(self._item.form.delta_name) or ""
            events = self._item.add_text(text)
        elif event_type == "message_stop":
            events = self._finish()
        return self._numbered(events)

    def result(self) -> JsonObject:
        return self._response

    def keepalive(self) -> Sequence[JsonObject]:
        """Show life: by beginning, then by an event, since comments leave Codex' clock running."""
        return self._numbered(self._begin() or [{"type": "keepalive"}])

    def error_events(self, error: ApiError, body: JsonObject) -> list[JsonObject]:
        beginning = self._begin()
        end = self._response_event("failed", {"status": "failed", "error": to_failure(error)})
        return self._numbered([*beginning, end])

    def _numbered(self, events: Iterable[JsonObject]) -> list[JsonObject]:
        """Return events with their numbers, and collect the finished items."""
        numbered = []
        for event in events:
            number = {"type": event["type"], "sequence_number": self._events_sent}
            numbered.append({**number, **event})
            self._events_sent += 1
            if event["type"] == "response.output_item.done":
                self._output.append(event["item"])
        return numbered

    def _begin(self) -> list[JsonObject]:
        if self._events_sent:
            return []
        in_progress = {"status": "in_progress"}
        created = self._response_event("created", in_progress)
        return [created, self._response_event("in_progress", in_progress)]

    def _start_item(self, block: Block) -> Iterator[JsonObject]:
        """Begin the next item, or go on with a message whose next text this is."""
        call: JsonObject = {}
        if block["type"] == "tool_use":
            undeclared = {"type": "function_call", "name": block["name"]}
            call = {**self.call_fields.get(block["name"], undeclared), "call_id": block["id"]}
            item_type = call["type"]
        elif block["type"] == "text":
            item_type = "message"
        elif block["type"] in THINKING_TYPES:
            item_type = "reasoning"
        else:
            item_type = str(block["type"])

        # Such blocks are what upstream's own tools do.
        is_left_out = item_type not in _ITEM_FORMS
        is_in_message = self._item is not None and self._item.type == "message"
        # Neither text nor a block of upstream's own tools ends an open message.
        goes_on = is_in_message and (is_left_out or item_type == "message")
        if not goes_on:
            yield from self._finish_item()
        if is_left_out:
            return

        if self._item is None:
            name = self._response["id"].partition("_")[2]
            self._item = _OutputItem(item_type, block, call, name, len(self._output))
        yield from self._item.add_text(block.get(self._item.form.delta_name) or "")

    def _finish_item(self) -> Iterator[JsonObject]:
        if self._item:
            item = self._item
            self._item = None
            yield from item.finish()

    def _finish(self) -> Iterator[JsonObject]:
        finish_reason = FINISH_REASONS.get(self.message["stop_reason"])
        is_cut_short = finish_reason == "length"
        is_in_call = self._item is not None and self._item.type in CALL_TYPES.values()
        if not (is_cut_short and is_in_call):
            yield from self._finish_item()

        if finish_reason == "content_filter":
            # In an item of its own: Codex drops what stands beside it.
            details = as_object(self.message.get("stop_details"))
            explanation = str(details.get("explanation") or "").strip()
            refusal = {"type": "refusal", "text": explanation or DEFAULT_REFUSAL}
            yield from self._start_item(refusal)
            yield from self._finish_item()

        usage = to_openai_usage(self.message["usage"], "input", "output")
        fields: JsonObject = {"status": "completed", "usage": usage}
        if is_cut_short:
            fields["status"] = "incomplete"
            fields["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            fields["completed_at"] = int(time.time())
        yield self._response_event(fields["status"], fields)

    def _response_event(self, name: str, fields: JsonObject) -> JsonObject:
        """Change the response's fields, and return an event with the response as it then is."""
        model = self.message.get("model")
        if model is None:
            model = self._response["model"]
        output = list(self._output)
        self._response = {**self._response, "model": model, "output": output, **fields}
        return {"type": f"response.{name}", "response": self._response}


def to_responses_error(error: ApiError, request_id: str = "") -> tuple[int, JsonObject]:
    """Return OpenAI's status and envelope, with the codes on which Codex does not repeat."""
    status, body = to_openai_error(error, request_id)
    inner = body["error"]
    if inner["code"] == "overloaded":
        inner["code"] = "server_is_overloaded"
    if inner["param"] == "previous_response_id":
        inner["code"] = "previous_response_not_found"
    # Here a window of the plan is used up, so that retries are in vain.
    if error.status == 429 and error.should_retry is False:
        inner["type"] = "usage_limit_reached"
        inner["resets_at"] = int(time.time()) + (error.retry_after_s or 0)
    return status, body


def to_failure(error: ApiError) -> JsonObject:
    """Return the `error` of a response that failed: {"code", "message"}.

    Codex repeats a request except on four codes: server_is_overloaded, insufficient_quota,
    context_length_exceeded and invalid_prompt.
    """
    status, body = to_responses_error(error)
    inner = body["error"]
    code = inner["code"]
    message = inner["message"]
    if inner["type"] == "usage_limit_reached":
        code = "insufficient_quota"
    elif code == "rate_limit_exceeded":
        # Codex waits for as long as the message says.
        message += f" Please try again in {error.retry_after_s or DEFAULT_RETRY_S}s."
    elif code not in ("server_is_overloaded", "insufficient_quota", "context_length_exceeded"):
        code = "invalid_prompt" if status < 500 else "server_error"
    return {"code": code, "message": message}


def _read_responses(body: JsonObject, betas: str, is_count: bool) -> tuple[Turn, MessagesEncoder]:
    return parse_responses_request(body, is_count=is_count)


RESPONSES: Final = Dialect(_read_responses, to_responses_error, "response.input_tokens")


# ================================================================== Status page
# What the gateway says of itself at / : a text, and a page with a box to try a prompt in.


def status_text(gateway: Gateway, url: str) -> str:
    """Return in plain text how things are; `url` is where the client sees the gateway."""
    pids, waiting = gateway.pool.snapshot()
    shown_states = [f"{len(pids[state])} {state}" for state in ("spare", "idle", "busy")]

    asked = 0.0
    failed = 0.0
    for labels, count in gateway.metrics.series("cc2api_requests_total"):
        if labels["route"] not in ("messages", "chat_completions", "responses"):
            continue
        status = int(labels["status"])
        asked += count
        if status >= 400 and status != CLIENT_CLOSED_REQUEST:
            failed += count

    tokens = dict.fromkeys(TOKEN_KINDS.values(), 0.0)
    for labels, count in gateway.metrics.series("cc2api_tokens_total"):
        tokens[labels["kind"]] += count
    cost_usd = sum(value for _, value in gateway.metrics.series("cc2api_cost_usd_total"))
    cost = f"${cost_usd:.4f}"
    # Nothing is billed by the token then.
    if gateway.account.is_login or gateway.settings.demo:
        cost += " at list price"

    health = gateway.pool.failure or gateway.pool.reuse_problem
    if not health:
        health = "ok" if gateway.account.is_signed_in() else gateway.account.sign_in()
    up_s = int(time.monotonic() - gateway.metrics.started_at)
    lines = {
        f"cc2api {__version__}": f"up {up_s // 3600} h {up_s % 3600 // 60} min",
        **gateway.describe(url),
        "processes": ", ".join(shown_states),
        "requests": f"{asked:.0f}, {failed:.0f} failed, {waiting} waiting",
        "tokens": ", ".join(f"{count:.0f} {kind}" for kind, count in tokens.items()),
        "cost": cost,
        "health": health,
    }
    return "".join(f"{name:<14}{text}\n" for name, text in lines.items())


PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>cc2api</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
 :root { color-scheme: light dark }
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }
 pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6em }
 #status { white-space: pre; overflow-x: auto; font-size: 85% } pre:empty { display: none }
 textarea, input, select, button { font: inherit; padding: .5em; max-width: 100% }
 textarea { width: 100%; box-sizing: border-box }
 #send { background: #a84a28; color: white } :disabled { opacity: .5 }
</style>
<h1>cc2api</h1>
<p><textarea id="prompt" rows="3" placeholder="Try a prompt; Ctrl-Enter sends it"></textarea>
<p><select id="model" aria-label="model"><option>claude-code</option></select>
 <input id="key" type="password" placeholder="API key" hidden>
 <button id="send">Send</button> <button id="stop">Stop</button>
<pre id="answer"></pre><p id="end"></p>
<pre id="status">…</pre>
<script type="module">
const [prompt, model, key, send, stop, answer, end, status] = document.querySelectorAll("[id]")

async function call(path, more) {
  const headers = {accept: "text/plain", "x-api-key": key.value}
  const got = await fetch(path, {...more, headers}).catch(() => { throw "cc2api is not there" })
  if (got.status == 401 && path == "/") key.hidden = false  // else it is claude's own sign-in
  if (!got.ok) throw (await got.json()).error.message
  return got
}
async function refresh() {
  status.textContent = await call("/").then(got => got.text(), String)
  setTimeout(refresh, 2000)
}
async function list() {
  const {data} = await call("/v1/models").then(got => got.json(), () => ({data: []}))
  model.length = 1
  for (const {id, display_name} of data) model.add(new Option(display_name, id))
}
send.onclick = async () => {
  const messages = [{role: "user", content: prompt.value}], stopping = new AbortController()
  const body = JSON.stringify({model: model.value, max_tokens: 4000, stream: true, messages})
  const began = Date.now(), last = {}
  const tell = text => { end.textContent = `${text} ${((Date.now() - began) / 1000).toFixed(1)} s` }
  const timer = setInterval(tell, 100, "…")
  stop.onclick = () => stopping.abort()
  send.disabled = true
  answer.textContent = ""
  try {
    const got = await call("/v1/messages", {method: "POST", body, signal: stopping.signal})
    const reader = got.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let text = "", part; !(part = await reader.read()).done;) {
      const lines = (text + part.value).split("\\n")
      text = lines.pop()
      for (const line of lines.filter(line => line.startsWith("data: "))) {
        const event = JSON.parse(line.slice(6))
        if (event.error) throw event.error.message
        answer.textContent += event.delta?.text ?? ""
        Object.assign(last, event.delta, event.usage)
      }
    }
    tell(`${last.stop_reason}, ${last.output_tokens} tokens,`)
  } catch (problem) {
    tell(stopping.signal.aborted ? "stopped after" : `failed: ${problem},`)
  }
  clearInterval(timer)
  send.disabled = false
}
prompt.onkeydown = on => { if (on.key == "Enter" && (on.ctrlKey || on.metaKey)) send.click() }
key.value = sessionStorage.apiKey ?? ""
key.oninput = () => { sessionStorage.apiKey = key.value; list() }
refresh()
list()
</script></html>
"""


# ======================================================================= Routes
# Which path does what, who may call it, and the one place where errors become answers. A new route
# is a row in ROUTES and a method of Exchange; a new API that asks a model is a Dialect.

KEEPALIVE_S: Final = 10.0  # of silence before a stream shows life; proxies cut at 30 to 60 s
_KEEPALIVE_COMMENT: Final = b": waiting\n\n"


class Handler(BaseRequestHandler):
    """One connection, with a thread of its own: reads request after request."""

    server: Server
    request: socket.socket

    def handle(self) -> None:
        # An event must not wait for the ACK of the one before.
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = ClientStream(self.request, self.server.gateway.settings.timeout)
        try:
            self._answer_all(stream)
        except ClientGone as gone:
            forget_frames(gone)
        stream.linger()

    def _answer_all(self, stream: ClientStream) -> None:
        """Answer request after request, until the connection ends. Raises ClientGone."""
        client = str(self.client_address[0])
        idle_s = HEAD_TIMEOUT_S
        try:
            while not self.server.is_closed():
                head = stream.read_head(idle_s)
                exchange = Exchange(self.server, stream, head, client)
                with self.server.track_response():
                    exchange.run()
                if exchange.closes_connection:
                    return
                idle_s = IDLE_CONNECTION_S
        except InvalidRequest as error:
            # A client that never sent a whole head gets no answer.
            if error.status != 408:
                no_head = Head("-", "-", True, {})
                Exchange(self.server, stream, no_head, client).run(error)


class Exchange:
    """One request and its response."""

    def __init__(self, server: Server, stream: ClientStream, head: Head, client: str) -> None:
        self._server = server
        self._gateway: Gateway = server.gateway
        self._stream = stream
        self._head = head
        self._route = find_route(head)
        self._caller = NOBODY
        self._log = RequestLog(
            self._gateway.metrics, self._route.name, client, head.method, head.path
        )
        ids = {"request-id": self._log.request_id, "x-request-id": self._log.request_id}
        headers = ids | cors_headers(head, self._gateway.settings)
        self._response = Response(stream, head, headers)
        self._stream_encoder: MessagesEncoder | None = None  # where the answer is a stream

    @property
    def closes_connection(self) -> bool:
        return self._response.closes

    def run(self, failure: ApiError | None = None) -> None:
        """Answer the request; whatever is raised is answered here and nowhere else.

        `failure`: what the request has failed with already. Raises ClientGone.
        """
        try:
            if failure:
                raise failure
            self._stream.parse_framing(self._head)
            self._run_route()
            status = self._response.status
        except ClientGone:
            self._log.finish(CLIENT_CLOSED_REQUEST)
            raise
        except ApiError as error:
            status = self._fail(error)
            forget_frames(error)
        except Exception as exc:
            log.exception("id=%s failed", self._log.request_id)
            status = self._fail(ApiError("internal error"))
            forget_frames(exc)
        self._log.finish(status)

    def _run_route(self) -> None:
        """Check that the request may be made, and run its route."""
        head = self._head
        route = self._route
        if self._server.is_closed():
            raise CliFailed(CLOSING, status=503)

        keys = self._gateway.keys.load()
        is_open = keys == {}
        if is_open and route.name != "healthz":
            check_origin(head, self._gateway.settings)

        allow = {"allow": f"{route.method}, OPTIONS"}
        if head.method == "OPTIONS":
            self._response.add_headers(allow)
            self._response.send(204, "")
            return
        if route.name == NO_ROUTE.name:
            raise ApiError(to_no_route_message(head), status=404)
        is_allowed = head.method == route.method or (head.method, route.method) == ("HEAD", "GET")
        if not is_allowed:
            self._response.add_headers(allow)
            # By 426 Codex learns at once to come without a WebSocket.
            status = 426 if head.get("upgrade") else 405
            raise ApiError(f"method {head.method} not allowed, use {route.method}", status)

        if route.needs_key:
            self._caller = authenticate(keys, head.get("x-api-key"), head.get("authorization"))
            self._log.add_caller(self._caller.name)
        route.run(self)

    def _fail(self, error: ApiError) -> int:
        """Answer with an error: JSON with its status, or an event where a stream has begun.

        Returns the status for the log, even if the client of a stream has had a 200.
        """
        error = with_retry_after(error, self._gateway.rate_limits)
        self._log.add(error=error.type)
        if error.status == 400:
            # The message may quote the prompt, and names inside a schema are the client's own.
            path = re.sub(r"\b(schema|input_schema|parameters)\..*", r"\1", field_path(error))
            if path:
                self._log.add(param=sanitized(path, MAX_LOGGED_PATH_CHARS))
        else:
            self._log.add(msg=json.dumps(str(error)[:MAX_LOGGED_ERROR_CHARS]))
        self._log.debug("error", str(error).encode("utf-8", "replace"))

        status, body = self._route.dialect.to_error(error, self._log.request_id)
        self._response.add_headers(self._error_headers(error, status))

        encoder = self._stream_encoder
        may_be_paid = error.status in (502, 504)
        with contextlib.suppress(ClientGone):
            has_begun = bool(self._response.status)
            if encoder and (has_begun or (encoder.fails_in_stream and may_be_paid)):
                frames = to_sse_frames(encoder.error_events(error, body))
                self._response.write_chunk(frames, is_last=True)
            else:
                self._response.send(status, body)
        return error.status

    def _error_headers(self, error: ApiError, status: int) -> dict[str, str]:
        headers = {}
        if self._log.asks_model:
            headers.update(self._gateway.rate_limits)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        should_retry = error.should_retry
        if error.status == 402 and status == 429:
            # SDKs would retry OpenAI's status for it.
            should_retry = False
        if should_retry is not None:
            headers["x-should-retry"] = "true" if should_retry else "false"
        return headers

    # ---- What the routes do.

    def show_status(self) -> None:
        # It stands in a command that people copy: nothing in it that a shell would act on.
        host = re.sub(r"[^A-Za-z0-9.:\[\]-]", "_", self._head.get("host"))
        text = status_text(self._gateway, f"http://{host}")
        self._response.send(200, text, "text/plain; charset=utf-8")

    def show_page(self) -> None:
        policy = "default-src 'self' 'unsafe-inline'; img-src data:"
        self._response.add_headers({"content-security-policy": policy})
        self._response.send(200, PAGE, "text/html; charset=utf-8")

    def show_metrics(self) -> None:
        text = self._gateway.metrics.render(self._gateway.gauges())
        self._response.send(200, text, "text/plain; version=0.0.4; charset=utf-8")

    def show_health(self) -> None:
        failure = self._gateway.pool.failure
        if failure:
            raise CliFailed(failure, status=503)
        self._response.send(200, {"status": "ok"})

    def list_models(self) -> None:
        """Answer with all models on one page, which both SDKs' paging takes."""
        models = self._model_list()
        first_id = models[0]["id"] if models else None
        last_id = models[-1]["id"] if models else None
        body = {
            "object": "list",
            "data": models,
            "has_more": False,
            "first_id": first_id,
            "last_id": last_id,
        }
        self._response.send(200, body)

    def show_model(self) -> None:
        """Answer with one model, by its id, an alias or a mapped name."""
        # This comes first: an alias can be resolved only once the models are known.
        models = {model["id"]: model for model in self._model_list()}
        _, _, name = self._head.path.rstrip("/").partition("/models/")
        model_id = name if name in models else self._gateway.models.resolve(name)
        if model_id in models:
            self._response.send(200, models[model_id])
            return
        # Both vendors' SDKs ask for it: the code is for OpenAI's.
        raise ApiError(
            f"model: {name}", status=404, more={"param": None, "code": "model_not_found"}
        )

    def _model_list(self) -> list[JsonObject]:
        return self._gateway.list_models(self._caller, self._on_wait)

    def count_tokens(self) -> None:
        turn, _ = self._read_turn(is_count=True)
        tokens = self._gateway.count_tokens(turn, self._caller, self._on_wait)
        self._log.add(input_tokens=tokens)
        body: JsonObject = {}
        if self._route.dialect.count_object:
            body["object"] = self._route.dialect.count_object
        body["input_tokens"] = tokens
        self._response.send(200, body)

    def answer(self) -> None:
        """Have a model answer: write its events as they come, or the whole message."""
        turn, encoder = self._read_turn()
        if turn.stream:
            self._stream_encoder = encoder
        answer = self._gateway.answer(turn, self._caller, self._on_wait, self._log)
        with contextlib.closing(answer):
            for batch in answer:
                self._response.add_headers(self._gateway.rate_limits)
                with malformed_as_502():
                    events = [encoded for event in batch for encoded in encoder.feed(event)]
                    self._log.add_events(batch)
                if turn.stream:
                    is_last = bool(batch) and batch[-1]["type"] == "message_stop"
                    self._write_frames(events, encoder.stream_end if is_last else b"", is_last)

        if not turn.stream:
            with malformed_as_502():
                body = encoder.result()
            sent = self._response.send(200, body)
            self._log.debug("response", sent)

    def _write_frames(self, events: list[JsonObject], end: bytes, is_last: bool) -> None:
        frames = to_sse_frames(events) + end
        self._response.write_chunk(frames, is_last=is_last)
        self._log.debug("response", frames)

    def _on_wait(self) -> None:
        """Look after the client while it waits: see whether it left, show a stream's life."""
        self._stream.check()
        encoder = self._stream_encoder
        if encoder and time.monotonic() - self._response.written_at >= KEEPALIVE_S:
            frames = to_sse_frames(encoder.keepalive()) or _KEEPALIVE_COMMENT
            self._response.write_chunk(frames)

    def _read_turn(self, *, is_count: bool = False) -> tuple[Turn, MessagesEncoder]:
        """Read the request's body, and check it. Raises InvalidRequest, ClientGone."""
        encoding = self._head.get("content-encoding").lower()
        check_encoding(encoding)
        if self._head.get("expect").lower() == "100-continue":
            self._stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = decode_body(self._stream.read_body(), encoding)
        self._log.debug("request", raw)

        betas = self._head.get("anthropic-beta")
        with self._one_large_body(len(raw)):
            turn, encoder = self._route.dialect.read(parse_json(raw), betas, is_count)
        is_known = self._gateway.models.knows(turn.model)
        self._log.add_model(turn.model, stream=turn.stream, is_known=is_known)
        return turn, encoder

    @contextlib.contextmanager
    def _one_large_body(self, body_bytes: int) -> Iterator[None]:
        """Wait until no other large body is parsed.

        To parse one keeps the interpreter busy for a second, and takes several times its size in
        memory.
        """
        if body_bytes <= MAX_BYTES_AT_ONCE:
            yield
            return
        while not self._server.parsing_lock.acquire(timeout=CLIENT_CHECK_S):
            self._on_wait()
        try:
            yield
        finally:
            self._server.parsing_lock.release()


class Route(NamedTuple):
    """What a path does: its name for the metrics, and the method of Exchange that does it."""

    method: str
    name: str
    run: Callable[[Exchange], None]
    dialect: Dialect = ANTHROPIC
    needs_key: bool = True


# Without their /v1: a base URL is configured with it or without, and some clients add one.
# fmt: off
ROUTES: Final = {
    "/": Route("GET", "status", Exchange.show_status),
    "/healthz": Route("GET", "healthz", Exchange.show_health, needs_key=False),
    "/metrics": Route("GET", "metrics", Exchange.show_metrics),
    "/api/hello": Route("GET", "hello", Exchange.show_health),  # Claude Code's own probe
    "/messages": Route("POST", "messages", Exchange.answer),
    "/messages/count_tokens": Route("POST", "count_tokens", Exchange.count_tokens),
    "/chat/completions": Route("POST", "chat_completions", Exchange.answer, CHAT_COMPLETIONS),
    "/responses": Route("POST", "responses", Exchange.answer, RESPONSES),
    "/responses/input_tokens": Route("POST", "response_tokens", Exchange.count_tokens, RESPONSES),
    "/models": Route("GET", "models", Exchange.list_models),
}
# fmt: on
PAGE_ROUTE: Final = Route("GET", "status", Exchange.show_page, needs_key=False)
MODEL_ROUTE: Final = Route("GET", "model", Exchange.show_model)
LIST_ROUTE: Final = ROUTES["/models"]
NO_ROUTE: Final = Route("GET", "none", Exchange.show_health, needs_key=False)
NO_OPENAI_ROUTE: Final = NO_ROUTE._replace(dialect=CHAT_COMPLETIONS)
_OPENAI_PATHS: Final = (
    "/chat/", "/responses", "/completions", "/embeddings", "/images/", "/audio/", "/moderations",
)  # fmt: skip


def _own_path(path: str) -> str:
    """Return a path as ROUTES has it: without its /v1, and without a slash at its end."""
    return re.sub(r"\A(/v1)+(?=/)", "", path).rstrip("/") or "/"


def to_no_route_message(head: Head) -> str:
    """Say that there is no such route, and which base URL to use where there is too much in it."""
    message = f"{head.method} {head.path}: no such route"
    for path, route in ROUTES.items():
        if route.method == "POST" and _own_path(head.path).endswith(path):
            base = "/v1" if route.dialect is not ANTHROPIC else ""
            host = sanitized(head.get("host"), 100)
            return f"{message}; the client's base URL should be http://{host}{base}"
    return message


def find_route(head: Head) -> Route:
    """Return a request's route, a form of NO_ROUTE where there is none for its path.

    A browser that asks for the status gets a page.
    """
    path = _own_path(head.path)
    if path == "/" and "text/html" in head.get("accept"):
        return PAGE_ROUTE
    if path.startswith("/models/"):
        return MODEL_ROUTE
    no_route = NO_OPENAI_ROUTE if path.startswith(_OPENAI_PATHS) else NO_ROUTE
    return ROUTES.get(path, no_route)


# ========================================================================= Demo
# What `--demo` puts in the API's place: a script on loopback, so that all the rest can be tried.

DEMO_ANSWER_CHARS: Final = 300  # agents' first prompts are 10 kB, which would be read out for 40 s
DEMO_WORD_S: Final = 0.03  # between two words: as quick as a model


class DemoApi(BaseHTTPRequestHandler):
    """Answers each call as the API would, in words that say DEMO, or counts tokens."""

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        body = json.loads(raw)
        input_tokens = len(raw) // 4
        if "count_tokens" in self.path:
            self._begin("application/json")
            self.wfile.write(json.dumps({"input_tokens": input_tokens}).encode())
            return

        self._begin("text/event-stream")
        for event in self._events(body, input_tokens):
            self.wfile.write(to_sse_frames([event]))
            time.sleep(DEMO_WORD_S)

    def log_message(self, *args: object) -> None:
        """Print nothing: the gateway's own log is enough."""

    def _begin(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.end_headers()

    def _events(self, body: JsonObject, input_tokens: int) -> Iterator[Event]:
        last_block = as_blocks(body["messages"][-1]["content"])[-1]
        answer = f"DEMO: no model was asked. You said: {last_block.get('text')}"
        words = re.findall(r"\S+\s*", answer[:DEMO_ANSWER_CHARS])
        usage = {"input_tokens": input_tokens, "output_tokens": len(words)}
        message = {
            "type": "message",
            "role": "assistant",
            "content": [],
            "id": f"msg_{uuid.uuid4().hex}",
            "model": body["model"],
            "usage": usage,
            "stop_reason": None,
            "stop_sequence": None,
        }
        yield {"type": "message_start", "message": message}
        empty_block = {"type": "text", "text": ""}
        yield {"type": "content_block_start", "index": 0, "content_block": empty_block}
        for word in words:
            delta = {"type": "text_delta", "text": word}
            yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        yield {"type": "message_delta", "delta": end, "usage": usage}
        yield {"type": "message_stop"}


def start_demo(settings: Settings, environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Start the script; return settings and an environment in which no account is used."""
    server = Server(("127.0.0.1", 0), DemoApi)
    server.serve(None)
    account_prefixes = ("ANTHROPIC_", "CLAUDE_CODE_USE_", "CLAUDE_CODE_OAUTH_")
    demo_environ = {
        name: value for name, value in environ.items() if not name.startswith(account_prefixes)
    }
    demo_environ["ANTHROPIC_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    demo_environ["ANTHROPIC_API_KEY"] = "demo"
    demo_environ["NO_PROXY"] = "127.0.0.1"
    demo_environ["no_proxy"] = "127.0.0.1"
    demo_environ["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] = "1"
    return dataclasses.replace(settings, bare=True, setting_sources=""), demo_environ


# ================================================================= Command line
# Options, checks, signals, and putting the parts together.

# How long a thread that computes keeps the others waiting. Python's 5 ms would add up for a stream,
# which waits several times for each event.
SWITCH_INTERVAL_S: Final = 0.001
LARGE_BLOCK_BYTES: Final = 1024 * 1024  # of memory; few are so large but those of large bodies
_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_VARIABLE_PREFIX: Final = "CC2API_"
_SWITCH_VALUES: Final = {"1": True, "true": True, "0": False, "false": False}


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings. Wrong options end the process with status 2, as argparse does."""
    parser = argparse.ArgumentParser(
        "cc2api",
        usage=argparse.SUPPRESS,  # without a usage text an error is one line
        description="The Claude Code CLI on this machine as an Anthropic Messages API.",
        epilog="Every option can be given as a variable too: --port 8080 is CC2API_PORT=8080.",
    )
    parser.add_argument("--version", action="version", version=f"cc2api {__version__}")
    options: dict[str, dataclasses.Field[Any]] = {}  # by flag and by variable
    for option in dataclasses.fields(Settings):
        flag = _to_flag(option.name)
        options[flag] = option
        options[_VARIABLE_PREFIX + option.name.upper()] = option
        _add_argument(parser, flag, option)

    given: dict[str, Any] = {}  # values by variable or flag; where both are given the flag is later
    for name, value in environ.items():
        if value and name.startswith(_VARIABLE_PREFIX):
            given[name] = value
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            given[_to_flag(name)] = value

    chosen = {}
    for source, value in given.items():
        if source not in options:
            parser.error(f"{source}: there is no such option")
        try:
            chosen[options[source].name] = _to_setting(value, options[source])
        except ValueError as exc:
            parser.error(f"{source}: {exc}")
    return Settings(**chosen)


def _to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_argument(
    parser: argparse.ArgumentParser, flag: str, option: dataclasses.Field[Any]
) -> None:
    """Add a flag whose value is checked later, like that of a variable."""
    text = option.metadata["help"]
    action: Any = "store"
    if option.default == ():
        action = "append"
        text += "; repeatable"
    elif "bool" in str(option.type):
        action = argparse.BooleanOptionalAction
    elif option.default not in (None, ""):
        default = str(option.default).removesuffix(".0")
        text += f" (default: {default})"
    parser.add_argument(flag, action=action, default=None, help=text)


def _to_setting(given: Any, option: dataclasses.Field[Any]) -> Any:
    """Return the value of a flag or a variable as the option has it. Raises ValueError."""
    option_type = str(option.type)
    limits = option.metadata
    expected = limits["help"]
    value = given
    if "bool" in option_type:
        expected = "1 or 0"
        value = _SWITCH_VALUES.get(str(given).lower())
    elif option_type in ("int", "float"):
        expected = f"a number from {limits['low']:g} to {limits['high']:.0f}"
        value = None
        with contextlib.suppress(ValueError):
            number = int(given) if option_type == "int" else float(given)
            if limits["low"] <= number <= limits["high"]:
                value = number
    elif "tuple" in option_type:
        parts = given if isinstance(given, list) else given.split(",")
        parts = [part.strip().removesuffix("/") for part in parts]
        value = tuple(part for part in parts if part)
        if not all(re.fullmatch(limits["form"], part) for part in value):
            value = None
    if value is None:
        raise ValueError(f"{given!r} does not fit: {expected}")
    return value


def check_keys(settings: Settings) -> str:
    """Return who may call. Raises CliUnusable where nobody could, or a named file is missing."""
    keys = KeyFile(settings)
    if keys.is_named and not keys.path.exists():
        raise CliUnusable(f"there is no key file {settings.keys}: make it, or leave --keys out")
    if keys.load() is None:
        raise CliUnusable(keys.summary)
    return keys.summary


def is_running(settings: Settings) -> bool:
    """Return whether a cc2api answers on the port already."""
    address = (settings.host, settings.port)
    with contextlib.suppress(OSError), socket.create_connection(address, CLIENT_CHECK_S) as there:
        there.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return b"server: cc2api/" in there.recv(READ_BYTES)
    return False


def listen(settings: Settings) -> Server:
    """Return the server, bound to its port. Raises CliUnusable."""
    try:
        return Server((settings.host, settings.port), Handler)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if is_running(settings):
            reason = "a cc2api runs there already"
        problem = f"cannot listen on {settings.host} port {settings.port}: {reason}"
        raise CliUnusable(f"{problem}; choose another with --port or --host") from exc


def check_upstream(environ: Mapping[str, str], port: int) -> str:
    """Return which API the CLI will call. Raises CliUnusable where that is this gateway."""
    url = upstream_url(environ)
    if _is_this_gateway(url, port):
        problem = f"ANTHROPIC_BASE_URL={url} is this gateway, which would call itself"
        raise CliUnusable(f"{problem}: set it for the clients only")
    return url or "the CLI's own choice"


def _is_this_gateway(url: str, port: int) -> bool:
    """Return whether a URL leads to this port of this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        default_port = 443 if parts.scheme == "https" else 80
        if not parts.hostname or (parts.port or default_port) != port:
            return False
        family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
        # This succeeds only if the host is an address of this machine.
        with socket.create_server((parts.hostname, 0), family=family):
            return True
    except (OSError, ValueError):
        return False


def try_start(settings: Settings, cli: Cli, environ: Mapping[str, str]) -> str:
    """Have a spare made, and return what it can do. Raises CliUnusable."""
    one_process = dataclasses.replace(settings, processes=1)
    with contextlib.closing(Gateway(one_process, cli, environ)) as gateway:
        pool = gateway.pool
        while not pool.failure and not pool.reuse_problem:
            pids, _ = pool.snapshot()
            if pids["spare"]:
                return "claude starts, and can be used again"
            time.sleep(POLL_INTERVAL_S)
        if pool.failure:
            raise CliUnusable(pool.failure)
        return (
            "claude starts, but each new conversation takes a process of its own: "
            f"{pool.reuse_problem}"
        )


class Check:
    """What `--check` looks at, one method for each line that it prints.

    Each returns what it has found, or raises CliUnusable with the problem and its remedy.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._cli: Cli | None = None

    def keys(self) -> str:
        return check_keys(self._settings)

    def port(self) -> str:
        address = f"{self._settings.host} port {self._settings.port}"
        if is_running(self._settings):
            return f"a cc2api runs on {address} already"
        with listen(self._settings):
            return f"{address} is free"

    def upstream(self) -> str:
        return check_upstream(self._environ, self._settings.port)

    def claude(self) -> str:
        self._cli = find_cli(self._settings.claude, self._environ)
        return str(self._cli)

    def sign_in(self) -> str:
        if self._settings.demo:
            return IN_DEMO
        bare = uses_bare(self._settings.bare, self._environ)
        sign_in = describe_sign_in(self._found_cli(), self._environ, bare=bare)
        if sign_in.startswith(NOT_SIGNED_IN):
            raise CliUnusable(sign_in)
        return sign_in

    def start(self) -> str:
        return try_start(self._settings, self._found_cli(), self._environ)

    def _found_cli(self) -> Cli:
        if self._cli is None:
            raise CliUnusable("there is no claude to be looked at")
        return self._cli


def run_check(settings: Settings, environ: Mapping[str, str]) -> int:
    """Print line by line what is in order, or what to do about it; return the exit status."""
    # What would be logged stands in the lines that are printed.
    logging.disable()
    check = Check(settings, environ)
    steps: dict[str, Callable[[], str]] = {
        "keys": check.keys,
        "port": check.port,
        "upstream": check.upstream,
        "claude": check.claude,
        "sign-in": check.sign_in,
        "start": check.start,
    }
    exit_status = 0
    for name, step in steps.items():
        try:
            found = step()
            print(f"{name:<9}ok    {found}", flush=True)
        except CliUnusable as exc:
            print(f"{name:<9}FAIL  {exc}", flush=True)
            exit_status = 1
            # The other checks need claude.
            if name == "claude":
                break
    return exit_status


def give_memory_back() -> None:
    """Have the C library give large blocks back to the system when they are freed.

    By itself glibc keeps more with each large block that is freed, up to 64 MB for each thread
    (mallopt(3), M_MMAP_THRESHOLD): after a few large bodies some hundred megabytes.
    """
    # Another C library has no mallopt.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def serve(settings: Settings, environ: Mapping[str, str]) -> int:
    """Serve until a signal, then let running answers finish; return the exit status.

    They get `--drain` seconds, or until a second signal.
    """
    check_keys(settings)
    cli = find_cli(settings.claude, environ)
    server = listen(settings)
    check_upstream(environ, server.server_port)
    give_memory_back()
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    signals: list[int] = []
    is_describing = False

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        if is_describing:
            # This gets out of waiting for the CLI to describe its sign-in.
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A signal that nohup has set to be ignored stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)

    gateway = Gateway(settings, cli, environ)
    server.serve(gateway)

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{server.server_port}"
    with contextlib.suppress(KeyboardInterrupt):
        try:
            is_describing = True
            if not signals:
                _print_banner(gateway, url)
        finally:
            is_describing = False
    log.info("event=start version=%s claude=%s url=%s", __version__, cli.version, url)

    # Not by an Event: the kernel may hand a signal to any thread, and a main thread that waits for
    # a lock then never runs its handler (seen, Python 3.11). This one wakes up by itself.
    while not signals:
        time.sleep(ACCEPT_INTERVAL_S)

    server.shutdown()
    # From now on no request is answered.
    server.server_close()

    drain_until = time.monotonic() + settings.drain
    running = server.running_responses
    if running:
        log.warning("%d answers get %g s more; Ctrl-C cuts them off", running, settings.drain)
    while server.running_responses and len(signals) < 2 and time.monotonic() < drain_until:
        time.sleep(ACCEPT_INTERVAL_S)

    gateway.close()
    log.info("event=stop")
    return 0


def _print_banner(gateway: Gateway, url: str) -> None:
    lines = [f"cc2api {__version__} listens on {url}"]
    for name, text in gateway.describe(url).items():
        lines.append(f"  {name:<8} {text}")
    # Nobody may read it, or the disk may be full.
    with contextlib.suppress(OSError):
        write_whole(STDOUT, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway until a signal ends it; return the exit status."""
    environ = dict(os.environ)
    try:
        settings = parse_args(argv, environ)
        handler = LogHandler()
        handler.setFormatter(LogFormatter())
        level = logging.DEBUG if settings.debug else logging.INFO
        logging.basicConfig(level=level, handlers=[handler])
        if settings.demo:
            settings, environ = start_demo(settings, environ)
        return run_check(settings, environ) if settings.check else serve(settings, environ)
    except CliUnusable as exc:
        print(f"cc2api: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # The signal came before `serve` could catch it.
        return 130


if __name__ == "__main__":
    sys.exit(main())
