"""The model list, mapped names, and the paths and headers that clients probe."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import anthropic
import openai
import pytest
from harness import InProcessGateway, RunningGateway
from scripted_api import Reply, ScriptedApi

import cc2api


def test_models_are_listed_for_both_sdks_from_the_clis_own_list(gateway: RunningGateway) -> None:
    body = gateway.request("GET", "/v1/models?beta=true").json
    ids = [model["id"] for model in body["data"]]
    assert ids, "the CLI names some"
    assert len(set(ids)) == len(ids)
    assert all(model_id.startswith("claude-") for model_id in ids)
    assert (body["object"], body["has_more"]) == ("list", False)
    assert (body["first_id"], body["last_id"]) == (ids[0], ids[-1])
    with anthropic.Anthropic(base_url=gateway.url, api_key="any") as theirs:
        assert [model.id for model in theirs.models.list()] == ids
        assert theirs.models.retrieve(ids[0]).display_name
        with pytest.raises(anthropic.NotFoundError):
            theirs.models.retrieve("no-such/model[1m]")
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any") as others:
        assert [model.id for model in others.models.list()] == ids
        assert others.models.retrieve(ids[0]).object == "model"


def test_aliases_are_resolved(gateway: RunningGateway) -> None:
    ids = {gateway.request("GET", f"/v1/models/{name}").json["id"] for name in ("haiku", "sonnet")}
    assert len(ids) == 2
    default = gateway.request("GET", "/v1/models/claude-code")
    assert default.json["id"].startswith("claude-")
    missing = gateway.request("GET", "/v1/models/no-such%2Fmodel%5B1m%5D")
    assert (missing.status, missing.json["error"]["type"]) == (404, "not_found_error")
    assert missing.json["error"]["message"] == "model: no-such/model[1m]"


def test_the_list_is_one_page(gateway: RunningGateway) -> None:
    body = gateway.request("GET", "/v1/models?limit=1").json
    assert len(body["data"]) > 1, "OpenAI's clients never ask for a second one"
    assert body["has_more"] is False, "and Anthropic's do not go on"


def test_the_newest_stands_first() -> None:
    values = ["claude-haiku-4-5", "claude-opus-5-5", "claude-sonnet-5", "claude-opus-5-5[1m]"]
    listed = cc2api.to_model_list({"value": v, "resolvedModel": v} for v in values)
    assert [m["id"] for m in listed] == ["claude-opus-5-5", "claude-sonnet-5", "claude-haiku-4-5"]


def test_other_vendors_names_are_mapped(start: Any, api: ScriptedApi) -> None:
    gateway = start("--model-map", "gpt-4o=claude-sonnet-4-6", "--model-map", "mini=claude-code")
    word = f"mark-{uuid4().hex}"
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": word}]}
    assert gateway.request("POST", "/v1/chat/completions", body).status == 200
    assert api.calls_with(word)[0].body["model"] == "claude-sonnet-4-6"
    assert gateway.ask(word + "2", model="mini").status == 200
    assert api.calls_with(word + "2")[0].body["model"].startswith("claude-")


# ---- what clients probe


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessGateway]:
    with InProcessGateway(tmp_path_factory.mktemp("orders")) as running:
        yield running


def test_paths_seen_in_the_wild(fake: InProcessGateway) -> None:
    message = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/messages?beta=true", "/v1/v1/messages", "/messages"):
        assert fake.request("POST", path, message).status == 200
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions"):
        assert fake.request("POST", path, message).status == 200
    for path in ("/", "/api/hello"):
        head = fake.request("HEAD", path)
        assert (head.status, head.body) == (200, b"")
    assert fake.request("OPTIONS", "/v1/messages").status == 204
    assert fake.request("POST", "/v1/messages/batches", message).status == 404


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21", None])
@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "text/plain", None])
def test_versions_and_content_types(
    fake: InProcessGateway, version: str | None, content_type: str | None
) -> None:
    headers = {"anthropic-version": version, "content-type": content_type}
    sent = {name: value for name, value in headers.items() if value is not None}
    assert fake.post({"messages": [{"role": "user", "content": "hi"}]}, sent).status == 200


def test_gzip_request_bodies_are_refused_clearly(fake: InProcessGateway) -> None:
    body = gzip.compress(json.dumps({"model": "m"}).encode())
    answer = fake.request("POST", "/v1/messages", body, {"content-encoding": "gzip"})
    assert answer.status == 400
    error = answer.json["error"]
    assert error["details"] == {"error_code": "request_body_encoding_unsupported"}


def test_keys_apply_to_models_too(fake: InProcessGateway, tmp_path: Any) -> None:
    keys = fake.gateway.keys.path
    keys.write_text("sk-1\n")
    try:
        assert fake.request("GET", "/v1/models").status == 401
        assert fake.request("GET", "/v1/models", None, {"x-api-key": "sk-1"}).status == 200
    finally:
        keys.unlink()


def test_a_used_up_plan_says_when_to_come_back(login_gateway: Any, api: ScriptedApi) -> None:
    gateway = login_gateway
    word = f"mark-{uuid4().hex}"
    name = "anthropic-ratelimit-unified"
    reset = str(int(time.time()) + 3600)
    told = {f"{name}-status": "rejected", f"{name}-reset": reset}
    api.on(word, Reply(status=429, message="limit", headers=told))
    answer = gateway.ask(word)
    assert (answer.status, answer.headers["x-should-retry"]) == (429, "false")
    assert 3500 < int(answer.headers["retry-after"]) <= 3600
    assert answer.headers[f"{name}-status"] == "rejected"


def test_rate_limit_headers_hold_nothing_but_words_and_numbers() -> None:
    evil = {"status": "ok\r\nx: y", "resetsAt": 5, "unifiedWindows": {"five_hour": {"status": 7}}}
    assert cc2api.to_rate_limit_headers(evil) == {
        "anthropic-ratelimit-unified-reset": "5",
        "anthropic-ratelimit-unified-5h-status": "7",
    }
    assert cc2api.to_rate_limit_headers(None) == {}
