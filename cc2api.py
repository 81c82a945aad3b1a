"""cc2api: the Claude Code CLI on this machine as a faithful Anthropic Messages API.

A request comes in over HTTP, is checked once, and is played to a `claude` process over the CLI's
own stream-json protocol. The CLI makes the call with the user's own sign-in; the API's events come
back through it and go out as they arrive. Nothing here talks to Anthropic or sees a credential.

    client ──HTTP bytes──> Handler ──JSON──> Turn ──> Session ──lines──> `claude` ──> Anthropic
      ^                    (request thread, one per connection)            |
      └───SSE frames / one message <── events <── AnswerReader <───lines───┘

Any process serves any next request of its caller: it is cut back to the common prefix of what it
holds and what the request says, and the rest is appended (Conversation). The pool lends the session
in which that costs least, and keeps one blank process ready: initialised, and warmed up by a query
that was held back from upstream. The keeper is the one thread that starts them, and reaps them.

    starting ──prime──> spare (pool) ──acquire──> busy (request) ──give_back──> idle (pool)
                                                       ^─────────acquire──────────┘
Rules that hold throughout:
 1. Data goes one way, and raw client JSON is looked at in Requests and the translations alone.
 2. A process serves one caller for life, and nothing that was cut is ever sent again. A CLI that
    does not cut, or does not take another system prompt, gets a process for each conversation.
 3. Exactly one call is made upstream for one request. The CLI would make another by itself after
    some answers and after many refusals: from the moment a call has left the process is held back
    from any other (HOLD_CALLS), and where that is not certain it is ended.
 4. Prompts and keys go through pipes only: never into argv, files, an environment or the log.
 5. Upstream gets what the client sent, in the same bytes by whatever process. With a login the CLI
    adds reminders of its own, which stay with the first message (Session._append_held). No
    variable or setting of the user's changes how upstream is asked (PINNED_VARIABLES).
 6. A stream's 200 goes out with its first event, so that a failure keeps its true status, or after
    KEEPALIVE_S of silence.

A streamed request passes HTTP (read_head) > Routes (Handler) > HTTP (read_body) > Requests >
Service (answer) > Pool (acquire) > Conversation (Session: bring, ask) > Lines > Process (Channel)
and back Process > Conversation (read) > Events (feed) > Service > Routes (ask) > HTTP (Response).

Facts about the CLI were seen on 2.1.300 to 2.1.332 talking to a scripted API; each one relied on is
pinned by a test in tests/. Sections, each using only what stands above it: Settings, Errors, API
keys, JSON, Requests, Lines, Events, The CLI, Process, Conversation, Pool, OpenAI, Chat completions,
Responses, Metrics, Service, Status, HTTP, Routes, Demo, Command line.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any, Final, NamedTuple, TypeVar

if sys.version_info < (3, 10):  # noqa: UP036 - so that it is one line, the file is 3.8's syntax
    sys.exit("cc2api needs Python 3.10 or newer, and this is " + sys.version.partition(" ")[0])

__version__ = "0.1.0"

JsonObject = dict[str, Any]
_T = TypeVar("_T")
log = logging.getLogger("cc2api")

MIN_CLI_VERSION: Final = (2, 1, 300)  # older leave `/model` text in a used process (2.1.248)
DEFAULT_SYSTEM_PROMPT: Final = "You are a helpful assistant."
DEFAULT_MODEL_NAME: Final = "claude-code"  # the name under which clients ask for the CLI's default
DEFAULT_KEY_FILE: Final = "apikeys.txt"

MAX_BODY_BYTES: Final = 32 * 1024 * 1024  # the Messages API's own limit
MAX_JSON_DEPTH: Final = 128  # deep enough for any schema; far from both languages' stack limits
# Of the CLI's output. An answer of 128k tokens is about 1 MB, but where a message is taken back the
# CLI prints its text: that is not longer than the body that it came in, and is given as much again
# for what it is wrapped in and how it is escaped.
MAX_LINE_BYTES: Final = 2 * MAX_BODY_BYTES
MAX_COST_USD: Final = 1e9  # of a process, to keep nonsense out of the sums
READ_BYTES: Final = 64 * 1024  # a Linux pipe's capacity
MAX_LOG_LINE_BYTES: Final = 64 * 1024  # of the CLI's log; upstream's errors are far shorter
STDERR_TAIL_BYTES: Final = 2000  # enough for a stack trace's first lines in an error message

CONTROL_TIMEOUT_S: Final = 15.0  # of a CLI that answers within 0.1 s, and starting in 1 s
CALL_TIMEOUT_S: Final = 60.0  # from the question to the call; 0.02 s, and some for 32 MB of images
CHANGE_TIMEOUT_S: Final = 5.0  # for a cut, prompt, tools, the end of a turn; they take 0.01 s
SETUP_ATTEMPTS: Final = 3  # one that dies before the query has cost nothing: a kept, two new ones
COUNT_ATTEMPTS: Final = 10  # the tools that the CLI was just given may take it a moment
TICK_S: Final = 0.5  # how often a waiting request looks after its client; noticed gone within 1 s
LEAVE_S: Final = 2.0  # for a turn to end when its client has left; it needs 0.01 s
KEEPALIVE_S: Final = 10.0  # of silence before a stream shows life; proxies cut at 30 to 60 s
MAX_SESSION_AGE_S: Final = 3600.0  # old processes may hold stale sign-ins, or be an old CLI's
MAX_SESSION_TURNS: Final = 1000  # as many left time and memory flat (tests/bench/soak.py)
IDLE_S: Final = 300.0  # after a burst, for processes beyond --processes
SIGN_IN_S: Final = 60.0  # until the CLI is asked again how it is signed in; it takes 0.2 s
SPARE_DELAY_S: Final = 0.1  # a new spare takes 0.45 CPU-seconds: not before the call has left
REHEARSE_AGAIN_S: Final = 600.0  # a CLI that could not be used again may be busy, not other
BLANK_DISTANCE: Final = 25  # messages that replay while a spare's first turn takes longer
MAX_TOOL_RESULT_CHARS: Final = 100_000  # through the tool channel; the CLI saves large ones to disk
MAX_TOOL_ERROR_CHARS: Final = 5_000  # the CLI cuts errors at 10,000
KEEPER_TICK_S: Final = 5.0  # how soon a dead or stale spare is noticed without a request
POLL_S: Final = 0.02  # between two looks at what is quick; a killed process is gone within this
EXIT_STATUS_S: Final = 1.0  # from a closed stdout to the exit status; a dying process needs 0.01 s
EXIT_GRACE_S: Final = 5.0  # from EOF on stdin to SIGKILL; the CLI needs 0.04 s
LONGEST_RETRY_S: Final = 60  # what SDKs wait for without seeming to hang
OVERLOADED_RETRY_AFTER_S: Final = 5  # told to clients that find the queue full

MAX_CONNECTIONS: Final = 512  # open at once, each a thread; far below the usual 1024 descriptors
MAX_HEADERS: Final = 100  # http.server's own limit
MAX_HEAD_BYTES: Final = 64 * 1024  # request line and headers together
HEAD_TIMEOUT_S: Final = 15.0  # for a whole head: half-open connections go
BODY_TIMEOUT_S: Final = 120.0  # for a whole body: 32 MB at 2 Mbit/s
MIN_NAMED_KEY: Final = 12  # characters; of a shorter key its last four would tell too much
KEYS_GONE_S: Final = 2.0  # a key file that is written anew holds no key for a moment
IDLE_CONNECTION_S: Final = 120.0  # longer than proxies keep theirs (60 s)
LINGER_S: Final = 2.0  # reading on after an early answer, or a reset would destroy it on its way
DEMO_CHARS: Final = 300  # of a demo's answer; agents' first prompts are 10 kB, read out for 40 s
DEMO_WORD_S: Final = 0.03  # between the words of `--demo`: as quick as a model
ACCEPT_TICK_S: Final = 0.1  # how soon a signal is noticed, and the end of the last answer
LISTEN_BACKLOG: Final = 128  # socketserver's 5 refuses a burst of parallel clients


# ===================================================================== Settings
# One frozen dataclass, the only place where a default lives. Flags beat CC2API_* variables beat
# defaults; the command line is built from these fields, so help and code cannot differ.

_ORIGIN: Final = r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+"


# 1e9 is no limit but keeps infinity out, which no wait takes
def _option(default: Any, text: str, form: str = ".*", low: float = 0, high: float = 1e9) -> Any:
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
    processes: int = _option(4, "claude processes kept when idle, one of them blank; 0 keeps none")
    max_concurrency: int = _option(8, "requests answered at once", low=1)
    max_queue: int = _option(64, "requests that may wait for their turn")
    timeout: float = _option(600.0, "seconds for a whole answer", low=1)
    drain: float = _option(30.0, "seconds that running answers get at the end")
    bare: bool | None = _option(None, "run claude with --bare (default: with an API key or cloud)")
    setting_sources: str = _option("", "settings to load: user,project,local (default: none)")
    check: bool = _option(False, "check the CLI, sign-in, keys, port and a start, then end")
    demo: bool = _option(False, "answer from a script, without an account")
    debug: bool = _option(False, "log requests and responses whole, prompts included")


# ======================================================================= Errors
# Everything a client can be told, as exceptions: raised anywhere, answered in one place in Routes.

STATUS_BY_TYPE: Final = {  # messages-api.md section 5
    **{"invalid_request_error": 400, "authentication_error": 401, "billing_error": 402},
    **{"permission_error": 403, "not_found_error": 404, "conflict_error": 409},
    **{"request_too_large": 413, "rate_limit_error": 429, "api_error": 500},
    **{"timeout_error": 504, "overloaded_error": 529},
}
_TYPES: Final = {status: kind for kind, status in STATUS_BY_TYPE.items()}


@dataclass(eq=False)
class ApiError(Exception):
    """An error the client is shown."""

    message: str
    status: int = 500
    kind: str = ""  # Anthropic's `type`; else the status tells it
    details: JsonObject | None = None
    retry_after_s: int | None = None
    should_retry: bool | None = None  # False: SDKs would only pay for the same again
    is_for_operator: bool = False  # the message says what to do on the gateway's machine

    def __post_init__(self) -> None:
        super().__init__(self.message)
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        self.kind = self.kind or _TYPES.get(self.status, fallback)


@dataclass(eq=False)
class InvalidRequest(ApiError):
    """The request is at fault; the message starts with the path of the field."""

    status: int = 400


@dataclass(eq=False)
class CliFailed(ApiError):
    """The CLI could not be started, died, or broke its protocol."""

    status: int = 502


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def forget_frames(exc: BaseException | None) -> None:
    """Drop the frames that an exception has passed; to be called where its way ends.

    A frame that names the exception in a variable makes a cycle with it, which only the garbage
    collector undoes, perhaps much later; and a request's frames hold a body of 32 MB.
    """
    while exc is not None:
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


# ===================================================================== API keys
# Who may call. The file is read on every request, so a change takes effect at once. Fails closed:
# only a file that was not named, and that is not there or holds no key, means open mode, and that
# on loopback alone.


class Caller(NamedTuple):
    """Who makes a request."""

    name: str  # for the log and the metrics
    identity: bytes  # a digest of the key: what tells one caller's conversations from another's


NOBODY: Final = Caller("open", b"")  # the gateway itself, named as who calls without a key


class KeyFile:
    """The file of keys: one a line, a name may follow; blank and # lines are ignored.

    Its methods may be called on any thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = Path(settings.keys or DEFAULT_KEY_FILE)
        self.who = ""  # may call, in a few words, as of the last load
        is_loopback = re.fullmatch(r"localhost|127\.[\d.]+|::1", settings.host)
        self.is_named = settings.keys is not None
        self.is_needed = self.is_named or not (is_loopback or settings.allow_open)
        self._lock = threading.Lock()  # guards what follows, and `who` where it is written
        self._last: dict[str, str] = {}  # what it held when it held something
        self._gone_at: float | None = None  # monotonic; since when it holds no key
        self.load()

    def load(self) -> dict[str, str] | None:
        """Return the keys with their names: {} where anybody may call, None where nobody."""
        with self._lock:
            return self._load()

    def _load(self) -> dict[str, str] | None:
        keys: dict[str, str] | None = None
        why = "it holds no key"
        if not self.is_named:
            why += ", and --host is not loopback"

        try:
            keys = self._read()
        except (OSError, UnicodeDecodeError) as exc:
            why = getattr(exc, "strerror", "it is not UTF-8")

        if keys:
            who = f"{len(keys)} in {self.path}"
        elif keys is not None and not self.is_needed:
            who = "open: anyone who can connect may call"
        else:
            keys = None
            who = f"NOBODY CAN CALL: {self.path}: {why}; see --keys and --allow-open"

        if self.who not in ("", who):
            log.warning("keys changed: %s", who)
        self.who = who
        return keys

    def _read(self) -> dict[str, str]:
        """Return the keys with their names.

        What held keys and holds none is being written anew, perhaps slowly, by a shell or an
        editor, with its comments first: what it held goes on for KEYS_GONE_S.
        """
        if self.path.exists() and not self.path.is_file():  # reading a pipe would block
            raise OSError(0, "it is not a regular file")

        text = ""
        with contextlib.suppress(FileNotFoundError):
            text = self.path.read_text("utf-8-sig")
        keys = parse_keys(text)

        if keys:
            self._last = keys
            self._gone_at = None
        elif self._last:
            now = time.monotonic()
            if self._gone_at is None:
                self._gone_at = now
            if now - self._gone_at >= KEYS_GONE_S:
                self._last = {}
        return self._last


def parse_keys(text: str) -> dict[str, str]:
    """Return the keys of a file's text, each with its name, or with the last characters of it.

    Only blanks and tabs part a key from its name: other white space, as Unicode has it, may be a
    byte of the key.
    """
    keys = {}
    for line in text.split("\n"):
        key, _, words = line.strip(" \t").replace("\t", " ").partition(" ")
        if not key or key.startswith("#"):
            continue
        name = re.sub(r"[^\w.@-]+", "_", words.strip())
        tail = key[-4:] if len(key) >= MIN_NAMED_KEY else ""
        keys[key] = name or f"…{tail}"
    return keys


def identify(keys: Mapping[str, str] | None, api_key: str, authorization: str) -> Caller:
    """Return who calls, by `x-api-key`, which wins as on the public API, or Bearer token."""
    scheme, _, token = authorization.strip(" \t").partition(" ")
    given = api_key.strip(" \t") or (token.strip(" \t") if scheme.lower() == "bearer" else "")
    raw = given.encode("latin-1", "replace")  # as it came over the wire
    # Every key is compared, in constant time: neither a prefix nor a position can be timed.
    names = [name for key, name in (keys or {}).items() if hmac.compare_digest(raw, key.encode())]
    if keys != {} and not names:
        raise ApiError("missing or invalid x-api-key header or bearer token", status=401)
    return Caller([*names, NOBODY.name][0], hashlib.sha256(raw).digest())


# ========================================================================= JSON
# JSON in slices. The interpreter runs one thread at a time and does not interrupt a function that
# is written in C: to parse or write 30 MB with one call stops every stream for half a second, and
# the settings that hold a process back from a second call would come too late. So what is large
# goes in slices, in between of which other threads have their turn. The result is the same. Pure.

# From here on in slices; the functions in C take some two milliseconds for as much.
LARGE_CHARS: Final = 256 * 1024
SLICE_CHARS: Final = 256 * 1024
# How much JSON the functions in C may parse at once: as much as agents send in a long conversation.
# That takes them 10 ms.
MAX_BYTES_AT_ONCE: Final = 1024 * 1024
MAX_CONTAINERS_AT_ONCE: Final = 10_000
# Lists and objects in one body. The API takes 100,000 messages, which have three each.
MAX_CONTAINERS: Final = 400_000

_STRING_PART: Final = re.compile(r'[^"\\]*(?:\\(?:[^u]|u[0-9A-Fa-f]{4})[^"\\]*)*', re.DOTALL)
_HIGH_SURROGATE: Final = re.compile(r"\\u[Dd][89ABab][0-9A-Fa-f]{2}")
_HIGH_SURROGATE_CHARS: Final = 6


def fits_at_once(raw: bytes | bytearray) -> bool:
    """Return whether JSON is so small that the parser in C may have it at once."""
    if len(raw) > MAX_BYTES_AT_ONCE:
        return False
    return raw.count(b"[") + raw.count(b"{") <= MAX_CONTAINERS_AT_ONCE


def load_json(raw: bytes | bytearray) -> Any:
    """Parse JSON in UTF-8. Raises ValueError, RecursionError."""
    return json.loads(raw.decode("utf-8")) if fits_at_once(raw) else load_in_slices(raw)


