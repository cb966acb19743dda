"""Imports point one way, heavy libraries have one owner each, and public names stay."""

from __future__ import annotations

import ast
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cs336_alignment import sft
from cs336_alignment.errors import OF_AREA, OF_CODE, STATUS_OF
from tests.conftest import ROOT

PACKAGE = ROOT / "cs336_alignment"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lower layers first; a module imports from its own package and from lower layers alone.
LAYERS = [
    {"cores", "errors", "files", "html_page", "machine_memory", "microbatch", "orphans", "quiet"}, {"config"}, {"multirun"}, {"config_check", "config_clashes", "config_names", "metric_names"},
    {"compose_errors", "compose_groups", "compose", "data", "model", "training.loss"},
    {"training.parallel", "training.optimizer", "training.schedule_free", "training.averaging", "training.schedule", "training.checkpoint",
     "training.checkpoint_folders", "training.checkpoint_writer", "training.snapshot", "training.step", "training.stop", "training.spike",
     "training.preflight", "training.rehearsal", "training.memory", "training.foresight", "training.without_values", "training.heap", "training.live_bytes", "training.batching_choice", "training.safetensors_file",
     "training.sharding", "training.sharded_loading", "training.shards",
     "training.status", "training.watchdog"},
    {"tracking"}, {"evaluation"},
    {"sharing.card", "sharing.hub"},
    {"training.earlier_config", "training.held_out", "training.inputs", "training.run_folder", "training.export", "training.manifest", "training.report",
     "training.trainer", "training.run", "training.run_model", "training.doctor", "training.optimizer_check", "training.invariances",
     "training.token_check", "training.best", "training.finish", "training.reload_check",
     "training.reload_child", "training.launch_check", "training.memory_trial"},
    {"data_commands", "chat_command", "memory_command", "report_command", "env_command", "cluster_job"}, {"sharing"}, {"export_command"},
    {"experiments"}, {"cli", "sft"},
]  # fmt: skip
OWNERS = {
    "hydra": {"compose", "compose_errors", "compose_groups"}, "omegaconf": {"compose", "compose_errors", "compose_groups"}, "datasets": {"data.sources"},
    "httpx2": {"evaluation.server_client"}, "vllm": {"evaluation.vllm_backend"},
    "wandb": {"tracking.wandb_logger"}, "matplotlib": {"tracking.plots"}, "accelerate": {"training.parallel"},
    "optuna": {"experiments.study"}, "submitit": {"cluster_job"}, "schedulefree": {"training.schedule_free"},
    "peft": {"model.adapter_files", "model.adapters", "model.lora", "training.reload_child"},
}  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(name: str) -> int:
    for index, layer in enumerate(LAYERS):
        if name in layer or name.split(".")[0] in layer:
            return index
    raise AssertionError(f"{name} belongs to no layer")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    name = name_of(path)
    if path.name == "__init__.py":
        assert not imports(path)
        return
    package = name.split(".")[0]
    for full in imports(path):
        if not full.startswith("cs336_alignment."):
            continue
        target = full.removeprefix("cs336_alignment.")
        if not (PACKAGE / Path(*target.split("."))).with_suffix(".py").is_file():
            continue
        if package in {"data", "model"} and target.split(".")[0] in {"data", "model"}:
            assert target.split(".")[0] == package, f"{name} imports its sibling {target}"
        same_package = target.split(".")[0] == package and package != "training"
        assert same_package or layer_of(target) <= layer_of(name), f"{name} imports {target}"


def test_each_library_has_one_owner() -> None:
    for library, owners in OWNERS.items():
        users = {
            name_of(path) for path in FILES
            if any(full.split(".")[0] == library for full in imports(path))
        }  # fmt: skip
        assert users == owners, library
    graders = {name_of(p) for p in FILES if any("math_verify" in full for full in imports(p))}
    assert len(graders) == 1


