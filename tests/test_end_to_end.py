"""What a client sends is what upstream sees, and what upstream says is what the client gets.

Everything here runs on the real CLI against the scripted API.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from additions import split_additions, text_of
from harness import API_KEY, LOGIN, Answer, InProcessGateway, RunningGateway, wait_until
from helpers import assistant, marker, text, tool, user
from scripted_api import DEFAULT_TEXT, Call, Reply, ScriptedApi, text_reply

import cc2api

JsonObject = dict[str, Any]
EPHEMERAL = {"type": "ephemeral"}


def striped(length: int) -> bytes:
    return bytes([length % 256, 90, 200]) * (length // 3)


def png(width: int = 8, height: int = 8, row: Callable[[int], bytes] = striped) -> str:
    """Return a valid PNG as base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row(3 * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


PDF = base64.b64encode(b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<<>>\n%%EOF\n").decode()


def blocks_of(message: JsonObject) -> list[JsonObject]:
    content = message["content"]
    return [text(content)] if isinstance(content, str) else content


def seen_messages(call: Call) -> list[JsonObject]:
    """Return the messages that reached upstream, less the CLI's own breakpoint at their end."""
    messages = [m for m in call.body["messages"] if m["role"] != "system"]
    plain = [{"role": m["role"], "content": [dict(b) for b in blocks_of(m)]} for m in messages]
    assert plain[-1]["content"][-1].pop("cache_control")["type"] == "ephemeral"
    return plain


def as_blocks(messages: list[JsonObject]) -> list[JsonObject]:
    return [{"role": m["role"], "content": blocks_of(m)} for m in messages]


def only_call(api: ScriptedApi, word: str) -> Call:
    calls = api.calls_with(word)
    assert len(calls) == 1, f"{len(calls)} upstream calls, not one"
    return calls[0]


def full_request(word: str) -> JsonObject:
    """Return a request that uses everything."""
    history = [
        user(
            text("look at these"),
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": png()},
            },
            {
                "type": "document",
                "title": "paper",
                "context": "read it",
                "citations": {"enabled": True},
                "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
            },
        ),
        assistant(
            {"type": "thinking", "thinking": "let me see", "signature": "c2lnbmF0dXJl"},
            {"type": "redacted_thinking", "data": "cmVkYWN0ZWQ="},
            text("two calls"),
            {"type": "tool_use", "id": "toolu_a", "name": "lookup", "input": {"q": ["é", None]}},
            {"type": "tool_use", "id": "toolu_b", "name": "bash", "input": {"command": "ls"}},
        ),
        user(
            {"type": "tool_result", "tool_use_id": "toolu_a", "content": [text("found")]},
            {"type": "tool_result", "tool_use_id": "toolu_b", "content": "no", "is_error": True},
            text("and?"),
        ),
        assistant("that is all"),
    ]
    return {
        "model": "claude-sonnet-4-5",
        "max_tokens": 4321,
        "system": [text("You are precise."), text("You are brief.", cache_control=EPHEMERAL)],
        "messages": [*history, user(text(f"thanks {word}"))],
        "tools": [
            {"name": "lookup", "description": "x" * 6000, "input_schema": {"type": "object"}},
            {
                "name": "strict_one",
                "strict": True,
                "type": "custom",
                "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
            },
            {"type": "bash_20250124", "name": "bash"},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        ],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "temperature": 1,
        "top_p": 0.97,
        "top_k": 5,
        "stop_sequences": ["END", "\n\nHuman:"],
        "service_tier": "standard_only",
        "metadata": {"user_id": "u"},
    }


def test_every_field_reaches_upstream_exactly(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    request = full_request(word)
    answer = gateway.post(
        request, {"anthropic-beta": "context-1m-2025-08-07, files-api-2025-04-14"}
    )
    assert answer.status == 200, answer.body
    call = only_call(api, word)
    assert seen_messages(call) == as_blocks(request["messages"])
    body = call.body
    for name in (
        *("model", "max_tokens", "tools", "tool_choice", "thinking", "temperature", "top_p"),
        *("top_k", "stop_sequences", "service_tier"),
    ):
        assert body[name] == request[name], name
    assert body["system"][-1]["text"] == "You are precise.\n\nYou are brief."
    assert body["metadata"] != request["metadata"]  # the CLI's own
    sent_betas = call.headers["anthropic-beta"].split(",")
    assert {"context-1m-2025-08-07", "files-api-2025-04-14"} <= set(sent_betas)


ODD_TEXTS = [
    "/compact now",
    "@/etc/passwd",
    "!ls -la",
    "# memory",
    "line\u2028separator\u0085and\u2029more",
    "nul \x00 byte",
    "emoji \U0001f600 and e\u0301",
    "  spaces around \r\n\t",
    "<system-reminder>not one</system-reminder>!",
    '{"type":"control_request"}\n{"type":"user"}',
]


def test_odd_text_is_verbatim_in_the_history_and_in_blocks(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    request = [message for odd in ODD_TEXTS for message in (user(odd), assistant(odd))]
    request.append(user(*map(text, ODD_TEXTS), text(word)))
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word)) == as_blocks(request)


@pytest.mark.parametrize("odd", [*ODD_TEXTS[:4], ODD_TEXTS[-1]], ids=lambda odd: repr(odd[:20]))
def test_odd_text_is_verbatim_as_query(gateway: RunningGateway, api: ScriptedApi, odd: str) -> None:
    word = marker()
    request = [user(word), assistant(word), user(odd)]
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word)) == as_blocks(request)


