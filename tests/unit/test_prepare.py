"""The data step: every row is trained as it should be, or accounted for, or named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cs336_alignment.config import DataConfig
from cs336_alignment.data import prepare as module
from cs336_alignment.data.prepare import PreparedData, TokenizedDataset, prepare
from cs336_alignment.errors import ExitStatus, UserError, UserErrors

TokenizerOf = Callable[..., PreTrainedTokenizerFast]
BOS, EOS = 1, 2


def pair(num_prompt: int, num_response: int) -> dict[str, str]:
    """A row of this many words."""
    return {"prompt": "1 " * num_prompt, "response": "2 " * num_response}


@pytest.fixture
def run(tmp_path: Path, tokenizer_of: TokenizerOf) -> Callable[..., PreparedData]:
    """Prepare rows, or the raw content of a file."""

    def prepared(
        rows: list[dict[str, Any]] | bytes,
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_examples: int | None = None,
        **config: Any,
    ) -> PreparedData:
        path = tmp_path / "rows.jsonl"
        raw = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(raw)
        return prepare(
            str(path), DataConfig(str(path), **config), tokenizer or tokenizer_of(template="<s> $A"),
            seed=0, split="train", max_examples=max_examples,
        )  # fmt: skip

    return prepared


Run = Callable[..., PreparedData]


def tokens(data: PreparedData) -> list[tuple[list[int], list[int]]]:
    """The ids of each example, and its trained ids."""
    found = [data.dataset[i] for i in range(len(data.dataset))]
    return [(e.input_ids.tolist(), e.input_ids[e.response_mask].tolist()) for e in found]


def test_prompt_with_its_prefix_then_response_with_eos(run: Run) -> None:
    data = run([{"prompt": "1 + 2 =", "response": "3"}, {"prompt": "a", "response": "b c"}])
    assert tokens(data) == [
        ([BOS, 5, 14, 6, 15, 7, EOS], [7, EOS]),
        ([BOS, 16, 17, 18, EOS], [17, 18, EOS]),
    ]
    assert data.dataset.lengths == (7, 5) and data.dataset.response_lengths == (2, 3)
    assert [e.prompt for e in data.examples] == ["1 + 2 =", "a"]
    assert data.dataset[1].example_id == 1


@pytest.mark.parametrize(
    "options", [{}, {"pad": None}, {"pad": "</s>"}, {"template": "<s> $A </s>"}]
)
def test_eos_is_trained_whatever_the_pad_token_is(
    options: dict[str, Any], run: Run, tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of(**{"template": "<s> $A", **options})
    assert tokens(run([pair(1, 1)], tokenizer)) == [([BOS, 5, 6, EOS], [6, EOS])]


def test_eos_is_not_doubled(run: Run) -> None:
    rows = [{"prompt": "1", "response": r} for r in ("2 </s>", "2 </s> 2", "</s>")]
    assert [trained for _, trained in tokens(run(rows))] == [[6, EOS], [6, EOS, 6, EOS], [EOS]]


def test_without_eos_and_prefix(run: Run) -> None:
    data = run([pair(1, 1)], append_eos=False, add_special_tokens=False)
    assert tokens(data) == [([5, 6], [6])]
    assert data.ledger.ends_with_eos == 0


def test_a_tokenizer_without_eos_is_refused_unless_none_is_wanted(
    run: Run, tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of(eos=False)
    with pytest.raises(UserError, match="no EOS token") as caught:
        run([pair(1, 1)], tokenizer)
    assert caught.value.status == ExitStatus.BAD_CONFIG
    assert tokens(run([pair(1, 1)], tokenizer, append_eos=False)) == [([5, 6], [6])]


def test_the_template_shapes_questions(run: Run) -> None:
    row = {"question": "1 + 2 =", "answer": "a <<1+2=3>>b\n#### 3"}
    data = run([row], prompt_template="question_only")
    assert tokens(data)[0][0][:5] == [BOS, 5, 14, 6, 15]
    assert run([row]).examples[0].response == " a b </think> <answer> 3 </answer>"
    assert data.examples[0].ground_truth == "3"


LONG = [pair(2, 2), pair(2, 5), pair(9, 1), pair(3, 3)]  # 6, 9, 12 and 8 tokens with <s> and </s>


def test_overlong_examples_are_dropped_and_counted(run: Run) -> None:
    data = run(LONG, max_length=8)
    assert data.dataset.lengths == (6, 8), "8 of 8 tokens is not too long"
    assert data.examples[1].place.line == 4
    assert data.ledger.dropped == {"overlong": 2} and data.ledger.truncated == 0
    assert data.ledger.ends_with_eos == 2


def test_overlong_examples_are_truncated_without_eos(run: Run) -> None:
    data = run(LONG, max_length=8, overlong="truncate")
    assert tokens(data)[1] == ([BOS, 5, 5, 6, 6, 6, 6, 6], [6] * 5), "no EOS where the text goes on"
    assert data.dataset.lengths == (6, 8, 8)
    assert data.ledger.truncated == 1 and data.ledger.ends_with_eos == 2
    assert data.ledger.dropped == {"prompt_fills_max_length": 1}


def test_a_prompt_that_fills_max_length(run: Run) -> None:
    rows = [pair(n, 3) for n in (5, 6, 7, 8, 9)]  # prompts of 6 to 10 tokens
    data = run(rows, max_length=8, overlong="truncate")
    assert data.dataset.lengths == (8, 8) and data.dataset.response_lengths == (2, 1)
    assert data.ledger.dropped == {"prompt_fills_max_length": 3}


def test_overlong_examples_are_all_named(run: Run) -> None:
    with pytest.raises(UserErrors) as caught:
        run(LONG, max_length=8, overlong="error")
    assert caught.value.status == 65 and caught.value.total == 2
    assert [(e.code, e.place.line) for e in caught.value.errors if e.place] == [
        ("D302", 2),
        ("D302", 3),
    ]
    assert "got: 12 tokens, 10 of them prompt" in str(caught.value)
    assert len(run(LONG, max_length=12, overlong="error").dataset) == 4


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_nothing_left_is_65(overlong: str, run: Run) -> None:
    with pytest.raises(UserError, match=r"no example of .*rows\.jsonl is left") as caught:
        run(LONG, max_length=3, overlong=overlong)
    assert (caught.value.code, caught.value.status) == ("D301", 65)
    assert "4 rows read, dropped: {" in (caught.value.got or "")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_65(content: bytes, run: Run) -> None:
    with pytest.raises(UserError, match="is left") as caught:
        run(content)
    assert caught.value.status == 65 and "0 rows read" in (caught.value.got or "")


def test_a_missing_file_is_66(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(UserError, match="no file") as caught:
        prepare(
            "nowhere.jsonl", DataConfig(), tokenizer_of(), seed=0, split="train", max_examples=None
        )
    assert caught.value.status == 66


def test_a_response_without_tokens_is_dropped_and_counted(
    run: Run, tokenizer_of: TokenizerOf
) -> None:
    """Text that a tokenizer swallows leaves nothing to train once no EOS is appended."""
    tokenizer = tokenizer_of()
    swallow = json.loads(tokenizer.backend_tokenizer.to_str())
    swallow["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": ""}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(swallow)), eos_token="</s>"
    )
    rows = [{"prompt": "1", "response": "e"}, pair(1, 1)]
    data = run(rows, tokenizer, append_eos=False)
    assert data.ledger.dropped == {"no_response_token": 1} and data.ledger.kept == 1
    assert tokens(run(rows, tokenizer))[0] == ([5, EOS], [EOS])
    # an EOS that ends the prompt is not the response's
    data = run([{"prompt": "1 </s>", "response": "e"}], tokenizer)
    assert tokens(data) == [([5, EOS, EOS], [EOS])]


BAD = b"""{"prompt": "p", "response": "r"}
{"prompt": "", "response": "r"}

