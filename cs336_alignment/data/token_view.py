"""Examples as a person looks at them before a token is trained: each token's text, and its part.

`view_tokens` makes the view and `print_examples` shows it on a terminal; `token_page` makes a page
of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.padding import Padding
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode

KINDS = ("trained", "context", "scaffold", "special")
# Highlighter, not coloured letters: trained spaces are seen too. Both colours are set, so it reads
# on a light terminal and on a dark one.
STYLES = {
    "trained": "#06263d on #b5dcff",
    "context": "",
    "scaffold": "dim italic",
    "special": "bold magenta",
}
MARKS = ("⟦⟧", "⟪⟫", "⦃⦄", "⁅⁆")  # around what is trained, where there are no colours
MAX_CONTEXT_LINES = 60
KEPT_LINES = 20  # of a folded context, at its start and at its end
INDENT = 2
# What would move a terminal's cursor, turn the reading direction or be seen as nothing. Joiners
# (U+200C, U+200D) stay: emoji and several scripts are written with them.
UNSEEN = (
    *range(0x7F, 0xA0), 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), 0x2060,
    *range(0x2066, 0x206A), 0xFEFF,
)  # fmt: skip
VISIBLE = {code: f"‹U+{code:04X}›" for code in UNSEEN} | {
    code: chr(0x2400 + code) for code in range(0x20)
}
VISIBLE |= {0x09: "⇥", 0x0A: "⏎\n"}


@dataclass(frozen=True)
class ViewedToken:
    """One token.

    Attributes:
        text: what it adds to the text; "" for the later pieces of a character of several tokens,
            whose first piece has all of it.
        token_id: its id.
        kind: `trained`, `context` (read only), `scaffold` (the template's) or `special` (a special
            token that is not trained).
        weight: of its loss; of meaning on trained tokens alone.
    """

    text: str
    token_id: int
    kind: str
    weight: float = 1.0


@dataclass(frozen=True)
class ViewedExample:
    """One example.

    Attributes:
        title: where it comes from and why it is shown.
        tokens: all of them, in order.
        findings: what is odd about it, a sentence each.
    """

    title: str
    tokens: tuple[ViewedToken, ...]
    findings: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return sum(token.kind == "trained" for token in self.tokens)

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens; 0 of an example without tokens."""
        return self.num_trained / max(self.num_tokens, 1)


