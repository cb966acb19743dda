"""The letter that a response to a multiple-choice question chooses, or none: never by a guess."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cs336_alignment.data.choices import LETTERS
from cs336_alignment.evaluation.final_answer import OPENING, marked_answer

_AMBIGUOUS = "?"
_COMMAND = re.compile(r"\\(?:text|math|box|fbox)[a-z]*\s?\{([^{}]*)\}")
_EDGES = " \n*_`$\"'“”‘’.,;:!"
_ALONE = re.compile(r"[(\[{]?([A-Ja-j])[)\]}]?")
# "B. Paris", "(B) Paris", "b) Paris"; "A man" has no sign after the letter
_WITH_TEXT = re.compile(r"(?:[(\[]([A-Ja-j])[)\]][.:]?|([A-J])[.):]|([a-j])\)) ?(?P<text>\S.*)")
_OPENING = re.compile(
    r"\b(?:(?:answer|option|choice)(?: (?:choice|option|letter))?[ *_]{0,4}"
    r"(?:is|would be|should be|must be|:|=)|choose|pick|select|go with|opt for)"
    r"[ \n:*_$]{0,6}(?:the )?(?:option|choice|letter|answer)?[ \n:*_`$\"'“‘]{0,6}",
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?:([A-J])|[(\[{]?([A-Ja-j])[)\]}])(?![A-Za-z0-9'’_+#^-])")
_JUDGED = re.compile(
    r"(?:^|[.!?\n:;,] ?|\b(?:option|choice|answer|so|thus|hence|therefore|that|only) )"
    r"[(\[*_]{0,3}([A-J])[)\]*_]{0,3} (?:is|would be|must be) (?:the |clearly |definitely )?"
    r"(?:only |most |single )?(?:correct|right|best)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"([^\n]{1,300}?)(?=\.(?:\s|$)|\n|$)")
_DENIED = re.compile(
    r"(?:\b(?:if|suppose|assum\w+|whether|not|never|wrong|incorrect|false)\b|n['’]t)[^.!?,;:\n]{0,25}$",
    re.IGNORECASE,
)
# What may follow a letter that is the answer. "The answer is A dog" goes on with a word.
_FOLLOWS = re.compile(
    r"[\s*_`$\"'”’]*(?:$|[.,;:!?)\]}(—–\n-]|(?:because|since|as|which|for|due|with|and|but)\b)"
)
_ANOTHER = re.compile(
    r"[\s*_`$)\]]*(?:,|/|&|\bor\b|\band\b)[\s*_`$(\[]*(?:or |and )?[(\[]?[A-HJ](?![\w'’])"
)


def chosen_letter(response: str, choices: Sequence[str] = ()) -> str | None:
    """Find the choice that a response makes.

    What it marks (`<answer> B </answer>`, `\\boxed{B}`, `#### B`) comes first, then its last
    statement of an answer (`the correct answer is B`, `Answer: (B)`, `I choose B`, `B is correct`),
    then a response, or a first or last line of it, that is a letter (`B`, `(B)`, `B.`, `B. Paris`)
    or the text of a choice.

    Args:
        response: what the model wrote.
        choices: the texts of the choices, where they are known.

    Returns:
        A capital letter; None where the response chooses none, or several.

    Example:
        >>> chosen_letter("It rains, so the correct answer is (B).")
        'B'
        >>> chosen_letter("A dog is an animal.") is None
        True
        >>> chosen_letter("Paris", ["London", "Paris"])
        'B'
    """
    letter = _chosen(response, choices)
    known = LETTERS[: len(choices)] if choices else LETTERS
    return letter if letter is not None and letter in known else None


def _chosen(response: str, choices: Sequence[str]) -> str | None:
    marked = marked_answer(response)
    if marked is not None or OPENING in response:
        letter = None if marked is None else _whole_or_stated(marked, choices)
        if letter is not None or OPENING in response:
            return None if letter == _AMBIGUOUS else letter
    text = _plain(response)
    stated = _stated(text, choices)
    if stated is not None:
        return None if stated == _AMBIGUOUS else stated
    if letter := whole_letter(text, choices):
        return letter
    lines = [line for line in text.split("\n") if line.strip(_EDGES)]
    found = {letter for line in lines if (letter := whole_letter(line, ()))}
    ends = [whole_letter(line, choices) for line in (*lines[:1], *lines[-1:])]
    letters = {letter for letter in ends if letter} | found
    return letters.pop() if any(ends) and len(letters) == 1 else None


def whole_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """Read a text that is nothing but a choice: its letter, its letter and text, or its text.

    Args:
        text: to read.
        choices: the texts of the choices, where they are known.
    """
    text = _plain(text).strip(_EDGES)
    letter, said = None, _letter_of_text(text, choices)
    if alone := _ALONE.fullmatch(text):
        letter = alone[1].upper()
    elif found := _WITH_TEXT.fullmatch(text):
        letter = (found[1] or found[2] or found[3]).upper()
        said = _letter_of_text(found["text"], choices)
    if letter is not None and said is not None and letter != said:
        return None  # "A. Paris" where Paris is B
    return letter or said


def _letter_of_text(text: str, choices: Sequence[str]) -> str | None:
    """Give the letter of the one choice that has this text, but for case, spaces and edges."""

    def bare(words: str) -> str:
        return " ".join(words.split()).casefold().strip(_EDGES)

    texts = [bare(choice) for choice in choices]
    return LETTERS[texts.index(bare(text))] if texts.count(bare(text)) == 1 else None


def _whole_or_stated(text: str, choices: Sequence[str]) -> str | None:
    return whole_letter(text, choices) or _stated(_plain(text), choices)


def _stated(text: str, choices: Sequence[str]) -> str | None:
    """Give the letter of the last statement of an answer, `_AMBIGUOUS` if that names several."""
    last = (-1, "")
    for opening in _OPENING.finditer(text):
        if _is_denied(text, opening.start()):
            continue
        rest = text[opening.end() : opening.end() + 300]
        found, sentence = _LETTER.match(rest), _SENTENCE.match(rest)
        letter = _letter_of_text(sentence[1], choices) if sentence else None
        if found:
            after = rest[found.end() :]
            if _ANOTHER.match(after):
                letter = _AMBIGUOUS
            elif found[2] or _FOLLOWS.match(after):
                letter = (found[1] or found[2]).upper()
        if letter is not None:
            last = (opening.end(), letter)
    for judged in _JUDGED.finditer(text):
        if judged.start(1) > last[0] and not _is_denied(text, judged.start()):
            last = (judged.start(1), judged[1].upper())
    return last[1] or None


def _is_denied(text: str, end: int) -> bool:
    return _DENIED.search(text[max(0, end - 40) : end]) is not None


def _plain(text: str) -> str:
    """Take LaTeX's text commands, runs of spaces and empty lines out."""
    for _ in range(3):
        text = _COMMAND.sub(r"\1", text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