{"prompt": "p", "response": " "}
{"prompt": "p", "resp
{"prompt": null, "response": "r"}
{"prompt": "p", "response": 3}
{"prompt": "p", "response": ["r"]}
{"prompt": "p"}
{"text": "p"}
{"prompt": "p", "response": "r", "prompt": "q"}
{"prompt": "\xff", "response": "r"}
{"prompt": "\\ud800", "response": "r"}
{"prompt": "p", "response": "r", "extra": 1}
[]
{"prompt": "p", "respon"""
WHERE = [
    '2, field "prompt"', '4, field "response"', "5", '6, field "prompt"', '7, field "response"',
    '8, field "response"', "9", "10", "11", "12", '13, field "prompt"', "15", "16",
]  # fmt: skip


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_every_bad_row_is_named_in_the_order_of_the_file(
    newline: bytes, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserErrors) as caught:
        run(BAD.replace(b"\n", newline))
    error = caught.value
    assert [str(e.place) for e in error.errors] == [f"{tmp_path}/rows.jsonl:{w}" for w in WHERE]
    assert error.status == 65 and {e.status for e in error.errors} == {65}
    assert str(error).endswith(f"\n{len(WHERE)} errors in all")
    str(error).encode()


def test_twenty_bad_rows_are_shown_and_all_are_counted(run: Run) -> None:
    with pytest.raises(UserErrors) as caught:
        run([pair(1, 0)] * 15 + [pair(0, 1)] * 15)
    text = str(caught.value)
    assert text.count("error[") == 20 and text.endswith("... and 10 more; 30 errors in all")
    assert len(caught.value.errors) == 30


def test_text_is_unchanged_on_its_way(run: Run) -> None:
    rows = [{"prompt": "2024-01-31", "response": "007"}, {"prompt": "12", "response": "1e5"}]
    assert [{"prompt": e.prompt, "response": e.response} for e in run(rows).examples] == rows


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("max_examples", [None, 1, 25, 1000])
@pytest.mark.parametrize("append_eos", [True, False])
def test_the_ledger_adds_up(
    overlong: str,
    max_examples: int | None,
    append_eos: bool,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TOKENIZE_BATCH", 7)
    rows = [pair(1 + 5 * i % 13, 1 + 7 * i % 11) for i in range(40)]
    data = run(
        rows, max_examples=max_examples, max_length=12, overlong=overlong, append_eos=append_eos
    )
    ledger, dataset = data.ledger, data.dataset
    assert ledger.rows_read == 40 and ledger.source.endswith("rows.jsonl")
    assert ledger.rows_beyond_limit == 40 - min(max_examples or 40, 40)
    assert ledger.rows_read == ledger.rows_beyond_limit + ledger.kept + sum(ledger.dropped.values())
    assert ledger.kept == len(dataset) == len(data.examples) == len(dataset.response_lengths)
    assert (
        ledger.tokens
        == len(dataset.input_ids)
        == len(dataset.response_mask)
        == sum(dataset.lengths)
    )
    assert (
        ledger.response_tokens == int(dataset.response_mask.sum()) == sum(dataset.response_lengths)
    )
    assert ledger.longest == max(dataset.lengths) <= 12
    assert ledger.ends_with_eos == (ledger.kept - ledger.truncated if append_eos else 0)
    # against a count that knows nothing of the code
    asked = rows[:max_examples]
    prompts = [1 + len(row["prompt"].split()) for row in asked]
    sizes = [
        p + len(row["response"].split()) + append_eos for p, row in zip(prompts, asked, strict=True)
    ]
    over = [p for p, size in zip(prompts, sizes, strict=True) if size > 12]
    assert ledger.truncated == (sum(p < 12 for p in over) if overlong == "truncate" else 0)
    assert ledger.kept == len(sizes) - len(over) + ledger.truncated


def test_progress_reaches_the_end(
    tmp_path: Path, tokenizer_of: TokenizerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENIZE_BATCH", 4)
    seen: list[tuple[str, int]] = []

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
        seen.append((name, total))
        yield lambda count: seen.append(("", count))

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(pair(1, 1)) for _ in range(10)))
    prepare(
        str(path), DataConfig(), tokenizer_of(), seed=0, split="train", max_examples=None,
        progress=progress,
    )  # fmt: skip
    assert seen == [("tokenizing", 10), ("", 4), ("", 4), ("", 2)]


def test_fingerprint_is_that_of_what_is_trained(run: Run) -> None:
    base = run([pair(2, 2), pair(1, 1)]).fingerprint
    same = run(
        b"\n".join(json.dumps({**row, "extra": 1}).encode() for row in (pair(2, 2), pair(1, 1)))
    )
    assert same.fingerprint == base
    others = [
        run([pair(1, 1), pair(2, 2)]),
        run([pair(2, 2)]),
        run([{"prompt": "1 1", "response": "2 3"}, pair(1, 1)]),
        run([{"prompt": "1 1 2", "response": "2"}, pair(1, 1)]),  # the same tokens, another mask
    ]
    assert len({base, *(data.fingerprint for data in others)}) == 5


def test_a_row_without_prompt_tokens_trains_what_can_be_predicted() -> None:
    dataset = TokenizedDataset.of([([5, 6, 7], 0), ([5, 6], 1)])
    assert dataset.response_lengths == (2, 1)
    assert torch.equal(dataset[1].input_ids, torch.tensor([5, 6])) and len(dataset) == 2
