"""The view says what each token is; the terminal shows all that is trained and nothing that is not."""

from __future__ import annotations

import random
import re
from io import StringIO
from itertools import groupby

import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cs336_alignment.data import token_view as module
from cs336_alignment.data.token_view import ViewedExample, ViewedToken, print_examples, view_tokens

CORPUS = ["the cat sat on the mat.", "Let x = 48/2 = 24\n\n#### 24", "the rain, the cat"]
TEXTS = [
    "the cat sat", "  two  spaces \n\n and lines ", "彩虹是怎么形成的？🌈👩‍🚀", "naïve café — “quotes”",
    "مرحبا the mat", "�", "a\u2028b\t\x1b[31m", "",
]  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens([AddedToken("<|role|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """Pieces begin with ▁, unknown characters fall to bytes, as in Llama's tokenizers."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecasonm.xy=#"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, [],
                   unk_token="<unk>", byte_fallback=True)
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def plain_metaspace() -> PreTrainedTokenizerFast:
    words = ["<unk>", "▁the", "▁cat", "▁", "sat", "▁sat", "▁two", "▁spaces"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "sat": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def texts_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.text for token in view_tokens(ids, [0] * len(ids), tokenizer)]


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("build", [byte_level, metaspace, plain_metaspace, word_level])
def test_the_texts_joined_are_the_example_decoded(build) -> None:
    tokenizer = build()
    generator = random.Random(0)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    rows += [[i for row in rows for i in row]]
    # Any ids at all, so halves of characters anywhere.
    rows += [generator.choices(range(len(tokenizer)), k=40) for _ in range(50)]
    for ids in rows:
        texts = texts_of(ids, tokenizer)
        assert len(texts) == len(ids)
        assert "".join(texts) == decode(ids, tokenizer)


def test_a_character_of_several_tokens_is_with_the_first() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a🌈b虹", add_special_tokens=False)["input_ids"]
    assert texts_of(ids, tokenizer) == ["a", "🌈", "", "", "", "b", "虹", "", ""]


def test_no_token_takes_its_neighbours_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer("the cat sat on the mat.", add_special_tokens=False)["input_ids"]
    assert texts_of(ids, tokenizer) == [decode([i], tokenizer) for i in ids]
    words = word_level()
    assert texts_of([1, 2, 3], words) == ["the", " cat", " sat"]
    pieces = plain_metaspace()
    assert texts_of([1, 2, 3, 4], pieces) == ["the", " cat", " ", "sat"]


def test_kinds_and_weights() -> None:
    tokenizer = byte_level()
    bos, eos, role, tool = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|role|>", "<tool>"])
    letter = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    tokens = view_tokens(
        [bos, role, letter, letter, tool, letter, eos, eos],
        [0, 0, 0, 0, 0, 0.5, 1, 0],
        tokenizer,
        [True, True, True, False, False, True, False, False],
    )
    assert [token.kind for token in tokens] == [
        "special", "special", "scaffold", "context", "context", "trained", "trained", "special",
    ]  # fmt: skip
    assert [token.weight for token in tokens][5:7] == [0.5, 1]
    assert tokens[1].text == "<|role|>" and tokens[1].token_id == role
    example = ViewedExample("a", tokens)
    assert (example.num_tokens, example.num_trained, example.trained_share) == (8, 2, 0.25)
    assert ViewedExample("none", ()).trained_share == 0


@pytest.mark.parametrize("weights, scaffold", [([0], None), ([0, 0, 0], None), ([0, 0], [True])])
def test_lengths_must_agree(weights, scaffold) -> None:
    with pytest.raises(ValueError):
        view_tokens([1, 2], weights, word_level(), scaffold)


def shown(examples: list[ViewedExample], *, width: int = 80, **options) -> str:
    text = StringIO()
    environment = {"TERM": "xterm-256color", **options.pop("environment", {})}
    print_examples(examples, Console(file=text, width=width, _environ=environment, **options))
    return text.getvalue()


def random_example(generator: random.Random, title: str) -> ViewedExample:
    texts = ["a", " b", "\n", "", " <|im_end|>", "彩", "  ", "[x]", "[/red]", "\\", "\r", "×2", "⟦"]
    tokens = []
    for _ in range(generator.randrange(1, 12)):
        kind = generator.choice(module.KINDS)
        weight = generator.choice([0.5, 1.0, 2.0]) if kind == "trained" else 0.0
        for _ in range(generator.randrange(1, 9)):
            tokens.append(ViewedToken(generator.choice(texts), 1, kind, weight))
    return ViewedExample(title, tuple(tokens), ("odd",) * generator.randrange(2))


def test_marks_are_around_exactly_what_is_trained() -> None:
    generator = random.Random(1)
    for _ in range(100):
        example = random_example(generator, "row 7")
        text = shown([example])
        opening, closing = text[0], text[text.index("trained") + len("trained")]
        body = text.split("\n", 3)[3].split("! odd\n", 1)[-1]
        found = [
            run[1].replace("⏎\n", "\n").removesuffix("⏎") + "\n" * run[1].endswith("⏎")
            for run in re.finditer(f"{opening}(.*?){closing}", body, re.DOTALL)
        ]
        runs = groupby(
            example.tokens, key=lambda t: (t.kind == "trained", t.kind == "trained" and t.weight)
        )
        wanted = [
            "".join(t.text for t in run).replace("\r", "␍")
            for (is_trained, _), run in runs
            if is_trained
        ]
        assert found == wanted
        # And without marks and weights, all of the text is there in order.
        rest = re.sub(f"{closing}(×0.5|×2(?!×))?", "", body.replace(opening, ""))
        whole = "".join(token.text for token in example.tokens).replace("\r", "␍")
        if "×" not in whole:
            assert rest.replace("⏎\n", "\n").removesuffix("\n") == whole.removesuffix("\n")


def test_marks_do_not_occur_in_the_data() -> None:
    used = ViewedExample("a", (ViewedToken("⟦x⟧", 1, "context"), ViewedToken("⟪", 2, "trained")))
    assert shown([used]).splitlines()[-1] == "⟦x⟧⦃⟪⦄"


def test_colours_or_marks() -> None:
    example = ViewedExample(
        "a", (ViewedToken("read", 1, "context"), ViewedToken("learnt", 2, "trained"))
    )
    assert "⟦learnt⟧" in shown([example])
    assert "⟦learnt⟧" in shown([example], force_terminal=True, environment={"NO_COLOR": "1"})
    assert "⟦learnt⟧" in shown([example], force_terminal=True, environment={"TERM": "dumb"})
    coloured = shown([example], force_terminal=True, color_system="truecolor")
    assert "⟦" not in coloured and re.search(r"read\x1b\[[\d;]+mlearnt\x1b\[0m", coloured)


def test_header_findings_and_weight() -> None:
    tokens = (ViewedToken("q\n", 1, "context"), ViewedToken("x", 2, "trained", 0.25))
    lines = shown([ViewedExample("row 17 · a.jsonl:18", tokens, ("no end\nof turn",))]).splitlines()
    assert lines[2:] == [
        "■ row 17 · a.jsonl:18  2 tokens, 1 trained (50.0%)", "! no end⏎of turn", "q⏎", "⟦x⟧×0.25",
    ]  # fmt: skip
    coloured = shown(
        [ViewedExample("a", tokens, ("no end",))], force_terminal=True, color_system="standard"
    )
    assert "\x1b[33m! no end\x1b[0m" in coloured


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor"}])
def test_nothing_in_the_data_steers_the_terminal(options) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e[bold red]x[/]\u200b"
    example = ViewedExample(hostile, (ViewedToken(hostile, 1, "trained"),), (hostile,))
    text = re.sub(r"\x1b\[[\d;]*m", "", shown([example], width=200, **options))
    assert not set(text) & set("\x1b\x07\r\x9b\u202e\u200b")
    assert text.count("␛]0;title␇␛[2J␍‹U+009B›31m‹U+202E›[bold red]x[/]‹U+200B›") == 3


def long_example(unit: str, lines: int) -> ViewedExample:
    context = tuple(ViewedToken(unit, 1, "context") for _ in range(lines))
    trained = tuple(ViewedToken(f"w{i}\n", 2, "trained") for i in range(150))
    return ViewedExample("a", (*context, *trained, *context))


@pytest.mark.parametrize("unit, each", [("text\n", 1), ("word ", 16)])
def test_long_context_is_folded_and_what_is_trained_never(unit: str, each: int) -> None:
    example = long_example(unit, 100 * each)
    text = shown([example])
    hidden = [int(n.replace(",", "")) for n in re.findall(r"… ([\d,]+) tokens hidden …", text)]
    assert len(hidden) == 2 and min(hidden) > 50 * each
    assert sum(hidden) + text.count(unit.strip()) == 200 * each
    assert all(f"w{i}⏎" in text for i in range(150))
    assert text.count("\n") < 4 + 150 + 4 * 22
    short = shown([long_example(unit, 50 * each)])
    assert "hidden" not in short


def test_one_token_of_many_lines_is_not_lost() -> None:
    tokens = (ViewedToken("x\n" * 200, 1, "context"), ViewedToken("y", 2, "trained"))
    assert "⟦y⟧" in shown([ViewedExample("a", tokens)])