def load_in_slices(raw: bytes | bytearray) -> Any:
    """Parse JSON in UTF-8, however large. Raises ValueError, RecursionError.

    It may hold MAX_CONTAINERS lists and objects, and no half emoji, NaN or infinity.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for at in range(0, len(raw), SLICE_CHARS):
        # Grows in place. To join the parts at the end would be one call that touches 30 MB of new
        # memory, which was seen to take 100 ms on a busy machine.
        text += decoder.decode(raw[at : at + SLICE_CHARS])
    text += decoder.decode(b"", final=True)
    return _SlicedDecoder().decode(text)


class _SlicedDecoder(json.JSONDecoder):
    """The standard library's parser in its form in Python, but for what is inside of strings."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._refuse, parse_float=self._to_float)
        in_python: Any = json.decoder  # not in its type stubs; tried with Python 3.10 to 3.13
        self._containers = 0
        self.parse_string = _scan_string
        self.parse_array = self._counting(in_python.JSONArray)
        self.parse_object = self._counting(in_python.JSONObject)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _counting(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_counted(*given: Any) -> Any:
            self._containers += 1
            if self._containers > MAX_CONTAINERS:
                raise ValueError(f"over {MAX_CONTAINERS} lists and objects")
            return parse(*given)

        return parse_counted

    @staticmethod
    def _refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    @staticmethod
    def _to_float(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits[:20]} is out of range")
        return number


def _scan_string(text: str, begin: int, strict: bool = True) -> tuple[str, int]:
    """Return a string that begins behind its quotation mark, and the place behind its end."""
    whole = ""
    at = begin
    while text[at : at + 1] != '"':
        found = _STRING_PART.match(text, at, at + SLICE_CHARS)
        end = found.end() if found else at
        # Half an emoji waits for its other half, if that is in the next slice.
        half = end - _HIGH_SURROGATE_CHARS
        if half > at and text[end : end + 1] == "\\" and _HIGH_SURROGATE.fullmatch(text, half, end):
            end = half
        if end == at:
            raise json.JSONDecodeError("Unterminated string, or a bad escape in it", text, at)
        part, _ = json.decoder.scanstring(text[at:end] + '"', 0, strict)  # type: ignore[attr-defined]
        if not part.isascii():
            part.encode("utf-8")  # raises what half an emoji would raise later
        whole += part  # in place, as in `load_in_slices`
        at = end
    return whole, at + 1


def is_small(value: Any) -> bool:
    """Return whether JSON is so small that the functions in C may have it at once."""
    left = LARGE_CHARS
    rest = [value]
    while rest:
        node = rest.pop()
        left -= 10  # for what stands around it
        if isinstance(node, str):
            left -= len(node)
        elif isinstance(node, dict):
            rest += node.values()
        elif isinstance(node, list):
            rest += node
        if left < 0:
            return False
    return True


def json_pieces(value: Any, *, sort_keys: bool = False) -> Iterator[str]:
    """Yield a value as `json.dumps` would write it, in ASCII, in pieces of some SLICE_CHARS."""
    if is_small(value):
        yield json.dumps(value, sort_keys=sort_keys)
    elif isinstance(value, str):
        yield '"'
        for at in range(0, len(value), SLICE_CHARS):
            yield json.dumps(value[at : at + SLICE_CHARS])[1:-1]
        yield '"'
    elif isinstance(value, dict):
        before = "{"
        for name, member in sorted(value.items()) if sort_keys else value.items():
            yield f"{before}{json.dumps(name)}: "
            yield from json_pieces(member, sort_keys=sort_keys)
            before = ", "
        yield "}"
    else:
        before = "["
        for member in value:
            yield before
            yield from json_pieces(member, sort_keys=sort_keys)
            before = ", "
        yield "]"


def dump_json(value: Any) -> str:
    """Return a value as `json.dumps` writes it."""
    return "".join(json_pieces(value))


def is_blank(text: str) -> bool:
    """Return whether a text is white space alone, or nothing."""
    return not any(text[at : at + SLICE_CHARS].strip() for at in range(0, len(text), SLICE_CHARS))


# ===================================================================== Requests
# Bytes to a checked, frozen `Turn`. Pure: no I/O, any thread. Refused is only what the CLI would
# silently repair, drop or choke on, and what the code itself walks into; all else goes upstream,
# whose own 400 comes back.

Placed = tuple[str, JsonObject]  # an object, with the path under which the client sent it
Said = tuple[str, str, JsonObject]  # a message's block after its role and path
Mark = tuple[JsonObject, Any]  # a block or tool that the client gave a breakpoint, and its ttl


class Message(NamedTuple):
    """One message, its blocks as the client sent them but for cache breakpoints."""

    role: str  # "user" or "assistant"
    content: list[JsonObject]


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked request: what is sent to a process, and how the answer is wanted."""

    model: str
    stream: bool
    system: str  # "" means the default system prompt
    messages: tuple[Message, ...]  # roles alternating; the last one is the user's
    digests: tuple[bytes, ...]  # one a message, alike where the model is told the same
    tools: list[JsonObject]
    extra_body: JsonObject  # merged by the CLI into the top level of its request
    betas: tuple[str, ...]
    marked: JsonObject | None  # the very block or tool that goes with a cache breakpoint
    cache_ttl: str  # "5m" or "1h", for every cache breakpoint of the request
    media: int  # how many images and documents there are
    is_login: bool = False  # the CLI runs on a claude.ai login


_KIND_NAMES: Final = {str: "string", bool: "boolean", dict: "dictionary", list: "list"}
EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
# Models for which the CLI takes `effort` out of the body (read, 2.1.300 and 2.1.332); the API
# refuses it for them.
_LACKS_EFFORT: Final = re.compile(
    r"claude-(3-|opus-4-[01]\b|opus-4-20|sonnet-4-[05]\b|sonnet-4-20|haiku-4-5\b)"
)
# How the block begins in which Claude Code says who it is (code.claude.com: llm-gateway-protocol).
ATTRIBUTION_START: Final = "x-anthropic-billing-header:"
# Top-level fields that do not travel in CLAUDE_CODE_EXTRA_BODY: they have a way of their own, are
# the CLI's to say (metadata), or what it does anyway (a breakpoint on the last block).
_OURS: Final = ("model", "messages", "system", "stream", "tools", "metadata", "cache_control")
_BASE64: Final = re.compile("[A-Za-z0-9+/]*")
_IMAGE_STARTS: Final = {  # their magic numbers in base64
    **{"image/png": "iVBORw0KGgo", "image/jpeg": "/9j/"},
    **{"image/gif": "R0lGOD", "image/webp": "UklGR"},
}
# What JavaScript's `trim` takes off.
_BLANK_FOR_CLI: Final = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
# What the CLI takes for text that is not blank, and for text without blank ends.
_SAID: Final = re.compile(r"[^\s\ufeff](?:.*[^\s\ufeff])?", re.DOTALL)
_SAYS_NOTHING: Final = ("", "(no content)", "[Empty text removed]")  # words of the CLI's own
# The CLI drops the oldest images and documents that are over the API's number, which is higher for
# models with a window of a million tokens. Those it knows by their names, and for others goes by
# this beta (seen, 2.1.300 and 2.1.332: all names that they list, and others).
MAX_MEDIA: Final = 100
MAX_MEDIA_IN_LONG_WINDOW: Final = 600
_HAS_LONG_WINDOW: Final = re.compile(
    r"claude-(opus-4-[78]|opus-5|sonnet-5|fable-5|haiku-5-5)(?!\d)|.*\[1m\]\Z"
)
_MEDIA: Final = ("image", "document")
_LONG_WINDOW_BETA: Final = "context-1m-2025-08-07"
_BETA: Final = re.compile(r"(?!claude-code-|oauth-)[A-Za-z0-9][A-Za-z0-9_.-]*\Z")  # not the CLI's


def parse_json(raw: bytes) -> JsonObject:
    """Parse a request body: a JSON object in UTF-8 that every later step can carry."""
    try:
        if fits_at_once(raw):
            body = json.loads(raw.decode("utf-8"))
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
        else:
            body = load_in_slices(raw)
    except (RecursionError, ValueError) as exc:  # also of a lone surrogate, NaN, 4301 digits
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from None
    level: list[Any] = [[body]]  # lists and dictionaries, level by level
    for _ in range(MAX_JSON_DEPTH + 1):
        nested = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for node in nested for child in node if isinstance(child, (dict, list))]
    if level or not isinstance(body, dict):
        raise InvalidRequest(f"The body is no JSON object, or nested deeper than {MAX_JSON_DEPTH}")
    return body


def require(owner: JsonObject, name: str, kind: type[_T], path: str = "") -> _T:
    """Return a field that must be there. `path` is the owner's, "" for the whole body."""
    place, value = f"{path}.{name}" if path else name, owner.get(name)
    if value is None:
        raise InvalidRequest(f"{place}: Field required")
    if not isinstance(value, kind):
        raise InvalidRequest(f"{place}: Input should be a valid {_KIND_NAMES[kind]}")
    return value


def optional(owner: JsonObject, name: str, kind: type[_T], path: str = "") -> _T | None:
    """Return a field, None where it is absent or null."""
    return None if owner.get(name) is None else require(owner, name, kind, path)


def objects(owner: JsonObject, name: str, path: str = "") -> Iterator[Placed]:
    """Yield the objects of a list, each with its path; none where the list is absent."""
    place = f"{path}.{name}" if path else name
    for index, item in enumerate(optional(owner, name, list, path) or []):
        yield f"{place}.{index}", require({str(index): item}, str(index), dict, place)


def _object(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


def without_nulls(owner: JsonObject) -> JsonObject:
    """Return an object less its fields that are null."""
    return {name: value for name, value in owner.items() if value is not None}


def as_blocks(content: Any) -> Any:
    """Return content as a list of blocks: for a string one text block, or none."""
    if not isinstance(content, str):
        return content
    return [{"type": "text", "text": content}] if content else []


def parse_messages_request(body: JsonObject, betas: str = "", *, is_count: bool = False) -> Turn:
    """Check a Messages API request, with the anthropic-beta header, and return it as a Turn."""
    if body.get("thread") is not None:
        # The SDKs' tool runners then resend the whole history (messages-api.md section 9).
        problem = "thread: message threads are not supported; send the whole history"
        raise InvalidRequest(problem, details={"error_code": "thread_unsupported_request"})
    if body.get("max_tokens") is None and not is_count:  # the CLI would put a number of its own
        raise InvalidRequest("max_tokens: Field required")
    require(body, "messages", list)
    return to_turn(body, objects(body, "messages"), betas, is_count=is_count)


def to_turn(
    body: JsonObject, messages: Iterable[Placed], betas: str = "", *, is_count: bool = False
) -> Turn:
    """Return the Turn of a body and its placed messages; one to count may end with an answer."""
    if not require(body, "model", str).strip():
        raise InvalidRequest("model: String should have at least 1 character")
    passed = {
        **body,
        **dict.fromkeys(_OURS),
        "output_format": None,
        "effort": None,
        "output_config": _parse_output_config(body),
        "thinking": _parse_thinking(body),
    }
    parts, said = _parse_system(body), list(_parse_messages(messages))
    system = "\n\n".join(part["text"] for part in parts)
    if is_count and system:  # the CLI would count it as a message of its own
        said.insert(0, ("user", "system", {"type": "text", "text": system}))
    marks: list[Mark] = []
    tools = []
    for path, tool in objects(body, "tools"):
        check_callers(f"{path}.allowed_callers", tool.get("allowed_callers"))
        tools.append(unmarked(tool, marks))
    merged = _merge(said, marks)
    if merged[-1].role == "assistant" and not is_count:
        problem = "This gateway does not support assistant message prefill."
        raise InvalidRequest(f"messages: {problem} The conversation must end with a user message.")
    # The API takes four breakpoints, and the CLI sets three: on two system blocks and the last of
    # the messages (seen, 2.1.330). The fourth is the client's latest.
    last = merged[-1].content[-1]
    marked = next((block for block, _ in reversed(marks) if block is not last), None)
    for owner in (body, *parts):  # the CLI marks these itself
        unmarked(owner, marks)
    return Turn(
        model=body["model"],
        stream=bool(optional(body, "stream", bool)),
        system=system,
        messages=tuple(merged),
        digests=tuple(map(digest_message, merged)),
        tools=tools,
        extra_body=without_nulls(passed),
        betas=tuple(dict.fromkeys(filter(_BETA.match, map(str.strip, betas.split(","))))),
        marked=marked,
        # for all: the API takes no 1h after a 5m, and the CLI marks before and after the client
        cache_ttl="1h" if "1h" in [ttl for _, ttl in marks] else "5m",
        media=_count_media(merged),
    )


def for_login(turn: Turn) -> Turn:
    """Return a turn for a CLI on a claude.ai login, whose breakpoints are 1h (seen, 2.1.330)."""
    return dataclasses.replace(turn, cache_ttl="1h", is_login=True)


def _parse_output_config(body: JsonObject) -> JsonObject | None:
    """Return `output_config`, with what older forms say of it; None where nothing is said."""
    output_config = {"format": body.get("output_format"), "effort": body.get("effort")}
    if output_config["effort"] not in (None, *EFFORTS):
        raise InvalidRequest(f"effort: Input should be {' or '.join(map(repr, EFFORTS))}")

    given = without_nulls(optional(body, "output_config", dict) or {})
    if "effort" in given and _LACKS_EFFORT.match(body["model"]):
        # The CLI leaves it out for these models, by a list of names of its own.
        raise InvalidRequest("This model does not support the effort parameter.")
    output_config.update(given)
    return without_nulls(output_config) or None


def _parse_thinking(body: JsonObject) -> JsonObject | None:
    """Return `thinking` as it goes upstream; None where the client said nothing of it."""
    thinking = optional(body, "thinking", dict)
    if thinking is None and _is_top_p_alone(body):
        # Said for the client, which changes nothing: models that take top_p do not think by
        # default. See `to_flag_settings`, which has to let the CLI believe that it thinks.
        thinking = {"type": "disabled"}
    return thinking


def _is_top_p_alone(fields: JsonObject) -> bool:
    """Return whether a request sets top_p and leaves temperature to the API."""
    return fields.get("top_p") is not None and fields.get("temperature") is None


def _parse_system(body: JsonObject) -> list[JsonObject]:
    """Return the system prompt's text blocks; none for a blank string.

    The attribution block of a Claude Code that is the client is left out: the CLI sends its own,
    and upstream drops a block that begins so whole, with the prompt that was joined to it.
    """
    if isinstance(body.get("system"), str):
        blocks = [] if is_blank(body["system"]) else as_blocks(body["system"])
    else:
        blocks = [block for _, block in objects(body, "system")]

    for number, block in enumerate(blocks):
        if is_blank(require(block, "text", str, f"system.{number}")):
            raise InvalidRequest("system: text content blocks must be non-empty")
    return [block for block in blocks if not block["text"].startswith(ATTRIBUTION_START)]


def _parse_messages(messages: Iterable[Placed]) -> Iterator[Said]:
    """Check messages and yield their blocks; a `system` line would end the CLI: user text."""
    for path, message in messages:
        if (role := message.get("role")) not in ("user", "assistant", "system"):
            raise InvalidRequest(f"{path}.role: Input should be 'user' or 'assistant'")
        given = {"content": as_blocks(message.get("content"))}
        content = require(given, "content", list, path)
        if not content and role == "system" and "output_config" in message:
            continue  # Claude Code's own note of the effort from here on; the request says it too
        if not content:
            raise InvalidRequest(f"{path}: all messages must have non-empty content")
        for place, block in objects(given, "content", path):
            check_block(place, block)
            if block["type"] == "text" and not _SAID.search(block["text"]):
                # Blank for JavaScript, as U+FEFF is. In a tool result it is handed on (seen).
                raise InvalidRequest(f"{place}: text content blocks must be non-empty")
            if role == "system":
                text = require(block, "text", str, place)
                block = {"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}
            yield role, place, block


def says_nothing(block: JsonObject) -> bool:
    """Return whether a block of an answer counts for nothing in the CLI (seen).

    It drops an answer that has no other blocks, and joins what stands before and after it.
    """
    if block["type"] == "text":
        is_short = len(block["text"]) < SLICE_CHARS
        return is_short and block["text"].strip(_BLANK_FOR_CLI) in _SAYS_NOTHING
    return block["type"] in ("thinking", "redacted_thinking")


def check_block(path: str, block: JsonObject) -> None:
    """Check one content block for what the CLI would not hand on as it is (cli-contract.md)."""
    kind = require(block, "type", str, path)
    inside = f"{path}.{kind}"  # as the API names what is in a block
    if kind == "text" and is_blank(require(block, "text", str, inside)):
        raise InvalidRequest(f"{path}: text content blocks must be non-empty")
    if kind == "image":
        check_image(f"{inside}.source", require(block, "source", dict, inside))
    for name in ("id", "name") if kind in ("tool_use", "server_tool_use") else ():
        require(block, name, str, inside)
    if kind == "tool_use":
        caller = optional(block, "caller", dict, inside) or {}
        check_callers(f"{inside}.caller", [caller.get("type", "direct")])
    if kind == "tool_result":
        require(block, "tool_use_id", str, inside)
        parts = {} if isinstance(block.get("content"), str) else block
        for place, part in objects(parts, "content", inside):
            check_block(place, part)
            if block.get("is_error") and part["type"] != "text":  # the CLI would drop it
                raise InvalidRequest(f"{place}: all content must be type `text` in an error")


def check_callers(path: str, callers: Any) -> None:
    """Refuse calls that only other tools make: the CLI drops who has called (seen)."""
    if isinstance(callers, list) and callers and "direct" not in callers:
        problem = "programmatic tool calling does not pass through the CLI; only `direct` calls do"
        raise InvalidRequest(f"{path}: {problem}")


def check_image(path: str, source: JsonObject) -> None:
    """Check an image's bytes: what is no image the CLI would turn into a text note."""
    if source.get("type") != "base64":
        return
    media_type, data = str(source.get("media_type")), require(source, "data", str, f"{path}.base64")
    end = len(data) - (2 if data.endswith("==") else 1 if data.endswith("=") else 0)
    is_base64 = len(data) % 4 == 0 and all(
        _BASE64.fullmatch(data, at, min(at + SLICE_CHARS, end)) for at in range(0, end, SLICE_CHARS)
    )
    if not is_base64 or not data.startswith(_IMAGE_STARTS.get(media_type, "no image")):
        raise InvalidRequest(f"{path}.base64.data: Could not process image as {media_type}")


def _merge(said: Iterable[Said], marks: list[Mark]) -> list[Message]:
    """Join the messages of one role, as the API does (the CLI would itself, but add a newline)."""
    merged: list[Message] = []
    seen: set[str] = set()
    asked: dict[str, str] = {}  # the calls of the message before, each with its path
    for is_answer, each in itertools.groupby(said, lambda one: one[0] == "assistant"):
        group = list(each)
        if any(role == "system" for role, _, _ in group):  # tool results must stay in front
            group.sort(key=lambda one: one[2]["type"] != "tool_result")
        if is_answer and all(says_nothing(block) for _, _, block in group):
            problem = "The final block in an assistant message cannot be `thinking`."
            if any(block["type"] == "text" for _, _, block in group):
                problem = (
                    "an answer of `(no content)` or `[Empty text removed]` alone cannot be sent"
                )
            raise InvalidRequest(f"{group[-1][1].rpartition('.content.')[0]}: {problem}")
        asked = _check_tool_pairs(group, asked, seen)
        content = [unmarked(block, marks) for _, _, block in group]
        merged.append(Message("assistant" if is_answer else "user", content))
    if not merged:
        raise InvalidRequest("messages: at least one message is required")
    return merged


def check_media(turn: Turn, model: str) -> None:
    """Refuse more images and documents than the CLI hands on; `model` is an id, not an alias."""
    is_long = _LONG_WINDOW_BETA in turn.betas or _HAS_LONG_WINDOW.match(model)
    most = MAX_MEDIA_IN_LONG_WINDOW if is_long else MAX_MEDIA
    if turn.media > most:
        problem = f"{turn.media} images and documents, where {model} takes {most} in a request"
        raise InvalidRequest(f"messages: too many of them: {problem}")


def _count_media(messages: Iterable[Message]) -> int:
    """Count images and documents, those in tool results too."""
    count = 0
    for message in messages:
        for block in message.content:
            parts = block.get("content") if block["type"] == "tool_result" else None
            inside = parts if isinstance(parts, list) else []
            count += sum(_object(each).get("type") in _MEDIA for each in (block, *inside))
    return count


def _check_tool_pairs(said: list[Said], due: dict[str, str], seen: set[str]) -> dict[str, str]:
    """Return a message's calls. Refuses a call or result alone: the CLI would silently mend it."""
    calls: dict[str, str] = {}
    results = {str(block.get("tool_use_id")) for _, _, block in said}  # of servers' tools, too
    for _, path, block in said:
        kind, call = block["type"], str(block.get("id"))
        if kind == "tool_result" and due.pop(block["tool_use_id"], None) is None:
            problem = "unexpected `tool_use_id` found in `tool_result` blocks"
            raise InvalidRequest(f"{path}: {problem}: {block['tool_use_id']}")
        if kind == "tool_use":
            if call in seen:
                raise InvalidRequest(f"{path}: `tool_use` ids must be unique")
            seen.add(call)
            calls[call] = path
        if kind == "server_tool_use" and call not in results:
            due[call] = path
    if due:
        problem = "`tool_use` ids were found without `tool_result` blocks immediately after"
        path = next(iter(due.values())).rpartition(".content.")[0]
        raise InvalidRequest(f"{path}: {problem}: {', '.join(due)}")
    return calls


def unmarked(block: JsonObject, marks: list[Mark]) -> JsonObject:
    """Return a block or tool without breakpoints; `marks` gets those, as on the outermost."""
    kept, found = dict(block), list[Mark]()
    if kept.get("type") == "tool_result" and isinstance(kept.get("content"), list):
        kept["content"] = [unmarked(_object(part), found) for part in kept["content"]]
    if _object(kept.get("cache_control")).get("type") == "ephemeral":
        found.append((kept, kept.pop("cache_control").get("ttl")))
    marks += [(kept, ttl) for _, ttl in found]
    return kept


def digest_message(message: Message) -> bytes:
    """Return what two messages have in common that tell the model the same, however written."""
    digest = hashlib.sha256()
    for piece in json_pieces([message.role, _canonical(message.content)], sort_keys=True):
        digest.update(piece.encode("ascii"))
    return digest.digest()


def _canonical(node: Any) -> Any:
    """Drop what makes no difference to the model; tool input is verbatim."""
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "tool_result":
        node = {**node, "content": as_blocks(node.get("content") or "")}
    return {  # strings are looked at first: a long history has many
        name: value if isinstance(value, str) or name == "input" else _canonical(value)
        for name, value in node.items()
        if value is not None and value is not False and name != "caller"  # the CLI drops that
    }


# ======================================================================== Lines
# What a turn is in the CLI's own protocol: settings, lines, tool results. Pure: no I/O, no state.

TOOL_SERVER: Final = "t"  # the MCP server under which a request's tools are registered
# The size in tokens from which on the CLI refuses to call upstream ("Prompt is too long").
CALL_LIMIT: Final = "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE"
_RESULT_KEYS: Final = frozenset(("type", "tool_use_id", "content", "is_error"))


def _marked(turn: Turn, items: Iterable[JsonObject]) -> list[JsonObject]:
    """Return blocks or tools, the one that is marked with its breakpoint."""
    mark = {"type": "ephemeral"} | ({"ttl": turn.cache_ttl} if turn.cache_ttl != "5m" else {})
    return [{**item, "cache_control": mark} if item is turn.marked else item for item in items]


def to_flag_settings(turn: Turn, model: str) -> JsonObject:
    """Return the settings of `apply_flag_settings` for a turn; every per-request one is given."""
    # `model` is no alias: with one a later change of the system prompt is refused;
    # the CLI goes on sending tools that were taken off its list, so every body says which
    body = {**turn.extra_body, "tools": _marked(turn, turn.tools)}
    # With thinking off the CLI sends `temperature: 1` to models that take one, and upstream
    # refuses that beside top_p. With thinking on it sends `thinking`, which the body overrides.
    is_thinking_off = _object(body.get("thinking")).get("type", "disabled") == "disabled"
    is_thinking_told_by_cli = not is_thinking_off or _is_top_p_alone(body)
    has_effort = "effort" in _object(body.get("output_config"))
    variables = {
        "CLAUDE_CODE_EXTRA_BODY": dump_json(body),
        "ANTHROPIC_BETAS": ",".join(turn.betas),
        "CLAUDE_CODE_PROMPT_CACHE_TTL": turn.cache_ttl,
        "CLAUDE_CODE_DISABLE_THINKING": "" if is_thinking_told_by_cli else "1",
        # "unset" keeps the CLI's own effort out of the body; empty leaves it to the CLI.
        "CLAUDE_CODE_EFFORT_LEVEL": "unset" if has_effort else "",
        # the body's max_tokens is in extra_body; this is for the CLI's own sums
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(turn.extra_body.get("max_tokens", "")),
        "MCP_TOOL_TIMEOUT": "100000000",  # ms; tool calls wait as long as they must
        CALL_LIMIT: "1000000000",  # what is too long is upstream's to say
    }
    return {"env": variables, "model": model}


LOG_LINE: Final = "cc2api_log"  # the type of a line that stands for a message of the CLI's log
_LOG_FORMAT: Final = re.compile(rb"\d{4}-\d\d-\d\dT[\d:.]+Z \[(?:DEBUG|ERROR)\] (.*)", re.DOTALL)


def read_log_line(raw: bytes) -> str | None:
    """Return the message of a line of the CLI's log; None for anything else on stderr."""
    found = _LOG_FORMAT.fullmatch(raw.rstrip())
    if found is None:
        return None
    text = found[1].decode("utf-8", "replace")
    if text.startswith('"'):  # what has several lines is written as one JSON string
        with contextlib.suppress(ValueError):
            text = str(json.loads(text))
    return text


def to_name(tool: JsonObject) -> str:
    """Return the name under which a tool is registered."""
    return str(tool.get("name") or tool.get("type"))


def to_line(turn: Turn, index: int, model: str, *, is_query: bool = False) -> JsonObject:
    """Return the stdin line of a turn's message; one that `is_query` starts the call."""
    role, content = turn.messages[index]
    message: JsonObject = {"role": role, "content": _marked(turn, content)}
    line: JsonObject = {"type": role, "message": message, "uuid": str(uuid.uuid4())}
    line |= {"parent_tool_use_id": None, "session_id": ""}
    if role == "user":
        # composed: verbatim, no @paths and no commands
        return {**line, "client_composed": True, "shouldQuery": is_query}
    message |= {"id": line["uuid"], "type": "message", "stop_reason": "end_turn"}
    message["model"] = model.removesuffix("[1m]")  # of another the CLI would drop thinking blocks
    message["usage"] = {"input_tokens": 0, "output_tokens": 0}  # others would be counted as real
    return line


def to_tool_results(query: Message, asked: Sequence[str]) -> list[JsonObject] | None:
    """Return a message's MCP results in the order of their calls; None: the CLI would change it."""
    # It orders results by their calls, strips and joins errors, words empty results, and writes
    # large ones to disk (all seen). Images and text beside the results go no better.
    if [block.get("tool_use_id") for block in query.content] != list(asked):
        return None
    results, size = [], 0
    for block in query.content:
        if not block.keys() <= _RESULT_KEYS:
            return None  # the channel has no place for what is newer than this file
        parts = as_blocks(block.get("content") or [])
        texts = [part.get("text") for part in parts]
        is_plain = bool(parts) and parts == [{"type": "text", "text": text} for text in texts]
        if not (is_plain and all(map(_SAID.search, texts))):
            return None
        is_error, first = bool(block.get("is_error")), texts[0]
        is_kept = len(texts) == 1 and len(first) <= MAX_TOOL_ERROR_CHARS and _SAID.fullmatch(first)
        if is_error and not is_kept:
            return None
        size += sum(map(len, texts))
        results.append({"content": parts, "isError": is_error})
    return results if size <= MAX_TOOL_RESULT_CHARS else None


def resolve_model(name: str, models: Iterable[JsonObject]) -> str:
    """Return the id that the CLI will use for a model name or alias, by its own list."""
    wanted = "default" if name == DEFAULT_MODEL_NAME else name
    found = (model.get("resolvedModel") for model in models if model.get("value") == wanted)
    return str(next(found, None) or name)


def to_model_list(models: Iterable[JsonObject]) -> list[JsonObject]:
    """Return the CLI's models as both SDKs parse them (messages-api.md section 6), newest first."""
    items: dict[str, JsonObject] = {}
    for model in models:
        model_id = resolve_model(str(model.get("value")), [model]).removesuffix("[1m]")
        item = {"type": "model", "object": "model", "id": model_id, "owned_by": "anthropic"}
        dates = {"created_at": "1970-01-01T00:00:00Z", "created": 0}  # unknown, by the API's docs
        items[model_id] = {**item, **dates, "display_name": model.get("displayName") or model_id}
    versions = {model_id: list(map(int, re.findall(r"\d+", model_id))) for model_id in items}
    return sorted(items.values(), key=lambda item: versions[item["id"]], reverse=True)


# get_context_usage takes 500 tokens off all tools together, and counts them beside a message of 8.
COUNTED_TOOLS_DEDUCTION: Final = 492
# Counted with the tools, so that their sum is never below the deduction, and by themselves.
PADDING_TOOLS: Final[list[JsonObject]] = [
    {"name": name, "description": "word " * 1000, "input_schema": {"type": "object"}}
    for name in ("cc2api_padding", "cc2api_padding2")
]


def to_counts(usage: JsonObject) -> tuple[int, int]:
    """Return the tokens of messages, and of tools less COUNTED_TOOLS_DEDUCTION."""
    # Where upstream does not count, the CLI silently guesses a token for four characters; of the
    # system prompt of `Service.count_tokens` every true count is twice that.
    counts = {c.get("name"): int(c.get("tokens") or 0) for c in usage.get("categories") or []}
    if counts.get("System prompt", 0) < 32:
        raise CliFailed("upstream did not count the tokens")
    return counts.get("Messages", 0), counts.get("MCP tools", 0)


# ======================================================================= Events
# The CLI's lines to Anthropic events, and events to one message. Pure: no I/O, no threads.

Event = JsonObject

# For failures that carry no status: the CLI's own word for them, on its `assistant` line.
_STATUS_BY_CLI_ERROR: Final = {
    **{"authentication_failed": 401, "billing_error": 402, "oauth_org_not_allowed": 403},
    **{"invalid_request": 400, "max_output_tokens": 400, "model_not_found": 404, "rate_limit": 429},
}
# How the messages of the CLI's log begin that PROCESS_FLAGS ask for (seen, 2.1.300 and 2.1.332).
_CALL_LEAVES: Final = "[API:timing] dispatching to "
_CALL_FAILED: Final = "API error (attempt "
MAX_FOREIGN_ERROR_CHARS: Final = 1000  # of a proxy's page of HTML
# What the CLI puts around upstream's message (seen, 2.1.330 and 2.1.248).
_DECORATION: Final = re.compile(
    r"(?s)\A(?:Failed to authenticate\. |Please run /login · )?API Error: "
    r"(?:(?:Request rejected|Server is temporarily limiting requests) \([^)]*\) · |\d{3} )?"
    r"|\. This is a server-side issue, usually temporary.*"
)


@contextlib.contextmanager
def upstream_protocol() -> Iterator[None]:
    """Take what an event lacks for a failure of upstream's, not of ours."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise CliFailed(f"upstream broke the protocol of its answers: {exc!r}") from exc


class AnswerReader:
    """Turn the lines of one answer into events, and tell when it is complete."""

    def __init__(self) -> None:
        self.is_called = False  # the CLI's call to upstream is on its way
        self.done = False
        self.has_left = False  # that call has left: its body and headers are made
        self.refusal: ApiError | None = None  # upstream's, as the CLI's log has it
        self.asks_again = False  # the CLI has gone on after a refusal
        self.has_failed = False  # the CLI has ended its turn without an answer
        self.content: list[JsonObject] = []  # the finished blocks, as the CLI remembers them
        self.rate_limits: dict[str, str] = {}  # the plan's state as headers, where it was told
        self._started = False  # message_start was seen
        self._stop_reason: str | None = None
        self._cli_error: str | None = None

    @property
    def can_go_on(self) -> bool:
        """Whether the CLI holds the conversation as the client was told it, and asks no more."""
        # After any other stop reason (max_tokens, refusal, model_context_window_exceeded), and
        # after an empty answer, it asks upstream again by itself (seen, 2.1.330).
        says = self.calls or any(str(block.get("text") or "").strip() for block in self.content)
        reasons = ("tool_use",) if self.calls else ("end_turn", "stop_sequence")
        return bool(says) and self._stop_reason in reasons

    @property
    def calls(self) -> dict[str, str]:
        """The ids of the answer's tool calls in order, each with the tool's name."""
        return {call["id"]: call["name"] for call in self.content if call["type"] == "tool_use"}

    def feed(self, line: JsonObject) -> list[Event]:
        """Return the events that a line brings. Raises the ApiError that a failure line means."""
        kind = line.get("type")
        if line.get("parent_tool_use_id") is not None or self.done:
            return []
        if kind == "stream_event":
            return self._feed_event(line["event"])
        if kind == LOG_LINE:
            self._note_log(line["text"])
            return []
        if kind == "result":
            self.has_failed = True
            error = read_error(line, self._cli_error)
            raise self.refusal if self.refusal and not error.is_for_operator else error
        if line.get("status") == "requesting":
            self.is_called = True
        elif kind == "rate_limit_event":
            self.rate_limits = to_rate_limit_headers(line.get("rate_limit_info"))
        elif kind == "assistant":
            self._cli_error = line.get("error") or self._cli_error
            self.content += map(dict, _object(line.get("message")).get("content") or ())
        return []

    def _note_log(self, text: str) -> None:
        """Take a message of the CLI's log: a call leaves, or has failed.

        Some refusals the CLI mends by itself, and calls again without what was refused (images,
        signatures of thinking, effort, a stream: seen on 2.1.300 and 2.1.332). Then a second call
        leaves, or fails, after the refusal.
        """
        is_call = text.startswith(_CALL_LEAVES)
        is_failure = text.startswith(_CALL_FAILED)
        if self.refusal and (is_call or is_failure):
            self.asks_again = True
        elif is_call:
            # The line that announces the call may still be unread: it comes by the other pipe.
            self.is_called = self.has_left = True
        elif is_failure:
            self.refusal = read_refusal(text)

    def _feed_event(self, event: Event) -> list[Event]:
        kind, reason = event["type"], _object(event.get("delta")).get("stop_reason")
        # After a failure come closing events of the CLI's own making, without a stop reason, and
        # then `result`; after a refusal the true message_delta.
        if (self._cli_error and not reason) or self._started == (kind == "message_start"):
            return []
        if kind == "message_start":
            self._started = self.is_called = self.has_left = True
        elif kind == "message_delta" and isinstance(reason, str):
            self._stop_reason, self.done = reason, True
            # it always follows; made here, the process can be stopped before it goes on
            return [event, {"type": "message_stop"}]
        elif kind == "message_stop":
            # without a stop reason: upstream's stream broke between two blocks, and the CLI is
            # about to ask for the rest by a second call (seen, 2.1.330)
            raise CliFailed("upstream's stream ended before its answer was complete")
        return [event]


def read_refusal(text: str) -> ApiError | None:
    """Return upstream's own error, by the CLI's log line of a call that failed.

    The line reads `API error (attempt 1/1): 400 400 {"type":"error","error":{...}}`: the status,
    and the SDK's message, which is the status and the body (seen, 2.1.300 and 2.1.332). None where
    there is no status: the call did not reach upstream, and the `result` line says why.
    """
    found = re.match(r"API error \([^)]*\): ([45]\d\d)(?: \1)? (.*)", text, re.DOTALL)
    if found is None:
        return None

    status, said = int(found[1]), found[2]
    body: object = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(said)
    error = _object(_object(body).get("error"))
    message = error.get("message")
    if not isinstance(message, str):  # of something between the CLI and upstream
        return ApiError(said[:MAX_FOREIGN_ERROR_CHARS], status)
    details = _object(error.get("details")) or None
    return ApiError(message, status, str(error.get("type") or ""), details)


def to_rate_limit_headers(info: Any) -> dict[str, str]:
    """Return a plan's state as the headers that Claude Code reads (messages-api.md 1.2)."""
    windows = _object(_object(info).get("unifiedWindows"))
    states = {"": info, "-5h": windows.get("five_hour"), "-7d": windows.get("seven_day")}
    headers = {}
    for name, state in states.items():
        for key, ending in (("status", "status"), ("resetsAt", "reset"), ("utilization",) * 2):
            value = str(_object(state).get(key, ""))
            if re.fullmatch(r"[a-z_]+|[0-9.]+", value) and (name or key != "utilization"):
                headers[f"anthropic-ratelimit-unified{name}-{ending}"] = value
    return headers


def read_error(result: JsonObject, cli_error: str | None = None) -> ApiError:
    """Return upstream's error by a `result` line, else one by the CLI's word for it, else 502."""
    text = str(result.get("result") or f"claude gave no answer: {result.get('errors')}")
    kind, status = str(result.get("api_error_type")), result.get("api_error_status")
    if not result.get("is_error"):  # the text is then the model's
        return CliFailed("claude ended its turn without an answer")
    if text.startswith(("Not logged in", "Invalid API key")):
        problem = "claude is not signed in on the gateway's machine, or its sign-in was refused"
        hint = f"{problem}: run `claude auth login` there"
        return ApiError(hint, status=401, is_for_operator=True)
    if result.get("terminal_reason") == "blocking_limit":  # by HOLD_CALLS, too early
        return CliFailed("claude held its call back; nothing was sent upstream", status=503)
    if text.startswith("Prompt is too long"):
        return InvalidRequest("prompt is too long for the model's context window")
    if model := re.match(r"(?s)There's an issue with the selected model \((.*?)\)", text):
        return ApiError(f"model: {model.group(1)}", status=404)
    if not isinstance(status, int) or not 400 <= status <= 599:
        status = STATUS_BY_TYPE.get(kind) or _STATUS_BY_CLI_ERROR.get(str(cli_error), 502)
    return ApiError(_DECORATION.sub("", text), status, kind if kind in STATUS_BY_TYPE else "")


class AnswerWriter:
    """Writes one answer as a stream or whole: here as the Messages API does, which is the base."""

    end = b""  # of a stream
    ping: Sequence[JsonObject] = ({"type": "ping"},)
    fails_in_stream = False  # with a status of 200, also where nothing was written yet

    def __init__(self, calls: Mapping[str, JsonObject] | None = None) -> None:
        """`calls`: what the call of a tool says it is, by the tool's name upstream."""
        self.calls = calls or {}
        self.message: JsonObject = {}  # as far as it has come
        self.pieces: list[str] = []  # what the deltas of the latest block say; it gets them whole

    def whole(self) -> JsonObject:
        """Return the answer once all events have been fed."""
        return self.message

    def live(self) -> Sequence[JsonObject]:
        """Return events that show life in a stream that is silent; for none a comment does."""
        return self.ping if self.message else []  # so early it confuses some clients

    def fail(self, error: ApiError, body: JsonObject) -> list[JsonObject]:
        """Return what ends a stream that fails; `body` tells the error whole."""
        return [body]

    def feed(self, event: Event) -> list[JsonObject]:
        """Take the next event that an AnswerReader gave out; return what a stream says of it."""
        kind, delta = event["type"], _object(event.get("delta"))
        content = self.message.get("content", [])
        if kind == "message_start":
            usage = dict(event["message"].get("usage") or {})
            self.message = {**event["message"], "content": [], "usage": usage}
        elif kind == "content_block_start":
            content.append(dict(event["content_block"]))
            self.pieces = []
        elif kind == "content_block_delta":
            self.pieces += [delta[of] for of in ("text", "thinking", "partial_json") if of in delta]
            content[-1] |= {of: delta[of] for of in ("signature", "content") if of in delta}
            if "citation" in delta:
                citations = content[-1].get("citations") or []
                content[-1]["citations"] = [*citations, delta["citation"]]
        elif kind == "content_block_stop" and (said := "".join(self.pieces)):
            if (block := content[-1]["type"]) in ("text", "thinking"):
                content[-1][block] += said
            else:
                content[-1]["input"] = {}  # also where it was cut short
                with contextlib.suppress(ValueError, RecursionError):
                    given = json.loads(said)
                    json.dumps([[[[[[given]]]]]], allow_nan=False)  # as deep as in an answer
                    content[-1]["input"] = given
        elif kind == "message_delta":
            extra = {"context_management": event.get("context_management")}
            self.message |= {**delta, **without_nulls(extra)}
            self.message["usage"] |= without_nulls(event.get("usage") or {})
        return [event]


# ====================================================================== The CLI
# Where the CLI is, its version and sign-in; the flags and environment that its processes run with.

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
    # Cache breakpoints as they are told with each request.
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
# On the command line, since they win there over the user's own settings files, which
# --setting-sources may load, and those over the environment.
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
    "--allowedTools", "mcp__t", "--permission-mode", "dontAsk",  # of the TOOL_SERVER
    # Its log to stderr, of these categories only: that a call leaves, and the failure of one.
    "--debug-to-stderr", "--debug=api:timing,api error (attempt 1/1)",
)  # fmt: skip
# Of the variables that start with CLAUDE those alone are handed down that say who signs in, by
# which provider, and how it is reached. The rest are the CLI's own switches, some of which no
# settings win over (STREAM_EVENT_HOLD_MS, REMOTE, ENTRYPOINT: seen, 2.1.300 and 2.1.332).
_HANDED_DOWN: Final = re.compile(
    r"CLAUDE_CONFIG_DIR|CLAUDE_SECURESTORAGE_CONFIG_DIR"
    r"|CLAUDE_CODE_OAUTH_\w+|CLAUDE_CODE_API_KEY_HELPER_TTL_MS|CLAUDE_CODE_ORGANIZATION_UUID"
    r"|CLAUDE_CODE_USE_(BEDROCK|VERTEX|FOUNDRY|MANTLE|GATEWAY|ANTHROPIC_\w+)"
    r"|CLAUDE_CODE_SKIP_\w+_AUTH"
    r"|CLAUDE_CODE_CLIENT_(CERT|KEY|KEY_PASSPHRASE)|CLAUDE_CODE_CERT_STORE"
    r"|CLAUDE_CODE_(HTTPS?_PROXY|PROXY_\w+|ENABLE_PROXY_AUTH_HELPER)"
)
# The same for what is told with each request.
_PER_REQUEST: Final = ("ANTHROPIC_BETAS",)


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
    places = ["claude", "~/.local/bin/claude", "~/.claude/local/claude"]
    sdk = importlib.util.find_spec("claude_agent_sdk")
    places += [f"{root}/_bundled/claude" for root in (sdk and sdk.submodule_search_locations) or ()]
    tried = [os.path.expanduser(place) for place in ([choice] if choice else places)]
    found = next(filter(None, map(shutil.which, tried)), None)
    if found is None:
        where = choice or f"claude on PATH, nor at {', '.join(tried[1:])}"
        raise CliUnusable(f"found no executable {where}. {INSTALL_HINT}")
    path = os.path.abspath(found)
    output = _cli_output(path, ["--version"], environ)
    version = re.search(r"(\d+)\.(\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < MIN_CLI_VERSION:
        needed = ".".join(map(str, MIN_CLI_VERSION)) + f" or newer is needed. {INSTALL_HINT}"
        raise CliUnusable(f"{path} --version printed {output.strip()[:200]!r}; {needed}")
    return Cli(path, version.group())


def _cli_output(path: str, args: list[str], environ: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            [path, *args], env=environ, input=b"", capture_output=True, timeout=CONTROL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CliUnusable(f"{path} does not run: {exc}. {INSTALL_HINT}") from exc
    return (done.stdout or done.stderr).decode("utf-8", "replace")


IN_DEMO: Final = "DEMO: a script answers, no account is used"
UNKNOWN: Final = "unknown (`claude auth status` does not say)"
NOT_SIGNED_IN: Final = "NOT SIGNED IN: "  # begins what tells that requests will fail
# By `authMethod` of `claude auth status` (seen, 2.1.300 and 2.1.331).
_PAYERS: Final = {
    "claude.ai": "claude.ai login ({subscriptionType}): draws on the plan's limits",
    "api_key": "API key from {apiKeySource}: billed to the API",
    "api_key_helper": "API key from apiKeyHelper: billed to the API",
    "ANTHROPIC_AUTH_TOKEN": "token from ANTHROPIC_AUTH_TOKEN: billed by whoever issued it",
    "oauth_token": "token of `claude setup-token`: draws on the plan's limits",
    "third_party": "{apiProvider}: billed by the cloud provider",
}


def ask_sign_in(cli: Cli, environ: Mapping[str, str], *, bare: bool) -> str:
    """Say which credential the CLI will use, and who pays. Raises CliUnusable."""

    def ask(environ: Mapping[str, str]) -> JsonObject:
        status: object = None
        with contextlib.suppress(ValueError):
            status = json.loads(_cli_output(cli.path, ["auth", "status"], environ))
        return collections.defaultdict(str, _object(status))

    others = {"ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"} & set(environ)
    status = ask(environ)
    method = str(status["authMethod"])
    if status["loggedIn"] is False:
        return f"{NOT_SIGNED_IN}run `{cli.path} auth login`, or try `cc2api --demo` without one"
    if method == "claude.ai" and bare:
        return f"{NOT_SIGNED_IN}with --bare claude reads no claude.ai login"
    if method == "oauth_token" and "ANTHROPIC_AUTH_TOKEN" in others:
        method = "ANTHROPIC_AUTH_TOKEN"
    text = _PAYERS.get(method, UNKNOWN).format_map(status)
    without = {name: value for name, value in environ.items() if name not in others}
    wins = others and method in _PAYERS and method != "claude.ai"
    if wins and ask(without)["authMethod"] == "claude.ai":
        text += "; WINS OVER the claude.ai login that is there too"
    return text


def upstream_url(environ: Mapping[str, str]) -> str:
    """Return the API's address where the CLI is told of one, without a password."""
    return re.sub("//[^/]*@", "//", environ.get("ANTHROPIC_BASE_URL", ""))


def wants_bare(choice: bool | None, environ: Mapping[str, str]) -> bool:
    """Decide on `--bare`: as chosen, else where an API key or a cloud provider is configured."""
    # the CLI then adds nothing of its own to the messages, and never reads a claude.ai login
    names = ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"]
    names += [f"CLAUDE_CODE_USE_{provider}" for provider in ("BEDROCK", "VERTEX", "FOUNDRY")]
    values = {environ.get(name, "").lower() for name in names}
    return bool(values - {"", "0", "false", "no", "off"}) if choice is None else choice


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


def process_start(
    cli: Cli, settings: Settings, environ: Mapping[str, str], temp_dir: str
) -> tuple[list[str], dict[str, str]]:
    """Return a process's arguments, with nothing of a request, and its predictable environment."""
    command = [cli.path, *PROCESS_FLAGS, "--setting-sources", settings.setting_sources]
    command += ["--bare"] if wants_bare(settings.bare, environ) else []
    shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    kept = {
        name: value
        for name, value in environ.items()
        if name not in _PER_REQUEST
        and (not name.startswith("CLAUDE") or _HANDED_DOWN.fullmatch(name))
    }
    kept.update(PINNED_VARIABLES)
    kept["SHELL"] = "/bin/sh"  # with a login the model is told of it
    kept["TMPDIR"] = temp_dir  # the CLI leaves sockets and probe files: they go where we clean up
    # It keeps notes on its tool servers, with the names of a request's tools and the text of failed
    # results, a file for each process: but not where no directory can be made (seen).
    kept["XDG_CACHE_HOME"] = os.devnull
    return [*(shim if sys.platform == "linux" else ()), *command], kept


class Workplace:
    """The directories of a gateway's processes: the one they run in, and one for their files.

    With a login the model is told the name of the first: so that name tells nothing, and is the
    same after a restart, or every conversation would miss the API's prompt cache. All gateways of
    one user share it. The second is this gateway's own, and goes with it: while it is in use it is
    locked, so that the next gateway can tell what a killed one has left.
    """

    def __init__(self, parent: Path, config_dir: Path) -> None:
        """`parent`: where temporary files go; `config_dir`: where the CLI has its own files."""
        self._registry = config_dir / "sessions"
        self._root = parent / f"cc-{os.getuid()}"
        self.work_dir = self._root / "work"
        self.temp_dir = self._root / f"tmp-{uuid.uuid4().hex[:8]}"
        self._lock = -1  # a descriptor of temp_dir, once it is locked

    def prepare(self) -> None:
        """Make what is missing: a cleaner may have removed it. Raises OSError."""
        for path in (self._root, self.work_dir):
            _make_private(path)
        # Of its own the CLI runs git at every apply_flag_settings, to see whether the directory's
        # settings are tracked there; with this file it takes them to be (seen: 7 ms, then 4.5).
        config_dir = self.work_dir / ".claude"
        config_dir.mkdir(exist_ok=True)
        (config_dir / ".git").touch()

        if not self._holds_temp_dir():
            self._take_temp_dir()
        _make_private(self.temp_dir)  # a CLI may have made it again, readable by others
        self.forget_killed()

    def clean_up(self) -> None:
        """Remove what is this gateway's own, once its processes have ended."""
        shutil.rmtree(self.temp_dir, ignore_errors=True)
        self._unlock()
        self.forget_killed()

    def forget_killed(self) -> None:
        """Remove the entries that killed processes have left in the CLI's list of its sessions.

        The CLI removes its entry, and a key beside it, when it ends by itself (seen, 2.1.300 and
        2.1.332). Only what ran in `work_dir` is looked at. Does not raise.
        """
        for entry in self._registry.glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError):
                ran_in = _object(json.loads(entry.read_bytes())).get("cwd")
                if ran_in == str(self.work_dir) and not _is_running(int(entry.stem)):
                    for path in (entry, *self._registry.glob(f"{entry.stem}.*.key")):
                        path.unlink(missing_ok=True)
        for path in (self.temp_dir / "cc-socks").glob("[0-9]*.sock"):
            with contextlib.suppress(OSError, ValueError):
                if not _is_running(int(path.stem)):
                    path.unlink(missing_ok=True)

    def _holds_temp_dir(self) -> bool:
        """Return whether the directory is there, and the one that was locked."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._lock), self.temp_dir.lstat())
        return False

    def _take_temp_dir(self) -> None:
        """Make this gateway's directory and lock it; remove those that nobody has locked."""
        self._unlock()
        root = os.open(self._root, os.O_RDONLY)
        try:
            # Or another gateway that starts now could find this one before it is locked.
            fcntl.flock(root, fcntl.LOCK_EX)
            for path in self._root.glob("tmp-*"):
                _remove_unlocked(path)
            _make_private(self.temp_dir)
            self._lock = os.open(self.temp_dir, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(root)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _process_state(pid: int) -> str:
    """Return a process's state as proc(5) has it, one letter. Raises OSError where nobody tells."""
    return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0]


def _is_running(pid: int) -> bool:
    """Return whether there is a process with this number that has not ended, ours or another's."""
    with contextlib.suppress(OSError):  # Linux: nobody may have asked yet how it ended
        return _process_state(pid) != "Z"
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
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path} must be a directory that is yours alone: remove it, or set TMPDIR")
    if stat.S_IMODE(found.st_mode) != 0o700:  # a CLI has made it again, readable by others
        path.chmod(0o700)


# ====================================================================== Process
# One running `claude`: pipes, whole lines, its end; and its control protocol. Used by one thread at
# a time (the pool hands it over); that thread moves all of its pipes while it waits for a line, so
# neither side can block the other and no pipe needs a thread of its own.


class ProcessDied(Exception):
    """The process ended, closed its output, fell silent, or failed us; the message says how."""


class CliRefused(ProcessDied):
    """The CLI does not do what a used process needs, or does not answer: take a fresh one."""


class Patience:
    """How long to wait until `late` is raised; meanwhile `tick` is called, which may raise too."""

    def __init__(self, seconds: float, tick: Callable[[], None], late: Exception) -> None:
        self._tick, self._late, self._deadline = tick, late, time.monotonic() + seconds

    def slice_s(self) -> float:
        """Return how long to wait now before calling again."""
        self._tick()
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._late
        return min(left, TICK_S)

    def at_most(self, seconds: float, late: Exception) -> Patience:
        """Return a patience that ends earlier, with another exception."""
        other = Patience(seconds, self._tick, late)
        return other if other._deadline < self._deadline else self


class Process:
    """One running CLI. Its owner ends it: by `kill` or `finish`, and `close` once it has ended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: str) -> None:
        """Start it. Raises OSError."""
        self.started_at = time.monotonic()
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # a session of its own: a Ctrl-C at the terminal is the gateway's, not the process's
        self._popen = subprocess.Popen(
            command, env=environment, cwd=cwd, bufsize=0, start_new_session=True, **pipes
        )
        self.pid = self._popen.pid
        # raw and not blocking: they read and write None where nothing can be moved now
        self._pipes: list[Any] = [self._popen.stdin, self._popen.stdout, self._popen.stderr]
        self._stdin, self._stdout, self._stderr = self._pipes
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self._sources = [self._stdout, self._stderr]  # that are not at their end
        self._queue = collections.deque[Iterator[str]]()  # lines to be written, in pieces
        self._outbox = bytearray()  # the next pieces, as bytes
        self._partial = bytearray()  # the start of a line not yet whole
        self._partial_log = b""  # the same of stderr
        self.lines: collections.deque[JsonObject] = collections.deque()  # read and not yet taken
        self._last_words = b""

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def is_stopped(self) -> bool:
        """Return whether it was stopped by a signal or a debugger, as far as that can be seen."""
        with contextlib.suppress(OSError):  # Linux alone tells
            return _process_state(self.pid) in "Tt"
        return False

    def send(self, line: JsonObject) -> None:
        """Queue a line, and write what goes without waiting; the rest goes while it waits."""
        self._queue.append(itertools.chain(json_pieces(line), ["\n"]))
        self._write_some()

    def wait(self, patience: Patience) -> None:
        """Wait until there are lines. Raises ProcessDied, CliFailed, what the patience raises."""
        while not self.lines:
            poll = select.poll()
            for pipe in self._sources:
                poll.register(pipe, select.POLLIN)
            if self._outbox or self._queue:
                poll.register(self._stdin, select.POLLOUT)
            poll.poll(patience.slice_s() * 1000)
            self._write_some()
            self._read_output()

    def has_lines(self) -> bool:
        """Say whether there is a line, after one look. Raises ProcessDied, CliFailed."""
        if not self.lines:
            self._read_output()
        return bool(self.lines)

    def kill(self) -> None:
        """End it at once, and what it has started; `close` comes after."""
        if self.is_alive():  # so that the group is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Close its stdin: the CLI ends by itself after what it is doing. Nothing is sent then."""
        self._stdin.close()

    def close(self) -> None:
        """Close the pipes of an ended process; it must not be used any more."""
        for pipe in self._pipes:
            pipe.close()

    def _write_some(self) -> None:
        """Write what goes without waiting."""
        try:
            while self._has_output():
                written = self._stdin.write(self._outbox[:READ_BYTES])
                if not written:
                    return
                del self._outbox[:written]
        except (OSError, ValueError):  # it has closed its stdin, or `finish` has
            self._outbox.clear()  # what it still prints tells why
            self._queue.clear()

    def _has_output(self) -> bool:
        """Encode the next pieces, as many as a write may take; say whether there are any."""
        while self._queue and len(self._outbox) < READ_BYTES:
            piece = next(self._queue[0], None)
            if piece is None:
                self._queue.popleft()
            else:
                self._outbox += piece.encode("ascii")
        return bool(self._outbox)

    def _read_output(self) -> None:
        """Take what both pipes hold, so that no log line comes behind what was said after it."""
        chunk: bytes | None = self._stdout.read(READ_BYTES)
        self._read_stderr()
        if chunk == b"":
            raise ProcessDied(self._explain_death())
        first, *rest = (chunk or b"").split(b"\n")
        self._partial += first
        if len(self._partial) > MAX_LINE_BYTES:
            raise CliFailed(f"claude printed a line of over {MAX_LINE_BYTES} bytes")
        for following in rest:
            with contextlib.suppress(ValueError, RecursionError):  # what is not JSON is skipped
                if isinstance(line := load_json(self._partial), dict):
                    self.lines.append(line)
            self._partial = bytearray(following)

    def _read_stderr(self) -> None:
        chunk: bytes | None = self._stderr.read(READ_BYTES)
        if chunk == b"":
            self._sources = [self._stdout]
        *whole, partial = (self._partial_log + (chunk or b"")).split(b"\n")
        for raw in whole:
            if (text := read_log_line(raw)) is not None:
                self.lines.append({"type": LOG_LINE, "text": text})
            else:
                self._last_words = (self._last_words + raw + b"\n")[-STDERR_TAIL_BYTES:]
        self._partial_log = partial[-MAX_LOG_LINE_BYTES:]

    def _explain_death(self) -> str:
        """Describe how it ended; waits a moment for its exit status."""
        how = "claude closed its output"
        with contextlib.suppress(subprocess.TimeoutExpired):
            how = f"claude ended with status {self._popen.wait(EXIT_STATUS_S)}"
        self._read_stderr()  # what it said last may still be in the pipe
        # on one line, and nothing in it that could pass for a line of its own
        last_words = self._last_words + self._partial_log[-STDERR_TAIL_BYTES:]
        words = " ".join(last_words.decode("ascii", "replace").split())
        return f"{how}: {words}" if words else how


SERVER_INFO: Final[JsonObject] = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {"listChanged": True}},
    "serverInfo": {"name": TOOL_SERVER, "version": __version__},
}
# Requests that a used process depends on, and that a later CLI may not know.
_CHANGES: Final = ("rewind_conversation", "set_model", "mcp_message")
# Settings for when a call has left, so that the process makes no other one, whatever comes back.
# The limit of size, now 1 token, ends a turn that would go on after its answer ("Prompt is too
# long"). What calls again below that, after a refusal, gets a header that no HTTP client sends: it
# fails inside the CLI. From the acknowledgement on that is certain; before, only a kill helps.
HOLD_CALLS: Final[JsonObject] = {
    "env": {CALL_LIMIT: "1", "CLAUDE_CODE_EXTRA_BODY": json.dumps({"betas": ["held\nback"]})}
}


