"""cc2api: the Claude Code CLI on this machine as a faithful Anthropic Messages API.

A request comes in over HTTP, is checked once, and is played to a warm `claude` process over the
CLI's own stream-json protocol. The CLI makes the call with the user's own sign-in; the API's events
come back through it and go out as they arrive. Nothing here talks to Anthropic, and nothing here
sees a credential.

    client ──HTTP bytes──> Handler ──JSON──> Turn ──lines──> Child (`claude`) ──> Anthropic
      ^                    (request thread, one per connection)    |
      └───SSE frames / one message <── events <── AnswerReader <───┘ lines
                                                                   ^
                         Pool keeper thread: starts, renews and reaps children

A child goes through these states, each owned by exactly one party:

    idle (pool) ──acquire──> claimed (request) ──query──> answering ──release──> ending (pool)
                                 ^                            |
                                 └──acquire── parked (pool) <─┘ park

Rules that hold throughout:
 1. Data goes one way, and raw client JSON is looked at in one place only: Requests.
 2. One conversation of one caller, one process: nothing of it can show in another one. A parked
    child goes on only with the very conversation that it holds.
 3. Exactly one call is made upstream for one request. The CLI would make another by itself after
    some answers: it is held back from it (`Child.hold_calls`), and ended after such an answer.
 4. Prompts and keys go through pipes only: never into argv, files, an environment or the log.
 5. A stream's 200 goes out with the first event, so that a failure keeps its true status; only
    after KEEPALIVE_S of silence does it go out before.

Facts about the CLI were seen on 2.1.330 and 2.1.248 talking to a scripted API; each one relied on
is pinned by a test in tests/. Sections, each using only what stands above it: Settings, Errors, API
keys, Requests, CLI process, Pool, Events, OpenAI translation, Metrics, Gateway, HTTP, Command line.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import importlib.util
import ipaddress
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
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler
from typing import Any, ClassVar, Final, Literal, NoReturn, TypeVar, cast

__version__ = "0.1.0"

JsonObject = dict[str, Any]
_T = TypeVar("_T")
log = logging.getLogger("cc2api")

# `client_composed`, which makes prompts verbatim, came with this version (CLI changelog, and seen:
# 2.1.197 expands @paths and runs slash commands).
MIN_CLI_VERSION: Final = (2, 1, 248)
DEFAULT_SYSTEM_PROMPT: Final = "You are a helpful assistant."
DEFAULT_MODEL_NAME: Final = "claude-code"  # the name under which clients ask for the CLI's default

MAX_BODY_BYTES: Final = 32 * 1024 * 1024  # the Messages API's own limit
MAX_JSON_DEPTH: Final = 128  # deep enough for any schema; far from both languages' stack limits
MAX_MESSAGES: Final = 100_000  # the Messages API's own limit
MAX_LINE_BYTES: Final = 16 * 1024 * 1024  # of the child's output; 128k tokens are about 1 MB
READ_BYTES: Final = 64 * 1024  # a Linux pipe's capacity
STDERR_TAIL_BYTES: Final = 2000  # enough for a stack trace's first lines in an error message

CLI_PROBE_TIMEOUT_S: Final = 20.0  # `claude --version` takes 0.01 s, `claude auth status` 0.2 s
CONTROL_TIMEOUT_S: Final = 15.0  # a CLI answers its control requests within 0.1 s, starting in 1 s
SETUP_ATTEMPTS: Final = 2  # a child that dies before the query has cost nothing: once more, fresh
TICK_S: Final = 0.5  # how often a waiting request looks after its client; noticed gone within 1 s
SETTLE_S: Final = 5.0  # from message_stop to the CLI's own end of its turn; it needs 0.01 s
KEEPALIVE_S: Final = 10.0  # of silence before a stream shows life; proxies cut at 30 to 60 s
SPARE_MAX_AGE_S: Final = 3600.0  # long-idle processes may hold stale sign-ins and connections
SPARE_MEMORY_S: Final = 600.0  # how long a burst of new conversations keeps more spares ready
RECENT_FITS: Final = 16  # setups remembered, to know one that comes again
MIN_FREE_BYTES: Final = 400_000_000  # of memory: two children's; with less, parked ones are ended
MAX_TOOL_RESULT_CHARS: Final = 100_000  # handed to a parked child; the CLI saves large ones to disk
MAX_TOOL_ERROR_CHARS: Final = 5_000  # the CLI cuts errors at 10,000
KEEPER_TICK_S: Final = 5.0  # how soon a dead or stale spare is noticed without a request
STABLE_S: Final = 2.0  # a child that cannot run ends within this
REAP_TICK_S: Final = 0.02  # a killed child is gone within this
EXIT_STATUS_S: Final = 1.0  # from a closed stdout to the exit status; a dying process needs 0.01 s
EXIT_GRACE_S: Final = 5.0  # from EOF on stdin to SIGKILL; the CLI needs 0.04 s
LONGEST_RETRY_S: Final = 60  # what SDKs wait for without seeming to hang
MAX_COUNTS: Final = 256  # token counts kept; agents count the same conversation again and again
OVERLOADED_RETRY_AFTER_S: Final = 5  # told to clients that find the queue full

MAX_CONNECTIONS: Final = 512  # open at once, each a thread; far below the usual 1024 descriptors
MAX_HEADERS: Final = 100  # http.server's own limit
MAX_HEAD_BYTES: Final = 64 * 1024  # request line and headers together
MAX_CHUNK_LINE_BYTES: Final = 256  # a size and extensions that nobody sends
HEAD_TIMEOUT_S: Final = 15.0  # for a whole head: half-open connections go
BODY_TIMEOUT_S: Final = 120.0  # for a whole body: 32 MB at 2 Mbit/s
KEEP_ALIVE_S: Final = 120.0  # an idle connection is kept longer than proxies keep theirs (60 s)
LINGER_S: Final = 2.0  # reading on after an early answer, or a reset would destroy it on its way
ACCEPT_TICK_S: Final = 0.1  # how soon the accepting thread notices that it is to stop
LISTEN_BACKLOG: Final = 128  # socketserver's 5 refuses a burst of parallel clients


# ===================================================================== Settings
# One frozen dataclass, the only place where a default lives. Flags beat CC2API_* variables beat
# defaults; the command line is built from these fields, so help and code cannot differ.


def _option(default: Any, text: str, metavar: str | None = None, low: float = 0) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar, "low": low})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user can choose; one field, one flag, one CC2API_ variable."""

    host: str = _option("127.0.0.1", "address to listen on", "ADDR")
    port: int = _option(8080, "port to listen on; 0 picks a free one", "N")
    claude: str | None = _option(None, "the claude executable (default: searched for)", "PATH")
    keys: str = _option("apikeys.txt", "file of API keys, one a line, re-read every time", "FILE")
    allow_open: bool = _option(False, "listen on other addresses than loopback without any key")
    cors_origin: tuple[str, ...] = _option(
        (), "origin of a web page that may call, * for any; repeatable", "ORIGIN"
    )
    allowed_host: tuple[str, ...] = _option(
        (), "host name that clients may call this server by; repeatable", "NAME"
    )
    model_map: tuple[str, ...] = _option(
        (), "serve the model name NAME with MODEL; repeatable", "NAME=MODEL"
    )
    spares: int = _option(1, "idle claude processes kept ready; 0 keeps none", "N")
    spares_max: int = _option(4, "the most kept ready, after many new conversations at once", "N")
    live: int = _option(4, "conversations kept in their process for the next turn", "N")
    live_ttl: float = _option(300.0, "seconds that such a conversation is kept", "S")
    max_concurrency: int = _option(8, "requests answered at once", "N", low=1)
    max_queue: int = _option(64, "requests that may wait for their turn", "N")
    timeout: float = _option(600.0, "seconds for a whole answer", "S", low=1)
    drain: float = _option(30.0, "seconds that running answers get at the end", "S")
    bare: bool | None = _option(
        None, "run claude with --bare (default: when an API key or a cloud provider is configured)"
    )
    setting_sources: str = _option(
        "", "settings the CLI loads: any of user,project,local (default: none)", "LIST"
    )
    check: bool = _option(False, "check the CLI, sign-in, keys, port and a start, then end")
    live_call: bool = _option(False, "with --check: make one tiny request, which costs tokens")
    debug: bool = _option(False, "log requests and responses whole, prompts included")


# ======================================================================= Errors
# Everything a client can be told, as exceptions: one class for a status and its Anthropic type.
# Raised anywhere above HTTP, answered in one place there.

# Statuses by Anthropic error type (messages-api.md section 5), and back.
STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
TYPE_BY_STATUS: Final = {status: kind for kind, status in STATUS_BY_TYPE.items()}


class ApiError(Exception):
    """An error the client is shown: `status`, Anthropic `type`, message, optional `details`."""

    status = 500

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        kind: str | None = None,
        details: JsonObject | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status or self.status
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        self.kind = kind or TYPE_BY_STATUS.get(self.status, fallback)
        self.details = details
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry  # False: SDKs would only pay for the same again


class InvalidRequest(ApiError):
    """The request is at fault; the message starts with the path of the field."""

    status = 400


class NotAuthenticated(ApiError):
    """No valid gateway key, or the CLI is not signed in."""

    status = 401


class CliFailed(ApiError):
    """The child could not be started, died, or broke its protocol."""

    status = 502


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


# ===================================================================== API keys
# Who may call. The file is read on every request, so a change takes effect at once. Fails closed:
# only a file that is not there, or that holds no key, means open mode.


OPEN: Final = "open"  # the caller's name where no key is asked for
MIN_NAMED_KEY: Final = 12  # characters; of a shorter key four would tell too much


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request."""

    name: str  # for the log and the metrics
    identity: bytes  # a digest of the key: what tells one caller's conversations from another's


class KeyFile:
    """The keys of `apikeys.txt`: one a line, a name may follow; blank and # lines are ignored."""

    def __init__(self, path: str | os.PathLike[str], *, required: bool = False) -> None:
        """`required` shuts open mode: without a key in the file nobody may call."""
        self.path = Path(path)
        self.required = required
        self.problem = ""  # why the file could not be read last

    def load(self) -> dict[str, str] | None:
        """Return the keys with their names; None where there is a file that cannot be read.

        A key without a name goes by its last four characters.
        """
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as exc:
            problem = getattr(exc, "strerror", None) or "it is not UTF-8"
            if problem != self.problem:
                log.error("key file %s cannot be read, nobody is let in: %s", self.path, problem)
            self.problem = problem
            return None
        keys = {}
        for line in text.split("\n"):
            key, *words = line.split() or ["#"]
            tail = key[-4:] if len(key) >= MIN_NAMED_KEY else ""
            if not key.startswith("#"):
                keys[key] = re.sub(r"[^\w.@-]+", "_", " ".join(words)) or f"…{tail}"
        return keys

    def check(self, api_key: str, authorization: str) -> Caller:
        """Return who calls: OPEN, or the name of its key.

        Takes the values of the headers `x-api-key`, which wins as on the public API, and
        `Authorization` (Bearer, or Basic with the key as password), each "" where absent. Raises
        NotAuthenticated when keys are in force and the caller has none of them.
        """
        keys = self.load()
        if keys is None:
            raise NotAuthenticated("the gateway's key file cannot be read")
        scheme, _, token = authorization.strip().partition(" ")
        given = api_key.strip() or (token.strip() if scheme.lower() == "bearer" else "")
        if not given and scheme.lower() == "basic":  # what browsers ask people for
            with contextlib.suppress(ValueError):
                given = base64.b64decode(token, validate=True).decode().partition(":")[2]
        identity = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        if not keys and not self.required:
            return Caller(OPEN, identity)
        if not given:
            raise NotAuthenticated("x-api-key header or Authorization: Bearer is required")
        # Every key is compared, in constant time: neither a prefix nor a position can be timed.
        names = [
            name for key, name in keys.items() if hmac.compare_digest(given.encode(), key.encode())
        ]
        if not names:
            raise NotAuthenticated("invalid x-api-key or bearer token")
        return Caller(names[0], identity)


# ===================================================================== Requests
# Bytes to a checked, frozen `Turn`. Nothing below this section looks at raw JSON from a client.
# Pure: no I/O, any thread. What the CLI would silently repair (cli-contract.md) is refused here.

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it goes to the CLI: content is a string or a list of blocks, verbatim."""

    role: Role
    content: str | list[JsonObject]


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked request: what is sent to a child, and how the answer is wanted."""

    model: str
    stream: bool
    system: tuple[str, ...]  # () means the default system prompt
    history: tuple[Message, ...]  # all but the last message, roles alternating
    query: Message  # the last user message
    max_tokens: int | None  # None: the CLI's own default
    thinking: JsonObject | None  # None: off, as far as the model can
    effort: str | None
    extra_body: JsonObject  # merged by the CLI into the top level of its request
    betas: tuple[str, ...]
    cache_ttl: str  # "5m" or "1h", for every cache breakpoint of the request
    ignored: tuple[str, ...]  # unknown top-level fields, for one warning in the log


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field must be: its kind, lower and upper bound or choices, and its own fields."""

    kind: type
    required: bool = False  # else absent and null are fine
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    shape: Mapping[str, _Rule] = field(default_factory=dict)


_Shape = Mapping[str, _Rule]
_KINDS: Final = {
    **{"string": str, "integer": int, "number": float, "boolean": bool},
    **{"dictionary": dict, "list": list, "any": object},
}
_KIND_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_RULE: Final = re.compile(
    r"(?P<name>\w+)(?P<required>!?):(?P<kind>\w+)"
    r"(?:=(?P<choices>[\w|/-]+))?(?:>=(?P<low>\d+))?(?:<=(?P<high>\d+))?\Z"
)


def _shape(rules: str, **shapes: _Shape) -> _Shape:
    """Read rules as `name:kind`, with `!` behind a required name, and `=a|b`, `>=0`, `<=1`.

    `shapes` are those of the fields that are dictionaries.
    """
    shape = {}
    for text in rules.split():
        rule = cast("re.Match[str]", _RULE.match(text))
        shape[rule["name"]] = _Rule(
            kind=_KINDS[rule["kind"]],
            required=bool(rule["required"]),
            low=float(rule["low"] or "-inf"),
            high=float(rule["high"] or "inf"),
            choices=tuple(rule["choices"].split("|")) if rule["choices"] else (),
            shape=shapes.get(rule["name"], {}),
        )
    return shape


_CACHEABLE: Final = _shape(
    "cache_control:dictionary", cache_control=_shape("type!:string=ephemeral ttl:string=5m|1h")
)
_FORMAT: Final = _shape("type!:string=json_schema schema!:dictionary")
_EFFORT: Final = "effort:string=low|medium|high|xhigh|max"
# Fields that travel in CLAUDE_CODE_EXTRA_BODY just as they came. The sampling parameters, tools and
# tool_choice have no other way; the rest are stable fields, or beta ones that a client sends
# together with its `anthropic-beta` header.
_PASSED: Final = _shape(
    "temperature:number>=0<=1 top_p:number>=0<=1 top_k:integer>=0 stop_sequences:list tools:list"
    " tool_choice:dictionary service_tier:string speed:string container:any inference_geo:string"
    " diagnostics:dictionary mcp_servers:list context_management:dictionary",
    tool_choice=_shape("type!:string=auto|any|tool|none name:string"),
)
_REQUEST: Final = {
    **_PASSED,
    **_CACHEABLE,  # the CLI marks the last block itself, which is what the top-level field asks for
    **_shape(
        "model!:string messages!:list max_tokens:integer>=0 stream:boolean system:any"
        " thinking:dictionary output_config:dictionary output_format:dictionary"
        " metadata:dictionary thread:any",
        thinking=_shape(
            "type!:string=enabled|adaptive|disabled|between_tools budget_tokens:integer"
            " display:string"
        ),
        output_config={**_shape("format:dictionary", format=_FORMAT), **_shape(_EFFORT)},
        output_format=_FORMAT,  # the older form of output_config.format
    ),
    **_shape(_EFFORT),  # this gateway's own, older form of output_config.effort
}
_TOOL: Final = {**_shape("type:string name:string"), **_CACHEABLE}
_CUSTOM_TOOL: Final = _shape("name!:string input_schema!:dictionary")
_TEXT_BLOCK: Final = {**_shape("type!:string=text text!:string"), **_CACHEABLE}
_ENTRY: Final = _shape("role!:string=user|assistant|system content!:any")

# The content blocks: where each may stand, and its required fields. Others pass verbatim.
_USER, _ASSISTANT, _RESULT = "user messages", "assistant messages", "tool results"
_TOOL_USE: Final = _shape("id!:string name!:string input!:dictionary")
_BLOCKS: Final[dict[str, tuple[tuple[str, ...], _Shape]]] = {
    "text": ((_USER, _ASSISTANT, _RESULT), _shape("text!:string")),
    "image": ((_USER, _RESULT), _shape("source!:dictionary")),
    "document": ((_USER, _ASSISTANT, _RESULT), _shape("source!:dictionary")),
    "search_result": ((_USER, _RESULT), _shape("source!:string title!:string content!:list")),
    "tool_result": ((_USER,), _shape("tool_use_id!:string is_error:boolean")),
    "container_upload": ((_USER, _ASSISTANT), _shape("file_id!:string")),
    "tool_reference": ((_RESULT,), _shape("tool_name!:string")),
    "browser_state": ((_RESULT,), {}),
    "tool_use": ((_ASSISTANT,), _TOOL_USE),
    "thinking": ((_ASSISTANT,), _shape("thinking!:string signature!:string")),
    "redacted_thinking": ((_ASSISTANT,), _shape("data!:string")),
    "server_tool_use": ((_ASSISTANT,), _TOOL_USE),
    "mcp_tool_use": ((_ASSISTANT,), _TOOL_USE),
    "mcp_tool_listing": ((_ASSISTANT,), {}),
    "compaction": ((_ASSISTANT,), {}),
    "fallback": ((_ASSISTANT,), {}),
}
_SERVER_TOOLS: Final = (
    *("web_search", "web_fetch", "tool_search", "advisor", "mcp"),
    *("code_execution", "bash_code_execution", "text_editor_code_execution"),
)
for _tool in _SERVER_TOOLS:
    _BLOCKS[f"{_tool}_tool_result"] = ((_ASSISTANT,), _shape("tool_use_id!:string"))
_BLOCK: Final = {"type": _Rule(str, required=True, choices=tuple(_BLOCKS)), **_CACHEABLE}
_IMAGE_MAGIC: Final = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF8",
    "image/webp": b"RIFF",
}
_URL, _FILE = _shape("url!:string"), _shape("file_id!:string")
_SOURCES: Final[dict[str, dict[str, _Shape]]] = {
    "image": {
        "base64": _shape(f"media_type!:string={'|'.join(_IMAGE_MAGIC)} data!:string"),
        "url": _URL,
        "file": _FILE,
    },
    "document": {
        "base64": _shape("media_type!:string=application/pdf data!:string"),
        "text": _shape("media_type!:string=text/plain data!:string"),
        "url": _URL,
        "file": _FILE,
        "content": _shape("content!:any"),
    },
}
_TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,128}\Z")
_BETA: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_SURROGATE_ESCAPE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

_Placed = tuple[str, JsonObject]  # a block, with the path under which the client sent it


def parse_json(raw: bytes) -> JsonObject:
    """Parse a request body.

    Raises InvalidRequest for what is not a JSON object in UTF-8 that every later step can carry:
    NaN, infinities, lone surrogates and nesting deeper than `MAX_JSON_DEPTH` are refused.

    Okay: {"a": [1, 2.5, "\\u00e9", null]}
    Okay: {"a": "\\ud83d\\ude00"}
    400: {"a": NaN}
    400: {"a": 1e999}
    400: {"a": "\\ud83d"}
    400: [1]
    400: {"a": 1
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply") from None
    except ValueError as exc:  # bad UTF-8, bad JSON, a refused number, an integer of 4301 digits
        raise InvalidRequest(f"The request body is not valid JSON: {exc}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object")
    level: list[Any] = [body]
    for _ in range(MAX_JSON_DEPTH):
        nested = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for node in nested for child in node if isinstance(child, (dict, list))]
        if not level:
            return body
    raise InvalidRequest(f"The request body is nested deeper than {MAX_JSON_DEPTH} levels")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a JSON number")
    return number


def parse_count_request(body: JsonObject, betas: str = "") -> Turn:
    """Check a count_tokens request, which needs no max_tokens, and return it as a Turn."""
    return _parse_turn(body, betas, login=False, counts_only=True)


