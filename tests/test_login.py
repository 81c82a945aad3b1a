"""With a login: what goes wrong in the held query that puts the CLI's additions in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from additions import split_additions
from running import LOGIN, InProcessGateway, wait_until
from scripted_api import ScriptedApi
from test_reuse import BETWEEN, marker

JsonObject = dict[str, Any]


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


@pytest.mark.parametrize("first", [4, 5], ids=["the hold", "the settings after it"])
def test_a_hold_that_is_refused_costs_another_process_and_no_call(
    tmp_path: Path, api: ScriptedApi, claude: str, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Three settings are those of the rehearsal, then come a request's own, its hold, and again."""
    order = f"refuse apply_flag_settings {first + 1}"
    env = {**LOGIN, "BETWEEN_ORDER": order, "BETWEEN_CLAUDE": claude}
    settings: JsonObject = {"claude": str(BETWEEN), "base_url": api.url, "env": env}
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
    messages[0]["content"] += " x" * 5_000_000
    answer = login_gateway.post({"messages": messages})
    assert answer.status == 200
    (call,) = api.calls_with(word)
    sent, _ = split_additions(call.body["messages"])
    assert sent[0]["content"][-1]["text"] == messages[0]["content"]
