"""`cs336-sft env`: what machine and environment these are, as Markdown for a bug report.

Nothing is loaded, asked over the network or written; secrets and the names of folders stay here.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cs336_alignment.config_check import SECRET_SHAPE, SECRET_WORDS
from cs336_alignment.cores import count_cores
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.training.manifest import git_commit, versions

USAGE = "usage: cs336-sft env          prints Markdown to paste into a bug report"
# Besides those that every manifest has.
OPTIONAL = (
    "bitsandbytes", "torchao", "schedulefree", "huggingface-hub", "hf-xet", "math-verify", "optuna",
    "vllm", "lm-eval", "flash-attn", "triton", "trl", "gguf",
)  # fmt: skip
VARIABLES = re.compile(
    r"(CUDA|NVIDIA|HIP|HF|HUGGING|TRANSFORMERS|TOKENIZERS|TORCH|PYTORCH|NCCL|GLOO|OMP|MKL|OPENBLAS|"
    r"ACCELERATE|WANDB|HYDRA|MALLOC|GLIBC|PYTHON|LD|LOCAL|MASTER|FSDP)_.*"
    r"|RANK|WORLD_SIZE|PYTHONPATH|PYTHONHASHSEED|OMP_NUM_THREADS|VIRTUAL_ENV|CONDA_DEFAULT_ENV"
    r"|SLURM_(NTASKS|PROCID|LOCALID|JOB_NUM_NODES|NTASKS_PER_NODE|CPUS_PER_TASK|GPUS_ON_NODE)"
)
HIDDEN = "set, not shown"
FOLDERS = re.compile(r"(?<![\w/])/(?!/)[^\s:,'\"]+")  # not what follows a host


def env(arguments: Sequence[str]) -> ExitStatus:
    """Print the report.

    Raises:
        UserError: there is an argument (2).
    """
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return ExitStatus.DONE
    if arguments:
        raise UserError("C174", f"{arguments[0]} has no effect on env", hint=USAGE)
    for title, rows in (
        ("Versions", _versions()),
        ("Machine", _machine()),
        ("Attention", _attention()),
        ("Environment", shown_variables(os.environ)),
    ):
        print(f"### {title}\n\n| | |\n|---|---|")
        for name, value in rows:
            print(f"| {name} | {value.replace('|', '/')} |")
        print()
    return ExitStatus.DONE


def shown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Choose the variables that matter to a run, without secrets and without folders.

    Example:
        >>> list(shown_variables({"HF_TOKEN": "hf_x", "HF_HOME": "/home/ann/hf", "EDITOR": "vi"}))
        [('HF_HOME', '…/hf'), ('HF_TOKEN', 'set, not shown')]
    """
    for name in sorted(name for name in environment if VARIABLES.fullmatch(name)):
        value = environment[name]
        secret = SECRET_WORDS & set(re.split(r"[^a-z]+", name.lower()))
        hidden = secret or SECRET_SHAPE.search(value)
        yield name, HIDDEN if hidden else _without_folders(value) or "(empty)"


def _without_folders(text: str) -> str:
    return FOLDERS.sub(lambda found: f"…/{Path(found[0]).name}", text)


def _versions() -> Iterator[tuple[str, str]]:
    for name, version in versions().items():
        yield name, version
    for name in OPTIONAL:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield "git commit", git_commit() or "installed, no checkout"
    yield "PyTorch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    programs = ("accelerate", "torchrun", "srun", "lm_eval", "convert_hf_to_gguf.py")
    found = [name for name in programs if shutil.which(name)]
    yield "programs", ", ".join(found) or f"none of {', '.join(programs)}"


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "Python", f"{platform.python_implementation()}, {_without_folders(sys.prefix)}"
    yield "processor", _processor()
    threads = torch.get_num_threads()
    yield "cores", f"{count_cores()} of {os.cpu_count()} for this process; {threads} threads"
    yield "memory", _memory()
    if not torch.cuda.is_available():
        yield "GPU", "none that PyTorch can use"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        yield (
            f"GPU {index}",
            f"{found.name}, {free:.1f} of {total:.1f} GiB free, capability {found.major}."
            f"{found.minor}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
        )


def _processor() -> str:
    kind = torch.backends.cpu.get_cpu_capability()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.processor() or 'unknown'} ({kind})"


def _memory() -> str:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return "unknown"
    sizes = dict(re.findall(r"^(\w+):\s*(\d+) kB$", text, re.MULTILINE))
    available, total = (int(sizes[name]) / 2**20 for name in ("MemAvailable", "MemTotal"))
    told = f"{available:.1f} of {total:.1f} GiB available"
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return told
    return told if limit == "max" else f"{told}, limited to {int(limit) / 2**30:.1f} GiB"


def _attention() -> Iterator[tuple[str, str]]:
    """Try every attention that this package can use on a few tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = (torch.float32, torch.bfloat16)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name)
        works = [str(kind).removeprefix("torch.") for kind in kinds if _runs(backend, device, kind)]
        label = f"SDPA {name.removesuffix('_ATTENTION').lower()}"
        yield (
            f"{label}, {device}",
            f"works in {', '.join(works)}" if works else "does not work here",
        )
    yield "flat rows without padding", _flat(device)


def _runs(backend: SDPBackend, device: str, dtype: torch.dtype) -> bool:
    x = torch.zeros(1, 2, 16, 32, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # they say why it does not
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return True


def _flat(device: str) -> str:
    if device == "cpu":
        return "through SDPA, sequence by sequence"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "through SDPA: this PyTorch has no varlen_attn"
    x = torch.zeros(16, 2, 64, device=device, dtype=torch.bfloat16)
    borders = torch.tensor([0, 8, 16], device=device, dtype=torch.int32)
    try:
        varlen_attn(x, x, x, borders, borders, 8, 8)
    except Exception as failure:
        return f"through SDPA: varlen_attn fails ({str(failure).splitlines()[0][:80]})"
    return "varlen_attn works in bfloat16"
