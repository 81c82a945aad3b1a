"""With a login: upstream gets what was sent, and the CLI's additions with the first message alone.

CC2API_TEST_REQUESTS=300 sends more random requests than the suite does.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from additions import split_additions
from harness import LOGIN, InProcessGateway, wait_until
from helpers import marker
from scripted_api import Call, ScriptedApi
from test_refusals import IMAGE
from test_reuse import PROXY, TOOLS, said, tool_result, tool_use

JsonObject = dict[str, Any]


REQUESTS = int(os.environ.get("CC2API_TEST_REQUESTS", "12"))
MODELS = ("claude-sonnet-4-6", "claude-opus-4-6", "claude-sonnet-5-5", "claude-fable-5-1")
TEXTS = (
    "plain",
    "  spaces \n",
    "/compact now",
    "@/etc/hosts ok",
    "\u2028 é \U0001f469",
    "x" * 3000,
)


def random_messages(dice: random.Random, word: str) -> list[JsonObject]:
    """Return a conversation of one to nine messages, with everything that may stand in one."""
    messages: list[JsonObject] = []
    calls: list[JsonObject] = []
    for turn in range(dice.randrange(5)):
        messages.append({"role": "user", "content": random_content(dice, calls, word)})
        answer: list[JsonObject] = [{"type": "text", "text": f"answer {turn}"}]
        calls = [tool_use(n=turn) for _ in range(dice.choice((0, 0, 1, 2)))]
        messages.append({"role": "assistant", "content": answer + calls})
    messages.append({"role": "user", "content": random_content(dice, calls, word)})
    return messages


def random_content(dice: random.Random, calls: list[JsonObject], word: str) -> list[JsonObject]:
    """Return a user message's blocks: the results that are due, and more or less beside them."""
    texts = [{"type": "text", "text": text} for text in dice.sample(TEXTS, dice.randrange(1, 3))]
    results: list[Any] = [
        f"result {word}",
        [{"type": "text", "text": "a\n"}, {"type": "text", "text": " b"}],
        [{"type": "text", "text": "seen"}, IMAGE],
        "y" * 120_000,
    ]
    blocks = [tool_result(call, dice.choice(results)) for call in calls]
    if not calls or dice.random() < 0.3:
        blocks += texts
    if not calls:
        blocks += [{"type": "text", "text": word}, *([IMAGE] if dice.random() < 0.2 else [])]
    if dice.random() < 0.3:
        blocks[-1] = {**blocks[-1], "cache_control": {"type": "ephemeral"}}
    return blocks


def test_random_requests_reach_upstream_as_sent_but_for_the_additions(
    start: Any, api: ScriptedApi
) -> None:
    """Served in any order by few processes, which hold whatever they held before."""
    gateway = start("--processes", "3", "--max-concurrency", "2", env=LOGIN)
    dice = random.Random(REQUESTS)
    additions: dict[str, list[str]] = {}
    for _ in range(REQUESTS):
        word, model = marker(), dice.choice(MODELS)
        messages = random_messages(dice, word)
        body = {"model": model, "messages": messages, "tools": TOOLS}
        answer = gateway.post(body, {"x-api-key": dice.choice("ab")})
        assert answer.status == 200, answer.json
        (call,) = api.calls_with(word)
        sent, added = split_additions(said(call)["messages"])
        assert sent == said(Call("", {}, {"messages": messages}))["messages"]
        assert additions.setdefault(model, added) == added, "the same bytes in every request"
    assert all(additions.values())


def longer(word: str) -> list[JsonObject]:
    """Return a conversation whose first message has to be held."""
    return [
        {"role": "user", "content": f"first {word}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": f"last {word}"},
    ]


def test_a_process_that_dies_in_the_held_query_is_replaced_unseen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with InProcessGateway(tmp_path, env=LOGIN, processes=1) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        (tmp_path / "die-when-held").touch()
        answer = gateway.post({"messages": longer(marker())})
        assert (answer.status, answer.json["content"][0]["text"]) == (200, "from the fake")
    assert "gone in a held query" in caplog.text
    queries = (tmp_path / "queries").read_text().splitlines()
    assert len(queries) == 1, "what was held was not asked"


def test_a_client_that_leaves_in_the_held_query_leaves_nothing_behind(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, env=LOGIN, processes=1, max_concurrency=1) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        (tmp_path / "stall-when-held").touch()
        connection = gateway.connect()
        body = {"model": "m", "max_tokens": 9, "messages": longer(marker())}
        connection.request("POST", "/v1/messages", json.dumps(body))
        wait_until(lambda: not (tmp_path / "stall-when-held").exists())
        (pid,) = gateway.now.busy
        connection.close()
        wait_until(lambda: not gateway.now.busy)
        assert pid not in gateway.now.idle
        assert gateway.post({"messages": longer(marker())}).status == 200
    assert len((tmp_path / "queries").read_text().splitlines()) == 1


@pytest.mark.parametrize("first", [4, 5], ids=["with the hold", "after it"])
def test_a_hold_that_is_refused_costs_another_process_and_no_call(
    tmp_path: Path, api: ScriptedApi, claude: str, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Three settings are those of the rehearsal, then come a request's own, held and not."""
    order = f"refuse apply_flag_settings {first}"
    env = {**LOGIN, "PROXY_ORDER": order, "PROXY_CLAUDE": claude}
    settings: JsonObject = {"claude": str(PROXY), "base_url": api.url, "env": env}
    word = marker()
    with InProcessGateway(tmp_path, processes=1, **settings) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        answer = gateway.post({"messages": longer(word)})
        assert answer.status in (200, 503)
    assert "claude refused apply_flag_settings" in caplog.text
    assert len(api.calls_with(word)) == (answer.status == 200)


def test_a_first_message_of_30_mb_is_held_and_sent(login_gateway: Any, api: ScriptedApi) -> None:
    word = marker()
    messages = longer(word)
    messages[0]["content"] += " x" * 14_500_000
    answer = login_gateway.post({"messages": messages})
    assert answer.status == 200
    (call,) = api.calls_with(word)
    sent, _ = split_additions(call.body["messages"])
    assert sent[0]["content"][-1]["text"] == messages[0]["content"]
