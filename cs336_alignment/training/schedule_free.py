"""Schedule-free AdamW, its counters in the state where checkpoints find them."""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import AdamWScheduleFree

COUNTED = ("k", "weight_sum", "lr_max")


class ScheduleFree(AdamWScheduleFree):  # type: ignore[misc]  # the library has no types
    """The library's optimizer; it counts in its parameter groups, as Python numbers, and here the
    first parameter of a group holds them as `totals`, (3,) float64.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.train()  # its modes exchange weights; `averaging` owns that

    def step(self, closure: Any = None) -> Any:
        """Take a step from the counters in the state, and put them back there."""
        for group in self.param_groups:
            state = self.state[group["params"][0]]
            totals = state.setdefault("totals", torch.zeros(len(COUNTED), dtype=torch.float64))
            group.update(zip(COUNTED, totals.tolist(), strict=True))
        result = super().step(closure)
        for group in self.param_groups:
            totals = self.state[group["params"][0]]["totals"]
            totals.copy_(torch.tensor([group[name] for name in COUNTED], dtype=totals.dtype))
        return result
