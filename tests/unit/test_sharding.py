"""What sharding rests on, without processes: counts in step, parts in files, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cs336_alignment.config import Config
from cs336_alignment.config_clashes import clashes
from cs336_alignment.data.batching import plan_microbatches
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.adapters import base_tensors
from cs336_alignment.model.loading import load_model
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training.parallel import Processes, refuse_launcher_options, refuse_sharding
from cs336_alignment.training.sharded_loading import _fill
from cs336_alignment.training.shards import Part, Pieces, write_parts
from tests.conftest import build_dataset


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("cut", [(20, None), (None, 3)])
def test_processes_in_step_take_as_many_microbatches_and_the_same_examples(
    count: int, cut: tuple[int | None, int | None]
) -> None:
    lengths = build_dataset().lengths

    def plan(index: int, in_step: bool) -> list[list[int]]:
        return plan_microbatches(
            range(11), lengths, num_processes=count, process_index=index, microbatch_tokens=cut[0],
            gradient_accumulation_steps=cut[1], batching="flat", in_step=in_step,
        )  # fmt: skip

    counts = {len(plan(index, True)) for index in range(count)}
    assert counts == {max(len(plan(index, False)) for index in range(count))}
    for index in range(count):
        own = plan(index, False)
        assert plan(index, True)[: len(own)] == own
        assert not any(plan(index, True)[len(own) :])


@pytest.mark.parametrize(("written", "read"), itertools.product((1, 2, 3, 9), repeat=2))
def test_parts_are_read_by_any_number_of_processes(written: int, read: int, tmp_path: Path) -> None:
    whole = {"a": torch.randn(7, 3), "b": torch.randn(5), "c": torch.tensor(3.0)}

    def parts(index: int, count: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        each = {name: -(-len(whole[name]) // count) for name in ("a", "b")}
        starts = {name: min(rows * index, len(whole[name])) for name, rows in each.items()}
        held = {name: whole[name][starts[name] :][:rows] for name, rows in each.items()}
        held = {name: rows for name, rows in held.items() if len(rows)}
        return held | ({} if index else {"c": whole["c"]}), starts

    for index in range(written):
        write_parts(tmp_path / f"{index}.safetensors", *parts(index, written))
    pieces = Pieces(sorted(tmp_path.iterdir()))
    assert pieces.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    for index in range(read):
        rows, starts = parts(index, read)
        for name, want in rows.items():
            got = torch.full_like(want, torch.nan)
            pieces.read(name, Part(got, starts.get(name, 0), tuple(whole[name].shape)))
            assert torch.equal(got, want)


def test_a_part_that_is_lost_or_there_twice_is_seen(tmp_path: Path) -> None:
    rows = torch.arange(4.0)
    for index, start in enumerate((0, 6)):
        write_parts(tmp_path / f"{index}.safetensors", {"a": rows}, {"a": start})
    assert Pieces(sorted(tmp_path.iterdir())).shapes == {"a": None}
    write_parts(tmp_path / "2.safetensors", {"a": rows}, {"a": 4})
    assert Pieces(sorted(tmp_path.iterdir())).shapes == {"a": None}
    write_parts(tmp_path / "2.safetensors", {"a": rows[:2]}, {"a": 4})
    assert Pieces(sorted(tmp_path.iterdir())).shapes == {"a": (10,)}


def sharded() -> Config:
    config = Config()
    config.parallel.strategy = "fsdp2"
    return config


def test_what_does_not_combine_with_sharding_is_refused() -> None:
    def found(config: Config) -> str:
        return " ".join(error.message for error in clashes(config))

    config = sharded()
    assert "parallel" not in found(config)
    config.optimizer.state_bits = 8
    assert "optimizer.state_bits and parallel.strategy" in found(config)
    for section, name, value in (
        ("lora", "dora", True), ("lora", "quantize", "nf4"), ("model", "new_tokens", ["<a>"]),
    ):  # fmt: skip
        config = sharded()
        config.lora.r = 4
        assert "parallel" not in found(config)
        setattr(getattr(config, section), name, value)
        assert f"{section}.{name} and parallel.strategy" in found(config)
    for name in ("reshard_after_forward", "shard_gradients", "cpu_offload"):
        config = Config()
        setattr(config.parallel, name, not getattr(config.parallel, name))
        assert f"parallel.{name} and parallel.strategy" in found(config)
    refuse_sharding(Config().parallel, "evaluate")
    with pytest.raises(UserError, match="evaluate holds the whole model") as caught:
        refuse_sharding(sharded().parallel, "evaluate")
    assert caught.value.status == ExitStatus.BAD_CONFIG


def test_numbers_that_want_scales_are_not_read_as_they_are(tmp_path: Path) -> None:
    rows = torch.ones(4, 3)
    for dtype, wanted in (
        (torch.bfloat16, True), (torch.float32, True), (torch.float8_e4m3fn, False), (torch.int8, False),
    ):  # fmt: skip
        save_file({"w": rows.to(dtype)}, tmp_path / "w.safetensors")
        pieces = Pieces([tmp_path / "w.safetensors"])
        assert pieces.holds("w", (4, 3)) == wanted, dtype
        assert not pieces.holds("w", (3, 4)) and not pieces.holds("other", (4, 3))


def test_weights_in_another_form_are_refused(base: Path, processes: Processes) -> None:
    source = resolve_model(str(base), None, False)
    own = base_tensors(load_model(source, random_init=False, seed=0))
    name, weight = next(iter(own.items()))
    for other in ({name: weight[1:]}, {f"{name}_scale": weight}):
        with pytest.raises(UserError, match="in a form that cannot be sharded") as caught:
            _fill(own | other, source, processes, Config())
        assert caught.value.code == "M110"


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false"}  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("FSDP_VERSION", "1", "fsdp_version"),
        ("FSDP_OFFLOAD_PARAMS", "true", "parallel.cpu_offload"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "parallel.reshard_after_forward"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "trainer.gradient_checkpointing"),
        (None, None, "parallel.strategy"),
    ],
)
def test_the_launchers_own_sharding_is_taken_or_refused_never_ignored(
    variable: str | None, value: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LAUNCHED.items():
        monkeypatch.setenv(name, text)
    assert refuse_launcher_options(sharded()) == "auto"
    with monkeypatch.context() as offloading:
        offloading.setenv("FSDP_OFFLOAD_PARAMS", "true")
        config = sharded()
        config.parallel.cpu_offload = True
        assert refuse_launcher_options(config) == "auto"
    if variable is not None and value is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        refuse_launcher_options(Config() if variable is None else sharded())
    assert caught.value.code == "C201" and named in str(caught.value)
    assert "parallel=fsdp2" in str(caught.value)
