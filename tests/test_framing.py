"""HTTP without holes: heads, bodies and connections, as hostile as they come."""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import InProcessGateway, RunningGateway, wait_until
from hypothesis import given, settings, strategies as st

import cc2api

HOST = b"Host: localhost\r\n"
BODY = json.dumps({"model": "m", "max_tokens": 0}).encode()  # fails on messages: 400, no child


class Fed(cc2api.ClientStream):
    """A stream that is fed piece by piece; at the end of the pieces the client is gone."""

    def __init__(self, pieces: list[bytes]) -> None:
        ours, self.theirs = socket.socketpair()
        super().__init__(ours, send_timeout_s=1)
        self._pieces = list(pieces)

    def readinto(self, buffer: Any) -> int:
        if not self._pieces:
            raise cc2api.ClientGone
        piece = self._pieces.pop(0)
        count = min(len(piece), len(buffer))
        buffer[:count] = piece[:count]
        self._pieces[:0] = filter(None, [piece[count:]])
        return count

    def close(self) -> None:
        self._sock.close()
        self.theirs.close()


def read_all(pieces: list[bytes]) -> list[Any]:
    """Return what a connection reads, request after request, and how it ends."""
    stream = Fed(pieces)
    seen: list[Any] = []
    try:
        while True:
            seen.append(stream.read_head(1))
            stream.parse_framing(seen[-1])
            seen.append(stream.read_body())
    except cc2api.ClientGone:
        seen.append("gone")
    except cc2api.ApiError as error:
        seen.append((error.status, str(error)))
    finally:
        stream.close()
    return seen


GOOD = [
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    b"\r\nGET /x?y=1 HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\ncontent-length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"3\r\nabc\r\n0A;ext=1\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n",
    b"GET http://h/ HTTP/1.1\r\nHost: h\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
]
BAD = [
    (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 400),
    (b"get / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET http:///x HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET http://user@h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET http://h/ HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\nHost: h\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nA\r: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length : 5\r\n\r\nhello", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n folded\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nA: \x00\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nno colon\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\nA:" + b" " * 60_000 + b"\x00\r\n\r\n", 400),  # at once
    (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: h\r\n" + (b"A: " + b"b" * 900 + b"\r\n") * 90 + b"\r\n", 431),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x5\r\n\r\nhello", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5, 5\r\n\r\nhello", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: \xb2\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 33554433\r\n\r\n", 413),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n", 400),
    (b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
]
CHUNKED = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD += [
    (CHUNKED + body, status)
    for body, status in [
        (b"x\r\n", 400),
        (b"-1\r\n", 400),
        (b"3\r\nabcd\r\n", 400),
        (b"3\nabc\n", 400),
        (b"fffffffff\r\n", 400),
        (b"2000001\r\n", 413),
        (b"1" * 70_000, 431),
        (b"0\r\n" + b"a: b\r\n" * 102 + b"\r\n", 431),
    ]
]


@pytest.mark.parametrize("raw", GOOD)
def test_good_requests_are_read_whole_or_byte_by_byte_or_joined(raw: bytes) -> None:
    whole = read_all([raw])
    assert whole[-1] == "gone"
    assert read_all([raw[i : i + 1] for i in range(len(raw))]) == whole
    assert read_all([raw + raw]) == [*whole[:-1], *whole]


TARGETS = [
    (b"http://a.b:81/v1/models?x=http://c/", "/v1/models", "a.b:81"),
    (b"HTTPS://a.b", "/", "a.b"),
    (b"http://a.b?x=/y", "/", "a.b"),
    (b"/http://c/", "/http://c/", "h"),
    (b"/a%20b?c", "/a b", "h"),
]


@pytest.mark.parametrize(("target", "path", "host"), TARGETS)
def test_a_target_is_a_path_or_a_whole_address(target: bytes, path: str, host: str) -> None:
    head = read_all([b"GET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n"])[0]
    assert (head.path, head.get("host")) == (path, host)


@pytest.mark.parametrize(("raw", "status"), BAD, ids=lambda value: str(value)[:50])
def test_bad_framing_is_refused(raw: bytes, status: int) -> None:
    assert read_all([raw])[-1][0] == status
    if len(raw) < 1000:
        assert read_all([raw[i : i + 1] for i in range(len(raw))])[-1][0] == status


def test_a_chunked_body_arrives_joined() -> None:
    assert read_all([GOOD[3]])[1] == b"abc0123456789"


pieces_of_http = st.sampled_from(
    [
        *(b"GET / HTTP/1.1\r\n", b"POST /v1/messages HTTP/1.1\r\n", b"Host: h\r\n", b"\r\n"),
        *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"abc", b"3\r\n", b"0\r\n"),
        *(b"A: b\r\n", b"\r", b"\n", b" ", b"\x00", b"\xff", b":", b"-"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(pieces_of_http, st.binary(max_size=5)), max_size=12), st.data())
def test_split_input_reads_as_joined_input(pieces: list[bytes], data: st.DataObject) -> None:
    raw = b"".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=8)))
    split = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)]) if a < b]
    joined = read_all([raw] if raw else [])
    assert read_all(split) == joined
    assert read_all([raw[i : i + 1] for i in range(len(raw))]) == joined


