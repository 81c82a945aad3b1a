"""The model list, mapped names, and the paths and headers that clients probe."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import anthropic
import openai
import pytest
from harness import Answer, InProcessGateway, RunningGateway
from helpers import user
from scripted_api import Reply, ScriptedApi

import cc2api


def test_models_are_listed_for_both_sdks_from_the_clis_own_list(gateway: RunningGateway) -> None:
    body = gateway.request("GET", "/v1/models?beta=true").json
    ids = [model["id"] for model in body["data"]]
    assert ids, "the CLI names some"
    assert len(set(ids)) == len(ids)
    listed = {model["id"] for model in body["data"] if model["description"]}
    assert listed, "the others have answered before"
    assert all(model_id.startswith("claude-") for model_id in listed)
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


def test_openrouters_names_are_known_without_their_vendor() -> None:
    models = cc2api.ModelList(["gpt=opus", "own=anthropic/claude-x", "openai/gpt=haiku"])
    expected = {
        "gpt": "opus",
        "anthropic/gpt": "opus",
        "own": "anthropic/claude-x",
        "openai/gpt": "haiku",
        "anthropic/claude-sonnet-4.6": "claude-sonnet-4-6",
        "claude-x.1": "claude-x.1",
    }
    assert {name: models.mapped(name) for name in expected} == expected


def test_a_model_that_is_served_has_an_entry(start: Any, api: ScriptedApi) -> None:
    gateway = start("--model-map", "gpt-4o=sonnet", "--model-map", "own=claude-opus-4-6")
    ids = [model["id"] for model in gateway.request("GET", "/v1/models").json["data"]]
    assert ids[-2:] == ["gpt-4o", "own"]
    assert gateway.request("GET", "/v1/models/claude-sonnet-4-6").status == 404
    assert gateway.ask("hi", model="anthropic/claude-sonnet-4-6").status == 200
    for name in ("claude-sonnet-4-6", "anthropic%2Fclaude-sonnet-4-6", "claude-sonnet-4-6/"):
        item = gateway.request("GET", f"/v1/models/{name}").json
        assert (item["id"], item["line"]) == ("claude-sonnet-4-6", "sonnet")
    ids = [model["id"] for model in gateway.request("GET", "/v1/models/").json["data"]]
    assert ids[-3:] == ["claude-sonnet-4-6", "gpt-4o", "own"]
    api.on("unknown-one", Reply(status=404, message="model: no"))
    assert gateway.ask("unknown-one", model="claude-no-1").status == 404
    assert gateway.request("GET", "/v1/models/claude-no-1").status == 404

    item = gateway.request("GET", "/v1/models/gpt-4o").json
    assert (item["id"], item["line"]) == ("gpt-4o", "sonnet")
    missing = gateway.request("GET", "/v1/models/none").json["error"]
    assert (missing["type"], missing["code"]) == ("not_found_error", "model_not_found")


def test_entries_have_every_field_of_both_sdks(gateway: RunningGateway) -> None:
    (item, *_) = gateway.request("GET", "/v1/models").json["data"]
    anthropic.types.ModelInfo.model_validate(item)
    openai.types.Model.model_validate(item)
    assert (
        anthropic.types.ModelInfo.model_fields.keys() | openai.types.Model.model_fields.keys()
        <= (item.keys())
    )
    assert item["description"]
    assert item["lifecycle"] == "active"


# ---- what clients probe


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("/v1/messages/v1/messages", "http://127.0.0.1:{}"),
        ("/anthropic/v1/messages/", "http://127.0.0.1:{}"),
        ("/v1/chat/completions/chat/completions", "http://127.0.0.1:{}/v1"),
        ("/openai/v1/responses", "http://127.0.0.1:{}/v1"),
    ],
)
def test_a_base_url_with_too_much_in_it_is_told_the_right_one(
    fake: InProcessGateway, path: str, base: str
) -> None:
    answer = fake.request("POST", path, {})
    assert answer.status == 404
    assert answer.json["error"]["message"].endswith(base.format(fake.port))


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/embeddings", "/v1/completions"])
def test_a_404_below_openais_paths_has_openais_form(fake: InProcessGateway, path: str) -> None:
    answer = fake.request("POST", path, {})
    assert answer.status == 404
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json.keys() == {"error"}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessGateway]:
    with InProcessGateway(tmp_path_factory.mktemp("orders")) as running:
        yield running


def test_paths_seen_in_the_wild(fake: InProcessGateway) -> None:
    message = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/messages?beta=true", "/v1/v1/messages", "/messages", "/v1/messages/"):
        assert fake.request("POST", path, message).status == 200
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions"):
        assert fake.request("POST", path, message).status == 200
    for path in ("/", "/v1/", "/api/hello"):
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


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
}
if importlib.util.find_spec("compression"):
    ENCODERS["zstd"] = importlib.import_module("compression.zstd").compress


def post_encoded(fake: InProcessGateway, data: bytes, encoding: str) -> Answer:
    return fake.request("POST", "/v1/messages", data, {"content-encoding": encoding})


@pytest.mark.parametrize("encoding", ENCODERS)
def test_compressed_request_bodies_are_taken(fake: InProcessGateway, encoding: str) -> None:
    encode = ENCODERS[encoding]
    body = json.dumps({"model": "m", "max_tokens": 9, "messages": [user("hi " * 50_000)]}).encode()
    assert post_encoded(fake, encode(body), encoding).status == 200
    # Its decoded size is limited.
    bomb = encode(b" " * (cc2api.MAX_BODY_BYTES + 1))
    assert post_encoded(fake, bomb, encoding).status == 413


@pytest.mark.parametrize("encoding", [each for each in ENCODERS if each != "identity"])
def test_a_broken_compressed_body_is_400(fake: InProcessGateway, encoding: str) -> None:
    whole = ENCODERS[encoding](b'{"model": "m"}')
    for data in (whole[:-4], whole[:3], b"{}", whole + b"rest", whole + whole[:-1]):
        answer = post_encoded(fake, data, encoding)
        assert answer.status == 400
        assert "is not valid" in answer.json["error"]["message"]
    assert post_encoded(fake, b"", encoding).status == 400


@pytest.mark.parametrize("encoding", [each for each in ENCODERS if each != "identity"])
def test_a_body_is_decoded_in_time_in_step_with_its_size(encoding: str) -> None:
    """One of many empty members, each of which would be looked at with all that follow, is none."""
    encode = ENCODERS[encoding]
    noise = random.Random(1).randbytes(3_000_000)
    assert cc2api.decode_body(encode(noise), encoding.lower()) == noise
    with pytest.raises(cc2api.InvalidRequest):
        cc2api.decode_body(encode(b"") * 100_000, encoding.lower())


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_another_encoding_is_refused_with_what_to_do(fake: InProcessGateway, encoding: str) -> None:
    if encoding in ENCODERS:
        return
    answer = post_encoded(fake, b"x", encoding)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["details"] == {"error_code": "request_body_encoding_unsupported"}
    switch = "enable_request_compression" if encoding == "zstd" else "uncompressed"
    assert switch in error["message"]


def test_keys_apply_to_models_too(tmp_path: Path) -> None:
    (tmp_path / "apikeys.txt").write_text("sk-1\n")
    with InProcessGateway(tmp_path) as gateway:
        assert gateway.request("GET", "/v1/models").status == 401
        assert gateway.request("GET", "/v1/models", None, {"x-api-key": "sk-1"}).status == 200


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