def view_tokens(
    input_ids: Iterable[int],
    weights: Iterable[float],
    tokenizer: PreTrainedTokenizerBase,
    scaffold: Iterable[bool] | None = None,
) -> tuple[ViewedToken, ...]:
    """Give every token its text and kind.

    Args:
        input_ids: (L,) the example.
        weights: (L,) 0 where a token is only read, else it is trained.
        tokenizer: any Hugging Face tokenizer.
        scaffold: (L,) True on the template's own tokens; None: nowhere.

    Returns:
        L tokens; their texts joined are the example decoded, special tokens included.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "1": 1, "=": 2}, "<s>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        >>> view = view_tokens([0, 1, 2, 1], [0, 0, 0, 1], tokenizer)
        >>> [(token.text, token.kind) for token in view]
        [('<s>', 'special'), (' 1', 'context'), (' =', 'context'), (' 1', 'trained')]
    """
    ids = [int(token_id) for token_id in input_ids]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    scaffolding = [False] * len(ids) if scaffold is None else scaffold
    tokens = []
    for token_id, text, weight, is_scaffold in zip(
        ids, _texts(ids, tokenizer), weights, scaffolding, strict=True
    ):
        if weight > 0:
            kind = "trained"
        elif token_id in special:
            kind = "special"
        else:
            kind = "scaffold" if is_scaffold else "context"
        tokens.append(ViewedToken(text, token_id, kind, float(weight)))
    return tuple(tokens)


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut the decoded example into what each token adds to it.

    A token's text depends on those beside it: half a character decodes to �, the first word loses
    its space. So a token is decoded after the one before it, and what that adds counts once it is
    what the whole example has there; until then the next token joins it.
    """

    whole = decode(tokenizer, ids)
    texts = [""] * len(ids)
    before = start = done = 0  # the token in front, the first of those that wait, characters given
    known = ""  # ids[before:start] decoded
    for end in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[before:end])
        new = text[len(known) :]
        if not text.startswith(known) or not whole.startswith(new, done):
            continue
        texts[start] = new
        done += len(new)
        if new:
            before, known = start, decode(tokenizer, ids[start:end])
        start = end
    if ids:  # what never came to agree: a decoder that rewrites what it has said
        texts[min(start, len(ids) - 1)] += whole[done:]
    return texts


def print_examples(examples: Sequence[ViewedExample], out: RichConsole) -> None:
    """Print examples token by token, in colours or, where there are none, with marks around what is
    trained.

    Untrained stretches of over 60 lines are folded in their middle; what is trained is never.
    """
    plain = not out.is_terminal or out.no_color or out.color_system is None
    marks = _free_marks(examples) if plain else ""
    # Piped, a line of the data stays a line; on a terminal, words are not cut at the border.
    width = max(out.width - (0 if plain else INDENT), 20)
    out.print(_legend(marks), soft_wrap=plain)
    for example in examples:
        out.print()
        out.print(_header(example), soft_wrap=plain)
        for finding in example.findings:
            out.print(Text(f"! {_one_line(finding)}", style="yellow"), soft_wrap=plain)
        body = _body(example.tokens, marks, width)
        out.print(body if plain else Padding(body, (0, 0, 0, INDENT)), soft_wrap=plain)


def _free_marks(examples: Sequence[ViewedExample]) -> str:
    """Take the first pair of marks that no example contains, so that each one seen is a mark."""
    used = {sign for example in examples for token in example.tokens for sign in token.text}
    return next((pair for pair in MARKS if used.isdisjoint(pair)), MARKS[0])


def _legend(marks: str) -> Text:
    if marks:
        return Text(f"{marks[0]}trained{marks[1]}  the rest is only read  ⏎ line break")
    legend = Text()
    for kind in KINDS:
        legend.append(f" {kind} ", style=STYLES[kind]).append(" ")
    return legend.append(" ⏎ line break", style="dim")


def _header(example: ViewedExample) -> Text:
    numbers = (
        f"{example.num_tokens:,} tokens, {example.num_trained:,} trained "
        f"({example.trained_share:.1%})"
    )
    return Text.assemble((f"■ {_one_line(example.title)}", "bold"), "  ", (numbers, "dim"))


def _one_line(text: str) -> str:
    return text.translate(VISIBLE).replace("⏎\n", "⏎")


def _body(tokens: Sequence[ViewedToken], marks: str, width: int) -> Text:
    body = Text()
    for stretch in _stretches(tokens, width):
        if isinstance(stretch, int):
            line_break = "" if body.plain.endswith("\n") else "\n"
            body.append(f"{line_break}… {stretch:,} tokens hidden …\n", style="dim")
            continue
        text = "".join(token.text for token in stretch).translate(VISIBLE)
        kind, weight = stretch[0].kind, stretch[0].weight
        if kind != "trained":
            body.append(text, style=STYLES[kind])
            continue
        ending = "\n" if text.endswith("\n") else ""  # the end mark is not alone on the next line
        text = text.removesuffix(ending)
        body.append(f"{marks[0]}{text}{marks[1]}" if marks else text, style=STYLES[kind])
        body.append("" if weight == 1 else f"×{weight:.3g}", style="dim").append(ending)
    if body.plain.endswith("\n"):  # printing ends the line too
        body.right_crop(1)
    return body


def _stretches(tokens: Sequence[ViewedToken], width: int) -> Iterator[list[ViewedToken] | int]:
    """Give runs of one kind and weight in order, and a number for so many hidden tokens."""
    for trained, group in groupby(tokens, key=lambda token: token.kind == "trained"):
        if trained:
            for _, run in groupby(group, key=lambda token: token.weight):
                yield list(run)
            continue
        context = list(group)
        head, tail = _fold(context, width)
        for _, run in groupby(context[:head], key=lambda token: token.kind):
            yield list(run)
        if tail > head:
            yield tail - head
        for _, run in groupby(context[tail:], key=lambda token: token.kind):
            yield list(run)


def _fold(context: Sequence[ViewedToken], width: int) -> tuple[int, int]:
    """Find the tokens [head, tail) to hide of an untrained stretch; both its length if none."""
    line, column = 0, 0
    lines = []  # on which each token begins
    for token in context:
        lines.append(line)
        parts = token.text.translate(VISIBLE).split("\n")
        for index, part in enumerate(parts):
            column = cell_len(part) + (0 if index else column)
            line += column // width + (index < len(parts) - 1)
            column %= width
    if line < MAX_CONTEXT_LINES:
        return len(context), len(context)
    head = bisect_left(lines, KEPT_LINES)
    return head, max(head, bisect_right(lines, line - KEPT_LINES))
