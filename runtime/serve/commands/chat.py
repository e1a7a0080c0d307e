"""`seamwise chat`: talk to a model in the terminal, loaded here or served elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from seamwise import caches
from seamwise.extras import pip_install
from seamwise.runtime.serve.chat_backends import LocalSpeaker, Message, RemoteSpeaker, Speaker

from .options import Commands, add_command, engine_loading, engine_options, model_options

_HELP = """/help            this
/reset           forget the conversation
/retry           answer the last question again
/undo            forget the last question and its answer
/system TEXT     what the model is told first; without a text: nothing
/set NAME VALUE  temperature, top_p, max_tokens or seed; without a name: show them
/save FILE       write the conversation as JSON; /load FILE reads it
/quit            end (or Ctrl-D); Ctrl-C stops an answer"""
_SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


def add(commands: Commands[Any]) -> None:
    parser = add_command(commands, "chat", run, "talk to a model in the terminal")
    model_options(parser, required=False)
    engine_options(parser)
    parser.add_argument("--url", help="talk to the server at this address instead of loading a model")
    parser.add_argument("--api-key", help="the key that the server wants")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=1024)


def run(options: argparse.Namespace) -> int:
    """Talk until /quit or the end of the input."""
    if (options.url is None) == (options.model is None):
        raise ValueError("wanted --model (a model to load) or --url (a server), one of them")
    speaker: Speaker
    if options.url is not None:
        speaker = RemoteSpeaker(options.url, options.api_key)
    else:
        speaker = LocalSpeaker(options.model, {"max_num_seqs": 1, **engine_loading(options)})
    conversation = Conversation(speaker, {name: getattr(options, name, None) for name in _SETTINGS}, options.system)
    print(f"{speaker.name} is ready; /help lists the commands, Ctrl-D ends")
    for line in _lines():
        if line.strip():
            try:
                if not conversation.take(line.strip()):
                    return 0
            except (ValueError, OSError) as error:
                print(f"! {error}")
    return 0


def _lines() -> Iterator[str]:
    """Yield lines from the terminal, with editing and history; from a pipe as they are."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: {pip_install('serve')}") from error
    home = caches.cache_dir()
    caches.make_private(home)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(home / "chat_history")))
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


class Conversation:
    """What was said, and the commands on it."""

    def __init__(self, speaker: Speaker, settings: dict[str, Any], system: str | None) -> None:
        self.speaker, self.settings, self.system = speaker, settings, system
        self.messages: list[Message] = []

    def take(self, line: str) -> bool:
        """Answer a line or obey a command; return whether to go on. Raises ValueError for what cannot be done."""
        if not line.startswith("/"):
            self.messages.append({"role": "user", "content": line})
            self._answer()
            return True
        command, _, rest = line[1:].partition(" ")
        obey = getattr(self, f"_{command}_command", None)
        if command in ("quit", "exit"):
            return False
        if obey is None:
            raise ValueError(f"there is no command /{command}; /help lists them")
        obey(rest.strip())
        return True

    def _answer(self) -> None:
        """Stream an answer; Ctrl-C stops it, and what was said stays."""
        said: list[str] = []
        head: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        pieces = self.speaker.answer([*head, *self.messages], {k: v for k, v in self.settings.items() if v is not None})
        try:
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (ValueError, OSError):
            self.messages.pop()  # the question that cannot be answered
            raise
        finally:
            pieces.close()
        print()
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _help_command(self, rest: str) -> None:
        print(_HELP)

    def _reset_command(self, rest: str) -> None:
        self.messages.clear()

    def _undo_command(self, rest: str) -> None:
        if not self.messages:
            raise ValueError("nothing was said yet")
        del self.messages[-2:]

    def _retry_command(self, rest: str) -> None:
        if not self.messages:
            raise ValueError("nothing was said yet")
        self.messages.pop()
        self._answer()

    def _system_command(self, rest: str) -> None:
        self.system = rest or None

    def _set_command(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            print("  ".join(f"{key} {value}" for key, value in self.settings.items()))
            return
        if name not in _SETTINGS:
            raise ValueError(f"there is no setting {name!r}; there are: {', '.join(_SETTINGS)}")
        try:
            self.settings[name] = _SETTINGS[name](value)
        except ValueError:
            raise ValueError(f"{name}: got {value!r}, wanted a number") from None

    def _save_command(self, rest: str) -> None:
        Path(rest or "chat.json").write_text(json.dumps(self.messages, ensure_ascii=False, indent=1))
        print(f"{len(self.messages)} messages in {rest or 'chat.json'}")

    def _load_command(self, rest: str) -> None:
        read = json.loads(Path(rest or "chat.json").read_text())
        if not isinstance(read, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in read):
            raise ValueError(f"{rest}: wanted a list of messages with role and content")
        self.messages = read
