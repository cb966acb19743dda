"""What is foretold of memory is what a run takes, part by part; what cannot fit is refused at once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cs336_alignment.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoggerConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainerConfig,
)
from cs336_alignment.data.batching import collate
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.machine_memory import Memory, found_memory
from cs336_alignment.memory_command import ladder, largest_that_fits
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.loading import base_of, load_model, load_tokenizer
from cs336_alignment.model.narrow import narrow_frozen
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.model.source import ModelSource, resolve_model
from cs336_alignment.model.trainable import choose_trained
from cs336_alignment.training import memory, run, run_model
from cs336_alignment.training.averaging import build_average
from cs336_alignment.training.foresight import WEIGHTS, Foresight
from cs336_alignment.training.live_bytes import LiveBytes
from cs336_alignment.training.memory import (
    GRADIENTS,
    Needs,
    certain_needs,
    divided,
    placed,
    refuse_too_large,
    state_bytes,
)
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from tests.conftest import build_dataset, build_model, clean_environment

CPU = torch.device("cpu")
GIB = 2**30
NO_TOKENIZER: Any = None  # it is asked for new tokens alone


def source_of(name: str, folder: Path) -> ModelSource:
    build_model(name).config.save_pretrained(folder)
    return ModelSource(str(folder), None, False)


def foresee(
    name: str, folder: Path, config: Config, compute: torch.dtype | None = None
) -> tuple[Foresight, Foresight]:
    """Give the policy without values, and the same with them."""
    source, trainer, lora = source_of(name, folder), config.trainer, config.lora
    fake = Foresight.of(source, NO_TOKENIZER, config, CPU, compute)
    model = build_model(name, torch.float32)
    base = base_of(source, model) if lora.active else None
    choose_trained(model, NO_TOKENIZER, config.model, lora, base, seed=0)
    if lora.active and compute is not None:
        narrow_frozen(model, compute)
    if trainer.gradient_checkpointing:
        enable_checkpointing(model, selective=trainer.gradient_checkpointing == "selective")
    return fake, Foresight(Policy(model, compute), contextlib.nullcontext(), CPU, config)


LORA = LoraConfig(r=4)
PARTIAL: dict[str, Config] = {
    "lora": Config(lora=LORA),
    "lora with a head": Config(lora=LoraConfig(r=2, modules_to_save=["lm_head"], rslora=True)),
    "dora": Config(lora=LoraConfig(r=4, dora=True, dropout=0.1)),
    "frozen": Config(model=ModelConfig(freeze=["embed", r"layers\.0\."])),
    "average": Config(trainer=TrainerConfig(ema_decay=0.9)),
    "lora and average": Config(lora=LORA, trainer=TrainerConfig(ema_decay=0.9)),
    **{
        name: Config(optimizer=OptimizerConfig(name=name))
        for name in ("adafactor", "muon", "schedule_free")
    },
    "lora by schedule_free": Config(lora=LORA, optimizer=OptimizerConfig(name="schedule_free")),
}


@pytest.mark.parametrize(
    ("case", "compute", "recompute"),
    [
        *((case, None, False) for case in PARTIAL),
        ("lora", torch.bfloat16, "selective"), ("frozen", torch.bfloat16, True),
    ],
)  # fmt: skip
def test_what_is_trained_and_how_is_foretold_as_it_is_with_values(
    case: str, compute: torch.dtype | None, recompute: Any, tmp_path: Path
) -> None:
    trainer = replace(PARTIAL[case].trainer, gradient_checkpointing=recompute)
    config = replace(PARTIAL[case], trainer=trainer)
    fake, real = foresee("llama", tmp_path, config, compute)
    dataset = build_dataset(prefix=17)
    batch = collate([dataset[i] for i in range(7)], batching="flat")
    foretold = fake.needs(batch, accumulates=True)
    assert foretold == real.needs(batch, accumulates=True)
    model = real.policy.model
    trained = [p for p in model.parameters() if p.requires_grad]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert foretold.weights == sum(t.nbytes for t in tensors.values())
    assert foretold.gradients == sum(p.nbytes for p in trained)
    optimizer = build_optimizer(model, config.optimizer)
    allocate_state(optimizer)
    build_average(optimizer, config.trainer.ema_decay)
    kept = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    certain = certain_needs(
        ModelSource(str(tmp_path), None, False), NO_TOKENIZER, config, compute, 1
    )
    assert isinstance(certain, Needs), certain
    assert foretold.state == kept == certain.state
    assert certain.certain == foretold.certain


def test_weights_in_4_bits_are_counted_as_such(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path)
    plain, packed = (
        certain_needs(source, NO_TOKENIZER, Config(lora=lora), torch.bfloat16, 1)
        for lora in (LORA, replace(LORA, quantize="nf4"))
    )
    assert isinstance(plain, Needs) and isinstance(packed, Needs)
    layers = build_model("llama").model.layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    assert plain.weights - packed.weights == pytest.approx((2 - 0.516) * linear, rel=1e-3)
    assert (plain.gradients, plain.state) == (packed.gradients, packed.state)
    with pytest.raises(UserError, match="nf4 takes is not foretold"):
        Foresight.of(source, NO_TOKENIZER, Config(lora=replace(LORA, quantize="nf4")), CPU, None)


@pytest.mark.parametrize("grows", [False, True])
def test_new_tokens_have_rows(grows: bool, tmp_path: Path, tokenizer_of: Any) -> None:
    source, tokens = source_of("llama", tmp_path), ["<tool>", "</tool>"]
    tokenizer = tokenizer_of()
    model = build_model("llama", torch.float32)
    if grows:
        tokenizer.add_tokens([f"<{i}>" for i in range(len(model.get_input_embeddings().weight))])
    tokenizer.add_tokens(tokens)
    options = ModelConfig(new_tokens=tokens)
    config = Config(model=options, lora=replace(LORA, export="merged"))
    choose_trained(model, tokenizer, options, config.lora, base_of(source, model), seed=0)
    needs = certain_needs(source, tokenizer, config, None, 1)
    assert isinstance(needs, Needs), needs
    assert needs.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert needs.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "compute", "recompute", "batching"),
    [
        ("llama", None, False, "padded"), ("llama", None, False, "flat"),
        ("llama", None, False, "flat_shared_prefix"), ("llama", None, True, "flat"),
        ("llama", torch.bfloat16, "selective", "flat_shared_prefix"),
        ("llama", torch.bfloat16, True, "padded"), ("qwen2", None, "selective", "padded"),
        ("gpt2", None, False, "flat"), ("granite", None, False, "flat"),
        ("qwen3_moe", None, False, "flat_shared_prefix"), ("qwen3_moe", None, True, "padded"),
    ],
)  # fmt: skip
def test_without_values_as_much_is_alive_as_with_them(
    name: str, compute: torch.dtype | None, recompute: Any, batching: Batching, tmp_path: Path
) -> None:
    config = Config(trainer=TrainerConfig(gradient_checkpointing=recompute))
    fake, real = foresee(name, tmp_path, config, compute)
    dataset = build_dataset(prefix=17)
    batch = collate([dataset[i] for i in range(7)], batching=batching)
    for accumulates in (False, True):
        foretold = fake.needs(batch, accumulates=accumulates)
        assert foretold == real.needs(batch, accumulates=accumulates)
        assert foretold.microbatch[GRADIENTS] <= foretold.gradients
        if accumulates:
            assert foretold.microbatch[GRADIENTS] == foretold.gradients
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in real.policy.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "qwen3_moe"])
def test_weights_gradients_and_state_are_exact(name: str, tmp_path: Path) -> None:
    fake, real = foresee(name, tmp_path, Config())
    dataset, model = build_dataset(), real.policy.model
    needs = fake.needs(collate([dataset[0]], batching="padded"), accumulates=False)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert needs.weights == sum(t.nbytes for t in tensors.values())
    assert needs.gradients == sum(p.nbytes for p in model.parameters())
    optimizer = build_optimizer(model, OptimizerConfig())
    allocate_state(optimizer)
    kept = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert needs.state == kept == state_bytes(model, OptimizerConfig())
    certain = certain_needs(source_of(name, tmp_path), NO_TOKENIZER, Config(), None, 1)
    assert isinstance(certain, Needs) and certain.certain == needs.certain


def test_state_in_8_bits_is_exact() -> None:
    torchao = pytest.importorskip("torchao.optim")
    module = torch.nn.ParameterList(
        [torch.zeros(size) for size in (4095, 4096, 4097, 8192, 10, 256 * 100)]
    )
    optimizer = torchao.AdamW8bit(module.parameters())
    kept = 0
    for parameter in module.parameters():
        for signed in (True, False):
            buffer = optimizer._new_buffer(parameter, signed)
            inner = (
                [buffer.codes, buffer.scale, buffer.qmap] if hasattr(buffer, "codes") else [buffer]
            )
            kept += sum(tensor.nbytes for tensor in inner)
        kept += torch.tensor(0.0).nbytes  # the number of its steps
    assert state_bytes(module, OptimizerConfig(state_bits=8)) == kept


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_what_the_forward_pass_leaves_is_what_autograd_saved(name: str) -> None:
    policy, dataset = Policy(build_model(name, torch.float32)), build_dataset()
    batch = collate([dataset[i] for i in range(5)], batching="flat")
    given = (*policy.parameters(), *policy.buffers(), batch.input_ids, batch.labels,
             batch.position_ids, batch.response_index)  # fmt: skip
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with LiveBytes(CPU) as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for tensor in given:
            live.add(tensor, WEIGHTS)
        log_probs = policy(batch)[0]
    saved[log_probs.untyped_storage()._cdata] = log_probs
    for tensor in given:
        saved.pop(tensor.untyped_storage()._cdata, None)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert live.now.total() - live.now[WEIGHTS] == kept > 0


def test_processes_divide_what_they_share() -> None:
    model = build_model("llama", torch.float32)
    needs = Needs(1000, 800, 1600, 0, Counter({GRADIENTS: 800, "activations": 500}), 7)
    common: dict[str, Any] = {"compute_bytes": 2}
    assert divided(needs, model, ParallelConfig("ddp"), 1, accumulates=True, **common) == needs
    # Where a step is one microbatch its gradients lie in the buckets alone.
    buckets = divided(needs, model, ParallelConfig("ddp"), 4, accumulates=False, **common)
    assert buckets.certain == needs.certain
    assert buckets.at_microbatch == 1000 + 1600 + 800 + 500
    several = divided(needs, model, ParallelConfig("ddp"), 4, accumulates=True, **common)
    assert several.at_microbatch == needs.at_microbatch + 800
    sharded = divided(needs, model, ParallelConfig("fsdp2"), 4, accumulates=True, **common)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - 2 * block
    assert (sharded.weights, sharded.gradients, sharded.state) == (250, 200, 400)
    assert sharded.shared == 2 * (2 * root + 3 * block)
    held = ParallelConfig("fsdp2", reshard_after_forward=False, shard_gradients=False)
    deep = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 5}))
    whole = divided(needs, deep, held, 4, accumulates=True, **common)
    assert whole.shared == 2 * (2 * root + 6 * block) + 800
    once = divided(needs, deep, held, 4, accumulates=False, **common)
    assert once.shared == whole.shared - 800
    assert sharded.microbatch == Counter({GRADIENTS: 200, "activations": 500})


def test_what_is_offloaded_lies_in_the_machines_memory() -> None:
    needs = Needs(1000, 800, 1600, 60, Counter({GRADIENTS: 800, "activations": 500}), 7)
    gpu, offloading = torch.device("cuda"), Config(parallel=ParallelConfig("fsdp2"))
    assert placed(needs, offloading, gpu) == {gpu: needs}
    offloading.parallel.cpu_offload = True
    assert placed(needs, offloading, CPU) == {CPU: needs}
    parts = placed(needs, offloading, gpu)
    assert (parts[gpu].peak, parts[CPU].peak) == (60 + 500, 1000 + 800 + 1600 + 7)
    assert parts[gpu].certain == 60 and parts[CPU].certain == 1000 + 800 + 1600


def test_refusal_and_warning() -> None:
    needs = Needs(4 * GIB, 4 * GIB, 8 * GIB)
    options = Config()
    for found, words in (
        (None, None), (Memory(32 * GIB, 17 * GIB), None), (Memory(32 * GIB, 15 * GIB), "free now")
    ):  # fmt: skip
        warning = refuse_too_large(needs, found, CPU, options)
        assert warning is None if words is None else words in str(warning)
    with pytest.raises(UserError) as caught:
        refuse_too_large(needs, Memory(15 * GIB, 15 * GIB), CPU, options)
    assert (caught.value.code, caught.value.status) == ("R308", ExitStatus.BAD_CONFIG)
    assert "16.00 GiB" in str(caught.value) and "optimizer.state_bits=8" in str(caught.value)
    with pytest.raises(UserError) as caught:
        refuse_too_large(
            needs, Memory(15 * GIB, 9), CPU, Config(optimizer=OptimizerConfig(state_bits=8))
        )
    assert "state_bits" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "ways"),
    [
        (Config(), ("optimizer.state_bits=8", "lora.r=16", "parallel=fsdp2")),
        (Config(lora=LORA), ("optimizer.state_bits=8", "parallel=fsdp2")),
        (Config(model=ModelConfig(freeze=["embed"])), ("optimizer.state_bits=8", "parallel=fsdp2")),
        (Config(optimizer=OptimizerConfig(name="muon")), ("lora.r=16",)),
        (Config(parallel=ParallelConfig("fsdp2")), ("lora.r=16", "parallel=fsdp2")),
    ],
)  # fmt: skip
def test_a_refusal_names_what_combines_with_the_config(
    config: Config, ways: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        refuse_too_large(Needs(4 * GIB, 4 * GIB, 8 * GIB), Memory(12 * GIB, GIB), CPU, config)
    hint = str(caught.value).partition("hint:")[2]
    for way in ("optimizer.state_bits=8", "lora.r=16", "parallel=fsdp2"):
        assert (way in hint) == (way in ways), (way, hint)


@pytest.mark.parametrize(
    ("room", "device", "ways"),
    [
        (10, CPU, ("optimizer.state_bits=8 (about 10.00 GiB)", "lora.r=16", "on 2 times the machines")),
        (9, torch.device("cuda"), ("lora.r=16", "parallel.cpu_offload=true", "on 2 times the GPUs")),
        (3, CPU, ("on 6 times the machines",)),
    ],
)  # fmt: skip
def test_a_refusal_names_what_would_fit(
    room: int, device: torch.device, ways: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        refuse_too_large(
            Needs(4 * GIB, 4 * GIB, 8 * GIB), Memory(room * GIB, GIB), device, Config()
        )
    hint = str(caught.value).partition("hint: ")[2].split(", or ")
    assert len(hint) == len(ways) + 2 and all(w in h for w, h in zip(ways, hint, strict=False))


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_start_where_all_weights_would_not_fit(
    whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine that holds the weights and a little more."""
    config = Config(
        ModelConfig(str(tmp_path / "base")), DataConfig("builtin:arithmetic", max_train_examples=8),
        TrainerConfig(max_steps=1, reload_check=False), lora=LoraConfig() if whole else LORA,
        logger=LoggerConfig("none"), output_root=str(tmp_path), run_name="r",
    )  # fmt: skip
    source = resolve_model("builtin:arithmetic", None, False)
    model = load_model(source, random_init=True, seed=0)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(source).save_pretrained(tmp_path / "base")
    room = int(1.5 * sum(p.nbytes for p in model.parameters()))
    monkeypatch.setattr(run_model, "device_memory", lambda *_: Memory(room, room))
    if not whole:
        assert run.train(config, ["run_name=r"]) == ExitStatus.DONE
        return
    with pytest.raises(UserError) as caught:
        run.train(config, ["run_name=r"])
    assert caught.value.code == "R308" and "lora.r=16" in str(caught.value)