def parse_messages_request(body: JsonObject, betas: str = "", *, login: bool = False) -> Turn:
    """Check a Messages API request and return it as a Turn. Takes ownership of `body`.

    `betas` is the value of the anthropic-beta header. `login` says that the CLI runs on a claude.ai
    login, where it puts reminders before the last user message (see `_place_breakpoints`).
    Raises InvalidRequest, its message starting with the field's path.

    Okay: {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
    400 model: {"max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
    400 max_tokens: {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    400 max_tokens: {"model": "m", "max_tokens": true, "messages": []}
    400 messages: {"model": "m", "max_tokens": 8, "messages": []}
    400 messages.0.role: {"model": "m", "max_tokens": 8, "messages": [{"role": "bot"}]}
    """
    if body.get("thread") is not None:
        # The SDKs' tool runners then resend the whole history (messages-api.md section 9).
        raise InvalidRequest(
            "thread: message threads are not supported; send the whole history",
            details={"error_code": "thread_unsupported_request"},
        )
    if body.get("max_tokens") is None:
        raise InvalidRequest("max_tokens: Field required")
    return _parse_turn(body, betas, login=login)


def _parse_turn(body: JsonObject, betas: str, *, login: bool, counts_only: bool = False) -> Turn:
    """Check everything but `max_tokens` being there, which chat completions do without."""
    _check(body, "", _REQUEST)
    if not body["model"].strip():
        raise InvalidRequest("model: String should have at least 1 character")
    _check_tools(body)
    system = _parse_system(body)
    thinking = body.get("thinking")
    if thinking is not None and thinking["type"] == "disabled":
        thinking = None
    if thinking is None and body.get("top_p") is not None and body.get("temperature") is None:
        # With thinking off the CLI sends temperature 1 (seen, 2.1.330), and upstream refuses the
        # two together. Off by way of the body, it sends none.
        thinking = {"type": "disabled"}
    messages = _parse_messages(body, counts_only=counts_only)
    history, query = messages[:-1], messages[-1]

    output_config = dict(body.get("output_config") or {})
    effort = output_config.pop("effort", None) or body.get("effort")
    if output_config.get("format") is None:
        output_config["format"] = body.get("output_format")
    passed = {name: body.get(name) for name in (*_PASSED, "max_tokens")}
    passed["thinking"] = thinking
    passed["output_config"] = _without_nulls(output_config) or None

    contents = [message.content for message in messages]
    marked = _marked([{**body, "type": None}, body.get("system"), body.get("tools"), contents])
    asks_1h = any(block["cache_control"].get("ttl") == "1h" for block in marked)
    # The API refuses a 1h breakpoint after a 5m one, and the CLI sets its own before and after the
    # client's, so all have one ttl. With a login the CLI itself uses 1h (seen, 2.1.330).
    cache_ttl = "1h" if login or asks_1h else "5m"
    return Turn(
        model=body["model"],
        stream=bool(body.get("stream")),
        system=system,
        history=_place_breakpoints(history, query, body.get("tools") or [], cache_ttl, login=login),
        query=query,
        max_tokens=body.get("max_tokens"),
        thinking=thinking,
        effort=effort,
        extra_body=_without_nulls(passed),
        betas=_parse_betas(betas),
        cache_ttl=cache_ttl,
        ignored=tuple(sorted(name for name in body if name not in _REQUEST)),
    )


def _without_nulls(owner: JsonObject) -> JsonObject:
    return {name: value for name, value in owner.items() if value is not None}


def _check(owner: JsonObject, path: str, shape: _Shape) -> None:
    """Check an object's fields against their rules. Raises InvalidRequest naming the first bad one.

    `path` is the object's own with a trailing dot, "" for the whole body.
    """
    for name, rule in shape.items():
        value = owner.get(name)
        if value is None:
            if rule.required:
                raise InvalidRequest(f"{path}{name}: Field required")
            continue
        _check_value(value, f"{path}{name}", rule)


def _check_value(value: Any, path: str, rule: _Rule) -> None:
    accepted: Any = (int, float) if rule.kind is float else rule.kind
    is_bool_for_number = isinstance(value, bool) and rule.kind in (int, float)
    if is_bool_for_number or not isinstance(value, accepted):
        raise InvalidRequest(f"{path}: Input should be a valid {_KIND_NAMES[rule.kind]}")
    if rule.choices and value not in rule.choices:
        raise InvalidRequest(f"{path}: Input should be {' or '.join(map(repr, rule.choices))}")
    if rule.kind in (int, float) and value < rule.low:
        raise InvalidRequest(f"{path}: Input should be greater than or equal to {rule.low:g}")
    if rule.kind in (int, float) and value > rule.high:
        raise InvalidRequest(f"{path}: Input should be less than or equal to {rule.high:g}")
    if rule.shape:
        _check(value, f"{path}.", rule.shape)


def _objects(owner: JsonObject, name: str) -> Iterator[tuple[str, JsonObject]]:
    """Yield the objects of a top-level list, each with its path."""
    items = owner.get(name) or []
    _check_value(items, name, _Rule(list))
    for index, item in enumerate(items):
        _check_value(item, f"{name}.{index}", _Rule(dict))
        yield f"{name}.{index}", item


def _parse_system(body: JsonObject) -> tuple[str, ...]:
    """Return the system prompt's texts; the CLI joins them with a blank line."""
    if isinstance(body.get("system"), str):
        return (body["system"],) if body["system"].strip() else ()
    texts = []
    for path, block in _objects(body, "system"):
        _check(block, f"{path}.", _TEXT_BLOCK)
        if not block["text"].strip():
            raise InvalidRequest("system: text content blocks must be non-empty")
        texts.append(block["text"])
    return tuple(texts)


def _check_tools(body: JsonObject) -> None:
    """Check what the API would refuse of tools and lists; the rest of a tool passes verbatim."""
    names = set()
    for path, tool in _objects(body, "tools"):
        _check(tool, f"{path}.", _TOOL)
        if tool.get("type") in (None, "custom"):  # typed tools need neither name nor schema
            _check(tool, f"{path}.custom.", _CUSTOM_TOOL)
        name = tool.get("name")
        if name is not None and not _TOOL_NAME.match(name):
            problem = "String should match pattern '^[a-zA-Z0-9_-]{1,128}$'"
            raise InvalidRequest(f"{path}.custom.name: {problem}")
        if name is not None and name in names:
            raise InvalidRequest("tools: Tool names must be unique.")
        names.add(name)
    choice = body.get("tool_choice") or {}
    if choice.get("type") == "tool" and choice.get("name") is None:
        raise InvalidRequest("tool_choice.tool.name: Field required")
    for index, sequence in enumerate(body.get("stop_sequences") or []):
        _check_value(sequence, f"stop_sequences.{index}", _Rule(str))


def _parse_betas(header: str) -> tuple[str, ...]:
    """Split an anthropic-beta header; the CLI's own names of itself are left to the CLI."""
    names = (name.strip() for name in header.split(","))
    kept = [n for n in names if _BETA.match(n) and not n.startswith(("claude-code-", "oauth-"))]
    return tuple(dict.fromkeys(kept))


@dataclass(frozen=True, slots=True)
class _Parsed:
    """One entry of `messages`, before merging."""

    role: Role
    text: str | None  # the content where it was a string
    blocks: list[_Placed]
    folded: bool = False  # it was a system entry


def _parse_messages(body: JsonObject, *, counts_only: bool) -> list[Message]:
    """Check the conversation and return it with alternating roles, ending with the user's.

    A mid-conversation `system` entry becomes text of the neighbouring user message, since a line
    with that role ends the CLI's process; consecutive messages of one role are merged, as the API
    does (the CLI would merge them itself but add a newline).
    """
    entries = list(_objects(body, "messages"))
    if not entries:
        raise InvalidRequest("messages: at least one message is required")
    if len(entries) > MAX_MESSAGES:
        raise InvalidRequest(f"messages: List should have at most {MAX_MESSAGES} items")
    parsed = [_parse_message(path, entry) for path, entry in entries]
    messages, all_blocks = [], []
    for role, group in itertools.groupby(parsed, key=lambda message: message.role):
        parts = list(group)
        blocks = [placed for part in parts for placed in part.blocks]
        if any(part.folded for part in parts):  # tool results must stay in front
            blocks.sort(key=lambda placed: placed[1]["type"] != "tool_result")
        if all("thinking" in block["type"] for _, block in blocks):  # the CLI would drop it
            path = blocks[-1][0].partition(".content")[0]
            raise InvalidRequest(
                f"{path}: The final block in an assistant message cannot be `thinking`."
            )
        whole = parts[0].text if len(parts) == 1 else None
        messages.append(Message(role, [b for _, b in blocks] if whole is None else whole))
        all_blocks.append(blocks)
    if messages[-1].role != "user" and not counts_only:
        raise InvalidRequest(
            "messages: This gateway does not support assistant message prefill. "
            "The conversation must end with a user message."
        )
    _check_tool_pairs(all_blocks)
    return messages


def _parse_message(path: str, entry: JsonObject) -> _Parsed:
    _check(entry, f"{path}.", _ENTRY)
    content = entry["content"]
    if content in ("", []):
        raise InvalidRequest(
            f"{path}: all messages must have non-empty content"
            " except for the optional final assistant message"
        )
    text = content if isinstance(content, str) else None
    items = [{"type": "text", "text": text}] if text is not None else content
    if not isinstance(items, list):
        raise InvalidRequest(f"{path}.content: Input should be a valid string or list")
    where = _ASSISTANT if entry["role"] == "assistant" else _USER
    blocks = [(f"{path}.content.{index}", item) for index, item in enumerate(items)]
    for block_path, block in blocks:
        _check_block(block, block_path, where)
    if entry["role"] == "system":
        return _Parsed("user", None, [_as_reminder(*placed) for placed in blocks], folded=True)
    return _Parsed(entry["role"], text, blocks)


def _as_reminder(path: str, block: JsonObject) -> _Placed:
    """Turn a block of a mid-conversation system entry into user text, in the CLI's own form."""
    _check(block, f"{path}.", _TEXT_BLOCK)
    return path, {**block, "text": f"<system-reminder>\n{block['text']}\n</system-reminder>"}


def _check_block(block: Any, path: str, where: str) -> None:
    """Check one content block: known type, in its place, with its required fields."""
    _check_value(block, path, _Rule(dict))
    _check(block, f"{path}.", _BLOCK)
    kind = block["type"]
    places, shape = _BLOCKS[kind]
    if where not in places:
        raise InvalidRequest(f"{path}: `{kind}` blocks are not allowed in {where}")
    _check(block, f"{path}.{kind}.", shape)
    if kind == "text" and not block["text"].strip():
        problem = "contain non-whitespace text" if block["text"] else "be non-empty"
        raise InvalidRequest(f"{path}: text content blocks must {problem}")
    if kind in _SOURCES:
        _check_source(block["source"], f"{path}.{kind}.source", kind)
    if kind == "tool_result":
        _check_tool_result(block, f"{path}.{kind}")


def _check_source(source: JsonObject, path: str, kind: str) -> None:
    """Check an image's or a document's source.

    The CLI turns bytes that are no image into a text note, so those are refused here.
    """
    forms = _SOURCES[kind]
    _check(source, f"{path}.", {"type": _Rule(str, True, choices=tuple(forms))})
    form = source["type"]
    _check(source, f"{path}.{form}.", forms[form])
    if form != "base64":
        return
    try:
        head = base64.b64decode(source["data"], validate=True)[:16]
    except ValueError:
        raise InvalidRequest(f"{path}.base64.data: Input should be valid base64") from None
    found = [media for media, magic in _IMAGE_MAGIC.items() if head.startswith(magic)]
    if kind == "image" and source["media_type"] not in found:
        problem = f"the image appears to be a {found[0]} image" if found else "it is no image"
        raise InvalidRequest(
            f"{path}.base64.data: Could not process image: the image was specified using the"
            f" {source['media_type']} media type, but {problem}"
        )


def _check_tool_result(block: JsonObject, path: str) -> None:
    content = block.get("content")
    if content is None or isinstance(content, str):
        return
    _check_value(content, f"{path}.content", _Rule(list))
    for index, part in enumerate(content):
        _check_block(part, f"{path}.content.{index}", _RESULT)
        if block.get("is_error") and part["type"] != "text":  # the CLI would drop it
            raise InvalidRequest(
                f"{path}.content.{index}: all content must be type `text` if `is_error` is true"
            )


def _check_tool_pairs(messages: Sequence[list[_Placed]]) -> None:
    """Check that each tool_use is answered in the next message, and each result has its tool_use.

    The CLI would invent the missing result and blank the orphan; the API refuses both. A server
    tool has its result in the same message.
    """
    seen: set[str] = set()
    asked: list[str] = []  # the ids of the message before
    asked_path = ""
    for blocks in messages:
        answered = []
        results = [block.get("tool_use_id") for _, block in blocks]
        for path, block in blocks:
            if block["type"] == "server_tool_use" and block["id"] not in results:
                raise InvalidRequest(
                    f"{path}: `{block['name']}` tool use with id `{block['id']}` was found without"
                    f" a corresponding `{block['name']}_tool_result` block"
                )
            if block["type"] != "tool_result":
                continue
            if block["tool_use_id"] not in asked or block["tool_use_id"] in answered:
                raise InvalidRequest(
                    f"{path}: unexpected `tool_use_id` found in `tool_result` blocks:"
                    f" {block['tool_use_id']}. Each `tool_result` block must have a corresponding"
                    " `tool_use` block in the previous message."
                )
            answered.append(block["tool_use_id"])
        if missing := [tool_id for tool_id in asked if tool_id not in answered]:
            raise InvalidRequest(
                f"{asked_path}: `tool_use` ids were found without `tool_result` blocks immediately"
                f" after: {', '.join(missing)}. Each `tool_use` block must have a corresponding"
                " `tool_result` block in the next message."
            )
        asked = []
        for path, block in blocks:
            if block["type"] == "tool_use":
                if block["id"] in seen:
                    raise InvalidRequest(f"{path}.tool_use.id: `tool_use` ids must be unique")
                seen.add(block["id"])
                asked.append(block["id"])
                asked_path = path.partition(".content")[0]


def _marked(node: Any) -> Iterator[JsonObject]:
    """Yield, in order, the blocks and tools below `node` that carry a cache_control."""
    if isinstance(node, list):
        for item in node:
            yield from _marked(item)
    elif isinstance(node, dict):
        if node.get("type") == "tool_result":
            yield from _marked(node.get("content"))
        if node.get("cache_control"):
            yield node


def _place_breakpoints(
    history: list[Message], query: Message, tools: list[JsonObject], ttl: str, *, login: bool
) -> tuple[Message, ...]:
    """Thin out the client's cache breakpoints, in place, so that at most four go upstream.

    The CLI sets three: two system blocks and the last message block (seen, 2.1.330). That leaves
    one. With an API key it is the client's latest. With a login the CLI's reminders stand in the
    last user message and so move from call to call; the one that keeps the history cached is on the
    last block before it. Returns the history.
    """
    last_block = query.content[-1] if isinstance(query.content, list) else None
    marked = [*_marked(tools), *_marked([m.content for m in history]), *_marked(query.content)]
    spare = [block for block in marked if block is not last_block]  # the CLI marks that one itself
    kept = [] if login and history else spare[-1:]
    for block in marked:
        if not any(block is other for other in kept):
            del block["cache_control"]
    if login and history:
        before, last = history[:-1], history[-1]
        content = last.content
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # thinking blocks take no cache_control
        kept = [block for block in blocks if "thinking" not in block["type"]][-1:]
        history = [*before, Message(last.role, blocks)]
    for block in kept:
        if ttl == "1h" or login:
            block["cache_control"] = {"type": "ephemeral", "ttl": ttl}
    return tuple(history)


def hash_conversation(turn: Turn, caller: Caller) -> hashlib._Hash:
    """Return a running digest of all that comes before a turn's last message.

    Two requests have the same one where the model would be told the same by the same caller, in
    whatever of the API's ways it is written. `hash_message` carries it on.
    """
    tools = _unmarked(turn.extra_body.get("tools"))
    # the CLI keeps its first turn's betas, and all breakpoints of a request have one ttl
    told = [turn.model, turn.system, tools, turn.betas, turn.cache_ttl]
    begin = json.dumps(told, sort_keys=True)
    digest = hashlib.sha256(caller.identity + begin.encode("ascii"))
    for message in turn.history:
        hash_message(digest, message)
    return digest


def hash_message(digest: hashlib._Hash, message: Message) -> None:
    """Take one more message into a running digest."""
    digest.update(json.dumps([message.role, _as_blocks(message.content)]).encode("ascii"))


def _as_blocks(content: Any) -> Any:
    """Return content in the one form that all its forms are compared in."""
    return _canonical([{"type": "text", "text": content}] if isinstance(content, str) else content)


_SAYS_NOTHING: Final = ("cache_control", "caller")  # the CLI itself drops a tool_use's `caller`


def _canonical(node: Any) -> Any:
    """Drop what makes no difference to the model, and order the rest; tool input is verbatim."""
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {}
    for name, value in sorted(node.items()):
        if name == "input":
            kept[name] = json.dumps(value, sort_keys=True)
        elif name == "content" and node.get("type") == "tool_result":
            kept[name] = _as_blocks(value)
        elif value is not None and value is not False and name not in _SAYS_NOTHING:
            kept[name] = _canonical(value)
    return kept


def without_breakpoints(turn: Turn) -> Turn:
    """Return a turn whose last message and tools have no cache breakpoints of the client's.

    In a conversation that goes on in its process, the CLI's own are on every last message; with
    one more from each turn they would soon be over the four that the API takes.
    """
    body = {**turn.extra_body, "tools": _unmarked(turn.extra_body.get("tools"))}
    query = Message("user", _unmarked(turn.query.content))
    return dataclasses.replace(turn, query=query, extra_body=_without_nulls(body))