class Channel:
    """The control protocol of one process: requests, and the MCP server where its calls wait."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.results_due = 0  # `result` lines that the CLI has still to print, one a user line
        self.tools: Sequence[JsonObject] = ()  # as last offered
        self.known_tools: dict[str, JsonObject] = {}  # as the CLI was first told of each name
        self.calls: dict[str, JsonObject] = {}  # tools/call lines that wait, by tool_use id
        self.settings: JsonObject = {}  # as last sent
        self.applying = ""  # id of the last `apply`, until it is acknowledged
        self.cost_usd = 0.0  # of all turns whose `result` was read
        self._tools: list[JsonObject] = []
        self._is_listed = False  # the CLI has asked for the tools since they were last set

    def next(self, patience: Patience | None = None) -> JsonObject:
        """Take the next line, and note what the protocol needs. No patience: it must be there."""
        if patience:
            self.process.wait(patience)
        line = self.process.lines.popleft()
        message = _object(_object(line.get("request")).get("message"))
        method, response = str(message.get("method")), _object(line.get("response"))
        if method == "tools/call":
            meta = _object(_object(message.get("params")).get("_meta"))
            self.calls[str(meta.get("claudecode/toolUseId"))] = line
        elif "id" in message:
            self._is_listed = self._is_listed or method == "tools/list"
            replies = {"initialize": SERVER_INFO, "tools/list": {"tools": self._tools}}
            self._reply(line, replies.get(method, {}))
        elif response.get("request_id") == self.applying and response.get("subtype") == "success":
            self.applying = ""
        elif line.get("type") == "result":
            self.results_due -= 1
            cost = line.get("total_cost_usd")
            # Not a number that no sum survives: infinity, or an integer beyond all floats.
            if isinstance(cost, (int, float)) and 0 <= cost < MAX_COST_USD:
                self.cost_usd = float(cost)
        return line

    def send(self, line: JsonObject) -> None:
        """Send a message's line; each of the user's ends in a `result`."""
        self.results_due += line["type"] == "user"
        self.process.send(line)

    def request(self, subtype: str, patience: Patience, **fields: Any) -> JsonObject:
        """Return a request's response. Raises ProcessDied, or CliRefused for one of _CHANGES."""
        kind, seconds = ProcessDied, CONTROL_TIMEOUT_S
        if subtype in _CHANGES:
            kind, seconds = CliRefused, CHANGE_TIMEOUT_S
        request_id = self._ask(subtype, **fields)
        late = kind(f"claude did not answer {subtype} within {seconds:.0f} s")
        short, response = patience.at_most(seconds, late), JsonObject()
        while response.get("request_id") != request_id:
            response = _object(self.next(short).get("response"))
        if response.get("subtype") != "success":
            raise kind(f"claude refused {subtype}: {response.get('error')}")
        return _object(response.get("response"))

    def apply(self, settings: JsonObject) -> None:
        """Change settings. Does not wait: what comes next does."""
        self.applying = self._ask("apply_flag_settings", settings=settings)

    @property
    def is_held(self) -> bool:
        """Whether the CLI has acknowledged HOLD_CALLS: it makes no call any more."""
        return self.settings is HOLD_CALLS and not self.applying

    def interrupt(self) -> bool:
        """End the turn whose answer nobody wants any more; say whether nothing is left of it."""
        patience = Patience(LEAVE_S, lambda: None, ProcessDied("claude did not stop its answer"))
        reply = self.request("interrupt", patience)
        self.come_to_rest(patience)
        return not reply.get("still_queued")

    def come_to_rest(self, patience: Patience) -> None:
        """Wait for all that is due. Raises ProcessDied where it does not come."""
        short = patience.at_most(CONTROL_TIMEOUT_S, ProcessDied("claude did not end its turn"))
        while self.results_due or self.applying:
            self.next(short)

    def cut(self, fields: JsonObject, patience: Patience) -> None:
        """Take back what follows a place; nothing of it is ever sent upstream again."""
        reply = self.request("rewind_conversation", patience, **fields)
        if reply.get("rewound") is not True:
            raise CliRefused(f"claude did not cut its conversation: {reply}")
        self.come_to_rest(patience)
        self.calls.clear()

    def settle(self, due: set[str], patience: Patience) -> None:
        """Wait until its turn has ended, or made the calls due; raise ProcessDied if it goes on."""
        short = patience.at_most(CHANGE_TIMEOUT_S, ProcessDied("claude did not settle"))
        while True:
            is_there = self.calls.keys() >= due if due else self.results_due == 0
            if is_there and not (self.applying or self.process.has_lines()):
                return
            line = self.next(short)
            kind, has_failed = line.get("type"), line.get("is_error")
            if (kind == "result" and (due or has_failed)) or (kind == "user" and due):
                raise ProcessDied("claude did not keep its conversation")

    def _ask(self, subtype: str, **fields: Any) -> str:
        request_id = f"{subtype} {uuid.uuid4()}"
        self.settings = fields.get("settings", self.settings)
        request = {"subtype": subtype, **fields}
        self.process.send({"type": "control_request", "request_id": request_id, "request": request})
        return request_id

    def offer(self, tools: Sequence[JsonObject]) -> JsonObject:
        """Set the tools; return the fields of `initialize` that tell of them."""
        # for calls to wait under their names: CLAUDE_CODE_EXTRA_BODY tells upstream of the tools
        self.tools, self._is_listed = tools, False
        self.known_tools = {to_name(tool): tool for tool in tools} | self.known_tools
        self._tools = [
            {
                "name": to_name(tool),
                "description": tool.get("description") or json.dumps(tool),  # without a schema
                "inputSchema": tool.get("input_schema") or {"type": "object", "properties": {}},
                "annotations": {"readOnlyHint": True},  # else calls wait for each other
                "_meta": {"anthropic/maxResultSizeChars": 2 * MAX_TOOL_RESULT_CHARS},
            }
            for tool in tools
        ]
        told = {"initializeResult": SERVER_INFO, "toolsListResult": {"tools": self._tools}}
        return {"sdkMcpServers": [TOOL_SERVER], "sdkMcpServerManifests": {TOOL_SERVER: told}}

    def change_tools(self, tools: Sequence[JsonObject], patience: Patience) -> None:
        """Offer other tools, and wait until the CLI has asked for them. Raises CliRefused."""
        self.offer(tools)
        message = {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}
        self.request("mcp_message", patience, server_name=TOOL_SERVER, message=message)
        short = patience.at_most(CHANGE_TIMEOUT_S, CliRefused("claude did not ask for its tools"))
        while not self._is_listed:
            self.next(short)

    def answer_calls(self, results: Mapping[str, JsonObject], patience: Patience) -> None:
        """Give the calls that wait their results, by tool_use id."""
        short = patience.at_most(CONTROL_TIMEOUT_S, ProcessDied("claude took no tool result"))
        *_, last = results
        for tool_use_id, result in results.items():
            self._reply(self.calls.pop(tool_use_id), result)
            # one by one: the CLI puts results in the order in which it has dealt with them
            while tool_use_id != last:
                line = self.next(short)
                if line.get("type") == "user" and tool_use_id in json.dumps(line.get("message")):
                    break

    def _reply(self, line: JsonObject, result: JsonObject) -> None:
        reply = {"jsonrpc": "2.0", "id": line["request"]["message"]["id"], "result": result}
        more = {"request_id": line.get("request_id"), "response": {"mcp_response": reply}}
        self.process.send({"type": "control_response", "response": {"subtype": "success", **more}})


