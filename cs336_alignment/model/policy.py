"""The module that is trained: backbone and LM head in one forward, log-probs of response tokens
out.

DDP or FSDP2 wraps this module. Calling an inner module past it would skip their hooks and train
unsynchronized. T tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cs336_alignment.microbatch import Microbatch
from cs336_alignment.model.attention import FLAT_ATTENTION, autocasting, why_not_flat
from cs336_alignment.model.embedding_noise import noisy_embeddings
from cs336_alignment.model.lm_head import head_of, head_values
from cs336_alignment.model.log_probs import compute_entropy
from cs336_alignment.model.objective import Objective


class Policy(nn.Module):
    """A causal language model that gives log-probs at response positions only.

    Args:
        model: the Hugging Face model; its attention is switched to the one that takes flat rows, if
            it can.
        autocast_dtype: compute dtype inside `forward`; None: the weights' own.

    Attributes:
        compute_dtype: of the products; None: the weights' own. Where weights are sharded they are
            gathered in it, and `autocast_dtype` is None.
        compute_device: where weights are gathered that lie elsewhere; None: they are where they
            are computed with.
    """

    def __init__(self, model: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = self.compute_dtype = autocast_dtype
        self.compute_device: torch.device | None = None
        self.head = head_of(model)
        if why_not_flat(model, max_length=0) is None:
            model.set_attn_implementation(FLAT_ATTENTION)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.compute_device or next(self.parameters()).device

    def forward(
        self,
        batch: Microbatch,
        with_entropy: bool = False,
        slopes: Tensor | None = None,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Compute the log-probs of a microbatch's response tokens.

        Args:
            batch: on `device`.
            with_entropy: also give the entropy of each response position, without a graph.
            slopes: (R,) the gradient of the loss by each log-prob (or value of the objective), if
                known: saves a product in the head.
            objective: what is trained instead of the log-probs.

        Returns:
            log_probs (R,), differentiable, float32 or wider; entropies (R,) in nats, or None. With
            an objective its values (R,), differentiable; entropies; log_probs without a graph.
        """
        with autocasting(batch.input_ids.device, self.autocast_dtype):
            # use_cache=False: a cache makes transformers miss the borders of packed rows.
            inputs: dict[str, Any] = {
                "input_ids": batch.input_ids,
                "position_ids": batch.position_ids,
                "attention_mask": batch.attention_mask,
                "use_cache": False,
            }
            if batch.flat_layout is not None:
                inputs["flat_layout"] = batch.flat_layout
                # A 4-D mask is passed through as it is, so no dense (T, T) mask is built; never
                # read.
                inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
            if self.head is None:
                return self._whole_model(inputs, batch, with_entropy, objective)
            with noisy_embeddings(self.model, batch):
                hidden = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # (T, H)
            hidden = hidden.index_select(0, batch.response_index)  # (R, H)
            values = head_values(self.head, hidden, batch.labels, objective, with_entropy, slopes)
            return values[:2] if objective is None else values

    def _whole_model(
        self,
        inputs: dict[str, Any],
        batch: Microbatch,
        with_entropy: bool,
        objective: Objective | None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Use the model's own head, whose logits (T, V) exist for the time of this call."""
        with noisy_embeddings(self.model, batch):
            logits = self.model(**inputs).logits.flatten(0, 1)
        logits = logits.index_select(0, batch.response_index)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (R, V)
        picked = logits.gather(1, batch.labels[:, None]).squeeze(1)
        normalizers = logits.logsumexp(dim=-1)
        log_probs = picked - normalizers
        entropy = compute_entropy(logits.detach()) if with_entropy else None
        if objective is None:
            return log_probs, entropy
        return objective.values(log_probs, logits, normalizers), entropy, log_probs.detach()
