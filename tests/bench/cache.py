"""Measure how much of the input Anthropic's prompt cache would give, straight and by the gateway.

    python tests/bench/cache.py [--json FILE] [--check POINTS]

Nothing is paid for, and nothing leaves this machine: conversations are led through the gateway and
the real CLI against a scripted API on loopback, which keeps the bodies that reach it. These bodies
and those that the same client would have sent straight are then given to a simulated prompt cache
each (PromptCache), which counts the tokens that the real one would have read.

A share is the percentage of all input tokens of a scenario that are read from the cache. Tokens are
estimated at four characters each, so the shares are estimates too. Their differences are what this
is about: nothing here depends on time, so on one version of the CLI they are the same in every run.
One run takes some minutes.

With --check the exit status is 1 if a share lies more than POINTS below the straight one.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import hashlib
import json
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # cc2api.py

from harness import API_KEY, LOGIN, RunningGateway
from scripted_api import Reply, ScriptedApi

JsonObject = dict[str, Any]

MODELS = ("claude-sonnet-4-6", "claude-sonnet-5-5")
SIGN_INS = {"key": API_KEY, "login": LOGIN}
EPHEMERAL: JsonObject = {"type": "ephemeral"}

# The simulated cache. Sources of these figures: see PromptCache.
CHARACTERS_PER_TOKEN = 4
MINIMUM_TOKENS = 1024  # of a prefix that is cached: told for Sonnet 4.6 and 5, taken for 5.5
LOOKBACK_POSITIONS = 20  # that are looked at from a breakpoint on, itself the first
MAX_BREAKPOINTS = 4  # of a request; with a fifth the API refuses it

# The sizes of the conversations, in tokens.
SYSTEM_TOKENS = 3000
TOOLS_TOKENS = 2000  # of all tools together
TOOL_COUNT = 10
SMALLEST_RESULT_TOKENS = 200
LARGEST_RESULT_TOKENS = 2000
TASK_TOKENS = 300  # what the user asks of an agent
REMARK_TOKENS = 60  # what an agent says beside each call
QUESTION_TOKENS = 150  # of a chat
ANSWER_TOKENS = 400  # of a chat

IMAGE_SIDE_PIXELS = 32  # of noise: some 1000 tokens by characters, as many as a screenshot has

LONG_AGENT_STEPS = 20
SHORT_AGENT_STEPS = 12  # where there is more than the loop itself
CHAT_TURNS = 10

ANSWER_MAX_TOKENS = 4096
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
THINKING_S = 0.05  # the scripted API's time to an answer; see ScriptedApi.thinking_s


# ---- the simulated prompt cache


class Block(NamedTuple):
    """One piece of a prompt that a cache entry can end with."""

    layer: str  # "tools", "system" or "messages"
    kind: str  # its type, such as "tool_result"; "" where it has none
    text: str  # canonical JSON of the block and of its message's role: alike where the prompt is
    tokens: float  # estimated
    is_breakpoint: bool


class Usage(NamedTuple):
    """Input tokens, of one request or of many."""

    cached: float  # read from the cache
    total: float

    @property
    def share(self) -> float:
        """The percentage that is read from the cache."""
        return 100 * self.cached / self.total

    @property
    def uncached(self) -> float:
        return self.total - self.cached


class PromptCache:
    """Anthropic's prompt cache, as far as its documentation tells, for ever.

    The rules are those of https://platform.claude.com/docs/en/build-with-claude/prompt-caching:

    - An entry is a prefix of the prompt, which is made of tools, system and messages, in this
      order. It is found again only where all of the prefix is the same, and for the same model.
    - A block with `cache_control` is a breakpoint: it writes one entry, for the prefix that ends
      there. `cache_control` beside `messages` is a breakpoint on the last block.
    - From each breakpoint the cache looks back for an entry, block by block, at 20 positions at
      most; the breakpoint is the first. A run of `tool_use` blocks is one position, and so is a run
      of `tool_result` blocks. The longest prefix that is found is read, all else is not.
    - Prefixes of less than MINIMUM_TOKENS are not cached.
    - Other `tool_choice`, `thinking` or effort: what is cached of the messages does not count.

    Left out, for both sides alike: entries never expire, so that `ttl` makes no difference; they
    can be read as soon as they are written; and images are blocks as any other (the documentation
    says that adding one makes all of the cached messages useless; reports of users deny it).
    """

    def __init__(self) -> None:
        self._entries: set[bytes] = set()  # digests of prefixes

    def send(self, body: JsonObject) -> Usage:
        """Make one request: count what is read from the cache, then write what is marked."""
        blocks = to_prompt(body)
        breakpoints = [index for index, block in enumerate(blocks) if block.is_breakpoint]
        if len(breakpoints) > MAX_BREAKPOINTS:
            raise ValueError(f"the API would refuse a request with {len(breakpoints)} breakpoints")

        digests = self._prefix_digests(body, blocks)
        sizes = self._prefix_tokens(blocks)
        hits = [
            sizes[index]
            for breakpoint_index in breakpoints
            for index in self._looked_at(blocks, breakpoint_index)
            if digests[index] in self._entries
        ]
        for index in breakpoints:
            if sizes[index] >= MINIMUM_TOKENS:
                self._entries.add(digests[index])
        return Usage(cached=max(hits, default=0), total=sizes[-1])

    @staticmethod
    def _prefix_digests(body: JsonObject, blocks: list[Block]) -> list[bytes]:
        """Return for each block what identifies the prefix that ends with it."""
        effort = (body.get("output_config") or {}).get("effort")
        message_parameters = [body.get("tool_choice"), body.get("thinking"), effort]
        running_hash = hashlib.sha256(str(body["model"]).encode())
        digests = []
        layer = ""
        for block in blocks:
            if block.layer != layer and block.layer == "messages":
                running_hash.update(json.dumps(message_parameters, sort_keys=True).encode())
            layer = block.layer
            running_hash.update(f"\n{layer} {block.text}".encode())
            digests.append(running_hash.digest())
        return digests

    @staticmethod
    def _prefix_tokens(blocks: list[Block]) -> list[float]:
        """Return for each block the tokens of the prefix that ends with it."""
        sizes = []
        size = 0.0
        for block in blocks:
            size += block.tokens
            sizes.append(size)
        return sizes

    @staticmethod
    def _looked_at(blocks: list[Block], breakpoint_index: int) -> Iterator[int]:
        """Yield the indices at which a breakpoint looks for an entry, the longest prefix first."""
        positions = 0
        kind_behind = ""
        for index in range(breakpoint_index, -1, -1):
            kind = blocks[index].kind
            is_same_run = kind == kind_behind and kind in ("tool_use", "tool_result")
            if not is_same_run:
                positions += 1
            if positions > LOOKBACK_POSITIONS:
                return
            yield index
            kind_behind = kind


# https://code.claude.com/docs/en/llm-gateway-protocol: where the CLI's attribution is the first
# system block, api.anthropic.com takes it off before anything else, so it is not in the prompt.
ATTRIBUTION_START = "x-anthropic-billing-header:"


def to_prompt(body: JsonObject) -> list[Block]:
    """Return the blocks of a Messages API body, in the order in which the API puts them."""
    blocks = [to_block("tools", "", tool) for tool in body.get("tools") or []]

    system = as_content(body.get("system") or [])
    if system and system[0]["text"].startswith(ATTRIBUTION_START):
        system = system[1:]
    blocks += [to_block("system", "", part) for part in system]

    for message in body["messages"]:
        content = as_content(message["content"])
        blocks += [to_block("messages", message["role"], part) for part in content]

    if body.get("cache_control"):
        blocks[-1] = blocks[-1]._replace(is_breakpoint=True)
    return blocks


def to_block(layer: str, role: str, raw: JsonObject) -> Block:
    """Return a tool, a system block or a message's block as the cache sees it."""
    is_breakpoint = bool(raw.get("cache_control"))
    block = without_marks(raw)
    block_json = canonical_json(block)
    return Block(
        layer=layer,
        kind=str(block.get("type") or ""),
        text=f"{role} {block_json}",
        tokens=len(block_json) / CHARACTERS_PER_TOKEN,
        is_breakpoint=is_breakpoint,
    )