def test_the_core_imports_with_torch_and_transformers_alone() -> None:
    code = """
import sys
for name in ("hydra", "omegaconf", "wandb", "datasets", "accelerate", "matplotlib", "rich", "math_verify"):
    sys.modules[name] = None
import cs336_alignment.data.tokenize, cs336_alignment.data.batching
import cs336_alignment.model.policy, cs336_alignment.model.loading, cs336_alignment.model.log_probs
import cs336_alignment.training.loss
sys.argv = ["bench_gpu.py", *sys.argv[1:]]
sys.path.insert(0, "scripts")
import runpy
runpy.run_path("scripts/bench_gpu.py", run_name="__main__")
"""
    quick = ("--shapes", "tiny", "--data", "gsm8k", "--rounds", "1", "--examples", "4")
    done = subprocess.run([sys.executable, "-c", code, *quick], check=True, timeout=120, cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert "+ shared prefix once" in done.stdout  # the benchmark for GPUs needs no more


def test_config_and_command_line_import_no_torch() -> None:
    code = """
import sys
import cs336_alignment.cli, cs336_alignment.compose
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_signatures() -> None:
    wanted = {
        "tokenize_prompt_and_output": ["prompt_strs", "output_strs", "tokenizer"],
        "compute_entropy": ["logits"],
        "get_response_log_probs": ["model", "input_ids", "labels", "return_token_entropy"],
        "masked_normalize": ["tensor", "mask", "dim", "normalize_constant"],
        "sft_microbatch_train_step": [
            "policy_log_probs", "response_mask", "gradient_accumulation_steps", "normalize_constant",
        ],
        "log_generations": [
            "model", "tokenizer", "prompts", "ground_truths", "reward_fn", "max_new_tokens",
            "temperature", "batch_size", "stop", "seed",
        ],
    }  # fmt: skip
    assert set(sft.__all__) == set(wanted)
    for name, parameters in wanted.items():
        have = list(inspect.signature(getattr(sft, name)).parameters)
        assert have[: len(parameters)] == parameters
        assert inspect.getdoc(getattr(sft, name))
    defaults = inspect.signature(sft.log_generations).parameters
    assert defaults["max_new_tokens"].default == 1024 and defaults["stop"].default == ("</answer>",)


def test_no_code_from_config_and_no_unsafe_loading() -> None:
    for path in [*FILES, *ROOT.glob("configs/**/*.yaml")]:
        text = path.read_text()
        for word in (
            "_target_",
            "instantiate(",
            "weights_only=False",
            "torch.load(",
            "pickle.load",
        ):
            assert word not in text, (path, word)


def count_code(path: Path) -> int:
    """Count the lines that hold code: no blank ones, no comments, no docstrings."""
    text = path.read_text()
    lines = {
        number for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }  # fmt: skip
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):  # fmt: skip
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_size() -> None:
    def lines(*packages: str) -> int:
        return sum(
            count_code(path) for path in FILES
            if name_of(path).split(".")[0] in packages
        )  # fmt: skip

    assert lines("config", "data", "model", "training") <= 11215
    assert lines("evaluation", "tracking", "cli") <= 4808
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 450


def test_each_code_with_a_status_of_its_own_is_one_that_is_raised() -> None:
    said = " ".join(path.read_text() for path in FILES if path.name != "errors.py")
    codes = " ".join(OF_CODE.values()).split()
    assert len(codes) == len(set(codes)) == len(STATUS_OF)
    for code in codes:
        assert f'"{code}"' in said, code
        assert OF_AREA[code[0]] != STATUS_OF[code], code


def test_every_guard_stands_where_it_is_said_to() -> None:
    """Or `make guards` would end at it."""
    guards = runpy.run_path(str(ROOT / "scripts/check_guards.py"))["GUARDS"]
    for guard in guards:
        assert (PACKAGE / guard.file).read_text().count(guard.code) == 1, guard.name
