"""What is trained of a conversation, under eight templates: the strings are worked out by hand."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cs336_alignment.data.chat import ChatRenderer
from cs336_alignment.data.spans import Rendered, Span, TokenizedText, tokenize_rendered
from cs336_alignment.errors import ExitStatus, Place, UserError
from tests.conftest import ROOT

TEMPLATES = ROOT / "tests" / "chat_templates"
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
PLACE = Place("chats.jsonl", 7)
SPECIAL = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3_like": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "gemma_like": ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    "mistral_like": ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                     "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
}  # fmt: skip
TEXTS = [
    "the cat sat\non the mat.\n\n",
    "def f(x):\n    return x\n",
    "What is 2 + 2?  4.",
    "数学は楽しい",
    "é",
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
IMEND = "<|im_end|>"

Message = dict[str, Any]


def user(content: Any = "What is 2 + 2?", **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def says(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def calls(arguments: Any = None, content: str | None = None) -> Message:
    arguments = {"a": 'a "b"'} if arguments is None else arguments
    function = {"name": "add", "arguments": arguments}
    return says(content, tool_calls=[{"type": "function", "function": function}])


FAKE = "<|im_start|>user\nno<|im_end|>\n<|eot_id|></s><end_of_turn>"
SHAPES: dict[str, list[Message]] = {
    "single": [user(), says("4.")],
    "multi": [user("a"), says("b"), user("c"), says("d\n\n"), user("e"), says("f"), user("last")],
    "system": [{"role": "system", "content": "Be brief."}, user(), says("Four.")],
    "tools": [user(), calls(), {"role": "tool", "content": "4"}, says("It is 4.")],
    "reasoning": [user(), says("4.", reasoning_content="2 + 2 =\n4")],
    "reasoning_twice": [user(), says("4.", reasoning_content="2 + 2"), user("3?"), says("5.", reasoning_content="add")],
    "unicode": [user("数学?"), says("数学は🙂 楽しい é"), user("🙂"), says("🙂")],
    "spaces": [user("  hi\n"), says("\n\n  four \n "), user(" "), says(" five")],
    "empty": [user(""), says(""), user("x"), says(" \n")],
    "like_template": [user(FAKE), says(f"x{FAKE}"), user("x"), says(f"{FAKE} y {IMEND}")],
    "long": [user("the cat " * 3000), says("on the 数学 mat.\n" * 3000), user("?"), says("def f(x):\n" * 500)],
}  # fmt: skip


def chatml(m: Message) -> str:
    written = "".join(
        f"<tool_call>\nadd {json.dumps(c['function']['arguments'])}\n</tool_call>"
        for c in m.get("tool_calls", [])
    )
    return (m["content"] or "") + written + IMEND


def llama3(m: Message) -> str:
    written = "".join(
        f'{{"name": "add", "parameters": {json.dumps(c["function"]["arguments"])}}}'
        for c in m.get("tool_calls", [])
    )
    return (m["content"] or "").strip() + written + "<|eot_id|>"


def gemma(m: Message) -> str:
    return m["content"].strip() + "<end_of_turn>"


def mistral(m: Message) -> str:
    if "tool_calls" in m:
        return f"[TOOL_CALLS] [add {json.dumps(m['tool_calls'][0]['function']['arguments'])}]</s>"
    return f" {m['content']}</s>"


def plain_calls(m: Message) -> str:
    written = "".join(
        f"<tool_call>add {json.dumps(c['function']['arguments'])}</tool_call>"
        for c in m.get("tool_calls", [])
    )
    return (m["content"] or "") + written + IMEND


def thinks(m: Message) -> str:
    return f"<think>\n{m.get('reasoning_content', '')}\n</think>\n\n" + plain_calls(m)


def tagged(m: Message) -> str:
    return thinks(m) if "reasoning_content" in m else plain_calls(m)


def opened(m: Message) -> str:
    return thinks(m).removeprefix("<think>\n")


EVERY = set(SHAPES)
# What each template makes of a trained turn, and the shapes that it refuses with an error.
CASES: dict[str, tuple[Callable[[Message], str], dict[str, set[str]]]] = {
    "chatml": (chatml, {}),
    "llama3_like": (llama3, {}),
    "gemma_like": (gemma, {"D402": {"system", "tools"}}),
    "mistral_like": (mistral, {}),
    "drops_reasoning": (thinks, {"D401": EVERY - {"single", "system", "reasoning"}}),
    "not_prefix_stable": (plain_calls, {"D401": EVERY}),
    "generation_tags": (tagged, {}),
    "opens_think": (
        opened, {"D401": EVERY - {"reasoning", "reasoning_twice", "tools"}, "D404": {"tools"}}
    ),
}  # fmt: skip


def byte_tokenizer(
    template: str, *, bos_added: bool = False, texts: Sequence[str] = (), **pre: Any
) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE with the special tokens of a template."""
    special = list(SPECIAL.get(template, SPECIAL["chatml"]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **pre)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator([*TEXTS, *texts] * 4, trainer)
    if bos_added:
        bos = backend.token_to_id(special[0])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], bos)]
        )
    return wrap(backend, template, special[0], special[1])