def as_content(content: Any) -> list[JsonObject]:
    """Return content as blocks: to the API a string is short for one text block."""
    return [text_block(content)] if isinstance(content, str) else list(content)


def without_marks(raw: JsonObject) -> JsonObject:
    """Return a block without `cache_control`, a tool result's content as blocks."""
    block = {name: value for name, value in raw.items() if name != "cache_control"}
    if block.get("type") == "tool_result":
        parts = as_content(block.get("content") or [])
        block["content"] = [without_marks(part) for part in parts]
    return block


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def total_usage(bodies: Iterable[JsonObject]) -> Usage:
    """Send bodies to a cache that is empty at first; return the sum of their usage."""
    cache = PromptCache()
    usages = [cache.send(body) for body in bodies]
    return Usage(
        cached=sum(usage.cached for usage in usages), total=sum(usage.total for usage in usages)
    )


# ---- what clients send


@dataclass(frozen=True)
class Request:
    """One request of a scenario, with the answer that it gets."""

    marker: str  # stands in the last user message, so that the scripted API knows the answer
    body: JsonObject  # of the Messages API, marked as the client marks it
    answer: list[JsonObject]  # content blocks
    is_chat_completion: bool = False  # goes through the gateway in OpenAI's form
    is_after_restart: bool = False  # the gateway is started anew before it

    @property
    def straight_body(self) -> JsonObject:
        """What a good client sends to Anthropic without a gateway.

        Where the client sets no breakpoints, it gets the automatic one: the CLI always sets some,
        and the comparison is to be with the best that can be had straight.
        """
        has_own_marks = any(block.is_breakpoint for block in to_prompt(self.body))
        return self.body if has_own_marks else {**self.body, "cache_control": EPHEMERAL}


