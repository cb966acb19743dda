"""The last look at an export: a fresh process loads it, and must find what was trained.

The weights are compared bit by bit, and what they compute by its log-probs: two processes may use
another number of threads or another device, so these agree to `TOLERANCE` alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import first_few
from cs336_alignment.machine_memory import found_memory
from cs336_alignment.model.adapters import changed_by_training, is_adapted
from cs336_alignment.model.loading import eos_ids
from cs336_alignment.training import reload_child
from cs336_alignment.training.shards import whole_tensors

EXAMPLES = 4
SPOKEN_PROMPTS = 2  # that a response is generated for, from its start
MOST_TOKENS = 256  # of an example
NEW_TOKENS = 32
LIMIT_SECONDS = 600.0
POLL_SECONDS = 0.05
# Relative, and absolute in nats. float32 keeps 7 digits and a forward pass loses two or three of
# them to the order of its sums; what is wrong with an export shows in the first digit.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}
HALF_TOLERANCE = 5e-2  # weights of 16 bits compute with 3 digits
PYTHON_MIB = 1200.0  # an interpreter with torch and transformers
LAUNCHER = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|ACCELERATE_.*)"
)


@dataclass(frozen=True)
class ReloadResult:
    """How a check ended.

    Attributes:
        outcome: `passed`, `failed`, `skipped`, or `stopped` on request.
        reasons: what differs, or why it was skipped.
        warnings: what is true of the trained model, too, and worth knowing.
    """

    outcome: str
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.outcome}: {'; '.join(self.reasons)}" if self.reasons else self.outcome


def bit_sums(model: PreTrainedModel) -> dict[str, int]:
    """Sum the bits of each trained parameter, to see later whether training changed it. Of a
    sharded model all processes do, and get the same.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return tensor_sums({n: t for n, t in model.state_dict().items() if n in trained})


