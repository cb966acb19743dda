"""Libraries that talk when nobody asked, silenced before they are imported."""

from __future__ import annotations

import importlib
import logging
from typing import Any

# transformers imports torchao where it is installed, and that warns of its kernels for other GPUs.
NOISY = ("torchao", "torch.utils._pytree")


def silence() -> None:
    """Let them tell errors alone."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def call(module: str, function: str, *arguments: Any) -> None:
    """Import a module and call a function of it: what a new process is to begin with."""
    silence()
    getattr(importlib.import_module(module), function)(*arguments)
