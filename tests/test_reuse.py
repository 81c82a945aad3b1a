"""Any conversation in any process: upstream is sent the same as by a process of its own."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import API_KEY, LOGIN, InProcessGateway, RunningGateway, wait_until
from helpers import marker
from scripted_api import Call, Reply, ScriptedApi, text_reply

import cc2api

PROXY = Path(__file__).parent / "control_proxy.py"
THINKING_S = 0.1  # no model is quicker: meanwhile the CLI is held back from a second call
JsonObject = dict[str, Any]
TOOLS: list[JsonObject] = [
    {"name": "look", "description": "d", "input_schema": {"type": "object"}, "strict": True},
    {"type": "bash_20250124", "name": "bash"},
]


def calls_for(api: ScriptedApi, word: str) -> list[Call]:
    """Return the calls that were made for the turn whose last message holds a word."""
    return [call for call in api.calls if word in call.last_user_text()]


def said(call: Call) -> JsonObject:
    """Return a request as the model is told it: free of cache marks, all content as blocks."""
    left_out = ("metadata", "cache_control")

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if not isinstance(node, dict):
            return node
        kept = {k: plain(v) for k, v in node.items() if k not in left_out}
        if isinstance(kept.get("content"), str):
            kept["content"] = [{"type": "text", "text": kept["content"]}]
        return {k: v for k, v in kept.items() if (k, v) != ("is_error", False)}

    return {**plain(call.body), "betas": call.headers.get("anthropic-beta")}


def tool_use(name: str = "look", **given: Any) -> JsonObject:
    return {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": name, "input": given}


def tool_result(block: JsonObject, content: Any, **more: Any) -> JsonObject:
    return {"type": "tool_result", "tool_use_id": block["id"], "content": content, **more}


class Talk:
    """A client's side of one conversation."""

    def __init__(self, gateway: Any, api: ScriptedApi, **fields: Any) -> None:
        self.gateway, self.api, self.fields = gateway, api, fields
        self.messages: list[JsonObject] = []

    def say(self, content: Any, reply: Reply | None = None, **fields: Any) -> JsonObject:
        """Say something that holds a marker, and return the body that went upstream for it."""
        word = marker()
        if isinstance(content, str):
            content = f"{content} {word}"
        else:
            content = copy.deepcopy(content)
            content[-1]["content"] += f" {word}"
        self.api.on(word, reply or text_reply(f"reply to {word}"))
        self.messages.append({"role": "user", "content": content})
        answer = self.gateway.post({"messages": self.messages, **self.fields, **fields})
        assert answer.status == 200, answer.json
        self.messages.append({"role": "assistant", "content": answer.json["content"]})
        (call,) = calls_for(self.api, word)
        return said(call)

    def replayed(self) -> list[JsonObject]:
        """Return all messages but the last, as they should have gone upstream."""
        call = Call("", {}, {"messages": self.messages[:-1]})
        return list(said(call)["messages"])


def process_of(call: Call) -> str:
    """Return what tells which process made a call."""
    return str(json.loads(call.body["metadata"]["user_id"])["session_id"])


def processes_of(api: ScriptedApi, *words: str) -> list[str]:
    """Return the processes that served the turns whose last messages hold these words."""
    return [process_of(call) for word in words for call in calls_for(api, word)]


@pytest.fixture(scope="module")
def alone(api: ScriptedApi, claude: str) -> Iterator[RunningGateway]:
    """A gateway that serves one caller by one process."""
    with RunningGateway("--max-concurrency", "1", claude=claude, base_url=api.url) as gateway:
        wait_until(lambda: len(gateway.children()) == 1)
        yield gateway


def ask(gateway: Any, api: ScriptedApi, reply: Reply | None = None, **fields: Any) -> Call:
    """Ask one question with a marker; return the one call that went upstream for it."""
    word = marker()
    api.on(word, reply or text_reply(f"reply to {word}"))
    gateway.ask(word, **fields)
    (call,) = calls_for(api, word)
    return call