def _unmarked(node: Any) -> Any:
    if isinstance(node, list):
        return [_unmarked(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {name: value for name, value in node.items() if name != "cache_control"}
    if node.get("type") == "tool_result" and "content" in node:
        kept["content"] = _unmarked(node["content"])
    return kept


# ================================================================== CLI process
# Finding the CLI, and one running `claude` as an object: its arguments, environment and line
# protocol. Knows nothing of HTTP. A Child is used by one thread at a time (the pool hands it over);
# all of its pipes are moved by that thread in `_pump`, so no child can block on a full pipe while
# we block on another, and no thread is needed per pipe.

CLI_INSTALL_PLACES: Final = ("~/.local/bin/claude", "~/.claude/local/claude")
INSTALL_HINT: Final = (
    "Install it from https://claude.com/claude-code, or `pip install claude-agent-sdk`, which"
    " carries it; update an old one with `claude update`; name its path with --claude."
)

# Variables that make the CLI run on an API key or a cloud provider: `--bare` is then right, and
# adds nothing of its own to the messages. `--bare` never reads a claude.ai login.
API_KEY_VARIABLES: Final = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
PROVIDER_VARIABLES: Final = (
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLAUDE_CODE_USE_FOUNDRY",
)

TOOL_SERVER: Final = "t"  # the MCP server under which a request's tools are registered
# The size in tokens from which on the CLI refuses to call upstream ("Prompt is too long").
_CALLS_WAIT: Final = {"MCP_TOOL_TIMEOUT": "100000000"}  # ms; tool calls, as long as they must
_NO_LIMIT: Final = {"CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "1000000000"}
_NO_CALLS: Final = {"CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "1"}

CHILD_FLAGS: Final = (
    *("-p", "--input-format", "stream-json", "--output-format", "stream-json"),
    *("--verbose", "--include-partial-messages"),
    *("--tools", "", "--disable-slash-commands", "--strict-mcp-config"),
    "--no-session-persistence",  # no transcript on disk
    *("--settings", '{"hooks":{},"mcpServers":{},"disableAllHooks":true}'),
    *("--system-prompt", DEFAULT_SYSTEM_PROMPT),
    *("--allowedTools", "mcp__t", "--permission-mode", "dontAsk"),  # of the TOOL_SERVER
)
CHILD_VARIABLES: Final = {
    "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
    "ENABLE_CLAUDEAI_MCP_SERVERS": "false",
    "CLAUDE_CODE_MAX_RETRIES": "0",  # the client decides about retries
    # A stream that breaks would otherwise be asked for again without streaming: a second paid call.
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    # Betas come from the client alone. With its own, the CLI asks a second time without some of
    # them after a 400, adds effort entries to the messages of the newest models, and context edits
    # to every thinking request (all seen, 2.1.330).
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
    # Else thinking without a `display` becomes display "updates" (seen, 2.1.330).
    "CLAUDE_CODE_THINKING_DISPLAY_UPDATES": "0",
    # The CLI's guess of what is too long is upstream's to make.
    **_NO_LIMIT,
    "DISABLE_AUTO_COMPACT": "1",  # no summarising call behind the client's back
    "DISABLE_COMPACT": "1",
    "DISABLE_AUTOUPDATER": "1",  # the pool notices an update; children must not make one
    # The tools' names and descriptions as given, all of them, and any number called at once.
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "CLAUDE_CODE_MAX_MCP_DESCRIPTION_LENGTH": "1000000",
    "ENABLE_TOOL_SEARCH": "false",
    "CLAUDE_CODE_MAX_TOOL_USE_CONCURRENCY": "1000",
    # With a login a tool step would else get a reminder of the tokens left (seen, 2.1.330).
    "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
}
# Not handed down: what a request sets for itself, and the marks of a Claude Code session that this
# gateway may have been started from (the CLI finds its own).
DROPPED_VARIABLES: Final = (
    "ANTHROPIC_BETAS",
    "CLAUDE_CODE_EXTRA_BODY",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "CLAUDE_CODE_EFFORT_LEVEL",
    "CLAUDE_CODE_PROMPT_CACHE_TTL",
    "ENABLE_PROMPT_CACHING_1H",
    "FORCE_PROMPT_CACHING_5M",
    "MAX_THINKING_TOKENS",
    "CLAUDECODE",
    "CLAUDE_CODE_ENTRYPOINT",
)


class CliUnusable(Exception):
    """No CLI, or one that is too old; the message is for the person who starts the gateway."""


@dataclass(frozen=True, slots=True)
class Cli:
    """A CLI that was found and answered `--version`."""

    path: str
    version: str

    def stamp(self) -> tuple[int, ...] | None:
        """Return what changes when the executable does; None while it is not there."""
        try:
            stat = os.stat(self.path)
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def find_cli(choice: str | None, environ: Mapping[str, str]) -> Cli:
    """Find the CLI and check its version.

    Looked for: `choice` (--claude or CC2API_CLAUDE), PATH, the usual install places, and the one
    inside an installed claude_agent_sdk. Raises CliUnusable.
    """
    if choice is not None:
        path: str | None = shutil.which(os.path.expanduser(choice))
        if path is None:
            raise CliUnusable(f"{choice} is not an executable file. {INSTALL_HINT}")
    else:
        places = [os.path.expanduser(place) for place in CLI_INSTALL_PLACES]
        spec = importlib.util.find_spec("claude_agent_sdk")
        if spec is not None and spec.origin:
            places.append(str(Path(spec.origin).parent / "_bundled" / "claude"))
        candidates = ("claude", *places)
        path = next(filter(None, map(shutil.which, candidates)), None)
        if path is None:
            raise CliUnusable(
                f"no claude found on PATH, nor at {', '.join(places)}. {INSTALL_HINT}"
            )
    path = os.path.abspath(path)
    output = _cli_output(path, ["--version"], environ)
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", output)
    if found is None:
        raise CliUnusable(f"{path} --version printed {output.strip()[:200]!r}. {INSTALL_HINT}")
    if tuple(map(int, found.groups())) < MIN_CLI_VERSION:
        needed = ".".join(map(str, MIN_CLI_VERSION))
        raise CliUnusable(
            f"{path} is version {found.group()}; {needed} or newer is needed. {INSTALL_HINT}"
        )
    return Cli(path, found.group())


def _cli_output(path: str, args: list[str], environ: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            [path, *args],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CLI_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CliUnusable(f"{path} does not run: {exc}. {INSTALL_HINT}") from exc
    return (done.stdout or done.stderr).decode("utf-8", "replace")


def describe_sign_in(cli: Cli, environ: Mapping[str, str]) -> str:
    """Return in a few words how the CLI says it is signed in; it shows no secret."""
    try:
        status = json.loads(_cli_output(cli.path, ["auth", "status"], environ))
        if not status["loggedIn"]:
            return f"NOT SIGNED IN: run {cli.path} and type /login, or set ANTHROPIC_API_KEY"
        provider = status.get("apiProvider", "firstParty")
        method = str(status["authMethod"])
        return method if provider == "firstParty" else f"{method} ({provider})"
    except (CliUnusable, ValueError, KeyError, TypeError):
        return "unknown (`claude auth status` gave no answer)"


def wants_bare(choice: bool | None, environ: Mapping[str, str]) -> bool:
    """Decide on `--bare`: as chosen, else where an API key or a provider is configured."""
    if choice is not None:
        return choice
    off = ("", "0", "false", "no", "off")
    providers = any(environ.get(name, "").lower() not in off for name in PROVIDER_VARIABLES)
    return providers or any(environ.get(name) for name in API_KEY_VARIABLES)


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


def child_command(cli: Cli, *, bare: bool, setting_sources: str) -> list[str]:
    """Return the argument list of a child; nothing of a request is ever in it."""
    command = [cli.path, *CHILD_FLAGS, "--setting-sources", setting_sources]
    if bare:
        command.append("--bare")
    if sys.platform != "linux":
        return command
    setpriv = shutil.which("setpriv")  # of util-linux: 15 ms quicker than Python
    if setpriv and not subprocess.call(
        [setpriv, "--pdeathsig", "KILL", "true"], stderr=subprocess.DEVNULL
    ):
        return [setpriv, "--pdeathsig", "KILL", *command]
    if not sys.executable:
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def child_environment(environ: Mapping[str, str], temp_dir: str) -> dict[str, str]:
    """Return the environment of a child: the gateway's own, with what makes the CLI predictable."""
    kept = {name: value for name, value in environ.items() if name not in DROPPED_VARIABLES}
    # the CLI leaves sockets and probe files behind when it is killed: they go where we clean up
    return {**kept, **CHILD_VARIABLES, "TMPDIR": temp_dir}


class ChildDied(Exception):
    """The child ended, closed its output or fell silent; the message says how it ended."""


class Patience:
    """How long to wait, and what to do meanwhile: `tick` is called every TICK_S.

    `tick` may raise, to give up waiting (ClientGone); at the deadline `late` is raised.
    """

    def __init__(self, seconds: float, tick: Callable[[], None], late: Exception) -> None:
        self._deadline = time.monotonic() + seconds
        self._tick = tick
        self._late = late
        self._next_tick = time.monotonic() + TICK_S

    def slice_s(self) -> float:
        """Return how long to wait now before calling again."""
        now = time.monotonic()
        if now >= self._deadline:
            raise self._late
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._tick()
        return min(self._deadline, self._next_tick) - now

    def at_most(self, seconds: float, late: Exception) -> Patience:
        """Return a patience that ends earlier, with another exception."""
        if time.monotonic() + seconds >= self._deadline:
            return self
        return Patience(seconds, self._tick, late)


_NO_PATIENCE: Final = Patience(float("inf"), lambda: None, ChildDied())


class Child:
    """One running CLI and its line protocol.

    Used by one thread at a time. Whoever owns it ends it: `kill` at once, or `finish`, and then
    `reap` until it says true. Reading raises ChildDied, CliFailed, and what the patience raises.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: str, stamp: object = None
    ) -> None:
        """Start the process. Raises OSError."""
        self.stamp = stamp
        self.started_at = time.monotonic()
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C at the terminal is the gateway's, not the child's
        )
        self.pid = self._process.pid
        self._stdin, self._stdout, self._stderr = (
            pipe.fileno()
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr)
            if pipe is not None
        )
        os.set_blocking(self._stdin, False)
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        self._outbox = bytearray()
        self._partial = bytearray()  # the start of a line not yet whole
        self._lines: collections.deque[bytes] = collections.deque()
        self._last_words = b""
        self._requests = itertools.count(1)
        self._has_babbled = False
        self._tool_server: JsonObject = {}  # what the tools' MCP server answers, by method
        self.tool_calls: dict[str, JsonObject] = {}  # those that wait for an answer, by tool_use id
        self.setup: Setup | None = None  # what it was last told of a turn's parameters
        self.holds_conversation = False  # it has answered, and can go on
        self.caller: Caller | None = None  # whom it serves
        self.cost_usd = 0.0  # of all its turns, as it said last
        self.noted_cost_usd = 0.0  # what of that is in the metrics
        self.is_held = False  # from calling upstream
        self.setup_requests: list[str] = []  # the requests that told it, until they are answered
        self.fit: bytes | None = None  # the label of what a spare was prepared with

    def is_alive(self) -> bool:
        """Say whether the process runs; reaps it where it does not."""
        return self._process.poll() is None

    def has_failed(self) -> bool:
        """Say whether the process has ended by itself, which no idle one should."""
        return (self._process.poll() or -1) >= 0

    def send(self, line: JsonObject) -> None:
        """Queue a line; it is written while reading, so neither side can block the other."""
        self._outbox += json.dumps(line).encode("ascii") + b"\n"
        self._poll.register(self._stdin, select.POLLOUT)

    def request(self, subtype: str, patience: Patience, **fields: Any) -> JsonObject:
        """Send a control request and return the child's response to it.

        A child that does not answer within CONTROL_TIMEOUT_S counts as dead.
        """
        return self.read_response(self.ask(subtype, **fields), patience)

    def ask(self, subtype: str, **fields: Any) -> str:
        """Queue a control request; return its id, for `read_response`."""
        request_id = f"{subtype} {next(self._requests)}"
        request = {"subtype": subtype, **fields}
        self.send({"type": "control_request", "request_id": request_id, "request": request})
        return request_id

    def read_response(self, request_id: str, patience: Patience) -> JsonObject:
        """Wait for the response to a control request, passing over all other lines."""
        subtype = request_id.partition(" ")[0]
        silent = ChildDied(f"claude did not answer {subtype} within {CONTROL_TIMEOUT_S:.0f} s")
        patience = patience.at_most(CONTROL_TIMEOUT_S, silent)
        while True:
            line = self.read_line(patience)
            response = line.get("response")
            if line.get("type") != "control_response" or not isinstance(response, dict):
                continue
            if response.get("request_id") == request_id:
                if response.get("subtype") == "success":
                    return response.get("response") or {}
                raise CliFailed(f"claude refused {subtype}: {response.get('error')}")

    def read_line(self, patience: Patience) -> JsonObject:
        """Wait for the next line. Garbage (no JSON object) is logged and skipped."""
        while True:
            while not self._lines:
                self._pump(patience)
            raw = self._lines.popleft()
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                if line.get("type") == "control_request":
                    self._answer(line)
                if isinstance(line.get("total_cost_usd"), (int, float)):
                    self.cost_usd = float(line["total_cost_usd"])
                return line
            if raw.strip() and not self._has_babbled:
                self._has_babbled = True
                log.warning("claude pid=%d prints lines that are not JSON", self.pid)

    def _answer(self, line: JsonObject) -> None:
        """Answer what the CLI asks of the tool server; a tool call waits for `answer_tool_call`."""
        request = line.get("request")
        message = request.get("message") if isinstance(request, dict) else None
        if not isinstance(message, dict):
            return
        if message.get("method") == "tools/call":
            meta = (message.get("params") or {}).get("_meta") or {}
            self.tool_calls[str(meta.get("claudecode/toolUseId"))] = line
        else:  # asked by older CLIs; a newer one knows from initialize
            self._respond(line, self._tool_server.get(str(message.get("method")), {}))

    def _respond(self, line: JsonObject, result: JsonObject) -> None:
        message_id = line["request"]["message"].get("id")
        reply = {"jsonrpc": "2.0", "id": message_id, "result": result}
        response = {"request_id": line.get("request_id"), "response": {"mcp_response": reply}}
        self.send({"type": "control_response", "response": {"subtype": "success", **response}})

    def answer_tool_call(self, tool_use_id: str, result: JsonObject) -> None:
        """Give the CLI the result of a tool call that it waits for."""
        self._respond(self.tool_calls.pop(tool_use_id), result)

    def serve_tools(self, tools: Sequence[JsonObject]) -> JsonObject:
        """Be the tools' MCP server; return the fields of `initialize` that tell the CLI of it."""
        if not tools:
            return {}
        self._tool_server = server = to_tool_server(tools)
        manifest = {
            "initializeResult": server["initialize"],
            "toolsListResult": server["tools/list"],
        }
        name = TOOL_SERVER
        return {"sdkMcpServers": [name], "sdkMcpServerManifests": {name: manifest}}

    def hold_calls(self) -> None:
        """Keep the CLI from calling upstream again, once its call is on its way.

        After some answers it would by itself ask for more. What holds it back is its own limit of
        size, now 1 token: its next call ends as "Prompt is too long" before it is made (seen,
        2.1.330 and 2.1.248). Killing it at message_delta alone came too late in 1 of 40.
        """
        self.is_held = True
        self.ask("apply_flag_settings", settings={"env": _NO_CALLS})
        self.flush()

    def allow_calls(self) -> None:
        """Let the CLI call again, for the next turn. Does not wait."""
        self.is_held = False
        self.ask("apply_flag_settings", settings={"env": _NO_LIMIT})
        self.flush()

    def flush(self) -> None:
        """Write what is queued, as far as that goes without waiting."""
        left = -1
        while self._outbox and len(self._outbox) != left:
            left = len(self._outbox)
            self._write_some()

    def has_line(self) -> bool:
        """Say whether `read_line` has something at once."""
        return bool(self._lines)

    def take_ready(self) -> None:
        """Read what the child has already printed, for `read_line`. Does not wait."""
        while any(fd == self._stdout for fd, _ in self._poll.poll(0)):
            self._read_stdout()

    def look_ahead(self) -> None:
        """Take the cost from what is already printed; `read_line` still returns it."""
        with contextlib.suppress(ChildDied, CliFailed):  # found out when it is used
            self.take_ready()
        for raw in self._lines:
            with contextlib.suppress(ValueError, TypeError):
                if b'"total_cost_usd"' in raw:
                    self.cost_usd = float(json.loads(raw).get("total_cost_usd"))

    def kill(self) -> None:
        """End the process at once, and what it has started; `reap` collects it."""
        if self._process.poll() is None:  # so that the group is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Close the child's stdin: the CLI ends by itself after what it is doing."""
        with contextlib.suppress(OSError):
            cast("Any", self._process.stdin).close()

    def reap(self) -> bool:
        """Collect an ended process and close its pipes; say whether it has ended."""
        if self._process.poll() is None:
            return False
        # what it said at the end tells what it cost
        with contextlib.suppress(ChildDied, CliFailed, OSError, ValueError):
            os.set_blocking(self._stdout, False)
            while True:
                self._read_stdout()
                while self._lines:
                    self.read_line(_NO_PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                cast("Any", pipe).close()
        return True

    def _pump(self, patience: Patience) -> None:
        """Wait a while for a direction that is ready, and move bytes once in each that is."""
        for fd, _ in self._poll.poll(patience.slice_s() * 1000):
            if fd == self._stdin:
                self._write_some()
            elif fd == self._stderr:
                self._read_stderr()
            else:
                self._read_stdout()

    def _write_some(self) -> None:
        try:
            written = os.write(self._stdin, memoryview(self._outbox)[:READ_BYTES])
        except BlockingIOError:
            return
        except OSError:  # it has closed its stdin; what it still prints tells why
            written = len(self._outbox)
        del self._outbox[:written]
        if not self._outbox:
            self._poll.unregister(self._stdin)

    def _read_stdout(self) -> None:
        chunk = os.read(self._stdout, READ_BYTES)
        if not chunk:
            raise ChildDied(self._explain_death())
        first, *rest = chunk.split(b"\n")
        self._partial += first
        if len(self._partial) > MAX_LINE_BYTES:
            raise CliFailed(f"claude printed a line of over {MAX_LINE_BYTES} bytes")
        if rest:
            self._lines.append(bytes(self._partial))
            self._lines.extend(rest[:-1])
            self._partial = bytearray(rest[-1])

    def _read_stderr(self) -> None:
        chunk = os.read(self._stderr, READ_BYTES)
        self._last_words = (self._last_words + chunk)[-STDERR_TAIL_BYTES:]
        if not chunk:
            self._poll.unregister(self._stderr)

    def _explain_death(self) -> str:
        """Describe how the child ended; waits a moment for its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=EXIT_STATUS_S)
        with contextlib.suppress(KeyError, OSError):  # what it said last may still be in the pipe
            os.set_blocking(self._stderr, False)
            self._read_stderr()
        # on one line, and nothing in it that could pass for a line of its own
        words = " ".join(self._last_words.decode("ascii", "replace").split())
        code = self._process.returncode
        how = "closed its output" if code is None else f"ended with status {code}"
        return f"claude {how}" + (f": {words}" if words else "")


COUNTED_TOOLS_DEDUCTION: Final = 500  # tokens that get_context_usage takes off all tools together
COUNTED_BESIDE_TOOLS: Final = 8  # tokens of the message "foo", which the tools are counted with
# Counted with the tools, so that their sum is never below the deduction, and by itself.
PADDING_TOOL: Final[JsonObject] = {
    "name": "cc2api_padding",
    "description": "word " * 1000,
    "input_schema": {"type": "object", "properties": {}},
}


def read_context_usage(
    child: Child, turn: Turn, tools: Sequence[JsonObject], patience: Patience
) -> tuple[int, int]:
    """Have the CLI count a turn with the API's own count_tokens: nothing is generated.

    Returns the tokens of the messages, the system prompt included, and of the tools less
    COUNTED_TOOLS_DEDUCTION. Raises as Child does, and CliFailed where upstream did not count.
    """
    messages = [*turn.history, turn.query]
    if turn.system:  # counted as a block of the first message: as a message it would be wrapped
        first = messages[0].content if messages[0].role == "user" else []
        blocks = [{"type": "text", "text": first}] if isinstance(first, str) else first
        prompt = {"type": "text", "text": "\n\n".join(turn.system)}
        messages[: messages[0].role == "user"] = [Message("user", [prompt, *blocks])]
    counted = dataclasses.replace(turn, system=(), history=tuple(messages))
    open_turn(child, counted, dataclasses.replace(to_setup(counted), tools=tuple(tools)), patience)
    usage = child.request("get_context_usage", patience)
    counts = {c.get("name"): c.get("tokens") for c in usage.get("categories") or []}
    # Where upstream does not count, the CLI guesses a token for four characters, without a word;
    # of the default prompt, wrapped in a message, every true count is higher (seen, 2.1.330).
    if int(counts.get("System prompt") or 0) <= len(DEFAULT_SYSTEM_PROMPT) / 4:
        raise CliFailed("upstream did not count the tokens")
    return int(counts.get("Messages") or 0), int(counts.get("MCP tools") or 0)


def to_tool_server(tools: Sequence[JsonObject]) -> JsonObject:
    """Return what an MCP server with these tools answers, by method.

    Tools without a schema (typed and server tools) are described by their own JSON.
    """
    listed = [
        {
            "name": tool.get("name") or tool.get("type"),
            "description": tool.get("description") or json.dumps(tool),
            "inputSchema": tool.get("input_schema") or PADDING_TOOL["input_schema"],
            "annotations": {"readOnlyHint": True},  # else calls wait for each other
            "_meta": {"anthropic/maxResultSizeChars": 2 * MAX_TOOL_RESULT_CHARS},
        }
        for tool in tools
    ]
    server = {"name": TOOL_SERVER, "version": __version__}
    protocol = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}}
    return {"initialize": {**protocol, "serverInfo": server}, "tools/list": {"tools": listed}}


@dataclass(frozen=True, slots=True)
class Setup:
    """What a child is told before the first message: the same for many conversations."""

    system: tuple[str, ...]
    tools: tuple[JsonObject, ...]  # registered with the CLI, which waits for their results
    settings: JsonObject  # of apply_flag_settings
    thinking_tokens: int | None

    def label(self, caller: Caller) -> bytes:
        """Return what is the same for requests of one caller that need the same setup."""
        fields = json.dumps([self.system, self.tools, self.settings, self.thinking_tokens])
        return hashlib.sha256(caller.identity + fields.encode("ascii")).digest()


def to_setup(turn: Turn) -> Setup:
    """Return a turn's setup. Tools are registered by name alone; their schemas go in the body."""
    named = (tool.get("name") for tool in turn.extra_body.get("tools") or [])
    # null leaves thinking to extra_body; 0 turns it off where the model can be without
    tokens = None if turn.thinking else 0
    tools = tuple({"name": name, "description": name} for name in named if name)
    return Setup(turn.system, tools, to_flag_settings(turn), tokens)


def begin_setup(child: Child, setup: Setup) -> None:
    """Send a blank child its setup; the answers are read by `open_turn`. Does not wait."""
    fields: JsonObject = {"systemPrompt": list(setup.system)} if setup.system else {}
    fields |= child.serve_tools(setup.tools)
    child.setup = setup
    child.setup_requests = [
        child.ask("initialize", hooks=None, **fields),
        child.ask("apply_flag_settings", settings=setup.settings),
        child.ask("set_max_thinking_tokens", max_thinking_tokens=setup.thinking_tokens),
    ]
    child.flush()


def open_turn(child: Child, turn: Turn, setup: Setup, patience: Patience) -> list[JsonObject]:
    """Bring a spare to the point where only the last user message is missing.

    Follows cli-contract.md, "Claiming a spare": initialize, settings, thinking, history; a prepared
    spare has had the first three. Nothing goes upstream. Returns the CLI's list of models. Raises
    as Child does.
    """
    if child.setup is None:
        begin_setup(child, setup)
    reply, *_ = [child.read_response(asked, patience) for asked in child.setup_requests]
    models = reply.get("models") or []
    model = resolve_model(turn.model, models)
    for message in turn.history:
        child.send(to_line(message, model))
        if message.role == "user":
            # user lines are queued but assistant lines applied at once: wait, or order is lost
            silent = ChildDied("claude did not take the history in time")
            short = patience.at_most(CONTROL_TIMEOUT_S, silent)
            while child.read_line(short).get("type") != "result":
                pass
    return cast("list[JsonObject]", models)


def resume_turn(child: Child, turn: Turn, patience: Patience) -> None:
    """Have a parked child go on with its conversation: parameters, then the call.

    The CLI itself ends a turn a little after its answer, so that is waited for (seen: `result` 10
    ms after message_stop). Raises as Child does, and ChildDied where the child did not keep the
    conversation as it should; nothing was sent upstream then.
    """
    asked = _tool_use_ids(turn.history)
    short = patience.at_most(SETTLE_S, ChildDied("claude did not settle after its answer"))
    child.take_ready()
    while child.has_line() or not (asked and child.tool_calls.keys() >= set(asked)):
        line = child.read_line(short)
        if line.get("type") == "result" and not asked and not line.get("is_error"):
            break
        if line.get("type") in ("result", "user") or line.get("status") == "requesting":
            raise ChildDied("claude did not keep its conversation")  # it went on by itself
    setup = to_setup(turn)
    if child.is_held or child.setup is None or setup.settings != child.setup.settings:
        child.request("apply_flag_settings", patience, settings=setup.settings)
        child.is_held = False
    if child.setup is None or setup.thinking_tokens != child.setup.thinking_tokens:
        tokens = setup.thinking_tokens
        child.request("set_max_thinking_tokens", patience, max_thinking_tokens=tokens)
    child.setup = setup
    if not asked:
        child.send(to_line(turn.query, turn.model, query=True))
    for tool_use_id, result in zip(asked, to_tool_results(turn.query, asked) or (), strict=True):
        child.answer_tool_call(tool_use_id, result)
        # one by one: the CLI puts results in the order in which it has dealt with them
        while tool_use_id != asked[-1] and not _is_taken(child.read_line(short), tool_use_id):
            pass


def _is_taken(line: JsonObject, tool_use_id: str) -> bool:
    """Say whether a line tells that the CLI has put a tool's result into its conversation."""
    return line.get("type") == "user" and tool_use_id in json.dumps(line.get("message"))


def can_resume(turn: Turn) -> bool:
    """Say whether a child that holds a turn's history could go on with its last message."""
    asked = _tool_use_ids(turn.history)
    return bool(turn.history) and (not asked or to_tool_results(turn.query, asked) is not None)


def _tool_use_ids(history: Sequence[Message]) -> list[str]:
    """Return the ids of the tool calls that the last message of a history makes."""
    content = history[-1].content if history else ""
    blocks = [] if isinstance(content, str) else content
    return [block["id"] for block in blocks if block["type"] == "tool_use"]


def to_tool_results(query: Message, asked: Sequence[str]) -> list[JsonObject] | None:
    """Return the MCP results that a message holds, in the order of the calls that it answers.

    None where the message would not reach the model as it is: the CLI orders results by their
    calls, strips and joins errors, words empty results, and writes large ones to disk (all seen,
    2.1.330 and 2.1.248). Images and text beside the results go no better.
    """
    blocks = query.content if isinstance(query.content, list) else []
    if [block.get("tool_use_id") for block in blocks] != list(asked):
        return None
    results = [result for block in blocks if (result := _to_tool_result(block))]
    size = sum(len(part["text"]) for result in results for part in result["content"])
    return results if len(results) == len(blocks) and size <= MAX_TOOL_RESULT_CHARS else None


def _to_tool_result(block: JsonObject) -> JsonObject | None:
    content = block.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    texts = [part["text"] for part in parts if part.keys() == {"type", "text"}]
    if not texts or len(texts) < len(parts) or not all(map(_SAYS_SOMETHING.search, texts)):
        return None
    is_error, first = bool(block.get("is_error")), texts[0]
    if is_error and (
        len(texts) > 1 or _BLANK_END.search(first) or len(first) > MAX_TOOL_ERROR_CHARS
    ):
        return None
    return {"content": parts, "isError": is_error}


_SAYS_SOMETHING: Final = re.compile(r"[^\s\ufeff]")
_BLANK_END: Final = re.compile(r"\A[\s\ufeff]|[\s\ufeff]\Z")


def to_flag_settings(turn: Turn) -> JsonObject:
    """Return the settings of `apply_flag_settings` for a turn; every per-request one is given."""
    variables = {
        "CLAUDE_CODE_EXTRA_BODY": json.dumps(turn.extra_body),
        "ANTHROPIC_BETAS": ",".join(turn.betas),
        "CLAUDE_CODE_PROMPT_CACHE_TTL": turn.cache_ttl,
        # the body's max_tokens is in extra_body; this is for the CLI's own sums
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(turn.max_tokens or ""),
        **_NO_LIMIT,
        **_CALLS_WAIT,
    }
    model = None if turn.model == DEFAULT_MODEL_NAME else turn.model
    return {"env": variables, "model": model, "effortLevel": turn.effort}


def resolve_model(name: str, models: Iterable[JsonObject]) -> str:
    """Return the id that the CLI will use for a model name or alias, by its own list."""
    wanted = "default" if name == DEFAULT_MODEL_NAME else name
    for model in models:
        if model.get("value") == wanted:
            return str(model.get("resolvedModel") or name).removesuffix("[1m]")
    return name.removesuffix("[1m]")


def to_model_list(models: Iterable[JsonObject]) -> list[JsonObject]:
    """Return the CLI's models as both SDKs parse them (messages-api.md section 6), newest first.

    The CLI tells no dates: the epoch stands for an unknown one, as the API's documentation has it,
    and the newest is the one with the highest version in its id.
    """
    items: dict[str, JsonObject] = {}
    for model in models:
        model_id = resolve_model(str(model.get("value")), [model])
        items[model_id] = {
            "type": "model",
            "object": "model",
            "id": model_id,
            "display_name": model.get("displayName") or model_id,
            "created_at": "1970-01-01T00:00:00Z",
            "created": 0,
            "owned_by": "anthropic",
        }
    return sorted(items.values(), key=_version_of, reverse=True)


def _version_of(item: JsonObject) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", item["id"])]


def to_line(message: Message, model: str, *, query: bool = False) -> JsonObject:
    """Return the stdin line of a message; `query` makes it the one that starts the call."""
    line: JsonObject = {"type": message.role, "parent_tool_use_id": None, "session_id": ""}
    if message.role == "user":
        inner: JsonObject = {"role": "user", "content": message.content}
        line |= {"message": inner, "client_composed": True}  # verbatim: no @paths, no commands
        return line if query else {**line, "shouldQuery": False}
    content = message.content
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    line["uuid"] = str(uuid.uuid4())
    line["message"] = {
        "id": "msg_" + uuid.uuid4().hex,
        "type": "message",
        "role": "assistant",
        "model": model,  # of another model the CLI would drop thinking blocks
        "content": blocks,
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},  # others would be counted as real
    }
    return line


# ========================================================================= Pool
# Keeps idle children warm, lends each to one request, and keeps parked those that hold a
# conversation. Rule 1: a child is owned by the pool or by one request, never both. Rule 2: nothing
# blocks while holding the lock. One keeper thread starts, prepares, renews and reaps children; the
# public methods run on request threads. What conversations and setups are is not known here, only
# their labels.


@dataclass(frozen=True, slots=True)
class Want:
    """What kind of child a request can use. The labels tell callers apart as well."""

    conversation: bytes | None  # of a parked child
    fit: bytes  # of a prepared spare
    prepare: Callable[[Child], None]  # makes a blank spare fit; does not wait
    queued: Callable[[int], None]  # told the place, from 1, of a request that has to wait


class _Waiter:
    """A request's place in the queue. All but `ready` is guarded by the pool's lock."""

    def __init__(self, fit: bytes | None) -> None:
        self.fit = fit
        self.ready = threading.Event()  # set with a child or a failure in place
        self.child: Child | None = None
        self.failure = "the gateway is shutting down"
        self.has_left = False


_SHORTAGES: Final = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class _Parked:
    conversation: bytes
    until: float  # monotonic


class Pool:
    """Warm children. `start` makes one (it may raise OSError); `stamp` tells a new executable.

    `told` is called with children that may have told more since they were handed back.
    """

    def __init__(
        self,
        start: Callable[[], Child],
        settings: Settings,
        stamp: Callable[[], object],
        told: Callable[[Child], None],
    ) -> None:
        self._start = start
        self._settings = settings
        self._stamp = stamp
        self._told = told
        # Guarded by _changed: all fields below.
        self._changed = threading.Condition()
        self._idle: collections.deque[Child] = collections.deque()
        self._parked: dict[Child, _Parked] = {}  # least recently used first
        self._waiters: collections.deque[_Waiter] = collections.deque()
        self._lent: set[Child] = set()
        self._new: set[Child] = set()  # the lent ones that serve a new conversation
        self._starting = 0  # children that are being started for a waiter: 0 or 1
        self._owed: set[Child] = set()  # claimed spares whose replacement has not been asked for
        self._unbegun: set[Child] = set()  # lent for a new conversation, before the first delta
        self._ending: dict[Child, float] = {}  # with the time at which SIGKILL is due
        self._next_spare_at = 0.0  # monotonic; put off when a start has failed
        self._peak, self._peak_at = 1, 0.0  # new conversations at once, and when (monotonic)
        self._busy_at = 0.0  # when a new conversation came last
        self._fits: collections.deque[bytes] = collections.deque(maxlen=RECENT_FITS)
        self._repeated: Want | None = None  # a setup that came again: spares are prepared for it
        self._failure = ""  # why the last start failed; "" after one that did not
        self._closed = False
        # One thread forks all children, since on Linux they die with the thread that forked them.
        self._keeper = threading.Thread(target=self._keep, name="cc2api-keeper", daemon=True)
        self._keeper.start()

    def acquire(self, patience: Patience, want: Want | None = None) -> Child:
        """Take the child that holds the wanted conversation, or an idle one, or wait in order.

        Raises ApiError (529), CliFailed, and what the patience raises.
        """
        waiter = _Waiter(want.fit if want else None)
        with self._changed:
            if self._closed:
                raise CliFailed("the gateway is shutting down", status=503)
            if want is not None:
                if (child := self._take_parked(want.conversation)) is not None:
                    return child
                self._note_setup(want)
            if len(self._waiters) >= self._settings.max_queue + self._room() + len(self._parked):
                raise ApiError(
                    "Overloaded: too many requests are waiting",
                    status=529,
                    retry_after_s=OVERLOADED_RETRY_AFTER_S,
                )
            self._waiters.append(waiter)
            self._serve_waiters()
            place = len(self._waiters) if self._room() <= 0 else 0
            self._changed.notify_all()
        if want is not None and place and not waiter.ready.is_set():
            want.queued(place)
        try:
            while not waiter.ready.wait(patience.slice_s()):
                pass
        except BaseException:
            with self._changed:
                waiter.has_left = True
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if waiter.child is not None:  # it came in the last moment
                self.release(waiter.child, kill=True)
            raise
        if waiter.child is None:
            raise CliFailed(waiter.failure, status=503)
        return waiter.child

    def refill(self, child: Child) -> None:
        """Let a claimed spare be replaced: its answer has begun.

        Not at the claim, since a starting process takes 0.4 s of CPU from the one that answers
        (seen: 160 ms against 80 to the first delta on two cores).
        """
        with self._changed:
            if child in self._unbegun:
                self._failure = ""
                self._unbegun.discard(child)
                self._owed.discard(child)
                self._changed.notify_all()

    def release(self, child: Child, *, kill: bool) -> None:
        """Take a child back and end it; `kill` at once, or let it finish by itself."""
        if kill:
            child.kill()
        else:
            child.finish()
        with self._changed:
            self._take_back(child)
            self._ending[child] = time.monotonic() + EXIT_GRACE_S
            self._changed.notify_all()

    def park(self, child: Child, conversation: bytes) -> None:
        """Take a child back and keep it for the next turn of the conversation that it holds."""
        is_short = (available_memory() or MIN_FREE_BYTES) < MIN_FREE_BYTES
        with self._changed:
            self._take_back(child)
            until = time.monotonic() + self._settings.live_ttl
            self._parked[child] = _Parked(conversation, until)
            while len(self._parked) > (0 if is_short or self._closed else self._settings.live):
                self._end_parked(next(iter(self._parked)))
            self._changed.notify_all()

    def counts(self) -> dict[str, int]:
        """Return how many children there are in each state."""
        with self._changed:
            return {
                "idle": len(self._idle),
                "busy": len(self._lent),
                "parked": len(self._parked),
                "ending": len(self._ending),
            }

    def waiting(self) -> int:
        """Return how many requests wait for a child."""
        return len(self._waiters)

    def failure(self) -> str:
        """Return why no child can be started; "" where one can, or did."""
        return self._failure

    def close(self) -> None:
        """End every child, lent ones too, and wait until the last is reaped."""
        with self._changed:
            self._closed = True
            for child in self._lent:
                child.kill()  # whoever has it notices, and releases it
            for child in (*self._idle, *self._parked):
                child.kill()
                self._ending[child] = time.monotonic()
            self._idle.clear()
            self._parked.clear()
            for waiter in self._waiters:
                waiter.ready.set()
            self._waiters.clear()
            self._changed.notify_all()
        self._keeper.join(EXIT_GRACE_S)

    # ---- all below hold the lock, but for _keep and _start_one

    def _note_setup(self, want: Want) -> None:
        """Note what a new conversation needs; spares are prepared for what comes most often."""
        self._busy_at = time.monotonic()
        self._fits.append(want.fit)
        counts = collections.Counter(self._fits)
        # by two, lest two setups that take turns push each other's spares out
        if counts[want.fit] > 1 + (counts[self._repeated.fit] if self._repeated else 0):
            self._repeated = want

    def _take_back(self, child: Child) -> None:
        for owned in (self._lent, self._new, self._owed, self._unbegun):
            owned.discard(child)

    def _take_parked(self, conversation: bytes | None) -> Child | None:
        """Lend the child that was last parked with a conversation."""
        for child, parked in reversed(self._parked.items()):
            if parked.conversation == conversation and child.is_alive():
                del self._parked[child]
                self._lent.add(child)
                return child
        return None

    def _end_parked(self, child: Child) -> None:
        del self._parked[child]
        child.kill()
        self._ending[child] = time.monotonic() + EXIT_GRACE_S

    def _room(self) -> int:
        """Return how many more children may be lent while all parked ones stay."""
        return self._settings.max_concurrency - len(self._lent) - len(self._parked) - self._starting

    def _serve_waiters(self) -> None:
        """Lend idle children to those who wait, in order; parked ones give way to them."""
        self._retire_unfit()
        while self._waiters:
            if self._room() <= 0 and not self._parked:
                return
            if self._room() <= 0:
                self._end_parked(next(iter(self._parked)))
            child = self._take_idle(self._waiters[0].fit)
            if child is None:
                return
            self._owed.add(child)
            self._lend(child, self._waiters.popleft())

    def _take_idle(self, fit: bytes | None) -> Child | None:
        """Take a spare that was prepared for just this, else a blank one."""
        usable = [child for child in self._idle if child.fit in (fit, None)]
        if not usable:
            return None
        child = next((child for child in usable if child.fit is not None), usable[0])
        self._idle.remove(child)
        return child

    def _lend(self, child: Child, waiter: _Waiter) -> None:
        self._lent.add(child)
        self._new.add(child)
        self._unbegun.add(child)
        if len(self._new) >= self._peak:
            self._peak, self._peak_at = len(self._new), time.monotonic()
        waiter.child = child
        waiter.ready.set()

    def _retire_unfit(self) -> None:
        """Move dead, aged and outdated idle children, and those past need, to the ending ones."""
        now, stamp = time.monotonic(), self._stamp()
        if now - self._peak_at > SPARE_MEMORY_S:
            self._peak, self._peak_at = max(1, len(self._new)), now
        if now - self._busy_at > SPARE_MEMORY_S:
            self._repeated = None
        useful = [child for child in self._idle if self._is_useful(child)]
        others = [child for child in self._idle if not self._is_useful(child)]
        kept = max(0, self._settings.spares_max - self._wanted_spares()) if self._repeated else 0
        # of the others the newest are kept, and of all a blank one
        useful.sort(key=lambda child: child.fit is None, reverse=True)
        fit = useful[: self._wanted_spares()] + others[max(0, len(others) - kept) :]
        for child in list(self._idle):
            is_old = now - child.started_at > SPARE_MAX_AGE_S
            is_outdated = stamp is not None and stamp != child.stamp
            if child not in fit or is_old or is_outdated or not child.is_alive():
                if child.has_failed():
                    if not self._failure:
                        log.error("claude ends right after its start: try `cc2api --check`")
                    self._failure = "claude ends right after its start"
                    self._next_spare_at = now + KEEPER_TICK_S
                self._idle.remove(child)
                child.finish()
                self._ending[child] = now + EXIT_GRACE_S
        if any(now - child.started_at > STABLE_S for child in self._idle):
            self._failure = ""
        for child, parked in list(self._parked.items()):
            is_old = now - child.started_at > SPARE_MAX_AGE_S
            is_outdated = stamp is not None and stamp != child.stamp
            if now >= parked.until or is_old or is_outdated or not child.is_alive():
                self._end_parked(child)

    def _is_useful(self, child: Child) -> bool:
        """Say whether a spare is blank, or prepared for the setup that comes again and again."""
        return child.fit is None or (self._repeated is not None and child.fit == self._repeated.fit)

    def _wanted_spares(self) -> int:
        """Return how many useful spares there should be: as many as came at once, and a blank."""
        if self._settings.spares == 0:
            return 0
        wanted = min(self._peak + (self._repeated is not None), self._settings.spares_max)
        return max(self._settings.spares, wanted)

    def _prepare_spares(self) -> None:
        """Prepare all spares but one for a setup that comes again and again."""
        if (repeated := self._repeated) is not None:
            blank = [child for child in self._idle if child.fit is None]
            for child in blank[1:]:
                child.fit = repeated.fit
                repeated.prepare(child)

    def _keep(self) -> None:
        """Run the keeper thread: serve waiters first, then spares; reap; until closed and empty."""
        while True:
            waiter: _Waiter | None = None
            with self._changed:
                if not self._closed:
                    self._serve_waiters()
                    self._prepare_spares()
                for child in self._parked:
                    child.look_ahead()
                    self._told(child)
                self._reap()
                if self._waiters and self._room() > 0:
                    waiter = self._waiters.popleft()
                    self._starting = 1
                elif not self._lacks_spare():
                    if self._closed and not self._ending and not self._lent:
                        return
                    self._changed.wait(self._next_look_s())
                    continue
            self._start_one(waiter)

    def _next_look_s(self) -> float:
        """Return in how many seconds something may be due."""
        if self._ending:
            return REAP_TICK_S
        ends = [parked.until - time.monotonic() for parked in self._parked.values()]
        return max(0.0, min([KEEPER_TICK_S, *ends]))

    def _lacks_spare(self) -> bool:
        """Say whether a spare is to be started now."""
        if len(self._unbegun) >= max(1, (os.cpu_count() or 1) - 1):
            return False  # it would take the processor from those who wait for their first delta
        useful = sum(map(self._is_useful, self._idle))
        enough = useful + len(self._owed) >= self._wanted_spares()
        return not (self._closed or enough or time.monotonic() < self._next_spare_at)

    def _reap(self) -> None:
        """Collect ended children; kill those whose grace is over."""
        for child, due in list(self._ending.items()):
            if child.reap():
                del self._ending[child]
                self._told(child)
            elif time.monotonic() >= due:
                child.kill()

    def _start_one(self, waiter: _Waiter | None) -> None:
        """Start a child for a waiter, or as a spare. Runs without the lock."""
        child, failure, is_short = None, "", False
        try:
            child = self._start()
        except Exception as exc:  # noqa: BLE001 - without this thread nothing works any more
            is_short = isinstance(exc, OSError) and exc.errno in _SHORTAGES
            failure = f"claude cannot be started: {exc}"
            log.error("%s", failure)
        with self._changed:
            self._starting = 0
            self._failure = failure or self._failure
            if is_short and self._parked and waiter is not None and not waiter.has_left:
                self._end_parked(next(iter(self._parked)))  # perhaps there is room for it now
                self._waiters.appendleft(waiter)
                return
            if child is None:
                self._next_spare_at = time.monotonic() + KEEPER_TICK_S
                if waiter is not None:
                    waiter.failure = failure
            elif self._closed:
                child.kill()
                self._ending[child] = time.monotonic()
            elif waiter is not None and not waiter.has_left:
                self._lend(child, waiter)
            else:
                self._idle.append(child)
            if waiter is not None:
                waiter.ready.set()


def available_memory() -> int | None:
    """Return how many bytes of memory processes can still get; None where that is not told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").split("\n"):
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# ======================================================================= Events
# The child's lines to Anthropic events, and events to one message. Pure: no I/O, no threads.

Event = JsonObject

# After an answer with one of these stop reasons and something said, the CLI's turn is over. After
# any other (max_tokens, refusal, model_context_window_exceeded), and after an empty answer, it asks
# upstream again by itself (seen, 2.1.330).
_QUIET_STOP_REASONS: Final = ("end_turn", "stop_sequence", "tool_use")

# For failures that carry no status: the CLI's own word for them, on its `assistant` line.
_STATUS_BY_CLI_ERROR: Final = {
    "authentication_failed": 401,
    "oauth_org_not_allowed": 403,
    "billing_error": 402,
    "rate_limit": 429,
    "invalid_request": 400,
    "model_not_found": 404,
    "max_output_tokens": 400,
}
_NOT_SIGNED_IN: Final = (
    "claude is not signed in on the gateway's machine, or its sign-in was refused: run `claude`"
    " there and type /login, or start the gateway with a valid ANTHROPIC_API_KEY"
)
# What the CLI puts around upstream's message (seen, 2.1.330 and 2.1.248).
_DECORATION: Final = re.compile(
    r"(?:Failed to authenticate\. |Please run /login · )?"
    r"API Error: "
    r"(?:(?:Request rejected|Server is temporarily limiting requests) \([^)]*\) · |\d{3} )?"
    r"(?P<message>.*?)"
    r"(?:\. This is a server-side issue, usually temporary.*)?\Z",
    re.DOTALL,
)
_MODEL_ISSUE: Final = re.compile(r"There's an issue with the selected model \((.*?)\)", re.DOTALL)


_EVENTS: Final[dict[str, _Shape]] = {  # the events that are handed on, and what they must hold
    "message_start": _shape(
        "message!:dictionary", message=_shape("id!:string content!:list usage!:dictionary")
    ),
    "content_block_start": _shape(
        "index!:integer content_block!:dictionary", content_block=_shape("type!:string")
    ),
    "content_block_delta": _shape("index!:integer delta!:dictionary", delta=_shape("type!:string")),
    "content_block_stop": _shape("index!:integer"),
    "message_delta": _shape(
        "delta!:dictionary usage!:dictionary", delta=_shape("stop_reason:string")
    ),
}
_BLOCK_DEFAULTS: Final[dict[str, JsonObject]] = {
    "text": {"text": ""},
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
}
_DELTAS: Final[dict[str, _Shape]] = {
    "text_delta": _shape("text!:string"),
    "thinking_delta": _shape("thinking!:string"),
    "signature_delta": _shape("signature!:string"),
    "input_json_delta": _shape("partial_json!:string"),
}


class AnswerReader:
    """Turn the lines of one answer into events, and tell when it is complete.

    It is complete with the message_delta that carries a stop reason: message_stop, which always
    follows, is made here, so that the child can be stopped before it goes on by itself.
    """

    def __init__(self) -> None:
        self.is_called = False  # the CLI's call to upstream is on its way
        self.started = False  # message_start was seen
        self.done = False
        self.has_delta = False
        self._stop_reason: str | None = None
        self._cli_error: str | None = None
        self.content: list[JsonObject] = []  # the finished blocks, as the child remembers them
        self._blocks = 0  # content blocks begun
        self._block_is_open = False

    @property
    def must_kill(self) -> bool:
        """Whether the child would make another call if it were left alone."""
        says = any(str(block.get("text") or "").strip() for block in self.content)
        is_quiet = bool(self.tool_names) if self._stop_reason == "tool_use" else says
        return not (self.done and is_quiet and self._stop_reason in _QUIET_STOP_REASONS)

    @property
    def can_go_on(self) -> bool:
        """Whether the child holds the conversation just as the client was told it."""
        is_whole = len(self.content) == self._blocks
        has_calls = self._stop_reason == "tool_use"
        return not self.must_kill and is_whole and has_calls == bool(self.tool_names)

    @property
    def tool_use_ids(self) -> set[str]:
        """The ids of the answer's tool calls."""
        return {str(b.get("id")) for b in self.content if b.get("type") == "tool_use"}

    @property
    def tool_names(self) -> set[str]:
        """The names of the tools that the answer calls."""
        return {str(b.get("name")) for b in self.content if b.get("type") == "tool_use"}

    def feed(self, line: JsonObject) -> list[Event]:
        """Return the events that a line brings. Raises the ApiError that a failure line means."""
        kind = line.get("type")
        if line.get("parent_tool_use_id") is not None or self.done:
            return []
        if kind == "result":
            raise to_api_error(line, self._cli_error)
        if kind == "assistant" and line.get("error"):
            # A failure: what still comes are closing events of the CLI's own making, without a stop
            # reason, and then `result`. After a refusal the true message_delta comes.
            self._cli_error = str(line["error"])
        elif kind == "assistant":
            message = line.get("message")
            blocks = message.get("content") if isinstance(message, dict) else None
            self.content += [b for b in blocks if isinstance(b, dict)] if blocks else []
        event = line.get("event")
        if kind != "stream_event" or not isinstance(event, dict):
            return []
        delta = event.get("delta")
        if self._cli_error and not (isinstance(delta, dict) and delta.get("stop_reason")):
            return []
        return self._feed_event(event)

    def _feed_event(self, event: Event) -> list[Event]:
        kind = event.get("type")
        if kind == "message_stop" and self.started:
            # without a stop reason: upstream's stream broke between two blocks, and the CLI is
            # about to ask for the rest by a second call (seen, 2.1.330)
            raise CliFailed("upstream's stream ended before its answer was complete")
        if not isinstance(kind, str) or kind not in _EVENTS:
            return []
        if self.started == (kind == "message_start"):
            return []
        block = event.get("content_block")
        if kind == "content_block_start" and isinstance(block, dict):
            # some Anthropic-compatible upstreams leave these out, and SDKs stumble over that
            defaults = _BLOCK_DEFAULTS.get(str(block.get("type")), {})
            missing = {name: value for name, value in defaults.items() if name not in block}
            event = {**event, "content_block": {**block, **missing}}
        try:
            self._check_event(event, kind)
        except InvalidRequest as exc:
            raise CliFailed(f"claude broke its protocol: {kind}.{exc}") from exc
        if kind == "message_start":
            self.started = True
        elif kind == "content_block_delta":
            self.has_delta = True
        elif kind == "message_delta" and event["delta"].get("stop_reason") is not None:
            self._stop_reason = event["delta"]["stop_reason"]
            self.done = True
            return [event, {"type": "message_stop"}]
        return [event]

    def _check_event(self, event: Event, kind: str) -> None:
        """Check what clients' accumulators need (messages-api.md 4.3): fields, order of blocks."""
        _check(event, "", _EVENTS[kind])
        is_inside = kind in ("content_block_delta", "content_block_stop")
        if "index" in _EVENTS[kind] and event["index"] != self._blocks - is_inside:
            raise InvalidRequest("index: out of order")
        if self._block_is_open != is_inside:
            raise InvalidRequest("type: out of order")
        if kind == "content_block_start":
            block = event["content_block"]
            _check(block, "content_block.", _BLOCKS.get(block["type"], ((), {}))[1])
            self._blocks += 1
        elif kind == "content_block_delta":
            _check(event["delta"], "delta.", _DELTAS.get(event["delta"]["type"], {}))
        self._block_is_open = kind in ("content_block_start", "content_block_delta")


def to_rate_limit_headers(info: Any) -> dict[str, str]:
    """Return a plan's state as the headers that Claude Code reads (messages-api.md 1.2)."""
    names = {"five_hour": "-5h", "seven_day": "-7d"}
    info = info if isinstance(info, dict) else {}
    windows = info.get("unifiedWindows")
    states = {"": info}
    for window, state in (windows if isinstance(windows, dict) else {}).items():
        if window in names and isinstance(state, dict):
            states[names[window]] = state
    headers = {}
    for name, state in states.items():
        for key, ending in (("status", "status"), ("resetsAt", "reset"), ("utilization",) * 2):
            value = str(state.get(key, ""))
            if re.fullmatch(r"[a-z_]+|[0-9.]+", value) and (name or key != "utilization"):
                headers[f"anthropic-ratelimit-unified{name}-{ending}"] = value
    return headers


def to_api_error(result: JsonObject, cli_error: str | None = None) -> ApiError:
    """Return the error that a `result` line without a finished answer stands for.

    Status and type are upstream's where the CLI tells them (`api_error_status`,
    `api_error_type`), else by the CLI's own word for the failure, else 502.
    """
    text = result.get("result")
    if not isinstance(text, str):
        text = f"claude gave no answer: {result.get('errors')}"
    if not result.get("is_error"):
        return CliFailed("claude ended its turn without an answer")
    if text.startswith(("Not logged in", "Invalid API key")):
        return NotAuthenticated(_NOT_SIGNED_IN)
    if result.get("terminal_reason") == "blocking_limit":  # by `Child.hold_calls`, too early
        return CliFailed("claude held its call back; nothing was sent upstream", status=503)
    if text.startswith("Prompt is too long"):
        return InvalidRequest("prompt is too long for the model's context window")
    kind = result.get("api_error_type")
    kind = kind if isinstance(kind, str) and kind in STATUS_BY_TYPE else None
    status = result.get("api_error_status")
    if not isinstance(status, int) or not 400 <= status <= 599:
        status = STATUS_BY_TYPE.get(kind or "") or _STATUS_BY_CLI_ERROR.get(cli_error or "", 502)
    if model := _MODEL_ISSUE.match(text):
        return ApiError(f"model: {model.group(1)}", status=404)
    if decorated := _DECORATION.match(text):
        text = decorated.group("message")
    return ApiError(text, status=status, kind=kind)


class MessageAssembler:
    """Put the events of one answer together to the message of a non-streaming answer."""

    def __init__(self) -> None:
        self.message: JsonObject = {}
        self._json: list[str] = []  # of the tool_use block that is open

    def add(self, event: Event) -> None:
        """Take the next event that an AnswerReader gave out."""
        match event["type"]:
            case "message_start":
                usage = dict(event["message"]["usage"])
                self.message = {**event["message"], "content": [], "usage": usage}
            case "content_block_start":
                self.message["content"].append(dict(event["content_block"]))
                self._json = []
            case "content_block_delta":
                self._add_delta(self.message["content"][-1], event["delta"])
            case "content_block_stop" if self._json:
                self.message["content"][-1]["input"] = _parse_input("".join(self._json))
            case "message_delta":
                self.message.update(event["delta"])
                self.message["usage"].update(_without_nulls(event["usage"]))
                if event.get("context_management") is not None:
                    self.message["context_management"] = event["context_management"]

    def _add_delta(self, block: JsonObject, delta: JsonObject) -> None:
        match delta["type"]:
            case "text_delta":
                block["text"] = block.get("text", "") + delta["text"]
            case "thinking_delta":
                block["thinking"] = block.get("thinking", "") + delta["thinking"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "input_json_delta":
                self._json.append(delta["partial_json"])
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or []), delta.get("citation")]
            case "compaction_delta":
                block["content"] = delta.get("content")


def _parse_input(text: str) -> Any:
    """Parse a tool's input; {} where max_tokens cut it short or nothing was sent."""
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}


# =========================================================== OpenAI translation
# OpenAI chat completions to the Messages API and back: a translation, not a second pipeline. Pure.

_CHAT: Final = _shape(
    "model!:string messages!:list stream:boolean stream_options:dictionary n:integer>=1<=1"
    " temperature:number>=0<=2 top_p:number>=0<=1 max_tokens:integer>=1 user:string"
    " max_completion_tokens:integer>=1 tools:list functions:list parallel_tool_calls:boolean"
    " response_format:dictionary modalities:list"
    " reasoning_effort:string=none|minimal|low|medium|high|xhigh|max",
    stream_options=_shape("include_usage:boolean"),
    response_format=_shape(
        "type!:string=text|json_object|json_schema json_schema:dictionary",
        json_schema=_shape("schema:dictionary"),
    ),
)
_CHAT_ENTRY: Final = _shape("role!:string=system|developer|user|assistant|tool|function")
_FUNCTION: Final = _shape("name!:string description:string parameters:dictionary strict:boolean")
_CHAT_TOOL: Final = _shape("type!:string=function|custom function:dictionary custom:dictionary")
_TOOL_CALL: Final = _shape(
    "id!:string function:dictionary custom:dictionary",
    function=_shape("name!:string arguments:string"),
    custom=_shape("name!:string input!:string"),
)
_PART_TYPES: Final = "type!:string=text|refusal|image_url|file"
_PART: Final[dict[str, _Shape]] = {
    "text": _shape("text!:string"),
    "refusal": _shape("refusal!:string"),
    "image_url": _shape("image_url!:dictionary", image_url=_shape("url!:string")),
    "file": _shape("file!:dictionary", file=_shape("file_data!:string filename:string")),
}
_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=-]+)*;base64,(.*)\Z", re.DOTALL)
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}
_CUSTOM_INPUT: Final = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
_JSON_OBJECT_PROMPT: Final = "Answer with one bare JSON object and nothing else: no code fences."
_EFFORT_BY_REASONING: Final = {"none": None, "minimal": "low"}  # others keep their name
_FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How the client wants its chat completion, beyond what a Turn says."""

    created: int  # Unix seconds
    include_usage: bool = False
    custom_tools: frozenset[str] = frozenset()  # answered as `custom`, not `function`
    is_legacy: bool = False  # `functions` were given: answered as `function_call`


def parse_chat_request(
    body: JsonObject, created: int, *, login: bool = False
) -> tuple[Turn, ChatStyle]:
    """Check a chat completions request; return the Turn, and the style of the answer.

    Raises InvalidRequest. Fields that Anthropic's own OpenAI layer ignores are ignored.
    """
    for name in ("audio", "logprobs", "top_logprobs"):
        if body.get(name):
            raise InvalidRequest(f"{name}: not supported by this gateway")
    _check(body, "", _CHAT)
    if "audio" in (body.get("modalities") or []):
        raise InvalidRequest("modalities: audio is not supported by this gateway")
    tools, custom = _chat_tools(body)
    if body.get("functions") and custom:
        raise InvalidRequest("functions: not together with custom tools")
    choice, tools = _chat_tool_choice(body, tools)
    system, messages = _chat_messages(body)
    form = body.get("response_format") or {}
    schema = (form.get("json_schema") or {}).get("schema")
    if form.get("type") == "json_object" or (form.get("json_schema") and schema is None):
        system.append({"type": "text", "text": _JSON_OBJECT_PROMPT})
    if form.get("type") == "json_schema" and not form.get("json_schema"):
        raise InvalidRequest("response_format.json_schema: Field required")
    effort = body.get("reasoning_effort")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops is not None and not isinstance(stops, list):
        raise InvalidRequest("stop: Input should be a valid string or list")
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None and top_p == 1:
        top_p = None  # it says nothing, and newer models refuse the two together
    translated = {
        "model": body["model"],
        "messages": messages,
        "system": system,
        "stream": body.get("stream"),
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens"),
        "temperature": None if temperature is None else min(temperature, 1),
        "top_p": top_p,
        "stop_sequences": stops and [s for s in stops if not isinstance(s, str) or s.strip()],
        "tools": tools or None,
        "tool_choice": choice if tools else None,
        "effort": _EFFORT_BY_REASONING.get(effort, effort) if effort else None,
        "output_format": None,
    }
    if form.get("type") == "json_schema" and schema is not None:
        translated["output_format"] = {"type": "json_schema", "schema": schema}
    turn = _parse_turn(translated, "", login=login)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return turn, ChatStyle(created, usage, custom, bool(body.get("functions")))


def _chat_tools(body: JsonObject) -> tuple[list[JsonObject], frozenset[str]]:
    """Return the tools in Anthropic's form, and the names of those that are `custom`."""
    tools, custom = [], set()
    for path, tool in _objects(body, "tools"):
        _check(tool, f"{path}.", _CHAT_TOOL)
        kind = tool["type"]
        inner: Any = tool.get(kind)
        _check_value(inner, f"{path}.{kind}", _Rule(dict))
        _check(inner, f"{path}.{kind}.", _FUNCTION)
        if kind == "custom":
            custom.add(inner["name"])
        tools.append(_to_tool(inner, _CUSTOM_INPUT if kind == "custom" else _NO_PARAMETERS))
    for path, function in _objects(body, "functions"):
        _check(function, f"{path}.", _FUNCTION)
        tools.append(_to_tool(function, _NO_PARAMETERS))
    return tools, frozenset(custom)