def test_generation_is_refused_where_the_whole_model_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Config(
        ModelConfig("builtin:arithmetic", random_init=True),
        DataConfig("builtin:arithmetic", max_train_examples=8, eval_fraction=0.5),
        TrainerConfig(max_steps=1), evaluation=EvaluationConfig(generation_steps=0),
        parallel=ParallelConfig("fsdp2", cpu_offload=True), logger=LoggerConfig("none"),
        output_root=str(tmp_path), run_name="r",
    )  # fmt: skip
    monkeypatch.setattr(run, "device_memory", lambda *_: Memory(1000, 1000))
    with pytest.raises(UserError) as caught:
        run.train(config, ["run_name=r"])
    assert caught.value.code == "R313" and "generation_steps=null" in str(caught.value)
    assert not torch.distributed.is_initialized()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MEMINFO = {
    "proc/meminfo": "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nSwapTotal: 50 kB\n"
}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 1050, 600),
        (  # version 2: the limit of a group around this one counts, too
            {"proc/self/cgroup": "0::/job/step\n", f"{V2}/job/memory.max": f"{400 * 1024}\n",
             f"{V2}/job/memory.current": f"{300 * 1024}\n",
             f"{V2}/job/memory.stat": f"anon 1\ninactive_file {100 * 1024}\n",
             f"{V2}/job/step/memory.max": "max\n", f"{V2}/job/step/memory.current": "9\n"},
            450, 200,
        ),
        (  # version 1, within a container: the path is the host's
            {"proc/self/cgroup": "9:cpu:/\n4:memory:/docker/0abc\n0::/\n",
             f"{V1}/memory.limit_in_bytes": f"{500 * 1024}\n",
             f"{V1}/memory.usage_in_bytes": f"{450 * 1024}\n",
             f"{V1}/memory.stat": f"inactive_file 3\ntotal_inactive_file {10 * 1024}\n"},
            550, 60,
        ),
        (  # version 1 writes a large number for no limit
            {"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
             f"{V1}/memory.usage_in_bytes": f"{450 * 1024}\n"},
            1050, 600,
        ),
    ],
)  # fmt: skip
def test_memory_is_the_machine_s_or_the_control_group_s(
    files: dict[str, str], total: int, free: int, tmp_path: Path
) -> None:
    write(tmp_path, MEMINFO | files)
    assert found_memory(tmp_path) == Memory(total * 1024, free * 1024)