def test_ten_turns_and_ten_tool_steps_in_one_process(
    alone: RunningGateway, api: ScriptedApi
) -> None:
    talk = Talk(alone, api, tools=TOOLS)
    before = len(api.calls)
    talk.say("hello")
    for turn in range(10):
        assert talk.say(f"turn {turn}")["messages"] == talk.replayed()
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    for number in range(10):
        calls = [tool_use(n=number), tool_use("bash", command="ls")]
        text = {"type": "text", "text": "now"}
        reply = Reply(blocks=[text, *calls], stop_reason="tool_use")
        body = talk.say([tool_result(step, f"result {number}")], reply)
        assert body["messages"] == talk.replayed()
        assert body["tools"] == TOOLS
        reply = Reply(blocks=[step := tool_use(n=number)], stop_reason="tool_use")
        error = tool_result(calls[1], "no such file", is_error=True)
        body = talk.say([tool_result(calls[0], [{"type": "text", "text": "r"}]), error], reply)
        assert body["messages"] == talk.replayed()
    assert len({process_of(call) for call in api.calls[before:]}) == 1


UNRELATED: list[JsonObject] = [
    {"system": "Be brief.", "tools": TOOLS},
    {"model": "claude-opus-4-6", "temperature": 0.5},
    {"system": "Be long.", "thinking": {"type": "enabled", "budget_tokens": 2000}},
    {"tools": TOOLS[:1], "max_tokens": 5000, "stop_sequences": ["X"]},
    {"model": "sonnet", "output_config": {"effort": "low"}},
    {"model": "claude-code", "system": "Be brief."},
    {"model": "claude-sonnet-4-5[1m]"},
    {},
]


def test_unrelated_conversations_in_one_process_are_sent_as_by_processes_of_their_own(
    alone: RunningGateway, lone_gateway: RunningGateway, api: ScriptedApi
) -> None:
    before = len(api.calls)
    kept = [ask(alone, api, **{"max_tokens": 4000, **fields}) for fields in UNRELATED]
    assert len({process_of(call) for call in api.calls[before:]}) == 1
    fresh = [ask(lone_gateway, api, **{"max_tokens": 4000, **fields}) for fields in UNRELATED]
    for one, other in zip(kept, fresh, strict=True):
        assert one.body["messages"][0]["content"][0]["text"] in one.last_user_text()
        assert less_words(said(one)) == less_words(said(other))


def less_words(body: JsonObject) -> JsonObject:
    """Return a body whose messages are left out, and what depends on the first one's words."""
    return {**body, "messages": len(body["messages"]), "system": body["system"][1:]}


def test_an_edit_a_regenerated_answer_and_a_branch_keep_what_is_before_them(
    alone: RunningGateway, api: ScriptedApi
) -> None:
    talk = Talk(alone, api)
    for text in ("one", "two", "three"):
        talk.say(text)
    before = len(api.calls)
    whole = copy.deepcopy(talk.messages)
    del talk.messages[-2:]  # the last question again, in other words
    assert talk.say("three, edited")["messages"] == talk.replayed()
    talk.messages[:] = [*whole[:3], {"role": "assistant", "content": "never said"}]
    assert talk.say("after an edited answer")["messages"] == talk.replayed()
    talk.messages[:] = [{"role": "user", "content": "another start"}, *whole[1:]]
    assert talk.say("after an edited beginning")["messages"] == talk.replayed()
    talk.messages[:] = whole[:-2]
    word = whole[4]["content"].split()[-1]  # the very same question
    answer = alone.post({"messages": whole[:-1]})
    assert answer.json["content"] == whole[-1]["content"]
    assert said(calls_for(api, word)[-1])["messages"] == said(calls_for(api, word)[0])["messages"]
    assert len({process_of(call) for call in api.calls[before:]}) == 1