# ================================================================= Conversation
# What a process holds, and how a request is brought to it: cut back to the common prefix, tell what
# differs (settings, system prompt, tools), append the rest, then ask or count. To go on is to cut
# nothing, to edit or branch to cut to the middle, to begin anew to cut to the beginning.


class Told(NamedTuple):
    """What a process was told for a turn, as far as the next turn is compared with it.

    Not the turn itself: its messages may take 32 MB, and what counts of them is in Conversation.
    """

    model: str
    system: str
    cache_ttl: str

    @classmethod
    def of(cls, turn: Turn) -> Told:
        return cls(turn.model, turn.system, turn.cache_ttl)


class Held(NamedTuple):
    """One message inside a process."""

    digest: bytes
    uuid: str | None = None  # of the user line that brought it; answers and answered calls: none
    is_place: bool = False  # can be cut at: a user message without tool results


class Conversation:
    """The messages that a process holds. What is done to the process is a Session's."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.is_loose = False  # the last message got no answer that counts: cut before use
        self.calls_due: list[str] = []  # ids of the tool calls that the last answer makes

    def kept(self, turn: Turn, told: Told | None) -> int:
        """Return how many messages can stay for a turn that comes after what was told last."""
        if told != Told.of(turn):
            return 0  # with another model or system prompt no conversation goes on
        whole = len(self.held) - self.is_loose
        pairs = zip(self.held[:whole], turn.digests[:-1], strict=False)
        same = [held.digest == digest for held, digest in pairs]
        common = [*same, False].index(False)
        given = turn.messages[common:]  # maybe to the calls that wait
        is_answer = len(given) == 1 and to_tool_results(given[0], self.calls_due)
        if common == len(self.held) and (is_answer or not self.calls_due):
            return common
        places = [at for at, held in enumerate(self.held[: common + 1]) if held.is_place]
        return max(places, default=0)

    def cut(self, kept: int) -> JsonObject:
        """Hold no more than the first messages; return the fields of the request that does it."""
        place, last = self.held[kept].uuid, [held.uuid for held in self.held if held.uuid][-1]
        del self.held[kept:]
        self.is_loose, self.calls_due = False, []
        fields = {"target_message_uuid": place, "last_seen_user_message_uuid": last}
        return {**fields, "interrupt_if_running": True}  # ends a turn whose tool calls wait

    def add(self, turn: Turn, index: int, line: JsonObject | None) -> None:
        """Hold a turn's message, sent by this line, or None where through the tool channel."""
        brought_by = line["uuid"] if line and line["type"] == "user" else None
        has_results = any(b["type"] == "tool_result" for b in turn.messages[index].content)
        is_place = bool(brought_by) and not has_results
        self.held.append(Held(turn.digests[index], brought_by, is_place))
        self.is_loose, self.calls_due = line is None or line.get("shouldQuery", False), []

    def add_answer(self, reader: AnswerReader) -> None:
        self.held.append(Held(digest_message(Message("assistant", reader.content))))
        self.is_loose, self.calls_due = False, list(reader.calls)


# Two turns of no meaning, with other system prompts and tools: what any two requests may differ in.
_QUESTION: Final = {"role": "user", "content": "rehearsal"}
_REHEARSAL: Final = {"model": DEFAULT_MODEL_NAME, "max_tokens": 1024, "messages": [_QUESTION]}
_OTHER: Final = {"system": "rehearsal", "tools": [{"name": "rehearsal", "input_schema": {}}]}
REHEARSALS: Final = [parse_messages_request(_REHEARSAL | more) for more in ({}, _OTHER)]

Base = tuple[Caller, tuple[str, ...]]  # the betas; no process ever serves another


@dataclass(eq=False)
class Demand:
    """A request's wish for a session: what for, and what has failed so far."""

    turn: Turn
    base: Base
    patience: Patience
    is_count: bool = False  # of its tokens, under a system prompt that no session holds
    deaths: int = 0  # of processes that it was lent; from the first on it wants new ones
    arrived_at: float = field(default_factory=time.monotonic)  # its place among those who wait

    def note_death(self, death: ProcessDied) -> None:
        """Be ready to ask for a new process. Raises CliFailed where that makes no sense."""
        log.warning("%s; nothing was sent upstream, a new process is asked", death)
        self.deaths += 1
        if self.deaths == SETUP_ATTEMPTS:
            raise CliFailed(str(death), status=503) from death


class Session:
    """A process and the conversation in it. One owner at a time; nobody else writes its fields.

    A request goes `bring`, `ask` and `read`, or `count`, then `rest`. All raise ProcessDied and
    CliFailed, and what their patience raises.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.base: Base | None = None  # None: blank, it has served nobody
        self.is_new = True  # not initialised
        self.models: list[JsonObject] = []  # as the CLI lists them
        self.turns = 0
        self.reader = AnswerReader()  # of the turn that is asked, or was last
        self._channel = Channel(process)
        self._conversation = Conversation()
        self._told: Told | None = None  # for the last turn; None while one is told in part
        self._turn: Turn | None = None  # that turn, from `bring` to `ask`
        self._settings: JsonObject = {}  # its
        self._taken_usd = 0.0  # what of the cost was told of

    def distance(self, demand: Demand, *, may_cut: bool) -> int | None:
        """Return the messages that a turn would append and lose here; None: it cannot be served."""
        turn, told, known = demand.turn, self._told, self._channel.known_tools
        if self.base not in (None, demand.base) or (demand.deaths and not self.is_new):
            return None
        if demand.is_count and any(known.get(to_name(tool), tool) != tool for tool in turn.tools):
            return None  # the CLI counts the tool that first had a name
        if self.base is None or told is None:
            return len(turn.messages)
        kept = self._conversation.kept(turn, told)
        lost, is_loose = len(self._conversation.held) - kept, self._conversation.is_loose
        differs = (turn.system, turn.tools) != (told.system, self._channel.tools)
        if not may_cut and (lost or differs):
            return None
        lost = lost if lost > is_loose else 0  # a query without its answer is no loss
        # with a login they weigh double, as a cached prefix is lost with them
        return len(turn.messages) - kept + lost * (2 if turn.is_login else 1)

    def take_cost(self) -> float:
        """Return the dollars that the process has newly told of, in the lines that were read."""
        before = self._taken_usd
        self._taken_usd = self._channel.cost_usd
        return self._taken_usd - before

    def read_last_lines(self) -> None:
        """Read what an ended process has still said; its cost may be in there. Does not raise."""
        with contextlib.suppress(ProcessDied, CliFailed):
            while self.process.has_lines():
                self._channel.next()

    def prime(self, patience: Patience) -> None:
        """Warm up a new process by a held query, and prove that it can be used again and again."""
        first, second = (Demand(turn, (NOBODY, ()), patience) for turn in REHEARSALS)
        self.bring(first)
        self._channel.request("apply_flag_settings", patience, settings=HOLD_CALLS)
        self.ask(patience)
        self._wait_for_held_end(patience)
        self.bring(second)
        self.turns, self.base, self._turn = 0, None, None

    def bring(self, demand: Demand) -> None:
        """Make it hold all but the last message, or all to count; nothing goes upstream."""
        assert self.base in (None, demand.base)
        self.base = demand.base  # for good
        self.turns += 1
        turn, patience, told, self._told = demand.turn, demand.patience, self._told, None
        channel, conversation = self._channel, self._conversation
        if self.is_new:
            prompt = {"systemPrompt": [turn.system]} if turn.system else {}
            fields = {"hooks": None, **prompt, **channel.offer(turn.tools)}
            self.models = channel.request("initialize", patience, **fields).get("models") or []
            self.is_new = False
        kept = conversation.kept(turn, told)
        if kept < len(conversation.held):
            channel.cut(conversation.cut(kept), patience)
        else:
            channel.settle(set(conversation.calls_due), patience)
        # Where something is held the CLI's own breakpoints are on it: with one more of the client's
        # in each turn they would soon be over the four that the API takes.
        turn = dataclasses.replace(turn, marked=None) if kept else turn
        end = len(turn.messages) if demand.is_count else len(turn.messages) - 1
        first_asked = next((i for i, each in enumerate(turn.messages) if each.role == "user"), end)
        is_new_on_login = turn.is_login and kept == 0 and not demand.is_count
        takes_additions = is_new_on_login and first_asked < end
        self._tell(turn, told, patience, holds_calls=takes_additions)
        for index in range(kept, end):
            if takes_additions and turn.messages[index].role == "user":
                self._append_held(turn, index, patience)
                takes_additions = False
            else:
                self._append(turn, index)
                # User lines are queued but assistant lines applied at once: wait, or the order
                # is lost.
                channel.come_to_rest(patience)
        self._told = Told.of(turn)
        self._turn = turn

    def ask(self, patience: Patience) -> None:
        """Start the call: give the tool calls that wait their results, or send the last message."""
        assert self._turn, "bring comes first"
        turn, self._turn = self._turn, None  # an idle process keeps nothing of a large request
        last = len(turn.messages) - 1
        asked = self._conversation.calls_due
        self.reader = AnswerReader()
        if asked:
            self._conversation.add(turn, last, None)
            results = to_tool_results(turn.messages[last], asked) or []
            self._channel.answer_calls(dict(zip(asked, results, strict=True)), patience)
        else:
            self._append(turn, last, is_query=True)

    def count(self, demand: Demand) -> JsonObject:
        """Return the CLI's count of a turn; it asks upstream's count_tokens for it."""
        self.bring(demand)
        told, self._told, self._turn = self._told, None, None
        names = {to_name(tool) for tool in demand.turn.tools}
        for _ in range(COUNT_ATTEMPTS):
            usage = self._channel.request("get_context_usage", demand.patience)
            if {tool.get("name") for tool in usage.get("mcpTools") or []} == names:
                self._told = told
                return usage
            time.sleep(POLL_S)
        raise CliFailed("claude did not take the tools that are to be counted")

    def _tell(
        self, turn: Turn, told: Told | None, patience: Patience, *, holds_calls: bool
    ) -> None:
        """Tell what a turn needs, as far as it was not told before; maybe with its calls held."""
        channel = self._channel
        if turn.tools != channel.tools:  # first: they take the CLI a moment
            channel.change_tools(turn.tools, patience)
        model = resolve_model(turn.model, self.models)
        self._settings = to_flag_settings(turn, model)
        settings = self._settings
        if holds_calls:
            settings = {**settings, "env": {**settings["env"], **HOLD_CALLS["env"]}}
        if settings != channel.settings:
            channel.request("apply_flag_settings", patience, settings=settings)
        if told and turn.system != told.system:
            prompt = turn.system or DEFAULT_SYSTEM_PROMPT
            change = {"model": model, "system_prompt": prompt, "only_if_model_is_current": True}
            channel.request("set_model", patience, **change)

    def _append(self, turn: Turn, index: int, *, is_query: bool = False) -> None:
        line = to_line(turn, index, self._settings["model"], is_query=is_query)
        self._conversation.add(turn, index, line)
        self._channel.send(line)

    def _append_held(self, turn: Turn, index: int, patience: Patience) -> None:
        """Append a message by a query; `_tell` has held the calls back, so none goes upstream.

        With a login the CLI adds its reminders (environment, model, date) to the message that is
        queried first, for good. That has to be the first message of the user's in any process:
        another one would change the bytes that upstream has cached, and the text of tool results.
        """
        self._append(turn, index, is_query=True)
        self._wait_for_held_end(patience)
        self._channel.request("apply_flag_settings", patience, settings=self._settings)

    def _wait_for_held_end(self, patience: Patience) -> None:
        """Wait until a query that is held back has ended. Raises CliRefused if it was answered."""
        while self._channel.results_due:
            if self._channel.next(patience).get("type") == "stream_event":
                raise CliRefused("claude does not hold its calls back")

    def read(self, patience: Patience) -> Generator[list[Event], None, list[Event]]:
        """Yield the answer's events in batches of those that were ready together.

        Returns the last batch. Raises ApiError; ProcessDied only while nothing went upstream.
        """
        reader = self.reader
        channel = self._channel
        silent = ProcessDied(f"claude did not call upstream within {CALL_TIMEOUT_S:.0f} s")
        until_called = patience.at_most(CALL_TIMEOUT_S, silent)
        batch: list[Event] = []
        while not reader.done:
            if batch and not self.process.lines:
                yield batch
                batch = []
            try:
                line = channel.next(patience if reader.is_called else until_called)
                with upstream_protocol():
                    batch += reader.feed(line)
                if reader.has_left and channel.settings is not HOLD_CALLS:
                    channel.apply(HOLD_CALLS)
                if reader.refusal:
                    if not channel.is_held:
                        raise reader.refusal  # at once, for `rest` has to end the process
                    patience = patience.at_most(LEAVE_S, reader.refusal)
            except ApiError:
                yield batch  # what came just before it
                raise
            except ProcessDied as exc:
                self._read_to_the_end()
                if not reader.is_called:
                    raise  # the CLI tells before it calls, so nothing was sent upstream
                log.error("%s", exc)
                yield batch
                raise CliFailed("claude ended before its answer was complete") from exc
        return batch

    def _read_to_the_end(self) -> None:
        """Kill the process, and learn from its last lines whether it has called upstream."""
        self.process.kill()
        late = ProcessDied("claude did not end")
        with contextlib.suppress(ProcessDied, ApiError), upstream_protocol():
            while True:
                self.reader.feed(self._channel.next(Patience(LEAVE_S, lambda: None, late)))

    def rest(self) -> bool:
        """Come to rest after a turn, however it ended; say whether the session can be used again.

        It can where nothing of this turn can reach upstream any more. Raises; takes up to LEAVE_S.
        """
        channel, conversation, reader = self._channel, self._conversation, self.reader
        if self._told is None or not all(held.is_place for held in conversation.held[:1]):
            return False  # told in part, or nothing that could be cut to
        if not conversation.is_loose:
            return True  # it was asked nothing
        if reader.refusal:
            # Where the CLI has gone on it remembers what it left out, and leaves it out for good.
            return reader.has_failed and not reader.asks_again
        if not reader.done:
            return reader.has_failed or (reader.is_called and channel.interrupt())
        names = set(map(to_name, channel.tools))
        if not (reader.can_go_on and names.issuperset(reader.calls.values())):
            # it would ask again: certain not to, or killed
            return channel.is_held
        conversation.add_answer(reader)
        # not while calls wait: when its stdin ends the CLI lets them fail, and asks upstream
        if not (channel.applying or conversation.calls_due):
            channel.apply(self._settings)  # likely those of the next turn too
        return True


# ========================================================================= Pool
# Who has which session, and who waits. A session is owned by the pool or by one request, never by
# both, and nothing blocks while holding the lock. One keeper thread starts and reaps processes, a
# spare is primed on a thread of its own, the public methods run on request threads.

_CLOSING: Final = "the gateway is shutting down"
STATES: Final = ("spare", "starting", "idle", "busy", "ending")  # a spare is blank: no caller's yet


class Fleet:
    """A pool's sessions, each in one of STATES. Guarded by the pool's lock."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # with since when (monotonic); those that are longest in their state come first
        self._states: dict[Session, tuple[str, float]] = {}

    def put(self, session: Session, state: str) -> None:
        self._states.pop(session, None)
        self._states[session] = (state, time.monotonic())

    def all(self, *states: str) -> list[Session]:
        """Return the sessions in these states, the longest there first."""
        return [session for session, (state, _) in self._states.items() if state in states]

    def room(self) -> int:
        """Return how many more sessions may be lent."""
        return self.settings.max_concurrency - len(self.all("busy"))

    def nearest(self, demand: Demand, *, may_cut: bool) -> Session | None:
        """Return the idle session that is nearest, the longest idle of equal ones.

        A blank one rather than a conversation that would be lost, up to the number that is kept;
        from then on only for a conversation that is worth another process.
        """
        kept = min(self.settings.processes - 1, self.settings.max_concurrency)
        of_blank = 1 if len(self.all("busy", "idle")) < kept else BLANK_DISTANCE
        distances = {}
        for session in self.all("spare", "idle"):
            if (distance := session.distance(demand, may_cut=may_cut)) is not None:
                distances[session] = distance + of_blank * (session.base is None)
        found = min(distances, key=distances.__getitem__, default=None)
        if found and found.process.is_stopped():
            log.warning("claude (pid %d) was stopped, and is ended", found.process.pid)
            found.process.kill()
            self.put(found, "ending")
            return self.nearest(demand, may_cut=may_cut)
        return found

    def end(self, session: Session) -> None:
        """Let an idle process end by itself, one that may be in mid-turn at once."""
        if session in self.all("spare", "idle"):
            session.process.finish()
        else:
            session.process.kill()
        self.put(session, "ending")

    def tidy(self, *, incoming: bool = False) -> None:
        """End the dead, the old, and what is over the numbers to be kept."""
        now, kept = time.monotonic(), self.settings.processes
        for session in self.all("spare", "idle"):
            is_old = now - session.process.started_at >= MAX_SESSION_AGE_S
            if is_old or not session.process.is_alive():
                self.end(session)
        used = self.all("idle") if kept else self.all("spare", "idle")
        over, room = len(self.all("spare", "idle", "starting")) - kept, self.room() - incoming
        for rank, session in enumerate(used):
            was_long_idle = now - self._states[session][1] > IDLE_S
            if rank < len(used) - room or (rank < over and was_long_idle):
                self.end(session)

    def take_gone(self) -> list[Session]:
        """Return the processes that have ended; kill those whose grace is over."""
        gone = []
        for session in self.all("ending"):
            if not session.process.is_alive():
                del self._states[session]
                gone.append(session)
            elif time.monotonic() >= self._states[session][1] + EXIT_GRACE_S:
                session.process.kill()
        return gone