def tensor_sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sum the bits of each tensor, of sharded ones by all processes together."""
    sums = reload_child.checksums(whole_tensors(tensors.items()))
    return {name: row[0] for name, row in sums.items()}


def trained_sums(model: PreTrainedModel, before: Mapping[str, int]) -> dict[str, int]:
    """Give the sums of what training must change.

    Args:
        model: before its first step, frozen where it will be, with its adapters.
        before: `bit_sums` of the model as it was loaded.
    """
    if not is_adapted(model):
        return bit_sums(model)
    changed = changed_by_training(model)
    merged = {name: total for name, total in before.items() if name in changed}
    # While B is zero, A has no gradient: a single step leaves it as it is.
    return merged | {n: total for n, total in bit_sums(model).items() if ".lora_A." not in n}


def check_export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    *,
    base: Mapping[str, int],
    texts: Sequence[str] = (),
    trust_remote_code: bool = False,
    limit_seconds: float = LIMIT_SECONDS,
    asked: Callable[[], bool] = lambda: False,
    checksums: Mapping[str, list[Any]] | None = None,
) -> ReloadResult:
    """Load an exported model in a fresh process and compare it with the one that was trained.

    Args:
        folder: the export.
        model: as trained, its weights those of the export.
        tokenizer: as trained with.
        dataset: of which some examples are computed by both.
        base: the parameters before training, see `bit_sums`; empty: nothing need have changed.
        texts: that both tokenizers read, besides those of the examples.
        trust_remote_code: whether the model brings code.
        limit_seconds: for the other process.
        asked: whether the run is asked to stop; the other process is then ended.
        checksums: of the trained weights, where they are sharded; what they compute is then left
            out, which the result says: it follows from their bits.
    """
    if (reason := _no_room(model)) is not None:
        return ReloadResult("skipped", (reason,))
    stop_ids = eos_ids(model.generation_config, tokenizer)
    request = _request(model, tokenizer, dataset, stop_ids, texts)
    request |= {"folder": str(folder.resolve()), "trust_remote_code": trust_remote_code}
    if is_adapted(model):  # its folder holds neither the dtype nor where generation ends
        request |= {"dtype": "float32", "prompts": [], "lengths": []}
    end = time.monotonic() + limit_seconds
    with _child(request) as (process, said, complained):
        if checksums is None:
            want = _trained(model, tokenizer, request, stop_ids)  # while the other one imports
        else:
            readings = reload_child.readings(tokenizer, request["texts"])
            want = {"checksums": checksums, "readings": readings, "stop_ids": sorted(stop_ids)}
        while process.poll() is None:
            if asked():
                return ReloadResult("stopped")
            if time.monotonic() > end:
                return ReloadResult("skipped", (f"it took longer than {limit_seconds:.0f} s",))
            time.sleep(POLL_SECONDS)
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            more = ": is memory short?" if name == "SIGKILL" else ""
            return ReloadResult("skipped", (f"its process was killed ({name}){more}",))
        if process.returncode:
            last = (_read(complained).strip().splitlines() or ["it said nothing"])[-1]
            return ReloadResult("failed", (f"plain transformers cannot use it: {last[:300]}",))
        got = json.loads(_read(said))
    if reasons := tuple(_differences(want, got, model, base)):
        return ReloadResult("failed", reasons)
    seen = () if checksums is None else ("every bit of its weights; log-probs were not compared",)
    return ReloadResult("passed", seen, tuple(_doubts(want, request, tokenizer, stop_ids)))


def _no_room(model: PreTrainedModel) -> str | None:
    """Say that memory is too short for a second copy; None where it is not, or nobody knows."""
    found = found_memory()
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    needed = PYTHON_MIB + 1.3 * size / 2**20
    if found is None or (free := found.free / 2**20) >= needed:
        return None
    return f"it takes {needed:,.0f} MiB of memory and {free:,.0f} MiB are free"


def _request(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    stop_ids: Collection[int],
    texts: Sequence[str],
) -> dict[str, Any]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = MOST_TOKENS if positions is None else min(MOST_TOKENS, positions)
    sequences, prompts, lengths, ends = [], [], [], []
    for index in range(min(EXAMPLES, len(dataset))):
        ids = dataset[index].input_ids.tolist()
        sequences.append(ids[:most])
        trained = dataset[index].response_mask.nonzero().flatten().tolist()
        ends.append(ids[trained[-1]])
        if ends[-1] in stop_ids and 0 < trained[-1] < most:  # the whole response but its end
            prompts.append(ids[: trained[-1]])
            lengths.append(2)
        prompt = dataset.prompt_ids(index)
        if index < SPOKEN_PROMPTS and 0 < len(prompt) < most:
            prompts.append(prompt)
            lengths.append(min(NEW_TOKENS, (positions or MOST_TOKENS + NEW_TOKENS) - len(prompt)))
    decoded = [tokenizer.decode(ids, skip_special_tokens=False) for ids in sequences]
    # Threads of two processes that want the same cores wait for each other (SmolLM2-135M on two
    # cores: 208 s and not 19), so on a CPU each gets half of them.
    threads = max(1, torch.get_num_threads() // (2 if model.device.type == "cpu" else 1))
    return {
        "sequences": sequences, "prompts": prompts, "lengths": lengths, "ends": ends,
        "texts": [*texts, *decoded], "threads": threads,
    }  # fmt: skip


@contextlib.contextmanager
def _child(
    request: Mapping[str, Any],
) -> Iterator[tuple[subprocess.Popen[str], IO[bytes], IO[bytes]]]:
    """Start the other process in a session of its own; it never outlives this block."""
    environment = {k: v for k, v in os.environ.items() if not LAUNCHER.fullmatch(k)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        # -P: the script's own folder, a part of this package, is no place to import from.
        process = subprocess.Popen(
            [sys.executable, "-P", reload_child.__file__],
            stdin=subprocess.PIPE, stdout=said, stderr=complained, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            yield process, said, complained
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Mapping[str, Any],
    stop_ids: Collection[int],
) -> dict[str, Any]:
    """Do here what the other process does."""
    before, training, threads = model.generation_config, model.training, torch.get_num_threads()
    model.generation_config = copy.deepcopy(before)
    model.generation_config.eos_token_id = sorted(stop_ids) or None
    model.eval()
    torch.set_num_threads(request["threads"])
    try:
        return {
            "checksums": reload_child.checksums(model.state_dict().items()),
            "log_probs": reload_child.log_probs(model, request["sequences"]),
            "continuations": reload_child.continuations(
                model, request["prompts"], request["lengths"]
            ),
            "readings": reload_child.readings(tokenizer, request["texts"]),
            "stop_ids": sorted(stop_ids),
        }
    finally:
        model.generation_config = before
        model.train(training)
        torch.set_num_threads(threads)


def _differences(
    want: Mapping[str, Any], got: Mapping[str, Any], model: PreTrainedModel, base: Mapping[str, int]
) -> Iterator[str]:
    sums, other = want["checksums"], got["checksums"]
    if bad := [name for name, row in other.items() if not row[2]]:
        yield f"not all numbers are finite in {first_few(bad)}"
    if lost := [name for name in sums if name not in other]:
        yield f"it has no {first_few(lost)}"
    if changed := [name for name in sums if name in other and sums[name][:2] != other[name][:2]]:
        yield f"other weights than the trained ones in {first_few(changed)}"
    mine = want.get("log_probs", got["log_probs"])
    half, device = model.dtype.itemsize < 4, model.device.type
    tolerance = HALF_TOLERANCE if half else TOLERANCE.get(device, TOLERANCE["cuda"])
    if (far := _farthest(mine, got["log_probs"], tolerance)) is not None:
        yield f"log-probs differ: {far}"
    for what, reading in want["readings"].items():
        if reading != got["readings"][what]:
            yield f"its tokenizer gives another result ({what})"
    own = want.get("continuations", got["continuations"])
    for mine, theirs in zip(own, got["continuations"], strict=True):
        # Where the two part earlier, at a near tie of two tokens, nothing is said about the end.
        ended = mine and mine[-1] in want["stop_ids"]
        if ended and theirs[: len(mine)] == mine and len(theirs) > len(mine):
            yield f"it goes on after token {mine[-1]}, where the trained model stops"
            break
    if kept := [name for name, total in base.items() if name in sums and sums[name][0] == total]:
        yield (
            f"training left {first_few(kept)} as in the base model (if that must be, as for an "
            "expert that no token reached: trainer.reload_check=false)"
        )


def _farthest(
    want: Sequence[Sequence[float]], got: Sequence[Sequence[float]], tolerance: float
) -> str | None:
    """Describe the largest difference beyond the tolerance; None: there is none."""
    worst, text = 0.0, None
    for example, (mine, theirs) in enumerate(zip(want, got, strict=True)):
        for place, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
            both_zero = a == b == -math.inf
            gap = 0.0 if both_zero else abs(a - b) / (tolerance * (1 + abs(a)))
            if not gap <= max(1.0, worst):  # NaN is far
                worst = gap
                text = f"token {place} of example {example} has {b:.6f} and was trained to {a:.6f}"
    return text


def _doubts(
    want: Mapping[str, Any],
    request: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> Iterator[str]:
    said = [ids for ids in want.get("continuations", ()) if ids]
    if said and not any(ids[-1] in stop_ids for ids in said):
        yield f"the trained model does not stop: none of {len(said)} responses came to an end"
    if ends := {i for i in request["ends"] if i in tokenizer.all_special_ids} - set(stop_ids):
        names = ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
        yield f"trained responses end with {names}, at which generation from model/ does not stop"