@pytest.mark.parametrize(
    ("is_kept", "stream"), [(True, False), (False, True)], ids=["kept", "fresh, streamed"]
)
def test_after_any_end_of_an_answer_its_process_serves_the_next_request(
    alone: RunningGateway, api: ScriptedApi, stream: bool, is_kept: bool
) -> None:
    ends = {
        "max_tokens": text_reply("half an", stop_reason="max_tokens"),
        "refusal": text_reply("I", stop_reason="refusal", stop_details={"type": "refusal"}),
        "empty": Reply(blocks=[]),
        "no calls": Reply(blocks=[], stop_reason="tool_use"),
        "context": text_reply("h", stop_reason="model_context_window_exceeded"),
        "400": Reply(status=400, message="no good"),
        "529": Reply(status=529, message="Overloaded"),
        "broken": text_reply("a b", error={"type": "api_error", "message": "x"}, error_after=5),
        "unknown tool": Reply(blocks=[tool_use("never_given")], stop_reason="tool_use"),
    }
    served = []
    for end, reply in ends.items():
        reply.delay_s = THINKING_S
        talk = Talk(alone, api)
        if is_kept:
            talk.say("hello")
        word = marker()
        api.on(word, reply)
        asked = [*talk.messages, {"role": "user", "content": word}]
        answer = alone.post({"messages": asked, "stream": stream})
        assert answer.status == (
            int(end) if end in ("400", "529") else 200 if stream else answer.status
        )
        body = talk.say(f"after {end}")
        assert body["messages"] == talk.replayed()
        assert len(calls_for(api, word)) == 1, f"{end}: one call for one request"
        served += processes_of(api, word, talk.messages[-2]["content"].split()[-1])
    assert len(set(served)) == 1


@pytest.mark.parametrize("after", [0, 3])
def test_when_a_client_leaves_its_process_stops_the_call_and_is_used_again(
    alone: RunningGateway, api: ScriptedApi, after: int
) -> None:
    talk = Talk(alone, api)
    talk.say("hello")
    word = marker()
    reply = text_reply("a b", gate=threading.Event(), gate_after=after)
    api.on(word, reply)
    connection = alone.connect()
    body = {"model": "claude-sonnet-4-6", "max_tokens": 100, "stream": True}
    body["messages"] = [*talk.messages, {"role": "user", "content": word}]
    connection.request("POST", "/v1/messages", json.dumps(body))
    assert api.wait_for(lambda: bool(calls_for(api, word)))
    connection.close()
    assert reply.left.wait(5)
    assert talk.say("and now?")["messages"] == talk.replayed()
    last = talk.messages[-2]["content"].split()[-1]
    assert len(set(processes_of(api, word, last))) == 1
    assert len(calls_for(api, word)) == 1


def test_a_message_of_17_megabytes_can_be_taken_back(start: Any, api: ScriptedApi) -> None:
    """The CLI prints its whole text then, in one line."""
    gateway = start("--processes", "1", "--max-concurrency", "1")
    text = "words and more words " * 800_000
    assert gateway.ask(text).status == 200
    pids = gateway.children()
    word = f"mark-{uuid4().hex}"
    assert gateway.ask(word).status == 200
    (call,) = api.calls_with(word)
    assert len(call.body["messages"]) == 1
    assert gateway.children() == pids


def test_a_waiting_tool_call_gives_way_when_its_process_is_wanted(
    alone: RunningGateway, api: ScriptedApi
) -> None:
    talk = Talk(alone, api, tools=TOOLS)
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    other = ask(alone, api)
    assert len(other.body["messages"]) == 1
    assert talk.say([tool_result(step, "result")])["messages"] == talk.replayed()
    first = talk.messages[0]["content"].split()[-1]
    assert process_of(other) in processes_of(api, first)