def _to_tool(function: JsonObject, default_schema: JsonObject) -> JsonObject:
    schema = function.get("parameters") or default_schema
    tool = {name: function.get(name) for name in ("name", "description", "strict")}
    return {**_without_nulls(tool), "input_schema": schema}


def _chat_tool_choice(
    body: JsonObject, tools: list[JsonObject]
) -> tuple[JsonObject | None, list[JsonObject]]:
    """Return tool_choice in Anthropic's form, and the tools that it leaves."""
    choice = body.get("tool_choice") or body.get("function_call")
    simple = {"none": "none", "auto": "auto", "required": "any"}
    named: Any = None
    if isinstance(choice, dict):
        kind = str(choice.get("type", "function"))
        named = choice if "name" in choice else choice.get(kind)
        if kind == "allowed_tools":
            named = named if isinstance(named, dict) else choice
            allowed = [
                (tool, tool.get(str(tool.get("type")))) for _, tool in _objects(named, "tools")
            ]
            names = [
                (inner if isinstance(inner, dict) else tool).get("name") for tool, inner in allowed
            ]
            tools = [tool for tool in tools if tool["name"] in names]
            choice, named = named.get("mode", "auto"), None
    if named is not None and isinstance(named, dict) and isinstance(named.get("name"), str):
        result = {"type": "tool", "name": named["name"]}
    elif choice is None or (isinstance(choice, str) and choice in simple):
        result = {"type": simple[choice or "auto"]}
    else:
        raise InvalidRequest("tool_choice: Input should be none, auto, required or name a tool")
    # a legacy function_call can hold only one call
    is_single = body.get("parallel_tool_calls") is False or body.get("functions")
    if is_single and tools and result["type"] != "none":
        return {**result, "disable_parallel_tool_use": True}, tools
    return (result if choice is not None else None), tools


