"""What a microbatch would take of memory: the program itself runs on tensors that have shapes and
no values, and what is alive at each moment is added up.

No table of constants per architecture: what a layer keeps for the backward pass, with and without
recomputation, in every layout and precision, is what its own code keeps. torch's `FakeTensorMode`
chooses the same kernels as the device would; what these need within themselves is mostly not seen.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.errors import UserError, first_line
from cs336_alignment.microbatch import Batching, Microbatch, with_tensors
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.model.source import ModelSource
from cs336_alignment.training.batching_choice import dropout_options
from cs336_alignment.training.heap import Heap
from cs336_alignment.training.live_bytes import PASSING, LiveBytes
from cs336_alignment.training.memory import GRADIENTS, Needs, average_bytes, held_bytes, state_bytes
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.rehearsal import try_microbatch
from cs336_alignment.training.without_values import ReadAsOne, exchange_tensors, without_values

WEIGHTS, STATE, ACTIVATIONS, HEAD = "weights", "optimizer state", "activations", "LM head"
GAPS = "holes in the heap"
EIGHT_BIT_PASSING = 16  # bytes a value of the largest tensor: moments and quotients in float32
# Small things settle in the holes of large ones: the heap grows in the first microbatches.
PASSES = 4


@dataclass(frozen=True)
class Foresight:
    """A policy without values, to try microbatches on.

    Attributes:
        policy: the module that would be trained.
        mode: within which its tensors live.
        device: that they seem to be on.
        config: of the run.
    """

    policy: Policy
    mode: contextlib.AbstractContextManager[object]
    device: torch.device
    config: Config

    @staticmethod
    def of(
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Foresight:
        """Build the policy as a run does; see `without_values`.

        Raises:
            UserError: there is no such model, what is to be trained of it does not fit it, or it
                cannot recompute its layers; 4-bit weights, whose kernels need values (78).
        """
        if config.lora.quantize is not None:
            raise UserError(
                "R312",
                f"what lora.quantize={config.lora.quantize} takes is not foretold: its kernels "
                "need values",
                hint="`cs336-sft train` tries its largest microbatch before the first step",
            )
        model = without_values(source, tokenizer, config, autocast_dtype)
        with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
            exchange_tensors(model, lambda tensor: torch.empty_like(tensor, device=device))
            if recompute := config.trainer.gradient_checkpointing:
                enable_checkpointing(model, selective=recompute == "selective")
            return Foresight(Policy(model, autocast_dtype), mode, device, config)

    def batching(self, wanted: str, longest: int) -> Batching:
        """Say which layout a run would choose if the model computes what its config says."""
        if wanted != "auto":
            return wanted  # type: ignore[return-value]  # checked with the config
        model = self.policy.model
        if why_not_flat(model, longest) or model.config._attn_implementation != FLAT_ATTENTION:
            return "padded"
        noisy = self.config.trainer.neftune_alpha is not None
        return "flat" if noisy or dropout_options(self.policy) else "flat_shared_prefix"

    def needs(self, batch: Microbatch, *, accumulates: bool, heap: Heap | None = None) -> Needs:
        """Calls backward: train on a microbatch, and see what is alive.

        Args:
            batch: with values, on the CPU.
            accumulates: whether the gradients of another microbatch are there already.
            heap: that is asked for what a run would ask for; None: holes in it do not count.

        Raises:
            UserError: the model's code reads values, and there are none (70).
        """
        try:
            return self._watch(batch, accumulates, heap)
        except (RuntimeError, ValueError, TypeError, IndexError) as failure:
            raise UserError(
                "R309",
                "the memory of this architecture cannot be foretold: its code reads values",
                got=f"{type(failure).__name__}: {first_line(failure)}",
                hint="`cs336-sft train` tries its largest microbatch before the first step",
            ) from failure

    def _watch(self, batch: Microbatch, accumulates: bool, heap: Heap | None) -> Needs:
        model = self.policy.model
        with self.mode, LiveBytes(self.device, heap) as live:
            for tensor in (*model.parameters(), *model.buffers()):
                live.add(tensor, WEIGHTS)
            weights, gradients = live.now.total(), held_bytes(model)[1]
            stepping, state, _optimizer = self._at_step(live, weights + gradients)
            live.forget_peak()
            # Within the mode a copy to the same device, too, is a tensor of the mode's own.
            given = with_tensors(batch, lambda tensor: tensor.to(self.device, copy=True))
            handles = list(self._name_parts(live))
            try:
                for _ in range(PASSES if heap is not None else 2):
                    if not accumulates:
                        self.policy.zero_grad(set_to_none=True)
                    try_microbatch(self.policy, given)
            finally:
                for handle in handles:
                    handle.remove()
                self.policy.zero_grad(set_to_none=True)
        parts = live.peak - Counter({WEIGHTS: weights})
        parts.pop(STATE, None)
        if heap is not None:
            parts[GAPS] = max(0, heap.grown - live.peak.total())
        return Needs(weights, gradients, state, 0, parts, stepping)

    def _at_step(self, live: LiveBytes, before: int) -> tuple[int, int, Any]:
        """Give what the optimizer's step needs in passing, its state, and what holds that."""
        model, options = self.policy.model, self.config.optimizer
        ema_decay = self.config.trainer.ema_decay
        if options.state_bits == 8:
            largest = max(p.numel() for p in model.parameters() if p.requires_grad)
            return EIGHT_BIT_PASSING * largest, state_bytes(model, options, ema_decay), None
        live.begin(STATE)
        optimizer = build_optimizer(model, options)
        with ReadAsOne():
            allocate_state(optimizer)
        state = live.now[STATE]
        stepping = live.peak.total() - before - state
        return stepping, state + average_bytes(model, ema_decay), optimizer

    def _name_parts(self, live: LiveBytes) -> Iterable[Any]:
        """Hook into the policy what each tensor is for."""
        base = self.policy.model.base_model
        yield base.register_forward_pre_hook(lambda *_: live.begin(ACTIVATIONS))
        yield base.register_forward_hook(lambda *_: live.begin(HEAD))
        yield self.policy.register_forward_hook(lambda *_: live.begin(PASSING))
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(
                    lambda p: live.move(p.grad, GRADIENTS)
                )