class Conversation:
    """A client's conversation: fields that stay, and messages that grow.

    The name makes its texts, ids and markers different from those of all other conversations.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        application: str,
        has_tools: bool = False,
        is_marked: bool = False,
        is_chat_completion: bool = False,
    ) -> None:
        """Start one of an application: these share their system prompt and tools."""
        self.name = name
        self.messages: list[JsonObject] = []
        self._model = model
        instructions = prose(SYSTEM_TOKENS, application)
        self._system = text_block(f"You work for {application}. {instructions}")
        self._tools = tools_of(application) if has_tools else []
        self._is_marked = is_marked
        self._is_chat_completion = is_chat_completion
        self._last_marker = ""
        self._asked = 0

    def next_marker(self) -> str:
        """Return a word that no other request has."""
        self._asked += 1
        self._last_marker = f"[{self.name} {self._asked}]"
        return self._last_marker

    def ask(self, content: list[JsonObject], answer: list[JsonObject]) -> Request:
        """Say something, in which the newest marker stands, and be answered."""
        self.messages.append({"role": "user", "content": content})
        return self._request(answer)

    def ask_again(self, answer: list[JsonObject]) -> Request:
        """Have the last message answered anew, with other words."""
        self.messages.pop()
        return self._request(answer)

    def go_back_to(self, turn: int) -> None:
        """Forget all from a turn on; the first one is 0."""
        del self.messages[2 * turn :]

    def _request(self, answer: list[JsonObject]) -> Request:
        body: JsonObject = {
            "model": self._model,
            "max_tokens": ANSWER_MAX_TOKENS,
            "system": [self._system],
            "messages": list(self.messages),
        }
        if self._tools:
            body["tools"] = self._tools
        if self._is_marked:
            body = marked_as_agents_do(body)
        self.messages.append({"role": "assistant", "content": answer})
        return Request(self._last_marker, body, answer, self._is_chat_completion)


def marked_as_agents_do(body: JsonObject) -> JsonObject:
    """Return a body with four breakpoints.

    They are on the last tool, the system prompt, and the last two user messages (where there are
    two), each on its last block.
    """
    messages = list(body["messages"])
    places_of_user = [at for at, message in enumerate(messages) if message["role"] == "user"]
    for at in places_of_user[-2:]:
        messages[at] = {**messages[at], "content": marked_at_end(messages[at]["content"])}
    return {
        **body,
        "tools": marked_at_end(body["tools"]),
        "system": marked_at_end(body["system"]),
        "messages": messages,
    }


def marked_at_end(items: list[JsonObject]) -> list[JsonObject]:
    """Return tools or blocks with a breakpoint on the last."""
    return [*items[:-1], {**items[-1], "cache_control": EPHEMERAL}]


def prose(tokens: int, seed: str) -> str:
    """Return text of about so many tokens, always the same of a seed."""
    dice = random.Random(seed)
    wanted_characters = tokens * CHARACTERS_PER_TOKEN
    said: list[str] = []
    characters = 0
    while characters < wanted_characters:
        said.append(dice.choice(WORDS))
        characters += len(said[-1]) + 1  # and a space
    return " ".join(said)


def text_block(text: str) -> JsonObject:
    return {"type": "text", "text": text}


def tools_of(application: str) -> list[JsonObject]:
    """Return an application's tools, TOOLS_TOKENS together."""
    parameter = {"type": "string", "description": "what to look at"}
    schema = {"type": "object", "properties": {"path": parameter}, "required": ["path"]}
    schema_tokens = len(canonical_json(schema)) // CHARACTERS_PER_TOKEN
    description_tokens = TOOLS_TOKENS // TOOL_COUNT - schema_tokens
    return [
        {
            "name": f"tool_{number}",
            "description": prose(description_tokens, f"{application} tool {number}"),
            "input_schema": schema,
        }
        for number in range(TOOL_COUNT)
    ]