def _chat_messages(body: JsonObject) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return system blocks, hoisted from wherever they stand, and the messages."""
    system: list[JsonObject] = []
    messages: list[JsonObject] = []
    called: dict[tuple[str, str], str] = {}  # ids of the calls made, by role and id or name
    for path, entry in _objects(body, "messages"):
        _check(entry, f"{path}.", _CHAT_ENTRY)
        role = entry["role"]
        if role in ("system", "developer"):
            system += _said(_chat_blocks(entry, path))
        elif role == "user":
            blocks = _chat_blocks(entry, path)
            messages.append({"role": "user", "content": _said(blocks) or blocks})
        elif role == "assistant":
            blocks = _said([*_chat_blocks(entry, path), *_chat_calls(entry, path)])
            for block in blocks:
                if block["type"] == "tool_use":
                    called["tool", block["id"]] = called["function", block["name"]] = block["id"]
            if blocks:
                messages.append({"role": "assistant", "content": blocks})
        else:
            field_name = "tool_call_id" if role == "tool" else "name"
            call = called.get((role, str(entry.get(field_name))))
            if call is None:
                raise InvalidRequest(f"{path}.{field_name}: no such tool call was made before")
            result: JsonObject = {"type": "tool_result", "tool_use_id": call}
            content = _said(_chat_blocks(entry, path))
            messages.append({"role": "user", "content": [{**result, "content": content}]})
    return system, messages


def _said(blocks: Iterable[JsonObject]) -> list[JsonObject]:
    """Leave out blank texts, which OpenAI takes and Anthropic does not."""
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def _chat_blocks(entry: JsonObject, path: str) -> list[JsonObject]:
    """Return a chat message's content as Anthropic blocks."""
    content = entry.get("content")
    if content is None and entry["role"] in ("assistant", "tool", "function"):
        content = entry.get("refusal") or ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content or entry["role"] == "user" else []
    if not isinstance(content, list):
        raise InvalidRequest(f"{path}.content: Input should be a valid string or list")
    blocks = []
    for index, part in enumerate(content):
        place = f"{path}.content.{index}"
        _check_value(part, place, _Rule(dict))
        _check(part, f"{place}.", _shape(_PART_TYPES))
        _check(part, f"{place}.", _PART[part["type"]])
        if part["type"] in ("image_url", "file") and entry["role"] != "user":
            raise InvalidRequest(f"{place}.type: only text is taken in {entry['role']} messages")
        blocks.append(_chat_part(part, place))
    return blocks


