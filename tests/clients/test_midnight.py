"""Over midnight: a conversation that goes on is told the new date with the message that comes then.

On the real CLI with a login, whose clock `faketime` (Debian's package) sets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from additions import split_additions
from harness import LOGIN, InProcessGateway
from scripted_api import ScriptedApi
from test_reuse import Talk

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), Path("faketime"))
WRAPPER = """#!/bin/sh
export LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={clock}
export FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DISABLE_SHM=1
exec {claude} "$@"
"""
NEWS = "The date has changed. Today's date is now 2026-03-02."


@pytest.mark.parametrize("model", ["claude-sonnet-4-6", "claude-sonnet-5-5"])
def test_the_new_date_is_told_once_and_what_was_said_before_stays(
    tmp_path: Path, api: ScriptedApi, claude: str, model: str
) -> None:
    clock, wrapper = tmp_path / "clock", tmp_path / "claude"
    wrapper.write_text(WRAPPER.format(library=FAKETIME, clock=clock, claude=claude))
    wrapper.chmod(0o755)
    clock.write_text("@2026-03-01 23:59:00")
    settings: dict[str, Any] = {"claude": str(wrapper), "base_url": api.url, "env": LOGIN}
    with InProcessGateway(tmp_path, processes=2, max_concurrency=1, **settings) as gateway:
        talk = Talk(gateway, api, model=model)
        before = talk.say("before midnight")["messages"]
        assert "Today's date is 2026-03-01" in "".join(split_additions(before)[1])

        clock.write_text("@2026-03-02 00:01:00")
        at_midnight = talk.say("after midnight")["messages"]
        later = talk.say("later")["messages"]

        assert at_midnight[: len(before)] == before
        assert json.dumps(at_midnight[len(before) :]).count(NEWS) == 1
        assert later[: len(at_midnight)] == at_midnight
        assert NEWS not in json.dumps(later[len(at_midnight) :])

        # A replay is told the new date from the start, with the first message.
        del talk.messages[1:]
        talk.messages[0]["content"] = "another beginning"
        talk.messages.append({"role": "assistant", "content": "yes"})
        replayed = talk.say("again")["messages"]
        assert "Today's date is 2026-03-02" in "".join(split_additions(replayed)[1])
