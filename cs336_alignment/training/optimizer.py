"""The optimizers: which parameters each takes, with which decay and at which rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import UserError, first_line, needing
from cs336_alignment.model.compile import repeated_layers

FUSED_DEVICES = ("cuda", "cpu")
FACTOR = "rate_factor"  # in a parameter group: what the step's learning rate is multiplied by
COUNTERS = ("step", "totals")  # in a parameter's state: what counts the steps


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer that the config names.

    - `adamw` (Loshchilov and Hutter, arXiv 1711.05101), fused where torch has the kernel. With
      `state_bits=8` the two moments are held in blocks of 256 values of 8 bits with a float32 scale
      (Dettmers and others, arXiv 2110.02861) by torchao; tensors below 4,096 values stay float32.
    - `adafactor`, torch's (Shazeer and Stern, arXiv 1804.04235): a matrix has a row and a column of
      state. A step is at most the learning rate times the RMS of the weights.
    - `muon`, torch's (arXiv 2502.16982), for the hidden matrices, and AdamW for embeddings, head,
      norms and biases. Muon's step is scaled to the size of AdamW's, so both take one learning
      rate.
    - `schedule_free`: AdamW by the library schedulefree (Defazio and others, arXiv 2405.15682).

    Weight decay falls on parameters of two or more dimensions; biases and norms have none. A tied
    weight is one parameter. The learning rate is set anew at every step by the trainer.

    Raises:
        UserError: a library is not there, or the module has no part that the config speaks of (78).
    """
    factors = rate_factors(module, config.layer_lr_decay)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def groups(chosen: Sequence[nn.Parameter] = parameters) -> list[dict[str, Any]]:
        found: dict[tuple[bool, float], dict[str, Any]] = {}
        for p in chosen:
            decays, factor = p.ndim >= 2, factors.get(p, 1.0)
            new = {"params": [], "weight_decay": config.weight_decay * decays, FACTOR: factor}
            found.setdefault((decays, factor), new)["params"].append(p)
        return list(found.values())

    if config.name == "adafactor":
        return torch.optim.Adafactor(groups(), lr=config.learning_rate)
    if config.name == "muon":
        return _muon(module, parameters, groups, config)
    options: dict[str, Any] = _adamw_options(config)
    if config.name == "schedule_free":
        wanted, instead = "optimizer.name=schedule_free", "another optimizer.name"
        with needing("C161", wanted, "schedulefree", instead):
            from cs336_alignment.training.schedule_free import ScheduleFree
        return ScheduleFree(groups(), **options)
    if config.state_bits == 8:
        with needing("C119", "optimizer.state_bits=8", "torchao", "optimizer.state_bits=32"):
            from torchao.optim import AdamW8bit
        return AdamW8bit(groups(), **options)
    return torch.optim.AdamW(groups(), **options, fused=_can_fuse(parameters))


def _adamw_options(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": tuple(config.betas), "eps": config.eps}


def _can_fuse(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.device.type in FUSED_DEVICES for p in parameters)


def rate_factors(module: nn.Module, decay: float) -> dict[Tensor, float]:
    """Give what the learning rate of each parameter is multiplied by, where that is not 1.

    It is decay ** (repeated layers above): 1 in the last layer and for what stands above it, the
    least in the embeddings (a head that is tied to them included).

    Raises:
        UserError: there is a decay, and the architecture does not name its layers (78).
    """
    if decay == 1.0:
        return {}
    layers = repeated_layers(module, "optimizer.layer_lr_decay=1")
    factors: dict[Tensor, float] = {p: decay ** len(layers) for p in _embeddings(module)}
    for above, layer in enumerate(reversed(layers)):
        factors |= dict.fromkeys(layer.parameters(), decay**above)
    return factors


def _embeddings(module: nn.Module) -> list[nn.Parameter]:
    return [p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters that step as one: their groups stand in one list,
    their states in one dictionary.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is called
        """Take a step with each."""
        for part in self._parts:
            part.step()


def _muon(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    groups: Callable[[Sequence[nn.Parameter]], list[dict[str, Any]]],
    config: OptimizerConfig,
) -> torch.optim.Optimizer:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    outer = {*_embeddings(module), *(head.parameters() if head is not None else ())}
    hidden = [p for p in parameters if p.ndim == 2 and p not in outer]
    rest = [p for p in parameters if p.ndim != 2 or p in outer]
    if not hidden:
        raise UserError(
            "C160",
            "optimizer.name=muon trains the hidden matrices, and none is trained",
            hint="optimizer.name=adamw",
        )
    muon = torch.optim.Muon(
        groups(hidden), lr=config.learning_rate, momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    if not rest:
        return muon
    adamw = torch.optim.AdamW(groups(rest), **_adamw_options(config), fused=_can_fuse(rest))
    return Together(muon, adamw)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would give it, so that memory shows before
    any time is spent. No weight changes: the learning rate and the gradients are zero.

    Raises:
        UserError: the 8-bit kernels cannot be compiled here (78).
    """
    groups = optimizer.param_groups
    fresh = [p for group in groups for p in group["params"] if not optimizer.state[p]]
    if not fresh:
        return
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    rates = [float(group["lr"]) for group in groups]
    set_learning_rate(optimizer, 0.0)
    try:
        with warnings.catch_warnings():  # torchao's tensors have no hash for torch's cache on disk
            warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
            optimizer.step()
    except Exception as failure:
        if not type(optimizer).__module__.startswith("torchao"):
            raise
        raise UserError(  # torchao compiles its step: of a hundred kinds
            "C119",
            "optimizer.state_bits=8 does not work on this machine",
            got=f"{type(failure).__name__}: {first_line(failure)}",
            hint="it needs a C++ compiler on a CPU, Triton on a GPU; or optimizer.state_bits=32",
        ) from failure
    for group, rate in zip(groups, rates, strict=True):
        _write_rate(group, rate)
    for parameter in fresh:
        parameter.grad = None
        for counter in COUNTERS:
            if counter in optimizer.state[parameter]:
                optimizer.state[parameter][counter].zero_()


def clip_gradients(module: nn.Module, most: float) -> Tensor:
    """Scale all gradients down to a norm of at most `most`; returns the norm that they had.

    Of sharded gradients the norm is that of the whole ones, on every process.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([_rows(g) for g in gradients])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(module.parameters(), most, norm)
    return norm


def _rows(g: Tensor) -> Tensor:
    """Give what has the norm of a gradient: of a matrix on a CPU the norms of its rows. There torch
    adds all squares of a tensor to one float32: of 28 million in an embedding that loses 3e-4.
    """
    return torch.linalg.vector_norm(g, dim=-1) if g.ndim > 1 and g.device.type == "cpu" else g


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write the step's learning rate into every parameter group, times the group's own factor."""
    for group in optimizer.param_groups:
        _write_rate(group, learning_rate * group.get(FACTOR, 1.0))


def _write_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # compiled code reads it where it is
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