def _chat_part(part: JsonObject, path: str) -> JsonObject:
    """Return a content part as an Anthropic block."""
    if part["type"] in ("text", "refusal"):
        return {"type": "text", "text": part[part["type"]]}
    if part["type"] == "image_url":
        url = part["image_url"]["url"]
        if data := _DATA_URL.match(url):
            media_type = data[1].replace("image/jpg", "image/jpeg")
            source = {"type": "base64", "media_type": media_type, "data": data[2]}
            _check_source(source, f"{path}.image_url.url", "image")
            return {"type": "image", "source": source}
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"{path}.image_url.url: Input should be an http or data URL")
        return {"type": "image", "source": {"type": "url", "url": url}}
    file = part["file"]
    data = _DATA_URL.match(file["file_data"])
    media_type, encoded = (data[1], data[2]) if data else ("application/pdf", file["file_data"])
    block: JsonObject = {"type": "document"}
    if file.get("filename"):
        block["title"] = file["filename"]
    if media_type == "application/pdf":
        source = {"type": "base64", "media_type": media_type, "data": encoded}
    else:
        try:
            text = base64.b64decode(encoded, validate=True).decode("utf-8")
        except ValueError:
            raise InvalidRequest(f"{path}.file.file_data: neither a PDF nor text") from None
        source = {"type": "text", "media_type": "text/plain", "data": text}
    _check_source(source, f"{path}.file.file_data", "document")
    return {**block, "source": source}


def _chat_calls(entry: JsonObject, path: str) -> Iterator[JsonObject]:
    """Yield an assistant message's tool calls as tool_use blocks."""
    for place, call in _objects(entry, "tool_calls"):
        _check(call, f"{path}.{place}.", _TOOL_CALL)
        if custom := call.get("custom"):
            yield _to_tool_use(call["id"], custom["name"], {"input": custom["input"]})
            continue
        where = f"{path}.{place}.function"
        function: Any = call.get("function")
        _check_value(function, where, _Rule(dict))
        yield _to_tool_use(call["id"], function["name"], _arguments(function, where))
    if (function := entry.get("function_call")) is not None:
        where = f"{path}.function_call"
        _check_value(function, where, _Rule(dict))
        _check(function, f"{where}.", _shape("name!:string arguments:string"))
        call_id = "call_" + re.sub(r"\W", "_", f"{path}_{function['name']}")
        yield _to_tool_use(call_id, function["name"], _arguments(function, where))


def _to_tool_use(call_id: str, name: str, given: JsonObject) -> JsonObject:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def _arguments(function: JsonObject, path: str) -> JsonObject:
    try:
        return parse_json((function.get("arguments") or "{}").encode())
    except (InvalidRequest, UnicodeError):
        problem = "Input should be a JSON object in a string"
        raise InvalidRequest(f"{path}.arguments: {problem}") from None


def to_chat_usage(usage: JsonObject) -> JsonObject:
    """Return a message's usage as OpenAI counts it."""
    counts = collections.defaultdict(int, _without_nulls(usage))
    cached, written = counts["cache_read_input_tokens"], counts["cache_creation_input_tokens"]
    prompt, completion = counts["input_tokens"] + cached + written, counts["output_tokens"]
    thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def _to_tool_call(block: JsonObject, arguments: str, style: ChatStyle) -> JsonObject:
    """Return a tool call in the style that the client knows."""
    if block["name"] in style.custom_tools:
        given = _parse_input(arguments).get("input", "")
        custom = {"name": block["name"], "input": given}
        return {"id": block["id"], "type": "custom", "custom": custom}
    function = {"name": block["name"], "arguments": arguments}
    return {"id": block["id"], "type": "function", "function": function}


def to_completion(message: JsonObject, style: ChatStyle) -> JsonObject:
    """Return a finished message as a chat completion."""
    blocks = message["content"]
    calls = [
        _to_tool_call(block, json.dumps(block["input"]), style)
        for block in blocks
        if block["type"] == "tool_use"
    ]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    thinking = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    details = message.get("stop_details") or {}
    refusal = details.get("explanation") if message["stop_reason"] == "refusal" else None
    reply: JsonObject = {"role": "assistant", "content": text or (None if calls else "")}
    reply["refusal"] = refusal
    if thinking:
        reply["reasoning_content"] = thinking
    finish = _FINISH_REASONS.get(message["stop_reason"], "stop")
    if calls and style.is_legacy:
        reply["function_call"] = calls[0]["function"]
        finish = "function_call" if finish == "tool_calls" else finish
    elif calls:
        reply["tool_calls"] = calls
    return {
        "id": "chatcmpl-" + str(message["id"]).removeprefix("msg_"),
        "object": "chat.completion",
        "created": style.created,
        "model": message.get("model"),
        "choices": [{"index": 0, "message": reply, "logprobs": None, "finish_reason": finish}],
        "usage": to_chat_usage(message["usage"]),
        "system_fingerprint": None,
    }


class ChunkWriter:
    """Turn the events of one answer into chat completion chunks (messages-api.md 7.3).

    `feed` returns the chunks that an event makes; after message_stop `[DONE]` is still to be sent.
    """

    def __init__(self, style: ChatStyle) -> None:
        self._style = style
        self._base: JsonObject = {}
        self._usage: JsonObject = {}
        self._stop_reason: str | None = None
        self._calls = 0
        self._tool: JsonObject | None = None  # the tool_use block that is open
        self._arguments = ""  # what has been sent, or for custom tools kept, of its input

    def feed(self, event: Event) -> list[JsonObject]:
        """Return the chunks for the next event that an AnswerReader gave out."""
        match event["type"]:
            case "message_start":
                return [self._start(event["message"])]
            case "content_block_start" if event["content_block"]["type"] == "tool_use":
                return self._start_tool(event["content_block"])
            case "content_block_delta":
                return self._feed_delta(event["delta"])
            case "content_block_stop" if self._tool is not None:
                return self._end_tool(self._tool)
            case "message_delta":
                self._usage.update(_without_nulls(event["usage"]))
                self._stop_reason = event["delta"].get("stop_reason")
            case "message_stop":
                return self._end()
        return []

    def _chunk(self, delta: JsonObject, finish: str | None = None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._base, "choices": [choice]}

    def _start(self, message: JsonObject) -> JsonObject:
        self._base = {
            "id": "chatcmpl-" + str(message["id"]).removeprefix("msg_"),
            "object": "chat.completion.chunk",
            "created": self._style.created,
            "model": message.get("model"),
            "system_fingerprint": None,
        }
        if self._style.include_usage:
            self._base["usage"] = None
        self._usage = _without_nulls(message["usage"])
        return self._chunk({"role": "assistant", "content": ""})

    def _call(self, **fields: Any) -> JsonObject:
        """Return the chunk of a part of the current tool call."""
        if self._style.is_legacy:
            return self._chunk({"function_call": fields["function"]})
        return self._chunk({"tool_calls": [{"index": self._calls - 1, **fields}]})

    def _start_tool(self, block: JsonObject) -> list[JsonObject]:
        self._tool, self._arguments = block, ""
        self._calls += 1
        if block["name"] in self._style.custom_tools:
            return []  # its input is inside JSON, so it goes out whole
        function = {"name": block["name"], "arguments": ""}
        return [self._call(id=block["id"], type="function", function=function)]

    def _feed_delta(self, delta: JsonObject) -> list[JsonObject]:
        match delta["type"]:
            case "text_delta" if delta["text"]:
                return [self._chunk({"content": delta["text"]})]
            case "thinking_delta" if delta["thinking"]:
                return [self._chunk({"reasoning_content": delta["thinking"]})]
            case "input_json_delta" if delta["partial_json"] and self._tool:
                self._arguments += delta["partial_json"]
                if self._tool["name"] not in self._style.custom_tools:
                    return [self._call(function={"arguments": delta["partial_json"]})]
        return []

    def _end_tool(self, block: JsonObject) -> list[JsonObject]:
        self._tool = None
        if block["name"] in self._style.custom_tools:
            arguments = self._arguments or json.dumps(block["input"])
            return [self._call(**_to_tool_call(block, arguments, self._style))]
        whole = json.dumps(block["input"])  # some upstreams give it with the start, without deltas
        return [] if self._arguments else [self._call(function={"arguments": whole})]

    def _end(self) -> list[JsonObject]:
        finish = _FINISH_REASONS.get(self._stop_reason or "", "stop")
        if finish == "tool_calls" and self._style.is_legacy:
            finish = "function_call"
        chunks = [self._chunk({}, finish)]
        if self._style.include_usage:
            chunks.append({**self._base, "choices": [], "usage": to_chat_usage(self._usage)})
        return chunks


# Anthropic status to OpenAI's status, type and code (messages-api.md 7.4); others keep the status.
_OPENAI_ERRORS: Final[dict[int, tuple[int, str, str | None]]] = {
    400: (400, "invalid_request_error", None),
    401: (401, "invalid_request_error", "invalid_api_key"),
    402: (429, "insufficient_quota", "insufficient_quota"),
    403: (403, "permission_error", None),
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
    if "Field required" in message:
        code = "missing_required_parameter"
    if "prompt is too long" in message or "context limit" in message:
        code = "context_length_exceeded"
    inner = {"message": message, "type": kind, "param": param, "code": code}
    return status, {"error": inner}


# ====================================================================== Metrics
# What has happened since the start, for / and /metrics. Callers go by name, never by key.

_COUNTERS: Final = {
    "cc2api_requests_total": "Requests answered.",
    "cc2api_tokens_total": "Tokens as upstream counted them.",
    "cc2api_cost_dollars_total": "Cost as the CLI reported it, once it did.",
}
_HISTOGRAMS: Final = {
    "cc2api_first_delta_seconds": "From the request to the first delta of its answer.",
    "cc2api_request_seconds": "From the request to the end of its answer.",
}
_BUCKETS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
MAX_SERIES: Final = 2000  # of label values; more (say, of made-up model names) count as "other"
_Series = tuple[str, tuple[tuple[str, str], ...]]


class Metrics:
    """Counters and histograms. Any thread."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self._lock = threading.Lock()
        self._values: dict[_Series, float] = {}

    def add(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._add(name, value, labels)

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """Count a time in a histogram."""
        with self._lock:
            for limit in (*_BUCKETS_S, math.inf):
                is_in = float(seconds <= limit)
                self._add(
                    f"{name}_bucket", is_in, {**labels, "le": f"{limit:g}".replace("inf", "+Inf")}
                )
            self._add(f"{name}_sum", seconds, labels)
            self._add(f"{name}_count", 1, labels)

    def _add(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        series = (name, tuple(sorted(labels.items())))
        if series not in self._values and len(self._values) >= MAX_SERIES:
            series = (name, tuple((label, "other") for label in sorted(labels) if label != "le"))
        self._values[series] = self._values.get(series, 0) + value

    def total(self, name: str, /, **labels: str) -> float:
        """Return the sum of a counter over all series that have these labels."""
        with self._lock:
            return sum(
                value
                for (series, found), value in self._values.items()
                if series == name and labels.items() <= dict(found).items()
            )

    def render(self, gauges: Mapping[str, Mapping[str, int]]) -> str:
        """Return all in Prometheus' text format; `gauges` are values by name and state."""
        with self._lock:
            values = list(self._values.items())
        lines = []
        for name, states in gauges.items():
            lines.append(f"# TYPE {name} gauge")
            for state, count in states.items():
                lines.append(f'{name}{{state="{state}"}} {count}' if state else f"{name} {count}")
        for name, text in {**_COUNTERS, **_HISTOGRAMS}.items():
            kind = "counter" if name in _COUNTERS else "histogram"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for (series, labels), value in values:
                if series == name or series.removeprefix(name) in ("_bucket", "_sum", "_count"):
                    pairs = ",".join(
                        f"{label}={json.dumps(said, ensure_ascii=False)}" for label, said in labels
                    )
                    lines.append(f"{series}{{{pairs}}} {value:.12g}")
        return "\n".join([*lines, ""])


# ====================================================================== Gateway
# What the HTTP layer asks: a turn in, batches of events out. Owns the pool and the key file; knows
# nothing of sockets. Runs on request threads.


class Gateway:
    """The running service behind the HTTP server."""

    def __init__(self, settings: Settings, cli: Cli, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.cli = cli
        self.sign_in = "unknown"  # how the CLI says it is signed in, once it was asked
        self.metrics = Metrics()
        self.keys = KeyFile(settings.keys, required=needs_keys(settings))
        bare = wants_bare(settings.bare, environ)
        self.login = not bare
        self._model_map = dict(pair.split("=", 1) for pair in settings.model_map)
        self._models: list[JsonObject] = []  # the CLI's, as the last child told them
        self.rate_limits: dict[str, str] = {}  # the plan's state as headers, as last reported
        self._counts: dict[object, int] = {}  # of tokens, by digest of the request; guarded by:
        self._counts_lock = threading.Lock()
        self._temp = tempfile.TemporaryDirectory(prefix="cc-", ignore_cleanup_errors=True)
        # With a login the model is told this directory's name, so it says nothing.
        work_dir, temp_dir = Path(self._temp.name, "work"), Path(self._temp.name, "tmp")
        # Of its own the CLI runs git at every apply_flag_settings, to see whether the directory's
        # settings are tracked there; with this file it takes them to be (seen: 7 ms, then 4.5).
        (work_dir / ".claude").mkdir(parents=True)
        (work_dir / ".claude" / ".git").touch()
        temp_dir.mkdir()
        command = child_command(cli, bare=bare, setting_sources=settings.setting_sources)
        environment = child_environment(environ, str(temp_dir))

        def start() -> Child:
            os.stat(cli.path)  # raises the OSError that a shim around the CLI would hide
            return Child(command, environment, str(work_dir), cli.stamp())

        self.pool = Pool(start, settings, cli.stamp, self._note_cost)

    def answer(
        self,
        turn: Turn,
        caller: Caller,
        tick: Callable[[], None],
        queued: Callable[[int], None] = lambda place: None,
    ) -> Generator[list[Event], None, None]:
        """Yield the answer's events, in batches of those that were ready together.

        The last event is always message_stop. `tick` is called every TICK_S and may raise
        ClientGone; `queued` is told the request's place when it has to wait. Raises ApiError;
        closing the generator early ends the child at once.
        """
        turn = dataclasses.replace(turn, model=self._model_map.get(turn.model, turn.model))
        patience = self._patience(tick)
        setup, next_turn = to_setup(turn), without_breakpoints(turn)
        digest = hash_conversation(turn, caller)
        held = digest.digest() if can_resume(next_turn) else None
        prepare = functools.partial(begin_setup, setup=setup)
        deaths = 0
        while True:
            child = self.pool.acquire(patience, Want(held, setup.label(caller), prepare, queued))
            child.caller = caller
            was_parked = child.holds_conversation
            reader = AnswerReader()
            try:
                if was_parked:
                    resume_turn(child, next_turn, patience)
                else:
                    self._models = open_turn(child, turn, setup, patience) or self._models
                    child.send(to_line(turn.query, turn.model, query=True))
                last = yield from self._read_answer(child, reader, patience)
            except ChildDied as exc:
                log.warning("%s; nothing was sent upstream", exc)
                deaths += not was_parked
                if deaths == SETUP_ATTEMPTS:
                    raise CliFailed(str(exc), status=503) from exc
                continue
            finally:
                self._hand_back(child, reader, turn, digest)
            yield last
            return

    def _note_cost(self, child: Child) -> None:
        """Count what a child has newly told of its cost: it does after its answer."""
        if child.caller and child.cost_usd > child.noted_cost_usd:
            cost, child.noted_cost_usd = child.cost_usd - child.noted_cost_usd, child.cost_usd
            self.metrics.add("cc2api_cost_dollars_total", cost, caller=child.caller.name)

    def _hand_back(
        self, child: Child, reader: AnswerReader, turn: Turn, digest: hashlib._Hash
    ) -> None:
        """Park a child that can go on with its conversation; end any other."""
        self._note_cost(child)
        known = {tool["name"] for tool in child.setup.tools} if child.setup else set()
        if not (self.settings.live and reader.can_go_on and reader.tool_names <= known):
            self.pool.release(child, kill=reader.must_kill)
            return
        child.holds_conversation = True
        # A tool call that the CLI does not hand on but answers itself, it would go on from too.
        if child.tool_calls.keys() >= reader.tool_use_ids:
            child.allow_calls()
        hash_message(digest, turn.query)
        hash_message(digest, Message("assistant", reader.content))
        self.pool.park(child, digest.digest())

    def count_tokens(self, turn: Turn, tick: Callable[[], None]) -> int:
        """Return how many input tokens a turn has, by the API's own count; nothing is generated."""
        turn = dataclasses.replace(turn, model=self._model_map.get(turn.model, turn.model))
        tools = turn.extra_body.get("tools") or []
        text = repr((turn.model, turn.system, turn.history, turn.query, tools)).encode()
        return self._counted(hashlib.sha256(text).digest(), lambda: self._count(turn, tools, tick))

    def _counted(self, key: object, count: Callable[[], int]) -> int:
        """Return a count from the cache, or make it and keep it."""
        with self._counts_lock:
            if key in self._counts:
                return self._counts[key]
        found = count()
        with self._counts_lock:
            if len(self._counts) >= MAX_COUNTS:
                del self._counts[next(iter(self._counts))]
            self._counts[key] = found
        return found

    def _count(self, turn: Turn, tools: list[JsonObject], tick: Callable[[], None]) -> int:
        def usage(of: Turn, *counted: JsonObject) -> tuple[int, int]:
            return self._with_child(lambda c, p: read_context_usage(c, of, counted, p), tick)

        if not tools:
            return usage(turn)[0]
        blank = dataclasses.replace(turn, system=(), history=(), query=Message("user", "foo"))
        second = {**PADDING_TOOL, "name": PADDING_TOOL["name"] + "2"}

        def count_padding() -> int:
            return usage(blank, PADDING_TOOL, second)[1] - usage(blank, PADDING_TOOL)[1]

        padding = self._counted(("padding", turn.model), count_padding)
        total, counted = usage(turn, *tools, PADDING_TOOL)
        beside = COUNTED_BESIDE_TOOLS + padding - COUNTED_TOOLS_DEDUCTION
        return total + max(0, counted - beside)

    def _with_child(self, use: Callable[[Child, Patience], _T], tick: Callable[[], None]) -> _T:
        """Have a child do something that asks the model nothing."""
        patience = self._patience(tick)
        child = self.pool.acquire(patience)
        try:
            return use(child, patience)
        except ChildDied as exc:
            raise CliFailed(str(exc), status=503) from exc
        finally:
            self.pool.release(child, kill=False)

    def models(self, tick: Callable[[], None]) -> list[JsonObject]:
        """Return the models as the CLI lists them; every answered request refreshes the list."""
        if not self._models:
            reply = self._with_child(lambda c, p: c.request("initialize", p, hooks=None), tick)
            self._models = reply.get("models") or []
        return self._models

    def model_id(self, name: str) -> str:
        """Return the id behind an alias, a mapped name, or an id itself."""
        return resolve_model(self._model_map.get(name, name), self._models)

    def _patience(self, tick: Callable[[], None]) -> Patience:
        message = f"no whole answer within {self.settings.timeout:g} s"
        late = ApiError(message, status=504, should_retry=False)
        return Patience(self.settings.timeout, tick, late)

    def _read_answer(
        self, child: Child, reader: AnswerReader, patience: Patience
    ) -> Generator[list[Event], None, list[Event]]:
        """Yield what comes, until the answer is complete; return the last batch.

        Raises ChildDied while nothing was sent upstream, and ApiError.
        """
        failure: ApiError | None = None
        while not failure:
            batch: list[Event] = []
            try:
                batch += self._feed(reader, child, patience)
                while child.has_line() and not reader.done:
                    batch += self._feed(reader, child, patience)
            except ChildDied as exc:
                if not (reader.is_called or reader.started):
                    raise  # the CLI tells before it calls, so nothing was sent upstream
                log.error("%s", exc)
                failure = CliFailed("claude ended before its answer was complete")
            except ApiError as exc:
                failure = self._with_reset(exc)
            if failure or (reader.done and reader.must_kill):
                child.kill()  # at once, lest it ask upstream again
            if reader.has_delta:
                self.pool.refill(child)
            if reader.done:
                return batch
            if batch:
                yield batch  # also what came just before a failure
        raise failure

    def _with_reset(self, error: ApiError) -> ApiError:
        """Tell when a plan's used-up window opens again; clients would retry in vain until then."""
        reset = self.rate_limits.get("anthropic-ratelimit-unified-reset", "")
        rejected = self.rate_limits.get("anthropic-ratelimit-unified-status") == "rejected"
        if error.status == 429 and rejected and reset.isdigit():
            error.retry_after_s = max(1, int(reset) - int(time.time()))
            error.should_retry = error.retry_after_s <= LONGEST_RETRY_S
        return error

    def _feed(self, reader: AnswerReader, child: Child, patience: Patience) -> list[Event]:
        line = child.read_line(patience)
        if not reader.is_called and line.get("status") == "requesting":
            reader.is_called = True
            child.hold_calls()
        if line.get("type") == "rate_limit_event":
            self.rate_limits = to_rate_limit_headers(line.get("rate_limit_info"))
        if line.get("subtype") == "api_retry":
            details = {name: line.get(name) for name in ("attempt", "error_status", "error")}
            log.warning("claude retries by itself: %s", details)
        return reader.feed(line)

    def status(self) -> str:
        """Return in plain text how things are."""
        keys, counts, total = self.keys.load(), self.pool.counts(), self.metrics.total
        asked = [
            functools.partial(total, "cc2api_requests_total", route=route)
            for route in ("messages", "chat_completions")
        ]
        failed = sum(count(status=str(status)) for count in asked for status in range(400, 600))
        kinds = ("input", "output", "cache_read", "cache_write")
        tokens = (f"{total('cc2api_tokens_total', kind=kind):.0f} {kind}" for kind in kinds)
        minutes = (time.time() - self.metrics.started_at) / 60
        key = " -H 'x-api-key: YOUR-KEY'" if keys != {} else ""
        lines = {
            f"cc2api {__version__}": f"up {minutes // 60:.0f} h {minutes % 60:.0f} min",
            "claude": f"{self.cli.version} at {self.cli.path}",
            "sign-in": self.sign_in,
            "keys": describe_keys(self.keys),
            "children": "{idle} spare, {busy} busy, {parked} parked".format(**counts),
            "requests": f"{sum(count() for count in asked):.0f}, {failed:.0f} failed,"
            f" {self.pool.waiting()} waiting",
            "tokens": ", ".join(tokens),
            "cost": f"${total('cc2api_cost_dollars_total'):.4f} as claude reports it",
            "health": self.pool.failure() or "ok",
            "try": f"""curl HERE/v1/messages{key} -d '{{"model": "{DEFAULT_MODEL_NAME}","""
            """ "max_tokens": 100, "messages": [{"role": "user", "content": "Hello!"}]}'""",
        }
        return "".join(f"{name:<14}{text}\n" for name, text in lines.items())

    def close(self) -> None:
        """End all children and remove the temporary directory."""
        self.pool.close()
        self._temp.cleanup()


def describe_keys(keys: KeyFile) -> str:
    """Say in a few words who may call."""
    loaded = keys.load()
    if loaded is None:
        why = f"{keys.path} cannot be read ({keys.problem})"
        return f"NOBODY CAN CALL: {why}; mend that, or name another with --keys"
    return f"{len(loaded)} in {keys.path}" if loaded else "open: anyone who can connect may call"


def needs_keys(settings: Settings) -> bool:
    """Say whether nobody may call without a key: on any address but loopback."""
    if settings.allow_open or settings.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        return True


# ========================================================================= HTTP
# Sockets, framing, routes, SSE frames, and the one place where errors become answers. One thread
# for each connection. Framing is strict: a proxy in front that reads it differently could be made
# to smuggle requests in. No response header is ever built from client text.

JSON_TYPE: Final = "application/json"
SSE_TYPE: Final = "text/event-stream; charset=utf-8"
CORS_HEADERS: Final = {
    "access-control-allow-methods": "GET, POST, OPTIONS",
    "access-control-allow-headers": "authorization, *",  # the star does not cover authorization
    "access-control-expose-headers": "request-id, x-request-id, retry-after",
    "access-control-max-age": "600",
}
_UNSAFE: Final = re.compile(r"[^\x21-\x7e]|[\"\\=]")
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]*) HTTP/1\.([01])")
_HEADER_LINE: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*"
)
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_HANGUP: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class Head:
    """A request line and its headers; names in lower case, in the order they came."""

    method: str
    path: str  # without the query, percent-decoded
    query: str
    is_http_11: bool
    headers: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Return every value of a header."""
        return [value for key, value in self.headers if key == name]

    def get(self, name: str) -> str:
        """Return a header's first value, "" where it is absent."""
        return next(iter(self.all(name)), "")


