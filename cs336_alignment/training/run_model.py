"""The model of a run: refused where it cannot fit, loaded to be trained, given back in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cs336_alignment.config import Config
from cs336_alignment.model.adapters import adapter_tensors, is_adapted
from cs336_alignment.model.loading import load_model
from cs336_alignment.model.lora import copy_adapter
from cs336_alignment.model.narrow import narrowed_to
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.trainable import load_to_train
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.inputs import Inputs
from cs336_alignment.training.manifest import count_parameters
from cs336_alignment.training.memory import certain_needs, device_memory, placed, refuse_too_large
from cs336_alignment.training.parallel import Processes, set_threads
from cs336_alignment.training.reload_check import bit_sums, tensor_sums, trained_sums
from cs336_alignment.training.sharded_loading import load_sharded


@dataclass(frozen=True)
class RunModel:
    """Where a run's model comes from.

    Attributes:
        config: of the run.
        inputs: its source and tokenizer are read.
        processes: all of them call `load`.
        console: of this process.
    """

    config: Config
    inputs: Inputs
    processes: Processes
    console: Console

    def refuse_too_large(self, dtype: torch.dtype | None) -> None:
        """Refuse before it is loaded what cannot be trained in the memory found.

        Args:
            dtype: that autocast computes in; None: there is none.

        Raises:
            UserError: it cannot (78).
        """
        processes, config = self.processes, self.config
        needs = certain_needs(
            self.inputs.source, self.inputs.tokenizer, config, dtype, processes.count
        )
        if isinstance(needs, str):
            self.console.note(f"{'memory':<10} not foretold: {needs}")
            return
        for device, part in placed(needs, config, processes.device).items():
            found = device_memory(device, processes.local_count)
            warning = refuse_too_large(part, found, device, config)
            if warning is not None:
                self.console.warn(warning)

    def load(self, dtype: torch.dtype | None) -> tuple[Policy, dict[str, int]]:
        """Load it onto the device, whole or this process's part of it, and choose what of it is
        trained.

        Args:
            dtype: that autocast computes in, or sharded weights are gathered in.

        Returns:
            The policy; and the sums of what training must change, see `trained_sums`: empty where
            nobody compares.

        Raises:
            UserError: as `load_to_train` and `load_sharded`.
        """
        config, source, processes = self.config, self.inputs.source, self.processes
        self.console.note(f"loading {config.model.name_or_path}")
        watched = config.trainer.reload_check and (processes.is_main or processes.shards)
        before: dict[str, int] = {}

        def filled(tensors: Mapping[str, Tensor]) -> None:
            before.update(tensor_sums(tensors) if watched and config.lora.active else {})

        def loaded(model: PreTrainedModel) -> None:
            set_threads(processes.local_count, model.num_parameters())
            before.update(bit_sums(model) if watched else {})

        if processes.shards:
            policy, who = load_sharded(source, processes, config, dtype, filled)
            set_threads(processes.local_count, policy.model.num_parameters())
            held = count_parameters(policy.model)["local_parameters"]
            where = ", in the machine's memory" if config.parallel.cpu_offload else ""
            self.console.note(f"{'sharded':<10} {held:,} parameters a process{where}; {who}")
            return policy, trained_sums(policy.model, before) if watched else {}
        model = load_to_train(
            source, self.inputs.tokenizer, config, processes.device, dtype, loaded
        )
        base = trained_sums(model, before) if watched else {}
        return Policy(model, dtype).to(processes.device), base

    def in_full(
        self, model: PreTrainedModel, gathered: Mapping[str, Tensor] | None
    ) -> PreTrainedModel:
        """Give a trained model with its frozen weights in full, read anew if they are not.

        Args:
            model: as trained.
            gathered: what of a sharded one was trained.

        Raises:
            UserError: the base model has changed meanwhile (78).
        """
        full = self.config.lora.quantize is None and narrowed_to(model) is None
        if not is_adapted(model) or (full and gathered is None):
            return model
        self.console.note(f"loading {self.config.model.name_or_path} in full precision")
        fresh = load_model(self.inputs.source, random_init=False, seed=self.config.seed)
        copy_adapter(model, fresh, adapter_tensors(model) if gathered is None else gathered)
        return fresh