def wrap(backend: Tokenizer, template: str, bos: str, eos: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if template else None
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    train_on: str = "response",
    tools: Any = None,
) -> Rendered:
    return ChatRenderer(tokenizer, train_on).render(messages, tools, PLACE)


def trained(row: TokenizedText, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode every trained stretch of a row."""
    borders = np.flatnonzero(np.diff(row.weights > 0, prepend=False, append=False)).tolist()
    return [str(tokenizer.decode(row.input_ids[a:b], clean_up_tokenization_spaces=False))
            for a, b in zip(borders[::2], borders[1::2], strict=True)]  # fmt: skip


def check_row(row: TokenizedText, rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> None:
    assert row.input_ids.dtype == np.int32 and row.weights.dtype == np.float32
    assert len(row.input_ids) == len(row.weights)
    assert tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False) == rendered.text


def error_of(
    code: str, act: Callable[[], Any], status: ExitStatus = ExitStatus.BAD_DATA
) -> UserError:
    with pytest.raises(UserError) as caught:
        act()
    assert caught.value.code == code, caught.value
    assert caught.value.status == status
    return caught.value


def has_tools(shape: str, template: str) -> list[Any] | None:
    return TOOLS if shape == "tools" and template not in ("gemma_like",) else None


@pytest.mark.parametrize("bos_added", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", CASES)
@pytest.mark.fault("T24 chat templates of every behaviour")
def test_the_matrix(template: str, shape: str, bos_added: bool) -> None:
    tokenizer = byte_tokenizer(template, bos_added=bos_added)
    writes, refused = CASES[template]
    messages = SHAPES[shape]
    renderer = ChatRenderer(tokenizer, "assistant")
    tools = has_tools(shape, template)
    for code in (code for code, shapes in refused.items() if shape in shapes):
        assert error_of(code, lambda: renderer.render(messages, tools, PLACE)).place == PLACE
        return
    rendered = renderer.render(messages, tools, PLACE)
    [row] = tokenize_rendered([rendered], tokenizer)
    check_row(row, rendered, tokenizer)
    expected = [writes(message) for message in messages if message["role"] == "assistant"]
    assert trained(row, tokenizer) == expected
    assert (np.unique(row.weights) == [0, 1]).all()
    assert list(row.input_ids[:2]).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "template", ["chatml", "drops_reasoning", "generation_tags", "mistral_like"]
)
def test_last_turn_trains_the_last_one_alone(template: str, shape: str) -> None:
    tokenizer = byte_tokenizer(template)
    messages = SHAPES[shape]
    if template == "drops_reasoning" and messages[-1]["role"] != "assistant":
        error_of("D401", lambda: render(tokenizer, messages, "last_turn"))
        return
    rendered = render(tokenizer, messages, "last_turn", has_tools(shape, template))
    [row] = tokenize_rendered([rendered], tokenizer)
    last = [message for message in messages if message["role"] == "assistant"][-1]
    assert trained(row, tokenizer) == [CASES[template][0](last)]


@pytest.mark.parametrize("template", ["chatml", "not_prefix_stable", "opens_think"])
def test_all_trains_every_token(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    rendered = render(tokenizer, SHAPES["multi"], "all")
    assert rendered.spans == (Span(0, len(rendered.text)),)
    [row] = tokenize_rendered([rendered], tokenizer)
    assert (row.weights == 1).all() and not row.boundary_moved
    check_row(row, rendered, tokenizer)
    flagged = [user(), says("4", train=False)]
    assert error_of("D407", lambda: render(tokenizer, flagged, "all")).hint


def test_flags_choose_and_weigh_turns() -> None:
    tokenizer = byte_tokenizer("chatml")
    messages = [user("a"), says("b", train=False), user("c"), says("d", weight=0.25, train=True),
                user("e"), says("f", weight=0), user("g"), says("h", train=None, weight=None)]  # fmt: skip
    rendered = render(tokenizer, messages)
    assert [(rendered.text[s.start : s.end], s.weight) for s in rendered.spans] == [
        (f"d{IMEND}", 0.25),
        (f"h{IMEND}", 1.0),
    ]
    [row] = tokenize_rendered([rendered], tokenizer)
    assert trained(row, tokenizer) == [f"d{IMEND}", f"h{IMEND}"]
    assert set(row.weights.tolist()) == {0.0, 0.25, 1.0}
    assert "train" in messages[1]  # the caller's messages stay as they are
    unflagged = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]
    assert rendered.text == render(tokenizer, unflagged).text
    assert render(tokenizer, messages[:2]).spans == ()
    assert render(tokenizer, messages[:6], "last_turn").spans == ()
    assert render(tokenizer, [user()]).spans == ()


def test_a_template_never_sees_the_flags() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m | list | join(',') }}{% endfor %}"
    assert render(tokenizer, [user(), says("4", train=False, weight=2)]).text == "role,content" * 2


@pytest.mark.parametrize(
    ("message", "code", "field"),
    [
        ({"role": "gpt", "content": "4"}, "D405", "messages[1].role"),
        ({"role": ["user"], "content": "4"}, "D405", "messages[1].role"),
        ({"content": "4"}, "D405", "messages[1].role"),
        ("hello", "D405", "messages[1]"),
        (says(None), "D405", "messages[1].content"),
        (says(None, tool_calls=[]), "D405", "messages[1].content"),
        (says({"text": "4"}), "D405", "messages[1].content"),
        ({"role": "tool", "content": None}, "D405", "messages[1].content"),
        (says("4", tool_calls="add"), "D405", "messages[1].tool_calls"),
        (user([{"type": "text", "text": "see"}, {"type": "image", "url": "x.png"}]), "D406", "messages[1].content"),
        (user([{"type": "audio", "audio": "x"}]), "D406", "messages[1].content"),
        (says(["4"]), "D406", "messages[1].content"),
        (user(train=True), "D407", "messages[1].train"),
        (user(weight=0.5), "D407", "messages[1].weight"),
        (says("4", train=1), "D407", "messages[1].train"),
        (says("4", train="no"), "D407", "messages[1].train"),
        (says("4", weight=-0.5), "D407", "messages[1].weight"),
        (says("4", weight=float("inf")), "D407", "messages[1].weight"),
        (says("4", weight=float("nan")), "D407", "messages[1].weight"),
        (says("4", weight=True), "D407", "messages[1].weight"),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(message: Any, code: str, field: str) -> None:
    error = error_of(code, lambda: render(byte_tokenizer("chatml"), [user(), message]))
    assert error.place == Place(PLACE.path, PLACE.line, field)
    if isinstance(message, dict) and "image" in str(message):
        assert "image" in error.message


def test_an_empty_conversation_and_half_a_surrogate_pair_are_refused() -> None:
    tokenizer = byte_tokenizer("chatml")
    error_of("D405", lambda: render(tokenizer, []))
    error_of("D405", lambda: render(tokenizer, [user("\ud83d"), says("4")]))


def test_text_parts_are_joined_as_the_template_does() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2"}]
    tokenizer = byte_tokenizer("chatml")
    assert "user\n2 + 2<|im_end|>" in render(tokenizer, [user(parts), says(parts)]).text
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{{ m.content | map(attribute='text') | join('\n') }}{% endif %}{% endfor %}"
    )
    assert render(tokenizer, [user(parts)]).text == "2 + \n2"


def test_the_error_says_what_the_template_does() -> None:
    tokenizer = byte_tokenizer("drops_reasoning")
    error = error_of("D401", lambda: render(tokenizer, SHAPES["reasoning_twice"]))
    assert "message 1" in error.message
    assert (
        error.hint is not None
        and "data.train_on=last_turn" in error.hint
        and "generation" in error.hint
    )
    assert error.expected is not None and "<think>\\n2 + 2" in error.expected
    assert error.got is not None and "<think>" not in error.got and "\n" not in error.got
    assert len(error.expected) <= 42 and error.place == PLACE
    unstable = error_of(
        "D401", lambda: render(byte_tokenizer("not_prefix_stable"), SHAPES["multi"])
    )
    assert unstable.hint is not None and "last_turn" not in unstable.hint
    assert unstable.expected is not None and "count\\n1<|im_end|>" in unstable.expected
    opens = error_of("D401", lambda: render(byte_tokenizer("opens_think"), SHAPES["single"]))
    assert opens.expected is not None and "<think>" in opens.expected
    assert "generation prompt" in opens.message and "generation prompt" not in error.message
    refuses = error_of("D402", lambda: render(byte_tokenizer("gemma_like"), SHAPES["system"]))
    assert "the role system is not known" in refuses.message
    again = error_of(
        "D402", lambda: render(byte_tokenizer("gemma_like"), [user(), user(), says("4")])
    )
    assert "must alternate" in again.message


def test_reasoning_inside_the_content_is_not_lost_unseen() -> None:
    """A template that cuts `<think>` out of earlier contents rewrites what is trained."""
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [user(), says("<think>2</think>4"), user(), says("<think>3</think>5")]
    error_of("D401", lambda: render(tokenizer, messages))
    rendered = render(tokenizer, messages, "last_turn")
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [f"<think>3</think>5{IMEND}"]
    assert rendered.changed_characters == len("<think>2</think>4")


@pytest.mark.fault("T24 chat templates of every behaviour")
def test_no_template_and_ignored_tools() -> None:
    backend = byte_tokenizer("chatml").backend_tokenizer
    bare = wrap(backend, "", "<|im_start|>", IMEND)
    assert error_of("D403", lambda: ChatRenderer(bare, "response"), ExitStatus.BAD_CONFIG).hint
    error_of("D404", lambda: render(byte_tokenizer("gemma_like"), SHAPES["single"], tools=TOOLS))
    assert render(byte_tokenizer("gemma_like"), SHAPES["single"], tools=[]).spans


def test_arguments_are_never_escaped_twice() -> None:
    tokenizer = byte_tokenizer("chatml")
    as_object = render(tokenizer, [user(), calls({"a": 'é "b"'})]).text
    assert '{"a": "é \\"b\\""}' in as_object
    assert render(tokenizer, [user(), calls(json.dumps({"a": 'é "b"'}))]).text == as_object
    flat = [user(), says("", tool_calls=[{"name": "add", "arguments": '{"a": 1}'}])]
    assert '<tool_call>\nadd {"a": 1}\n' in render(tokenizer, flat).text
    assert '"not json"' in render(tokenizer, [user(), calls("not json")]).text
    wants_text = "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ ARGS }}{% endfor %}{% endfor %}"
    given = '{"a":  "x"}'  # two spaces: not what json.dumps writes
    for args in (
        "c.function.arguments + ''",
        "c.function.arguments",
    ):  # fails on an object; writes it as Python does
        tokenizer.chat_template = wants_text.replace("ARGS", args)
        assert render(tokenizer, [user("q"), calls(given)]).text == "qadd" + given
        assert render(tokenizer, [user("q"), calls({"a": "x"})]).text == 'qadd{"a": "x"}'


@pytest.mark.parametrize(
    ("template", "messages", "changed"),
    [
        ("chatml", SHAPES["spaces"], 0),
        ("chatml", SHAPES["reasoning"], len("2 + 2 =\n4")),  # the template does not read it
        ("chatml", SHAPES["tools"], 0),
        ("llama3_like", [user(" a b\n"), says("  \n4 ")], 3 + 3 - 1 + 0),
        ("mistral_like", SHAPES["system"], 0),
        ("drops_reasoning", SHAPES["reasoning"], 0),
    ],
)  # fmt: skip
def test_changed_characters(template: str, messages: list[Message], changed: int) -> None:
    tokenizer = byte_tokenizer(template)
    if template == "llama3_like":
        changed = sum(len(m["content"]) - len(m["content"].strip()) for m in messages)
    assert render(tokenizer, messages, "last_turn").changed_characters == changed


def test_the_end_of_a_turn() -> None:
    """Where a template writes no special token, several, or plain text after the content."""
    tokenizer = byte_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), "</turn>"])
    loop = "{% for m in messages %}{{ m.role + ':' + m.content + END }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    messages = [user("end"), says("end </turn>"), user("e"), says("end  ")]
    for end, stop in [
        ("'\n\n'", ""), ("''", ""), ("'</turn>\n\n'", "</turn>"), ("' </turn><|im_end|>\n'", " </turn><|im_end|>"),
        ("'<|im_end|>\nend of turn\n'", "<|im_end|>"), ("'\nend\n'", ""),
        ("'<|im_end|>\n' + ('' if add_generation_prompt or not loop.last else '</turn>')", "<|im_end|>"),
    ]:  # fmt: skip
        tokenizer.chat_template = loop.replace("END", end)
        rendered = render(tokenizer, messages)
        texts = [rendered.text[s.start : s.end] for s in rendered.spans]
        assert texts == [f"end </turn>{stop}", f"end  {stop}"], end
        [row] = tokenize_rendered([rendered], tokenizer)
        assert trained(row, tokenizer) == texts
    tokenizer.chat_template = loop.replace("END", "''")
    assert render(tokenizer, [user(), says("")]).spans == ()


def test_tool_turns_may_end_with_another_token() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.add_tokens(["<|eom|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{{ ((m.tool_calls[0].function | tojson) + '<|eom|>' if m.tool_calls else '<|im_end|>') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [user(), calls(content="See: "), *SHAPES["tools"][2:]]
    rendered = render(tokenizer, messages)
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [
        'See: {"name": "add", "arguments": {"a": "a \\"b\\""}}<|eom|>',
        f"It is 4.{IMEND}",
    ]


def test_an_assistant_may_begin() -> None:
    tokenizer = byte_tokenizer("chatml")
    rendered = render(tokenizer, [says("hi"), user(), says("4")])
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [f"hi{IMEND}", f"4{IMEND}"]
    assert render(tokenizer, [user(), says("a"), says("b")]).spans[1].start > 0


@pytest.mark.parametrize("inside", ["{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
                                    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
                                    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"])  # fmt: skip
def test_generation_tags_may_stop_before_or_after_the_end_of_turn(inside: str) -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}INSIDE{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    ).replace("INSIDE", inside)
    rendered = render(
        tokenizer,
        [user(), says(f"a {IMEND}"), user(), says("b", weight=0.5), user(), says("c", train=False)],
    )
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [
        f"a {IMEND}{IMEND}",
        f"b{IMEND}",
    ]
    assert [s.weight for s in rendered.spans] == [1.0, 0.5]


def test_tags_around_something_else_are_not_believed() -> None:
    tokenizer = byte_tokenizer("chatml")
    shape = "{{ messages | length }}{% for m in messages %}{{ m.role + ':' }}BODY{% endfor %}"
    for body in ("{% generation %}{{ m.content }}{% endgeneration %}",  # the user's too
                 "{% if m.role == 'assistant' %}{% generation %}x{% endgeneration %}{% endif %}{{ m.content }}"):  # fmt: skip
        tokenizer.chat_template = shape.replace("BODY", body)
        error = error_of("D401", lambda: render(tokenizer, [user("4."), says("4.")]))
        assert error.hint is not None and error.hint.startswith("let its {% generation %} tags")


def test_renders_no_more_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    for template, most in [("chatml", 1), ("llama3_like", 2)]:
        tokenizer = byte_tokenizer(template)
        renderer = ChatRenderer(tokenizer, "response")
        count = 0
        original = type(tokenizer).apply_chat_template

        def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return _original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "apply_chat_template", counted)
            renderer.render(SHAPES["spaces"] * 3, None, PLACE)
        assert count <= 6 * most + 1


def test_a_border_inside_a_token_moves_it() -> None:
    """`\\n\\n` is one token of the whole text; the model, which gets the prompt first, sees two."""
    tokenizer = byte_tokenizer("chatml", texts=["assistant\n\nfour"], use_regex=False)
    rendered = [render(tokenizer, [user(), says(text)]) for text in ("\nfour", "4.")]
    moved, kept = tokenize_rendered(rendered, tokenizer)
    joint = tokenizer(rendered[0].text, add_special_tokens=False)["input_ids"]
    assert moved.boundary_moved and moved.input_ids.tolist() != joint
    assert not kept.boundary_moved
    assert (
        kept.input_ids.tolist()
        == tokenizer(rendered[1].text, add_special_tokens=False)["input_ids"]
    )
    assert trained(moved, tokenizer) == [f"\nfour{IMEND}"] and trained(kept, tokenizer) == [
        f"4.{IMEND}"
    ]
    check_row(moved, rendered[0], tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_without_their_white_space_are_seen_through(shape: str) -> None:
    """trim_offsets leaves a token's white space out of its offsets; the ids do not depend on it."""
    exact, trimmed = byte_tokenizer("mistral_like"), byte_tokenizer("mistral_like")
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    rendered = [render(exact, SHAPES[shape], tools=has_tools(shape, "mistral_like"))]
    exact.chat_template = (  # the prompt ends with a space, which belongs to the next word's token
        "{% for m in messages %}{{ m.role + ': ' + (m.content or '') }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rendered.append(render(exact, SHAPES[shape]))
    assert shape != "multi" or tokenize_rendered(rendered, exact)[1].boundary_moved
    for a, b in zip(
        tokenize_rendered(rendered, exact), tokenize_rendered(rendered, trimmed), strict=True
    ):
        assert (
            a.input_ids.tolist() == b.input_ids.tolist()
            and a.weights.tolist() == b.weights.tolist()
        )
        assert a.boundary_moved == b.boundary_moved


def test_a_special_token_that_swallows_white_space_moves_nothing() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.add_tokens(
        [AddedToken("<|stop|>", rstrip=True, normalized=False)], special_tokens=True
    )
    tokenizer.chat_template = (
        (TEMPLATES / "chatml.jinja").read_text().replace("<|im_end|>", "<|stop|>")
    )
    rendered = render(tokenizer, SHAPES["multi"])
    [row] = tokenize_rendered([rendered], tokenizer)
    assert row.input_ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert (
        trained(row, tokenizer) == ["b<|stop|>", "d\n\n<|stop|>", "f<|stop|>"]
        and not row.boundary_moved
    )


def test_the_batch_is_neither_cut_nor_padded_and_order_is_kept() -> None:
    tokenizer = byte_tokenizer("chatml", bos_added=True)
    # What it is asked here stays in the backend.
    tokenizer(["a", "b c d"], truncation=True, max_length=4000, padding="max_length")
    renderer = ChatRenderer(tokenizer, "response")
    shapes = ["spaces", "single", "unicode", "long", "multi", "empty"]
    rendered = [renderer.render(SHAPES[shape], None, PLACE) for shape in shapes]
    together = tokenize_rendered(rendered, tokenizer)
    for row, each in zip(together, rendered, strict=True):
        check_row(row, each, tokenizer)
        [alone] = tokenize_rendered([each], tokenizer)
        assert (
            row.input_ids.tolist() == alone.input_ids.tolist()
            and row.weights.tolist() == alone.weights.tolist()
        )
    assert tokenize_rendered([], tokenizer) == []


def metaspace_tokenizer(scheme: str, *, unigram: bool = False) -> PreTrainedTokenizerFast:
    special = ["<unk>", *SPECIAL["chatml"]]
    texts = [*TEXTS, "assistant\nfour user\nfour", "\nfour"] * 20
    backend = Tokenizer(
        models.Unigram() if unigram else models.BPE(byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(
        {letter for text in texts for letter in text if not letter.isspace()}
        | {"\n", "▁", "<", ">", "|", "_", "Y", "u", "?"}
    )
    kind = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    more: dict[str, Any] = {"unk_token": "<unk>"} if unigram else {}
    backend.train_from_iterator(
        texts,
        kind(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
            **more,
        ),
    )
    return wrap(backend, "chatml", "<|im_start|>", IMEND)


@pytest.mark.parametrize("unigram", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_pieces_gain_no_space(scheme: str, unigram: bool) -> None:
    """Each piece would get a space of its own; the border's token is trained instead."""
    tokenizer = metaspace_tokenizer(scheme, unigram=unigram)
    rendered = [
        render(tokenizer, [user("four"), says(text), user("four"), says(text)])
        for text in ("four", "cat sat")
    ]
    for row, each in zip(tokenize_rendered(rendered, tokenizer), rendered, strict=True):
        assert row.input_ids.tolist() == tokenizer(each.text, add_special_tokens=False)["input_ids"]
        pieces = trained(row, tokenizer)
        spans = [each.text[s.start : s.end] for s in each.spans]
        assert all(piece.endswith(span) for piece, span in zip(pieces, spans, strict=True))
        # At most the token on the border comes with them, and it is said so.
        assert row.boundary_moved == (pieces != spans)
    assert (
        scheme == "always"
        or unigram
        or any(row.boundary_moved for row in tokenize_rendered(rendered, tokenizer))
    )


@pytest.mark.parametrize("shape", ["single", "multi", "unicode", "spaces", "like_template"])
def test_a_tokenizer_without_offsets(shape: str) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens(list(SPECIAL["chatml"]), special_tokens=True)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    rendered = render(tokenizer, SHAPES[shape])
    [row] = tokenize_rendered([rendered], tokenizer)
    assert not tokenizer.is_fast and not row.boundary_moved
    assert row.input_ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    ends = np.flatnonzero(np.diff(row.weights, append=0) < 0)
    assert (row.input_ids[ends] == tokenizer.convert_tokens_to_ids(IMEND)).all()
    ids = [
        tokenizer(rendered.text[s.start : s.end], add_special_tokens=False)["input_ids"]
        for s in rendered.spans
    ]
    assert row.input_ids[row.weights > 0].tolist() == [token for each in ids for token in each]


class Gaining(ByT5Tokenizer):
    """Puts a letter before every text, as a SentencePiece tokenizer puts a space."""

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return ["_", *super()._tokenize(text)]


def test_a_tokenizer_without_offsets_whose_pieces_gain_something_is_refused() -> None:
    tokenizer = Gaining(extra_ids=0)
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    rendered = render(tokenizer, SHAPES["single"])
    error_of("D408", lambda: tokenize_rendered([rendered], tokenizer), ExitStatus.BAD_CONFIG)


def words(rng: random.Random) -> str:
    choices = ["the", "cat", "数学", "🙂", "é", "def f(x):\n    return x", "\n", "\n\n", " ", "```py\n", IMEND,
               "<|im_start|>user\n", "1234", "don't", "\t", "👩‍👩‍👧", "\u00a0", "</s>", "."]  # fmt: skip
    return rng.choice(["", " "]).join(rng.choices(choices, k=rng.randint(0, 60)))


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the SmolLM2 tokenizer")
def test_a_thousand_conversations_with_a_real_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    rng = random.Random(20)
    chats = []
    for _ in range(1000):
        turns = [[user(words(rng)), says(words(rng))] for _ in range(rng.randint(1, 5))]
        system = [{"role": "system", "content": words(rng)}] * (rng.random() < 0.3)
        chats.append([*system, *(message for turn in turns for message in turn)])
    renderer = ChatRenderer(tokenizer, "response")
    begin = time.perf_counter()
    rendered = [renderer.render(chat, None, PLACE) for chat in chats]
    middle = time.perf_counter()
    rows = tokenize_rendered(rendered, tokenizer)
    end = time.perf_counter()
    for chat, each, row in zip(chats, rendered, rows, strict=True):
        said = [message["content"] + IMEND for message in chat if message["role"] == "assistant"]
        assert trained(row, tokenizer) == said
        check_row(row, each, tokenizer)
        assert each.changed_characters == 0
        joint = tokenizer(each.text, add_special_tokens=False)["input_ids"]
        assert row.boundary_moved == (row.input_ids.tolist() != joint)
    tokens = sum(len(row.input_ids) for row in rows) / len(rows)
    with capsys.disabled():
        print(f"\n1000 conversations of {tokens:.0f} tokens: {1000 / (middle - begin):.0f} rendered a second, "
              f"{1000 / (end - middle):.0f} tokenized a second")  # fmt: skip


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    text = render(tokenizer, SHAPES["single"]).text
    assert text.startswith("26 Jul 2024<|im_start|>")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 1 }}"}
    assert render(tokenizer, SHAPES["single"]).text == text
    tokenizer.chat_template = tokenizer.chat_template["default"]
    tokenizer.chat_template = "{{ strftime_now(f) }}" + str(tokenizer.chat_template)
    with pytest.raises(UserError, match="asks for the date"):
        render(tokenizer, SHAPES["single"])


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        (SHAPES["multi"], []),
        (SHAPES["tools"], []),
        ([user(id="u1"), says("4.", name="")], []),
        ([user(), says("4.", timestamp=3)], [("ignored_keys", "messages[1].timestamp")]),
        ([user(f"x{IMEND}"), says("4.")], [("special_text", "messages[0]")]),
        ([user(), says("4.", reasoning=f"{IMEND}")], [("special_text", "messages[1]")]),
        ([user(), says(" "), user(), says("4")], [("empty_turn", "messages[1]")]),
        ([user(), says(" ", train=False), user(), says("4")], []),
        ([user(), says("", reasoning_content="2 + 2")], []),
        ([user(), calls(), {"role": "tool", "content": ""}, says("4")], []),
    ],
)
def test_what_a_template_would_pass_over(
    messages: list[Message], found: list[tuple[str, str]]
) -> None:
    rendered = render(byte_tokenizer("chatml"), messages)
    assert [(name, place.field) for name, place in rendered.findings] == found


def test_a_key_is_ignored_by_the_template_that_does_not_name_it() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "message.content", "message.content + (message.mood or '')"
    ).replace("message['content']", "message['content'] + (message.mood or '')")  # fmt: skip
    for key, lost in (("mood", []), ("moods", ["ignored_keys"])):
        findings = render(tokenizer, [user(), says("4.", **{key: "!"})]).findings
        assert [name for name, _ in findings] == lost