def noise_image(seed: str) -> JsonObject:
    """Return a block with a small PNG, always the same of a seed."""
    dice = random.Random(seed)
    row_bytes = 3 * IMAGE_SIDE_PIXELS  # a byte each for red, green and blue
    rows = b"".join(b"\0" + dice.randbytes(row_bytes) for _ in range(IMAGE_SIDE_PIXELS))
    header = struct.pack(">IIBBBBB", IMAGE_SIDE_PIXELS, IMAGE_SIDE_PIXELS, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    png += png_chunk(b"IHDR", header)
    png += png_chunk(b"IDAT", zlib.compress(rows))
    png += png_chunk(b"IEND", b"")
    data = base64.b64encode(png).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def png_chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def to_chat_body(body: JsonObject) -> JsonObject:
    """Return the OpenAI chat completion that means the same as a Messages API body."""
    messages: list[JsonObject] = [{"role": "system", "content": body["system"][0]["text"]}]
    for message in body["messages"]:
        if message["role"] == "assistant":
            messages.append(to_chat_answer(message["content"]))
            continue
        for block in message["content"]:
            if block["type"] == "tool_result":
                (part,) = block["content"]
                call_id = block["tool_use_id"]
                messages.append({"role": "tool", "tool_call_id": call_id, "content": part["text"]})
            else:
                messages.append({"role": "user", "content": block["text"]})
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            },
        }
        for tool in body["tools"]
    ]
    return {
        "model": body["model"],
        "max_completion_tokens": body["max_tokens"],
        "messages": messages,
        "tools": tools,
    }


def to_chat_answer(blocks: list[JsonObject]) -> JsonObject:
    """Return an answer's blocks as OpenAI's assistant message, which clients send back so."""
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"])},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    message: JsonObject = {"role": "assistant", "content": "".join(texts) or None}
    if calls:
        message["tool_calls"] = calls
    return message


# ---- the scenarios


def agent_loop(
    conversation: Conversation, steps: int, *, with_images: bool = False
) -> Iterator[Request]:
    """Yield an agent's requests: a task, then the results of one call a step."""
    dice = random.Random(conversation.name)
    marker = conversation.next_marker()
    content = [text_block(f"{marker} {prose(TASK_TOKENS, marker)}")]
    for step in range(1, steps + 1):
        remark = text_block(prose(REMARK_TOKENS, f"remark on {marker}"))
        call = {
            "type": "tool_use",
            "id": f"toolu_{conversation.name}_{step}",
            "name": f"tool_{step % TOOL_COUNT}",
            "input": {"path": f"file_{step}.txt"},
        }
        is_last = step == steps
        yield conversation.ask(content, [remark] if is_last else [remark, call])

        marker = conversation.next_marker()
        size = dice.randint(SMALLEST_RESULT_TOKENS, LARGEST_RESULT_TOKENS)
        parts = [text_block(f"{marker} {prose(size, marker)}")]
        if with_images:
            parts.append(noise_image(marker))
        content = [{"type": "tool_result", "tool_use_id": call["id"], "content": parts}]


