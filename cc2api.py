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

Rules that hold throughout:
 1. Data goes one way, and raw client JSON is looked at in one place only: Requests.
 2. One request, one process: nothing of a request can show in another one.
 3. Exactly one call is made upstream for one request. The CLI would make another by itself after
    some answers: it is given no budget for one, and killed besides (`AnswerReader.must_kill`).
 4. Prompts and keys go through pipes only: never into argv, files, an environment or the log.
 5. A 200 is sent with the first event and not before, so that a failure keeps its true status.

Facts about the CLI were seen on 2.1.330 and 2.1.248 talking to a scripted API; each one relied on
is pinned by a test in tests/. Sections, each using only what stands above it: Settings, Errors, API
keys, Requests, CLI process, Pool, Events, OpenAI translation, Gateway, HTTP, Command line.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import hmac
import importlib.util
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
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, cast

__version__ = "0.1.0"

JsonObject = dict[str, Any]
log = logging.getLogger("cc2api")

# `client_composed`, which makes prompts verbatim, came with this version (CLI changelog, and seen:
# 2.1.197 expands @paths and runs slash commands).
MIN_CLI_VERSION: Final = (2, 1, 248)
DEFAULT_SYSTEM_PROMPT: Final = "You are a helpful assistant."
DEFAULT_MODEL_NAME: Final = "claude-code"  # the name under which clients ask for the CLI's default

MAX_BODY_BYTES: Final = 32 * 1024 * 1024  # the Messages API's own limit
MAX_DRAIN_BYTES: Final = 4 * MAX_BODY_BYTES  # read and dropped, so that the client reads our 413
MAX_JSON_DEPTH: Final = 128  # deep enough for any schema; far from both languages' stack limits
MAX_MESSAGES: Final = 100_000  # the Messages API's own limit
MAX_LINE_BYTES: Final = 48 * 1024 * 1024  # of the child's output; a 32 MB body echoed back fits
READ_BYTES: Final = 64 * 1024  # a Linux pipe's capacity
STDERR_TAIL_BYTES: Final = 2000  # enough for a stack trace's first lines in an error message

CLI_PROBE_TIMEOUT_S: Final = 20.0  # `claude --version` takes 0.01 s, `claude auth status` 0.2 s
ANSWER_TIMEOUT_S: Final = 600.0  # the SDKs' own read timeout: nobody waits longer
SETUP_ATTEMPTS: Final = 2  # a child that dies before the query has cost nothing: once more, fresh
SPARE_MAX_AGE_S: Final = 3600.0  # long-idle processes may hold stale sign-ins and connections
KEEPER_TICK_S: Final = 5.0  # how soon a dead or stale spare is noticed without a request
REAP_TICK_S: Final = 0.02  # a killed child is gone within this
EXIT_GRACE_S: Final = 5.0  # from EOF on stdin to SIGKILL; the CLI needs 0.04 s
KEEP_ALIVE_S: Final = (
    120.0  # how long an idle client connection is kept, as nginx does (75 s) or more
)
ACCEPT_TICK_S: Final = 0.1  # how soon the accepting thread notices that it is to stop
LISTEN_BACKLOG: Final = 128  # socketserver's 5 refuses a burst of parallel clients


# ===================================================================== Settings
# One frozen dataclass, the only place where a default lives. Flags beat CC2API_* variables beat
# defaults; the command line is built from these fields, so help and code cannot differ.


