"""The directories that processes run in: the same after a restart, private, made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from additions import split_additions
from harness import API_KEY, LOGIN, RunningGateway, files_in, is_running, leftovers, wait_until
from scripted_api import Reply, ScriptedApi, text_reply

import cc2api


def additions_to(api: ScriptedApi, gateway: Any, **fields: Any) -> list[str]:
    """Ask a question; return what the CLI added to it."""
    word = f"mark-{uuid4().hex}"
    api.on(word, text_reply("yes"))
    answer = gateway.ask(word, **fields)
    assert answer.status == 200, answer.json
    (call,) = api.calls_with(word)
    return split_additions(call.body["messages"])[1]


def root_in(parent: Path) -> Path:
    return parent / f"cc-{os.getuid()}"


def workplace(parent: Path) -> cc2api.Workplace:
    return cc2api.Workplace(parent, parent / "config")


def test_after_a_restart_and_in_another_gateway_the_additions_are_the_same(
    start: Any, api: ScriptedApi, login_gateway: RunningGateway
) -> None:
    models = ("claude-sonnet-4-6", "claude-sonnet-5-5")
    first = start(env=LOGIN)
    seen = [[additions_to(api, each, model=m) for m in models] for each in (first, login_gateway)]
    assert first.stop() == 0
    again = start(env=LOGIN)
    seen.append([additions_to(api, again, model=model) for model in models])
    assert all(seen[0])
    assert seen == [seen[0]] * 3


def test_a_cleaner_that_removes_the_directories_costs_nothing(
    start: Any, api: ScriptedApi, tmp_path: Path
) -> None:
    """Many systems remove what lies in the temporary directory for ten days."""
    gateway = start("--processes", "2", env={**LOGIN, "TMPDIR": str(tmp_path)})
    before = additions_to(api, gateway)
    wait_until(lambda: "1 spare, 1 idle" in gateway.request("GET", "/").body.decode())
    shutil.rmtree(root_in(tmp_path))
    assert additions_to(api, gateway) == before  # by a process that ran there
    word = f"mark-{uuid4().hex}"
    for number in range(2):  # by the spare that was there, and by new ones
        headers = {"x-api-key": f"caller {number}"}
        answer = gateway.post({"messages": [{"role": "user", "content": word}]}, headers)
        assert answer.status == 200
        assert split_additions(api.calls_with(word)[-1].body["messages"])[1] == before
    assert not any("level=error" in line for line in gateway.log), gateway.log


def test_the_directories_are_private_and_one_goes_with_its_gateway(
    start: Any, tmp_path: Path
) -> None:
    gateway = start(env={**API_KEY, "TMPDIR": str(tmp_path)})
    wait_until(lambda: len(gateway.children()) == 1)
    root = root_in(tmp_path)
    assert {path.name[:4] for path in root.iterdir()} == {"work", "tmp-"}
    for path in (root, *root.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o700
    assert gateway.stop() == 0
    assert [path.name for path in root.iterdir()] == ["work"]


def run_tool_loops(gateway: RunningGateway, api: ScriptedApi, count: int) -> None:
    """Run steps of tools, of which some fail, and answers whose process is killed."""
    tool = {"name": "secret_name", "input_schema": {"type": "object"}}
    for number in range(count):
        word = f"mark-{uuid4().hex}"
        use = {"type": "tool_use", "id": f"toolu_{word}", "name": "secret_name", "input": {}}
        api.on(word, Reply(blocks=[use], stop_reason="tool_use"))
        result: dict[str, Any] = {"type": "tool_result", "tool_use_id": use["id"], "content": "no"}
        messages: list[dict[str, Any]] = [{"role": "user", "content": word}]
        first = gateway.post({"messages": messages, "tools": [tool]})
        assert first.status == 200, first.json
        messages.append({"role": "assistant", "content": [use]})
        messages.append({"role": "user", "content": [{**result, "is_error": number % 2 == 0}]})
        assert gateway.post({"messages": messages, "tools": [tool]}).status == 200
    for pid in gateway.children()[:1]:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: pid not in gateway.children())  # type: ignore[misc]


@pytest.mark.parametrize("sign_in", [API_KEY, LOGIN], ids=["key", "login"])
def test_requests_leave_no_files_and_a_killed_gateway_none_for_good(
    start: Any, api: ScriptedApi, tmp_path: Path, sign_in: dict[str, str]
) -> None:
    home, parent = tmp_path / "home", tmp_path / "tmp"
    for path in (home, parent):
        path.mkdir()
    env = {**sign_in, "TMPDIR": str(parent), "HOME": str(home)}
    env["CLAUDE_CONFIG_DIR"] = str(home / ".claude")

    def files(gateway: RunningGateway) -> int:
        assert gateway.ask("hello").status == 200
        wait_until(lambda: len(gateway.children()) == 2, "a spare and an idle one")
        return leftovers(gateway, home, parent)

    gateway = start("--processes", "2", env=env)
    run_tool_loops(gateway, api, 2)
    before = files(gateway)
    for _ in range(1):
        run_tool_loops(gateway, api, 2)
    wait_until(lambda: files(gateway) <= before, "no more files than before")
    assert not any("secret_name" in Path(path).name for path in files_in(home, parent))

    children = gateway.children()
    gateway.process.kill()
    gateway.process.wait()
    wait_until(lambda: not any(map(is_running, children)), "they end with it")
    again = start("--processes", "2", env=env)
    wait_until(lambda: files(again) <= before, "what the killed one left is gone")
    assert len(list(root_in(parent).glob("tmp-*"))) == 1


def test_the_directory_of_a_running_gateway_is_not_removed(tmp_path: Path) -> None:
    first, second, dead = (workplace(tmp_path) for _ in range(3))
    for each in (dead, first, second):
        each.prepare()
    (first.temp_dir / "file").touch()
    dead._unlock()  # as its end would
    workplace(tmp_path).prepare()
    assert (first.temp_dir / "file").exists()
    assert second.temp_dir.exists()
    assert not dead.temp_dir.exists()


@pytest.mark.parametrize("name", ["", "work"])
@pytest.mark.parametrize("what", ["a link", "a file", "open to others"])
def test_a_directory_that_is_not_the_users_own_is_refused(
    tmp_path: Path, what: str, name: str
) -> None:
    place = root_in(tmp_path) / name
    place.parent.mkdir(mode=0o700, exist_ok=True)
    if what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(OSError, match="must be a directory that is yours alone"):
        workplace(tmp_path).prepare()


def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace(tmp_path).prepare()
    other = os.getuid() + 1
    root_in(tmp_path).rename(tmp_path / f"cc-{other}")
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(OSError, match="must be a directory that is yours alone"):
        workplace(tmp_path).prepare()


def test_a_refused_directory_is_told_and_requests_recover(start: Any, tmp_path: Path) -> None:
    place = root_in(tmp_path)
    place.symlink_to(tmp_path)
    gateway = start(env={**API_KEY, "TMPDIR": str(tmp_path)})
    answer = gateway.ask("hello")
    assert answer.status == 503
    assert f"{place} must be a directory" in answer.json["error"]["message"]
    place.unlink()
    wait_until(lambda: gateway.ask("hello").status == 200)
    assert json.dumps(str(place)) not in gateway.ask("hello").body.decode()
