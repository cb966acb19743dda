"""`cs336-sft doctor --memory`: what training will take, foretold, then measured; the largest
microbatch that fits; how long the run will be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from cs336_alignment.config import Config
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.batching import StepPlan, collate
from cs336_alignment.data.splits import RunData
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.machine_memory import Memory, resident_memory
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.loading import open_model
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.foresight import (
    ACTIVATIONS,
    GAPS,
    HEAD,
    STATE,
    WEIGHTS,
    Foresight,
)
from cs336_alignment.training.heap import Heap
from cs336_alignment.training.inputs import load_data, plan_of
from cs336_alignment.training.live_bytes import PASSING
from cs336_alignment.training.memory import (
    GRADIENTS,
    SHARDED,
    Needs,
    device_memory,
    divided,
    gib,
    placed,
    refuse_too_large,
    ways_to_less,
)
from cs336_alignment.training.memory_trial import Trial, measure, with_budget
from cs336_alignment.training.parallel import launched_processes
from cs336_alignment.training.preflight import choose_cut, choose_precision
from cs336_alignment.training.rehearsal import (
    accumulates,
    count_tokens,
    foretell,
    largest_microbatch,
)
from cs336_alignment.training.step import Cut

MARGIN = 0.1  # of the free memory is left alone: other programs, evaluation, checkpoints
MAX_TRIES = 6


def report_memory(config: Config) -> ExitStatus:
    """Foretell and measure what a run of this config takes, and propose a microbatch.

    Raises:
        UserError: model or data cannot be loaded, as in training; the model cannot be trained in
            the memory found; several processes were launched (78).
    """
    console = Console()
    if launched_processes() > 1:
        raise UserError(
            "C129", "the doctor works in one process, and the launcher started several",
            hint="type cs336-sft doctor --memory parallel.num_processes=…",
        )  # fmt: skip
    outlook = Outlook.of(config, console)
    whole = outlook.whole(config)
    parts = placed(outlook.each(config, whole), config, outlook.device)
    for device, part in parts.items():
        found = outlook.found if device == outlook.device else device_memory(device, outlook.local)
        if found is not None:
            divided_by = outlook.local if device.type == "cpu" else 1
            apiece = f" for each of {divided_by} processes" if divided_by > 1 else ""
            console.note(
                f"{'memory':<10} of the {device.type}: {gib(found.total)}, {gib(found.free)} free "
                f"now{apiece}"
            )
        outlook.show(part, device)
        warning = refuse_too_large(part, found, device, config)
        if warning is not None:
            console.warn(warning)
    if config.parallel.strategy == SHARDED:
        copies = " (on a CPU gloo's own copies come on top)" if outlook.device.type == "cpu" else ""
        console.note(
            f"not measured: what could be tried here is one process that shards nothing{copies}"
        )
        return ExitStatus.DONE
    console.note("measuring  the worst microbatch, in a process of its own")
    trial = measure(config, outlook.processes, outlook.room)
    if trial is None:
        console.warn(f"it does not fit into {gib(outlook.room)}: the free memory but for a margin")
    else:
        outlook.compare(whole, trial)
    outlook.propose(trial)
    return ExitStatus.DONE


def largest_that_fits(
    budgets: Sequence[int],
    foreseen: Callable[[int], float],
    tried: Callable[[int], float | None],
    room: float,
) -> int | None:
    """Find the largest budget that fits: foretold first, then tried, corrected by what was tried.

    Args:
        budgets: ascending.
        foreseen: what a budget takes, growing with it.
        tried: what it takes indeed; None: more than there is.
        room: that it must fit into.

    Returns:
        A budget that was tried and fits, with none above it that may; None if none does.
    """
    fits, too_large, ratio = -1, len(budgets), 1.0
    for _ in range(MAX_TRIES):
        low, high = fits, too_large
        while high - low > 1:
            middle = (low + high) // 2
            if foreseen(budgets[middle]) * ratio <= room:
                low = middle
            else:
                high = middle
        if low == fits:
            if fits >= 0 or too_large == 0:
                break
            low = 0  # foretold not to fit: but that is for a trial to say
        found = tried(budgets[low])
        if found is not None and found <= room:
            fits = low
        else:
            too_large = low
        ratio = (found or 1.1 * room) / foreseen(budgets[low])
    return budgets[fits] if fits >= 0 else None


def ladder(largest: int) -> list[int]:
    """Give the budgets that are looked at: each a fifth more than the one before."""
    steps = (int(2 ** (number / 4)) // 64 * 64 for number in range(4 * 8, 4 * 40))
    return [*itertools.takewhile(lambda budget: budget < largest, steps), largest]


def _warm_up() -> None:
    """Let the libraries take what they take at their first product, and keep."""
    left = torch.ones((1, 4, 256, 64), requires_grad=True)
    product = F.scaled_dot_product_attention(left, left, left, is_causal=True).flatten(1, 2)
    (product @ torch.ones((64, 1024))).sum().backward()


@dataclass
class Outlook:
    """What is known of a run before its model is loaded."""

    config: Config
    console: Console
    data: RunData
    foresight: Foresight
    batching: Batching
    plan: StepPlan
    steps: range
    base: int
    found: Memory | None
    local: int  # processes on this machine
    holes: float | None  # in the heap, as a share of what else a microbatch takes; None: not known
    foreseen: dict[int, Needs] = field(default_factory=dict)

    @staticmethod
    def of(config: Config, console: Console) -> Outlook:
        """Prepare the data, and build the model without values."""
        processes = config.parallel.num_processes or 1
        source, tokenizer = open_model(config.model)
        data = load_data(config, tokenizer, console)
        base, keeps = 0, False
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keeps = keep_freed_memory()
            _warm_up()
            base = resident_memory()
        foresight = Foresight.of(
            source, tokenizer, config, device,
            choose_precision(config.trainer.precision, device),
        )  # fmt: skip
        longest = int(data.train.dataset.lengths.max())
        check_fits(foresight.policy.model, data.train.largest_token_id, longest)
        local = processes if device.type == "cpu" else min(processes, torch.cuda.device_count())
        return Outlook(
            config, console, data, foresight, foresight.batching(config.trainer.batching, longest),
            *plan_of(config, data), base, device_memory(device, local), local,
            None if keeps else 0.0,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where a run would compute."""
        return self.foresight.device

    @property
    def processes(self) -> int:
        """Among which a step is divided."""
        return self.config.parallel.num_processes or 1

    @property
    def room(self) -> int:
        """Bytes that a process may take, for all that is known."""
        return 2**62 if self.found is None else int(self.found.free * (1 - MARGIN))

    def whole(self, config: Config) -> Needs:
        """Foretell what the worst microbatch takes of a process that knows of no other."""
        cut, dataset = choose_cut(config.trainer, self.batching), self.data.train.dataset
        batch = collate([dataset[i] for i in self._worst(cut)], batching=self.batching)
        heap = Heap() if self.holes is None else None
        needs = self.foresight.needs(batch, accumulates=self._accumulates(cut), heap=heap)
        parts = needs.microbatch
        if heap is not None:  # once: afterwards it is no fresh one any more
            heap.close()
            self.holes = parts[GAPS] / (parts.total() - parts[GAPS])
        elif self.holes:
            parts[GAPS] = int(self.holes * parts.total())
        return needs

    def each(self, config: Config, whole: Needs) -> Needs:
        """Divide it among the processes."""
        compute = self.foresight.policy.autocast_dtype or torch.float32
        several = self._accumulates(choose_cut(config.trainer, self.batching))
        return divided(
            whole, self.foresight.policy.model, config.parallel, self.processes,
            accumulates=several, compute_bytes=compute.itemsize,
        )  # fmt: skip

    def _worst(self, cut: Cut) -> list[int]:
        return largest_microbatch(
            self.plan, cut, self.data.train.dataset, self.steps,
            num_processes=self.processes, process_index=0,
        )  # fmt: skip

    def _accumulates(self, cut: Cut) -> bool:
        return accumulates(self.plan, cut, self.data.train.dataset, self.steps, self.processes)

    def show(self, needs: Needs, device: torch.device) -> None:
        """Print the estimate of what a device holds, part by part."""
        model, parts = self.foresight.policy.model, needs.microbatch
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sharded = self.config.parallel.strategy == SHARDED
        rows: list[tuple[str, float, float]] = [
            ("program and libraries", self.base, self.base),
            (f"{WEIGHTS}, {model.num_parameters():,} parameters", needs.weights, needs.weights),
            (f"{GRADIENTS} of {trained:,}, as far as they are there",
             parts[GRADIENTS], needs.gradients),
            (STATE, needs.state, needs.state),
            ("gathered by FSDP2" if sharded else "DDP's buckets", needs.shared, needs.shared),
            (f"{ACTIVATIONS}, {self.batching} rows", parts[ACTIVATIONS], 0),
            (f"{HEAD}, a chunk and its gradients", parts[HEAD], 0),
            (PASSING, parts[PASSING], needs.stepping),
            (GAPS, parts[GAPS], 0),
            ("sum", self.base + needs.at_microbatch, self.base + needs.at_step),
        ]  # fmt: skip
        self.console.table(
            f"estimate for the {device.type}, before anything is loaded (GiB)",
            ["part", "microbatch", "optimizer step"],
            [[name, *(f"{size / 2**30:.2f}" for size in sizes)]
             for name, *sizes in rows if any(sizes)],
        )  # fmt: skip

    def compare(self, needs: Needs, trial: Trial) -> None:
        """Print the estimate, of a process that knows of no other, beside what was measured."""
        if trial.batching != self.batching:
            self.console.note(f"the model itself takes {trial.batching} rows: estimated anew")
            self.batching = trial.batching
            needs = self.whole(self.config)
        rows = [
            ("program and libraries", 0, trial.base),
            ("with model, forward and backward", needs.at_microbatch, trial.at_microbatch),
            ("with model, optimizer's step", needs.at_step, trial.at_step),
        ]
        alone = " by one process that shares with no other" if self.processes > 1 else ""
        self.console.table(
            f"{trial.tokens:,} tokens, tried{alone} (GiB)",
            ["peak", "estimate", "measured", "ratio"],
            [
                [name, f"{(self.base + size) / 2**30:.2f}", f"{measured / 2**30:.2f}",
                 f"{(self.base + size) / measured:.2f}"]
                for name, size, measured in rows
                if measured  # a GPU holds no program
            ],
        )  # fmt: skip

    def propose(self, trial: Trial | None) -> None:
        """Search for the largest microbatch that fits, and say how long a run takes."""
        step = self._worst(Cut(None, 1, self.batching))
        lengths = self.data.train.dataset.lengths[step]
        whole_step = int(len(step) * lengths.max() if self.batching == "padded" else lengths.sum())
        now = choose_cut(self.config.trainer, self.batching).microbatch_tokens
        trials: dict[int, Trial | None] = {}
        if now is not None:
            now = min(now, whole_step)
            trials[now] = trial
        best = largest_that_fits(
            sorted({*ladder(whole_step), *trials}),
            lambda tokens: self.base + self._foreseen(tokens).peak,
            lambda tokens: self._try(tokens, trials), self.room,
        )  # fmt: skip
        if best is None:
            ways = ways_to_less(self.config, self.whole(self.config))
            if not self.config.trainer.gradient_checkpointing:
                ways.insert(0, "trainer.gradient_checkpointing=true")
            ways.append("a lower data.max_length or a smaller model")
            self.console.warn(f"no microbatch fits; less is taken by {', '.join(ways)}")
            return
        chosen = trials[best]
        assert chosen is not None
        more = ", which is a whole step: more changes nothing" if best == whole_step else ""
        shared = self._foreseen(best).shared
        peak = f"{gib(chosen.peak + shared)}{' with the buckets' if shared else ''}"
        typed = f"trainer.microbatch_tokens={best}"
        if self.config.trainer.gradient_accumulation_steps is not None:
            typed += " trainer.gradient_accumulation_steps=null"
        self.console.note(
            f"{'proposed':<10} {typed}, the largest tried that fits{more}: {peak} of "
            f"{gib(self.room)}"
        )
        for budget, found in {now: trial, best: chosen}.items():
            if found is not None:
                cut = "as it is" if budget == now else f"with {budget:,}"
                self.console.note(f"{'time':<10} {cut}: {self._time(found)}")

    def _foreseen(self, tokens: int) -> Needs:
        if tokens not in self.foreseen:
            config = with_budget(self.config, tokens)
            self.foreseen[tokens] = self.each(config, self.whole(config))
        return self.foreseen[tokens]

    def _try(self, tokens: int, trials: dict[int, Trial | None]) -> float | None:
        if tokens not in trials:
            self.console.note(f"trying     {tokens:,} tokens a microbatch")
            config = with_budget(self.config, tokens)
            trials[tokens] = measure(config, self.processes, self.room)
        found = trials[tokens]
        return None if found is None else found.peak + self._foreseen(tokens).shared

    def _time(self, trial: Trial) -> str:
        tokens = count_tokens(self.plan, self.data.train.dataset, self.steps)
        seconds = trial.seconds * tokens / trial.tokens / self.processes
        seconds += len(self.steps) * trial.step_seconds
        return foretell(tokens, len(self.steps), tokens / seconds)
