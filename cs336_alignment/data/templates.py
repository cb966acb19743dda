"""Prompt templates: text with a place for the question or instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cs336_alignment.errors import UserError

PLACEHOLDER = re.compile(r"\{(question|instruction|input)\}")
CHAT = "chat"  # no template of ours: the tokenizer's own, see `cs336_alignment.data.chat`
WITH_INPUT = "_input"  # the template beside `alpaca` for rows that have an input


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with one placeholder, `{question}` or `{instruction}`.

    Attributes:
        name: of the template, or the path of its file.
        text: with the placeholder.
        text_with_input: for rows that also have an input, with a second placeholder `{input}`;
            None if it takes none.
    """

    name: str
    text: str
    text_with_input: str | None = None

    @property
    def tagged(self) -> bool:
        """Whether the prompt opens a `<think>` that the response must close."""
        return self.text.rstrip().endswith("<think>")  # editors end files with a newline

    def fill(self, value: str, extra: str | None = None) -> str:
        """Put a question or instruction, and an input, in their places; braces in them stay as
        they are.
        """
        text = self.text if extra is None else self.text_with_input
        assert text is not None
        return PLACEHOLDER.sub(lambda found: (extra or "") if found[1] == "input" else value, text)


def load_template(name: str) -> PromptTemplate | None:
    """Load a template of the package (`r1_zero`, `question_only`, `alpaca`) or a user's `.prompt`
    file; None for `chat`, the tokenizer's own.

    Raises:
        UserError: no such template (78, or 66 for a file), or not exactly one placeholder in it
            (65).
    """
    if name == CHAT:
        return None
    folder = resources.files("cs336_alignment.data") / "templates"
    with_input = None
    if name.endswith(".prompt"):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(
                "D110", f"cannot read the prompt template {name}: {failure}"
            ) from failure
        if "{input}" in text:
            text, with_input = text.replace("{input}", ""), text
    elif (shipped := folder / f"{name}.prompt").is_file() and "/" not in name:
        text = shipped.read_text(encoding="utf-8")
        beside = folder / f"{name}{WITH_INPUT}.prompt"
        with_input = beside.read_text(encoding="utf-8") if beside.is_file() else None
    else:
        names = sorted(Path(str(item)).stem for item in folder.iterdir())
        raise UserError(
            "C105",
            f"there is no prompt template {name}",
            expected=", ".join([*(n for n in names if not n.endswith(WITH_INPUT)), CHAT])
            + ", or the path of a .prompt file",
            hint="data.prompt_template=r1_zero",
        )
    if len(PLACEHOLDER.findall(text)) != 1:
        raise UserError(
            "D111",
            f"the prompt template {name} needs exactly one placeholder",
            expected="{question} or {instruction}, once (and {input} for rows that have one)",
        )
    return PromptTemplate(name, text, with_input)