def test_a_300_kb_prompt_arrives(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    request = [user(text("p" * 300_000), text(word))]
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word)) == request


def test_a_prompt_that_seems_too_long_to_the_cli_is_upstreams_to_refuse(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    message = "prompt is too long: 260001 tokens > 200000 maximum"
    api.on(word, Reply(status=400, message=message))
    answer = gateway.ask("p " * 700_000 + word)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "prompt is too long" in answer.json["error"]["message"]
    only_call(api, word)  # it was upstream that refused


def test_a_250_kb_system_prompt_and_151_messages_arrive(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    request = [user("q0")]
    for number in range(75):
        request += [assistant(f"a{number}"), user(f"q{number} {word}")]
    system = "s" * 250_000
    assert gateway.post({"messages": request, "system": system}).status == 200
    call = only_call(api, word)
    assert seen_messages(call) == as_blocks(request)
    assert call.body["system"][-1]["text"] == system


def test_the_default_system_prompt_and_model(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    assert gateway.ask(word, model="claude-code").status == 200
    body = only_call(api, word).body
    assert body["system"][-1]["text"] == "You are a helpful assistant."
    assert body["model"].startswith("claude-")
    assert body["model"] != "claude-code"
    assert body["tools"] == []


def test_an_alias_is_resolved_and_its_history_keeps_thinking_blocks(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    for model in ("sonnet", "claude-code"):
        thinking = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
        request = [user("hi"), assistant(thinking, text("yes")), user(f"{word} {model}")]
        assert gateway.post({"messages": request, "model": model}).status == 200
        call = only_call(api, f"{word} {model}")
        assert seen_messages(call) == as_blocks(request)
        assert call.body["model"].startswith("claude-")


def test_consecutive_roles_are_merged_and_system_entries_folded(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    tool = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
    request = [
        user("one"),
        user(text("two")),
        assistant("a"),
        assistant(tool),
        {"role": "system", "content": "be kind"},
        user(result, text(word)),
        {"role": "system", "content": [text("be quick")]},
    ]
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word)) == [
        user(text("one"), text("two")),
        assistant(text("a"), tool),
        user(
            result,
            text("<system-reminder>\nbe kind\n</system-reminder>"),
            text(word),
            text("<system-reminder>\nbe quick\n</system-reminder>"),
        ),
    ]


@pytest.mark.parametrize("sign_in", ["gateway", "login_gateway"])
def test_the_clis_own_system_blocks_are_two_and_short(
    request: pytest.FixtureRequest, api: ScriptedApi, sign_in: str
) -> None:
    word = marker()
    assert request.getfixturevalue(sign_in).ask(word, system="be brief").status == 200
    *own, last = only_call(api, word).body["system"]
    assert last["text"] == "be brief"
    assert len(own) == 2
    assert all(len(block["text"]) < 200 for block in own)


def test_numbers_beyond_2_to_the_53_are_rounded(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"n": 2**53 + 1, "m": 2**53 - 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
    request = [user("a"), assistant(use), user(result, text(word))]
    assert gateway.post({"messages": request}).status == 200
    sent = seen_messages(only_call(api, word))[1]["content"][0]["input"]
    assert sent == {"n": 2**53, "m": 2**53 - 1}


def test_the_caller_of_a_tool_use_is_dropped(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
    called = {**use, "caller": {"type": "direct"}, "toolset_name": "browser"}
    request = [user("a"), assistant(called), user(result, text(word))]
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word))[1]["content"] == [use]


SEARCH = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
MCP_USE = {"type": "mcp_tool_use", "id": "m1", "name": "f", "server_name": "s", "input": {"a": 1}}
MCP_RESULT = {"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": False, "content": []}
FALLBACK = {"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}
ADVISED = {
    "type": "advisor_tool_result",
    "tool_use_id": "s1",
    "content": {"type": "advisor_result"},
}
CITED = {"type": "char_location", "cited_text": "x", "document_index": 0, "start_char_index": 0}


@pytest.mark.parametrize(
    "answer",
    [
        [text("A"), text(" "), text("B")],
        [text("\n"), SEARCH, FOUND, text(" \n"), text("B")],
        [text("\u00a0"), text("B")],
        [MCP_USE, MCP_RESULT, text("B")],
        [FALLBACK, text("B")],
        [{"type": "compaction", "content": "c", "encrypted_content": "e"}, text("B")],
    ],
    ids=str,
)
def test_blocks_of_answers_reach_upstream_as_they_were(
    gateway: RunningGateway, api: ScriptedApi, answer: list[JsonObject]
) -> None:
    word = marker()
    headers = {"anthropic-beta": "server-side-fallback-2026-06-01"} if FALLBACK in answer else {}
    body = {"messages": [user("a"), assistant(*answer), user(word)]}
    assert gateway.post(body, headers).status == 200
    assert seen_messages(only_call(api, word))[1]["content"] == answer


def test_citations_of_documents_are_dropped(gateway: RunningGateway, api: ScriptedApi) -> None:
    found = {"type": "web_search_result_location", "cited_text": "x", "url": "u"}
    found |= {"title": "t", "encrypted_index": "e"}
    word = marker()
    answer = assistant(text("A", citations=[CITED]), text("B", citations=[found]))
    assert gateway.post({"messages": [user("a"), answer, user(word)]}).status == 200
    sent = seen_messages(only_call(api, word))[1]["content"]
    assert [block["citations"] for block in sent] == [[], [found]]


@pytest.mark.parametrize("name", ["gateway", "login_gateway"])
def test_a_paused_answer_goes_on(
    request: pytest.FixtureRequest, api: ScriptedApi, name: str
) -> None:
    gateway = request.getfixturevalue(name)
    word = marker()
    asked = [user(word), assistant(text("A"), SEARCH, FOUND, text("B"), {**SEARCH, "id": "s2"})]
    assert gateway.post({"messages": asked}).status == 200
    sent, _ = split_additions(only_call(api, word).body["messages"])
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"] == [text("A"), SEARCH, FOUND, text("B")]
    assert text_of(sent[2]["content"]) == "Continue."


CHANGED: list[tuple[list[JsonObject], list[JsonObject]]] = [
    ([{**SEARCH, "name": "advisor"}, ADVISED, text("B")], []),
    ([MCP_USE, tool("f", {})], [{"type": "text", "text": "r"}]),
    ([SEARCH, tool("f", {})], [{"type": "text", "text": "r"}]),
    ([tool("f", {})], [{"type": "tool_reference", "tool_name": "f"}]),
]


@pytest.mark.parametrize(("answer", "result"), CHANGED, ids=lambda value: str(value)[:60])
def test_what_is_refused_by_name_the_cli_would_change(
    tmp_path: Path,
    quick_claude: str,
    api: ScriptedApi,
    monkeypatch: pytest.MonkeyPatch,
    answer: list[JsonObject],
    result: list[JsonObject],
) -> None:
    """A CLI that no longer does so fails this test: then they need not be refused."""
    word = marker()
    last = text(word)
    results = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": result}]
    messages = [user("a"), assistant(*answer), user(*(results if result else []), last)]
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    with InProcessGateway(tmp_path, claude=quick_claude, base_url=api.url) as gateway:
        body = {"messages": messages, "tools": tools}
        refused = gateway.post(body)
        assert refused.status == 400
        assert "the CLI does not carry this" in refused.json["error"]["message"]
        monkeypatch.setattr(cc2api, "check_block", lambda path, block, is_answer=False: None)
        monkeypatch.setattr(cc2api, "_check_tool_pairs", lambda *arguments: {})
        assert gateway.post(body).status == 200
    sent = seen_messages(only_call(api, word))
    assert sent[1:] != messages[1:]


MEDIA_LIMITS = [
    ("claude-sonnet-4-6", "", 100),
    ("claude-haiku-4-5", "", 100),
    ("claude-opus-of-next-year", "", 100),
    ("claude-sonnet-4-6", "context-1m-2025-08-07", 600),
    ("claude-sonnet-4-6[1m]", "", 600),
    ("claude-opus-4-7", "", 600),
    ("claude-opus-4-8", "", 600),
    ("claude-opus-5", "", 600),
    ("claude-opus-5-5", "", 600),
    ("claude-sonnet-5", "", 600),
    ("claude-fable-5-1", "", 600),
    ("sonnet", "", 600),
    ("haiku", "", 600),
]


@pytest.mark.parametrize(("model", "beta", "most"), MEDIA_LIMITS)
def test_all_images_and_documents_reach_upstream_or_are_refused(
    gateway: RunningGateway, api: ScriptedApi, model: str, beta: str, most: int
) -> None:
    """The CLI would drop the oldest ones, without a word."""
    word = marker()
    document = {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "a"},
    }
    picture = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [picture] * 20}
    messages = [user(*[document] * (most - 21)), assistant(use), user(result, picture, text(word))]
    headers = {"anthropic-beta": beta}
    fields = {"model": model, "max_tokens": 10, "messages": messages}
    assert gateway.post(fields, headers).status == 200
    sent = json.dumps(only_call(api, word).body)
    assert sent.count('"type": "document"') == most - 21
    assert sent.count('"type": "image"') == 21

    messages[0]["content"].append(document)
    refused = gateway.post(fields, headers)
    assert refused.status == 400
    assert f"{most + 1} images and documents" in refused.json["error"]["message"]
    counted = gateway.request("POST", "/v1/messages/count_tokens", fields, headers)
    assert counted.json["error"] == refused.json["error"]
    only_call(api, word)


def test_a_text_that_javascript_takes_for_blank_is_kept_in_a_tool_result(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("\ufeff")]}
    request = [user("a"), assistant(use), user(result, text(word))]
    assert gateway.post({"messages": request}).status == 200
    assert seen_messages(only_call(api, word))[2]["content"][0] == result


def test_the_cli_re_encodes_large_images_and_scales_wide_ones_down(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    noise = png(600, 400, random.Random(1).randbytes)
    assert len(noise) > 700_000
    sources = [{"type": "base64", "media_type": "image/png", "data": d} for d in (png(), noise)]
    wide = {"type": "base64", "media_type": "image/png", "data": png(2400, 30)}
    images = [{"type": "image", "source": source} for source in (*sources, wide)]
    assert gateway.post({"messages": [user(*images, text(word))]}).status == 200
    sent = seen_messages(only_call(api, word))[0]["content"]
    small, large, scaled = (block["source"] for block in sent[:3])
    assert small == sources[0]
    assert large["media_type"] == "image/jpeg"
    assert struct.unpack(">II", base64.b64decode(scaled["data"])[16:24]) == (2000, 25)
    assert "original 2400x30, displayed at 2000x25" in sent[-1]["text"]


THINKING = [
    (None, "claude-sonnet-4-6", None),
    ({"type": "disabled"}, "claude-sonnet-4-6", {"type": "disabled"}),
    ({"type": "adaptive"}, "claude-sonnet-4-6", {"type": "adaptive"}),
    (
        {"type": "adaptive", "display": "omitted"},
        "claude-sonnet-4-6",
        {"type": "adaptive", "display": "omitted"},
    ),
    (
        {"type": "enabled", "budget_tokens": 1500, "display": "summarized"},
        "claude-sonnet-4-5",
        {"type": "enabled", "budget_tokens": 1500, "display": "summarized"},
    ),
    (None, "claude-opus-5-5", None),
    (None, "claude-sonnet-5", None),  # which thinks by default on the API
    ({"type": "disabled"}, "claude-sonnet-5", {"type": "disabled"}),
]


@pytest.mark.parametrize(("asked", "model", "sent"), THINKING)
def test_thinking_goes_upstream_as_asked(
    gateway: RunningGateway, api: ScriptedApi, asked: Any, model: str, sent: Any
) -> None:
    word = marker()
    assert gateway.ask(word, thinking=asked, model=model, max_tokens=3000).status == 200
    body = only_call(api, word).body
    assert body.get("thinking") == sent
    assert "context_management" not in body  # upstream refuses it beside thinking that is off
    assert "temperature" not in body or sent in (None, {"type": "disabled"})


def test_top_p_alone_goes_without_a_temperature(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    assert gateway.ask(word, top_p=0.5).status == 200
    body = only_call(api, word).body
    assert body["top_p"] == 0.5
    assert "temperature" not in body
    assert body["thinking"] == {"type": "disabled"}


@pytest.mark.parametrize("effort", ["low", "max"])
def test_effort_of_both_forms_reaches_upstream(
    gateway: RunningGateway, api: ScriptedApi, effort: str
) -> None:
    old, new = marker(), marker()
    assert gateway.ask(old, effort=effort).status == 200
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert gateway.ask(new, output_config={"effort": effort, "format": schema}).status == 200
    assert only_call(api, old).body["output_config"] == {"effort": effort}
    assert only_call(api, new).body["output_config"] == {"effort": effort, "format": schema}


EFFORTS = {
    "claude-opus-4-7": "xhigh",
    "claude-sonnet-5-5": "medium",
    "claude-opus-5-5": "medium",
    "claude-sonnet-4-6": "high",
    "claude-sonnet-5": "high",
    "claude-fable-5-1": "high",
    "claude-of-next-year": "high",
    "claude-sonnet-4-5": None,
    "claude-haiku-4-5": None,
    "claude-opus-4-1": None,
}


@pytest.mark.parametrize("model", EFFORTS)
def test_without_an_effort_the_clis_default_goes_upstream(
    gateway: RunningGateway, api: ScriptedApi, model: str
) -> None:
    word = marker()
    assert gateway.ask(word, model=model).status == 200
    body = only_call(api, word).body
    assert body["model"] == model
    assert body.get("output_config", {}).get("effort") == EFFORTS[model]


def test_the_older_output_format_and_passed_fields(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    fields = {"container": "c1", "inference_geo": "us", "mcp_servers": [], "max_tokens": 0}
    assert gateway.ask(word, output_format=schema, **fields).status == 200
    body = only_call(api, word).body
    assert body["output_config"]["format"] == schema
    assert {name: body[name] for name in fields} == fields


# ---- cache breakpoints


def marks(node: Any) -> list[Any]:
    if isinstance(node, dict):
        own = [node["cache_control"]] if node.get("cache_control") else []
        return own + [m for value in node.values() for m in marks(value)]
    return [m for item in node for m in marks(item)] if isinstance(node, list) else []


def test_at_most_four_breakpoints_go_upstream_and_the_latest_is_kept(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    mark = {"cache_control": EPHEMERAL}
    request = [
        user(text("a", **mark)),
        assistant(text("b", **mark)),
        user(text(word, **mark), text("d", **mark)),
    ]
    tools = [{"name": "f", "input_schema": {"type": "object"}, **mark}]
    system = [text("s", **mark)]
    assert gateway.post({"messages": request, "tools": tools, "system": system}).status == 200
    body = only_call(api, word).body
    assert marks(body["messages"]) == [EPHEMERAL, EPHEMERAL]
    assert body["messages"][2]["content"] == [text(word, **mark), text("d", **mark)]
    assert len(marks(body)) == 4


def test_a_one_hour_breakpoint_makes_all_of_them_last_an_hour(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    hour = {"type": "ephemeral", "ttl": "1h"}
    request = [user(text("a", cache_control=hour)), assistant("b"), user(word)]
    assert gateway.post({"messages": request}).status == 200
    assert marks(only_call(api, word).body) == [hour] * 4


@pytest.mark.parametrize("model", ["claude-sonnet-4-6", "claude-sonnet-5-5"])
def test_with_a_login_the_additions_stand_with_the_first_message_alone(
    login_gateway: RunningGateway, api: ScriptedApi, model: str
) -> None:
    """By whatever process a conversation is served, and whatever message is asked."""
    word = marker()
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    call = {"type": "tool_use", "id": f"toolu_{word}", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [text("found")]}
    messages = [user(text(f"first {word}")), assistant(text("b"), call), user(result)]
    seen = []
    for last in (text("and"), text("or")):  # a replay, then another branch of it
        asked = [*messages[:-1], user(result, last)]
        answer = login_gateway.post({"model": model, "messages": asked, "tools": tools})
        assert answer.status == 200
        body = api.calls_with(word)[-1].body
        sent, added = split_additions(less_marks(body["messages"]))
        assert sent == asked
        assert all(part in "".join(added) for part in ("# Environment", "date is", model))
        seen.append(added)
        assert len(marks(body)) <= 4
        assert {mark.get("ttl") for mark in marks(body)} == {"1h"}
    assert seen[0] == seen[1]


@pytest.mark.parametrize("model", ["claude-sonnet-4-6", "claude-sonnet-5-5"])
def test_a_conversation_that_begins_with_a_result_has_the_additions_there(
    login_gateway: RunningGateway, api: ScriptedApi, model: str
) -> None:
    word = marker()
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    call = {"type": "tool_use", "id": f"toolu_{word}", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [text("found")]}
    messages = [assistant(call), user(result), assistant(text("yes")), user(text(word))]
    answer = login_gateway.post({"model": model, "messages": messages, "tools": tools})
    assert answer.status == 200
    sent = less_marks(only_call(api, word).body["messages"])
    assert json.dumps(sent).count("# Environment") == 1
    assert sent[-2:] == messages[-2:]
    assert "# Environment" in json.dumps(sent[1:3])


def less_marks(node: Any) -> Any:
    """Return JSON without its cache breakpoints."""
    if isinstance(node, list):
        return [less_marks(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {name: less_marks(value) for name, value in node.items() if name != "cache_control"}


def test_with_a_login_nothing_of_the_machine_shows_but_a_neutral_directory(
    login_gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    assert login_gateway.ask(word).status == 200
    call = only_call(api, word)
    assert call.headers["authorization"] == "Bearer " + LOGIN["CLAUDE_CODE_OAUTH_TOKEN"]
    seen = json.dumps(call.body["messages"])
    assert "cc2api" not in seen
    assert str(login_gateway.dir) not in seen
    assert call.body["messages"][-1]["content"][-1]["text"] == word


# ---- answers


def rich_reply(stop_reason: str = "end_turn", **more: Any) -> Reply:
    blocks = [
        {"type": "thinking", "thinking": "let me think", "signature": "c2lnbmF0dXJl"},
        text("I will look \u2028 \U0001f600 twice."),
        {"type": "tool_use", "id": "toolu_1", "name": "lookup", "input": {"city": "Zürich"}},
        {"type": "tool_use", "id": "toolu_2", "name": "lookup", "input": {}},
    ]
    return Reply(blocks=blocks, stop_reason=stop_reason, **more)


def test_a_streamed_answer_is_upstreams_events_to_the_letter(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    reply = rich_reply("tool_use")
    api.on(word, reply)
    answer = gateway.ask(word, stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["transfer-encoding"] == "chunked"
    expected = list(reply.events("claude-sonnet-4-6"))
    events = answer.events
    expected[0]["message"]["id"] = events[0]["message"]["id"]
    assert events == expected
    only_call(api, word)


def test_a_whole_answer_holds_every_block_and_upstreams_usage(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    reply = rich_reply("tool_use")
    api.on(word, reply)
    message = gateway.ask(word).json
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-6",
        "content": reply.blocks,
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "stop_details": None,
        "usage": {
            "input_tokens": 11,
            "cache_creation_input_tokens": 3,
            "cache_read_input_tokens": 5,
            "output_tokens": 42,
        },
    }


THINKING_S = 0.05  # no model answers at once: meanwhile the CLI is held back from a second call
STOPS = [
    ("end_turn", None, None),
    ("stop_sequence", "END", None),
    ("max_tokens", None, None),
    ("model_context_window_exceeded", None, None),
    ("pause_turn", None, None),
    ("refusal", None, {"type": "refusal", "category": "cyber", "explanation": "no"}),
]


@pytest.mark.parametrize(("stop_reason", "sequence", "details"), STOPS)
def test_one_upstream_call_whatever_the_stop_reason(
    lone_gateway: RunningGateway,
    api: ScriptedApi,
    stop_reason: str,
    sequence: str | None,
    details: JsonObject | None,
) -> None:
    word = marker()
    stream = stop_reason in ("end_turn", "max_tokens", "refusal")
    api.on(
        word,
        text_reply(
            "x y",
            stop_reason=stop_reason,
            stop_sequence=sequence,
            stop_details=details,
            delay_s=THINKING_S,
        ),
    )
    answer = lone_gateway.ask(word, stream=stream)
    end = answer.events[-2]["delta"] if stream else answer.json
    assert (end["stop_reason"], end["stop_sequence"]) == (stop_reason, sequence)
    assert end["stop_details"] == details
    wait_until(lambda: is_calm(lone_gateway), "every answering child's end")
    only_call(api, word)


@pytest.mark.parametrize("stop_reason", ["end_turn", "tool_use"])
def test_an_answer_that_says_nothing_is_not_asked_for_again(
    lone_gateway: RunningGateway, api: ScriptedApi, stop_reason: str
) -> None:
    word = marker()
    api.on(word, Reply(blocks=[], stop_reason=stop_reason, delay_s=THINKING_S))
    assert lone_gateway.ask(word).json["content"] == []
    wait_until(lambda: is_calm(lone_gateway), "every answering child's end")
    only_call(api, word)


def is_calm(gateway: RunningGateway) -> bool:
    """Say whether only the spare is left: then no child can make a late second call."""
    return len(gateway.children()) <= 1


def test_tokens_come_as_they_are_made(gateway: RunningGateway, api: ScriptedApi) -> None:
    import threading

    word = marker()
    gate = threading.Event()
    api.on(word, text_reply("first second third", gate=gate, gate_after=3))
    connection = gateway.connect()
    body = json.dumps({"model": "m", "max_tokens": 9, "stream": True, "messages": [user(word)]})
    connection.request("POST", "/v1/messages", body)
    response = connection.getresponse()
    seen = b""
    while b"first" not in seen:
        seen += response.read1()
    assert b"second" not in seen, "the first token is here before the second is made"
    gate.set()
    seen += response.read()
    assert b"message_stop" in seen
    connection.close()


def test_a_connection_is_kept_and_its_answers_end_at_message_stop(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    connection = gateway.connect()
    for stream in (True, False, True):
        body = {"messages": [user(marker())], "stream": stream}
        answer = gateway.post(body, connection=connection)
        assert answer.status == 200
        assert answer.headers["connection"] == "keep-alive"
    connection.close()


# ---- errors


ERRORS = [
    (400, "invalid_request_error"),
    (401, "authentication_error"),
    (403, "permission_error"),
    (413, "request_too_large"),
    (429, "rate_limit_error"),
    (500, "api_error"),
    (529, "overloaded_error"),
    (418, "invalid_request_error"),
    (503, "api_error"),
]


@pytest.mark.parametrize(("status", "kind"), ERRORS)
def test_upstreams_error_keeps_its_status_type_and_message(
    gateway: RunningGateway, api: ScriptedApi, status: int, kind: str
) -> None:
    word = marker()
    stream = bool(status % 2)
    api.on(word, Reply(status=status, message=f"upstream: says {status}. Really"))
    answer = gateway.ask(word, stream=stream)
    assert answer.status == status
    error = answer.json["error"]
    assert answer.json["type"] == "error"
    assert error["type"] == kind
    if status != 413:  # there the CLI has words of its own
        assert error["message"] == f"upstream: says {status}. Really"
    assert answer.json["request_id"] == answer.headers["request-id"]
    only_call(api, word)  # the client decides about retries


@pytest.mark.parametrize("stream", [False, True])
def test_the_400_about_extra_usage_is_passed_on_and_nothing_is_rewritten(
    login_gateway: RunningGateway, api: ScriptedApi, stream: bool
) -> None:
    word = marker()
    message = "Third-party apps now draw from your extra usage, not your plan limits."
    api.on(word, Reply(status=400, message=message))
    tools = [{"name": "mcp_search", "input_schema": {"type": "object"}}]
    system = "You are an agent of another make."
    answer = login_gateway.ask(word, system=system, tools=tools, stream=stream)
    assert answer.status == 400
    assert answer.json["error"] == {"type": "invalid_request_error", "message": message}
    call = only_call(api, word)  # nor is it asked again in other words
    assert call.body["system"][-1]["text"] == system
    assert call.body["tools"] == tools


def test_a_400_is_one_call_with_the_newest_models_too(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    for model in ("claude-opus-5-5", "claude-sonnet-4-6"):  # in one process, as it happens
        word = marker()
        api.on(word, Reply(status=400, message="no good"))
        assert gateway.ask(word, model=model).status == 400
        only_call(api, word)  # the CLI would ask again without a beta of its own


def test_an_unknown_model_is_404_as_the_api_says_it(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    api.on(word, Reply(status=404, message="model: claude-nope"))
    answer = gateway.ask(word, model="claude-nope")
    assert answer.status == 404
    assert answer.json["error"] == {"type": "not_found_error", "message": "model: claude-nope"}


def test_an_error_in_mid_stream_is_an_event_and_the_end(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    error = {"type": "overloaded_error", "message": "Overloaded"}
    api.on(word, text_reply("a b c", error=error, error_after=4))
    streamed = gateway.ask(word, stream=True)
    assert streamed.status == 200
    last = streamed.events[-1]
    assert last["error"] == error
    assert [e["type"] for e in streamed.events].count("error") == 1
    assert "message_stop" not in [e["type"] for e in streamed.events]
    whole = gateway.ask(word)
    assert (whole.status, whole.json["error"]["type"]) == (529, "overloaded_error")


def test_a_stream_that_breaks_between_blocks_is_an_error_and_one_call(
    lone_gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    error = {"type": "api_error", "message": "boom"}
    api.on(word, text_reply("a b", error=error, error_after=5, delay_s=THINKING_S))
    streamed = lone_gateway.ask(word, stream=True)
    assert [e["type"] for e in streamed.events][-2:] == ["content_block_stop", "error"]
    wait_until(lambda: is_calm(lone_gateway), "every answering child's end")
    only_call(api, word)


def test_a_connection_lost_in_mid_stream_is_one_call_and_an_error(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    api.on(word, text_reply("a b c d", cut_after=4))
    answer = gateway.ask(word)
    assert answer.status == 502
    assert answer.json["error"]["type"] == "api_error"
    only_call(api, word)


BAD_INPUT: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b'{"a": "\xff"}', "not valid JSON"),
    (b'{"model": NaN}', "not valid JSON"),
    (b"[" * 100_000, "recursion depth"),
    (b'{"a":' * 200 + b"1" + b"}" * 200, "nested deeper"),
    (b"[]", "object"),
    (b"{}", "max_tokens: Field required"),
]


@pytest.mark.parametrize(("body", "words"), BAD_INPUT, ids=lambda value: repr(value)[:30])
def test_bad_input_is_400_and_reaches_no_process(
    gateway: RunningGateway, api: ScriptedApi, body: bytes, words: str
) -> None:
    before = len(api.calls)
    answer = gateway.request("POST", "/v1/messages", body)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert words in answer.json["error"]["message"]
    assert len(api.calls) == before


def test_a_thread_is_refused_so_that_the_sdk_sends_the_whole_history(
    gateway: RunningGateway,
) -> None:
    answer = gateway.ask("hi", thread={"type": "create"})
    assert answer.status == 400
    assert answer.json["error"]["details"] == {"error_code": "thread_unsupported_request"}


def test_a_field_or_block_of_next_year_goes_upstream_whose_refusal_comes_back(
    gateway: RunningGateway, api: ScriptedApi
) -> None:
    word = marker()
    message = "a_new_field: Extra inputs are not permitted"
    api.on(word, Reply(status=400, message=message))
    block = {"type": "hologram", "source": {"type": "crystal"}}
    tools = [{"type": "hologram_toolset_20300101"}]
    request = [user(block, text(word))]
    answer = gateway.post({"messages": request, "tools": tools, "a_new_field": {"b": 1}})
    assert (answer.status, answer.json["error"]["message"]) == (400, message)
    call = only_call(api, word)
    assert (call.body["a_new_field"], call.body["tools"]) == ({"b": 1}, tools)
    assert seen_messages(call) == request


# ---- chat completions, in its basic form


def test_chat_completions_answers_text(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    body = {
        "model": "claude-code",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": word}]},
        ],
    }
    answer = gateway.request("POST", "/v1/chat/completions", body)
    completion = answer.json
    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"] == DEFAULT_TEXT
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["prompt_tokens"] == 19
    assert completion["usage"]["completion_tokens"] == 42
    assert only_call(api, word).body["system"][-1]["text"] == "be brief"


def test_a_chat_completions_mistake_has_openais_envelope(gateway: RunningGateway) -> None:
    answer = gateway.request("POST", "/v1/chat/completions", {"model": "m"})
    assert answer.status == 400
    assert set(answer.json) == {"error"}


# ---- keys


def test_keys_are_read_on_every_request(start_fake: Any) -> None:
    gateway = start_fake("--processes", "0")
    keys = gateway.dir / "apikeys.txt"

    def status(**headers: str) -> int:
        answer: Answer = gateway.request("POST", "/v1/messages", {}, headers)
        return answer.status

    assert status() == 400, "open: the request itself is at fault"
    keys.write_text("# comment only\n\n")
    assert status() == 400
    keys.write_text("# mine\nsk-mykey-abc123\n\n  sk-other \n")
    assert status() == 401
    assert status(**{"x-api-key": "sk-mykey-abc12"}) == 401
    assert status(**{"x-api-key": "sk-mykey-abc123"}) == 400
    assert status(Authorization="Bearer sk-other") == 400
    assert status(Authorization="bearer  sk-other") == 400
    assert status(Authorization="Basic sk-other") == 401
    answer = gateway.request("POST", "/v1/messages", {"secret": 1})
    assert answer.json["error"]["type"] == "authentication_error"
    keys.write_bytes(b"\xff\xfe broken")
    assert status(Authorization="Bearer sk-other") == 401
    keys.unlink()
    keys.mkdir()
    assert status() == 401
    log = "\n".join(gateway.log)
    assert "sk-mykey-abc123" not in log
    assert "caller=…c123" in log


def test_the_gateway_passes_no_key_of_its_callers_on(start: Any, api: ScriptedApi) -> None:
    gateway = start()
    (gateway.dir / "apikeys.txt").write_text("sk-callers-own\n")
    word = marker()
    messages = [user(word)]
    answer = gateway.post({"messages": messages}, {"x-api-key": "sk-callers-own"})
    assert answer.status == 200
    call = only_call(api, word)
    assert call.headers["x-api-key"] == API_KEY["ANTHROPIC_API_KEY"]
    assert "sk-callers-own" not in json.dumps([call.headers, call.body])


def test_every_answer_has_a_request_id_and_is_json(gateway: RunningGateway) -> None:
    seen: list[Answer] = [
        gateway.request("GET", "/api/hello"),
        gateway.request("GET", "/nope"),
        gateway.request("GET", "/v1/messages"),
        gateway.request("DELETE", "/"),
        gateway.request("BREW", "/"),
        gateway.request("HEAD", "/api/hello"),
        gateway.request("HEAD", "/nope"),
    ]
    assert [a.status for a in seen] == [200, 404, 405, 405, 405, 200, 404]
    assert all(a.headers["content-type"] == "application/json" for a in seen)
    assert all(a.headers["request-id"].startswith("req_") for a in seen)
    assert all(a.headers["x-request-id"] == a.headers["request-id"] for a in seen)
    assert len({a.headers["request-id"] for a in seen}) == len(seen)
    assert [a.headers["allow"] for a in seen[2:4]] == ["POST, OPTIONS", "GET, OPTIONS"]
    assert all(a.json for a in seen[:5])
    assert not any(a.body for a in seen[5:])


def test_a_body_over_32_mb_is_413(gateway: RunningGateway) -> None:
    answer = gateway.request("POST", "/v1/messages", b" " * (32 * 1024 * 1024 + 1))
    assert answer.status == 413
    assert answer.json["error"]["type"] == "request_too_large"


def test_debug_prints_requests_and_responses_whole(start: Any, api: ScriptedApi) -> None:
    gateway = start("--debug")
    word = marker()
    api.on(word, text_reply(f"answer-to-{word}"))
    gateway.ask(word, stream=True)
    gateway.ask(word)
    gateway.wait_for_log("status=200", count=2)
    log = "\n".join(gateway.log)
    body = json.dumps({"messages": [user(word)]})[1:-1]
    assert json.dumps(body)[1:-1] in log, "as a string, so that a body can forge no log line"
    assert log.count(f"answer-to-{word}") >= 2
    gateway.request("POST", "/v1/messages", b'{"a": 1,\nlevel=error event=forged}')
    assert not [line for line in gateway.log if line.startswith("level=error")]


def test_without_debug_no_prompt_is_logged(gateway: RunningGateway, api: ScriptedApi) -> None:
    word = marker()
    answer = gateway.ask(word)
    gateway.wait_for_log(answer.headers["request-id"])
    assert word not in "\n".join(gateway.log)
