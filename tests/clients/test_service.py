"""The README's nginx in front of two instances, and the page in a browser.

Needs nginx and Chromium, which `.ci/run` installs from Debian. The systemd unit is tried by
tests/test_docs.py.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Answer, Client, RunningGateway, clean_environment, wait_until
from helpers import free_port
from scripted_api import DEFAULT_TEXT, ScriptedApi, text_reply

pytest_plugins = "installing"

README = (ROOT / "README.md").read_text()


def block(kind: str) -> str:
    """Return the README's code block of a kind."""
    return str(re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)[0])


class Nginx(Client):
    """Debian's nginx with the README's configuration, but for ports, names and TLS."""

    def __init__(self, home: Path, ports: list[int]) -> None:
        self.port = free_port()
        config = block("nginx")
        for old, new in zip((8080, 8081), ports, strict=True):
            config = config.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        config = config.replace("listen 443 ssl;", f"listen 127.0.0.1:{self.port};")
        config = re.sub(r" *ssl_certificate.*\n", "", config)
        config = config.replace("claude.example.com", "127.0.0.1")
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temp = "".join(f"{name}_temp_path {home}/{name};\n" for name in paths)
        file = home / "nginx.conf"
        file.write_text(
            f"daemon off; pid {home}/pid; error_log {home}/error.log;\n"
            f"events {{}}\nhttp {{ access_log off; {temp} {config} }}\n"
        )
        path = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
        assert path, "nginx is needed: apt-get install nginx-light"
        self._process = subprocess.Popen(
            [path, "-c", str(file), "-p", str(home), "-e", str(home / "error.log")]
        )
        wait_until(self._listens)

    def _listens(self) -> bool:
        assert self._process.poll() is None, "nginx ended"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Nginx:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.mark.uncounted  # a killed gateway does not tell of the requests that it had
def test_nginx_with_two_instances_one_killed_in_mid_load(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    instances: list[RunningGateway] = [start("--processes", "4") for _ in range(2)]

    with Nginx(tmp_path, [instance.port for instance in instances]) as nginx:

        def ask(number: int) -> Answer | Exception:
            if number == 30:
                instances[0].process.send_signal(signal.SIGKILL)
            try:
                return nginx.post(
                    {
                        "messages": [{"role": "user", "content": f"question {number}"}],
                        "stream": number % 2 == 0,
                    },
                    {"x-api-key": f"key-{number % 10}"},
                )
            except (
                OSError,
                http.client.HTTPException,
            ) as exc:  # a connection that was cut, which every SDK retries
                return exc

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(ask, range(100)))
        good = [a for a in answers if isinstance(a, Answer) and a.status == 200]
        whole = [a for a in good if DEFAULT_TEXT.split()[-1].encode() in a.body]
        bad = [a for a in answers if not (isinstance(a, Answer) and a.status == 200)]
        assert len(whole) >= 92
        # what did not get through was under way in the killed one: at most those at once
        assert len(bad) <= 8
        assert all(a.status in (502, 504) for a in bad if isinstance(a, Answer))
        later = [nginx.ask(f"later {number}").status for number in range(4)]
        assert later == [200] * 4


def test_nginx_hands_tokens_on_as_they_are_made(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    gate = threading.Event()
    api.on("through nginx", text_reply("first second", gate=gate, gate_after=3))
    instance = start()
    with Nginx(tmp_path, [instance.port, free_port()]) as nginx:
        connection = nginx.connect()
        messages = [{"role": "user", "content": "through nginx"}]
        body = {"model": "m", "max_tokens": 9, "stream": True, "messages": messages}
        connection.request("POST", "/v1/messages", json.dumps(body))
        response = connection.getresponse()
        seen = b""
        while b"first" not in seen:
            seen += response.read1()
        gate.set()
        assert b"message_stop" in seen + response.read()
        connection.close()


PAGE_SCRIPT = """
import sys
from playwright.sync_api import expect, sync_playwright
url, chromium, prompt, expected, shot = sys.argv[1:]
with sync_playwright() as p:
    browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 900, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("sign-in")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#answer")).to_have_text(expected)
    expect(page.locator("#status")).to_contain_text("1 idle")
    expect(page.locator("#end")).to_contain_text("end_turn, 42 tokens")
    assert page.locator("#model option").count() > 2
    page.screenshot(path=shot)
    browser.close()
print(problems)
"""


def test_a_prompt_streams_in_the_page(start: Any, playwright: Path, tmp_path: Path) -> None:
    """Open the page in headless Chromium, type a prompt, send it, and take a screenshot."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "Chromium is needed: apt-get install chromium"
    gateway = start()
    shot = Path(os.environ.get("CC2API_TEST_SCREENSHOT", tmp_path / "page.png"))
    words = [gateway.url, chromium, "Hello!", DEFAULT_TEXT, str(shot)]
    command = [str(playwright / "python"), "-c", PAGE_SCRIPT, *words]
    environment = clean_environment(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n", "errors in the page"
    assert shot.stat().st_size > 10_000