_TOO_LARGE: Final = f"Request exceeds the maximum size of {MAX_BODY_BYTES} bytes"


class BadFraming(ApiError):
    """What was sent is not HTTP as it should be; the connection is closed after the answer."""

    status = 400


def parse_head(lines: Sequence[bytes]) -> Head:
    """Parse a request line and header lines, each without its line end. Raises BadFraming."""
    request = _REQUEST_LINE.fullmatch(lines[0])
    if request is None:
        raise BadFraming("malformed request line")
    headers = []
    for line in lines[1:]:
        header = _HEADER_LINE.fullmatch(line)
        if header is None:
            raise BadFraming("malformed header line")
        headers.append((header[1].decode("ascii").lower(), header[2].decode("latin-1")))
    path, _, query = request[2].decode("ascii").partition("?")
    path = urllib.parse.unquote(path)
    head = Head(request[1].decode("ascii"), path, query, request[3] == b"1", tuple(headers))
    if len(head.all("host")) != 1 and (head.is_http_11 or head.all("host")):
        raise BadFraming("exactly one Host header is needed")
    return head


def body_length(head: Head) -> int | None:
    """Return the length of the body that follows a head; None where it comes in chunks.

    Raises BadFraming, where it is not certain or too large.
    """
    codings, lengths = head.all("transfer-encoding"), head.all("content-length")
    if codings:
        if lengths or not head.is_http_11 or [c.lower() for c in codings] != ["chunked"]:
            raise BadFraming("Transfer-Encoding must be chunked, without a Content-Length")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not re.fullmatch("[0-9]+", lengths[0]):
        raise BadFraming("Content-Length must be given once, as a decimal number")
    if len(lengths[0]) > len(str(MAX_BODY_BYTES)) or int(lengths[0]) > MAX_BODY_BYTES:
        raise BadFraming(_TOO_LARGE, status=413)
    return int(lengths[0])


class ClientStream:
    """The client's end of a connection: buffered reading with absolute deadlines, and writing.

    Deadlines are in seconds of `time.monotonic()`. Reading raises ClientGone at the end of the
    stream and BadFraming (408) at the deadline; writing raises ClientGone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._watch = select.poll()
        self._watch.register(sock, select.POLLIN | _HANGUP)

    def read_head(self, idle_s: float) -> Head:
        """Read the next request's head, waiting up to `idle_s` for its first byte."""
        if not self._buffer:
            self._fill(time.monotonic() + idle_s)
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        lines: list[bytes] = []
        left = MAX_HEAD_BYTES
        while True:
            line = self.read_line(left, deadline)
            left -= len(line) + 2
            if line:
                lines.append(line)
            elif lines:  # else an empty line before the request, which RFC 9112 lets pass
                return parse_head(lines)
            if len(lines) > MAX_HEADERS + 1:
                raise BadFraming(f"over {MAX_HEADERS} headers", status=431)

    def read_body(self, length: int | None) -> bytes:
        """Read a body of a known length, or in chunks."""
        deadline = time.monotonic() + BODY_TIMEOUT_S
        if length is not None:
            return self._read_exactly(length, deadline)
        body = bytearray()
        while size := self._read_chunk_size(deadline):
            if len(body) + size > MAX_BODY_BYTES:
                raise BadFraming(_TOO_LARGE, status=413)
            body += self._read_exactly(size, deadline)
            if self.read_line(2, deadline):
                raise BadFraming("a chunk is longer than announced")
        for _ in range(MAX_HEADERS + 1):  # trailers: read and dropped
            if not self.read_line(MAX_HEAD_BYTES, deadline):
                return bytes(body)
        raise BadFraming("too many trailers", status=431)

    def _read_chunk_size(self, deadline: float) -> int:
        line = _CHUNK_LINE.fullmatch(self.read_line(MAX_CHUNK_LINE_BYTES, deadline))
        if line is None:
            raise BadFraming("malformed chunk")
        return int(line[1], 16)

    def read_line(self, limit: int, deadline: float) -> bytes:
        """Read up to CRLF; return the line without it. A lone LF or CR is refused."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > limit:
                raise BadFraming("line too long", status=431)
            self._fill(deadline)
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        if not line.endswith(b"\r\n") or line.count(b"\r") > 1:
            raise BadFraming("lines must end with CR LF")
        if len(line) > limit + 2:
            raise BadFraming("line too long", status=431)
        return line[:-2]

    def _read_exactly(self, length: int, deadline: float) -> bytes:
        while len(self._buffer) < length:
            self._fill(deadline)
        data = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        return data

    def _fill(self, deadline: float) -> None:
        """Read some bytes into the buffer."""
        try:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(READ_BYTES)
        except TimeoutError:
            raise BadFraming("the request did not come in time", status=408) from None
        except OSError as exc:
            raise ClientGone from exc
        if not data:
            raise ClientGone
        self._buffer += data

    def has_left(self) -> bool:
        """Say whether the client has closed its end. Does not block."""
        for _, event in self._watch.poll(0):
            if event & _HANGUP:
                return True
            try:
                return self._sock.recv(1, socket.MSG_PEEK) == b""
            except OSError:
                return True
        return False

    def write(self, data: bytes, timeout_s: float) -> None:
        """Write everything, or give the client up when it reads nothing for `timeout_s`."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise ClientGone from exc

    def linger(self) -> None:
        """Say that nothing more comes, and read on for a moment what the client still sends."""
        deadline = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError, ApiError, ClientGone):
            self._sock.shutdown(socket.SHUT_WR)
            while True:
                self._buffer.clear()
                self._fill(deadline)


def to_frame(event: Event) -> bytes:
    """Return an event as an SSE frame; ASCII, since some clients split lines at U+2028."""
    return f"event: {event.get('type')}\n".encode("ascii") + to_data(event)


def to_data(chunk: JsonObject) -> bytes:
    """Return a chat completion chunk as an SSE frame, which has no name."""
    return b"data: %b\n\n" % json.dumps(chunk).encode("ascii")


def to_anthropic_error(error: ApiError, request_id: str) -> JsonObject:
    """Return an error in the Messages API's envelope."""
    inner: JsonObject = {"type": error.kind, "message": str(error)}
    if error.details is not None:
        inner["details"] = error.details
    return {"type": "error", "error": inner, "request_id": request_id}


class Server(ThreadingHTTPServer):
    """The listening socket; every connection gets a thread running `Handler`."""

    daemon_threads = True
    request_queue_size = LISTEN_BACKLOG

    def __init__(self, address: tuple[str, int]) -> None:
        """Bind and listen. Raises OSError. `gateway` is set before `serve_forever`."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.gateway: Gateway
        self.is_stopping = False
        self._free_places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._idle = threading.Condition()
        self._answering = 0  # guarded by _idle
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for our own name, as HTTPServer would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread; beyond MAX_CONNECTIONS it is closed at once."""
        if not self._free_places.acquire(blocking=False):
            log.warning("over %d connections: one was turned away", MAX_CONNECTIONS)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self._free_places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Run a connection, then free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what escaped a handler; a connection that broke is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("connection from %s failed", client_address)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as running, for `drain`."""
        with self._idle:
            self._answering += 1
        try:
            yield
        finally:
            with self._idle:
                self._answering -= 1
                self._idle.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until no request is running; say whether that came true in time."""
        with self._idle:
            return self._idle.wait_for(lambda: self._answering == 0, seconds)


_WATCHING: Final = ("status", "healthz", "metrics")  # the routes that watch the gateway itself
_TOKEN_KINDS: Final = {
    "input_tokens": "input",
    "output_tokens": "output",
    "cache_read_input_tokens": "cache_read",
    "cache_creation_input_tokens": "cache_write",
}


class Response:
    """The answer to one request: writes it, keeps it alive, and logs it."""

    def __init__(self, stream: ClientStream, gateway: Gateway, head: Head) -> None:
        """`gateway` is asked for the time that a client may take to read."""
        self.request_id = "req_" + uuid.uuid4().hex[:24]
        self.note: dict[str, object] = {}  # what the log line says beyond method and path
        self.headers: dict[str, str] = {}  # beyond those that every answer has
        self.closes = "close" in head.get("connection").lower() or not head.is_http_11
        self.body_left: int | None = 0  # bytes of the request not read yet, None in chunks
        self.is_stream = False  # the client asked for one
        self.is_chat = head.path.endswith("/chat/completions")
        self.route = "none"  # for the metrics
        self.usage: dict[str, int] = {}  # of an answer, as upstream counts
        self._stream = stream
        self._gateway = gateway
        self._head = head
        self._has_begun = False  # the 200 of a stream is out
        self._in_message = False  # and message_start
        self._started_at = self._last_write_at = time.monotonic()

    def tick(self) -> None:
        """Look after the client while it waits: see whether it left, show a stream life."""
        if self._stream.has_left():
            raise ClientGone
        if self.is_stream and time.monotonic() - self._last_write_at >= KEEPALIVE_S:
            # clients skip comments; before message_start an event would confuse some of them, and
            # the OpenAI API has no such event
            is_event = self._in_message and not self.is_chat
            self._write_chunk(to_frame({"type": "ping"}) if is_event else b": waiting\n\n")

    def send_events(self, batch: Sequence[Event], frames: bytes) -> None:
        """Write the frames of a batch of events with one write; the 200 goes with the first."""
        self.debug("response", frames)
        for event in batch:
            self.note_usage(event.get("usage") or (event.get("message") or {}).get("usage"))
        if frames:  # an empty chunk would end the body
            self._write_chunk(frames, last=batch[-1]["type"] == "message_stop")
        self._in_message = True

    def send_json(
        self, status: int, body: JsonObject, headers: Mapping[str, str] | None = None
    ) -> None:
        """Write a whole answer."""
        data = json.dumps(body).encode("ascii")
        self.debug("response", data)
        self.send(status, data, {"content-type": JSON_TYPE, **(headers or {})})

    def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        """Write a status, headers and, but for HEAD, a body."""
        self.note["status"] = status
        # with a body that nobody reads, it is not known where the next request begins
        self.closes = self.closes or self.body_left != 0
        sized = headers if status == 204 else {**headers, "content-length": str(len(data))}
        head = self._to_head(status, sized)
        self.write(head if self._head.method == "HEAD" else head + data)

    def send_error(self, error: ApiError) -> None:
        """Answer with an error: JSON with its status, or an event where a stream has begun."""
        self.note["error"] = error.kind  # the message may quote the request
        self.debug("error", str(error).encode())
        self.closes = self.closes or isinstance(error, BadFraming)
        status, body = error.status, to_anthropic_error(error, self.request_id)
        if self.is_chat:
            status, body = to_openai_error(error)
        if self._has_begun:
            self.note["status"] = error.status  # though the client has had a 200
            self._write_chunk(to_data(body) if self.is_chat else to_frame(body), last=True)
            return
        headers = {}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if error.status == 402 and self.is_chat:  # which OpenAI's clients know as a 429
            headers["x-should-retry"] = "false"
        if error.should_retry is not None:
            headers["x-should-retry"] = str(error.should_retry).lower()
        self.send_json(status, body, headers)

    def write(self, data: bytes) -> None:
        """Write bytes as they are. Raises ClientGone."""
        self._stream.write(data, self._gateway.settings.timeout)
        self._last_write_at = time.monotonic()

    def _write_chunk(self, data: bytes, *, last: bool = False) -> None:
        """Write a part of a streamed body, the first one behind its head."""
        head = b""
        if not self._has_begun:
            self._has_begun = True
            self.note["status"] = 200
            headers = {"content-type": SSE_TYPE, "cache-control": "no-cache"}
            if self._head.is_http_11:
                headers["transfer-encoding"] = "chunked"
            head = self._to_head(200, headers)
        if self._head.is_http_11:  # else the end of the connection is the end of the body
            data = b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b"")
        self.write(head + data)

    def _to_head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the status line and headers; all names and values are our own."""
        phrase = http.client.responses.get(status, "Error")
        fixed = {
            "server": f"cc2api/{__version__}",
            "date": email.utils.formatdate(usegmt=True),
            "request-id": self.request_id,
            "x-request-id": self.request_id,
            "connection": "close" if self.closes else "keep-alive",
        }
        limits = self._gateway.rate_limits if "model" in self.note else {}
        every = {**fixed, **self.headers, **limits, **headers}
        lines = [f"{key}: {value}" for key, value in every.items()]
        return "\r\n".join([f"HTTP/1.1 {status} {phrase}", *lines, "", ""]).encode("ascii")

    # ---- the log

    def debug(self, what: str, data: bytes) -> None:
        """Log a request or a response whole, under --debug."""
        if log.isEnabledFor(logging.DEBUG):
            text = data.decode("utf-8", "replace")
            log.debug("event=%s id=%s body=%s", what, self.request_id, text)

    def note_turn(self, turn: Turn) -> None:
        """Note the model for the log line, and warn of fields that were ignored."""
        self.note["model"] = _quoted(turn.model, 100)
        if turn.ignored:
            names = _quoted(",".join(turn.ignored), 200)
            log.warning("event=ignored id=%s fields=%s", self.request_id, names)

    def note_usage(self, usage: JsonObject | None) -> None:
        """Note the tokens of an answer."""
        for name in _TOKEN_KINDS:
            if usage and isinstance(usage.get(name), int):
                self.usage[name] = self.note[name] = usage[name]

    def queued(self, place: int) -> None:
        """Log that the request has to wait, and how many are before it."""
        log.info("event=queued id=%s place=%d", self.request_id, place)

    def first_delta(self) -> None:
        """Log that the model has begun to answer."""
        seconds = time.monotonic() - self._started_at
        log.info("event=first_delta id=%s ms=%d", self.request_id, seconds * 1000)
        self._gateway.metrics.observe("cc2api_first_delta_seconds", seconds)

    def log(self) -> None:
        """Write the log line of the request's end, and count it."""
        seconds = time.monotonic() - self._started_at
        self.note["ms"] = round(seconds * 1000)
        pairs = " ".join(f"{name}={value}" for name, value in self.note.items())
        path = _quoted(self._head.path, 200)
        form = "event=done method=%s path=%s id=%s %s"
        is_watching = self.route in _WATCHING and self.note.get("status") == 200
        level = logging.DEBUG if is_watching else logging.INFO  # they come every few seconds
        log.log(level, form, self._head.method, path, self.request_id, pairs)
        metrics, caller = self._gateway.metrics, str(self.note.get("key", "none"))
        status, model = (str(self.note.get(name, "none")) for name in ("status", "model"))
        labels = {"route": self.route, "status": status, "model": model, "caller": caller}
        metrics.add("cc2api_requests_total", **labels)
        if "model" in self.note:
            metrics.observe("cc2api_request_seconds", seconds, route=self.route)
        for name, count in self.usage.items():
            metrics.add("cc2api_tokens_total", count, kind=_TOKEN_KINDS[name], caller=caller)


