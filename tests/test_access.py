"""Who may call, what stays out of sight, and that requests do not show in each other."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import API_KEY, LOGIN, InProcessGateway, RunningGateway, wait_until
from scripted_api import ScriptedApi, text_reply

import cc2api

BODY: dict[str, Any] = {}  # fails with 400, where the caller is let in


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessGateway]:
    allowed: dict[str, Any] = {
        "cors_origin": ("https://app.example",),
        "allowed_host": ("Box.example",),
    }
    with InProcessGateway(tmp_path_factory.mktemp("orders"), **allowed) as running:
        yield running


def status(gateway: Any, headers: dict[str, str]) -> int:
    answer = gateway.request("POST", "/v1/messages", BODY, headers)
    return int(answer.status)


HOSTS = [
    ("localhost", 400),
    ("localhost:8080", 400),
    ("LOCALHOST", 400),
    ("127.0.0.1:9", 400),
    ("10.1.2.3", 400),
    ("[::1]:8080", 400),
    ("box.example:80", 400),
    ("evil.example", 403),
    ("localhost.evil.example", 403),
    ("127.0.0.1.evil.example", 403),
]


@pytest.mark.parametrize(("host", "expected"), HOSTS)
def test_a_host_that_is_not_ours_is_refused(
    gateway: InProcessGateway, host: str, expected: int
) -> None:
    assert status(gateway, {"Host": host}) == expected


ORIGINS = [
    ("http://localhost:81", 400),  # its own: the Host below
    ("https://app.example", 400),
    ("https://evil.example", 403),
    ("http://localhost", 403),
    ("null", 403),
]


@pytest.mark.parametrize(("origin", "expected"), ORIGINS)
def test_a_foreign_page_is_refused(gateway: InProcessGateway, origin: str, expected: int) -> None:
    assert status(gateway, {"Host": "localhost:81", "Origin": origin}) == expected


def test_an_allowed_page_gets_its_preflight_and_its_headers(gateway: InProcessGateway) -> None:
    page = {"Origin": "https://app.example"}
    ask = {**page, "Access-Control-Request-Method": "POST"}
    preflight = gateway.request("OPTIONS", "/v1/messages", None, ask)
    assert (preflight.status, preflight.body) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization, *"
    answer = gateway.request("POST", "/v1/messages", BODY, page)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    foreign = gateway.request("OPTIONS", "/v1/messages", None, {"Origin": "https://evil.example"})
    assert foreign.status == 403
    assert "access-control-allow-origin" not in foreign.headers


def test_with_keys_a_page_needs_a_key_and_any_host_will_do(tmp_path: Path) -> None:
    (tmp_path / "apikeys.txt").write_text("sk-1\n")
    with InProcessGateway(tmp_path) as gateway:
        page = {"Origin": "https://evil.example", "Host": "box.example"}
        assert status(gateway, page) == 401
        assert status(gateway, {**page, "x-api-key": "sk-1"}) == 400


def write_comments(keys: Path) -> None:
    keys.write_text("# none\n")


def empty(keys: Path) -> None:
    keys.write_text("")


WAYS_TO_LOSE_KEYS = [write_comments, empty, Path.unlink]


@pytest.mark.parametrize("lose", WAYS_TO_LOSE_KEYS)
@pytest.mark.parametrize("named", [False, True])
def test_on_another_address_an_emptied_or_vanished_key_file_is_401(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path], None], named: bool
) -> None:
    keys = tmp_path / "apikeys.txt"
    keys.write_text("sk-1\n")
    where: dict[str, Any] = {"keys": str(keys)} if named else {"host": "0.0.0.0"}
    with InProcessGateway(tmp_path, **where) as gateway:
        assert status(gateway, {"x-api-key": "sk-1"}) == 400
        lose(keys)
        assert status(gateway, {"x-api-key": "sk-2"}) == 401
        monkeypatch.setattr(cc2api, "KEY_FILE_GRACE_S", 0.0)
        assert status(gateway, {"x-api-key": "sk-1"}) == 401
        assert status(gateway, {}) == 401
        assert gateway.gateway.keys.summary.startswith("NOBODY CAN CALL")


@pytest.mark.parametrize("lose", WAYS_TO_LOSE_KEYS)
def test_a_key_file_that_is_written_anew_does_not_open_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path], None]
) -> None:
    keys = tmp_path / "apikeys.txt"
    keys.write_text("sk-1\n")
    with InProcessGateway(tmp_path) as gateway:
        assert status(gateway, {}) == 401
        lose(keys)
        assert [status(gateway, {}), status(gateway, {"x-api-key": "sk-1"})] == [401, 400]
        monkeypatch.setattr(cc2api, "KEY_FILE_GRACE_S", 0.0)
        assert status(gateway, {}) == 400, "after a while it is meant so"
        monkeypatch.undo()
        keys.write_text("sk-1\n")
        assert status(gateway, {}) == 401


def rewrite_by_shell(keys: Path, text: str) -> None:
    lines = "; sleep 0.01; ".join(f"echo '{line}' >> keys" for line in text.splitlines())
    subprocess.run(["/bin/sh", "-c", f": > keys; {lines}"], cwd=keys.parent, check=True)


def rewrite_byte_by_byte(keys: Path, text: str) -> None:
    with keys.open("wb", buffering=0) as file:
        for number in text.encode():
            file.write(bytes([number]))


def rewrite_line_by_line(keys: Path, text: str) -> None:
    with keys.open("w") as file:
        for line in text.splitlines(keepends=True):
            file.write(line)
            file.flush()
            time.sleep(0.005)


def rewrite_in_place(keys: Path, text: str) -> None:
    with keys.open("r+") as file:
        file.truncate(0)
        file.write(text)


def remove_and_make(keys: Path, text: str) -> None:
    keys.unlink()
    keys.write_text(text)


def replace(keys: Path, text: str) -> None:
    other = keys.with_suffix(".new")
    other.write_text(text)
    other.replace(keys)


def test_nobody_gets_in_while_the_key_file_is_written(tmp_path: Path) -> None:
    """CC2API_TEST_REWRITES says how often; a thousand take a few minutes."""
    ways: list[Callable[[Path, str], object]] = [
        rewrite_by_shell,
        rewrite_byte_by_byte,
        rewrite_line_by_line,
        rewrite_in_place,
        remove_and_make,
        replace,
        Path.write_text,
    ]
    keys = tmp_path / "keys"
    text = "# the keys of the team\n\n# its first one\nsk-1 first\n"
    keys.write_text(text)
    is_over = threading.Event()

    with (
        InProcessGateway(tmp_path, keys=None) as gateway,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        gateway.gateway.keys.path = keys  # as the default one, but apart from the orders
        gateway.gateway.keys.load()

        def knock(headers: dict[str, str]) -> set[int]:
            statuses = set()
            while not is_over.is_set():
                statuses.add(status(gateway, headers))
            return statuses

        knocking = [pool.submit(knock, who) for who in ({}, {"x-api-key": "sk-2"})]
        for number in range(int(os.environ.get("CC2API_TEST_REWRITES", "28"))):
            ways[number % len(ways)](keys, text)
        is_over.set()
        seen = [knocker.result() for knocker in knocking]
    assert seen == [{401}, {401}]


def test_keys_may_end_in_bytes_that_unicode_takes_for_white_space(tmp_path: Path) -> None:
    keys = ["sk-\u00e0", "sk-\u0145", "sk-\u2000x"]  # in UTF-8 with 0xA0, 0x85 and 0x80
    (tmp_path / "apikeys.txt").write_text("\n".join(keys), "utf-8")
    with InProcessGateway(tmp_path) as gateway:
        for key in keys:
            raw = key.encode().decode("latin-1")
            assert status(gateway, {"x-api-key": raw}) == 400
            assert status(gateway, {"authorization": f"Bearer {raw}"}) == 400
            assert status(gateway, {"x-api-key": raw[:-1]}) == 401


def test_a_key_file_that_is_no_regular_file_closes_the_gateway(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "apikeys.txt")
    with InProcessGateway(tmp_path) as gateway:
        assert status(gateway, {"x-api-key": "sk-1"}) == 401
        assert "not a regular file" in gateway.gateway.keys.summary


def test_old_line_ends_other_letters_and_names_in_the_key_file(tmp_path: Path) -> None:
    (tmp_path / "apikeys.txt").write_bytes("sk-one mac\rsk-two\rsk-\u00e9 three\r".encode())
    with InProcessGateway(tmp_path) as gateway:
        for key in ("sk-one", "sk-two"):
            assert status(gateway, {"x-api-key": key}) == 400
        assert status(gateway, {"x-api-key": "mac"}) == 401
        raw = "sk-\u00e9".encode().decode("latin-1")
        assert status(gateway, {"x-api-key": raw}) == 400


def test_a_key_file_that_fails_again_is_logged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = cc2api.KeyFile(cc2api.Settings(keys=str(tmp_path / "keys")))
    for _ in range(2):
        keys.path.write_text("sk-1")
        assert keys.load() == {"sk-1": "\u2026"}
        keys.path.write_bytes(b"\xff")
        assert keys.load() is None
        assert keys.load() is None
    assert caplog.text.count("it is not UTF-8") == 2


def test_allow_open_opens_it(tmp_path: Path) -> None:
    with InProcessGateway(tmp_path, host="0.0.0.0", allow_open=True) as gateway:
        assert status(gateway, {}) == 400


@pytest.mark.parametrize(
    ("host", "needs"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.2", True),
        ("my-box", True),
    ],
)
def test_keys_are_needed_anywhere_but_on_loopback(host: str, needs: bool) -> None:
    assert cc2api.KeyFile(cc2api.Settings(host=host)).is_needed is needs
    assert cc2api.KeyFile(cc2api.Settings(host=host, allow_open=True)).is_needed is False


# ---- out of sight


def files_holding(word: bytes, *roots: Path) -> list[Path]:
    """Return the files below some directories that hold a word."""
    found = []
    for root in roots:
        for directory, _, names in os.walk(root):  # passes by what another test removes meanwhile
            for name in names:
                path = Path(directory) / name
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and word in path.read_bytes():
                        found.append(path)
    return found


@pytest.mark.parametrize("sign_in", ["key", "login"])
def test_nothing_of_a_request_is_in_argv_environment_files_or_log(
    start: Any, api: ScriptedApi, sign_in: str
) -> None:
    env = API_KEY if sign_in == "key" else LOGIN
    gateway: RunningGateway = start("--processes", "2", env=env)
    (gateway.dir / "apikeys.txt").write_text("sk-gateway-secret-1234\n")
    word = f"mark-{uuid4().hex}"
    gate = threading.Event()
    api.on(word, text_reply("a b", gate=gate, gate_after=3))
    fields = {"system": f"system {word}", "tools": [{"name": word[:20], "input_schema": {}}]}
    messages = [
        {"role": "user", "content": f"history {word}"},
        {"role": "assistant", "content": f"said {word}"},
        {"role": "user", "content": word},
    ]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        key = {"x-api-key": "sk-gateway-secret-1234"}
        answer = threads.submit(gateway.post, {"messages": messages, **fields}, key)
        assert api.wait_for(lambda: bool(api.calls_with(word)))
        temp = None
        for pid in gateway.children():
            for name in ("cmdline", "environ"):
                assert word.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
                assert b"sk-gateway" not in Path(f"/proc/{pid}/{name}").read_bytes()
            temp = Path(os.readlink(f"/proc/{pid}/cwd")).parent
        assert temp is not None
        roots = (gateway.dir, temp, Path("/tmp/claude-0"), Path("/tmp/claude"))
        assert files_holding(word.encode(), *roots) == []
        gate.set()
        assert answer.result().status == 200
    gateway.wait_for_log("status=200")
    wait_until(lambda: len(gateway.children()) == 2, "a spare and the kept process")
    assert files_holding(word.encode(), *roots) == []
    assert list(gateway.dir.rglob("*.jsonl")) == [], "no transcripts, no notes"
    log = "\n".join(gateway.log)
    assert word not in log
    assert "sk-gateway-secret" not in log
    assert "caller=…1234" in log


def test_user_settings_hooks_and_memory_do_not_reach_the_model(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.mkdir()
    ran = tmp_path / "ran"
    hook = {"hooks": [{"type": "command", "command": f"touch {ran}"}]}
    events = ("UserPromptSubmit", "SessionStart", "Stop")
    server = {"command": "touch", "args": [str(ran)]}
    (config / "settings.json").write_text(
        json.dumps({"hooks": {e: [hook] for e in events}, "outputStyle": "Explanatory"})
    )
    (config / ".claude.json").write_text(json.dumps({"mcpServers": {"evil": server}}))
    (config / "CLAUDE.md").write_text("MEMORY-OF-THE-USER")
    gateway = start(env={**LOGIN, "CLAUDE_CONFIG_DIR": str(config)})
    (gateway.dir / "CLAUDE.md").write_text("MEMORY-OF-THE-PROJECT")
    word = f"mark-{uuid4().hex}"
    assert gateway.ask(word).status == 200
    body = json.dumps(api.calls_with(word)[0].body)
    assert "MEMORY-OF" not in body
    assert '"tools": []' in body
    assert not ran.exists()


# ---- isolation


def test_interleaved_requests_show_nothing_of_each_other(start: Any, api: ScriptedApi) -> None:
    gateway = start("--max-concurrency", "4")

    def ask(number: int) -> str:
        word = f"mark{number}-{uuid4().hex}"
        fields: dict[str, Any] = {"max_tokens": 2000 + number}
        if number % 2:
            fields |= {"temperature": number / 100, "system": f"system {word}"}
            fields |= {"tools": [{"name": f"tool{number}", "input_schema": {"type": "object"}}]}
        if number % 3 == 0:
            fields |= {"stop_sequences": [f"stop{number}"], "effort": "low"}
        if number % 4 == 0:
            fields |= {"thinking": {"type": "adaptive"}}
        headers = {"anthropic-beta": f"beta-{number}"} if number % 2 == 0 else {}
        model = ("claude-sonnet-4-6", "claude-opus-4-6")[number % 2]
        messages = [
            {"role": "user", "content": f"first {word}"},
            {"role": "assistant", "content": f"second {word}"},
            {"role": "user", "content": f"third {word}"},
        ]
        answer = gateway.post({"model": model, "messages": messages, **fields}, headers)
        assert answer.status == 200
        (call,) = api.calls_with(word)
        body = call.body
        assert body["model"] == model
        assert body["max_tokens"] == fields["max_tokens"]
        assert len(body["messages"]) == 3
        assert body.get("temperature", 1) == fields.get("temperature", 1)
        assert body["tools"] == fields.get("tools", [])
        assert body.get("stop_sequences") == fields.get("stop_sequences")
        assert body.get("thinking") == fields.get("thinking")
        assert body["output_config"]["effort"] == fields.get("effort", "high")
        system = fields.get("system", "You are a helpful assistant.")
        assert body["system"][-1]["text"] == system
        betas = [b for b in call.headers["anthropic-beta"].split(",") if b.startswith("beta-")]
        assert betas == ([f"beta-{number}"] if headers else [])
        return word

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        words = list(threads.map(ask, range(8)))
    for word in words:
        seen = [call for call in api.calls if word in json.dumps(call.body)]
        assert len(seen) == 1, "in its own request and in no other"
