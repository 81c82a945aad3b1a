"""Conversations that go on in their process: upstream is sent the same as by a replay."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from running import API_KEY, LOGIN, InProcessGateway, RunningGateway, wait_until
from scripted_api import Call, Reply, ScriptedApi, text_reply

import cc2api

JsonObject = dict[str, Any]
TOOLS: list[JsonObject] = [
    {"name": "look", "description": "d", "input_schema": {"type": "object"}, "strict": True},
    {"type": "bash_20250124", "name": "bash"},
]


def marker() -> str:
    return f"mark-{uuid4().hex[:12]}"


def calls_for(api: ScriptedApi, word: str) -> list[Call]:
    """Return the calls that were made for the turn whose last message holds a word."""
    return [call for call in api.calls if word in call.last_user_text()]


def said(call: Call) -> JsonObject:
    """Return a request as the model is told it: free of cache marks, all content as blocks."""
    left_out = ("metadata", "cache_control")

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node if not is_context(item)]
        if not isinstance(node, dict):
            return node
        kept = {k: plain(v) for k, v in node.items() if k not in left_out}
        if isinstance(kept.get("content"), str):
            kept["content"] = [{"type": "text", "text": kept["content"]}]
        return {k: v for k, v in kept.items() if (k, v) != ("is_error", False)}

    return {**plain(call.body), "betas": call.headers.get("anthropic-beta")}


def is_context(block: Any) -> bool:
    """Say whether a block is what CLIs before 2.1.300 put before the first queried message."""
    begins = (
        *("<system-reminder>\nAs you answer", "<local-command-caveat>"),
        *("<command-name>/model", "<local-command-stdout>Set model"),
    )
    return isinstance(block, dict) and str(block.get("text")).lstrip().startswith(begins)


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


@pytest.fixture
def live(start: Any) -> RunningGateway:
    gateway: RunningGateway = start("--spares-max", "1")
    wait_until(lambda: len(gateway.children()) == 1)
    return gateway


def test_ten_turns_and_ten_tool_steps_in_one_process(
    live: RunningGateway, api: ScriptedApi
) -> None:
    talk = Talk(live, api, tools=TOOLS)
    talk.say("hello")
    wait_until(lambda: len(live.children()) == 2)
    children = set(live.children())
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
    assert set(live.children()) == children, "no further process was needed"


def test_parameters_are_each_turns_own(live: RunningGateway, api: ScriptedApi) -> None:
    talk = Talk(live, api)
    fields: JsonObject = {"temperature": 0.1, "max_tokens": 77, "stop_sequences": ["X"]}
    first = talk.say("a", **fields, output_config={"effort": "low"})
    children = set(live.children())
    second = talk.say("b", thinking={"type": "enabled", "budget_tokens": 2000}, max_tokens=4000)
    third = talk.say("c", top_k=5)
    assert {name: first[name] for name in fields} == fields
    assert first["output_config"]["effort"] == "low"
    assert (second["max_tokens"], second["thinking"]["budget_tokens"]) == (4000, 2000)
    assert "stop_sequences" not in second
    assert second.get("output_config") != first["output_config"]
    assert (third["top_k"], third["max_tokens"]) == (5, 100)
    assert third["thinking"] == {"type": "disabled"}
    assert set(live.children()) >= children


def test_cache_marks_never_add_up_to_more_than_four(live: RunningGateway, api: ScriptedApi) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    messages: list[JsonObject] = []
    for turn in range(4):
        word = marker()
        blocks = [{"type": "text", "text": "x", **mark}, {"type": "text", "text": word, **mark}]
        messages.append({"role": "user", "content": blocks})
        tools = [{**TOOLS[0], **(mark if turn % 2 else {})}]
        answer = live.post({"messages": messages, "tools": tools})
        messages.append({"role": "assistant", "content": answer.json["content"]})
        (call,) = calls_for(api, word)
        assert json.dumps(call.body).count('"cache_control"') <= 4


def test_another_key_never_gets_a_parked_child(live: RunningGateway, api: ScriptedApi) -> None:
    (live.dir / "apikeys.txt").write_text("sk-first-first-1\nsk-second-second-1\n")
    talk = Talk(live, api)
    messages: list[JsonObject] = [{"role": "user", "content": "hello"}]
    post = {"messages": messages}
    answer = live.post(post, {"x-api-key": "sk-first-first-1"}).json
    wait_until(lambda: len(live.children()) == 2)
    spare_and_parked = set(live.children())
    messages += [{"role": "assistant", "content": answer["content"]}]
    messages += [{"role": "user", "content": "next"}]
    assert live.post(post, {"x-api-key": "sk-second-second-1"}).status == 200
    wait_until(lambda: len(live.children()) == 3)
    assert len(set(live.children()) & spare_and_parked) == 2, "the spare served, and is parked too"
    assert talk.messages == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_mid_answer_ends_its_child(
    live: RunningGateway, api: ScriptedApi, stream: bool
) -> None:
    talk = Talk(live, api)
    talk.say("hello")
    wait_until(lambda: len(live.children()) == 2)
    before = set(live.children())
    word = marker()
    reply = text_reply("a b", gate=threading.Event(), gate_after=3)
    api.on(word, reply)
    body = {"model": "claude-sonnet-4-6", "max_tokens": 100, "stream": stream}
    body["messages"] = [*talk.messages, {"role": "user", "content": word}]
    connection = live.connect()
    connection.request("POST", "/v1/messages", json.dumps(body))
    assert api.wait_for(lambda: bool(calls_for(api, word)))
    connection.close()
    assert reply.left.wait(5)
    wait_until(lambda: len(live.children()) == 1)
    assert set(live.children()) < before


def test_with_a_login_too_a_tool_step_is_sent_as_it_is(start: Any, api: ScriptedApi) -> None:
    talk = Talk(start("--spares-max", "1", env=LOGIN), api, tools=TOOLS)
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    result = tool_result(step, "result")
    body = talk.say([result])
    sent = body["messages"][-1]["content"]
    assert len(sent) == 1
    assert sent[0]["content"] == [
        {"type": "text", "text": talk.messages[2]["content"][0]["content"]}
    ]
    assert talk.say("thanks")["messages"][2:] == talk.replayed()[2:]


def test_betas_and_the_ttl_of_cache_marks_are_each_turns_own(
    live: RunningGateway, api: ScriptedApi
) -> None:
    messages: list[JsonObject] = []
    for turn, beta in enumerate(["foo-2025-01-01", "", "bar-2025-01-01"]):
        word = marker()
        mark = {"type": "ephemeral", "ttl": "1h" if turn else "5m"}
        marked = {"type": "text", "text": "x", "cache_control": mark}
        messages.append({"role": "user", "content": [marked, {"type": "text", "text": word}]})
        headers = {"anthropic-beta": beta} if beta else {}
        answer = live.post({"messages": messages}, headers)
        messages.append({"role": "assistant", "content": answer.json["content"]})
        (call,) = calls_for(api, word)
        sent = call.headers["anthropic-beta"].split(",")
        assert [name for name in ("foo-2025-01-01", "bar-2025-01-01") if name in sent] == (
            [beta] if beta else []
        )
        marks = re.findall(r'"cache_control": (\{.*?\})', json.dumps(call.body))
        ttls = [json.loads(each).get("ttl", "5m") for each in marks]
        assert ttls == [mark["ttl"]] * len(ttls)


def test_a_call_that_the_cli_has_timed_out_is_not_answered_late(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "settings.json").write_text('{"env": {"MCP_TOOL_TIMEOUT": "300"}}')
    env = {**API_KEY, "CLAUDE_CONFIG_DIR": str(settings)}
    gateway = start("--spares-max", "1", "--setting-sources", "user", env=env)
    talk = Talk(gateway, api, tools=TOOLS)
    step = tool_use(a=1)
    talk.say("use a tool", Reply(blocks=[step], stop_reason="tool_use"))
    calls = len(api.calls)
    time.sleep(0.8)  # nothing tells that the CLI has given up
    assert len(api.calls) == calls, "it does not go on by itself"
    assert talk.say([tool_result(step, "result")])["messages"][:-1] == talk.replayed()[:-1]


# ---- parking, on the fake CLI


def chat(gateway: Any, *texts: str) -> list[JsonObject]:
    """Say some texts in one conversation, and return its messages."""
    messages: list[JsonObject] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = gateway.post({"messages": messages})
        assert answer.status == 200
        messages.append({"role": "assistant", "content": answer.json["content"]})
    return messages


def test_the_least_recently_used_goes_first_and_equal_ones_are_all_kept(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, live=2) as gateway:
        pool = gateway.gateway.pool
        chat(gateway, "same")
        chat(gateway, "same")
        same = list(pool._parked)
        assert len(same) == 2, "two clients may begin with the same words"
        chat(gateway, "other")
        assert next(iter(pool._parked)) is same[1]
        chat(gateway, "same", "again")
        assert same[1] not in pool._parked, "it had gone on, and then gave way"
        assert len(pool._parked) == 2


def test_parked_children_end_in_time(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, live=1, live_ttl=0.3) as gateway:
        pool = gateway.gateway.pool
        chat(gateway, "hello")
        parked_at = time.monotonic()
        wait_until(lambda: sum(pool.counts().values()) == 0)
        assert time.monotonic() - parked_at < 1.3


def test_a_waiting_request_ends_parked_children_first(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, live=4, max_concurrency=2, max_queue=0) as gateway:
        chat(gateway, "one")
        chat(gateway, "two")
        assert gateway.gateway.pool.counts()["parked"] == 2
        chat(gateway, "three")
        assert gateway.gateway.pool.counts()["parked"] == 2


def test_short_memory_ends_parked_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with InProcessGateway(tmp_path, live=4) as gateway:
        chat(gateway, "one")
        monkeypatch.setattr(cc2api, "available_memory", lambda: 1000)
        chat(gateway, "two")
        assert gateway.gateway.pool.counts()["parked"] == 0


def test_a_child_that_cannot_be_started_is_given_a_parked_ones_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InProcessGateway(tmp_path, live=4) as gateway:
        pool = gateway.gateway.pool
        chat(gateway, "one")
        start = pool._start

        def start_alone() -> cc2api.Child:
            if pool._parked:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return start()

        monkeypatch.setattr(pool, "_start", start_alone)
        chat(gateway, "two")


def test_a_parked_child_that_dies_costs_a_replay_and_nothing_else(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, live=4) as gateway:
        messages = chat(gateway, "one")
        (child,) = gateway.gateway.pool._parked
        os.kill(child.pid, signal.SIGKILL)
        messages.append({"role": "user", "content": "two"})
        assert gateway.post({"messages": messages}).status == 200


def test_an_idle_parked_child_uses_no_processor(live: RunningGateway, api: ScriptedApi) -> None:
    Talk(live, api).say("hello")
    wait_until(lambda: len(live.children()) == 2)

    def cpu_ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in live.children()]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return sum(int(field[11]) + int(field[12]) for field in fields)

    def settled() -> bool:  # a new spare takes 0.4 s of processor time to start
        before = cpu_ticks()
        time.sleep(0.5)
        return cpu_ticks() - before <= 2

    wait_until(settled)


# ---- spares


def test_spares_follow_the_number_of_new_conversations_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InProcessGateway(tmp_path, spares=1, spares_max=3) as gateway:
        pool = gateway.gateway.pool
        wait_until(lambda: pool.counts()["idle"] == 1)
        threads = [threading.Thread(target=gateway.ask, args=["stall"]) for _ in range(4)]
        for thread in threads:
            thread.start()
        asked = tmp_path / "queries"
        wait_until(lambda: asked.exists() and asked.read_text().count("\n") == 4)
        for child in list(pool._lent):
            child.kill()
        for thread in threads:
            thread.join()
        wait_until(lambda: pool.counts()["idle"] == 3)
        monkeypatch.setattr(cc2api, "SPARE_MEMORY_S", 0.0)
        with pool._changed:
            pool._changed.notify_all()
        wait_until(lambda: pool.counts()["idle"] == 1)


def test_a_prepared_spare_serves_only_what_it_fits(tmp_path: Path) -> None:
    keys = [{"x-api-key": "first-key-first"}, {"x-api-key": "second-key-second"}]

    def ask(system: str, key: JsonObject) -> None:
        body = {"system": system, "messages": [{"role": "user", "content": "hello"}]}
        assert gateway.post(body, key).status == 200

    with InProcessGateway(tmp_path, spares=1, spares_max=4) as gateway:
        pool = gateway.gateway.pool

        def is_ready() -> bool:
            return sorted(child.fit is None for child in pool._idle) == [False, True]

        for _ in range(2):
            ask("SECRET", keys[0])
        wait_until(is_ready)
        (prepared,) = (child for child in pool._idle if child.fit)
        ask("SECRET", keys[1])
        ask("other", keys[0])
        wait_until(is_ready)
        assert prepared in pool._idle
        ask("SECRET", keys[0])
        assert prepared not in pool._idle
