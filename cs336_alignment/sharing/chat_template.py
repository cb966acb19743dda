"""A prompt template as a chat template, so that everyone asks the model as it was trained."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.templates import PLACEHOLDER, PromptTemplate
from cs336_alignment.data.tokenize import special_prefix, tokenize_prompts

ALONE = "trained on one question, and perhaps its response, alone"
PROBE = "What is {2} + 2?\n"  # with what templates and tokenizers could treat otherwise


def as_chat_template(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool,
    append_eos: bool,
) -> str | None:
    """Write a chat template that renders one question as training did, and perhaps its response.

    Args:
        template: of questions.
        tokenizer: of the model; as it is afterwards, too.
        add_special_tokens: whether prompts were trained with the tokenizer's special prefix.
        append_eos: whether responses were trained to end with EOS.

    Returns:
        The template; None: the tokenizer makes other tokens of what it renders than training did.
    """
    before, after = PLACEHOLDER.sub("\0", template.text).split("\0")
    prefix = special_prefix(tokenizer) if add_special_tokens else []
    start = str(tokenizer.decode(prefix)) if prefix else ""
    end = str(tokenizer.eos_token) if append_eos else ""
    # Jinja reads the escapes of its strings as Python does.
    text = (
        "{%- if messages | length > 2 or messages[0]['role'] != 'user' %}"
        f"{{{{- raise_exception({ALONE!r}) }}}}"
        "{%- endif %}"
        f"{{{{- {start + before!a} + messages[0]['content'] + {after!a} }}}}"
        "{%- if messages | length == 2 %}"
        f"{{{{- messages[1]['content'] + {end!a} }}}}"
        "{%- endif %}"
    )
    own, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        asked = [{"role": "user", "content": PROBE}]
        made = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    finally:
        tokenizer.chat_template = own
    trained = tokenize_prompts([template.fill(PROBE)], tokenizer, add_special_tokens)[0]
    return text if list(made) == trained else None