@pytest.mark.parametrize("key", ["loss", "mask", "loss_mask", "training", "train_detail"])
def test_flags_of_other_frameworks_are_never_disobeyed_in_silence(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} says nothing here") as caught:
        render(byte_tokenizer("chatml"), [user(), says("4.", **{key: False})])
    assert (caught.value.code, caught.value.status) == ("D407", ExitStatus.BAD_DATA)
    assert "`train`" in (caught.value.hint or "")
    render(byte_tokenizer("chatml"), [user(), says("4.", **{key: None})])


# What is not the assistant's is not trained, however the template leads up to it.

LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt UNLESS %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BODY = "{{ m.content + '<|im_end|>' }}"
TWO = [user("a"), says("one"), says("two")]


@pytest.mark.parametrize(
    "template",
    [
        LOOP.partition("{% if")[0].replace("BODY", BODY),  # no generation prompt
        LOOP.replace("BODY", BODY).replace("UNLESS", "and messages[-1].role != 'assistant'"),
        LOOP.replace("BODY", BODY).replace("UNLESS", ""),
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
    ],
    ids=[
        "without a generation prompt",
        "not after the assistant",
        "plain",
        "tags around the header",
    ],
)
def test_headers_are_never_trained(template: str) -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = template
    rendered = render(tokenizer, TWO)
    want = [f"one{IMEND}", f"two{IMEND}"]
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == want


