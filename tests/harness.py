"""Starting a gateway as its user does, in an environment built from nothing, and talking to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import cc2api

JsonObject = dict[str, Any]
ROOT = Path(__file__).parent.parent
GATEWAY = ROOT / "cc2api.py"
FAKE_CLAUDE = Path(__file__).parent / "fake_claude.py"
WAIT_S = 20.0  # for anything that must happen; generous, since these machines are noisy


def real_claude() -> str:
    """Return the CLI under test: CC2API_TEST_CLAUDE, else the one in the `test` extra."""
    if path := os.environ.get("CC2API_TEST_CLAUDE"):
        return path
    import claude_agent_sdk

    return str(Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude")


def clean_environment(
    home: Path, base_url: str = "http://127.0.0.1:9", **more: str
) -> dict[str, str]:
    """Return an environment built from nothing: no login, no key, no address but loopback."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "CLAUDE_CONFIG_DIR": str(home / "claude-config"),
        "ANTHROPIC_BASE_URL": base_url,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


API_KEY = {"ANTHROPIC_API_KEY": "sk-ant-dummy"}
LOGIN = {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-dummy"}


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[JsonObject]:
        """The events of an SSE body, checked for their framing."""
        frames = self.body.decode("ascii").split("\n\n")
        assert frames.pop() == "", "the last frame must end with a blank line"
        events = []
        for frame in frames:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            events.append(event)
        return events


# Routes on which one request is one call upstream, and a log line of one.
ASKING = ("messages", "chat_completions", "responses")
_ASKED = re.compile(r'event=done .*path="?[\w/]*/(messages|chat/completions|responses)"? ')


class Client:
    """What can be asked of a gateway that listens on a port of this machine."""

    port: int
    started: ClassVar[list[Client]] = []  # all of this process, with those that have ended

    def answered(self) -> int:
        """Return how many requests to ASKING routes it has answered, whatever the answer."""
        raise NotImplementedError

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """Make one request; `body` may be bytes or anything JSON can hold."""
        used = connection or self.connect()
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            used.request(method, path, data, headers or {})
            response = used.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            if connection is None:
                used.close()

    def post(self, body: Any, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """POST to /v1/messages; the usual fields are filled in."""
        if isinstance(body, dict):
            body = {"model": "claude-sonnet-4-6", "max_tokens": 100, **body}
        return self.request("POST", "/v1/messages", body, headers, **more)

    def ask(self, text: str, **fields: Any) -> Answer:
        """Ask one question."""
        return self.post({"messages": [{"role": "user", "content": text}], **fields})


class RunningGateway(Client):
    """A gateway process: `with RunningGateway(...) as gateway`."""

    def __init__(
        self,
        *args: str,
        claude: str | None = None,
        base_url: str = "http://127.0.0.1:9",
        env: dict[str, str] | None = None,
    ) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="gateway-test-")
        self.dir = Path(self._dir.name)
        # As the command that pip installs does: an imported module is compiled only once.
        script = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport cc2api\nsys.exit(cc2api.main())"
        )
        command = [sys.executable, "-c", script, "--port", "0", *args]
        if "--claude" not in args:
            command += ["--claude", claude or real_claude()]
        self.process = subprocess.Popen(
            command,
            env=clean_environment(self.dir, base_url, **(API_KEY if env is None else env)),
            cwd=self.dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._answered = 0
        self._log_grew = threading.Condition()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.banner = self._read_banner()
        found = re.search(r"listens on http://\S+?:(\d+)$", self.banner, re.MULTILINE)
        if not found:
            self.stop()
            raise RuntimeError(f"no gateway: {self.banner} {self.log}")
        self.port = int(found.group(1))
        self.url = f"http://127.0.0.1:{self.port}"
        self.started.append(self)  # only now: a gateway that did not start answers nothing

    def _read_banner(self) -> str:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("  try"):
                break
        return "".join(lines)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._log_grew:
                self.log.append(line.rstrip("\n"))
                self._answered += bool(_ASKED.search(line))
                self._log_grew.notify_all()

    def __enter__(self) -> RunningGateway:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(WAIT_S)
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
            self._dir.cleanup()
        return status

    def wait_for_log(self, text: str, count: int = 1) -> str:
        """Wait until `count` log lines hold `text`; return the last of them."""
        deadline = time.monotonic() + WAIT_S
        with self._log_grew:
            while len(hits := [line for line in self.log if text in line]) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"{text!r} is not in the log: {self.log}"
                self._log_grew.wait(left)
        return hits[-1]

    def answered(self) -> int:
        return self._answered

    def children(self) -> list[int]:
        """Return the pids of the gateway's children that are not zombies."""
        return children_of(self.process.pid)


class Snapshot(NamedTuple):
    """The pids of a pool's processes by state, and how many requests wait."""

    spare: list[int]
    starting: list[int]
    idle: list[int]
    busy: list[int]
    ending: list[int]
    waiting: int


class InProcessGateway(Client):
    """A gateway in this process, for tests that look into it. On the fake CLI where not told."""

    def __init__(
        self,
        tmp_path: Path,
        orders: str = "",
        *,
        claude: str = str(FAKE_CLAUDE),
        base_url: str = "http://127.0.0.1:9",
        env: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """Start it; `orders` are files for the fake CLI, made before the first one starts."""
        for order in orders.split():
            (tmp_path / order).touch()
        more = {"FAKE_CLAUDE_ORDERS": str(tmp_path), **(API_KEY if env is None else env)}
        self.environ = clean_environment(tmp_path, base_url, **more)
        self.cli = cc2api.find_cli(claude, self.environ)
        self.settings = cc2api.Settings(**{"port": 0, "processes": 0, **settings})
        self.server = cc2api.Server((self.settings.host, 0), cc2api.Handler)
        # The key file that is looked for where none is named; this process stays where it is.
        with mock.patch.object(cc2api, "DEFAULT_KEY_FILE", str(tmp_path / "apikeys.txt")):
            self.gateway = cc2api.Gateway(self.settings, self.cli, self.environ)
        self.server.serve(self.gateway)
        self.port = self.server.server_port
        self.started.append(self)  # only now: a gateway that did not start answers nothing

    def answered(self) -> int:
        counts = self.gateway.metrics.series("cc2api_requests_total")
        return int(sum(count for labels, count in counts if labels["route"] in ASKING))

    @property
    def now(self) -> Snapshot:
        """How the pool is."""
        pids, waiting = self.gateway.pool.snapshot()
        return Snapshot(**pids, waiting=waiting)

    def __enter__(self) -> InProcessGateway:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.gateway.close()


def children_of(pid: int) -> list[int]:
    """Return the live child processes of a process (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    """Say whether there is such a process, and it has not ended (Linux)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def files_in(*roots: Path) -> set[str]:
    """Return the paths of all that is no directory below some directories."""
    return {
        os.path.join(directory, name)
        for root in roots
        for directory, _, names in os.walk(root)
        for name in names
    }


def leftovers(gateway: RunningGateway, *roots: Path) -> int:
    """Count the files that are not named after a process of the gateway's that runs."""
    running = {str(pid) for pid in gateway.children()}
    return sum(Path(path).name.split(".")[0] not in running for path in files_in(*roots))


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Poll a condition that nothing can signal, such as the state of another process."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)


@contextlib.contextmanager
def environment_dir() -> Iterator[Path]:
    """Yield a temporary HOME."""
    with tempfile.TemporaryDirectory(prefix="home-test-") as name:
        yield Path(name)