def test_tools_that_come_and_go_never_show_again(alone: RunningGateway, api: ScriptedApi) -> None:
    talk = Talk(alone, api)
    secret = {"name": "secret_tool", "input_schema": {"type": "object"}}
    for tools in ([], [secret], TOOLS, [], [secret, *TOOLS], []):
        body = talk.say("next", tools=tools)
        assert body["tools"] == tools
        assert body["messages"] == talk.replayed()
    assert "secret_tool" not in json.dumps(ask(alone, api).body)


def test_another_model_or_system_prompt_in_mid_conversation(
    alone: RunningGateway, api: ScriptedApi
) -> None:
    talk = Talk(alone, api)
    changes: list[JsonObject] = [
        {},
        {"model": "claude-opus-4-6"},
        {"model": "claude-opus-4-6", "system": "Be brief."},
        {"system": "Be long."},
        {},
    ]
    for fields in changes:
        body = talk.say("next", **fields)
        assert body["messages"] == talk.replayed()
        assert body["model"] == fields.get("model", "claude-sonnet-4-6")
        assert body["system"][-1]["text"] == fields.get("system", "You are a helpful assistant.")


def test_two_callers_with_one_conversation_have_a_process_each(
    start: Any, api: ScriptedApi
) -> None:
    gateway = start()
    keys = [{"x-api-key": f"sk-a-long-key-{number}"} for number in (1, 2)]
    (gateway.dir / "apikeys.txt").write_text("".join(f"{key['x-api-key']}\n" for key in keys))
    messages: list[JsonObject] = [{"role": "user", "content": "hello"}]
    served: list[set[str]] = [set(), set()]
    for _ in range(3):
        word = marker()
        messages[-1]["content"] = word
        for number, key in enumerate(keys):
            answer = gateway.post({"messages": messages}, key)
            assert answer.status == 200
            served[number].add(process_of(calls_for(api, word)[-1]))
        messages += [{"role": "assistant", "content": answer.json["content"]}]
        messages += [{"role": "user", "content": ""}]
    assert [len(processes) for processes in served] == [1, 1]
    assert served[0] != served[1]


def test_other_betas_take_another_process(alone: RunningGateway, api: ScriptedApi) -> None:
    sent = []
    for beta in ("foo-2025-01-01", "bar-2025-01-01", "foo-2025-01-01"):
        word = marker()
        messages = [{"role": "user", "content": word}]
        assert alone.post({"messages": messages}, {"anthropic-beta": beta}).status == 200
        (call,) = calls_for(api, word)
        names = call.headers["anthropic-beta"].split(",")
        sent.append([name for name in names if name in ("foo-2025-01-01", "bar-2025-01-01")])
    assert sent == [["foo-2025-01-01"], ["bar-2025-01-01"], ["foo-2025-01-01"]]


def test_parameters_are_each_turns_own(alone: RunningGateway, api: ScriptedApi) -> None:
    talk = Talk(alone, api)
    fields: JsonObject = {"temperature": 0.1, "max_tokens": 77, "stop_sequences": ["X"]}
    first = talk.say("a", **fields, output_config={"effort": "low"})
    second = talk.say("b", thinking={"type": "enabled", "budget_tokens": 2000}, max_tokens=4000)
    third = talk.say("c", top_k=5)
    assert {name: first[name] for name in fields} == fields
    assert first["output_config"]["effort"] == "low"
    assert (second["max_tokens"], second["thinking"]["budget_tokens"]) == (4000, 2000)
    assert "stop_sequences" not in second
    assert second.get("output_config") != first["output_config"]
    assert (third["top_k"], third["max_tokens"]) == (5, 100)
    assert "thinking" not in third


