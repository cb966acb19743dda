"""The data step: every row is trained as it should be, or accounted for, or named."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cs336_alignment.config import ColumnsConfig, DataConfig, LintConfig, SourceConfig
from cs336_alignment.data import encode_processes, layout, prepare
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.row import Row
from cs336_alignment.data.splits import PreparedData, RunData, ledger_json, prepare_run
from cs336_alignment.data.store import locked
from cs336_alignment.errors import ExitStatus, Place, UserError, UserErrors
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model

TokenizerOf = Callable[..., PreTrainedTokenizerFast]
BOS, EOS = 1, 2


def pair(num_prompt: int, num_response: int) -> dict[str, str]:
    """A row of this many words."""
    return {"prompt": "1 " * num_prompt, "response": "2 " * num_response}


class Prepared:
    """Prepared training data, with its only source at hand."""

    def __init__(self, everything: RunData) -> None:
        self.everything = everything
        self.data: PreparedData = everything.train
        self.dataset = self.data.dataset
        self.ledger: LedgerEntry = self.data.ledgers[0]
        self.findings = self.data.sources[0].findings.counts
        self.fingerprint = self.data.fingerprint
        self.lengths = tuple(self.dataset.lengths.tolist())
        self.response_lengths = tuple(self.dataset.response_lengths.tolist())


@pytest.fixture
def run(tmp_path: Path, tokenizer_of: TokenizerOf) -> Callable[..., Prepared]:
    """Prepare rows, or the raw content of a file, with no linter in the way."""
    off = LintConfig(**dict.fromkeys(vars(LintConfig()), "off"))

    def prepared(
        rows: list[dict[str, Any]] | bytes,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        lint: LintConfig = off,
        progress: Any = None,
        **config: Any,
    ) -> Prepared:
        path = tmp_path / "rows.jsonl"
        raw = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(raw)
        data = DataConfig(str(path), lint=lint, cache_dir=str(tmp_path / "cache"), **config)
        shown = {} if progress is None else {"progress": progress}
        return Prepared(
            prepare_run(data, tokenizer or tokenizer_of(template="<s> $A"), seed=0, **shown)
        )

    return prepared


Run = Callable[..., Prepared]


def tokens(data: Prepared) -> list[tuple[list[int], list[int]]]:
    """The ids of each example, and its trained ids."""
    found = [data.dataset[i] for i in range(len(data.dataset))]
    return [(e.input_ids.tolist(), e.input_ids[e.response_mask].tolist()) for e in found]


def test_prompt_with_its_prefix_then_response_with_eos(run: Run) -> None:
    data = run([{"prompt": "1 + 2 =", "response": "3"}, {"prompt": "a", "response": "b c"}])
    assert tokens(data) == [
        ([BOS, 5, 14, 6, 15, 7, EOS], [7, EOS]),
        ([BOS, 16, 17, 18, EOS], [17, 18, EOS]),
    ]
    assert data.lengths == (7, 5) and data.response_lengths == (2, 3)
    assert data.dataset[1].example_id == 1


@pytest.mark.parametrize(
    "options", [{}, {"pad": None}, {"pad": "</s>"}, {"template": "<s> $A </s>"}]
)
@pytest.mark.fault("T24 tokenizers without pad or EOS, pad = EOS")
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
    assert data.ledger.ends_with_stop == 0


@pytest.mark.fault("T24 tokenizers without pad or EOS, pad = EOS")
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
    assert data.data.ground_truths == ["3"]


LONG = [pair(2, 2), pair(2, 5), pair(9, 1), pair(3, 3)]  # 6, 9, 12 and 8 tokens with <s> and </s>


def test_overlong_examples_are_dropped_and_counted(run: Run) -> None:
    data = run(LONG, max_length=8)
    assert data.lengths == (6, 8), "8 of 8 tokens is not too long"
    assert data.data.places[1].endswith("rows.jsonl:4")
    assert data.ledger.dropped == {"overlong": 2} and data.ledger.truncated == 0
    assert data.ledger.ends_with_stop == 2


def test_overlong_examples_are_truncated_without_eos(run: Run) -> None:
    data = run(LONG, max_length=8, overlong="truncate")
    assert tokens(data)[1] == ([BOS, 5, 5, 6, 6, 6, 6, 6], [6] * 5), "no EOS where the text goes on"
    assert data.lengths == (6, 8, 8)
    assert data.ledger.truncated == 1 and data.ledger.ends_with_stop == 2
    assert data.ledger.dropped == {"prompt_fills_max_length": 1}


@pytest.mark.fault("T15 a response that max_length leaves nothing of")
def test_a_prompt_that_fills_max_length(run: Run) -> None:
    rows = [pair(n, 3) for n in (5, 6, 7, 8, 9)]  # prompts of 6 to 10 tokens
    data = run(rows, max_length=8, overlong="truncate")
    assert data.lengths == (8, 8) and data.response_lengths == (2, 1)
    assert data.ledger.dropped == {"prompt_fills_max_length": 3}


@pytest.mark.fault("T15 a response that max_length leaves nothing of")
def test_overlong_examples_are_all_named(run: Run) -> None:
    with pytest.raises(UserErrors) as caught:
        run(LONG, max_length=8, overlong="error")
    assert caught.value.status == 65 and caught.value.total == 2
    assert [(e.code, e.place.line) for e in caught.value.errors if e.place] == [
        ("D302", 2),
        ("D302", 3),
    ]
    assert "got: 12 tokens, 10 of them before" in str(caught.value)
    assert len(run(LONG, max_length=12, overlong="error").dataset) == 4


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.fault("T15 a response that max_length leaves nothing of")
def test_nothing_left_is_65(overlong: str, run: Run) -> None:
    with pytest.raises(UserError, match=r"no example of .*rows\.jsonl is left") as caught:
        run(LONG, max_length=3, overlong=overlong)
    assert (caught.value.code, caught.value.status) == ("D301", 65)
    assert "4 rows read; dropped: 4 " in (caught.value.got or "")
    assert "data.max_length (now 3)" in (caught.value.hint or "")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
def test_an_empty_file_is_65(content: bytes, run: Run) -> None:
    with pytest.raises(UserError, match="no row in") as caught:
        run(content)
    assert caught.value.status == 65


def test_a_missing_file_is_66(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(UserError, match="no file") as caught:
        prepare_run(DataConfig("nowhere.jsonl"), tokenizer_of(), seed=0)
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
    assert data.ledger.dropped == {"no_trained_token": 1} and data.ledger.kept == 1
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
    '8, field "response"', '9, field "response"', '10, field "prompt"', "11", "12", '13, field "prompt"', "15", "16",
]  # fmt: skip


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.fault("T11 empty, blank, null or other fields, wrong columns")
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
        run([pair(1, 1)] + [pair(1, 0)] * 15 + [pair(0, 1)] * 15)
    text = str(caught.value)
    assert text.count("error[") == 20 and text.endswith("... and 10 more; 30 errors in all")


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
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 7)
    rows = [pair(1 + 5 * i % 13, 1 + 7 * i % 11) for i in range(40)]
    data = run(
        rows, max_train_examples=max_examples, max_length=12, overlong=overlong,
        append_eos=append_eos,
    )  # fmt: skip
    ledger, dataset = data.ledger, data.dataset
    assert ledger.rows_read == min(max_examples or 40, 40)
    assert ledger.source.endswith("rows.jsonl")
    assert ledger.rows_read == ledger.kept + sum(ledger.dropped.values())
    assert ledger.kept == len(dataset) == len(data.data.places)
    assert ledger.tokens == sum(len(dataset[i].input_ids) for i in range(len(dataset)))
    assert ledger.response_tokens == sum(
        int(dataset[i].response_mask.sum()) for i in range(len(dataset))
    )
    assert ledger.longest == max(dataset.lengths) <= 12
    assert ledger.largest_token_id == max(
        int(dataset[i].input_ids.max()) for i in range(len(dataset))
    )
    assert sum(ledger.lengths["histogram"]["counts"]) == ledger.kept
    assert ledger.ends_with_stop == (ledger.kept - ledger.truncated if append_eos else 0)
    # against a count that knows nothing of the code
    asked = rows[:max_examples]
    prompts = [1 + len(row["prompt"].split()) for row in asked]
    sizes = [
        p + len(row["response"].split()) + append_eos for p, row in zip(prompts, asked, strict=True)
    ]
    over = [p for p, size in zip(prompts, sizes, strict=True) if size > 12]
    assert ledger.truncated == (sum(p < 12 for p in over) if overlong == "truncate" else 0)
    assert ledger.kept == len(sizes) - len(over) + ledger.truncated


def test_progress_reaches_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 4)
    seen: list[tuple[str, int | None]] = []

    @contextmanager
    def progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        seen.append((name, total))
        yield lambda count: seen.append(("", count))

    run([pair(1, 1)] * 10, progress=progress)
    assert seen == [("tokenizing rows.jsonl", None), ("", 4), ("", 4), ("", 2)]


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


def test_text_alone_is_trained_whole_on_demand(run: Run) -> None:
    with pytest.raises(UserError, match="text alone") as caught:
        run([{"text": "1 2 3"}])
    assert caught.value.status == 78 and "data.train_on=all" in str(caught.value)
    assert tokens(run([{"text": "1 2 3"}], train_on="all")) == [
        ([BOS, 5, 6, 7, EOS], [5, 6, 7, EOS])
    ]


def test_all_trains_the_prompt_too(run: Run) -> None:
    assert tokens(run([pair(2, 1)], train_on="all")) == [([BOS, 5, 5, 6, EOS], [5, 5, 6, EOS])]
    with pytest.raises(UserError, match="say themselves"):
        run([{"input_ids": [5, 6], "labels": [-100, 6]}], train_on="all")


def test_weights_come_through(run: Run) -> None:
    data = run([{**pair(1, 1), "weight": 0.5}, {**pair(1, 2), "weight": 0}, pair(2, 2)])
    assert data.ledger.dropped == {"weight_is_zero": 1}
    assert data.dataset.example_weights.tolist() == [0.5, 1.0]
    assert data.dataset.token_weights.tolist() == [1.0, 3.0]


def test_a_conversation_weighs_its_turns(run: Run, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0:1].replace('u', 'a').replace('s', 'b') }} "
        "{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}a {% endif %}"
    )
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = 0.25  # type: ignore[assignment]
    example = run([{"messages": messages}], tokenizer).dataset[0]
    assert example.weights is not None
    kept = [
        (int(i), float(w)) for i, w in zip(example.input_ids, example.weights, strict=True) if w
    ]
    assert kept == [(6, 0.25), (EOS, 0.25), (8, 1.0), (EOS, 1.0)]


@pytest.mark.parametrize("max_length", [3, 4, 7, 8, 100])
def test_split_trains_every_token_once(max_length: int, run: Run) -> None:
    rows = [pair(2, 9), pair(6, 3), pair(1, 1), pair(12, 2)]
    whole = tokens(run(rows, max_length=1000))
    data = run(rows, max_length=max_length, overlong="split")
    found = tokens(data)
    assert max(len(ids) for ids, _ in found) <= max_length
    assert [t for _, trained in found for t in trained] == [
        t for _, trained in whole for t in trained
    ]
    places = data.data.places
    for number, (ids, trained) in enumerate(whole, start=1):
        pieces = [found[i] for i, place in enumerate(places) if place.endswith(f":{number}")]
        joined = [t for _, piece in pieces for t in piece]
        assert joined == trained
        for previous, piece in pairwise(pieces):
            assert previous[0][-1] == piece[0][0]  # which predicts the piece's first trained token
        assert len(pieces) == 1 or len(ids) > max_length
    over = sum(len(ids) > max_length for ids, _ in whole)
    assert data.ledger.split == over and data.ledger.rows_read == 4


def test_bad_rows_are_dropped_and_counted_up_to_a_share(run: Run) -> None:
    rows = [pair(1, 1)] * 98 + [pair(1, 0)] * 2
    data = run(rows, on_bad_row="drop", max_bad_fraction=0.02)
    assert data.ledger.bad_rows == 2 and data.ledger.dropped == {"bad_row": 2}
    assert data.ledger.kept == 98
    with pytest.raises(UserErrors, match=r"2 of 100 rows are bad") as caught:
        run(rows, on_bad_row="drop")
    assert caught.value.status == 65 and "2.0%" in str(caught.value)


def test_the_linter_refuses_warns_or_is_silent(run: Run) -> None:
    rows = [
        {"prompt": "<s> 3 ", "response": "2"},
        pair(1, 1),
        pair(1, 1),
        {"prompt": "1 ", "response": "2 <s> 3"},
    ]
    with pytest.raises(UserErrors) as caught:
        run(rows, lint=LintConfig())
    text = str(caught.value)
    assert "L106" in text and "rows.jsonl:4" in text and "data.lint.trained_scaffolding" in text
    assert caught.value.status == 65
    data = run(rows, lint=LintConfig(trained_scaffolding="warning"))
    (duplicates, scaffolding) = sorted(
        data.everything.warnings, key=lambda line: line[:4], reverse=True
    )
    assert duplicates.startswith("L107 1 of 4 rows") and "rows.jsonl:3" in duplicates
    assert scaffolding.startswith("L106 1 of 4 rows")
    assert run(rows).everything.warnings == ()


@pytest.mark.parametrize(
    ("row", "options", "check"),
    [
        ({"input_ids": [BOS, BOS, 5, 6, EOS], "response_mask": [0, 0, 0, 1, 1]}, {}, "doubled_bos"),
        (pair(1, 1), {"append_eos": False}, "no_stop_token"),
        (pair(2, 9), {"max_length": 8, "overlong": "truncate"}, "no_stop_token"),
        ({"input_ids": [5, 6], "response_mask": [1, 0]}, {}, "no_trained_token"),
    ],
)
def test_each_thing_is_found(
    row: dict[str, Any], options: dict[str, Any], check: str, run: Run
) -> None:
    good = pair(1, 1) if "prompt" in row else {"input_ids": [5, 6, EOS], "response_mask": [0, 1, 1]}
    if check != "no_stop_token" or "max_length" in options:
        assert run([good], **options).findings == {}
    assert run([row, good], **options).findings.get(check, 0) >= 1


def test_evaluation_prompts_that_are_trained_on_are_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "response": "9"}) for p in ("1 2 ", "3 4 ", "5 6 "))
    )
    rows = [{"prompt": "3 4 ", "response": "1"}, {"prompt": "7 7 ", "response": "1"}]
    data = run(rows, eval_path=str(tmp_path / "eval.jsonl"), lint=LintConfig())
    (line,) = data.everything.warnings
    assert line.startswith("L108 1 of 3 rows") and "eval.jsonl:2" in line


def test_a_fraction_is_split_off_the_same_way_every_time(run: Run) -> None:
    rows = [pair(1 + i % 7, 1 + i % 5) for i in range(50)]
    first, second = run(rows, eval_fraction=0.2), run(rows, eval_fraction=0.2)
    for data in (first, second):
        held_out = data.everything.held_out
        assert held_out is not None
        assert (len(data.dataset), len(held_out.dataset)) == (40, 10)
        assert sorted(data.data.places + held_out.places) == sorted(run(rows).data.places)
    assert first.data.places == second.data.places
    ledger = ledger_json(first.everything)
    assert ledger["train"]["examples"] == 40 and ledger["eval"]["examples"] == 10
    assert ledger["train"]["rows_read"] == 50


def test_the_pieces_of_a_row_stay_on_one_side(run: Run) -> None:
    rows = [pair(2 + i, 20) for i in range(4)]
    data = run(rows, eval_fraction=0.5, overlong="split", max_length=8)
    held_out = data.everything.held_out
    assert held_out is not None and len(held_out.dataset) > 2 < len(data.dataset)
    assert not set(data.data.places) & set(held_out.places)
    with pytest.raises(UserError, match="D312"):
        run(rows[:1], eval_fraction=0.5, overlong="split", max_length=8)


def test_the_prompt_is_known_even_where_all_is_trained(run: Run, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps(pair(3, 2)))
    options = {"eval_path": str(tmp_path / "eval.jsonl"), "lint": LintConfig()}
    rows = [pair(3, 1), pair(2, 1)]
    for train_on in ("response", "all"):
        data = run(rows, train_on=train_on, **options)
        assert len(data.dataset.prompt_ids(0)) == 4  # BOS, and three
        assert any(line.startswith("L108") for line in data.everything.warnings), train_on


def test_a_question_that_spells_a_special_token_is_told(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "own.prompt"
    template.write_text("<s> {question} </s>")  # its own are meant
    rows = [{"question": "1 2", "answer": "3"}, {"question": "1 </s> 2", "answer": "3"}]
    data = run(rows, prompt_template=str(template), lint=LintConfig())
    (line,) = [line for line in data.everything.warnings if line.startswith("L110")]
    assert "1 of 2 rows" in line and "rows.jsonl:2" in line
    verbatim = [{"prompt": "1 </s> 2", "response": "3"}]
    assert not any("L110" in line for line in run(verbatim, lint=LintConfig()).everything.warnings)


@pytest.mark.parametrize("workers", [1, 2])
def test_columns_that_come_late_are_told(
    workers: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 5)
    monkeypatch.setattr(encode_processes, "ROWS_BEFORE_POOL", 10)
    rows = [{**pair(2, 3), "id": 1}] * 20 + [{**pair(2, 3), "weight": 0.5, "system": "s"}] * 7
    ledger = run(rows, num_workers=workers).ledger
    assert ledger.late_columns == {"system (ignored)": 7, "weight (read)": 7}
    assert ("later column system (ignored)", "7") in list(ledger.rows())


def test_a_sources_own_columns_are_added_to_those_of_all(run: Run, tmp_path: Path) -> None:
    rows = [{**pair(2, 3), "weight": 1}, {**pair(3, 3), "weight": 0.5}]
    columns = ColumnsConfig(weight="")
    source = SourceConfig(str(tmp_path / "rows.jsonl"), columns=ColumnsConfig(prompt="prompt"))
    for sources in ([], [source]):
        data = run(rows, columns=columns, sources=sources)
        assert [data.dataset[i].example_weight for i in range(2)] == [1.0, 1.0]


def test_rows_may_begin_with_many_that_cannot_be_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = json.dumps(pair(2, 3)) + "\n"
    data = run(('{"prompt": \n' * 120 + good * 3).encode(), on_bad_row="drop", max_bad_fraction=1.0)
    assert (data.ledger.kept, data.ledger.bad_rows) == (3, 120)
    for raw in ('{"prompt": \n' * 120, '{"prompt": \n' * 120 + good):
        with pytest.raises(UserErrors, match="D201"):
            run(raw.encode())
    monkeypatch.setattr(layout, "MOST_UNREADABLE", 110)
    with pytest.raises(UserErrors, match="D201"):
        run(('{"prompt": \n' * 120 + good).encode(), on_bad_row="drop", max_bad_fraction=1.0)


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (json.dumps([pair(2, 3)] * 2, indent=1).encode(), "a file called .json"),
        (json.dumps(pair(2, 3)).encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_is(raw: bytes, hint: str, run: Run) -> None:
    with pytest.raises(UserErrors, match=f"D201[\\s\\S]*{hint}"):
        run(raw)


def test_several_sources_are_joined(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps({"q": "3 4", "a": "5"}))
    sources = [
        SourceConfig(str(tmp_path / "rows.jsonl"), 1.0),
        SourceConfig(str(tmp_path / "more.jsonl"), 3.0),
    ]
    sources[1].columns.prompt, sources[1].columns.response = "q", "a"
    data = run([pair(1, 1), pair(2, 2)], sources=sources, mixture_stop="all_exhausted")
    assert tokens(data) == [([BOS, 5, 6, EOS], [6, EOS]), ([BOS, 5, 5, 6, 6, EOS], [6, 6, EOS]),
                            ([BOS, 7, 8, 9, EOS], [9, EOS])]  # fmt: skip
    assert data.data.mixture is not None and data.data.mixture.draws == (2, 6)


def test_what_is_wrong_in_any_source_is_told_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "3", "response": ""}\n{')
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("rows", "more")]
    with pytest.raises(UserErrors) as caught:
        run([pair(1, 1), {"prompt": "1"}], sources=sources)
    assert [str(error.place).rsplit("/")[-1] for error in caught.value.errors] == [
        'rows.jsonl:2, field "response"', 'more.jsonl:1, field "response"', "more.jsonl:2"
    ]  # fmt: skip
    assert caught.value.total == 3
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "</s> 3", "response": "<pad> 4"}))
    strict = LintConfig(no_stop_token="error", duplicate_rows="error")
    with pytest.raises(UserErrors) as caught:
        run([pair(1, 1), {"prompt": "3", "response": "<pad> 4"}], sources=sources, lint=strict)
    assert [(e.code, str(e.message).rsplit("/")[-1][:10]) for e in caught.value.errors] == [
        ("L106", "rows.jsonl"), ("L106", "more.jsonl")
    ]  # fmt: skip


def test_rows_that_two_sources_have_are_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, [pair(9, 1), pair(1, 1)])))
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("rows", "more")]
    rows = [pair(1, 1), pair(2, 2)]
    found = run(rows, sources=sources, lint=LintConfig()).everything.warnings
    assert [line.split(": the same")[0] for line in found] == [
        "L107 1 of 4 rows of all sources together"
    ]
    assert "more.jsonl:2" in found[0]
    (tmp_path / "more.jsonl").write_text(json.dumps(pair(9, 1)))
    assert not run(rows, sources=sources, lint=LintConfig()).everything.warnings


def test_the_sum_of_a_ledger_names_formats_and_bad_rows(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"question": "3", "response": "1"}\n{')
    sources = [SourceConfig(str(tmp_path / f"{name}.jsonl")) for name in ("rows", "more")]
    lenient = {"on_bad_row": "drop", "max_bad_fraction": 0.5, "prompt_template": "question_only"}
    total = ledger_json(run([pair(1, 1)], sources=sources, **lenient).everything)["train"]
    assert "prompt_response" in total["format"] and "question_answer" in total["format"]
    assert len(total["bad_places"]) == 1


def test_ids_that_the_tokenizer_has_not_are_named(run: Run) -> None:
    with pytest.raises(UserErrors, match="no such token") as caught:
        run([{"input_ids": [1, 20, 21], "response_mask": [0, 1, 1]}])
    assert caught.value.errors[0].got == "21"
    assert 'field "input_ids"' in str(caught.value.errors[0].place)
    run([{"input_ids": [1, 20], "response_mask": [0, 1]}])


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        (pair(1, 1), {"prompt_template": "alpaca"}, "data.prompt_template=alpaca"),
        (pair(1, 1), {"append_eos": False}, None),
        (
            {"input_ids": [4, 5], "labels": [-100, 5]},
            {"append_eos": False},
            "data.append_eos=False",
        ),
        ({"question": "1", "response": "2"}, {"prompt_template": "question_only"}, None),
    ],
)
def test_options_without_effect_are_told(
    rows: dict[str, Any], options: dict[str, Any], told: str | None, tmp_path: Path,
    tokenizer_of: TokenizerOf,
) -> None:  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows))
    lines: list[str] = []
    data = DataConfig(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path), **options)
    prepare_run(data, tokenizer_of(template="<s> $A"), seed=0, note=lines.append)
    found = [line for line in lines if "without effect" in line]
    assert found == ([] if told is None else [f"  without effect on these rows: {told}"])


def test_a_batch_holds_as_much_of_any_kind_of_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_processes, "BATCH_CHARACTERS", 1_000)
    text = "x" * 300
    for fields in (
        {"prompt": text},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        {"input_ids": [7] * 38},
    ):
        rows = [Row(fields, Place("rows.jsonl", i)) for i in range(8)]
        assert [len(batch) for batch in encode_processes._batches(rows)] == [4, 4]


def test_a_row_of_any_format_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_processes, "MOST_ROW_BYTES", 300)
    rows = [Row({"messages": [{"content": "x" * n}]}, Place("a.parquet", n)) for n in (299, 300)]
    (batch,) = encode_processes._batches(rows)
    assert batch[0] is rows[0]
    assert isinstance(batch[1], UserError) and (batch[1].code, batch[1].place) == (
        "D215",
        Place("a.parquet", 300),
    )


def test_waiting_for_another_command_is_told(run: Run, tmp_path: Path) -> None:
    folder, told = tmp_path / "cache" / "key", []
    with locked(folder, lambda: told.append(1)):
        assert not told
        with pytest.raises(TimeoutError), locked(folder, lambda: _raise(TimeoutError())):
            pass


def _raise(error: Exception) -> None:
    raise error


def test_the_cache_serves_what_is_the_same_and_nothing_else(
    run: Run, tokenizer_of: TokenizerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    original = prepare._prepare

    def counted(*arguments: Any) -> None:
        calls.append("")
        original(*arguments)

    monkeypatch.setattr(prepare, "_prepare", counted)

    def work(*arguments: Any, **options: Any) -> int:
        before = len(calls)
        run(*arguments, **options)
        return len(calls) - before

    rows = [pair(2, 2), pair(1, 1)]
    assert [work(rows), work(rows), work(rows, lint=LintConfig())] == [1, 0, 0]
    assert work(rows, shuffle=False, eval_fraction=0.5) == 0
    assert work([*rows, pair(3, 3)]) == 1
    for changed in ({"max_length": 9}, {"append_eos": False}, {"train_on": "all"},
                    {"prompt_template": "alpaca"}, {"overlong": "split"},
                    {"max_train_examples": 1}):  # fmt: skip
        assert [work(rows, **changed), work(rows, **changed)] == [1, 0], changed
    other = tokenizer_of(template="<s> $A")
    other.add_tokens(["zz"])
    assert work(rows, other) == 1
    chat = tokenizer_of(template="<s> $A")
    chat.chat_template = "{{ messages }}"
    assert work(rows, chat) == 1
    monkeypatch.setattr(prepare, "_code_version", lambda: "another")
    assert work(rows) == 1


def test_a_failed_preparation_leaves_nothing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserErrors):
        run([pair(1, 1), pair(1, 0)])
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_processes_give_what_one_process_gives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(1 + i % 7, 1 + i % 5) for i in range(90)]
    alone = run(rows, num_workers=1)
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 8)
    monkeypatch.setattr(encode_processes, "ROWS_BEFORE_POOL", 10)
    monkeypatch.setattr(prepare, "_code_version", lambda: "another")
    together = run(rows, num_workers=2)
    assert tokens(together) == tokens(alone) and together.data.places == alone.data.places
    assert together.fingerprint == alone.fingerprint
    assert together.ledger == alone.ledger and together.findings == alone.findings


# What only large, late or damaged data show.


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.fault("T11 bad rows far down, in the processes that tokenize")
def test_bad_rows_far_down_are_named(
    workers: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 5)
    monkeypatch.setattr(encode_processes, "ROWS_BEFORE_POOL", 10)
    lines = [json.dumps(pair(2, 2)) for _ in range(60)]
    lines[31], lines[47] = json.dumps({"prompt": "1", "response": ""}), '{"prompt": '
    raw = "\n".join(lines).encode()
    with pytest.raises(UserErrors) as caught:
        run(raw, num_workers=workers)
    assert [e.place and e.place.line for e in caught.value.errors] == [32, 48]
    assert [e.code for e in caught.value.errors] == ["D203", "D201"]
    dropped = run(raw, num_workers=workers, on_bad_row="drop", max_bad_fraction=0.1)
    assert (dropped.ledger.kept, dropped.ledger.bad_rows) == (58, 2)
    where = [
        f'{tmp_path}/rows.jsonl:32, field "response" (D203)',
        f"{tmp_path}/rows.jsonl:48 (D201)",
    ]
    assert dropped.ledger.bad_places == where
    assert ("bad rows", ", ".join(where)) in list(dropped.ledger.rows())


def test_errors_cross_process_borders_whole() -> None:
    one = UserError("D203", "m", place=Place("f", 3, "x"), got="g", hint="h")
    for error in (one, UserErrors([one, one], 7)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert (again.code, again.status, again.place) == (error.code, error.status, error.place)


@pytest.mark.fault("T11 a process that tokenizes is killed")
def test_a_killed_process_is_one_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_processes, "BATCH_ROWS", 5)
    monkeypatch.setattr(encode_processes, "ROWS_BEFORE_POOL", 10)
    monkeypatch.setattr(encode_processes, "_work", die)
    with pytest.raises(UserError) as caught:
        run([pair(2, 2)] * 60, num_workers=2)
    assert (caught.value.code, caught.value.status) == ("D311", ExitStatus.INTERNAL)


def die(batch: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_optional_columns_that_come_late_are_read(run: Run) -> None:
    rows = [
        pair(2, 3),
        {**pair(2, 3), "weight": 0},
        {**pair(3, 2), "weight": 0.5, "ground_truth": 7},
    ]
    data = run(rows)
    assert data.ledger.kept == 2 and sum(data.ledger.dropped.values()) == 1  # nothing to train
    assert [data.dataset[i].example_weight for i in range(2)] == [1.0, 0.5]
    assert data.data.ground_truths == [None, "7"]
    with pytest.raises(UserErrors, match="no weight"):
        run([pair(2, 3), {**pair(2, 3), "weight": -3}])
    row = {"instruction": "1 2", "output": "3"}
    with_input = run([row, {**row, "input": "4 5"}], prompt_template="alpaca")
    assert with_input.lengths[1] > with_input.lengths[0]
    with pytest.raises(UserErrors, match="no place for it"):
        run([row, {**row, "input": "4 5"}], prompt_template="question_only")


@pytest.mark.parametrize("value", [10**400, 1e39, 1e-60, float("inf"), -1, True, "a", "nan"])
def test_a_weight_that_32_bits_do_not_hold_is_named(value: Any, run: Run) -> None:
    with pytest.raises(UserErrors) as caught:
        run([pair(1, 1), {**pair(1, 1), "weight": value}])
    assert caught.value.errors[0].code in ("D214", "D201")  # JSON has no infinity


def test_ids_beyond_32_bits_are_named(run: Run) -> None:
    with pytest.raises(UserErrors, match="no token ids"):
        run([{"input_ids": [1, 3_000_000_000], "labels": [-100, 3_000_000_000]}])


def test_several_readings_are_never_settled_by_a_later_row(run: Run) -> None:
    both = {**pair(1, 1), "messages": [{"role": "user", "content": "1"}]}
    with pytest.raises(UserError, match="several formats"):
        run([both, pair(1, 1)])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / "data.arrow"),
    "cut off": lambda folder: os.truncate(folder / "data.arrow", 100),
    "no data": lambda folder: (folder / "data.arrow").unlink(),
    "no note": lambda folder: (folder / "prepared.json").unlink(),
    "half a note": lambda folder: os.truncate(folder / "prepared.json", 20),
}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.fault("T8 damaged prepared data")
def test_damaged_prepared_data_are_told_and_made_anew(
    damage: str, tmp_path: Path, tokenizer_of: TokenizerOf
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(pair(i, 2)) for i in range(1, 30)))
    config = DataConfig(str(path), cache_dir=str(tmp_path / "cache"))
    lines: list[str] = []
    tokenizer = tokenizer_of(template="<s> $A")
    first = prepare_run(config, tokenizer, seed=0, note=lines.append)
    (folder,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    assert not [line for line in lines if "are damaged (" in line]
    # By value: the data are mapped, and the damage would be seen through the first look.
    want = [first.train.dataset[i].input_ids.tolist() for i in range(29)]
    fingerprint = first.train.fingerprint
    del first
    DAMAGE[damage](folder)
    again = prepare_run(config, tokenizer, seed=0, note=lines.append)
    assert [line for line in lines if "are damaged (" in line]
    assert again.train.fingerprint == fingerprint
    assert [again.train.dataset[i].input_ids.tolist() for i in range(29)] == want


def test_a_cache_that_cannot_be_made_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair(1, 1)))
    for folder in ("file", "file/inside"):
        config = DataConfig(str(path), cache_dir=str(tmp_path / folder))
        with pytest.raises(UserError) as caught:
            prepare_run(
                config, load_tokenizer(resolve_model("builtin:arithmetic", None, False)), seed=0
            )
        assert (caught.value.code, caught.value.status) == ("D310", ExitStatus.CANNOT_CREATE)
