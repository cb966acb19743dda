"""Whether data fit a model: token ids below its embedding's rows, lengths within its positions."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cs336_alignment.errors import UserError


def embedding_rows(model: PreTrainedModel) -> int:
    """Count the rows of the input embedding; token ids must be below."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def check_fits(
    model: PreTrainedModel, highest_token_id: int, longest: int, generated: int | None = None
) -> None:
    """Refuse data that the model cannot take, before the first step.

    Args:
        model: the model.
        highest_token_id: over all examples.
        longest: tokens of the longest example.
        generated: tokens of the longest prompt that is generated for and of its response.

    Raises:
        UserError: a token id beyond the embedding, or an example beyond the model's positions (78).
    """
    rows = embedding_rows(model)
    if highest_token_id >= rows:
        raise UserError(
            "M105",
            "the tokenizer gives token ids that the model's embedding does not have",
            expected=f"ids below {rows}",
            got=str(highest_token_id),
            hint="model and tokenizer do not belong together",
        )
    config: PreTrainedConfig = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest - 1 > positions:
        raise UserError(
            "M106",
            "the longest example has more tokens than the model has positions",
            expected=f"at most {positions + 1} tokens",
            got=f"{longest} tokens",
            hint=f"data.max_length={positions + 1}",
        )
    if generated is not None:
        check_positions(positions, generated)


def check_positions(positions: int | None, generated: int) -> None:
    """Refuse prompts that leave no room for their responses.

    Args:
        positions: of the model; None: no bound is known.
        generated: tokens of the longest prompt that is generated for and of its response.

    Raises:
        UserError: they are more than the positions (78).
    """
    if positions is not None and generated > positions:
        raise UserError(
            "M108",
            "prompt and generated response have more tokens than the model has positions",
            expected=f"at most {positions} tokens",
            got=f"{generated} tokens",
            hint="lower evaluation.max_new_tokens, or leave out evaluation.generation_steps",
        )