def _option(default: Any, text: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user can choose; one field, one flag, one CC2API_ variable."""

    host: str = _option("127.0.0.1", "address to listen on", "ADDR")
    port: int = _option(8080, "port to listen on; 0 picks a free one", "N")
    claude: str | None = _option(None, "the claude executable (default: searched for)", "PATH")
    keys: str = _option("apikeys.txt", "file of API keys, one a line, re-read every time", "FILE")
    spares: int = _option(1, "idle claude processes kept ready", "N")
    bare: bool | None = _option(
        None, "run claude with --bare (default: when an API key or a cloud provider is configured)"
    )
    setting_sources: str = _option(
        "", "settings the CLI loads: any of user,project,local (default: none)", "LIST"
    )
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
    ) -> None:
        super().__init__(message)
        self.status = status or self.status
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        self.kind = kind or TYPE_BY_STATUS.get(self.status, fallback)
        self.details = details


class InvalidRequest(ApiError):
    """The request is at fault; the message starts with the path of the field."""

    status = 400


class NotAuthenticated(ApiError):
    """No valid gateway key, or the CLI is not signed in."""

    status = 401


class NotFound(ApiError):
    """No such route or model."""

    status = 404


class BodyTooLarge(ApiError):
    """The request body is over `MAX_BODY_BYTES`."""

    status = 413


class CliFailed(ApiError):
    """The child could not be started, died, or broke its protocol."""

    status = 502


class AnswerTimeout(ApiError):
    """The whole answer took longer than `ANSWER_TIMEOUT_S`."""

    status = 504


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


# ===================================================================== API keys
# Who may call. The file is read on every request, so a change takes effect at once. Fails closed:
# only a file that is not there, or that holds no key, means open mode.


class KeyFile:
    """The keys of `apikeys.txt`: one a line, blank lines and # lines ignored."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def load(self) -> list[str]:
        """Return the keys, [] for open mode.

        Raises NotAuthenticated when there is a file that cannot be read or decoded.
        """
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as exc:
            log.error("key file %s cannot be read, nobody is let in: %s", self.path, exc)
            raise NotAuthenticated("the gateway's key file cannot be read") from exc
        lines = (line.strip() for line in text.split("\n"))
        return [line for line in lines if line and not line.startswith("#")]

    def check(self, api_key: str, authorization: str) -> str:
        """Return the caller's name for the log: "open", or the last four characters of its key.

        Takes the values of the headers `x-api-key`, which wins as on the public API, and
        `Authorization`, each "" where absent.
        Raises NotAuthenticated when keys are in force and the caller has none of them.
        """
        keys = self.load()
        if not keys:
            return "open"
        scheme, _, token = authorization.strip().partition(" ")
        given = api_key.strip() or (token.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise NotAuthenticated("x-api-key header or Authorization: Bearer is required")
        # Every key is compared, in constant time: neither a prefix nor a position can be timed.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(matches):
            raise NotAuthenticated("invalid x-api-key or bearer token")
        return "…" + given[-4:]


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


EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field must be: its kind, bounds or choices, and for an object the rules of its own."""

    kind: type
    required: bool = False  # else absent and null are fine
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    shape: Mapping[str, _Rule] = field(default_factory=dict)


_Shape = Mapping[str, _Rule]
_NEEDED_TEXT: Final = _Rule(str, required=True)
_MARK: Final[_Shape] = {
    "type": _Rule(str, required=True, choices=("ephemeral",)),
    "ttl": _Rule(str, choices=("5m", "1h")),
}
_CACHEABLE: Final[_Shape] = {"cache_control": _Rule(dict, shape=_MARK)}
_FORMAT: Final[_Shape] = {
    "type": _Rule(str, required=True, choices=("json_schema",)),
    "schema": _Rule(dict, required=True),
}
# Fields that travel in CLAUDE_CODE_EXTRA_BODY just as they came. The sampling parameters, tools and
# tool_choice have no other way; the rest are stable fields, or beta ones that a client sends
# together with its `anthropic-beta` header.
_PASSED: Final[_Shape] = {
    "temperature": _Rule(float, low=0, high=1),
    "top_p": _Rule(float, low=0, high=1),
    "top_k": _Rule(int, low=0),
    "stop_sequences": _Rule(list),
    "tools": _Rule(list),
    "tool_choice": _Rule(
        dict,
        shape={
            "type": _Rule(str, required=True, choices=("auto", "any", "tool", "none")),
            "name": _Rule(str),
        },
    ),
    "service_tier": _Rule(str),
    "speed": _Rule(str),
    "container": _Rule(object),
    "inference_geo": _Rule(str),
    "diagnostics": _Rule(dict),
    "mcp_servers": _Rule(list),
    "context_management": _Rule(dict),
}
_THINKING: Final[_Shape] = {
    "type": _Rule(str, required=True, choices=("enabled", "adaptive", "disabled", "between_tools")),
    "budget_tokens": _Rule(int, low=1024),  # the API's own minimum
    "display": _Rule(str),
}
_REQUEST: Final[_Shape] = {
    **_PASSED,
    **_CACHEABLE,  # the CLI marks the last block itself, which is what the top-level field asks for
    "model": _NEEDED_TEXT,
    "messages": _Rule(list, required=True),
    "max_tokens": _Rule(int, low=0),
    "stream": _Rule(bool),
    "system": _Rule(object),
    "thinking": _Rule(dict, shape=_THINKING),
    "effort": _Rule(str, choices=EFFORTS),  # this gateway's own, older form of the next
    "output_config": _Rule(
        dict,
        shape={"effort": _Rule(str, choices=EFFORTS), "format": _Rule(dict, shape=_FORMAT)},
    ),
    "output_format": _Rule(dict, shape=_FORMAT),  # the older form of output_config.format
    "metadata": _Rule(dict),  # accepted and dropped: the CLI sends its own
    "thread": _Rule(object),
}

# The content blocks: where each may stand, and its required fields. Others pass verbatim.
_USER, _ASSISTANT, _RESULT = "user messages", "assistant messages", "tool results"
_TOOL_USE: Final = {"id": _NEEDED_TEXT, "name": _NEEDED_TEXT, "input": _Rule(dict, required=True)}
_SOURCE: Final = {"source": _Rule(dict, required=True)}
_BLOCKS: Final[dict[str, tuple[tuple[str, ...], _Shape]]] = {
    "text": ((_USER, _ASSISTANT, _RESULT), {"text": _NEEDED_TEXT}),
    "image": ((_USER, _RESULT), _SOURCE),
    "document": ((_USER, _ASSISTANT, _RESULT), _SOURCE),
    "search_result": (
        (_USER, _RESULT),
        {"source": _NEEDED_TEXT, "title": _NEEDED_TEXT, "content": _Rule(list, required=True)},
    ),
    "tool_result": ((_USER,), {"tool_use_id": _NEEDED_TEXT, "is_error": _Rule(bool)}),
    "container_upload": ((_USER,), {"file_id": _NEEDED_TEXT}),
    "tool_reference": ((_RESULT,), {"tool_name": _NEEDED_TEXT}),
    "browser_state": ((_RESULT,), {}),
    "tool_use": ((_ASSISTANT,), _TOOL_USE),
    "thinking": ((_ASSISTANT,), {"thinking": _NEEDED_TEXT, "signature": _NEEDED_TEXT}),
    "redacted_thinking": ((_ASSISTANT,), {"data": _NEEDED_TEXT}),
    "server_tool_use": ((_ASSISTANT,), _TOOL_USE),
    "mcp_tool_use": ((_ASSISTANT,), _TOOL_USE),
    "compaction": ((_ASSISTANT,), {}),
    "fallback": ((_ASSISTANT,), {}),
}
_SERVER_TOOLS: Final = (
    *("web_search", "web_fetch", "tool_search", "advisor", "mcp"),
    *("code_execution", "bash_code_execution", "text_editor_code_execution"),
)
for _tool in _SERVER_TOOLS:
    _BLOCKS[f"{_tool}_tool_result"] = ((_ASSISTANT,), {"tool_use_id": _NEEDED_TEXT})

_IMAGE_MAGIC: Final = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF8",
    "image/webp": b"RIFF",
}
_ENCODED: Final = {"data": _NEEDED_TEXT}
_SOURCES: Final[dict[str, dict[str, _Shape]]] = {
    "image": {
        "base64": {**_ENCODED, "media_type": _Rule(str, True, choices=tuple(_IMAGE_MAGIC))},
        "url": {"url": _NEEDED_TEXT},
        "file": {"file_id": _NEEDED_TEXT},
    },
    "document": {
        "base64": {**_ENCODED, "media_type": _Rule(str, True, choices=("application/pdf",))},
        "text": {**_ENCODED, "media_type": _Rule(str, True, choices=("text/plain",))},
        "url": {"url": _NEEDED_TEXT},
        "file": {"file_id": _NEEDED_TEXT},
        "content": {"content": _Rule(object, required=True)},
    },
}
_KIND_NAMES: Final[dict[type, str]] = {
    **{str: "string", int: "integer", float: "number"},
    **{bool: "boolean", dict: "dictionary", list: "list"},
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


def _parse_turn(body: JsonObject, betas: str, *, login: bool) -> Turn:
    """Check everything but `max_tokens` being there, which chat completions do without."""
    _check(body, "", _REQUEST)
    if not body["model"].strip():
        raise InvalidRequest("model: String should have at least 1 character")
    _check_tools(body)
    system = _parse_system(body)
    thinking = _parse_thinking(body)
    if thinking is None and body.get("top_p") is not None and body.get("temperature") is None:
        # With thinking off the CLI sends temperature 1 (seen, 2.1.330), and upstream refuses the
        # two together. Off by way of the body, it sends none.
        thinking = {"type": "disabled"}
    messages = _parse_messages(body)
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
    rules = {"type": _Rule(str, required=True, choices=("text",)), "text": _NEEDED_TEXT}
    texts = []
    for path, block in _objects(body, "system"):
        _check(block, f"{path}.", {**rules, **_CACHEABLE})
        if not block["text"].strip():
            raise InvalidRequest("system: text content blocks must be non-empty")
        texts.append(block["text"])
    return tuple(texts)


def _check_tools(body: JsonObject) -> None:
    """Check what the API would refuse of tools and lists; the rest of a tool passes verbatim."""
    names = set()
    for path, tool in _objects(body, "tools"):
        _check(tool, f"{path}.", {"type": _Rule(str), "name": _Rule(str), **_CACHEABLE})
        if tool.get("type") in (None, "custom"):  # typed tools need neither name nor schema
            rules = {"name": _NEEDED_TEXT, "input_schema": _Rule(dict, required=True)}
            _check(tool, f"{path}.custom.", rules)
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


def _parse_thinking(body: JsonObject) -> JsonObject | None:
    """Return the `thinking` object where it turns thinking on; None where it is off or absent."""
    thinking: JsonObject | None = body.get("thinking")
    if thinking is None or thinking["type"] == "disabled":
        return None
    if thinking["type"] == "enabled":
        budget, max_tokens = thinking.get("budget_tokens"), body.get("max_tokens")
        if budget is None:
            raise InvalidRequest("thinking.enabled.budget_tokens: Field required")
        if max_tokens is not None and budget >= max_tokens:
            raise InvalidRequest("`max_tokens` must be greater than `thinking.budget_tokens`.")
    return thinking


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


def _parse_messages(body: JsonObject) -> list[Message]:
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
        whole = parts[0].text if len(parts) == 1 else None
        messages.append(Message(role, [b for _, b in blocks] if whole is None else whole))
        all_blocks.append(blocks)
    if messages[-1].role != "user":
        raise InvalidRequest(
            "messages: This gateway does not support assistant message prefill. "
            "The conversation must end with a user message."
        )
    _check_tool_pairs(all_blocks)
    return messages


def _parse_message(path: str, entry: JsonObject) -> _Parsed:
    roles = ("user", "assistant", "system")
    rules = {"role": _Rule(str, True, choices=roles), "content": _Rule(object, required=True)}
    _check(entry, f"{path}.", rules)
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
    _check(block, f"{path}.", {"type": _Rule(str, choices=("text",))})
    return path, {**block, "text": f"<system-reminder>\n{block['text']}\n</system-reminder>"}


def _check_block(block: Any, path: str, where: str) -> None:
    """Check one content block: known type, in its place, with its required fields."""
    _check_value(block, path, _Rule(dict))
    _check(block, f"{path}.", {"type": _Rule(str, True, choices=tuple(_BLOCKS))})
    kind = block["type"]
    places, shape = _BLOCKS[kind]
    if where not in places:
        raise InvalidRequest(f"{path}: `{kind}` blocks are not allowed in {where}")
    _check(block, f"{path}.{kind}.", {**shape, **_CACHEABLE})
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

    The CLI would invent the missing result and blank the orphan; the API refuses both.
    """
    seen: set[str] = set()
    asked: list[str] = []  # the ids of the message before
    asked_path = ""
    for blocks in messages:
        answered = []
        for path, block in blocks:
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
    for block in spare:
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

CHILD_FLAGS: Final = (
    *("-p", "--input-format", "stream-json", "--output-format", "stream-json"),
    *("--verbose", "--include-partial-messages"),
    *("--tools", "", "--disable-slash-commands", "--strict-mcp-config"),
    "--no-session-persistence",  # no transcript on disk
    *("--settings", '{"hooks":{},"mcpServers":{},"disableAllHooks":true}'),
    *("--system-prompt", DEFAULT_SYSTEM_PROMPT),
    *("--max-turns", "1"),  # a tool_use ends the turn
    # Every other way in which the CLI would call upstream again ends here: any answer is over this
    # budget, and it is looked at between calls (seen, 2.1.330 and 2.1.248).
    *("--max-budget-usd", "0.0000001"),
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
    # The CLI's guess of what is too long is upstream's to make (the value is in tokens).
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "1000000000",
    "DISABLE_AUTO_COMPACT": "1",  # no summarising call behind the client's back
    "DISABLE_COMPACT": "1",
    "DISABLE_AUTOUPDATER": "1",  # the pool notices an update; children must not make one
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
            return "NOT SIGNED IN: run `claude` and type /login, or set ANTHROPIC_API_KEY"
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


def child_command(cli: Cli, *, bare: bool, setting_sources: str) -> list[str]:
    """Return the argument list of a child; nothing of a request is ever in it."""
    command = [cli.path, *CHILD_FLAGS, "--setting-sources", setting_sources]
    return [*command, "--bare"] if bare else command


def child_environment(environ: Mapping[str, str], temp_dir: str) -> dict[str, str]:
    """Return the environment of a child: the gateway's own, with what makes the CLI predictable."""
    kept = {name: value for name, value in environ.items() if name not in DROPPED_VARIABLES}
    # the CLI leaves sockets and probe files behind when it is killed: they go where we clean up
    return {**kept, **CHILD_VARIABLES, "TMPDIR": temp_dir}


class ChildDied(Exception):
    """The child ended or closed its output; the message holds its exit status and last words."""


class Child:
    """One running CLI and its line protocol.

    Used by one thread at a time. Whoever owns it ends it: `kill` at once, or `finish`, and then
    `reap` until it says true. Reading and writing raise ChildDied, AnswerTimeout or CliFailed.
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

    def is_alive(self) -> bool:
        """Say whether the process runs; reaps it where it does not."""
        return self._process.poll() is None

    def send(self, line: JsonObject) -> None:
        """Queue a line; it is written while reading, so neither side can block the other."""
        self._outbox += json.dumps(line).encode("ascii") + b"\n"
        self._poll.register(self._stdin, select.POLLOUT)

    def request(self, subtype: str, deadline: float, **fields: Any) -> JsonObject:
        """Send a control request and return the child's response to it."""
        request_id = str(next(self._requests))
        request = {"subtype": subtype, **fields}
        self.send({"type": "control_request", "request_id": request_id, "request": request})
        while True:
            line = self.read_line(deadline)
            response = line.get("response")
            if line.get("type") != "control_response" or not isinstance(response, dict):
                continue
            if response.get("request_id") == request_id:
                if response.get("subtype") == "success":
                    return response.get("response") or {}
                raise CliFailed(f"claude refused {subtype}: {response.get('error')}")

    def read_line(self, deadline: float) -> JsonObject:
        """Wait for the next line. Garbage (no JSON object) is logged and skipped."""
        while True:
            while not self._lines:
                self._pump(deadline)
            raw = self._lines.popleft()
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                return line
            if raw.strip():
                log.warning("claude pid=%d printed a line that is not JSON", self.pid)

    def has_line(self) -> bool:
        """Say whether `read_line` has something at once."""
        return bool(self._lines)

    def kill(self) -> None:
        """End the process at once (SIGKILL); `reap` collects it."""
        self._process.kill()

    def finish(self) -> None:
        """Close the child's stdin: the CLI ends by itself after what it is doing."""
        with contextlib.suppress(OSError):
            cast("Any", self._process.stdin).close()

    def reap(self) -> bool:
        """Collect an ended process and close its pipes; say whether it has ended."""
        if self._process.poll() is None:
            return False
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                cast("Any", pipe).close()
        return True

    def _pump(self, deadline: float) -> None:
        """Move bytes once in whichever directions are ready, waiting until `deadline` for one."""
        left_ms = max(0.0, deadline - time.monotonic()) * 1000
        ready = self._poll.poll(left_ms)
        if not ready:
            raise AnswerTimeout("claude did not answer in time")
        for fd, _ in ready:
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
            self._process.wait(timeout=1.0)
        with contextlib.suppress(KeyError, OSError):  # what it said last may still be in the pipe
            os.set_blocking(self._stderr, False)
            self._read_stderr()
        words = self._last_words.decode("utf-8", "replace").strip()
        code = self._process.returncode
        how = "closed its output" if code is None else f"ended with status {code}"
        return f"claude {how}" + (f": {words}" if words else "")


def open_turn(child: Child, turn: Turn, deadline: float) -> None:
    """Bring a blank child to the point where only the last user message is missing.

    Follows cli-contract.md, "Claiming a spare": initialize, settings, thinking, history. Nothing
    goes upstream. Raises as Child does.
    """
    prompt = {"systemPrompt": list(turn.system)} if turn.system else {}
    reply = child.request("initialize", deadline, hooks=None, **prompt)
    child.request("apply_flag_settings", deadline, settings=to_flag_settings(turn))
    # null leaves thinking to extra_body; 0 turns it off where the model can be without
    tokens = None if turn.thinking else 0
    child.request("set_max_thinking_tokens", deadline, max_thinking_tokens=tokens)
    model = resolve_model(turn.model, reply.get("models") or [])
    for message in turn.history:
        child.send(to_line(message, model))
        if message.role == "user":
            # user lines are queued but assistant lines applied at once: wait, or order is lost
            while child.read_line(deadline).get("type") != "result":
                pass


def to_flag_settings(turn: Turn) -> JsonObject:
    """Return the settings of `apply_flag_settings` for a turn; every per-request one is given."""
    variables = {
        "CLAUDE_CODE_EXTRA_BODY": json.dumps(turn.extra_body),
        "ANTHROPIC_BETAS": ",".join(turn.betas),
        "CLAUDE_CODE_PROMPT_CACHE_TTL": turn.cache_ttl,
    }
    if turn.max_tokens:
        # the body's max_tokens is in extra_body; this is for the CLI's own sums
        variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(turn.max_tokens)
    settings: JsonObject = {"env": variables}
    if turn.model != DEFAULT_MODEL_NAME:
        settings["model"] = turn.model
    if turn.effort:
        settings["effortLevel"] = turn.effort
    return settings


def resolve_model(name: str, models: Iterable[JsonObject]) -> str:
    """Return the id that the CLI will use for a model name or alias, by its own list."""
    wanted = "default" if name == DEFAULT_MODEL_NAME else name
    for model in models:
        if model.get("value") == wanted:
            return str(model.get("resolvedModel") or name).removesuffix("[1m]")
    return name.removesuffix("[1m]")


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
# Keeps idle children warm and lends each to one request. Rule 1: a child is owned by the pool or by
# one request, never both. Rule 2: nothing blocks while holding the lock. One keeper thread starts,
# renews and reaps children; `acquire`, `refill` and `release` run on request threads.


class Pool:
    """Warm children. `start` makes one (it may raise OSError); `stamp` tells a new executable."""

    def __init__(
        self, start: Callable[[], Child], *, spares: int, stamp: Callable[[], object]
    ) -> None:
        self._start = start
        self._spares = spares
        self._stamp = stamp
        # Guarded by _changed: all fields below.
        self._changed = threading.Condition()
        self._idle: collections.deque[Child] = collections.deque()
        self._waiters: collections.deque[Future[Child]] = collections.deque()
        self._lent: set[Child] = set()
        self._owed: set[Child] = set()  # claimed spares whose replacement has not been asked for
        self._ending: dict[Child, float] = {}  # with the time at which SIGKILL is due
        self._next_spare_at = 0.0  # monotonic; put off when a start has failed
        self._closed = False
        self._keeper = threading.Thread(target=self._keep, name="cc2api-keeper", daemon=True)
        self._keeper.start()

    def acquire(self, deadline: float) -> Child:
        """Take an idle child, or wait for a new one. Raises CliFailed or AnswerTimeout."""
        with self._changed:
            if self._closed:
                raise CliFailed("the gateway is shutting down", status=503)
            self._retire_unfit()
            if self._idle:
                child = self._idle.popleft()
                self._lent.add(child)
                self._owed.add(child)
                return child
            waiter: Future[Child] = Future()
            self._waiters.append(waiter)
            self._changed.notify_all()
        try:
            return waiter.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            if not waiter.cancel():  # a child came in the last moment
                return waiter.result()
            raise AnswerTimeout("no claude process became free in time") from None

    def refill(self, child: Child) -> None:
        """Let a claimed spare be replaced: its answer has begun.

        Not at the claim, since a starting process takes 0.4 s of CPU from the one that answers
        (seen: 160 ms against 80 to the first delta on two cores).
        """
        with self._changed:
            if child in self._owed:
                self._owed.discard(child)
                self._changed.notify_all()

    def release(self, child: Child, *, kill: bool) -> None:
        """Take a child back and end it; `kill` at once, or let it finish by itself."""
        if kill:
            child.kill()
        else:
            child.finish()
        with self._changed:
            self._lent.discard(child)
            self._owed.discard(child)
            self._ending[child] = time.monotonic() + EXIT_GRACE_S
            self._changed.notify_all()

    def counts(self) -> dict[str, int]:
        """Return how many children there are in each state."""
        with self._changed:
            return {
                "idle": len(self._idle),
                "busy": len(self._lent),
                "ending": len(self._ending),
            }

    def close(self) -> None:
        """End every child, lent ones too, and wait until the last is reaped."""
        with self._changed:
            self._closed = True
            for child in (*self._idle, *self._lent):
                child.kill()
                self._ending[child] = time.monotonic()
            self._idle.clear()
            for waiter in self._waiters:
                waiter.cancel()
            self._waiters.clear()
            self._changed.notify_all()
        self._keeper.join()

    def _retire_unfit(self) -> None:
        """Move dead, aged and outdated idle children to the ending ones. Holds the lock."""
        now, stamp = time.monotonic(), self._stamp()
        for child in list(self._idle):
            is_old = now - child.started_at > SPARE_MAX_AGE_S
            is_outdated = stamp is not None and stamp != child.stamp
            if is_old or is_outdated or not child.is_alive():
                self._idle.remove(child)
                child.finish()
                self._ending[child] = now + EXIT_GRACE_S

    def _keep(self) -> None:
        """Run the keeper thread: serve waiters first, then spares; reap; until closed and empty."""
        while True:
            waiter: Future[Child] | None = None
            with self._changed:
                if not self._closed:
                    self._retire_unfit()
                self._reap()
                if self._waiters:
                    waiter = self._waiters.popleft()
                elif not self._lacks_spare():
                    if self._closed and not self._ending:
                        return
                    self._changed.wait(REAP_TICK_S if self._ending else KEEPER_TICK_S)
                    continue
            self._start_one(waiter)

    def _lacks_spare(self) -> bool:
        """Say whether a spare is to be started now. Holds the lock."""
        enough = len(self._idle) + len(self._owed) >= self._spares
        return not (self._closed or enough or time.monotonic() < self._next_spare_at)

    def _reap(self) -> None:
        """Collect ended children; kill those whose grace is over. Holds the lock."""
        for child, due in list(self._ending.items()):
            if child.reap():
                del self._ending[child]
            elif time.monotonic() >= due:
                child.kill()

    def _start_one(self, waiter: Future[Child] | None) -> None:
        """Start a child for a waiter, or as a spare. Runs without the lock."""
        if waiter is not None and not waiter.set_running_or_notify_cancel():
            return  # it timed out: a child given to it would be lost
        try:
            child = self._start()
        except OSError as exc:
            log.error("claude cannot be started: %s", exc)
            with self._changed:
                self._next_spare_at = time.monotonic() + KEEPER_TICK_S
            if waiter is not None:
                waiter.set_exception(CliFailed(f"claude cannot be started: {exc}", status=503))
            return
        with self._changed:
            if self._closed:
                child.kill()
                self._ending[child] = time.monotonic()
            elif waiter is None:
                self._idle.append(child)
            else:
                self._lent.add(child)
        if waiter is not None:
            waiter.set_result(child)


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


class AnswerReader:
    """Turn the lines of one answer into events, and tell when it is complete.

    It is complete with the message_delta that carries a stop reason: message_stop, which always
    follows, is made here, so that the child can be stopped before it goes on by itself.
    """

    def __init__(self) -> None:
        self.started = False  # message_start was seen
        self.done = False
        self.has_delta = False
        self._stop_reason: str | None = None
        self._says_something = False
        self._cli_error: str | None = None
        self._refusal: JsonObject | None = None

    @property
    def must_kill(self) -> bool:
        """Whether the child would make another call if it were left alone."""
        is_quiet = self._stop_reason in _QUIET_STOP_REASONS and self._says_something
        return not (self.done and is_quiet)

    def feed(self, line: JsonObject) -> list[Event]:
        """Return the events that a line brings. Raises the ApiError that a failure line means."""
        kind = line.get("type")
        if line.get("parent_tool_use_id") is not None or self.done:
            return []
        if line.get("subtype") == "model_refusal_no_fallback":
            self._refusal = line
        if kind == "result":
            if self.started and self._refusal is not None:
                return self._feed_event(to_refusal_delta(self._refusal, line))
            raise to_api_error(line, self._cli_error)
        if kind == "assistant" and line.get("error"):
            # A failure: what still comes are closing events of the CLI's own making, without a stop
            # reason, and then `result`. After a refusal the true message_delta comes.
            self._cli_error = str(line["error"])
        event = line.get("event")
        if kind != "stream_event" or not isinstance(event, dict):
            return []
        if self._cli_error and not (event.get("delta") or {}).get("stop_reason"):
            return []
        return self._feed_event(event)

    def _feed_event(self, event: Event) -> list[Event]:
        kind = event.get("type")
        if kind == "message_start":
            if self.started:
                return []  # never two messages in one answer
            self.started = True
        elif not self.started:
            return []
        elif kind == "content_block_start":
            block = event.get("content_block") or {}
            self._says_something |= block.get("type") == "tool_use"
        elif kind == "content_block_delta":
            self.has_delta = True
            text = (event.get("delta") or {}).get("text")
            self._says_something |= isinstance(text, str) and bool(text.strip())
        elif kind == "message_delta":
            self._stop_reason = (event.get("delta") or {}).get("stop_reason")
            if self._stop_reason is not None:
                self.done = True
                return [event, {"type": "message_stop"}]
        elif kind == "message_stop":
            # without a stop reason: upstream's stream broke between two blocks, and the CLI is
            # about to ask for the rest by a second call (seen, 2.1.330)
            raise CliFailed("upstream's stream ended before its answer was complete")
        return [event]


def to_refusal_delta(refusal: JsonObject, result: JsonObject) -> Event:
    """Return the message_delta of a refusal that the CLI kept to itself.

    Where it has no other model to ask, its turn can be over (by `--max-budget-usd`) before it hands
    the event on (seen, 2.1.248). Its own lines say the same: the refusal, and `modelUsage`.
    """
    details = {name: refusal.get(f"api_refusal_{name}") for name in ("category", "explanation")}
    stop = {"stop_reason": "refusal", "stop_sequence": None}
    models = (result.get("modelUsage") or {}).values()
    usage = {"output_tokens": sum(model.get("outputTokens", 0) for model in models)}
    delta = {**stop, "stop_details": {"type": "refusal", **details}}
    return {"type": "message_delta", "delta": delta, "usage": usage}


def to_api_error(result: JsonObject, cli_error: str | None = None) -> ApiError:
    """Return the error that a `result` line without a finished answer stands for.

    Status and type are upstream's where the CLI tells them (`api_error_status`,
    `api_error_type`), else by the CLI's own word for the failure, else 502.
    """
    text = result.get("result")
    if not isinstance(text, str):
        text = "; ".join(map(str, result.get("errors") or [])) or "claude gave no answer"
    if not result.get("is_error"):
        return CliFailed("claude ended its turn without an answer")
    if text.startswith(("Not logged in", "Invalid API key")):
        return NotAuthenticated(_NOT_SIGNED_IN)
    if text.startswith("Prompt is too long"):
        return InvalidRequest("prompt is too long for the model's context window")
    kind = result.get("api_error_type")
    kind = kind if kind in STATUS_BY_TYPE else None
    status = result.get("api_error_status")
    if not isinstance(status, int) or not 400 <= status <= 599:
        status = STATUS_BY_TYPE.get(kind or "") or _STATUS_BY_CLI_ERROR.get(cli_error or "", 502)
    if model := _MODEL_ISSUE.match(text):
        return NotFound(f"model: {model.group(1)}")
    if decorated := _DECORATION.match(text):
        text = decorated.group("message")
    return ApiError(text, status=status, kind=kind)


class MessageAssembler:
    """Put the events of one answer together to the message of a non-streaming answer."""

    def __init__(self) -> None:
        self.message: JsonObject = {}
        self._json: list[str] = []  # of the tool_use block that is open

    def add(self, event: Event) -> None:
        """Take the next event; unknown ones are ignored."""
        kind = event.get("type")
        if kind == "message_start":
            self.message = dict(event["message"])
            self.message["content"] = []
            self.message["usage"] = dict(self.message.get("usage") or {})
        elif kind == "content_block_start":
            self.message["content"].append(dict(event["content_block"]))
            self._json = []
        elif kind == "content_block_delta":
            self._add_delta(self.message["content"][-1], event["delta"])
        elif kind == "content_block_stop" and self._json:
            self.message["content"][-1]["input"] = _parse_input("".join(self._json))
        elif kind == "message_delta":
            self.message.update(event.get("delta") or {})
            usage = event.get("usage") or {}
            self.message["usage"].update({k: v for k, v in usage.items() if v is not None})
            if event.get("context_management") is not None:
                self.message["context_management"] = event["context_management"]

    def _add_delta(self, block: JsonObject, delta: JsonObject) -> None:
        match delta.get("type"):
            case "text_delta":
                block["text"] = block.get("text", "") + delta["text"]
            case "thinking_delta":
                block["thinking"] = block.get("thinking", "") + delta["thinking"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "input_json_delta":
                self._json.append(delta["partial_json"])
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or []), delta["citation"]]
            case "compaction_delta":
                block["content"] = delta.get("content")


def _parse_input(text: str) -> Any:
    """Parse a tool's input; {} where max_tokens cut it short or nothing was sent."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {}


# =========================================================== OpenAI translation
# OpenAI chat completions to the Messages API and back. Pure. Text only, and not streaming, so far.

_FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}


def parse_chat_request(body: JsonObject, *, login: bool = False) -> Turn:
    """Check a chat completions request and return it as a Turn. Raises InvalidRequest."""
    if body.get("stream"):
        raise InvalidRequest("stream: this endpoint does not stream yet; use /v1/messages")
    system: list[JsonObject] = []
    messages: list[JsonObject] = []
    for path, entry in _objects(body, "messages"):
        roles = ("system", "developer", "user", "assistant")
        _check(entry, f"{path}.", {"role": _Rule(str, required=True, choices=roles)})
        if entry["role"] in ("system", "developer"):
            system.append({"type": "text", "text": _chat_text(entry, path)})
        else:
            messages.append({"role": entry["role"], "content": _chat_text(entry, path)})
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
    stop = body.get("stop")
    passed = {name: body.get(name) for name in ("model", "temperature", "top_p")}
    translated = {
        **passed,
        "messages": messages,
        "system": system,
        "max_tokens": max_tokens,
        "stop_sequences": [stop] if isinstance(stop, str) else stop,
    }
    return _parse_turn(translated, "", login=login)


def _chat_text(entry: JsonObject, path: str) -> str:
    """Return a chat message's text, given as a string or as text parts."""
    content = entry.get("content")
    if not isinstance(content, list):
        _check(entry, f"{path}.", {"content": _NEEDED_TEXT})
        return str(content)
    rules = {"type": _Rule(str, required=True, choices=("text",)), "text": _NEEDED_TEXT}
    for index, part in enumerate(content):
        _check_value(part, f"{path}.content.{index}", _Rule(dict))
        _check(part, f"{path}.content.{index}.", rules)
    return "".join(part["text"] for part in content)


def to_completion(message: JsonObject, created: int) -> JsonObject:
    """Return a finished message as a chat completion; `created` is in Unix seconds."""
    usage = message["usage"]
    cached = usage.get("cache_read_input_tokens") or 0
    written = usage.get("cache_creation_input_tokens") or 0
    prompt = usage["input_tokens"] + cached + written
    text = "".join(b["text"] for b in message["content"] if b.get("type") == "text")
    reply = {"role": "assistant", "content": text, "refusal": None}
    finish = _FINISH_REASONS.get(message["stop_reason"], "stop")
    return {
        "id": "chatcmpl-" + str(message["id"]).removeprefix("msg_"),
        "object": "chat.completion",
        "created": created,
        "model": message["model"],
        "choices": [{"index": 0, "message": reply, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": usage["output_tokens"],
            "total_tokens": prompt + usage["output_tokens"],
            "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        },
        "system_fingerprint": None,
    }


# ====================================================================== Gateway
# What the HTTP layer asks: a turn in, batches of events out. Owns the pool and the key file; knows
# nothing of sockets. Runs on request threads.


class Gateway:
    """The running service behind the HTTP server."""

    def __init__(self, settings: Settings, cli: Cli, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.cli = cli
        self.keys = KeyFile(settings.keys)
        bare = wants_bare(settings.bare, environ)
        self.login = not bare
        self._temp = tempfile.TemporaryDirectory(prefix="cc-", ignore_cleanup_errors=True)
        # With a login the model is told this directory's name, so it is empty and says nothing.
        work_dir, temp_dir = Path(self._temp.name, "work"), Path(self._temp.name, "tmp")
        work_dir.mkdir()
        temp_dir.mkdir()
        command = child_command(cli, bare=bare, setting_sources=settings.setting_sources)
        environment = child_environment(environ, str(temp_dir))
        self.pool = Pool(
            lambda: Child(command, environment, str(work_dir), cli.stamp()),
            spares=settings.spares,
            stamp=cli.stamp,
        )

    def answer(self, turn: Turn) -> Generator[list[Event], None, None]:
        """Yield the answer's events, in batches of those that were ready together.

        The last event is always message_stop. Raises ApiError; closing the generator early ends the
        child at once.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        for attempt in range(1, SETUP_ATTEMPTS + 1):
            child = self.pool.acquire(deadline)
            reader = AnswerReader()
            try:
                try:
                    open_turn(child, turn, deadline)
                except ChildDied as exc:
                    log.warning("%s; nothing was sent upstream (attempt %d)", exc, attempt)
                    if attempt == SETUP_ATTEMPTS:
                        raise CliFailed(str(exc)) from exc
                    continue
                yield from self._read_answer(child, reader, turn, deadline)
                return
            finally:
                self.pool.release(child, kill=reader.must_kill)

    def _read_answer(
        self, child: Child, reader: AnswerReader, turn: Turn, deadline: float
    ) -> Iterator[list[Event]]:
        """Send the query and yield what comes, until the answer is complete."""
        child.send(to_line(turn.query, turn.model, query=True))
        failure: ApiError | None = None
        while not failure:
            batch: list[Event] = []
            try:
                batch += reader.feed(child.read_line(deadline))
                while child.has_line() and not reader.done:
                    batch += reader.feed(child.read_line(deadline))
            except ChildDied as exc:
                log.error("%s", exc)
                failure = CliFailed("claude ended before its answer was complete")
            except ApiError as exc:
                failure = exc
            is_over = reader.done
            if failure or (is_over and reader.must_kill):
                child.kill()  # at once, lest it ask upstream again
            if reader.has_delta:
                self.pool.refill(child)
            if batch:
                yield batch  # also what came just before a failure
            if is_over:
                return
        raise failure

    def close(self) -> None:
        """End all children and remove the temporary directory."""
        self.pool.close()
        self._temp.cleanup()


# ========================================================================= HTTP
# Sockets, routes, SSE frames, and the one place where errors become answers. One thread for each
# connection. No response header is ever built from client text.

JSON_TYPE: Final = "application/json"
SSE_TYPE: Final = "text/event-stream; charset=utf-8"
_UNSAFE: Final = re.compile(r"[^\x21-\x7e]|[\"\\=]")


def to_frame(event: Event) -> bytes:
    """Return an event as an SSE frame; ASCII, since some clients split lines at U+2028."""
    return f"event: {event.get('type')}\ndata: {json.dumps(event)}\n\n".encode("ascii")


def to_anthropic_error(error: ApiError, request_id: str) -> JsonObject:
    """Return an error in the Messages API's envelope."""
    inner: JsonObject = {"type": error.kind, "message": str(error)}
    if error.details is not None:
        inner["details"] = error.details
    return {"type": "error", "error": inner, "request_id": request_id}


def to_openai_error(error: ApiError) -> JsonObject:
    """Return an error in the chat completions API's envelope."""
    inner = {"message": str(error), "type": error.kind, "param": None, "code": None}
    return {"error": inner}


class Server(ThreadingHTTPServer):
    """The listening socket; every connection gets a thread running `Handler`."""

    daemon_threads = True
    request_queue_size = LISTEN_BACKLOG
    gateway: Gateway

    def server_bind(self) -> None:
        """Bind without asking DNS for our own name, as HTTPServer would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what escaped a handler; a connection that broke is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("connection from %s failed", client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests one after the other and answers each."""

    protocol_version = "HTTP/1.1"
    timeout = KEEP_ALIVE_S
    disable_nagle_algorithm = True  # an event must not wait for the ACK of the one before
    server: Server

    ROUTES: ClassVar[dict[str, tuple[str, str]]] = {
        "/": ("GET", "_index"),
        "/v1/messages": ("POST", "_messages"),
        "/v1/chat/completions": ("POST", "_chat_completions"),
    }

    def _handle(self) -> None:
        """Answer one request; whatever a route raises is answered here and nowhere else."""
        self._begin()
        self._path = self.path.partition("?")[0]
        try:
            try:
                self._route()()
            except (ApiError, ClientGone):
                raise
            except Exception as exc:
                log.exception("request %s failed", self._request_id)
                raise ApiError("internal error") from exc
        except ApiError as error:
            with contextlib.suppress(ClientGone):
                self._send_error(error)
        except ClientGone:
            self._note["status"] = 499  # nginx's code for it; nobody is sent it
            self.close_connection = True
        self._log_request()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _begin(self) -> None:
        self._started_at = time.monotonic()
        self._request_id = "req_" + uuid.uuid4().hex[:24]
        self._streaming = False
        self._body_left: int | None = None  # bytes of the request body not read yet
        self._path = ""
        self._note: dict[str, object] = {}  # what the log line says beyond method and path

    def _route(self) -> Callable[[], None]:
        method, name = self.ROUTES.get(self._path, ("", ""))
        if not name:
            raise NotFound(f"{self.command} {self._path}: no such route")
        if self.command != method and (self.command, method) != ("HEAD", "GET"):
            raise ApiError(f"{self.command} is not allowed here, {method} is", status=405)
        return cast("Callable[[], None]", getattr(self, name))

    # ---- routes

    def _index(self) -> None:
        self._send_json(200, {"service": "cc2api", "version": __version__})

    def _messages(self) -> None:
        gateway = self.server.gateway
        body = self._authorized_body()
        betas = ",".join(self.headers.get_all("anthropic-beta", []))
        turn = parse_messages_request(body, betas, login=gateway.login)
        self._note_turn(turn)
        with contextlib.closing(gateway.answer(turn)) as answer:
            if turn.stream:
                self._stream(answer)
            else:
                self._send_json(200, self._assemble(answer))

    def _chat_completions(self) -> None:
        gateway = self.server.gateway
        turn = parse_chat_request(self._authorized_body(), login=gateway.login)
        self._note_turn(turn)
        with contextlib.closing(gateway.answer(turn)) as answer:
            message = self._assemble(answer)
        self._send_json(200, to_completion(message, int(time.time())))

    # ---- reading the request

    def _authorized_body(self) -> JsonObject:
        """Check the caller's key, then read and parse the body."""
        key, bearer = self.headers.get("x-api-key", ""), self.headers.get("authorization", "")
        self._note["key"] = self.server.gateway.keys.check(key, bearer)
        raw = self._read_body()
        log.debug("%s request %s", self._request_id, raw.decode("utf-8", "replace"))
        return parse_json(raw)

    def _read_body(self) -> bytes:
        length = self._body_length()
        if length > MAX_BODY_BYTES:
            raise BodyTooLarge(f"Request exceeds the maximum size of {MAX_BODY_BYTES} bytes")
        raw = self.rfile.read(length)
        self._body_left = 0
        if len(raw) < length:
            raise ClientGone
        return raw

    def _body_length(self) -> int:
        """Return what is announced of the body and not read yet. Raises InvalidRequest."""
        if self._body_left is None:
            if "transfer-encoding" in self.headers:
                self.close_connection = True  # where the body ends is not known
                self._body_left = 0
                raise InvalidRequest("Transfer-Encoding is not supported; send Content-Length")
            text = self.headers.get("content-length", "0").strip()
            if not (text.isascii() and text.isdigit()):
                self.close_connection = True
                self._body_left = 0
                raise InvalidRequest("Content-Length is not a number")
            self._body_left = int(text)
        return self._body_left

    def _drain_body(self) -> None:
        """Read away a body that nobody wanted, or the client never gets to read the answer."""
        with contextlib.suppress(InvalidRequest):
            left = self._body_length()
            if left > MAX_DRAIN_BYTES:
                self.close_connection = True
                return
            while left > 0 and (chunk := self.rfile.read(min(left, READ_BYTES))):
                left -= len(chunk)
            self._body_left = 0

    # ---- writing the answer

    def _assemble(self, answer: Iterator[list[Event]]) -> JsonObject:
        assembler = MessageAssembler()
        for batch in answer:
            for event in batch:
                assembler.add(event)
        self._note_usage(assembler.message.get("usage"))
        return assembler.message

    def _stream(self, answer: Iterator[list[Event]]) -> None:
        """Write each batch of events with one write; the 200 goes out with the first."""
        for batch in answer:
            data = b""
            if not self._streaming:
                data = self._start_stream()
            frames = b"".join(map(to_frame, batch))
            log.debug("%s response %s", self._request_id, frames.decode("ascii"))
            for event in batch:
                self._note_usage(event.get("usage") or (event.get("message") or {}).get("usage"))
            is_last = batch[-1].get("type") == "message_stop"
            self._write(data + self._chunk(frames, last=is_last))

    def _start_stream(self) -> bytes:
        self._streaming = True
        self._note["status"] = 200
        headers = {"content-type": SSE_TYPE, "cache-control": "no-cache"}
        self._is_chunked = self.request_version != "HTTP/1.0"
        if self._is_chunked:
            headers["transfer-encoding"] = "chunked"
        else:
            self.close_connection = True  # the end of the connection is the end of the body
        return self._head(200, headers)

    def _chunk(self, data: bytes, *, last: bool) -> bytes:
        if not self._is_chunked:
            return data
        return b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b"")

    def _send_json(
        self, status: int, body: JsonObject, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode("ascii")
        self._note["status"] = status
        log.debug("%s response %s", self._request_id, data.decode("ascii"))
        self._drain_body()
        length = str(len(data))
        head = self._head(
            status, {"content-type": JSON_TYPE, "content-length": length, **(headers or {})}
        )
        self._write(head if self.command == "HEAD" else head + data)

    def _send_error(self, error: ApiError) -> None:
        """Answer with an error: JSON with its status, or an event where a stream has begun."""
        self._note["error"] = _quoted(str(error), 200)
        is_openai = self._path.endswith("/chat/completions")
        body = to_openai_error(error) if is_openai else to_anthropic_error(error, self._request_id)
        if self._streaming:
            self._note["status"] = f"200+{error.kind}"
            self._write(self._chunk(to_frame({**body, "type": "error"}), last=True))
            return
        allow = {"allow": self.ROUTES[self._path][0]} if error.status == 405 else {}
        self._send_json(error.status, body, allow)

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """Return the status line and headers; all names and values are our own."""
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
        fixed = {
            "server": f"cc2api/{__version__}",
            "date": self.date_time_string(),
            "request-id": self._request_id,
            "x-request-id": self._request_id,
            "connection": "close" if self.close_connection else "keep-alive",
        }
        lines = [f"{name}: {value}" for name, value in {**fixed, **headers}.items()]
        return "\r\n".join([f"HTTP/1.1 {status} {phrase}", *lines, "", ""]).encode("ascii")

    def _write(self, data: bytes) -> None:
        try:
            self.connection.sendall(data)
        except OSError as exc:
            raise ClientGone from exc

    # ---- the log

    def _note_turn(self, turn: Turn) -> None:
        self._note["model"] = _quoted(turn.model, 100)
        if turn.ignored:
            names = _quoted(",".join(turn.ignored), 200)
            log.warning("id=%s unknown fields ignored: %s", self._request_id, names)

    def _note_usage(self, usage: JsonObject | None) -> None:
        for name in ("input_tokens", "output_tokens"):
            if usage and usage.get(name) is not None:
                self._note[name] = usage[name]

    def _log_request(self) -> None:
        self._note["ms"] = round((time.monotonic() - self._started_at) * 1000)
        pairs = " ".join(f"{name}={value}" for name, value in self._note.items())
        path = _quoted(self._path, 200)
        log.info("method=%s path=%s id=%s %s", self.command, path, self._request_id, pairs)

    # ---- what http.server would do in its own way

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses (a bad request line, an unknown method)."""
        self._begin()
        self._body_left = 0
        self.close_connection = True
        self.command = getattr(self, "command", None) or "-"
        with contextlib.suppress(ClientGone):
            self._send_error(ApiError(message or "bad request", status=int(code)))
        self._log_request()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep http.server from writing its own log lines."""


def _quoted(text: str, limit: int) -> str:
    """Make client text fit for a key=value log line: no spaces, quotes or control characters."""
    return _UNSAFE.sub("_", text[:limit]) or "-"


# ================================================================= Command line
# Options, logging, signals, and putting the parts together.


def build_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser made from the fields of Settings, with CC2API_ variables as defaults."""
    parser = argparse.ArgumentParser(
        prog="cc2api",
        description="The Claude Code CLI on this machine as an Anthropic Messages API.",
        epilog="Every option can be given as a variable too: --port 8080 is CC2API_PORT=8080.",
    )
    parser.add_argument("--version", action="version", version=f"cc2api {__version__}")
    for option in dataclasses.fields(Settings):
        flag = "--" + option.name.replace("_", "-")
        variable = "CC2API_" + option.name.upper()
        default = environ.get(variable, option.default)
        text = option.metadata["help"]
        if str(option.type).startswith("bool"):
            if isinstance(default, str):
                default = default.lower() in ("1", "true", "yes", "on")
            action = "store_true" if option.type == "bool" else argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=default, help=text)
            continue
        if option.default not in (None, ""):
            text += " (default: %(default)s)"
        kind = int if option.type == "int" else str
        metavar = option.metadata["metavar"]
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)
    return parser


def parse_args(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings. Wrong options end the process with status 2, as argparse does."""
    parser = build_parser(environ)
    settings = Settings(**vars(parser.parse_args(argv)))
    if not 0 <= settings.port <= 65535:
        parser.error("--port must be between 0 and 65535")
    if settings.spares < 0:
        parser.error("--spares must not be negative")
    return settings


def banner(gateway: Gateway, url: str, sign_in: str) -> str:
    """Return what is printed at the start."""
    try:
        count = len(gateway.keys.load())
        keys = (
            f"{count} in {gateway.keys.path}" if count else "open: anyone who can connect may call"
        )
    except NotAuthenticated as exc:
        keys = f"NOBODY CAN CALL: {exc}"
    auth = " -H 'x-api-key: YOUR-KEY'" if not keys.startswith("open") else ""
    return f"""\
cc2api {__version__} listens on {url}
  claude   {gateway.cli.version} at {gateway.cli.path}
  sign-in  {sign_in}
  keys     {keys}
  try      curl {url}/v1/messages{auth} -d '{{"model": "{DEFAULT_MODEL_NAME}", "max_tokens": 100, \
"messages": [{{"role": "user", "content": "Hello!"}}]}}'"""


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
    environ = dict(os.environ)
    settings = parse_args(argv, environ)
    logging.basicConfig(
        level=logging.DEBUG if settings.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        cli = find_cli(settings.claude, environ)
        server = Server((settings.host, settings.port), Handler)
    except CliUnusable as exc:
        print(f"cc2api: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        where = f"{settings.host} port {settings.port}"
        print(f"cc2api: cannot listen on {where}: {exc.strerror or exc}", file=sys.stderr)
        return 1
    signals = catch_signals()
    gateway = server.gateway = Gateway(settings, cli, environ)
    thread = threading.Thread(
        target=server.serve_forever, args=[ACCEPT_TICK_S], name="cc2api-accept", daemon=True
    )
    thread.start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{server.server_port}"
    print(banner(gateway, url, describe_sign_in(cli, environ)), flush=True)
    signals.recv(1)
    server.shutdown()
    server.server_close()
    gateway.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