class Pool:
    """Sessions, interchangeable but for their base, and who waits for one."""

    def __init__(
        self, start: Callable[[], Session], fleet: Fleet, ended: Callable[[Session], None]
    ) -> None:
        """`start` may raise anything; `ended` is called with each session that was given up."""
        self.failure = ""  # why none starts, until one does: a spare is tried for that in any case
        self.refusal = ""  # why the CLI's processes cannot be used again; no spares meanwhile
        self._start, self._fleet, self._ended = start, fleet, ended
        # Guarded by _changed: all fields, those above too where they are written.
        self._changed = threading.Condition()
        self._waiters: dict[Demand, Future[Session]] = {}  # in order, each with what it waits for
        self._spare_at = 0.0  # monotonic; when the next spare may be started
        self._closed = False
        # One thread forks all processes, since on Linux they die with the thread that forked them.
        self._keeper = threading.Thread(target=self._keep, name="cc2api-keeper", daemon=True)
        self._keeper.start()

    def acquire(self, waiter: Demand) -> Session:
        """Take the nearest session; wait in order. Raises ApiError, as the patience."""
        served = Future[Session]()
        try:
            with self._changed:
                if self._closed:
                    raise CliFailed(_CLOSING, status=503)
                most = self._fleet.settings.max_queue + self._fleet.room()
                if len(self._waiters) >= most and not waiter.deaths:
                    words = "Overloaded: too many requests are waiting"
                    raise ApiError(words, status=529, retry_after_s=OVERLOADED_RETRY_AFTER_S)
                self._waiters[waiter] = served
                if waiter.deaths:  # its process died: it has waited already, and has its place
                    in_order = sorted(self._waiters, key=lambda each: each.arrived_at)
                    self._waiters = {each: self._waiters[each] for each in in_order}
                self._serve_waiters()
                if not served.done():  # else the keeper would only take the processor
                    self._changed.notify_all()
            while True:
                with contextlib.suppress(FutureTimeout):
                    return served.result(waiter.patience.slice_s())
        except BaseException:
            with self._changed:
                self._waiters.pop(waiter, None)
            if served.done() and not served.exception():  # in the last moment
                self.give_back(served.result(), usable=not served.result().is_new)
            raise

    def give_back(self, session: Session, *, usable: bool) -> None:
        """Take a session back: keep it where it can be used again, else end it at once."""
        with self._changed:
            if usable:
                self.failure = self.failure if session.is_new else ""
                self._fleet.put(session, "spare" if session.base is None else "idle")
            # none is kept; a blank one is for a waiter
            is_spent = session.base and not self._fleet.settings.processes
            if not usable or is_spent or session.turns >= MAX_SESSION_TURNS or self._closed:
                self._fleet.end(session)
                self._changed.notify_all()
            self._serve_waiters()

    def snapshot(self) -> tuple[dict[str, list[int]], int]:
        """Return the pids of the processes by state, and how many requests wait."""
        with self._changed:
            pids = {state: [s.process.pid for s in self._fleet.all(state)] for state in STATES}
            return pids, len(self._waiters)

    def close(self) -> None:
        """End every process, lent ones too, and wait for that, up to EXIT_GRACE_S and a little."""
        with self._changed:
            self._closed = True
            for session in self._fleet.all("spare", "idle"):
                self._fleet.end(session)
            for session in self._fleet.all("busy", "starting"):
                session.process.kill()  # whoever has it notices, and gives it back
            while self._waiters:
                self._waiters.popitem()[1].set_exception(CliFailed(_CLOSING, status=503))
            self._changed.notify_all()
        self._keeper.join(EXIT_GRACE_S + 1)

    # ---- these two hold the lock; those that follow take it by themselves

    def _serve_waiters(self) -> None:
        """Lend what is idle to those who wait, in order, each what costs it least."""
        self._fleet.tidy()
        for waiter in list(self._waiters)[: self._fleet.room()]:  # who is passed over has its place
            if (session := self._fleet.nearest(waiter, may_cut=not self.refusal)) is None:
                self._changed.notify_all()  # the keeper has to start one
                continue
            if session.base is None:  # its replacement starts when the call is likely to have left
                self._spare_at = max(self._spare_at, time.monotonic() + SPARE_DELAY_S)
                self._changed.notify_all()
            self._fleet.put(session, "busy")
            self._waiters.pop(waiter).set_result(session)

    def _note_failure(self, problem: str) -> None:
        if problem != self.failure:
            log.error("%s: try `cc2api --check`", problem)
        self.failure = problem
        self._spare_at = max(self._spare_at, time.monotonic() + KEEPER_TICK_S)

    def _keep(self) -> None:
        """Run the keeper thread: start for waiters first, then spares; reap; until all are gone."""
        is_over = False
        while not is_over:
            try:
                is_over = self._keep_once()
            except Exception:  # without this thread nothing works any more
                log.exception("the keeper goes on")
                time.sleep(POLL_S)

    def _keep_once(self) -> bool:
        """Do what is due, or wait for it; say whether all is over."""
        with self._changed:
            fleet, gone = self._fleet, self._fleet.take_gone()
            if self._closed and not (gone or fleet.all("ending", "busy", "starting")):
                return True
            self._serve_waiters()
            lacks_new = any(waiter.deaths for waiter in self._waiters)
            lacks_new |= len(self._waiters) > len(fleet.all("starting"))
            is_for_waiter = lacks_new and fleet.room() > 0
            fleet.tidy(incoming=is_for_waiter)
            spare_in_s = self._spare_at - time.monotonic()
            kept = fleet.settings.processes >= (2 if fleet.all("busy", "idle") else 1)
            lacks_spare = (kept or bool(self.failure)) and not fleet.all("starting", "spare")
            is_due = is_for_waiter or (spare_in_s <= 0 and not self._closed and lacks_spare)
            if not is_due and not gone:
                tick_s = POLL_S if fleet.all("ending") else KEEPER_TICK_S
                self._changed.wait(min(tick_s, spare_in_s) if spare_in_s > 0 else tick_s)
        for session in gone:
            with contextlib.closing(session.process):
                session.read_last_lines()
                self._ended(session)
        if is_due:
            self._start_one(for_waiter=is_for_waiter)
        return False

    def _start_one(self, *, for_waiter: bool) -> None:
        """Start a process: for the request that waits longest just so, as a spare to be primed."""
        session = None
        try:
            session = self._start()
            if not for_waiter:
                with self._changed:
                    self._fleet.put(session, "starting")
                threading.Thread(None, self._prime, "cc2api-prime", [session], daemon=True).start()
        except Exception as exc:  # noqa: BLE001 - the message says what it was
            with self._changed:
                self._note_failure(f"claude cannot be started: {exc}")
                if session:
                    self.give_back(session, usable=False)
                elif self._waiters and for_waiter:
                    first = self._waiters.pop(next(iter(self._waiters)))
                    first.set_exception(CliFailed(self.failure, status=503))
        else:
            if for_waiter:
                self.give_back(session, usable=True)

    def _prime(self, session: Session) -> None:
        """Prime a spare, on a thread of its own."""
        patience = Patience(CONTROL_TIMEOUT_S, lambda: None, ProcessDied("claude is too slow"))
        problem: Exception | None = None
        try:
            session.prime(patience)
        except Exception as exc:  # noqa: BLE001 - whatever it is, nobody else would tell of it
            problem = exc
        with self._changed:
            if isinstance(problem, CliRefused):
                if not self.refusal:  # once is enough
                    log.warning("%s: each new conversation takes a process of its own", problem)
                self.refusal, self._spare_at = str(problem), time.monotonic() + REHEARSE_AGAIN_S
            elif not problem:
                self.refusal = ""
            elif not self._closed:
                self._note_failure(str(problem) or repr(problem))
            self.give_back(session, usable=not problem)
            self._changed.notify_all()


# ======================================================================= OpenAI
# What its two APIs have in common, to a Turn and back: a translation, not a second pipeline. Pure.
# Both bring a conversation as items and tools in the form of the Responses API, each with the path
# under which the client sent it. What Anthropic's own OpenAI layer ignores is ignored.

_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=-]+)*;base64,(.*)\Z", re.DOTALL)
_JSON_OBJECT_PROMPT: Final = "Answer with one bare JSON object and nothing else: no code fences."
_RAW_INPUT: Final = {"properties": {"input": {"type": "string"}}, "required": ["input"]}
_RAW_HINT: Final = "`input` is the raw text itself: not wrapped in JSON, not quoted."
_SEAL: Final = "cc2api:"  # before a thinking block that we gave out as `encrypted_content`
_HINTS: Final = {
    "item_reference": "items are not persisted here: set store to false"
    " (AI SDK: providerOptions.openai.store), so that they are sent whole",
    "compaction_trigger": "Codex compacts by itself with a provider of your own in its config",
}
CALL_TYPES: Final = {  # of the tools that clients run
    **{"function": "function_call", "custom": "custom_tool_call"},
    "tool_search": "tool_search_call",
}
FINISH_REASONS: Final = {  # any other: stop
    **{"tool_use": "tool_calls", "refusal": "content_filter"},
    **{"max_tokens": "length", "model_context_window_exceeded": "length"},
}


def to_blocks(owner: JsonObject, name: str, path: str) -> list[JsonObject]:
    """Return a text or a list of parts as blocks, less blank texts, which Anthropic refuses."""
    said = {name: as_blocks(owner.get(name))}
    blocks = [_to_block(part, place) for place, part in objects(said, name, path)]
    return [b for b in blocks if b["type"] != "text" or b["text"].strip()]


def _to_block(part: JsonObject, path: str) -> JsonObject:
    """Return a part of a message's content, in either API's form, as a block."""
    kind = str(part.get("type"))
    if kind in ("text", "input_text", "output_text", "refusal"):
        return {"type": "text", "text": require(part, kind.rpartition("_")[2], str, path)}
    if kind in ("image_url", "file"):
        part, path = require(part, kind, dict, path), f"{path}.{kind}"
    if kind in ("image_url", "input_image"):
        name = "url" if kind == "image_url" else "image_url"
        source = _to_source(require(part, name, str, path))
        check_image(f"{path}.{name}", source)
        return {"type": "image", "source": source}
    if kind not in ("file", "input_file"):
        raise InvalidRequest(f"{path}.type: Input should be a type of text, image or file")
    url = optional(part, "file_url", str, path)
    if not url:
        data = require(part, "file_data", str, path)
        url = data if data.startswith("data:") else f"data:application/pdf;base64,{data}"
    title = part.get("filename") or None
    return without_nulls({"type": "document", "title": title, "source": _to_source(url)})


def _to_source(url: str) -> JsonObject:
    """Return an http or data URL as the source of an image or document."""
    data = _DATA_URL.match(url)
    if data is None:
        return {"type": "url", "url": url}
    media_type, encoded = data[1].replace("image/jpg", "image/jpeg"), data[2]
    if not media_type.startswith(("image/", "application/pdf")):
        with contextlib.suppress(ValueError):  # what is no text upstream refuses
            text = base64.b64decode(encoded, validate=True).decode("utf-8")
            return {"type": "text", "media_type": "text/plain", "data": text}
    return {"type": "base64", "media_type": media_type, "data": encoded}


class ItemReader:
    """What the items of a conversation say (responses-api.md 1.2), one message each, to be merged.

    Refused items are told by their place: those of tools that OpenAI runs, and what points to
    something kept. Raises InvalidRequest.
    """

    def __init__(self, system: list[JsonObject], *, hoists: bool = False) -> None:
        """`hoists`: what a developer says late joins the system prompt as well."""
        self.system, self._hoists = system, hoists
        self.tools: list[Placed] = []  # that came with items
        self.messages: list[Placed] = []
        self._front = 0  # behind the last answer and its results
        self._thinking: list[JsonObject] = []  # before the next item of the same answer
        self._calls: set[str] = set()  # without an output so far

    def read(self, path: str, item: JsonObject) -> None:
        """Take the next item."""
        kind = str(item.get("type") or ("message" if "role" in item else "item_reference"))
        if kind not in _READERS:
            hint = _HINTS.get(kind, "this type is not supported by this gateway")
            raise InvalidRequest(f"{path}.type: {kind}: {hint}")
        if item.get("execution") == "server":  # a search that OpenAI ran
            raise InvalidRequest(f"{path}.execution: Input should be 'client'")
        _READERS[kind](self, path, item)

    def _add(self, role: str, path: str, blocks: list[JsonObject]) -> None:
        content = self._thinking + blocks if role == "assistant" else blocks
        self._thinking = []  # of an answer that went no further: the API takes none at the end
        self.messages.append((path, {"role": role, "content": content}))
        if role == "assistant":
            self._front = len(self.messages)

    def message(self, path: str, item: JsonObject) -> None:
        role, blocks = str(item.get("role")), to_blocks(item, "content", path)
        if role in ("developer", "system"):
            role = "system"
            if any(block["type"] != "text" for block in blocks):
                raise InvalidRequest(f"{path}.content: Input should be text")
            # a late one of Codex' would there end the caching, and the process that was kept
            if self._hoists or not self.messages:
                self.system += blocks
                return
        if blocks or role not in ("assistant", "system"):
            self._add(role, path, blocks)

    def thought(self, path: str, item: JsonObject) -> None:
        """Take our own; what other providers thought, or did by themselves, is of no use here."""
        self._thinking += _unseal(item.get("encrypted_content"))

    def call(self, path: str, item: JsonObject) -> None:
        kind, call_id = item["type"], require(item, "call_id", str, path)
        name = "tool_search" if kind == "tool_search_call" else _upstream_name(item, path)
        if kind == "tool_search_call":
            given = require(item, "arguments", dict, path)
        elif kind == "custom_tool_call":
            given = {"input": require(item, "input", str, path)}
        else:
            try:
                given = parse_json((optional(item, "arguments", str, path) or "{}").encode())
            except InvalidRequest:
                problem = "Input should be a JSON object in a string"
                raise InvalidRequest(f"{path}.arguments: {problem}") from None
        self._calls.add(call_id)
        block = {"type": "tool_use", "id": call_id, "name": name, "input": given}
        self._add("assistant", path, [block])

    def output(self, path: str, item: JsonObject) -> None:
        call_id = require(item, "call_id", str, path)
        said = "output" if item.get("content") is None else "content"  # which is chat completions'
        require(item, said, object, path)
        if call_id not in self._calls:
            problem = f"No tool call found for function call output with call_id {call_id}."
            raise InvalidRequest(f"{path}: {problem}")
        self._calls.discard(call_id)
        result = {"type": "tool_result", "content": to_blocks(item, said, path)}
        message = {"role": "user", "content": [{**result, "tool_use_id": call_id}]}
        self.messages.insert(self._front, (path, message))  # in front of what the user says
        self._front, self._thinking = self._front + 1, []

    def more_tools(self, path: str, item: JsonObject) -> None:
        """Take tools, and where a search found them, its output, which is they."""
        more = list(objects(item, "tools", path))
        self.tools += more
        if item["type"] == "tool_search_output":
            self.output(path, {**item, "output": json.dumps([tool for _, tool in more])})


_READERS: Final[dict[str, Callable[[ItemReader, str, JsonObject], None]]] = {
    **dict.fromkeys(("reasoning", "web_search_call", "file_search_call"), ItemReader.thought),
    **{"code_interpreter_call": ItemReader.thought, "message": ItemReader.message},
    **dict.fromkeys(CALL_TYPES.values(), ItemReader.call),
    **dict.fromkeys(("function_call_output", "custom_tool_call_output"), ItemReader.output),
    **dict.fromkeys(("tool_search_output", "additional_tools"), ItemReader.more_tools),
}


def seal(block: JsonObject) -> str:
    """Return a thinking block as `encrypted_content`, whole: clients cut summaries anew."""
    return _SEAL + base64.urlsafe_b64encode(json.dumps(block).encode("ascii")).decode("ascii")


def _unseal(sealed: Any) -> list[JsonObject]:
    """Return the block that was sealed; none of what is not our own, or damaged."""
    if isinstance(sealed, str) and sealed.startswith(_SEAL):
        with contextlib.suppress(ValueError, InvalidRequest):
            block = parse_json(base64.urlsafe_b64decode(sealed[len(_SEAL) :]))
            return [block] if block.get("type") in ("thinking", "redacted_thinking") else []
    return []


def _upstream_name(tool: JsonObject, path: str) -> str:
    """Return the name under which a tool goes upstream, by its own and its namespace's."""
    name, namespace = require(tool, "name", str, path), optional(tool, "namespace", str, path)
    return f"{namespace}__{name}" if namespace else name


def _flattened(placed: Iterable[Placed]) -> Iterator[Placed]:
    """Yield tools, with the name of their namespace and all that the model is to know of them."""
    for path, tool in placed:
        is_space = tool.get("type") == "namespace"
        space = require(tool, "name", str, path) if is_space else None
        for place, inner in objects(tool, "tools", path) if is_space else [(path, tool)]:
            texts = [optional(tool, "description", str, path)] if is_space else []
            texts.append(optional(inner, "description", str, place))
            if inner.get("type") == "custom":
                form = optional(inner, "format", dict, place) or {}
                form = _object(form.get("grammar")) or form  # so in chat completions
                grammar = optional(form, "definition", str, f"{place}.format")
                texts += [_RAW_HINT, grammar and f"Its {form.get('syntax')} grammar:\n{grammar}"]
            about = "\n\n".join(filter(None, texts)) or None
            yield place, {**inner, "namespace": space, "description": about}


def _to_tools(placed: Iterable[Placed]) -> tuple[list[JsonObject], dict[str, JsonObject]]:
    """Return tools in Anthropic's form, and what their calls are, by name (section 1.3)."""
    tools: dict[str, JsonObject] = {}
    calls: dict[str, JsonObject] = {}
    for path, tool in _flattened(placed):
        kind = require(tool, "type", str, path)
        is_foreign = kind == "tool_search" and tool.get("execution") != "client"
        if is_foreign or kind.startswith("web_search"):  # Codex always has one of the latter
            continue
        if kind not in CALL_TYPES:
            raise InvalidRequest(f"{path}.type: tools of this type are run by OpenAI, not here")
        name, call = kind, {"type": CALL_TYPES[kind], "execution": "client"}
        if kind != "tool_search":
            name, said = _upstream_name(tool, path), {of: tool[of] for of in ("name", "namespace")}
            call = {"type": CALL_TYPES[kind], **without_nulls(said)}
        is_twice = name in tools and path.startswith("tools.")
        if is_twice or calls.setdefault(name, call) != call:
            raise InvalidRequest(f"{path}.name: there is another tool of the name {name}")
        parameters = optional(tool, "parameters", dict, path) or {"properties": {}}
        schema = {"type": "object", **(_RAW_INPUT if kind == "custom" else parameters)}
        told = {"name": name, "description": tool["description"], "strict": tool.get("strict")}
        # a later search may find it described anew
        tools[name] = without_nulls({**told, "input_schema": schema})
    return list(tools.values()), calls


