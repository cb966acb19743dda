"""Chatting at the keyboard or through a pipe: questions, commands, and Ctrl-C.

Replies go to standard output, all that is told about them to standard error.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import FrameType

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.chat import Conversation, Reply

HELP = """/reset        forget the conversation (the system message stays)
/system TEXT  set the system message; without TEXT: none
/save FILE    append the conversation to FILE, as rows that data.train_path takes
/help         this
/exit         leave, as Ctrl-D does
Ctrl-C during a reply ends the reply, and otherwise leaves. A line that begins with / is a command;
put a space before it to ask it."""

Show = Callable[[str], None]
Answer = Callable[[list[int], int, Show, Callable[[], bool]], Reply]


@dataclass
class ChatSession:
    """One chat, from the first question to the end.

    Args:
        conversation: empty.
        answer: (prompt tokens, number of the turn, show, interrupted) → reply.
        context: positions of the model, None if unknown.
        max_new_tokens: of a reply, to say when one is cut.
    """

    conversation: Conversation
    answer: Answer
    _: KW_ONLY
    context: int | None
    max_new_tokens: int
    _asked: int = field(default=0, init=False)
    _replying: bool = field(default=False, init=False)
    _interrupted: bool = field(default=False, init=False)

    def run(self) -> ExitStatus:
        """Take lines until there are no more, `/exit`, or Ctrl-C between replies (130)."""
        with self._own_interrupts():
            try:
                for line in _lines():
                    if not line.strip():
                        continue
                    if not line.startswith("/"):
                        self._ask(line.strip())
                    elif not self._command(line):
                        break
            except KeyboardInterrupt:
                tell("")
                return ExitStatus.INTERRUPTED
        return ExitStatus.DONE

    @contextmanager
    def _own_interrupts(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        if not self._replying or self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _ask(self, question: str) -> None:
        try:
            prompt_ids = self.conversation.prompt_ids(question)
        except UserError as error:
            tell(f"{error.message}; the question is not asked")
            return
        if not prompt_ids:
            tell("the tokenizer makes no token of that; the question is not asked")
            return
        if self.context is not None and len(prompt_ids) >= self.context:
            tell(
                f"the conversation has {len(prompt_ids):,} tokens with this question, and the "
                f"model's context {self.context:,}: nothing is forgotten unasked, /reset begins "
                "anew"
            )
            return
        self._interrupted, self._replying = False, True
        try:
            reply = self.answer(prompt_ids, self._asked, _show, lambda: self._interrupted)
        finally:
            self._replying = False
        _show("\n")
        self._asked += 1
        if reply.stopped == "interrupted":
            tell("(stopped; what was said stays in the conversation)")
        elif reply.stopped == "length" and self._fills_context(prompt_ids):
            tell(f"(cut: the model's context of {self.context:,} tokens is full; /reset)")
        elif reply.stopped == "length":
            tell(f"(cut: evaluation.max_new_tokens={self.max_new_tokens})")
        self.conversation.turns.append((question, reply.text))

    def _fills_context(self, prompt_ids: list[int]) -> bool:
        return self.context is not None and (len(prompt_ids) + self.max_new_tokens > self.context)

    def _command(self, line: str) -> bool:
        """Obey a command; False ends the chat."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/help":
            tell(HELP)
        elif name == "/reset":
            self.conversation.turns.clear()
            tell("the conversation is empty")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/save":
            self._save(rest)
        else:
            tell(f"there is no command {name}; /help lists them")
        return True

    def _set_system(self, text: str) -> None:
        if self.conversation.template is not None:
            tell(
                f"the template {self.conversation.template.name} has no place for a system message"
            )
            return
        if not text:
            self.conversation.system = None
            tell("there is no system message")
            return
        try:
            if not self.conversation.reads_system(text):
                tell("the chat template ignores a system message; it is not set")
                return
        except UserError as error:
            tell(f"{error.message}; the system message is not set")
            return
        self.conversation.system = text
        tell("the system message is set")

    def _save(self, name: str) -> None:
        rows = self.conversation.rows()
        if not name or not rows:
            tell("/save needs a file: /save chat.jsonl" if not name else "there is nothing to save")
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(text)
        except (OSError, ValueError) as failure:  # ValueError: a name with a null character
            tell(f"cannot write {name}: {getattr(failure, 'strerror', None) or failure}")
            return
        count = f"{len(rows)} conversation{'s' if len(rows) > 1 else ''}"
        tell(f"appended {count} to {name}, in the format `messages`")


def _lines() -> Iterator[str]:
    """Yield what is typed, or what a pipe holds, without line ends."""
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):  # a byte that is no UTF-8 must not end the chat
            sys.stdin.reconfigure(errors="replace")
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history for `input`
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def _show(text: str) -> None:
    print(text, end="", flush=True)


def tell(text: str) -> None:
    """Print a line beside the replies."""
    with suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)
