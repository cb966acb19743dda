"""Which metrics belong into one picture, and what they are called there; for the page and for the
plots alike.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

SOURCE_LOSS = "eval/loss/"


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        name: for a file.
        title: for people.
        unit: of the values, "" if they have none.
        kind: how values are written: `number`, `share` (0 to 1, shown in percent), `rate`
            (exponents), `count`, `length`, `seconds`.
        group: the part of the report: `learning`, `responses`, `speed` or `more`.
        metrics: name in `metrics.jsonl` → label.
    """

    name: str
    title: str
    unit: str
    kind: str
    group: str
    metrics: dict[str, str]


PANELS = (
    Panel("loss", "Loss", "nats per response token", "number", "learning",
          {"train/loss": "training", "eval/loss": "held out"}),
    Panel("loss_by_place", "Held-out loss by place", "nats per token", "number", "learning",
          {"eval/loss_first_token": "first token", "eval/loss_stop_token": "stop token"}),
    Panel("entropy", "Token entropy", "nats per token", "number", "learning",
          {"train/token_entropy": "training", "eval/token_entropy": "held out",
           "eval/response_entropy": "generated"}),
    Panel("gradient_norm", "Gradient norm", "before clipping", "number", "learning",
          {"train/grad_norm": "gradient norm"}),
    Panel("learning_rate", "Learning rate", "", "rate", "learning",
          {"train/learning_rate": "learning rate"}),
    Panel("rewards", "Rewards", "mean over held-out prompts", "share", "responses",
          {"eval/reward": "total", "eval/format_reward": "format",
           "eval/answer_reward": "answer"}),
    Panel("response_lengths", "Response length", "tokens, mean", "length", "responses",
          {"eval/response_length": "all", "eval/response_length_correct": "correct",
           "eval/response_length_incorrect": "incorrect"}),
    Panel("endings", "How responses end", "share of responses", "share", "responses",
          {"eval/stop_rate": "by themselves", "eval/truncation_rate": "cut at the limit"}),
    Panel("reward_errors", "Failed rewards", "responses that could not be graded", "count",
          "responses", {"eval/reward_errors": "failed"}),
    Panel("throughput", "Throughput", "tokens per second", "count", "speed",
          {"perf/tokens_per_second": "tokens per second"}),
    Panel("step_seconds", "Time of a step", "seconds", "seconds", "speed",
          {"perf/step_seconds": "step"}),
    Panel("memory", "Peak memory", "GiB of the main process", "number", "speed",
          {"perf/peak_memory_gib": "peak memory"}),
    Panel("evaluation_seconds", "Time of an evaluation", "seconds", "seconds", "speed",
          {"perf/evaluation_seconds": "evaluation"}),
    Panel("evaluation_share", "Time spent in evaluation", "share of the run so far", "share",
          "speed", {"perf/evaluation_share": "evaluation"}),
    Panel("step_tokens", "Tokens of a step", "tokens", "count", "speed",
          {"train/num_tokens": "all", "train/num_response_tokens": "trained"}),
)  # fmt: skip
# Functions of the step, or sums of what is shown.
PLAIN = frozenset({"train/epoch", "perf/run_seconds"})


def panels_for(metrics: Collection[str]) -> list[Panel]:
    """Give the panels of a run's metrics, each with the metrics that are there; a metric that no
    panel knows gets one of its own.

    Example:
        >>> [(panel.title, list(panel.metrics)) for panel in panels_for(["eval/loss", "my/own"])]
        [('Loss', ['eval/loss']), ('my/own', ['my/own'])]
    """
    sources = {name: name.removeprefix(SOURCE_LOSS) for name in sorted(metrics)
               if name.startswith(SOURCE_LOSS)}  # fmt: skip
    by_source = Panel("loss_by_source", "Held-out loss by source", "nats per response token",
                      "number", "learning", sources)  # fmt: skip
    catalogue = [PANELS[0], by_source, *PANELS[1:]]
    known = {name for panel in catalogue for name in panel.metrics}
    own = [
        Panel(name.replace("/", "_"), name, "", "number", "more", {name: name})
        for name in sorted(set(metrics) - known - PLAIN)
    ]
    found = []
    for panel in [*catalogue, *own]:
        there = {name: label for name, label in panel.metrics.items() if name in metrics}
        if there:
            found.append(Panel(**{**panel.__dict__, "metrics": there}))
    return found
