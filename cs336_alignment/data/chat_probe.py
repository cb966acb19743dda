"""What a chat template writes around turns, found by rendering small conversations of our own."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.spans import TurnEnd

PROBE = "xyzzyQ7"  # a content that no template writes by itself
ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": PROBE}
TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


class Habits(NamedTuple):
    """What a chat template does with any conversation.

    Attributes:
        end: finds the end of what is trained of a turn.
        header: what stands between a question and the answer to it; empty if that is not clear.
        keeps_turns: whether a plain turn is written in the same way when more follow.
        joiner: what it puts between the text parts of a content.
    """

    end: TurnEnd
    header: str
    keeps_turns: bool
    joiner: str


def probe_template(tokenizer: PreTrainedTokenizerBase) -> Habits:
    """Find the habits of a tokenizer's chat template."""

    def render(*messages: dict[str, Any]) -> str:
        """Render a conversation; nothing if the template refuses it."""
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
        except TEMPLATE_ERRORS:
            return ""

    asked, text = render(ASKED), render(ASKED, ANSWER)
    before, _, tail = text.partition(PROBE)
    is_clear = text.count(PROBE) == 1
    end = TurnEnd(tokenizer, tail if is_clear else None)
    has_header = is_clear and asked and text.startswith(asked)
    turn, found, _ = text.partition(PROBE + end.stop)
    keeps_turns = bool(found) and render(ASKED, ANSWER, ASKED).startswith(turn + found)
    parts = [{"type": "text", "text": f"{PROBE}{i}"} for i in range(2)]
    # Anything but white space is the list itself, written out by a template for strings.
    between = re.search(rf"{PROBE}0(\s*){PROBE}1", render({"role": "user", "content": parts}))
    header = before[len(asked) :] if has_header else ""
    return Habits(end, header, keeps_turns, between[1] if between else "")