def _to_tool_choice(
    body: JsonObject, tools: list[JsonObject]
) -> tuple[JsonObject, list[JsonObject]]:
    """Return tool_choice and parallel_tool_calls in Anthropic's form, and the tools they leave."""
    choice: Any = body.get("tool_choice") or "auto"
    named = _object(choice)
    if (kind := named.get("type")) == "allowed_tools":
        allowed = objects(named, "tools", "tool_choice")
        names = [_upstream_name(tool, path) for path, tool in allowed]
        tools, choice = [tool for tool in tools if tool["name"] in names], named.get("mode")
    translated: JsonObject = {"type": "any" if choice == "required" else choice or "auto"}
    if kind in ("function", "custom"):
        translated = {"type": "tool", "name": _upstream_name(named, "tool_choice")}
    elif isinstance(choice, dict):
        problem = "Input should be 'function', 'custom' or 'allowed_tools'"
        raise InvalidRequest(f"tool_choice.type: {problem}")
    if body.get("parallel_tool_calls") is False and choice != "none":
        translated["disable_parallel_tool_use"] = True
    return translated, tools


def to_fields(
    body: JsonObject, items: ItemReader, tools: Iterable[Placed], form: JsonObject
) -> tuple[JsonObject, dict[str, JsonObject]]:
    """Return what both APIs ask for in Anthropic's form, and what the calls of tools are.

    `form` is that of the text; JSON of any shape is asked for in the system prompt.
    """
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if isinstance(temperature, (int, float)) and 1 < temperature <= 2:
        temperature = 1
    translated, calls = _to_tools([*tools, *items.tools])
    choice, translated = _to_tool_choice(body, translated)
    kind, schema = form.get("type", "text"), form.get("schema")
    if kind == "json_object" or (kind == "json_schema" and schema is None):
        items.system += as_blocks(_JSON_OBJECT_PROMPT)
        kind = "text"
    fields = {
        "model": body.get("model"),
        "system": items.system,
        "stream": body.get("stream"),
        "temperature": temperature,
        # 1 says nothing, and newer models refuse the two together
        "top_p": None if temperature is not None and top_p == 1 else top_p,
        "tools": translated,
        "tool_choice": choice if translated else None,
        "output_format": None if kind == "text" else {"type": kind, "schema": schema},
    }
    return fields, calls


def to_effort(owner: JsonObject, name: str, path: str = "") -> str | None:
    """Return an effort as Anthropic has it, the highest for one of a later day."""
    known = {"none": None, "minimal": "low", **{effort: effort for effort in EFFORTS}}
    return known.get(optional(owner, name, str, path) or "none", EFFORTS[-1])


def to_raw_input(given: Any) -> str:
    """Return the text that a custom tool is called with; the model may have written anything."""
    raw = _object(given).get("input")
    return raw if isinstance(raw, str) else json.dumps(given)


def to_openai_usage(usage: JsonObject, asked: str, said: str) -> JsonObject:
    """Return a message's usage as OpenAI counts it, under an API's two names for tokens."""
    counts = collections.defaultdict(int, without_nulls(usage))
    cached, written = counts["cache_read_input_tokens"], counts["cache_creation_input_tokens"]
    tokens_in, tokens_out = counts["input_tokens"] + cached + written, counts["output_tokens"]
    thinking = _object(usage.get("output_tokens_details")).get("thinking_tokens") or 0
    return {
        f"{asked}_tokens": tokens_in,
        f"{said}_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        f"{asked}_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        f"{said}_tokens_details": {"reasoning_tokens": thinking},
    }


# Anthropic status to OpenAI's status, type and code (messages-api.md 7.4); others keep the status.
_OPENAI_ERRORS: Final[dict[int, tuple[int, str, str | None]]] = {
    401: (401, "invalid_request_error", "invalid_api_key"),
    402: (429, "insufficient_quota", "insufficient_quota"),
    404: (404, "invalid_request_error", "model_not_found"),
    413: (413, "invalid_request_error", None),
    429: (429, "rate_limit_error", "rate_limit_exceeded"),
    529: (503, "server_error", "overloaded"),
}


def to_openai_error(error: ApiError) -> tuple[int, JsonObject]:
    """Return OpenAI's status and envelope for an error; `param` is the path that it names."""
    default = (error.status, "server_error" if error.status >= 500 else error.kind, None)
    status, kind, code = _OPENAI_ERRORS.get(error.status, default)
    message = str(error)
    path = re.match(r"([a-z_]+(?:\.\w+)*): ", message)
    param = re.sub(r"\.(\d+)", r"[\1]", path[1]) if path and status == 400 else None
    if "prompt is too long" in message or "context limit" in message:
        code = "context_length_exceeded"
    code = code or _object(error.details).get("error_code")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ============================================================= Chat completions
# OpenAI's chat completions, by messages-api.md, sections 7 and 8. Pure.

# What ignoring would give another answer than was asked for, and the value that asks for no more.
_ONLY: Final = {
    **{"n": 1, "modalities": ["text"], "audio": None, "functions": None, "function_call": None},
    **{"logprobs": None, "top_logprobs": None},
}


def parse_chat_request(body: JsonObject) -> tuple[Turn, ChatWriter]:
    """Check a request; return its Turn, and what writes its answer. Raises InvalidRequest."""
    for name, only in _ONLY.items():
        if body.get(name) and body[name] != only:
            raise InvalidRequest(f"{name}: this value is not supported by this gateway")
    items = ItemReader([], hoists=True)
    for path, item in _chat_items(body):
        items.read(path, item)
    form = optional(body, "response_format", dict) or {}
    if form.get("type") == "json_schema":
        inner = require(form, "json_schema", dict, "response_format")
        form = {**inner, "type": "json_schema"}
    tools = [_unwrapped(tool, path) for path, tool in objects(body, "tools")]
    if isinstance(choice := body.get("tool_choice"), dict):
        _, choice = _unwrapped(choice, "tool_choice")
    fields, calls = to_fields({**body, "tool_choice": choice}, items, tools, form)
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else optional(body, "stop", list) or []
    fields |= {
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens"),
        # blank ones OpenAI takes and Anthropic does not
        "stop_sequences": [text for text in stops if str(text).strip()] or None,
        "effort": to_effort(body, "reasoning_effort"),
    }
    include_usage = bool(_object(body.get("stream_options")).get("include_usage"))
    return to_turn(fields, items.messages), ChatWriter(calls, include_usage=include_usage)


def _unwrapped(owner: JsonObject, path: str) -> Placed:
    """Return a tool or a call flat: what stands in it under the name of its type."""
    kind = "function" if owner.get("custom") is None else "custom"
    flat = {**require(owner, kind, dict, path), "type": kind, "namespace": None}
    return f"{path}.{kind}", flat


def _chat_items(body: JsonObject) -> Iterator[Placed]:
    """Yield what the messages say as items."""
    for path, message in objects(body, "messages"):
        if message.get("role") == "tool":
            call_id = require(message, "tool_call_id", str, path)
            said = {"type": "function_call_output", "content": message.get("content") or ""}
            yield path, {**said, "call_id": call_id}
            continue
        said = {"role": message.get("role"), "type": "message"}
        yield path, {**said, "content": message.get("content") or message.get("refusal")}
        calls = objects(message, "tool_calls", path) if message.get("role") == "assistant" else ()
        for place, call in calls:
            call_id = require(call, "id", str, place)
            place, flat = _unwrapped(call, place)
            yield place, {**flat, "type": CALL_TYPES[flat["type"]], "call_id": call_id}


class ChatWriter(AnswerWriter):
    """Writes an answer as a chat completion, whole or in chunks."""

    end, ping = b"data: [DONE]\n\n", ()

    def __init__(self, calls: Mapping[str, JsonObject], *, include_usage: bool = False) -> None:
        super().__init__(calls)
        self._created, self._include_usage = int(time.time()), include_usage
        self._custom = [n for n, call in self.calls.items() if call["type"] == "custom_tool_call"]

    def feed(self, event: Event) -> list[JsonObject]:
        super().feed(event)
        if (delta := self._to_delta(event)) is None:
            return []
        chunk = self._to_answer("chat.completion.chunk", {"delta": delta})
        if self._include_usage:
            chunk["usage"] = None
            if event["type"] == "message_stop":
                usage = to_openai_usage(self.message["usage"], "prompt", "completion")
                return [chunk, {**chunk, "choices": [], "usage": usage}]
        return [chunk]

    def whole(self) -> JsonObject:
        blocks = self.message["content"]
        calls = [self._to_call(block) for block in blocks if block["type"] == "tool_use"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        thinking = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
        reply = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": _object(self.message.get("stop_details")).get("explanation"),
        }
        reply |= without_nulls({"reasoning_content": thinking or None, "tool_calls": calls or None})
        usage = to_openai_usage(self.message["usage"], "prompt", "completion")
        return {**self._to_answer("chat.completion", {"message": reply}), "usage": usage}

    def _to_answer(self, kind: str, said: JsonObject) -> JsonObject:
        """Return an answer of a kind, whole or a chunk, to which its one choice says something."""
        message, stop_reason = self.message, self.message.get("stop_reason")
        finish = FINISH_REASONS.get(stop_reason, "stop") if stop_reason else None
        return {
            "id": "chatcmpl-" + str(message["id"]).removeprefix("msg_"),
            "object": kind,
            "created": self._created,
            "model": message.get("model"),
            "system_fingerprint": None,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}],
        }

    def _to_call(self, block: JsonObject, arguments: str | None = None) -> JsonObject:
        whole = json.dumps(block["input"]) if arguments is None else arguments
        kind, said = "function", {"arguments": whole}
        if block["name"] in self._custom:
            kind, said = "custom", {"input": to_raw_input(block["input"])}
        return {"id": block["id"], "type": kind, kind: {"name": block["name"], **said}}

    def _to_delta(self, event: Event) -> JsonObject | None:
        kind, delta = event["type"], _object(event.get("delta"))
        if kind in ("message_start", "message_stop"):
            return {"role": "assistant", "content": ""} if kind == "message_start" else {}
        for ours, theirs in (("text", "content"), ("thinking", "reasoning_content")):
            if delta.get(ours):
                return {theirs: delta[ours]}
        content = self.message["content"]
        block = content[-1] if content else {}
        if block.get("type") != "tool_use":
            return None
        is_custom = block["name"] in self._custom  # its input is inside JSON: told whole
        is_end, arguments = kind == "content_block_stop", delta.get("partial_json")
        if kind == ("content_block_stop" if is_custom else "content_block_start"):
            call = self._to_call(block, "")
        elif not is_custom and (arguments or (is_end and not any(self.pieces))):
            call = {"function": {"arguments": arguments or json.dumps(block["input"])}}
        else:
            return None
        index = sum(block["type"] == "tool_use" for block in content) - 1
        return {"tool_calls": [{"index": index, **call}]}


# ==================================================================== Responses
# OpenAI's Responses API, by responses-api.md, whose sections are named here. Pure, and without a
# memory: a request brings its whole conversation, and what refers to anything kept is refused.

_NOT_KEPT: Final = "nothing is kept here; send the whole conversation as `input`"
# Fields that ignoring would give another answer than was asked for.
_REFUSED: Final = {
    **{"previous_response_id": f"Previous response not found: {_NOT_KEPT}"},
    **{"conversation": _NOT_KEPT, "prompt": "prompts are not kept here; send what it says"},
    **{"background": "answers are not kept here", "top_logprobs": "no model here tells these"},
}
_DEFAULT_REFUSAL: Final = "The model refused to answer."


def parse_responses_request(
    body: JsonObject, *, is_count: bool = False
) -> tuple[Turn, ResponseWriter]:
    """Check a request; return its Turn, and what writes its answer. Raises InvalidRequest."""
    for name, problem in _REFUSED.items():
        if body.get(name):
            raise InvalidRequest(f"{name}: {problem}")
    if "message.output_text.logprobs" in (optional(body, "include", list) or []):
        raise InvalidRequest("include: logprobs are not supported by this gateway")
    given = body.get("input") or None
    listed = {"input": [{"role": "user", "content": given}] if isinstance(given, str) else given}
    require(listed, "input", list)
    items = ItemReader(to_blocks(body, "instructions", ""))
    for path, item in objects(listed, "input"):
        items.read(path, item)
    if not items.messages or (items.messages[-1][1]["role"] == "assistant" and not is_count):
        raise InvalidRequest("input: The last item must be a user's message or a tool's output")
    reasoning, text = (optional(body, name, dict) or {} for name in ("reasoning", "text"))
    form = optional(text, "format", dict, "text") or {}
    fields, calls = to_fields(body, items, objects(body, "tools"), form)
    wants_summary = reasoning.get("summary") or reasoning.get("generate_summary")
    # with a forced tool the API refuses it
    is_forced = _object(fields["tool_choice"]).get("type") in ("any", "tool")
    shows_thinking = wants_summary and not is_forced and reasoning.get("effort") != "none"
    fields |= {
        "max_tokens": body.get("max_output_tokens"),
        "effort": to_effort(reasoning, "effort", "reasoning"),
        "thinking": {"type": "adaptive", "display": "summarized"} if shows_thinking else None,
    }
    turn = to_turn(fields, items.messages, is_count=is_count)
    return turn, ResponseWriter(_to_blank(body), calls)


def _to_blank(body: JsonObject) -> JsonObject:
    """Return a response in which nothing is said yet (section 2.1), with what was asked for."""
    echoed = ("instructions", "temperature", "top_p", "max_output_tokens", "user", "model")
    text, reasoning = _object(body.get("text")), _object(body.get("reasoning"))
    return {
        **{"id": f"resp_{uuid.uuid4().hex}", "object": "response", "status": "in_progress"},
        **dict.fromkeys(("completed_at", "error", "incomplete_details", "usage")),
        **{"created_at": int(time.time()), "output": [], "store": False, "background": False},
        **{"truncation": "disabled", "service_tier": "default", "top_logprobs": 0},
        **{"previous_response_id": None, **{name: body.get(name) for name in echoed}},
        **{"metadata": body.get("metadata") or {}, "tools": body.get("tools") or []},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tool_choice": body.get("tool_choice") or "auto",
        "text": {"format": {"type": "text"}, **without_nulls(text)},
        "reasoning": {name: reasoning.get(name) for name in ("effort", "summary")},
    }


class _Form(NamedTuple):
    """How items of a type are streamed (section 2.4)."""

    prefix: str  # of their ids
    source: str  # the field of upstream's deltas with their text, "" where these do not say it
    field: str  # theirs
    events: str  # what the events are called that say the text
    opening: JsonObject  # the item as it is added, less what a call says
    part: JsonObject | None = None  # what holds the text, where that is not the item itself


_MESSAGE: Final = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
_REASONING: Final = {"type": "reasoning", "summary": []}
_CALL: Final = {"status": "in_progress"}
_TEXT: Final = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
_REFUSAL: Final = {"type": "refusal", "refusal": ""}
_SUMMARY: Final = {"type": "summary_text", "text": ""}
_FORMS: Final = {
    "message": _Form("msg", "text", "text", "output_text", _MESSAGE, _TEXT),
    "refusal": _Form("msg", "text", "refusal", "refusal", _MESSAGE, _REFUSAL),
    "reasoning": _Form("rs", "thinking", "text", "reasoning_summary_text", _REASONING, _SUMMARY),
    "function_call": _Form("fc", "partial_json", "arguments", "function_call_arguments", _CALL),
    "custom_tool_call": _Form("ctc", "", "input", "custom_tool_call_input", _CALL),
    "tool_search_call": _Form("tsc", "", "arguments", "", _CALL),
}


class _OutputItem:
    """An output item as it comes, made of a block; `say` and `end` yield its events."""

    def __init__(self, kind: str, block: JsonObject, call: JsonObject, name: str, index: int):
        self.kind, self.form, self._block = kind, _FORMS[kind], block
        self._index, item_id = index, f"{self.form.prefix}_{name}{index}"
        self._place: JsonObject = {"item_id": item_id}
        self._item = {"id": item_id, **call, **self.form.opening}
        self._item |= {} if self.form.part else {self.form.field: ""}
        self._list = "summary" if kind == "reasoning" else "content"  # that its part is in
        self._part = "reasoning_summary_part" if kind == "reasoning" else "content_part"
        self._more: JsonObject = {"logprobs": []} if kind == "message" else {}
        self._pieces: list[str] = []  # of its text
        self._is_begun = False

    def say(self, text: str) -> Iterator[JsonObject]:
        """Say more of its text; it begins with the first that is not blank."""
        self._pieces += [text] * bool(text)
        if not self._is_begun:
            if not (text := "".join(self._pieces)).strip():
                return
            self._is_begun = True
            yield self._event("output_item.added", item=dict(self._item))
            if self.form.part:
                self._place |= {f"{self._list}_index": 0}
                yield self._event(f"{self._part}.added", part=self.form.part)
        if text:
            yield self._event(f"{self.form.events}.delta", **self._more, delta=text)

    def end(self) -> Iterator[JsonObject]:
        """Finish; a message that has said nothing is none."""
        given = self._block.get("input")
        if self.kind == "custom_tool_call":  # inside JSON so far
            yield from self.say(to_raw_input(given))
        elif self.kind == "function_call" and not self._pieces:
            yield from self.say(json.dumps(given))
        elif self.kind == "tool_search_call":
            self._item["arguments"] = given
        if not self._is_begun:
            if self.kind == "message":
                return
            yield self._event("output_item.added", item=dict(self._item))
        said: JsonObject = {self.form.field: "".join(self._pieces)}
        if self._is_begun or (self.form.events and not self.form.part):
            yield self._event(f"{self.form.events}.done", **self._more, **said)
            if self.form.part:
                said = {self._list: [{**self.form.part, **said}]}
                yield self._event(f"{self._part}.done", part=said[self._list][0])
            self._item |= said
        if self.kind == "reasoning":
            self._item["encrypted_content"] = seal(self._block)
        else:
            self._item["status"] = "completed"
        yield self._event("output_item.done", item=dict(self._item))

    def _event(self, name: str, **said: Any) -> JsonObject:
        place = {} if "item" in said else self._place
        return {"type": f"response.{name}", "output_index": self._index, **place, **said}


class ResponseWriter(AnswerWriter):
    """Writes an answer as a response: its stream's last event holds the whole.

    The end of an item is held back until more is known: the next block may go on with its text,
    and a call that max_tokens cut short must not look whole (section 2.3).
    """

    fails_in_stream = True  # what was paid for: by its status Codex would repeat it thirty times

    def __init__(self, blank: JsonObject, calls: Mapping[str, JsonObject]) -> None:
        super().__init__(calls)
        self._response = blank  # as it was last told
        self._written = 0  # events
        self._output: list[JsonObject] = []  # the items that are finished
        self._item: _OutputItem | None = None  # the one that is not

    def feed(self, event: Event) -> list[JsonObject]:
        super().feed(event)
        kind = event["type"]
        if kind == "message_start":
            return self._numbered(self._begin())
        if kind == "content_block_start":
            return self._numbered(self._start(self.message["content"][-1]))
        if kind == "content_block_delta" and self._item:
            return self._numbered(self._item.say(event["delta"].get(self._item.form.source) or ""))
        return self._numbered(self._finish() if kind == "message_stop" else ())

    def whole(self) -> JsonObject:
        return self._response

    def live(self) -> Sequence[JsonObject]:
        """Show life: by beginning, then by an event, since comments leave Codex' clock running."""
        return self._numbered(self._begin() or [{"type": "keepalive"}])

    def fail(self, error: ApiError, body: JsonObject) -> list[JsonObject]:
        return self._numbered([*self._begin(), self._tell("failed", error=_to_failure(error))])

    def _numbered(self, events: Iterable[JsonObject]) -> list[JsonObject]:
        numbered = []
        for event in events:
            numbered.append({"type": event["type"], "sequence_number": self._written, **event})
            self._written += 1
            if event["type"] == "response.output_item.done":
                self._output.append(event["item"])
        return numbered

    def _begin(self) -> list[JsonObject]:
        if self._written:
            return []
        return [self._tell("in_progress", name="created"), self._tell("in_progress")]

    def _start(self, block: JsonObject) -> Iterator[JsonObject]:
        """Begin the next item, or go on with a message whose next text this is."""
        kind, call = str(block["type"]), JsonObject()
        if kind == "tool_use":
            plain = {"type": "function_call", "name": block["name"]}
            call = {**self.calls.get(block["name"], plain), "call_id": block["id"]}
        kinds = {"text": "message", "thinking": "reasoning", "redacted_thinking": "reasoning"}
        kind = call.get("type") or kinds.get(kind, kind)
        is_left_out = kind not in _FORMS  # what upstream's own tools do, which ends no text
        was_message = self._item and self._item.kind == "message"
        if not (was_message and (is_left_out or kind == "message")):
            yield from self._end()
        if is_left_out:
            return
        if not self._item:
            name = self._response["id"].partition("_")[2]
            self._item = _OutputItem(kind, block, call, name, len(self._output))
        yield from self._item.say(block.get(self._item.form.source) or "")

    def _end(self) -> Iterator[JsonObject]:
        item, self._item = self._item, None
        yield from item.end() if item else ()

    def _finish(self) -> Iterator[JsonObject]:
        finish = FINISH_REASONS.get(self.message["stop_reason"])
        is_cut = finish == "length"
        if not (is_cut and self._item and self._item.kind in CALL_TYPES.values()):
            yield from self._end()
        if finish == "content_filter":  # in an item of its own: Codex drops what stands beside it
            details = _object(self.message.get("stop_details"))
            refusal = str(details.get("explanation") or "").strip() or _DEFAULT_REFUSAL
            yield from self._start({"type": "refusal", "text": refusal})
            yield from self._end()
        usage = to_openai_usage(self.message["usage"], "input", "output")
        end: JsonObject = {"completed_at": int(time.time())}
        end = {"incomplete_details": {"reason": "max_output_tokens"}} if is_cut else end
        yield self._tell("incomplete" if is_cut else "completed", usage=usage, **end)

    def _tell(self, status: str, *, name: str = "", **said: Any) -> JsonObject:
        """Return an event with the response as it is now."""
        told = without_nulls({"model": self.message.get("model")})
        told |= {"status": status, "output": list(self._output), **said}
        self._response = {**self._response, **told}
        return {"type": f"response.{name or status}", "response": self._response}


def to_responses_error(error: ApiError) -> tuple[int, JsonObject]:
    """Return OpenAI's status and envelope, with what Codex does not repeat (section 3)."""
    status, body = to_openai_error(error)
    inner = body["error"]
    if inner["code"] == "overloaded":
        inner["code"] = "server_is_overloaded"
    if inner["param"] == "previous_response_id":
        inner["code"] = "previous_response_not_found"
    if error.status == 429 and error.should_retry is False:  # a window of the plan is used up
        resets_at = int(time.time()) + (error.retry_after_s or 0)
        inner |= {"type": "usage_limit_reached", "resets_at": resets_at}
    return status, body


def _to_failure(error: ApiError) -> JsonObject:
    """Return the `error` of a response that failed; Codex repeats other codes than these four."""
    status, body = to_responses_error(error)
    inner, code = body["error"], body["error"]["code"]
    message = inner["message"]
    if inner["type"] == "usage_limit_reached":
        code = "insufficient_quota"
    elif code == "rate_limit_exceeded":  # Codex waits for as long as the message says
        message += f" Please try again in {error.retry_after_s or 5}s."
    elif code not in ("server_is_overloaded", "insufficient_quota", "context_length_exceeded"):
        code = "invalid_prompt" if status < 500 else "server_error"
    return {"code": code, "message": message}


# ====================================================================== Metrics
# What has happened since the start, and what is told of each request, in the log and in numbers.
# Callers go by name, never by key. Any thread.

_FAMILIES: Final = {
    "cc2api_requests_total": ("counter", "Requests answered."),
    "cc2api_tokens_total": ("counter", "Tokens as upstream counted them."),
    "cc2api_cost_dollars_total": ("counter", "Cost as the CLI reported it, once it did."),
    "cc2api_first_delta_seconds": ("histogram", "From the request to its answer's first delta."),
    "cc2api_request_seconds": ("histogram", "From the request to the end of its answer."),
}
_BUCKETS_S: Final = "0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 120 300 600 +Inf"
_TOKEN_KINDS: Final = {
    **{"input_tokens": "input", "output_tokens": "output"},
    **{"cache_read_input_tokens": "cache_read", "cache_creation_input_tokens": "cache_write"},
}