def test_cache_marks_never_add_up_to_more_than_four(
    alone: RunningGateway, api: ScriptedApi
) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    messages: list[JsonObject] = []
    for turn in range(6):
        word = marker()
        blocks = [{"type": "text", "text": "x", **mark}, {"type": "text", "text": word, **mark}]
        messages.append({"role": "user", "content": blocks})
        tools = [{**TOOLS[0], **(mark if turn % 2 else {})}]
        answer = alone.post({"messages": messages, "tools": tools})
        messages.append({"role": "assistant", "content": answer.json["content"]})
        (call,) = calls_for(api, word)
        assert json.dumps(call.body).count('"cache_control"') <= 4
        if turn == 3:
            del messages[3:]  # back to the middle


def test_the_ttl_of_cache_marks_is_each_turns_own(alone: RunningGateway, api: ScriptedApi) -> None:
    messages: list[JsonObject] = []
    for turn in range(3):
        word = marker()
        mark = {"type": "ephemeral", "ttl": "1h" if turn else "5m"}
        marked = {"type": "text", "text": "x", "cache_control": mark}
        messages.append({"role": "user", "content": [marked, {"type": "text", "text": word}]})
        answer = alone.post({"messages": messages})
        messages.append({"role": "assistant", "content": answer.json["content"]})
        (call,) = calls_for(api, word)
        marks = re.findall(r'"cache_control": (\{.*?\})', json.dumps(call.body))
        ttls = [json.loads(each).get("ttl", "5m") for each in marks]
        assert ttls == [mark["ttl"]] * len(ttls)


def test_with_a_login_a_tool_step_is_sent_as_it_is_and_each_conversation_is_reminded_once(
    start: Any, api: ScriptedApi
) -> None:
    gateway = start("--max-concurrency", "1", env=LOGIN)
    for _ in range(2):
        talk = Talk(gateway, api, tools=TOOLS)
        step = tool_use(a=1)
        talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
        sent = talk.say([tool_result(step, "result")])["messages"][-1]["content"]
        assert len(sent) == 1
        result = talk.messages[2]["content"][0]["content"]
        assert sent[0]["content"] == [{"type": "text", "text": result}]
        body = talk.say("thanks")
        assert body["messages"][2:] == talk.replayed()[2:]
        del talk.messages[4:]
        body = talk.say("thanks again")
        assert json.dumps(body["messages"]).count("# Environment") == 1


CHANGES_AT_A_STEP: list[JsonObject] = [
    {"thinking": {"type": "adaptive"}, "max_tokens": 3000},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 3000},
    {"thinking": {"type": "disabled"}},
    {"top_p": 0.5},
    {"temperature": 0.5},
    {"top_k": 5},
    {"max_tokens": 51},
    {"stop_sequences": ["X"]},
    {"tool_choice": {"type": "any"}},
    {"service_tier": "standard_only"},
    {"effort": "low"},
    {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    {"system": "Be brief."},
    {"tools": TOOLS[:1]},
    {"model": "claude-opus-4-6"},
    {"next_year": 1},
]


@pytest.mark.parametrize("change", CHANGES_AT_A_STEP, ids=str)
@pytest.mark.parametrize(
    ("comes", "sign_in"), [(True, "login_gateway"), (False, "gateway")], ids=["comes", "goes"]
)
def test_a_step_with_other_parameters_is_sent_as_by_a_fresh_process(
    request: pytest.FixtureRequest, api: ScriptedApi, change: JsonObject, comes: bool, sign_in: str
) -> None:
    """What a turn began with must not live on in the results of its calls."""
    gateway: RunningGateway = request.getfixturevalue(sign_in)
    before, after = ({}, change) if comes else (change, {})
    talk = Talk(gateway, api, tools=TOOLS)
    step = tool_use(a=1)
    reply = Reply(blocks=[{"type": "text", "text": "hm"}, step], stop_reason="tool_use")
    talk.say("use a tool", reply, **before)
    kept = talk.say([tool_result(step, "result")], **after)

    # Asked again it has to be replayed: a message of tool results is no place to cut at.
    talk.messages.pop()
    word = talk.messages[-1]["content"][0]["content"].split()[-1]
    body = {"messages": talk.messages, **talk.fields, **after}
    assert gateway.post(body).status == 200
    _, replayed = calls_for(api, word)
    assert kept == said(replayed)


