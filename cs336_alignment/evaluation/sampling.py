"""What is asked of a generator, whichever backend it is, and what it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cs336_alignment.config import EvaluationConfig

UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: of a response.
        min_new_tokens: before which a response ends at neither EOS nor a stop string.
        temperature: the logits are divided by it; 0 is greedy.
        top_p: only the likeliest tokens that have this probability together are drawn.
        stop: strings that end a response and stay in it.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ("</answer>",)


def sampling_of(options: EvaluationConfig) -> Sampling:
    """Read how responses are drawn."""
    return Sampling(
        options.max_new_tokens, options.min_new_tokens, options.temperature, options.top_p,
        tuple(options.stop),
    )  # fmt: skip


def doubtful_sampling(options: EvaluationConfig) -> list[str]:
    """Give a line for each option that does nothing beside the others."""
    lines = []
    if options.temperature == 0 and options.num_samples > 1:
        lines.append("all samples of a prompt are equal: evaluation.temperature=0 is greedy")
    if options.temperature == 0 and options.top_p < 1:
        lines.append("evaluation.top_p has no effect: evaluation.temperature=0 is greedy")
    if options.min_new_tokens > options.max_new_tokens:
        lines.append(
            "every response is cut: evaluation.min_new_tokens is above evaluation.max_new_tokens"
        )
    return lines


@dataclass(frozen=True)
class Request:
    """One response that is wanted.

    Attributes:
        prompt_ids: the prompt as token ids, not empty.
        seed: of its sampling, below 2**63; nothing else influences what is drawn.
    """

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Generation:
    """One response.

    Attributes:
        text: exact, special tokens kept, without the EOS that ended it.
        token_ids: as generated, the EOS among them; () where a backend does not tell.
        token_entropy: mean over its tokens of the next-token distribution's entropy before
            temperature, in nats; None where a backend does not tell.
        length: tokens.
        stopped: `eos`, `stop` (a stop string) or `length` (`max_new_tokens` or the context).
    """

    text: str
    token_ids: tuple[int, ...]
    token_entropy: float | None
    length: int
    stopped: Literal["eos", "stop", "length"]


class Generator(Protocol):
    """A backend."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        advance: Callable[[int], None] = lambda _: None,
        on_done: Callable[[int, Generation], None] = lambda _, __: None,
    ) -> list[Generation]:
        """Generate one response for each request, in their order.

        Args:
            requests: in any order of lengths; equal prompts may repeat with other seeds.
            sampling: of all of them.
            advance: called with the number of responses done since the last call; what it raises
                ends the generation.
            on_done: called with the number of a request and its response when it is over.
        """
        ...


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """Give a response its seed: a pure function of the run's seed, prompt and sample number.

    Args:
        seed: of the run or evaluation.
        prompt: number of the prompt in the data.
        sample: number of the response among those to this prompt.
    """
    digest = hashlib.sha256(f"generation {seed} {prompt} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def end_of_stop(text: str, earlier: str, stop: Sequence[str]) -> int | None:
    """Find where the first stop string ends that counts; None: there is none.

    Args:
        text: of a response.
        earlier: its beginning; a stop string that is over in it does not count. It may end within a
            character, whose bytes then stand in it as several signs and in `text` as one.
        stop: the strings.
    """
    known = len(earlier.rstrip(UNFINISHED))
    ends = [
        place + len(string)
        for string in stop
        if (place := text.find(string, max(0, known - len(string) + 1))) >= 0
    ]
    return min(ends, default=None)