class Handler(BaseRequestHandler):
    """One connection: reads requests one after the other and routes each."""

    server: Server
    request: socket.socket

    # Without their /v1: a base URL is configured with it or without, and some clients add one.
    ROUTES: ClassVar[dict[str, tuple[str, str]]] = {
        "/": ("GET", "_status"),
        "/healthz": ("GET", "_healthz"),
        "/metrics": ("GET", "_metrics"),
        "/api/hello": ("GET", "_hello"),  # Claude Code's own probe
        "/messages": ("POST", "_messages"),
        "/messages/count_tokens": ("POST", "_count_tokens"),
        "/chat/completions": ("POST", "_chat_completions"),
        "/models": ("GET", "_model_list"),
        "/models/": ("GET", "_model"),
    }

    def handle(self) -> None:
        """Answer requests until either side ends the connection."""
        # an event must not wait for the ACK of the one before
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = ClientStream(self.request)
        idle_s = HEAD_TIMEOUT_S
        while not self.server.is_stopping:
            try:
                head = self._stream.read_head(idle_s)
            except ClientGone:
                return
            except BadFraming as error:
                if error.status != 408:  # to a connection that stayed silent nothing is said
                    self._answer(Head("-", "-", "", True, ()), error)
                break
            with self.server.answering():
                self._answer(head)
            if self._out.closes:
                break
            idle_s = KEEP_ALIVE_S
        self._stream.linger()

    def _answer(self, head: Head, failure: ApiError | None = None) -> None:
        """Run a route; whatever it raises is answered here and nowhere else."""
        self._gateway = self.server.gateway
        self._head, self._out = head, Response(self._stream, self._gateway, head)
        try:
            try:
                if failure:
                    raise failure
                self._route()
            except (ApiError, ClientGone):
                raise
            except Exception as exc:
                log.exception("id=%s failed", self._out.request_id)
                raise ApiError("internal error") from exc
        except ApiError as error:
            try:
                self._out.send_error(error)
            except ClientGone:
                self._out.closes = True
        except ClientGone:
            self._out.note["status"] = 499  # nginx's code for it; nobody is sent it
            self._out.closes = True
        self._out.log()

    def _route(self) -> None:
        head, out = self._head, self._out
        if self.server.is_stopping:
            raise CliFailed("the gateway is shutting down", status=503)
        out.body_left = body_length(head)
        path = re.sub(r"\A(/v1)+(?=/)", "", head.path)
        self._model_name = path.partition("/models/")[2]
        method, name = self.ROUTES.get("/models/" if self._model_name else path, ("", ""))
        allow = {"allow": f"{method or 'GET'}, OPTIONS"}
        out.route = name.strip("_") or "none"
        if name != "_healthz":
            self._check_origin()
        if head.method == "OPTIONS":
            return out.send(204, b"", allow)
        if not name:
            raise ApiError(f"{head.method} {head.path}: no such route", status=404)
        if head.method != method and (head.method, method) != ("HEAD", "GET"):
            out.headers.update(allow)
            raise ApiError(f"{head.method} is not allowed here, {method} is", status=405)
        if name != "_healthz":
            if name == "_status":  # where people come with a browser
                out.headers["www-authenticate"] = 'Basic realm="cc2api: any name, and your key"'
            key, bearer = head.get("x-api-key"), head.get("authorization")
            self._caller = self._gateway.keys.check(key, bearer)
            out.note["key"] = self._caller.name
            out.headers.pop("www-authenticate", None)
        getattr(self, name)()

    def _check_origin(self) -> None:
        """Keep web pages out, of other origins and of names made to resolve to us (rebinding).

        Where keys are asked for a page needs one too, and only the CORS headers matter.
        """
        settings, keys = self._gateway.settings, self._gateway.keys
        origin, host = self._head.get("origin"), self._head.get("host")
        for allowed in settings.cors_origin:
            if allowed in ("*", origin):
                allow = {"access-control-allow-origin": allowed, "vary": "origin"}
                self._out.headers = {**CORS_HEADERS, **allow}
        # a browser sends the key it was given in its own dialog (Basic) for every page's requests
        is_basic = self._head.get("authorization").lower().startswith("basic")
        if (keys.required or keys.load() != {}) and not is_basic:
            return
        name = re.sub(r":\d*\Z", "", host).strip("[]").lower()
        if name and not is_basic and not is_own_name(name, settings):
            problem = f"Host {_quoted(name, 100)} is not served; see --allowed-host"
            raise ApiError(problem, status=403)
        own = (f"http://{host}", f"https://{host}")
        if origin and not self._out.headers and origin not in own:
            raise ApiError("pages of this origin may not call; see --cors-origin", status=403)

    # ---- routes

    def _hello(self) -> None:
        self._out.send_json(200, {"service": "cc2api", "version": __version__})

    def _status(self) -> None:
        """Answer a browser with a page, and others with the text that it shows."""
        host = _quoted(self._head.get("host"), 200)
        text = self._gateway.status().replace("HERE", f"http://{host}")
        headers = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
        if "text/html" in self._head.get("accept"):
            text, own = PAGE, "'self' 'unsafe-inline'"
            headers["content-type"] = "text/html; charset=utf-8"
            headers["content-security-policy"] = f"default-src {own}; img-src data:"
        self._out.send(200, text.encode(), {**headers, "vary": "accept"})

    def _healthz(self) -> None:
        if failure := self._gateway.pool.failure():
            raise CliFailed(failure, status=503)
        self._out.send_json(200, {"status": "ok"})

    def _metrics(self) -> None:
        pool = self._gateway.pool
        gauges = {"cc2api_children": pool.counts(), "cc2api_waiting_requests": {"": pool.waiting()}}
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        self._out.send(200, self._gateway.metrics.render(gauges).encode(), headers)

    def _model_list(self) -> None:
        """Answer all models, as OpenAI's clients expect, or a page of them after `after_id`."""
        models = to_model_list(self._gateway.models(self._out.tick))
        query = urllib.parse.parse_qs(self._head.query)
        ids = [model["id"] for model in models]
        after, before, limit = (query.get(n, [""])[0] for n in ("after_id", "before_id", "limit"))
        for name, value in (("after_id", after), ("before_id", before)):
            if value and value not in ids:
                raise InvalidRequest(f"{name}: no such model")
        limit = limit or "1000"
        if not re.fullmatch(r"[1-9]\d{0,2}|1000", limit):
            raise InvalidRequest("limit: Input should be a number from 1 to 1000")
        rest = models[ids.index(after) + 1 :] if after else models
        if before:
            rest = models[: ids.index(before)]
        page = rest[-int(limit) :] if before else rest[: int(limit)]
        body: JsonObject = {"object": "list", "data": page, "has_more": len(page) < len(rest)}
        body["first_id"], body["last_id"] = (page[i]["id"] if page else None for i in (0, -1))
        self._out.send_json(200, body)

    def _model(self) -> None:
        models = to_model_list(self._gateway.models(self._out.tick))
        wanted = self._gateway.model_id(self._model_name)
        for model in models:
            if model["id"] == wanted:
                return self._out.send_json(200, model)
        raise ApiError(f"model: {self._model_name}", status=404)

    def _messages(self) -> None:
        betas = ",".join(self._head.all("anthropic-beta"))
        turn = parse_messages_request(self._read_json(), betas, login=self._gateway.login)
        self._run(turn, to_frame, lambda message: message)

    def _count_tokens(self) -> None:
        turn = parse_count_request(self._read_json(), ",".join(self._head.all("anthropic-beta")))
        self._out.note_turn(turn)
        count = self._gateway.count_tokens(turn, self._out.tick)
        self._out.note["input_tokens"] = count
        self._out.send_json(200, {"input_tokens": count})

    def _chat_completions(self) -> None:
        created = int(time.time())
        turn, style = parse_chat_request(self._read_json(), created, login=self._gateway.login)
        writer = ChunkWriter(style)

        def encode(event: Event) -> bytes:
            frames = b"".join(map(to_data, writer.feed(event)))
            return frames + b"data: [DONE]\n\n" if event["type"] == "message_stop" else frames

        self._run(turn, encode, lambda message: to_completion(message, style))

    def _run(
        self,
        turn: Turn,
        encode: Callable[[Event], bytes],
        finish: Callable[[JsonObject], JsonObject],
    ) -> None:
        """Have a turn answered: `encode` makes the frames of a stream, `finish` the whole body."""
        self._out.note_turn(turn)
        self._out.is_stream = turn.stream
        assembler, has_begun = MessageAssembler(), False
        answering = self._gateway.answer(turn, self._caller, self._out.tick, self._out.queued)
        with contextlib.closing(answering) as answer:
            for batch in answer:
                if not has_begun and any(e["type"] == "content_block_delta" for e in batch):
                    has_begun = True
                    self._out.first_delta()
                if turn.stream:
                    self._out.send_events(batch, b"".join(map(encode, batch)))
                    continue
                for event in batch:
                    assembler.add(event)
        if not turn.stream:
            self._out.note_usage(assembler.message["usage"])
            self._out.send_json(200, finish(assembler.message))

    def _read_json(self) -> JsonObject:
        if self._head.get("content-encoding").lower() not in ("", "identity"):
            raise InvalidRequest(
                "Content-Encoding: request bodies must not be encoded",
                details={"error_code": "request_body_encoding_unsupported"},
            )
        if self._head.get("expect").lower() == "100-continue":
            self._out.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw = self._stream.read_body(self._out.body_left)
        self._out.body_left = 0
        self._out.debug("request", raw)
        return parse_json(raw)


# The page at / : the status, read again and again, and a box to try a prompt in.
PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>cc2api</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em;
        color: #222; background: #fafafa }
 pre { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 1em;
       white-space: pre-wrap; overflow-wrap: anywhere }
 textarea, input, button { font: inherit; box-sizing: border-box; padding: .5em;
       border: 1px solid #bbb; border-radius: 6px }
 textarea { width: 100% }
 button { background: #c15f3c; color: #fff; border: 0; padding: .5em 1.5em }
 @media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1c1c1c } pre, textarea, input { color: #ddd; background: #262626;
  border-color: #444 } }
</style>
<h1>cc2api</h1>
<pre id="status">…</pre>
<form id="ask">
 <p><textarea id="prompt" rows="3" aria-label="prompt" placeholder="Try a prompt"></textarea>
 <p><input id="model" value="claude-code" aria-label="model"> <button>Send</button>
</form>
<pre id="answer" hidden></pre>
<script>
const at = id => document.getElementById(id)
async function refresh() {
  try {
    const got = await fetch("/", {headers: {accept: "text/plain"}})
    at("status").textContent = await got.text()
  } catch (problem) { at("status").textContent = "cc2api does not answer: " + problem }
  setTimeout(refresh, 2000)
}
refresh()
at("ask").onsubmit = async event => {
  event.preventDefault()
  const answer = at("answer")
  answer.hidden = false
  answer.textContent = ""
  const body = {model: at("model").value, max_tokens: 2000, stream: true,
                messages: [{role: "user", content: at("prompt").value}]}
  const got = await fetch("/v1/messages", {method: "POST", body: JSON.stringify(body)})
  if (!got.ok) { answer.textContent = (await got.json()).error.message; return }
  const reader = got.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let text = "", part; !(part = await reader.read()).done;) {
    const frames = (text + part.value).split("\\n\\n")
    text = frames.pop()
    for (const frame of frames) {
      const data = frame.split("\\n").find(line => line.startsWith("data: "))
      const event = data ? JSON.parse(data.slice(6)) : {}
      answer.textContent += event.delta?.text ?? event.error?.message ?? ""
    }
  }
}
</script></html>
"""


def is_own_name(name: str, settings: Settings) -> bool:
    """Say whether a Host names this server: an IP address, localhost, or --allowed-host."""
    if name == "localhost" or name in (allowed.lower() for allowed in settings.allowed_host):
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def _quoted(text: str, limit: int) -> str:
    """Make client text fit for a key=value log line: no spaces, quotes or control characters."""
    return _UNSAFE.sub("_", text[:limit]) or "-"


# ================================================================= Command line
# Options, logging, signals, and putting the parts together.


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"cc2api: {message}; see cc2api --help\n")


def build_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser made from the fields of Settings, with CC2API_ variables as defaults."""
    parser = _Parser(
        prog="cc2api",
        description="The Claude Code CLI on this machine as an Anthropic Messages API.",
        epilog="Every option can be given as a variable too: --port 8080 is CC2API_PORT=8080.",
    )
    parser.add_argument("--version", action="version", version=f"cc2api {__version__}")
    for option in dataclasses.fields(Settings):
        flag = "--" + option.name.replace("_", "-")
        variable = "CC2API_" + option.name.upper()
        default = environ.get(variable) or option.default
        text = option.metadata["help"]
        if str(option.type).startswith("bool"):
            if isinstance(default, str):
                default = default.lower() in ("1", "true", "yes", "on")
            action = "store_true" if option.type == "bool" else argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=default, help=text)
            continue
        metavar = option.metadata["metavar"]
        if str(option.type).startswith("tuple"):
            parser.add_argument(flag, action="append", metavar=metavar, help=text)
            continue
        if option.default not in (None, ""):
            text += " (default: %(default)s)"
        kind = {"int": int, "float": float}.get(str(option.type), str)
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)
    return parser


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings. Wrong options end the process with status 2, as argparse does."""
    parser = build_parser(environ)
    given = vars(parser.parse_args(argv))
    for option in dataclasses.fields(Settings):
        value, low = given[option.name], option.metadata["low"]
        if isinstance(value, (int, float)) and not low <= value < float("inf"):
            parser.error(f"--{option.name.replace('_', '-')} must be at least {low:g}, and finite")
        if str(option.type).startswith("tuple"):
            listed = environ.get("CC2API_" + option.name.upper(), "").split(",")
            given[option.name] = tuple(value or filter(None, map(str.strip, listed)))
    if given["port"] > 65535:
        parser.error("--port must be between 0 and 65535")
    if not all(all(pair.partition("=")) for pair in given["model_map"]):
        parser.error("--model-map takes NAME=MODEL")
    if not set(filter(None, given["setting_sources"].split(","))) <= {"user", "project", "local"}:
        parser.error("--setting-sources takes any of user,project,local")
    return Settings(**given)


def banner(gateway: Gateway, url: str, sign_in: str) -> str:
    """Return what is printed at the start."""
    keys = describe_keys(gateway.keys)
    auth = " -H 'x-api-key: YOUR-KEY'" if not keys.startswith("open") else ""
    return f"""\
cc2api {__version__} listens on {url}
  claude   {gateway.cli.version} at {gateway.cli.path}
  sign-in  {sign_in}
  keys     {keys}
  try      curl {url}/v1/messages{auth} -d '{{"model": "{DEFAULT_MODEL_NAME}", "max_tokens": 100, \
"messages": [{{"role": "user", "content": "Hello!"}}]}}'"""


class LogFormatter(logging.Formatter):
    """Log lines as key=value: `time=... level=info event=done status=200 ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line; words that are no pairs become msg="..."."""
        text = super().format(record)
        if not str(record.msg).startswith("event="):
            text = f"event=note msg={json.dumps(text, ensure_ascii=False)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = record.levelname.lower()
        return f"time={when}.{record.msecs:03.0f}Z level={level} {text}"


def run_check(settings: Settings, environ: Mapping[str, str]) -> int:
    """Say line by line what is in order and what to do about the rest; return the exit status."""
    failed = 0

    def step(name: str, look: Callable[[], str]) -> None:
        nonlocal failed
        state = "ok  "
        try:
            said = look()
        except (CliUnusable, OSError, ApiError) as exc:
            failed, state, said = 1, "FAIL", str(getattr(exc, "strerror", None) or exc)
        print(f"{name:<9}{state}  {said}", flush=True)

    step("keys", lambda: _check_keys(settings))
    step("port", lambda: _check_port(settings))
    try:
        cli = find_cli(settings.claude, environ)
    except CliUnusable as exc:
        print(f"claude   FAIL  {exc}")
        return 1
    step("claude", lambda: f"{cli.version} at {cli.path}")
    step("sign-in", lambda: _check_sign_in(cli, environ))
    gateway = Gateway(dataclasses.replace(settings, spares=0, live=0), cli, environ)
    step("start", lambda: f"claude starts, and lists {len(gateway.models(lambda: None))} models")
    if settings.live_call:
        step("call", lambda: _check_call(gateway))
    gateway.close()
    return failed


def key_problem(settings: Settings) -> str:
    """Return why the gateway should not start with its key file; "" where it may."""
    keys = KeyFile(settings.keys)
    loaded = keys.load()
    if loaded is None:
        return describe_keys(keys)
    if needs_keys(settings) and not loaded:
        where = f"{settings.host} is not a loopback address and {settings.keys} holds no key"
        return f"{where}: add one, or use --allow-open"
    default = next(f.default for f in dataclasses.fields(Settings) if f.name == "keys")
    if settings.keys != default and not keys.path.exists():
        return f"the key file {settings.keys} is not there: make it, or leave --keys out"
    return ""


def _check_keys(settings: Settings) -> str:
    if problem := key_problem(settings):
        raise CliUnusable(problem)
    return describe_keys(KeyFile(settings.keys))


def _mend_listening(error: OSError) -> str:
    is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
    option = "--port" if is_port else "--host"
    return f"{error.strerror or error}; choose another with {option}"


def _check_port(settings: Settings) -> str:
    try:
        Server((settings.host, settings.port)).server_close()
    except OSError as exc:
        where = f"{settings.host} port {settings.port}"
        raise CliUnusable(f"{where}: {_mend_listening(exc)}") from exc
    return f"{settings.host} port {settings.port} is free"


def _check_sign_in(cli: Cli, environ: Mapping[str, str]) -> str:
    if (said := describe_sign_in(cli, environ)).startswith("NOT"):
        raise CliUnusable(said)
    return said


def _check_call(gateway: Gateway) -> str:
    question = {"role": "user", "content": "Say hello."}
    body = {"model": DEFAULT_MODEL_NAME, "max_tokens": 16, "messages": [question]}
    turn, assembler = parse_messages_request(body, login=gateway.login), MessageAssembler()
    for batch in gateway.answer(turn, Caller(OPEN, b""), lambda: None):
        for event in batch:
            assembler.add(event)
    return f"{assembler.message['model']} answered"


def catch_signals() -> socket.socket:
    """Return a socket that gets a byte for each SIGINT and SIGTERM.

    Waiting on it always ends: the kernel may hand a signal to any thread, and a main thread that
    sits in `Event.wait` then never runs its handler (seen, Python 3.11).
    """
    waiting, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return waiting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway until a signal ends it; return the exit status."""
    try:
        return _run(argv)
    except KeyboardInterrupt:  # before signals are caught
        return 130
    except BrokenPipeError:  # whoever reads our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    environ = dict(os.environ)
    settings = parse_args(argv, environ)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.DEBUG if settings.debug else logging.INFO, handlers=[handler])
    if settings.check or settings.live_call:
        return run_check(settings, environ)
    if problem := key_problem(settings):
        print(f"cc2api: {problem}", file=sys.stderr)
        return 1
    try:
        cli = find_cli(settings.claude, environ)
        server = Server((settings.host, settings.port))
    except CliUnusable as exc:
        print(f"cc2api: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        where = f"{settings.host} port {settings.port}"
        print(f"cc2api: cannot listen on {where}: {_mend_listening(exc)}", file=sys.stderr)
        return 1
    with catch_signals() as signals:
        gateway = server.gateway = Gateway(settings, cli, environ)
        thread = threading.Thread(
            target=server.serve_forever, args=[ACCEPT_TICK_S], name="cc2api-accept", daemon=True
        )
        thread.start()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{server.server_port}"
        gateway.sign_in = describe_sign_in(cli, environ)
        print(banner(gateway, url, gateway.sign_in), flush=True)
        log.info("event=start version=%s claude=%s url=%s", __version__, cli.version, url)
        signals.recv(1)
        shut_down(server, signals)
        log.info("event=stop")
    return 0


def shut_down(server: Server, signals: socket.socket) -> None:
    """Stop accepting, let running answers finish up to `--drain`, then end every child.

    A second signal ends the waiting.
    """
    server.is_stopping = True
    server.shutdown()
    server.server_close()
    deadline = time.monotonic() + server.gateway.settings.drain
    signals.settimeout(0)
    while not server.drain(ACCEPT_TICK_S) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            signals.recv(1)
            log.warning("second signal: running answers are cut off")
            break
    server.gateway.close()


if __name__ == "__main__":
    sys.exit(main())