# ---- on a running gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessGateway]:
    with InProcessGateway(tmp_path_factory.mktemp("orders")) as running:
        yield running


def talk(port: int, data: bytes) -> bytes:
    """Send bytes and return all that comes until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts = iter(lambda: sock.recv(65536), b"")
        return b"".join(parts)


@pytest.mark.parametrize(("raw", "status"), BAD, ids=lambda value: str(value)[:50])
def test_bad_framing_is_answered_in_json_and_closed(
    gateway: InProcessGateway, raw: bytes, status: int
) -> None:
    said = talk(gateway.port, raw.replace(b"Host: h\r\n", HOST).replace(b" / ", b" /v1/messages "))
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    assert json.loads(body)["type"] == "error"


@pytest.mark.parametrize("path", [b"/", b"/nope", b"/v1/messages"])
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"DELETE"])
def test_a_body_that_nobody_reads_is_never_taken_for_a_request(
    gateway: InProcessGateway, method: bytes, path: bytes
) -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
    head = method + b" " + path + b" HTTP/1.1\r\n" + HOST
    length = b"Content-Length: %d\r\n" % len(smuggled)
    for lengths in (length, b"Content-Length: 0\r\n" + length, b"Content-Length:\r\n" + length):
        said = talk(gateway.port, head + lengths + b"\r\n" + smuggled)
        assert said.count(b"HTTP/1.1 ") == 1


def test_a_flooding_client_does_not_hold_its_place(
    gateway: InProcessGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "LINGER_S", 0.3)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as sock:
        sock.sendall(b"bad\r\n")
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as it happens
            send_for_ever(sock)


def send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"x" * 10_000)


def test_a_chunked_request_is_answered(gateway: InProcessGateway) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    said = talk(gateway.port, (head + chunked) * 2)
    assert said.count(b"HTTP/1.1 400 ") == 2, "both requests of the connection"
    assert said.count(b"messages: Field required") == 2


def test_pipelined_requests_are_answered_in_order(gateway: InProcessGateway) -> None:
    one = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    two = b"GET /nope HTTP/1.1\r\n" + HOST + b"\r\n"
    said = talk(gateway.port, one + two + one)
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"404", b"200"]


def test_a_bad_length_is_logged_with_its_own_method_and_path(
    gateway: InProcessGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cc2api")
    talk(gateway.port, b"POST /v1/messages HTTP/1.1\r\n" + HOST + b"Content-Length: x\r\n\r\n")
    wait_until(lambda: "event=done" in caplog.text)
    assert "method=POST path=/v1/messages" in caplog.text
    assert "status=400" in caplog.text


def test_http_1_0_gets_a_body_that_ends_with_the_connection(gateway: InProcessGateway) -> None:
    body = json.dumps(
        {
            "model": "m",
            "max_tokens": 1,
            "stream": True,
            "messages": [{"role": "user", "content": "x"}],
        }
    ).encode()
    head = b"POST /v1/messages HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    said = talk_open(gateway.port, head + body)
    assert b"transfer-encoding" not in said
    assert said.endswith(b'data: {"type": "message_stop"}\n\n')


def talk_open(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_expect_100_continue_is_answered_first(gateway: InProcessGateway) -> None:
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST
    head += b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as sock:
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_no_header_is_built_from_client_text(gateway: InProcessGateway) -> None:
    said = talk(gateway.port, b"GET /%0d%0aX-Evil:%20yes HTTP/1.1\r\n" + HOST + b"\r\n")
    assert b"evil" not in said.partition(b"\r\n\r\n")[0].lower()


def test_150_half_open_connections_disturb_nobody(
    gateway: InProcessGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(cc2api, "BODY_TIMEOUT_S", 0.5)
    starts = [
        b"",
        b"GET / HT",
        b"POST /v1/messages HTTP/1.1\r\n" + HOST + b"Content-Length: 99\r\n\r\n{",
    ]
    halves = []
    for number in range(150):
        sock = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
        sock.sendall(starts[number % 3])
        halves.append(sock)
    assert gateway.ask("hello").status == 200
    for number, sock in enumerate(halves):
        said = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))  # type: ignore[misc]
        assert (b"408" in said) == (number % 3 == 2)
        sock.close()


def test_beyond_the_cap_connections_are_turned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with InProcessGateway(tmp_path) as gateway:
        monkeypatch.setattr(cc2api, "MAX_CONNECTIONS", threading.active_count() + 3)
        held = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(3)]
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as fourth:
            assert fourth.recv(10) == b""
        for sock in held:
            sock.close()

        def is_open() -> bool:
            try:
                return gateway.request("GET", "/").status == 200
            except OSError:
                return False

        wait_until(is_open)


def test_a_kept_connection_is_closed_when_idle(
    gateway: InProcessGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cc2api, "IDLE_CONNECTION_S", 0.3)
    started = time.monotonic()
    said = talk_open(gateway.port, b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert said.count(b"HTTP/1.1") == 1
    assert time.monotonic() - started < 5


def test_an_early_answer_to_a_long_body_is_not_lost(gateway: RunningGateway) -> None:
    answer = gateway.request("POST", "/nope", b"x" * 5_000_000)
    assert answer.status == 404
