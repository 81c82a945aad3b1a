"""What the gateway tells of itself: status, health, metrics, the log, --check."""

from __future__ import annotations

import base64
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import (
    API_KEY,
    FAKE_CLAUDE,
    GATEWAY,
    InProcessGateway,
    RunningGateway,
    clean_environment,
    wait_until,
)

import cc2api

HTML = {"accept": "text/html,*/*"}


def metrics(gateway: Any, headers: dict[str, str] | None = None) -> dict[str, float]:
    """Return the samples of /metrics, checked for Prometheus' text format."""
    answer = gateway.request("GET", "/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    label = r'[a-z_]+="(?:[^"\\\n]|\\.)*"'
    sample = re.compile(rf"([a-z_0-9]+(?:{{(?:{label},?)*}})?) ([0-9.e+-]+)\Z")
    for line in answer.body.decode().splitlines():
        if not line.startswith("# "):
            match = sample.match(line)
            assert match, line
            found[match[1]] = float(match[2])
    return found


def test_an_answer_is_logged_with_its_times_and_its_end(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.ask("hello").status == 200
    line = gateway.wait_for_log("event=done")
    fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
    assert fields["stop_reason"] == "end_turn"
    waited, first, whole = (
        int(fields[name]) for name in ("waited_ms", "first_token_ms", "duration_ms")
    )
    assert waited <= first <= whole


def test_a_probe_for_another_servers_routes_is_logged_under_debug_alone(start_fake: Any) -> None:
    gateway = start_fake()
    assert gateway.request("GET", "/api/tags").status == 404
    assert gateway.request("POST", "/v1/message", {}).status == 404
    gateway.wait_for_log("path=/v1/message ")
    assert not any("/api/tags" in line for line in gateway.log)


def test_a_400_is_logged_with_its_field_and_no_word_of_the_clients(start_fake: Any) -> None:
    gateway = start_fake()
    schema = {"type": "object", "properties": {"my_secret": {"type": "secret"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    answer = gateway.request("POST", "/v1/chat/completions", asked)
    assert answer.status == 400
    assert "my_secret" in answer.json["error"]["param"]
    line = gateway.wait_for_log("event=done")
    assert "param=tools.0.function.parameters " in line
    assert "secret" not in line


def total(samples: dict[str, float], name: str, *parts: str) -> float:
    return sum(v for k, v in samples.items() if k.startswith(name) and all(p in k for p in parts))


# ---- status


def test_curl_is_told_the_state_in_plain_text(start_fake: Any) -> None:
    gateway = start_fake()
    wait_until(lambda: len(gateway.children()) == 1)
    gateway.ask("hello")
    gateway.post({"messages": []})
    gateway.wait_for_log("event=done", count=2)
    gateway.wait_for_log("error=invalid_request_error param=messages ")
    answer = gateway.request("GET", "/", headers={"accept": "*/*"})
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    lines = dict(line.split(maxsplit=1) for line in answer.body.decode().splitlines()[1:])
    assert lines["claude"].startswith("2.1.999 at /")
    assert lines["sign-in"] == "API key from ANTHROPIC_API_KEY: billed to the API"
    assert lines["keys"].startswith("open")
    assert re.fullmatch(r"\d spare, 1 idle, 0 busy", lines["processes"])
    assert lines["requests"] == "2, 1 failed, 0 waiting"
    assert lines["tokens"] == "1 input, 4 output, 0 cache_read, 0 cache_write"
    assert lines["health"] == "ok"
    done = subprocess.run(["bash", "-c", f"{lines['try']} -sS"], capture_output=True, check=True)
    assert b"from the fake" in done.stdout


def test_no_shell_acts_on_what_a_client_calls_the_host(start_fake: Any) -> None:
    gateway: RunningGateway = start_fake("--processes", "0")
    (gateway.dir / "apikeys.txt").write_text("sk-1\n")  # with keys any name will do
    key = {"x-api-key": "sk-1"}
    for host in ("[::1]:8080", "a-b.example:1"):
        assert (
            f"curl http://{host}/v1"
            in gateway.request("GET", "/", None, {"host": host, **key}).body.decode()
        )
    evil = {"host": "x';$(touch${IFS}y)|`z`&<>*?~!#%", **key}
    said = gateway.request("GET", "/", None, evil).body.decode()
    (tried,) = re.findall("^try +curl http://(.*)/v1/messages", said, re.MULTILINE)
    assert re.fullmatch(r"[\w.:\[\]-]+", tried, re.ASCII)


def test_a_browser_gets_a_page_that_loads_nothing_from_elsewhere(start_fake: Any) -> None:
    answer = start_fake().request("GET", "/", headers=HTML)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert b"http" not in answer.body


def test_keys_apply_to_all_but_healthz(start_fake: Any) -> None:
    gateway: RunningGateway = start_fake()
    (gateway.dir / "apikeys.txt").write_text("sk-a-long-key-1 laptop\n")
    for path in ("/", "/metrics", "/v1/models", "/api/hello"):
        assert gateway.request("GET", path).status == 401
        assert gateway.request("GET", path, headers={"x-api-key": "sk-a-long-key-1"}).status == 200
    assert gateway.request("GET", "/healthz").status == 200
    page = gateway.request("GET", "/", headers=HTML)
    assert (page.status, b"sk-" in page.body) == (200, False), "it asks for the key itself"


@pytest.mark.parametrize("with_keys", [True, False])
def test_no_header_gets_a_foreign_page_or_name_past_the_door(
    start_fake: Any, with_keys: bool
) -> None:
    gateway: RunningGateway = start_fake()
    if with_keys:
        (gateway.dir / "apikeys.txt").write_text("sk-a-long-key-1\n")
    body = {"messages": [{"role": "user", "content": "hi"}]}
    basic = base64.b64encode(b"me:sk-a-long-key-1").decode()
    for given in (f"Basic {basic}", "Basic x", "Bearer x", "Digest x"):
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            answer = gateway.post(body, {**headers, "authorization": given})
            assert answer.status == (401 if with_keys else 403)


def test_healthz_is_503_while_no_process_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.1)
    with InProcessGateway(tmp_path, processes=2) as gateway:
        wait_until(lambda: len(gateway.now.spare) == 1)
        assert gateway.request("GET", "/healthz").status == 200

        def fail(*args: Any) -> None:
            raise OSError("no more processes")

        with monkeypatch.context() as patch:
            patch.setattr(cc2api.Process, "__init__", fail)
            gateway.ask("hello")  # takes the spare
            wait_until(lambda: gateway.request("GET", "/healthz").status == 503)
            said = gateway.request("GET", "/healthz").json["error"]["message"]
            assert "no more processes" in said
        wait_until(lambda: gateway.request("GET", "/healthz").status == 200)


def test_healthz_is_503_while_processes_end_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SUPERVISOR_INTERVAL_S", 0.1)
    with InProcessGateway(tmp_path, orders="always-die", processes=2) as gateway:
        wait_until(lambda: gateway.request("GET", "/healthz").status == 503)
        (tmp_path / "always-die").unlink()
        wait_until(lambda: gateway.request("GET", "/healthz").status == 200)


# ---- metrics and names


def test_metrics_count_requests_tokens_and_times_by_name_never_by_key(start_fake: Any) -> None:
    gateway: RunningGateway = start_fake()
    (gateway.dir / "apikeys.txt").write_text('sk-a-long-key-1 my "laptop"\nsk-a-long-key-2\n')
    first, second = ({"x-api-key": f"sk-a-long-key-{number}"} for number in (1, 2))
    body = {"messages": [{"role": "user", "content": "hello"}]}
    assert gateway.post({**body, "stream": True}, first).status == 200
    assert gateway.post(body, second).status == 200
    assert gateway.post({"messages": []}, second).status == 400
    gateway.wait_for_log("event=done", count=3)
    samples = metrics(gateway, first)
    requests = "cc2api_requests_total"
    model = 'model="other"'  # this CLI lists none
    assert total(samples, requests, 'caller="my_laptop_"', 'status="200"', model) == 1
    assert total(samples, requests, 'caller="…ey-2"', 'route="messages"') == 2
    assert total(samples, "cc2api_tokens_total", 'kind="output"') == 8
    assert samples["cc2api_time_to_first_token_seconds_count"] == 2
    assert samples['cc2api_request_duration_seconds_bucket{route="messages",le="+Inf"}'] == 2
    assert samples['cc2api_processes{state="idle"}'] == 2
    assert samples["cc2api_waiting_requests"] == 0
    assert "sk-a-long-key" not in "".join(gateway.log) + "".join(samples)
    gateway.wait_for_log("caller=my_laptop_ ")


def test_the_cost_is_what_the_cli_reports(lone_gateway: RunningGateway, start: Any) -> None:
    ended = total(metrics(lone_gateway), "cc2api_cost_usd_total")
    lone_gateway.ask("what is the price of one?")
    wait_until(lambda: total(metrics(lone_gateway), "cc2api_cost_usd_total") > ended)
    one = total(metrics(lone_gateway), "cc2api_cost_usd_total") - ended
    gateway = start()
    for _ in range(3):
        gateway.ask("what is the price of one?")
    kept = total(metrics(gateway), "cc2api_cost_usd_total", 'caller="open"')
    assert kept in (pytest.approx(2 * one), pytest.approx(3 * one)), "when it is used next"


def test_made_up_models_cannot_fill_the_memory(start_fake: Any) -> None:
    gateway = start_fake()
    for number in range(30):
        gateway.post({"model": f"model-{number}", "messages": [{"role": "user", "content": "hi"}]})
    gateway.wait_for_log("event=done", count=30)
    samples = metrics(gateway)
    assert total(samples, "cc2api_requests_total", 'model="other"', 'status="200"') == 30
    assert not [name for name in samples if "model-" in name]


# ---- the log


def test_the_log_is_key_value(start_fake: Any) -> None:
    import concurrent.futures

    gateway = start_fake("--max-concurrency", "1")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answers = list(threads.map(gateway.ask, ["a while", "a while", "a while"]))
    assert [answer.status for answer in answers] == [200] * 3
    gateway.wait_for_log("event=done", count=3)
    gateway.wait_for_log("event=first_token", count=3)
    pair = r"[a-z_]+=(?:\"(?:[^\"\\]|\\.)*\"|\S+)"
    for line in gateway.log:
        assert re.fullmatch(rf"time=\S+ level=\w+ event=\w+(?: {pair})*", line), line


# ---- --check


def run_check(home: Path, *args: str, **env: str) -> tuple[int, dict[str, str]]:
    command = [sys.executable, str(GATEWAY), "--check", "--claude", str(FAKE_CLAUDE), *args]
    done = subprocess.run(
        command,
        env={**clean_environment(home, **API_KEY), **env},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    lines = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    return done.returncode, {name: f"{state} {text}" for name, state, text in lines}


def test_check_finds_all_in_order(tmp_path: Path) -> None:
    orders = {"FAKE_CLAUDE_ORDERS": str(tmp_path)}
    status, said = run_check(tmp_path, "--port", "0", **orders)
    assert status == 0
    assert list(said) == ["keys", "port", "upstream", "claude", "sign-in", "start"]
    assert all(text.startswith("ok ") for text in said.values())
    assert said["start"].endswith("can be used again")


def test_check_says_what_to_do(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    (tmp_path / "apikeys.txt").mkdir()
    (tmp_path / "always-die").touch()
    with taken:
        status, said = run_check(tmp_path, "--port", port, FAKE_CLAUDE_ORDERS=str(tmp_path))
    assert status == 1
    assert said["keys"] == (
        "FAIL NOBODY CAN CALL: apikeys.txt: it is not a regular file; see --keys and --allow-open"
    )
    assert said["port"] == (
        f"FAIL cannot listen on 127.0.0.1 port {port}: Address already in use;"
        " choose another with --port or --host"
    )
    assert said["start"].startswith("FAIL claude ended")
    status, said = run_check(tmp_path, "--claude", "/nowhere/claude")
    assert status == 1
    assert "pip install claude-agent-sdk" in said["claude"]


# ---- what is told, and when


def test_a_request_is_counted_when_its_log_line_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    counted: list[float] = []
    with InProcessGateway(tmp_path) as gateway:

        class Watch(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "event=done" in record.getMessage():
                    series = gateway.gateway.metrics.series("cc2api_requests_total")
                    counted.append(sum(count for _, count in series))

        watch = Watch()
        cc2api.log.addHandler(watch)
        try:
            gateway.ask("first")
            gateway.ask("second")
            wait_until(lambda: len(counted) == 2)
        finally:
            cc2api.log.removeHandler(watch)
    assert counted == [1, 2]


def test_after_an_update_of_the_cli_its_new_version_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "SIGN_IN_TTL_S", 0.0)
    program = tmp_path / "claude"
    program.write_text(FAKE_CLAUDE.read_text())
    program.chmod(0o755)
    with InProcessGateway(tmp_path, claude=str(program)) as gateway:
        assert "claude        2.1.999 at" in gateway.request("GET", "/").body.decode()
        newer = tmp_path / "newer"
        newer.write_text(program.read_text().replace("2.1.999", "2.2.0"))
        newer.chmod(0o755)
        newer.replace(program)
        assert "claude        2.2.0 at" in gateway.request("GET", "/").body.decode()
