"""Whether the prepared tokens are those of the rows' texts: nothing else, nothing twice, and the
right ones trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config, SourceConfig
from cs336_alignment.data.batching import collate
from cs336_alignment.data.formats import Example, to_example
from cs336_alignment.data.layout import detect_layout
from cs336_alignment.data.prepare import with_defaults
from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
from cs336_alignment.data.splits import PreparedData
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.errors import UserError
from cs336_alignment.training.invariances import Finding

Ids = list[int]


def check_tokens(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, config: Config, count: int
) -> Iterator[Finding]:
    """Tokenize the first rows again, text by text, and compare; yields two findings.

    Args:
        data: the training data, prepared.
        tokenizer: of the model.
        config: of the run.
        count: examples that are looked at.
    """
    numbers = range(min(count, len(data.dataset)))
    examples = [data.dataset[number] for number in numbers]
    rows = read_again(data, config, [data.places[number] for number in numbers])
    problems, notes = [], []
    pairs = [(e, row) for e, row in zip(examples, rows, strict=True) if row is not None]
    for example, row in pairs:
        problem, note = compare(example, row, tokenizer, config)
        problems += [f"{row.place}: {problem}"] if problem else []
        notes += [note] if note else []
    text = "; ".join(problems[:3] or dict.fromkeys(notes))
    name = "the rows' texts are the tokens trained"
    yield Finding(name, None, None, not problems if pairs else None, text)
    yield _check_padding(examples, tokenizer)


def read_again(data: PreparedData, config: Config, places: Sequence[str]) -> list[Example | None]:
    """Read and shape the rows at these places once more; None: not among the first source's."""
    path = data.sources[0].ledger.source
    named = next((s for s in config.data.sources if s.path == path), SourceConfig(path))
    named = with_defaults(named, config.data)
    rows = open_source(path, seed=config.seed, default_split="train").rows()
    layout, rows = detect_layout(rows, named, path)
    found: dict[str, Example] = {}
    for row in rows:
        if found.keys() >= set(places):
            break
        if isinstance(row, Row) and str(row.place) in places:
            with suppress(UserError):  # bad rows are the data step's business, and counted there
                found[str(row.place)] = to_example(
                    row, layout, data.sources[0].template, config.data.train_on
                )
    return [found.get(place) for place in places]


def compare(
    example: TokenizedExample, row: Example, tokenizer: PreTrainedTokenizerBase, config: Config
) -> tuple[str, str]:
    """Say what is wrong with an example's tokens, and what is worth a note; both may be empty."""
    length = len(example.input_ids)
    cut = length >= config.data.max_length and config.data.overlong in ("truncate", "split")
    if cut and config.data.overlong == "split":
        return "", "rows that may be split are not compared"
    if row.messages is not None:
        return "" if cut else _compare_conversation(row, example, tokenizer), ""
    if row.tokens is not None:
        ids, trained = list(row.tokens[0]), [weight > 0 for weight in row.tokens[1]]
        return _difference(example, ids[:length] if cut else ids, trained[:length]), ""
    assert row.texts is not None
    prompt, response = (_encode(tokenizer, text) for text in row.texts)
    prefix = special_prefix(tokenizer)
    if config.data.add_special_tokens and prompt[: len(prefix)] != prefix:
        prompt = prefix + prompt
    if config.data.append_eos and response[-1:] != [tokenizer.eos_token_id]:
        response = [*response, tokenizer.eos_token_id]
    trained = [config.data.train_on == "all"] * len(prompt) + [True] * len(response)
    ids = prompt + response
    exact = _decode(tokenizer, _encode(tokenizer, row.texts[1])) == row.texts[1]
    note = "" if exact else "warning: the tokenizer does not give a response's text back exactly"
    return _difference(example, ids[:length] if cut else ids, trained[:length]), note


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Give what the tokenizer puts before a text by itself; written anew, to be compared with."""
    alone, whole = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    return whole[:start]


def _difference(example: TokenizedExample, ids: Ids, trained: Sequence[bool]) -> str:
    """Compare tokens first, then which are trained; the first token is predicted by nothing."""
    got: Ids = example.input_ids.tolist()
    if got != ids:
        differing = (i for i, (a, b) in enumerate(zip(got, ids, strict=False)) if a != b)
        place = next(differing, min(len(got), len(ids)))
        return f"{len(got)} tokens instead of {len(ids)}, the first other one is token {place + 1}"
    mask = example.response_mask.tolist()
    wrong = [i + 1 for i in range(1, len(ids)) if mask[i] != trained[i]] + [1] * mask[0]
    if wrong:
        return f"trained, or not, against the text: tokens {', '.join(map(str, wrong[:5]))}"
    return ""


def _compare_conversation(
    row: Example, example: TokenizedExample, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The last reply must be trained whole if it is there whole, and its end with it."""
    assert row.messages is not None
    replies = [m for m in row.messages if m["role"] == "assistant" and m.get("train", True)]
    content = replies[-1].get("content") if replies else None
    if not isinstance(content, str) or not (text := content.strip()):
        return ""
    ids: Ids = example.input_ids.tolist()
    trained: Ids = example.input_ids[example.response_mask].tolist()
    if text in _decode(tokenizer, ids) and text not in _decode(tokenizer, trained):
        return "the last reply is not trained whole"
    special = set(tokenizer.all_special_ids)
    behind = ids[int(example.response_mask.nonzero()[-1]) + 1 :][:1]
    if trained[-1] not in special and special.intersection(behind):
        return "the special token that ends the last reply is not trained"
    return ""


def _check_padding(
    examples: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Padded rows must train each example's tokens, each predicted from the one before it."""
    batch = collate(examples, batching="padded")
    masks = [example.response_mask[1:] for example in examples]
    labels = torch.cat([e.input_ids[1:][m] for e, m in zip(examples, masks, strict=True)])
    before = torch.cat([e.input_ids[:-1][m] for e, m in zip(examples, masks, strict=True)])
    passed = torch.equal(batch.labels, labels) and torch.equal(
        batch.input_ids.flatten()[batch.response_index], before
    )
    is_eos = tokenizer.pad_token_id in (None, tokenizer.eos_token_id)
    text = "padding would be the EOS token: told apart by position" if is_eos else ""
    return Finding("padding hides no stop token", None, None, passed, text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