def test_generation_tags_come_before_what_could_be_found_otherwise() -> None:
    tokenizer = byte_tokenizer("chatml")
    said = "<think>x</think>{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    body = "{% if m.role == 'assistant' %}" + said + "{% else %}" + BODY + "{% endif %}"
    tokenizer.chat_template = LOOP.replace("BODY", body).replace("UNLESS", "")
    rendered = render(tokenizer, [user(), says("ans")])
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [f"ans{IMEND}"]


def test_words_before_the_end_of_a_turn_are_trained_with_it() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\nEND<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    rendered = render(tokenizer, [user("a"), says("one"), user("b"), says("two")])
    want = [f"one\nEND{IMEND}", f"two\nEND{IMEND}"]
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == want


def test_what_a_user_says_does_not_change_the_spelling_of_arguments() -> None:
    tokenizer = byte_tokenizer("chatml")
    with_words = [user("call it with {'a': 1}"), calls({"a": 1})]
    assert 'add {"a": 1}' in render(tokenizer, with_words).text


@pytest.mark.parametrize(
    ("written", "ignored"),
    [
        ("m.tool_calls[0].function | tojson", "the name of tool call 1 of message 1"),
        ("m.tool_calls | map(attribute='function.name') | join", "the arguments of tool call 0"),
    ],
)
def test_a_part_of_a_call_that_is_left_out_is_refused(written: str, ignored: str) -> None:
    tokenizer = byte_tokenizer("chatml")
    body = (
        "{{ (m.content or '') }}{% if m.tool_calls %}{{ "
        + written
        + " }}{% endif %}{{ '<|im_end|>' }}"
    )
    tokenizer.chat_template = LOOP.replace("BODY", body).replace("UNLESS", "")
    two = calls()
    two["tool_calls"] = [*two["tool_calls"], *calls({"b": 2})["tool_calls"]]
    error = error_of("D404", lambda: render(tokenizer, [user(), two]))
    assert ignored in error.message