def test_a_users_setting_cannot_time_a_waiting_call_out(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "settings.json").write_text('{"env": {"MCP_TOOL_TIMEOUT": "300"}}')
    env = {**API_KEY, "CLAUDE_CONFIG_DIR": str(settings)}
    gateway = start("--setting-sources", "user", env=env)
    talk = Talk(gateway, api, tools=TOOLS)
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    calls = len(api.calls)
    time.sleep(0.8)  # well past that setting; nothing would tell that the CLI has given up
    assert len(api.calls) == calls, "it does not go on by itself"
    assert talk.say([tool_result(step, "result")])["messages"][:-1] == talk.replayed()[:-1]


def test_a_waiting_tool_call_is_not_asked_again_when_the_gateway_stops(
    start: Any, api: ScriptedApi
) -> None:
    gateway = start()
    talk = Talk(gateway, api, tools=TOOLS)
    talk.say("use a tool", Reply(blocks=[tool_use(a=1)], stop_reason="tool_use"))
    calls = len(api.calls)
    assert gateway.stop() == 0
    assert len(api.calls) == calls, "at the end of its stdin the CLI lets the call fail"


@pytest.mark.parametrize("part", [{"type": "x", "text": 5}, {"type": "x", "text": "x"}])
def test_a_tool_result_of_another_shape_is_upstreams_to_refuse(
    gateway: RunningGateway, api: ScriptedApi, part: JsonObject
) -> None:
    talk = Talk(gateway, api, tools=TOOLS)
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    result = {"type": "tool_result", "tool_use_id": step["id"], "content": [part]}
    messages = [*talk.messages, {"role": "user", "content": [result]}]
    assert gateway.post({"messages": messages, "tools": TOOLS}).status == 200
    (call,) = api.calls_with(step["id"])
    assert call.body["messages"][-1]["content"][0]["content"] == [part]
    ask(gateway, api)


def test_a_tool_with_an_odd_name_leaves_its_process_usable(
    tmp_path: Path, api: ScriptedApi, claude: str
) -> None:
    with InProcessGateway(tmp_path, claude=claude, base_url=api.url, processes=1) as gateway:
        word = marker()
        api.on(word, Reply(status=400, message="no"))
        for _ in range(3):
            assert gateway.ask(word, tools=[{"name": ["x"], "input_schema": {}}]).status == 400
        wait_until(lambda: not gateway.now.busy)


ODD_SCHEMAS: list[Any] = [
    {"properties": {"q": {"type": "string"}}},
    {"type": "object", "properties": None},
    {"type": "object", "properties": []},
    {"type": "object", "properties": {"a": 5}},
    {"type": "object", "properties": {}, "required": None},
    {"type": "object", "additionalProperties": 5},
    {"type": ["object", "null"]},
    {"oneOf": [{"type": "object"}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}},
    "text",
]


@pytest.mark.parametrize("schema", ODD_SCHEMAS, ids=str)
def test_a_tool_that_mcp_does_not_take_is_upstreams_to_judge(
    alone: RunningGateway, api: ScriptedApi, schema: Any
) -> None:
    """Its call waits for the result as any other does, in the same process."""
    tools = [{"name": "f", "description": 5, "input_schema": schema}]
    talk = Talk(alone, api, tools=tools)
    step = tool_use("f", a=1)
    called = talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    assert called["tools"] == tools
    used = alone.children()
    after = talk.say([tool_result(step, "done")])
    assert after["messages"] == talk.replayed()
    assert alone.children() == used


# ---- a CLI that will not


REFUSALS = [
    ("refuse", "rewind_conversation"),
    ("keep", "rewind_conversation"),
    ("silent", "rewind_conversation"),
    ("late", "rewind_conversation"),
    ("refuse", "set_model"),
    ("silent", "set_model"),
    ("silent", "mcp_message"),
]