def quoted(text: str, limit: int) -> str:
    """Make client text fit for a key=value log line: no spaces, quotes or control characters."""
    return re.sub(r"[^\x21-\x7e]|[\"\\=]", "_", text[:limit]) or "-"


class Metrics:
    """Counters and histograms. No label holds what a client made up."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self._lock = threading.Lock()
        # of each family the samples, by what follows its name and by their labels, as pairs
        self._families = {name: collections.defaultdict[Any, float](float) for name in _FAMILIES}

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter, or a time in seconds to a histogram."""
        key = tuple(labels.items())
        with self._lock:
            samples = self._families[name]
            if _FAMILIES[name][0] == "counter":
                samples["", key] += value
                return
            for le in _BUCKETS_S.split():
                samples["_bucket", (*key, ("le", le))] += value <= float(le)
            samples["_sum", key] += value
            samples["_count", key] += 1

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        with self._lock:
            return [(dict(labels), value) for (_, labels), value in self._families[name].items()]

    def render(self, gauges: Mapping[str, Mapping[str, int]]) -> str:
        """Return all in Prometheus' text format; `gauges` are values by name and labels."""
        lines = []
        for name, values in gauges.items():
            lines += [f"# TYPE {name} gauge", *(f"{name}{of} {n}" for of, n in values.items())]
        with self._lock:
            for name, (kind, text) in _FAMILIES.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                for (suffix, labels), value in self._families[name].items():
                    said = ",".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in labels)
                    lines.append(f"{name}{suffix}{{{said}}} {value:.12g}")
        return "\n".join([*lines, ""])


class Record:
    """What is told of one request: its log lines, and its part in the metrics."""

    def __init__(self, metrics: Metrics, route: str, client: str, method: str, path: str) -> None:
        self.request_id = "req_" + uuid.uuid4().hex[:24]
        self.has_turn = False  # a model was asked
        self._metrics, self._route, self._model = metrics, route, "none"
        self._notes: dict[str, object] = {"method": method, "path": quoted(path, 200)}
        self._notes |= {"id": self.request_id, "client": client}
        self._usage: dict[str, int] = {}  # tokens, as upstream counts
        self._started_at = time.monotonic()
        self._has_delta = False

    def note(self, **pairs: object) -> None:
        """Note what the log line of its end tells; `key`, the caller, is in its counts too."""
        self._notes |= pairs

    def note_turn(self, turn: Turn, *, is_known: bool) -> None:
        """Note what is asked; a model that the CLI does not list counts as `other`."""
        self.has_turn, self._model = True, turn.model if is_known else "other"
        self.note(model=quoted(turn.model, 100), stream=int(turn.stream))

    def note_events(self, batch: Sequence[Event]) -> None:
        """Note what a batch of events tells: tokens, and that the model has begun to answer."""
        for event in batch:
            usage = event.get("usage") or (event.get("message") or {}).get("usage") or {}
            told = (name for name in _TOKEN_KINDS if isinstance(usage.get(name), int))
            self._usage |= {name: usage[name] for name in told}
            if event["type"] == "content_block_delta" and not self._has_delta:
                self._has_delta = True
                seconds = time.monotonic() - self._started_at
                log.info("event=first_delta id=%s ms=%d", self.request_id, seconds * 1000)
                self._metrics.add("cc2api_first_delta_seconds", seconds)

    def debug(self, what: str, data: bytes) -> None:
        """Log a request or a response whole, under --debug; a line stays a line."""
        if log.isEnabledFor(logging.DEBUG):
            text = json.dumps(data.decode("utf-8", "replace"), ensure_ascii=False)
            log.debug("event=%s id=%s body=%s", what, self.request_id, text)

    def close(self, status: int) -> None:
        """Count it, and write the log line of its end."""
        seconds = time.monotonic() - self._started_at
        caller = str(self._notes.get("key", "none"))
        labels = {"model": self._model, "caller": caller, "status": str(status)}
        self._metrics.add("cc2api_requests_total", route=self._route, **labels)
        if self.has_turn:
            self._metrics.add("cc2api_request_seconds", seconds, route=self._route)
        for name, count in self._usage.items():
            self._metrics.add("cc2api_tokens_total", count, kind=_TOKEN_KINDS[name], caller=caller)
        self.note(**self._usage, status=status, ms=round(seconds * 1000))
        pairs = " ".join(f"{name}={value}" for name, value in self._notes.items())
        # those that watch the gateway itself come every few seconds
        is_watching = self._route in ("status", "healthz", "metrics") and status == 200
        log.log(logging.DEBUG if is_watching else logging.INFO, "event=done %s", pairs)


# ====================================================================== Service
# What the routes ask: a turn in, batches of events out. Owns the pool and the key file; knows
# nothing of sockets. Runs on request threads.


class Service:
    """The running service behind the HTTP server."""

    def __init__(self, settings: Settings, cli: Cli, environ: Mapping[str, str]) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.keys = KeyFile(settings)
        self.rate_limits: dict[str, str] = {}  # the plan's state as headers, as last reported
        self.is_login = not wants_bare(settings.bare, environ)
        self._cli, self._environ = cli, environ
        self._sign_in = IN_DEMO if settings.demo else UNKNOWN
        self._ask_at = float("inf" if settings.demo else 0)  # monotonic; when the CLI is asked next
        self._models: list[JsonObject] = []  # the CLI's, as the last process told them
        self._model_map = dict(pair.split("=", 1) for pair in settings.model_map)
        self._padding: dict[str, int] = {}  # tokens of a padding tool, by model
        self._workplace = Workplace(Path(tempfile.gettempdir()), config_dir_of(environ))
        temp_dir = str(self._workplace.temp_dir)
        command, environment = process_start(cli, settings, environ, temp_dir)

        def start() -> Session:
            os.stat(cli.path)  # raises the OSError that a shim around the CLI would hide
            self._workplace.prepare()
            return Session(Process(command, environment, str(self._workplace.work_dir)))

        self.pool = Pool(start, Fleet(settings), self._note_end)

    def close(self) -> None:
        """End all processes and remove their temporary directory."""
        self.pool.close()
        self._workplace.clean_up()

    def answer(
        self, turn: Turn, caller: Caller, tick: Callable[[], None], record: Record
    ) -> Generator[list[Event], None, None]:
        """Yield the answer's events, in batches of those that were ready together, to message_stop.

        Raises ApiError, and what `tick` does, at least every TICK_S. To close it ends the turn.
        """
        demand = self._demand(turn, caller, tick)
        last: list[Event] = []
        while not last:
            with self._lend(demand) as session:
                used = "kept" if session.turns else "spare"
                record.note(process="new" if session.is_new else used)
                check_media(turn, resolve_model(demand.turn.model, session.models))
                session.bring(demand)
                session.ask(demand.patience)
                try:
                    last = yield from session.read(demand.patience)
                finally:
                    self.rate_limits = session.reader.rate_limits or self.rate_limits
        yield last  # when the session is back: the next request finds it there

    def count_tokens(self, turn: Turn, caller: Caller, tick: Callable[[], None]) -> int:
        """Return how many input tokens a turn has, by the API's own count; nothing is generated."""
        demand = self._demand(turn, caller, tick)
        turn = demand.turn

        def count(*tools: JsonObject) -> tuple[int, int]:
            # with a system prompt that was never counted before (`to_counts`)
            system = " ".join(uuid.uuid4().hex)
            fresh = dataclasses.replace(turn, system=system, tools=list(tools), marked=None)
            of = dataclasses.replace(demand, turn=fresh, is_count=True)
            while True:
                with self._lend(of) as session:
                    check_media(turn, resolve_model(turn.model, session.models))
                    return to_counts(session.count(of))

        if not turn.tools:
            return count()[0]
        if turn.model not in self._padding:
            self._padding[turn.model] = count(*PADDING_TOOLS)[1] - count(PADDING_TOOLS[0])[1]
        total, in_tools = count(*turn.tools, PADDING_TOOLS[0])
        return total + max(0, in_tools + COUNTED_TOOLS_DEDUCTION - self._padding[turn.model])

    def models(self, caller: Caller, tick: Callable[[], None]) -> list[JsonObject]:
        """Return the models as the CLI lists them; every request that is served refreshes them."""
        demand = self._demand(REHEARSALS[0], caller, tick)
        while not self._models:
            with self._lend(demand) as session:
                if session.is_new:
                    session.bring(demand)
                return session.models
        return self._models

    def model_id(self, name: str) -> str:
        """Return the id behind an alias, a mapped name, or an id itself."""
        return resolve_model(self._model_map.get(name, name), self._models).removesuffix("[1m]")

    def knows(self, model: str) -> bool:
        """Say whether the CLI lists a model, by its name or its id."""
        ids = {str(m.get(key)) for m in self._models for key in ("value", "resolvedModel")}
        return model in ids or model in (DEFAULT_MODEL_NAME, *self._model_map)

    def sign_in(self) -> str:
        """Return how the CLI is signed in; that and its version are asked every SIGN_IN_S."""
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + SIGN_IN_S
            with contextlib.suppress(CliUnusable):
                self._cli = find_cli(self._cli.path, self._environ)
                self._sign_in = ask_sign_in(self._cli, self._environ, bare=not self.is_login)
        return self._sign_in

    def describe(self, url: str) -> dict[str, str]:
        """Say what it runs on, who pays, who may call, and how, where clients see it at `url`."""
        sign_in, key = self.sign_in(), " -H 'x-api-key: YOUR-KEY'" * (self.keys.load() != {})
        body = '{"model":"sonnet","max_tokens":100,"messages":[{"role":"user","content":"Hello!"}]}'
        lines = {
            "claude": str(self._cli),
            "sign-in": sign_in,
            "upstream": "" if self.settings.demo else upstream_url(self._environ),
            "keys": self.keys.who,
            "page": f"{url}/",
            "try": f"curl {url}/v1/messages{key} -d '{body}'",
        }
        return {name: text for name, text in lines.items() if text}

    def gauges(self) -> dict[str, dict[str, int]]:
        """Return what /metrics tells of now, by name and labels."""
        pids, waiting = self.pool.snapshot()
        processes = {f'{{state="{name}"}}': len(pids[name]) for name in pids}
        signed_in = int(not self.sign_in().startswith(NOT_SIGNED_IN))
        more = {"cc2api_waiting_requests": {"": waiting}, "cc2api_signed_in": {"": signed_in}}
        return {"cc2api_processes": processes, **more}

    @contextlib.contextmanager
    def _lend(self, demand: Demand) -> Iterator[Session]:
        """Lend a session; where it dies before it has asked, that passes silently: lend again."""
        session = self.pool.acquire(demand)
        try:
            yield session
        except ProcessDied as death:
            demand.note_death(death)
            forget_frames(death)
        finally:
            usable = False
            try:
                usable = session.rest()
            except Exception as exc:  # noqa: BLE001 - whatever it is, there may be a whole answer
                log.warning("a process is given up: %s", str(exc) or repr(exc))
                forget_frames(exc)
            if not usable:
                session.process.kill()  # first of all: it may be about to call upstream
            try:
                self._models = session.models or self._models
                self._note_cost(session)
            finally:
                self.pool.give_back(session, usable=usable)

    def _note_end(self, session: Session) -> None:
        """Do what is left to do of a process that has ended."""
        self._workplace.forget_killed()
        self._note_cost(session)

    def _note_cost(self, session: Session) -> None:
        """Count what a process has told of its cost: of the turns before the one just ended."""
        if session.base and (cost := session.take_cost()):
            self.metrics.add("cc2api_cost_dollars_total", cost, caller=session.base[0].name)

    def _demand(self, turn: Turn, caller: Caller, tick: Callable[[], None]) -> Demand:
        turn = for_login(turn) if self.is_login else turn
        mapped = dataclasses.replace(turn, model=self._model_map.get(turn.model, turn.model))
        limit_s = self.settings.timeout
        late = ApiError(f"no whole answer within {limit_s:g} s", status=504, should_retry=False)
        return Demand(mapped, (caller, turn.betas), Patience(limit_s, tick, late))


def with_reset(error: ApiError, limits: Mapping[str, str]) -> ApiError:
    """Tell when a plan's used-up window opens again; clients would retry in vain until then."""
    reset = limits.get("anthropic-ratelimit-unified-reset", "")
    rejected = limits.get("anthropic-ratelimit-unified-status") == "rejected"
    if not (error.status == 429 and rejected and reset.isdigit()):
        return error
    left_s = max(1, int(reset) - int(time.time()))
    return dataclasses.replace(error, retry_after_s=left_s, should_retry=left_s <= LONGEST_RETRY_S)


# ======================================================================= Status
# What the gateway tells of itself at / : a text, and a page with a box to try a prompt in.