def test_memory_of_systems_that_tell_nothing(tmp_path: Path) -> None:
    assert found_memory(tmp_path) is None


@pytest.mark.parametrize("room", [50, 400, 1000, 5000, 10**6])
@pytest.mark.parametrize("foretold", [0.6, 0.9, 1.0, 1.2, 2.0])
def test_the_search_ends_at_the_largest_budget_that_fits(room: int, foretold: float) -> None:
    budgets, tries = ladder(20_000), []

    def takes(tokens: int) -> float:
        return 100 + 0.7 * tokens

    def tried(tokens: int) -> float | None:
        tries.append(tokens)
        return takes(tokens) if takes(tokens) <= 1.3 * room else None  # killed

    best = largest_that_fits(budgets, lambda tokens: foretold * takes(tokens), tried, room)
    fitting = [tokens for tokens in budgets if takes(tokens) <= room]
    assert best == (fitting[-1] if fitting else None)
    assert len(tries) <= 4


def test_a_model_that_cannot_be_built_without_values_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("M103", "its code reads a value")

    monkeypatch.setattr(memory, "without_values", fail)
    source = source_of("llama", tmp_path)
    assert certain_needs(source, NO_TOKENIZER, Config(), None, 1) == "its code reads a value"


def test_what_the_run_would_end_with_is_told_once(tmp_path: Path) -> None:
    config = Config(lora=LoraConfig(r=4, target_modules=["no_such_layer"]))
    with pytest.raises(UserError, match="no_such_layer"):
        certain_needs(source_of("llama", tmp_path), NO_TOKENIZER, config, None, 1)


def test_holes_in_the_heap_are_found_and_take_no_memory() -> None:
    """In a process of its own, whose allocator keeps what is freed, as in a run."""
    code = """
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.machine_memory import resident_memory
from cs336_alignment.training.heap import Heap
assert keep_freed_memory()
MIB, before, heap = 2**20, resident_memory(), Heap()
heap.take(1, 300 * MIB)
heap.take(2, MIB)  # in the way
heap.give(1)
heap.take(3, 200 * MIB)  # fits into the hole
assert 301 * MIB <= heap.grown < 302 * MIB, heap.grown
heap.take(4, 200 * MIB)  # and this no more
assert 501 * MIB <= heap.grown < 502 * MIB, heap.grown
heap.take(5, 2**62)  # more than there is
assert resident_memory() - before < 20 * MIB
heap.close()
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's allocator")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=clean_environment())