def test_a_tool_that_is_left_out_is_refused() -> None:
    tokenizer = byte_tokenizer("chatml")
    template = str(LOOP.replace("BODY", BODY).replace("UNLESS", ""))
    tokenizer.chat_template = "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + template
    tools = [TOOLS[0], {"type": "function", "function": {"name": "sub", "parameters": {}}}]
    assert render(tokenizer, SHAPES["single"], tools=tools[:1]).spans
    error = error_of("D404", lambda: render(tokenizer, SHAPES["single"], tools=tools))
    assert "ignores tool 1" in error.message


def test_a_key_that_the_template_only_mentions_is_not_taken_for_read() -> None:
    tokenizer = byte_tokenizer("chatml")
    assert "function.name" in str(tokenizer.chat_template)
    rendered = render(tokenizer, [user(), says("4.", name="Alice")])
    assert [(name, place.field) for name, place in rendered.findings] == [
        ("ignored_keys", "messages[1].name")
    ]
    tokenizer.chat_template = "{# for training only #}" + str(tokenizer.chat_template)
    error_of("D407", lambda: render(tokenizer, [user(), says("4.", training=False)]))


def test_flags_that_say_what_happens_anyway_are_taken() -> None:
    messages = [user(weight=0), says("4."), user(train=False), says("5.", weight=0)]
    assert len(render(byte_tokenizer("chatml"), messages).spans) == 1


def test_a_tokenizer_that_splits_special_tokens_is_refused() -> None:
    tokenizer = byte_tokenizer("chatml")
    tokenizer.split_special_tokens = True
    error_of("D410", lambda: ChatRenderer(tokenizer, "response"), ExitStatus.BAD_CONFIG)


def test_an_end_that_only_the_last_turn_lacks_is_trained_where_it_stands() -> None:
    tokenizer = byte_tokenizer("chatml")
    eos = tokenizer.eos_token
    body = "{{ m.content }}{{ '' if loop.last and m.role == 'assistant' else eos_token }}"
    tokenizer.chat_template = LOOP.replace("BODY", body).replace("UNLESS", "")
    rendered = render(tokenizer, [user("a"), says("one"), user("b"), says("two")])
    want = [f"one{eos}", "two"]  # L102 tells of the second
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == want