def status_text(service: Service, url: str) -> str:
    """Return in plain text how things are; `url` is where the client sees the gateway."""
    pool, sign_in, metrics = service.pool, service.sign_in(), service.metrics
    missing = sign_in if sign_in.startswith(NOT_SIGNED_IN) else ""
    (pids, waiting), asked, failed = pool.snapshot(), 0.0, 0.0
    for labels, count in metrics.series("cc2api_requests_total"):
        if labels["route"] in ("messages", "chat_completions", "responses"):
            asked += count
            failed += count * ("499" != labels["status"] >= "400")
    tokens = dict.fromkeys(_TOKEN_KINDS.values(), 0.0)
    for labels, count in metrics.series("cc2api_tokens_total"):
        tokens[labels["kind"]] += count
    cost = sum(dollars for _, dollars in metrics.series("cc2api_cost_dollars_total"))
    hours, seconds = divmod(int(time.monotonic() - metrics.started_at), 3600)
    lines = {
        f"cc2api {__version__}": f"up {hours} h {seconds // 60} min",
        **service.describe(url),
        "processes": ", ".join(f"{len(pids[name])} {name}" for name in ("spare", "idle", "busy")),
        "requests": f"{asked:.0f}, {failed:.0f} failed, {waiting} waiting",
        "tokens": ", ".join(f"{count:.0f} {kind}" for kind, count in tokens.items()),
        "cost": f"${cost:.4f}" + " at list price" * (service.is_login or service.settings.demo),
        "health": pool.failure or pool.refusal or missing or "ok",
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


# ========================================================================= HTTP
# Sockets, framing, and the writing of one answer. Framing is strict: a proxy in front that reads it
# differently could be made to smuggle requests in. No response header is built from client text.

# None of these may try one byte in two ways: hostile input would take minutes.
_REQUEST_LINE: Final = re.compile(r"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])")
# The forms of a target (RFC 9112, 3.2): a path, or as proxies are sent it, or of the whole server.
_TARGET: Final = re.compile(
    r"(?:[Hh][Tt][Tt][Pp][Ss]?://([^/?#@]+))?(/[^?]*|(?=\?|\Z))(?:\?.*)?|(\*)"
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
        return self.headers.get(name, "")


class ClientStream(io.RawIOBase):
    """The client's end of a connection: `read_head`, `expect_body`, then perhaps `read_body`.

    All raise ClientGone, and for bad framing InvalidRequest, with 408 where nothing comes in time.
    A client may read nothing for `patience_s`.
    """

    def __init__(self, sock: socket.socket, patience_s: float) -> None:
        self.body_length: int | None = 0  # of what is still to be read; None: nobody knows
        self._sock, self._patience_s = sock, patience_s
        self._deadline = 0.0  # of what is being read
        self._reader = io.BufferedReader(self)
        self._watch = select.poll()
        self._watch.register(sock, select.POLLIN | _HANGUP)

    def read_head(self, idle_s: float) -> Head:
        """Read the next request's head, waiting up to `idle_s` for its first byte."""
        self.body_length = None
        self._deadline = time.monotonic() + idle_s
        self._reader.peek(1)
        self._deadline = time.monotonic() + HEAD_TIMEOUT_S
        first, *lines = self._read_lines() or self._read_lines() or [""]  # RFC 9112: one may be
        if (request := _REQUEST_LINE.fullmatch(first)) is None:
            raise InvalidRequest("malformed request line")
        headers: dict[str, str] = {}
        for line in lines:
            if (header := _HEADER_LINE.fullmatch(line)) is None:
                raise InvalidRequest("malformed header line")
            name, value = header[1].lower(), header[2].strip(" \t")
            headers[name] = f"{headers[name]},{value}" if name in headers else value
        is_http_11 = request[3] == "1"
        if "," in headers.get("host", "") or (is_http_11 and "host" not in headers):
            raise InvalidRequest("exactly one Host header is needed")
        target = _TARGET.fullmatch(request[2])
        if target is None or (target[3] and request[1] != "OPTIONS"):
            raise InvalidRequest("malformed request target")
        if target[1]:
            headers["host"] = target[1]  # it wins (RFC 9112, 3.2.2)
        path = urllib.parse.unquote(target[3] or target[2] or "/")
        return Head(request[1], path, is_http_11, headers)

    def expect_body(self, head: Head) -> None:
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
        self._deadline = time.monotonic() + BODY_TIMEOUT_S
        length = self.body_length
        body = self._read_chunks() if length is None else self._reader.read(length)
        self.body_length = 0
        return body

    def _read_chunks(self) -> bytes:
        body = bytearray()
        while line := _CHUNK_LINE.fullmatch(self._read_line()):
            size = int(line[1], 16)
            if len(body) + size > MAX_BODY_BYTES:
                raise InvalidRequest(_TOO_LARGE, status=413)
            if not size:
                self._read_lines()  # trailers: dropped
                return bytes(body)
            body += self._reader.read(size)
            if self._reader.read(2) != b"\r\n":
                raise InvalidRequest("a chunk is longer than announced")
        raise InvalidRequest("malformed chunk")

    def _read_lines(self) -> list[str]:
        """Read the lines of a head, or of trailers, up to an empty one."""
        lines, left = [], MAX_HEAD_BYTES
        while line := self._read_line(left):
            lines.append(line)
            left -= len(line) + 2
            if len(lines) > MAX_HEADERS + 1:  # with the request line
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
        """Read what comes before the deadline: what its reader calls."""
        try:
            if (left := self._deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            if count := self._sock.recv_into(buffer):
                return count
        except TimeoutError:
            raise InvalidRequest("the request did not come in time", status=408) from None
        except OSError as exc:
            raise ClientGone from exc
        raise ClientGone

    def check(self) -> None:
        """Raise ClientGone where the client has closed its end. Does not block."""
        try:
            seen = self._watch.poll(0)
            if any(e & _HANGUP or not self._sock.recv(1, socket.MSG_PEEK) for _, e in seen):
                raise ConnectionError
        except OSError as exc:
            raise ClientGone from exc

    def send(self, data: bytes) -> None:
        self._sock.settimeout(self._patience_s)
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise ClientGone from exc

    def linger(self) -> None:
        """Say that nothing more comes, and read on for a moment what the client still sends."""
        self._deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError, InvalidRequest, ClientGone):
            self._sock.shutdown(socket.SHUT_WR)
            while True:
                self.readinto(bytearray(READ_BYTES))


class Response:
    """The answer to one request, whole or a stream."""

    def __init__(self, stream: ClientStream, head: Head, headers: Mapping[str, str]) -> None:
        self.status = 0  # what was sent, 0 while nothing was
        self.closes = True  # the connection ends with it
        self._stream, self._head, self._headers = stream, head, dict(headers)
        self.written_at = time.monotonic()  # last

    def add_headers(self, headers: Mapping[str, str]) -> None:
        self._headers |= headers

    def send(self, status: int, body: JsonObject | str, kind: str = "application/json") -> bytes:
        """Write a whole answer, its body but for HEAD, and with 204 none; return the body."""
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode("ascii") + b"\n"
        sized = {"content-type": kind, "content-length": str(len(data))} if status != 204 else {}
        self._stream.send(self._to_head(status, sized) + data * (self._head.method != "HEAD"))
        return data

    def write_chunk(self, data: bytes, *, is_last: bool = False) -> None:
        """Write a part of a stream with one write, the first one behind its head."""
        if not data:  # an empty chunk would end the body
            return
        headers = {"content-type": "text/event-stream; charset=utf-8"}
        if self._head.is_http_11:  # else the end of the connection is the end of the body
            headers["transfer-encoding"] = "chunked"
            data = b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if is_last else b"")
        if not self.status:
            data = self._to_head(200, headers) + data
        self._stream.send(data)
        self.written_at = time.monotonic()

    def _to_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the status line and headers; all names and values are our own."""
        self.status = status
        keeps = self._head.is_http_11 and "close" not in self._head.get("connection").lower()
        # behind a body that was not read nobody knows where the next request begins
        self.closes = not keeps or self._stream.body_length != 0
        lines = [
            f"HTTP/1.1 {status} {BaseHTTPRequestHandler.responses.get(status, ('Error',))[0]}",
            f"server: cc2api/{__version__}",
            f"date: {email.utils.formatdate(usegmt=True)}",
            f"connection: {'close' if self.closes else 'keep-alive'}",
            "cache-control: no-store",
            *(f"{name}: {value}" for name, value in {**self._headers, **headers}.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("ascii")


class Server(ThreadingHTTPServer):
    """The listening socket; every connection gets a thread that runs the handler it is given."""

    allow_reuse_port = False  # some Pythons would let a second gateway listen on the same port
    request_queue_size = LISTEN_BACKLOG
    server_bind = TCPServer.server_bind  # HTTPServer's asks DNS for our own name

    def __init__(self, address: tuple[str, int], handler: type[BaseRequestHandler]) -> None:
        """Bind and listen. Raises OSError. `serve` comes next."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.service: Any = None  # what the handlers serve
        self.answers: set[object] = set()  # that are running
        self.parsing = threading.Lock()  # whoever holds it parses a large body
        super().__init__(address, handler)
        self.server_port: int = self.server_address[1]

    def serve(self, service: object) -> None:
        """Have the handlers serve this, each in a thread, until `shutdown` and `server_close`."""
        self.service = service
        tick = [ACCEPT_TICK_S]
        threading.Thread(None, self.serve_forever, "cc2api-accept", tick, daemon=True).start()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer as running."""
        one = object()
        self.answers.add(one)
        try:
            yield
        finally:
            self.answers.discard(one)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Run a connection's handler; beyond MAX_CONNECTIONS it is closed at once."""
        if threading.active_count() <= MAX_CONNECTIONS:
            super().finish_request(request, client_address)
        else:
            log.warning("over %d connections: one was turned away", MAX_CONNECTIONS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a connection that broke is no news
            log.exception("connection from %s failed", client_address)


# ======================================================================= Routes
# Which path does what, who may call it, and the one place where errors become answers. A new route
# is a row in ROUTES and a function of a Handler; a new API that asks a model is a Dialect.

# Localhost and IP addresses: no name in the DNS has one of these forms.
_OWN_NAME: Final = re.compile(r"localhost|[0-9.]+|\[[0-9a-f:.]+\]")


def to_frames(*events: JsonObject) -> bytes:
    """Return SSE frames, named where there is a type; ASCII: some clients split at U+2028."""
    return "".join(
        (f"event: {event['type']}\n" if "type" in event else "") + f"data: {json.dumps(event)}\n\n"
        for event in events
    ).encode("ascii")


def to_anthropic_error(error: ApiError) -> tuple[int, JsonObject]:
    """Return an error's status, and the Messages API's envelope."""
    inner = {"type": error.kind, "message": str(error), "details": error.details}
    return error.status, {"type": "error", "error": without_nulls(inner)}


class Dialect(NamedTuple):
    """An API that asks a model: how its requests are read, and its errors written."""

    read: Callable[..., tuple[Turn, AnswerWriter]]  # a body, anthropic-beta, is_count=
    to_error: Callable[[ApiError], tuple[int, JsonObject]]


ANTHROPIC: Final = Dialect(
    lambda *asked, **how: (parse_messages_request(*asked, **how), AnswerWriter()),
    to_anthropic_error,
)
OPENAI: Final = Dialect(lambda body, betas, **how: parse_chat_request(body), to_openai_error)
RESPONSES: Final = Dialect(
    lambda body, betas, **how: parse_responses_request(body, **how), to_responses_error
)


def cors_headers(head: Head, settings: Settings) -> dict[str, str]:
    """Return the headers that let a page of this origin read the answer; none for others."""
    for allowed in settings.cors_origin:
        if allowed in ("*", head.get("origin")):
            return {
                **{"access-control-allow-origin": allowed, "vary": "origin"},
                "access-control-allow-methods": "GET, POST, OPTIONS",
                "access-control-allow-headers": "authorization, *",  # a star does not cover it
                "access-control-expose-headers": "request-id, x-request-id, retry-after",
                "access-control-max-age": "600",
            }
    return {}


def keep_pages_out(head: Head, settings: Settings) -> None:
    """Refuse pages of other origins, and of names made to resolve to us (rebinding): ApiError."""
    origin, host = head.get("origin"), head.get("host")
    names = ("", *map(str.lower, settings.allowed_host))
    name = re.sub(r":\d*\Z", "", host).lower()
    if name not in names and not _OWN_NAME.fullmatch(name):
        raise ApiError(f"Host {quoted(name, 100)} is not served; see --allowed-host", 403)
    is_own = origin in ("", f"http://{host}", f"https://{host}")
    if not is_own and not cors_headers(head, settings):
        raise ApiError(f"pages of {quoted(origin, 100)} may not call; see --cors-origin", 403)


class Handler(BaseRequestHandler):
    """One connection, with a thread of its own: reads request after request and routes each."""

    server: Server
    request: socket.socket

    def handle(self) -> None:
        # an event must not wait for the ACK of the one before
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._service: Service = self.server.service
        self._stream = ClientStream(self.request, self._service.settings.timeout)
        try:
            self._answer_all()
        except ClientGone as gone:
            forget_frames(gone)
        self._stream.linger()

    def _answer_all(self) -> None:
        """Answer request after request, until the connection ends. Raises ClientGone."""
        idle_s = HEAD_TIMEOUT_S
        try:
            while self.server.fileno() >= 0:  # until it stops
                head = self._stream.read_head(idle_s)
                with self.server.answering():
                    self._answer(head)
                if self._out.closes:
                    break
                idle_s = IDLE_CONNECTION_S
        except InvalidRequest as error:
            if error.status != 408:  # to who has not sent a whole head nothing is said
                self._answer(Head("-", "-", True, {}), error)

    def _answer(self, head: Head, failure: ApiError | None = None) -> None:
        """Run a route; whatever it raises is answered here and nowhere else. Raises ClientGone."""
        path = re.sub(r"\A(/v1)+(?=/)", "", head.path)
        path = "/models/" if path.startswith("/models/") else path
        path = "page" if path == "/" and "text/html" in head.get("accept") else path
        route = ROUTES.get(path, NO_ROUTE)
        client, service = str(self.client_address[0]), self._service
        self._record = Record(service.metrics, route.name, client, head.method, head.path)
        ids = dict.fromkeys(("request-id", "x-request-id"), self._record.request_id)
        self._out = Response(self._stream, head, ids | cors_headers(head, service.settings))
        self._head, self._route = head, route
        self._writer: AnswerWriter | None = None  # of a stream
        try:
            if failure:
                raise failure
            self._stream.expect_body(head)
            self._run(route)
            status = self._out.status
        except ClientGone:
            self._record.close(499)  # nginx's code for it; nobody is sent it
            raise
        except ApiError as error:
            status = self._fail(error)
            forget_frames(error)
        except Exception as exc:
            log.exception("id=%s failed", self._record.request_id)
            status = self._fail(ApiError("internal error"))
            forget_frames(exc)
        self._record.close(status)

    def _fail(self, error: ApiError) -> int:
        """Answer with an error: JSON with its status, or an event where a stream has begun."""
        error = with_reset(error, self._service.rate_limits)
        self._record.note(error=error.kind)
        if error.status != 400:  # its message may quote the prompt
            self._record.note(msg=json.dumps(str(error)[:200]))
        self._record.debug("error", str(error).encode("utf-8", "replace"))
        status, body = self._route.dialect.to_error(error)
        if self._route.dialect is ANTHROPIC:
            body["request_id"] = self._record.request_id
        if self._record.has_turn:
            self._out.add_headers(self._service.rate_limits)
        should_retry = False if (error.status, status) == (402, 429) else error.should_retry
        told = without_nulls({"retry-after": error.retry_after_s, "x-should-retry": should_retry})
        self._out.add_headers({name: str(value).lower() for name, value in told.items()})
        writer, may_be_paid = self._writer, error.status in (502, 504)
        with contextlib.suppress(ClientGone):
            if writer and (self._out.status or (writer.fails_in_stream and may_be_paid)):
                self._out.write_chunk(to_frames(*writer.fail(error, body)), is_last=True)
            else:
                self._out.send(status, body)
        return error.status  # though the client of a stream has had a 200

    def _run(self, route: Route) -> None:
        head, service = self._head, self._service
        if self.server.fileno() < 0:
            raise CliFailed("the gateway is shutting down", status=503)
        keys = service.keys.load()
        if keys == {} and route.name != "healthz":
            keep_pages_out(head, service.settings)
        allow = {"allow": f"{route.method}, OPTIONS"}
        if head.method == "OPTIONS":
            self._out.add_headers(allow)
            self._out.send(204, "")
            return
        if route is NO_ROUTE:
            raise ApiError(f"{head.method} {head.path}: no such route", status=404)
        if head.method != route.method and (head.method, route.method) != ("HEAD", "GET"):
            self._out.add_headers(allow)
            # by 426 Codex learns to come without a WebSocket, at once (responses-api.md 2.5)
            status = 426 if head.get("upgrade") else 405
            raise ApiError(f"{head.method} is not allowed here, {route.method} is", status)
        if route.needs_key:
            self._caller = identify(keys, head.get("x-api-key"), head.get("authorization"))
            self._record.note(key=self._caller.name)
        route.run(self)

    def status(self) -> None:
        # it stands in a command that people copy: nothing that a shell would act on
        url = "http://" + re.sub(r"[^A-Za-z0-9.:\[\]-]", "_", self._head.get("host"))
        self._out.send(200, status_text(self._service, url), "text/plain; charset=utf-8")

    def page(self) -> None:
        policy = "default-src 'self' 'unsafe-inline'; img-src data:"
        self._out.add_headers({"content-security-policy": policy})
        self._out.send(200, PAGE, "text/html; charset=utf-8")

    def metrics(self) -> None:
        text = self._service.metrics.render(self._service.gauges())
        self._out.send(200, text, "text/plain; version=0.0.4; charset=utf-8")

    def healthz(self) -> None:
        if failure := self._service.pool.failure:
            raise CliFailed(failure, status=503)
        self._out.send(200, {"status": "ok"})

    def models(self) -> None:
        """Answer all models on one page, which both SDKs' paging takes, or one by id or alias."""
        models = to_model_list(self._service.models(self._caller, self._tick))
        by_id = {model["id"]: model for model in models}
        if name := self._head.path.partition("/models/")[2]:
            if not (body := by_id.get(self._service.model_id(name))):
                raise ApiError(f"model: {name}", status=404)
        else:
            ids = [*by_id] or [None]
            body = {"object": "list", "data": models, "has_more": False}
            body |= {"first_id": ids[0], "last_id": ids[-1]}
        self._out.send(200, body)

    def count_tokens(self) -> None:
        turn, _ = self._read_asked(is_count=True)
        count = {"input_tokens": self._service.count_tokens(turn, self._caller, self._tick)}
        self._record.note(**count)
        kind = {"object": "response.input_tokens"} if self._route.dialect is RESPONSES else {}
        self._out.send(200, {**kind, **count})

    def ask(self) -> None:
        """Have a model answer: write its events as they come, or the whole message."""
        service, record, out = self._service, self._record, self._out
        turn, writer = self._read_asked()
        if turn.stream:
            self._writer = writer
        with contextlib.closing(service.answer(turn, self._caller, self._tick, record)) as answer:
            for batch in answer:
                out.add_headers(service.rate_limits)
                with upstream_protocol():
                    events = [written for event in batch for written in writer.feed(event)]
                    record.note_events(batch)
                if turn.stream:
                    is_last = batch[-1:] == [{"type": "message_stop"}]
                    frames = to_frames(*events) + writer.end * is_last
                    out.write_chunk(frames, is_last=is_last)
                    record.debug("response", frames)
        if not turn.stream:
            with upstream_protocol():
                body = writer.whole()
            record.debug("response", out.send(200, body))

    def _tick(self) -> None:
        """Look after the client while it waits: see whether it left, show a stream life."""
        self._stream.check()
        if self._writer and time.monotonic() - self._out.written_at >= KEEPALIVE_S:
            self._out.write_chunk(to_frames(*self._writer.live()) or b": waiting\n\n")

    def _read_asked(self, *, is_count: bool = False) -> tuple[Turn, AnswerWriter]:
        if self._head.get("content-encoding").lower() not in ("", "identity"):
            details = {"error_code": "request_body_encoding_unsupported"}
            raise InvalidRequest("Content-Encoding: only identity is taken", details=details)
        if self._head.get("expect").lower() == "100-continue":
            self._stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = self._stream.read_body()
        self._record.debug("request", raw)
        with self._turn_to_parse(len(raw)):
            body, betas = parse_json(raw), self._head.get("anthropic-beta")
            turn, writer = self._route.dialect.read(body, betas, is_count=is_count)
        self._record.note_turn(turn, is_known=self._service.knows(turn.model))
        return turn, writer

    @contextlib.contextmanager
    def _turn_to_parse(self, size: int) -> Iterator[None]:
        """Wait until no other large body is parsed.

        It keeps the interpreter busy for a second, and takes several times its size in memory.
        """
        if size <= MAX_BYTES_AT_ONCE:
            yield
            return
        while not self.server.parsing.acquire(timeout=TICK_S):
            self._tick()
        try:
            yield
        finally:
            self.server.parsing.release()


class Route(NamedTuple):
    """What a path does: its name for the metrics, and the Handler's function that does it."""

    method: str
    name: str
    run: Callable[[Handler], None]
    dialect: Dialect = ANTHROPIC
    needs_key: bool = True


# Without their /v1: a base URL is configured with it or without, and some clients add one.
ROUTES: Final = {
    "/": Route("GET", "status", Handler.status),
    "page": Route("GET", "status", Handler.page, needs_key=False),  # the same, for browsers
    "/healthz": Route("GET", "healthz", Handler.healthz, needs_key=False),
    "/metrics": Route("GET", "metrics", Handler.metrics),
    "/api/hello": Route("GET", "hello", Handler.healthz),  # Claude Code's own probe
    "/messages": Route("POST", "messages", Handler.ask),
    "/messages/count_tokens": Route("POST", "count_tokens", Handler.count_tokens),
    "/chat/completions": Route("POST", "chat_completions", Handler.ask, OPENAI),
    "/responses": Route("POST", "responses", Handler.ask, RESPONSES),
    "/responses/input_tokens": Route("POST", "response_tokens", Handler.count_tokens, RESPONSES),
    "/models": Route("GET", "models", Handler.models),
    "/models/": Route("GET", "model", Handler.models),
}
NO_ROUTE: Final = Route("GET", "none", Handler.healthz, needs_key=False)


# ========================================================================= Demo
# What `--demo` puts in the API's place: a script on loopback, so that all the rest can be tried.


class DemoApi(BaseHTTPRequestHandler):
    """Answers each call as the API would, in words that say DEMO, or counts tokens."""

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        body, is_count = json.loads(raw), "count_tokens" in self.path
        self.send_response(200)
        self.send_header("content-type", "application/json" if is_count else "text/event-stream")
        self.end_headers()
        asked = as_blocks(body["messages"][-1]["content"])[-1].get("text")
        words = re.findall(r"\S+\s*", f"DEMO: no model was asked. You said: {asked}"[:DEMO_CHARS])
        usage = {"input_tokens": len(raw) // 4, "output_tokens": len(words)}
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        message: JsonObject = {"type": "message", "role": "assistant", "content": []}
        message |= {"id": f"msg_{uuid.uuid4().hex}", "model": body["model"], "usage": usage}
        block = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": word} for word in words]
        events: list[Event] = [
            {"type": "message_start", "message": {**message, **dict.fromkeys(end)}},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": end, "usage": usage},
            {"type": "message_stop"},
        ]
        for frame in [json.dumps(usage).encode()] if is_count else map(to_frames, events):
            self.wfile.write(frame)
            time.sleep(DEMO_WORD_S)

    def log_message(self, *args: object) -> None:
        """Say nothing: the gateway's own log tells."""


def start_demo(settings: Settings, environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Start the script; return settings and an environment in which no account is used."""
    server = Server(("127.0.0.1", 0), DemoApi)
    server.serve(None)
    foreign = ("ANTHROPIC_", "CLAUDE_CODE_USE_", "CLAUDE_CODE_OAUTH_")
    kept = {name: value for name, value in environ.items() if not name.startswith(foreign)}
    kept |= {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    kept |= {"ANTHROPIC_API_KEY": "demo", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    kept |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    return dataclasses.replace(settings, bare=True, setting_sources=""), kept


# ================================================================= Command line
# Options, logging, signals, and putting the parts together.

# How long a thread that computes keeps the others waiting. Python's 5 ms would add up for a stream,
# which waits several times for each event.
SWITCH_INTERVAL_S: Final = 0.001
MAX_LOG_BACKLOG_CHARS: Final = 4_000_000  # of lines that wait; some 20,000
STDERR: Final = 2  # its descriptor
LOG_FLUSH_S: Final = 1.0  # at the end, for a stderr that is read
LARGE_BLOCK_BYTES: Final = 1024 * 1024  # of memory; few are so large but those of large bodies
_M_MMAP_THRESHOLD: Final = -3  # malloc.h


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings. Wrong options end the process with status 2, as argparse does."""
    usage = argparse.SUPPRESS  # it would stand before each problem, which then is one line
    about = "The Claude Code CLI on this machine as an Anthropic Messages API."
    more = "Every option can be given as a variable too: --port 8080 is CC2API_PORT=8080."
    parser = argparse.ArgumentParser("cc2api", usage, about, more)
    parser.add_argument("--version", action="version", version=f"cc2api {__version__}")
    options: dict[str, dataclasses.Field[Any]] = {}  # by flag and by variable
    for option in dataclasses.fields(Settings):
        flag, text = "--" + option.name.replace("_", "-"), option.metadata["help"]
        options |= {flag: option, "CC2API_" + option.name.upper(): option}
        action: Any = "store"
        if option.default == ():
            action, text = "append", f"{text}; repeatable"
        elif "bool" in str(option.type):
            action = argparse.BooleanOptionalAction
        elif option.default not in (None, ""):
            text += f" (default: {option.default})".replace(".0)", ")")
        parser.add_argument(flag, action=action, default=None, help=text)
    said: dict[str, Any] = {k: v for k, v in environ.items() if v and k.startswith("CC2API_")}
    flags = vars(parser.parse_args(argv)).items()  # they win
    said |= {"--" + name.replace("_", "-"): value for name, value in flags if value is not None}
    chosen = {}
    for said_by, value in said.items():
        if said_by in options:
            try:
                chosen[options[said_by].name] = _to_setting(value, options[said_by])
            except ValueError as exc:
                parser.error(f"{said_by}: {exc}")
        else:
            parser.error(f"{said_by}: there is no such option")
    return Settings(**chosen)


def _to_setting(said: Any, option: dataclasses.Field[Any]) -> Any:
    """Return what a flag or a variable says, as the option has it. Raises ValueError."""
    kind, told, wanted = str(option.type), option.metadata, option.metadata["help"]
    value = said
    if "bool" in kind:
        switches = {"1": True, "true": True, "0": False, "false": False}
        value, wanted = switches.get(str(said).lower()), "1 or 0"
    elif kind in ("int", "float"):
        value, wanted = None, f"a number from {told['low']:g} to {told['high']:.0f}"
        with contextlib.suppress(ValueError):
            number = int(said) if kind == "int" else float(said)
            value = number if told["low"] <= number <= told["high"] else None
    elif "tuple" in kind:
        parts = said if isinstance(said, list) else said.split(",")
        value = tuple(filter(None, (part.strip().removesuffix("/") for part in parts)))
        value = value if all(re.fullmatch(told["form"], part) for part in value) else None
    if value is None:
        raise ValueError(f"{said!r} does not fit: {wanted}")
    return value


class LogHandler(logging.Handler):
    """Writes log lines to stderr, on a thread of its own.

    Nothing waits for whoever reads them: a terminal that is stopped, or a pager. Up to
    MAX_LOG_BACKLOG_CHARS wait to be written, what is over is dropped and counted. A stderr that
    cannot be written to, as on a full disk, loses lines and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()  # guards what follows
        self._lines: collections.deque[str] = collections.deque()
        self._size = 0  # characters, with those that are being written
        self._dropped = 0
        threading.Thread(None, self._write_all, "cc2api-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        with self._changed:
            # One that is larger than that, a body under --debug, may still be the only one.
            if self._lines and self._size + len(line) > MAX_LOG_BACKLOG_CHARS:
                self._dropped += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, up to LOG_FLUSH_S. Called at the end of the program."""
        with self._changed:
            self._changed.wait_for(lambda: not self._size, LOG_FLUSH_S)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                dropped, self._dropped = self._dropped, 0
            text = line
            if dropped:
                lost = f"{dropped} log lines were dropped: nobody read them"
                record = logging.makeLogRecord({"levelname": "WARNING", "msg": lost})
                text = f"{self.format(record)}\n{line}"
            with contextlib.suppress(OSError):
                _write_to_stderr(text.encode("utf-8", "backslashreplace"))
            with self._changed:
                self._size -= len(line)
                self._changed.notify_all()


def _write_to_stderr(data: bytes) -> None:
    """Write, waiting as long as it takes. Raises OSError.

    Not by `sys.stderr`: the lock of its buffer would still be held at the end of the program.
    """
    while data:
        try:
            data = data[os.write(STDERR, data) :]
        except BlockingIOError:  # whoever shares it has made it so
            select.select([], [STDERR], [])


class LogFormatter(logging.Formatter):
    """Log lines as `time=... level=info event=done status=200 ...`; other words as msg="..."."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not str(record.msg).startswith("event="):
            text = f"event=note msg={json.dumps(text, ensure_ascii=False)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"time={when}.{record.msecs:03.0f}Z level={record.levelname.lower()} {text}"


def check_keys(settings: Settings) -> str:
    """Say who may call. Raises CliUnusable where nobody could, or a named file is missing."""
    keys = KeyFile(settings)
    if keys.is_named and not keys.path.exists():
        raise CliUnusable(f"there is no key file {settings.keys}: make it, or leave --keys out")
    if keys.load() is None:
        raise CliUnusable(keys.who)
    return keys.who


def is_running(settings: Settings) -> bool:
    """Say whether a cc2api answers on the port already."""
    address = settings.host, settings.port
    with contextlib.suppress(OSError), socket.create_connection(address, TICK_S) as there:
        there.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return b"server: cc2api/" in there.recv(READ_BYTES)
    return False


def listen(settings: Settings) -> Server:
    """Return the server, bound to its port. Raises CliUnusable."""
    try:
        return Server((settings.host, settings.port), Handler)
    except OSError as exc:
        why = "a cc2api runs there already" if is_running(settings) else exc.strerror or exc
        problem = f"cannot listen on {settings.host} port {settings.port}: {why}"
        raise CliUnusable(f"{problem}; choose another with --port or --host") from exc


def check_upstream(environ: Mapping[str, str], port: int) -> str:
    """Say which API the CLI will call. Raises CliUnusable where that is this gateway."""
    url = upstream_url(environ)
    with contextlib.suppress(OSError, ValueError):
        parts = urllib.parse.urlsplit(url)
        default = 443 if parts.scheme == "https" else 80
        if (host := parts.hostname) and (parts.port or default) == port:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, 0), family=family):  # goes on this machine alone
                said = f"ANTHROPIC_BASE_URL={url} is this gateway, which would call itself"
                raise CliUnusable(f"{said}: set it for the clients only")
    return url or "the CLI's own choice"


def try_start(settings: Settings, cli: Cli, environ: Mapping[str, str]) -> str:
    """Have a spare made, and say what it can. Raises CliUnusable."""
    alone = dataclasses.replace(settings, processes=1)
    with contextlib.closing(Service(alone, cli, environ)) as service:
        pool = service.pool
        while not (pool.failure or pool.refusal or pool.snapshot()[0]["spare"]):
            time.sleep(POLL_S)
        if refusal := pool.refusal:
            return f"claude starts, but each new conversation takes a process of its own: {refusal}"
        if pool.failure:
            raise CliUnusable(pool.failure)
    return "claude starts, and can be used again"


def run_check(settings: Settings, environ: Mapping[str, str]) -> int:
    """Say line by line what is in order and what to do about the rest; return the exit status."""
    logging.disable()  # what would be logged stands in the lines
    found: dict[str, Any] = {}

    def port() -> str:
        if is_running(settings):
            return f"a cc2api runs on {settings.host} port {settings.port} already"
        with listen(settings):
            return f"{settings.host} port {settings.port} is free"

    def sign_in() -> str:
        bare = wants_bare(settings.bare, environ)
        now = IN_DEMO if settings.demo else ask_sign_in(found["claude"], environ, bare=bare)
        if now.startswith(NOT_SIGNED_IN):
            raise CliUnusable(now)
        return now

    steps: dict[str, Callable[[], Any]] = {
        "keys": lambda: check_keys(settings),
        "port": port,
        "upstream": lambda: check_upstream(environ, settings.port),
        "claude": lambda: find_cli(settings.claude, environ),
        "sign-in": sign_in,
        "start": lambda: try_start(settings, found["claude"], environ),
    }
    for name, step in steps.items():
        try:
            found[name] = step()
            print(f"{name:<9}ok    {found[name]}", flush=True)
        except CliUnusable as exc:
            print(f"{name:<9}FAIL  {exc}", flush=True)
            if name == "claude":
                break
    return int(len(found) < len(steps))


def give_memory_back() -> None:
    """Have the C library give large blocks back to the system when they are freed.

    By itself glibc keeps more with each large block that is freed, up to 64 MB for each thread
    (mallopt(3), M_MMAP_THRESHOLD): after a few large bodies some hundred megabytes.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def serve(settings: Settings, environ: Mapping[str, str]) -> int:
    """Serve until a signal; then let running answers finish, until `--drain` or a second one."""
    check_keys(settings)
    cli, server = find_cli(settings.claude, environ), listen(settings)
    check_upstream(environ, server.server_port)
    give_memory_back()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    signals: list[int] = []
    is_up = False

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        if not is_up:
            raise KeyboardInterrupt  # out of what waits for the CLI to tell of itself

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    service = Service(settings, cli, environ)
    server.serve(service)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{server.server_port}"
    with contextlib.suppress(KeyboardInterrupt):
        listed = [f"  {name:<8} {text}" for name, text in service.describe(url).items()]
        with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
            print("\n".join([f"cc2api {__version__} listens on {url}", *listed]), flush=True)
    is_up = True
    log.info("event=start version=%s claude=%s url=%s", __version__, cli.version, url)
    # Not by an Event: the kernel may hand a signal to any thread, and a main thread that waits for
    # a lock then never runs its handler (seen, Python 3.11). This one wakes up by itself.
    while not signals:
        time.sleep(ACCEPT_TICK_S)
    server.shutdown()
    server.server_close()  # from now on no request is answered
    deadline = time.monotonic() + settings.drain
    if running := len(server.answers):
        log.warning("%d answers get %g s more; Ctrl-C cuts them off", running, settings.drain)
    while server.answers and len(signals) < 2 and time.monotonic() < deadline:
        time.sleep(ACCEPT_TICK_S)
    service.close()
    log.info("event=stop")
    return 0


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
        return (run_check if settings.check else serve)(settings, environ)
    except CliUnusable as exc:
        print(f"cc2api: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before signals are caught
        return 130


if __name__ == "__main__":
    sys.exit(main())