def between(
    tmp_path: Path, api: ScriptedApi, claude: str, order: str, **settings: Any
) -> InProcessGateway:
    environ = {**API_KEY, "PROXY_ORDER": order, "PROXY_CLAUDE": claude}
    return InProcessGateway(tmp_path, claude=str(PROXY), base_url=api.url, env=environ, **settings)


@pytest.fixture
def _short_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cc2api, "REUSE_TIMEOUT_S", 0.7)


@pytest.mark.usefixtures("_short_changes")
@pytest.mark.parametrize(("mode", "subtype"), REFUSALS)
def test_a_cut_or_prompt_that_is_not_taken_ends_the_process_and_a_new_one_is_asked(
    tmp_path: Path,
    api: ScriptedApi,
    claude: str,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    subtype: str,
) -> None:
    order = f"{mode} {subtype} 2"  # the rehearsal passes
    with between(tmp_path, api, claude, order, processes=2, max_concurrency=1) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        for number in range(2):
            call = ask(gateway, api, system=f"prompt {number}", tools=TOOLS[number:])
            assert call.body["system"][-1]["text"] == f"prompt {number}"
            assert len(call.body["messages"]) == 1
            assert call.body["tools"] == TOOLS[number:]
    assert "retrying on a new process" in caplog.text
    assert gateway.gateway.pool.reuse_problem == ""


FOR_GOOD = [("refuse", "rewind_conversation"), ("silent", "set_model")]


@pytest.mark.usefixtures("_short_changes")
@pytest.mark.parametrize(("mode", "subtype"), FOR_GOOD)
def test_a_cli_that_refuses_for_good_gets_a_process_for_each_conversation(
    tmp_path: Path,
    api: ScriptedApi,
    claude: str,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    subtype: str,
) -> None:
    order = f"{mode} {subtype} 1"
    with between(tmp_path, api, claude, order, processes=3) as gateway:
        wait_until(lambda: bool(gateway.gateway.pool.reuse_problem))
        talks = [Talk(gateway, api, system=f"prompt {number}") for number in range(2)]
        for _ in range(2):
            for number, talk in enumerate(talks):
                body = talk.say("next")
                assert body["messages"] == talk.replayed()
                assert body["system"][-1]["text"] == f"prompt {number}"
        for talk in talks:
            words = [m["content"].split()[-1] for m in talk.messages[::2]]
            assert len(set(processes_of(api, *words))) == 1, "it goes on where nothing is cut"
        assert gateway.gateway.pool.reuse_problem in gateway.request("GET", "/").body.decode()
        assert caplog.text.count("takes a process of its own") == 1
        said = cc2api.try_start(gateway.settings, gateway.cli, gateway.environ)
        assert "takes a process of its own" in said, "as --check says"