def chat_turn(conversation: Conversation) -> Request:
    """Return the request of a chat's next question."""
    marker = conversation.next_marker()
    question = text_block(f"{marker} {prose(QUESTION_TOKENS, marker)}")
    answer = text_block(prose(ANSWER_TOKENS, f"answer to {marker}"))
    return conversation.ask([question], [answer])


def agent(model: str) -> Iterator[Request]:
    """An agent with its own marks."""
    conversation = Conversation(
        "agent", model, application="a coder", has_tools=True, is_marked=True
    )
    yield from agent_loop(conversation, LONG_AGENT_STEPS)


def chat(model: str) -> Iterator[Request]:
    """A chat without marks."""
    conversation = Conversation("chat", model, application="a helper")
    for _ in range(CHAT_TURNS):
        yield chat_turn(conversation)


def taken_processes(model: str) -> Iterator[Request]:
    """An agent, after each step of which one of two others has the gateway's only process.

    One of these is another agent of the same application, the other one a chat of another.
    """
    first_agent = Conversation(
        "first", model, application="a coder", has_tools=True, is_marked=True
    )
    other_agent = Conversation(
        "other", model, application="a coder", has_tools=True, is_marked=True
    )
    other_chat = Conversation("chat", model, application="a helper")
    other_steps = agent_loop(other_agent, SHORT_AGENT_STEPS // 2)
    for number, request in enumerate(agent_loop(first_agent, SHORT_AGENT_STEPS)):
        yield request
        yield next(other_steps) if number % 2 == 0 else chat_turn(other_chat)


def restart(model: str) -> Iterator[Request]:
    """An agent with its own marks; the gateway is started anew in the middle of its loop."""
    conversation = Conversation(
        "restart", model, application="a coder", has_tools=True, is_marked=True
    )
    for number, request in enumerate(agent_loop(conversation, SHORT_AGENT_STEPS)):
        is_middle = number == SHORT_AGENT_STEPS // 2
        yield dataclasses.replace(request, is_after_restart=is_middle)


def images(model: str) -> Iterator[Request]:
    """An agent that looks at pictures: those do not fit through the CLI's tool channel."""
    conversation = Conversation(
        "images", model, application="a browser", has_tools=True, is_marked=True
    )
    yield from agent_loop(conversation, LONG_AGENT_STEPS, with_images=True)


def edits(model: str) -> Iterator[Request]:
    """A chat whose user edits a question, has an answer made anew, and branches off twice."""
    conversation = Conversation("edits", model, application="a helper")
    for _ in range(5):
        yield chat_turn(conversation)

    conversation.go_back_to(4)  # the last question is edited
    yield chat_turn(conversation)

    other_answer = text_block(prose(ANSWER_TOKENS, "another answer"))
    yield conversation.ask_again([other_answer])
    yield chat_turn(conversation)

    long_branch = list(conversation.messages)
    conversation.go_back_to(2)  # a branch from the middle
    yield chat_turn(conversation)
    yield chat_turn(conversation)

    conversation.messages = long_branch  # and the first one goes on
    yield chat_turn(conversation)
    yield chat_turn(conversation)


def chat_completions(model: str) -> Iterator[Request]:
    """An agent that speaks OpenAI's chat completions."""
    conversation = Conversation(
        "openai", model, application="a coder", has_tools=True, is_chat_completion=True
    )
    yield from agent_loop(conversation, SHORT_AGENT_STEPS)


@dataclass(frozen=True)
class Scenario:
    name: str
    requests: Callable[[str], Iterator[Request]]  # of a model, in order
    gateway_arguments: tuple[str, ...] = ()


SCENARIOS = [
    Scenario("agent, own marks", agent),
    Scenario("chat", chat),
    Scenario("agent among others", taken_processes, ("--processes", "2", "--max-concurrency", "1")),
    Scenario("agent, restart", restart),
    Scenario("agent, images", images),
    Scenario("chat, edits", edits),
    Scenario("agent, OpenAI", chat_completions),
]


# ---- through the gateway


def upstream_bodies(scenario: Scenario, model: str, sign_in: str) -> list[JsonObject]:
    """Lead a scenario through the gateway; return the body that each request makes upstream."""
    bodies: list[JsonObject] = []
    with (
        ScriptedApi() as api,
        tempfile.TemporaryDirectory(prefix="home-cache-bench-", ignore_cleanup_errors=True) as home,
    ):
        api.thinking_s = THINKING_S
        # Each RunningGateway has a home of its own. The same user starts it anew: one for all.
        environment = {
            **SIGN_INS[sign_in],
            "HOME": home,
            "CLAUDE_CONFIG_DIR": str(Path(home) / "claude-config"),
        }

        def start() -> RunningGateway:
            arguments = scenario.gateway_arguments
            return RunningGateway(*arguments, base_url=api.url, env=environment)

        gateway = start()
        try:
            for request in scenario.requests(model):
                if request.is_after_restart:
                    gateway.stop()
                    gateway = start()
                bodies.append(upstream_body(gateway, api, request))
        finally:
            gateway.stop()
    return bodies


def upstream_body(gateway: RunningGateway, api: ScriptedApi, request: Request) -> JsonObject:
    """Make a request of the gateway, check its answer, and return what reached upstream."""
    is_tool_call = request.answer[-1]["type"] == "tool_use"
    stop_reason = "tool_use" if is_tool_call else "end_turn"
    api.on(request.marker, Reply(blocks=request.answer, stop_reason=stop_reason))
    calls_before = len(api.calls)

    if request.is_chat_completion:
        body = to_chat_body(request.body)
        answer = gateway.request("POST", "/v1/chat/completions", body)
    else:
        answer = gateway.request("POST", "/v1/messages", request.body)
    if answer.status != 200:
        raise RuntimeError(f"{request.marker}: {answer.status} {answer.body!r}")

    # The client sends the scripted answer back, so that has to be what it got.
    if request.is_chat_completion:
        wanted: Any = to_chat_answer(request.answer)
        whole_message = answer.json["choices"][0]["message"]
        found: Any = {name: whole_message.get(name) for name in wanted}
    else:
        wanted = request.answer
        found = answer.json["content"]
    if found != wanted:
        raise RuntimeError(f"{request.marker}: answered {found}, and not {wanted}")

    calls = api.calls[calls_before:]
    if len(calls) != 1 or request.marker not in calls[0].last_user_text():
        raise RuntimeError(f"{request.marker}: {len(calls)} calls reached upstream for it")
    return calls[0].body


# ---- what the CLI adds


class Addition(NamedTuple):
    """Something in an upstream body's messages that the client did not send."""

    place: str  # "in front of", "inside" or "behind"
    message: int  # of the client's, the first one is 0
    message_count: int  # of the client's in this request
    tokens: float

    @property
    def where(self) -> str:
        if self.message == 0:
            return f"{self.place} the first message"
        if self.message == self.message_count - 1:
            return f"{self.place} the last message"
        return f"{self.place} one between"


class Said(NamedTuple):
    """One block of a conversation."""

    message: int  # the number of its message
    role: str
    block: JsonObject  # without marks


def said_in(body: JsonObject) -> list[Said]:
    """Return all blocks of a body's messages."""
    return [
        Said(number, message["role"], without_marks(block))
        for number, message in enumerate(body["messages"])
        for block in as_content(message["content"])
    ]


def additions_to(sent: JsonObject, upstream: JsonObject) -> list[Addition]:
    """Compare the messages that a client sent with those that reached upstream.

    Raises ValueError where something is missing there.
    """
    message_count = len(sent["messages"])
    sent_blocks = said_in(sent)
    additions = []
    matched = 0  # of the client's blocks, from the first on
    for found in said_in(upstream):
        expected = sent_blocks[matched] if matched < len(sent_blocks) else None
        if expected and found.role == expected.role and found.block == expected.block:
            matched += 1
            continue
        size = block_tokens(found.block)
        if expected and is_lengthened(expected.block, found.block):
            matched += 1
            place, message = "inside", expected.message
            size -= block_tokens(expected.block)
        elif expected and found.role == expected.role:
            place, message = "in front of", expected.message
        else:
            place, message = "behind", sent_blocks[matched - 1].message
        additions.append(Addition(place, message, message_count, size))
    if matched < len(sent_blocks):
        missing = canonical_json(sent_blocks[matched])[:200]
        raise ValueError(f"upstream did not get {missing}")
    return additions


def is_lengthened(sent: JsonObject, found: JsonObject) -> bool:
    """Whether a block is one that was sent, with more in it."""
    if sent["type"] != found["type"]:
        return False
    if sent["type"] == "tool_result":
        return bool(sent["tool_use_id"] == found["tool_use_id"])
    return sent["type"] == "text" and sent["text"] in found["text"]


def block_tokens(block: JsonObject) -> float:
    return len(canonical_json(block)) / CHARACTERS_PER_TOKEN


def system_tokens(body: JsonObject) -> float:
    """Return the tokens of a body's system prompt."""
    return sum(block.tokens for block in to_prompt(body) if block.layer == "system")


# ---- the report


def measure(scenario: Scenario, sign_in: str, model: str) -> JsonObject:
    """Return one line of the report: a scenario's figures, shares in percent."""
    requests = list(scenario.requests(model))
    bodies = upstream_bodies(scenario, model, sign_in)
    straight = total_usage(request.straight_body for request in requests)
    through = total_usage(bodies)

    added_tokens = []
    places: collections.Counter[str] = collections.Counter()
    for request, body in zip(requests, bodies, strict=True):
        additions = additions_to(request.body, body)
        added_tokens.append(sum(addition.tokens for addition in additions))
        # one request may have several at one place
        places.update({addition.where for addition in additions})
    added_to_system = system_tokens(bodies[0]) - system_tokens(requests[0].body)

    return {
        "scenario": scenario.name,
        "sign_in": sign_in,
        "model": model,
        "requests": len(requests),
        "input_tokens": straight.total,
        "straight_share": straight.share,
        "gateway_share": through.share,
        "difference": through.share - straight.share,
        "uncached_ratio": through.uncached / straight.uncached,
        "added_to_system": added_to_system,
        "added_to_messages": {"least": min(added_tokens), "most": max(added_tokens)},
        "places": dict(places.most_common()),
    }


def report(rows: list[JsonObject]) -> None:
    """Print the table of shares, and what is added."""
    print(
        f"{'scenario':<20} {'sign-in':<7} {'model':<18} {'tokens':>7}"
        f" {'straight':>8} {'gateway':>8} {'points':>7} {'uncached':>8}"
    )
    for row in rows:
        print(
            f"{row['scenario']:<20} {row['sign_in']:<7} {row['model']:<18}"
            f" {row['input_tokens']:7.0f}"
            f" {row['straight_share']:6.1f} % {row['gateway_share']:6.1f} %"
            # adding 0 makes +0.0 of a difference that is rounded to -0.0
            f" {round(row['difference'], 1) + 0.0:+7.1f} {row['uncached_ratio']:7.2f}x"
        )

    print("\nThe CLI adds to the messages (tokens in a request; where, in how many requests):")
    for row in rows:
        if not row["places"]:
            continue
        added = row["added_to_messages"]
        places = ", ".join(f"{where} {count}x" for where, count in row["places"].items())
        print(
            f"{row['scenario']:<20} {row['sign_in']:<7} {row['model']:<18}"
            f" {added['least']:4.0f} to {added['most']:4.0f}  {places}"
        )
    without = {row["sign_in"] for row in rows} - {row["sign_in"] for row in rows if row["places"]}
    for sign_in in sorted(without):
        print(f"with a {sign_in}: nothing")

    in_system = sorted({round(row["added_to_system"]) for row in rows})
    print(f"and in front of the system prompt: {' or '.join(map(str, in_system))} tokens")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--check", metavar="POINTS", type=float, help="fail where a share is so much below straight"
    )
    args = parser.parse_args()
    rows = []
    for scenario in SCENARIOS:
        for sign_in in SIGN_INS:
            for model in MODELS:
                print(f"{scenario.name}, {sign_in}, {model} ...", file=sys.stderr, flush=True)
                rows.append(measure(scenario, sign_in, model))
    report(rows)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.check is None:
        return 0
    return int(any(row["difference"] < -args.check for row in rows))


if __name__ == "__main__":
    sys.exit(main())
