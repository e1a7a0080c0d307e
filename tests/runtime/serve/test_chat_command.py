"""`seamwise chat` in a pseudo-terminal and from a pipe, against a server; a model loaded here answers alike."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pexpect
import pytest
from servers import Running

from seamwise.runtime.serve.chat_backends import LocalSpeaker, RemoteSpeaker
from seamwise.runtime.serve.commands.chat import Conversation

COMMAND = ["-P", "-m", "seamwise.runtime.serve.cli", "chat"]


def test_a_terminal_streams_keeps_history_and_ctrl_c_stops_the_answer(fake: Running, tmp_path: Path) -> None:
    fake.wait_ready()
    environment = {"TERM": "dumb", "PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    talk = pexpect.spawn(
        sys.executable, [*COMMAND, "--url", fake.url, "--max-tokens", "30", "--temperature", "0"],
        encoding="utf-8", timeout=60, env=environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a run in the background ignores
    )  # fmt: skip
    talk.expect("fake is ready")
    talk.expect(r"[^rt]> ")  # the prompt: behind <user> and <assistant> there is one too
    talk.sendline("hello")
    talk.expect("<user> hello")  # the fake engine repeats what it was given
    talk.expect(r"[^rt]> ")
    talk.sendline("/set max_tokens 500")
    talk.expect(r"[^rt]> ")
    talk.sendline("ZZZZZZZZZZ")  # each of its letters takes a fifth of a second
    talk.expect("Z\r?\n<user> hello|<user> hello")
    talk.sendintr()
    talk.expect(r"\[stopped\]")
    talk.expect(r"[^rt]> ")
    talk.sendline("/set max_tokens")
    talk.expect("! max_tokens: got ''")
    talk.sendline("/fly")
    talk.expect("! there is no command /fly")
    talk.sendline(f"/save {tmp_path / 'said.json'}")
    talk.expect("4 messages in")
    talk.expect(r"[^rt]> ")
    ended = 1
    while ended:  # the prompt is drawn a moment before the terminal is raw again, and hears it
        talk.sendcontrol("d")
        ended = talk.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=1)
    talk.close()
    assert talk.exitstatus == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert [m["role"] for m in said] == ["user", "assistant"] * 2 and said[0]["content"] == "hello"
    assert "hello" in (tmp_path / "seamwise" / "chat_history").read_text()


def test_a_pipe_is_answered_line_by_line(fake: Running) -> None:
    fake.wait_ready()
    lines = "hi\n/retry\n/undo\n/system Be kind.\nyes\n/quit\n"
    done = subprocess.run(
        [sys.executable, *COMMAND, "--url", fake.url, "--max-tokens", "9"], input=lines, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines()[1:] == ["<user> hi", "<user> hi", "<system> "]


def test_a_local_model_answers_and_forgets_what_was_stopped(demo_model: Path) -> None:
    speaker = LocalSpeaker(str(demo_model), {"max_num_seqs": 1, "max_model_len": 256})
    settings = {"temperature": 0.0, "max_tokens": 12}
    question = [{"role": "user", "content": "Which city is the capital of France?"}]
    first = "".join(speaker.answer(question, settings))
    stopped = speaker.answer(question, settings)
    assert first.startswith(next(stopped)) and "Paris" in first
    stopped.close()
    assert "".join(speaker.answer(question, settings)) == first
    with pytest.raises(ValueError, match=r"the model takes 256; /reset or /undo"):
        "".join(speaker.answer([{"role": "user", "content": "long " * 300}], settings))


def test_mistakes_leave_the_conversation_as_it_was(fake: Running, capsys: pytest.CaptureFixture[str]) -> None:
    fake.wait_ready()
    talk = Conversation(RemoteSpeaker(fake.url, None), {"temperature": 0.0, "max_tokens": 5000}, None)
    with pytest.raises(ValueError, match="nothing was said"):
        talk.take("/retry")
    with pytest.raises(ValueError, match="answers 400"):
        talk.settings["temperature"] = -1
        talk.take("hello")
    assert talk.messages == []
    with pytest.raises(ValueError, match="cannot be reached"):
        RemoteSpeaker("http://127.0.0.1:1", None)