def test_a_refused_hold_is_none_and_its_process_is_ended(
    tmp_path: Path, api: ScriptedApi, claude: str
) -> None:
    """Three settings are those of the rehearsal, then come a request's own and its hold.

    Upstream holds its last event back until then, so that the CLI cannot be quicker than the kill.
    """
    word = marker()
    ended = threading.Event()
    up_to_message_delta = 5
    reply = text_reply("cut", stop_reason="max_tokens", gate=ended, gate_after=up_to_message_delta)
    api.on(word, reply)
    with between(tmp_path, api, claude, "refuse apply_flag_settings 5", processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        assert gateway.ask(word).json["stop_reason"] == "max_tokens"
        assert gateway.now.idle == []
        ended.set()


# ---- which session, on the fake CLI


def chat(gateway: Any, *texts: str, key: str = "") -> list[JsonObject]:
    """Say some texts in one conversation, and return its messages."""
    messages: list[JsonObject] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = gateway.post({"messages": messages}, {"x-api-key": key})
        assert answer.status == 200
        messages.append({"role": "assistant", "content": answer.json["content"]})
    return messages


def test_a_conversation_is_spared_while_fewer_are_kept_and_the_shortest_goes_first(
    tmp_path: Path,
) -> None:
    with InProcessGateway(tmp_path, processes=3) as gateway:

        def spare() -> list[int]:
            wait_until(lambda: len(gateway.now.spare) == 1)
            return gateway.now.spare

        first = spare()
        talk = chat(gateway, "again", "and again")
        assert gateway.now.idle == first
        second = spare()
        chat(gateway, "something else")
        assert gateway.now.idle == [*first, *second], "one more may be kept"
        spare()
        chat(gateway, "a third thing")
        assert gateway.now.idle == [*first, *second], "2 messages are less than 4"
        talk.append({"role": "user", "content": "and on"})
        assert gateway.post({"messages": talk}).status == 200
        assert gateway.now.idle == [*second, *first], "it was still there"


def test_a_long_conversation_is_worth_one_more_process(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        chat(gateway, *["again"] * 20)
        wait_until(lambda: len(gateway.now.spare) == 1)
        first, second = gateway.now.idle, gateway.now.spare
        chat(gateway, "something else")
        assert gateway.now.idle == [*first, *second]


def test_another_caller_gets_the_place_of_the_least_recently_used(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=4, max_concurrency=2) as gateway:
        for key in ("first", "second"):
            wait_until(lambda: len(gateway.now.spare) == 1)
            chat(gateway, "hello", key=key)
        first, second = gateway.now.idle
        wait_until(lambda: len(gateway.now.spare) == 1)
        chat(gateway, "hello", key="third")
        wait_until(lambda: first not in gateway.now.idle + gateway.now.ending)
        assert second in gateway.now.idle


def test_what_a_burst_leaves_beyond_the_number_kept_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.1)
    monkeypatch.setattr(cc2api, "IDLE_TIMEOUT_S", 0.5)
    with InProcessGateway(tmp_path, processes=2, max_concurrency=4) as gateway:
        threads = [threading.Thread(target=gateway.ask, args=["a while"]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(gateway.now.idle) == 1 and len(gateway.now.spare) == 1)
        assert len(gateway.now.starting) == 0


def test_a_process_is_retired_after_many_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "MAX_SESSION_TURNS", 3)
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        first = gateway.now.spare
        for turn in range(3):
            assert set(first) & set(gateway.now.idle if turn else first)
            chat(gateway, "hello")
        assert not set(first) & set(gateway.now.idle)


def test_a_kept_process_that_dies_costs_a_replay_and_nothing_else(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, processes=2) as gateway:
        messages = chat(gateway, "one")
        (pid,) = gateway.now.idle
        os.kill(pid, signal.SIGKILL)
        messages.append({"role": "user", "content": "two"})
        assert gateway.post({"messages": messages}).status == 200


def test_a_client_is_looked_after_in_a_long_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked after at every wait, of which there is one for each message of the user's."""
    monkeypatch.setattr(cc2api, "KEEPALIVE_S", 0.0)  # so that each look writes a comment
    messages = [
        {"role": role, "content": "x"} for _ in range(500) for role in ("user", "assistant")
    ]
    with InProcessGateway(tmp_path) as gateway:
        answer = gateway.post({"messages": [*messages, messages[0]], "stream": True})
    before, _, _ = answer.body.partition(b"event: message_start")
    assert before.count(b": waiting") > 250


def test_an_idle_process_uses_no_processor(alone: RunningGateway, api: ScriptedApi) -> None:
    Talk(alone, api).say("hello")
    wait_until(lambda: len(alone.children()) == 2)

    def cpu_ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in alone.children()]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return sum(int(field[11]) + int(field[12]) for field in fields)

    def settled() -> bool:  # a new spare takes 0.5 s of processor time to start
        before = cpu_ticks()
        time.sleep(0.5)
        return cpu_ticks() - before <= 2

    wait_until(settled)
