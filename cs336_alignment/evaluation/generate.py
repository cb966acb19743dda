"""Generation with the model at hand: batched, each response independent of its batch.

Requests are taken longest prompt first; a response that is over makes room for the next prompt at
once. What all prompts begin with is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling, end_of_stop
from cs336_alignment.model.loading import eos_ids
from cs336_alignment.model.log_probs import compute_entropy
from cs336_alignment.model.padded_decoder import PaddedDecoder
from cs336_alignment.model.slots import SlotDecoder, flat_attention_of, slots_work

CACHED_VALUES = 2**18


class _Decoder(Protocol):
    @property
    def free(self) -> int: ...

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...

    def release(self, row: int) -> None: ...


@dataclass
class _Row:
    """A response in the making."""

    index: int  # of its request
    limit: int  # tokens at most
    draws: Tensor  # (limit,) float64 in [0, 1), one for each token
    tokens: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    end: int | None = None  # characters of the text up to the end of its stop string


class LocalGenerator:
    """Generates with a model in this process; see `Generator`.

    Args:
        model: a causal language model; its mode and attention are restored after each call.
        tokenizer: of the model.
        batch_size: responses in the making at once.
        autocast_dtype: compute dtype; None: the weights' own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype
        self._eos_ids = sorted(eos_ids(model.generation_config, tokenizer))
        self._slots_work: bool | None = None

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
            requests: N of them.
            sampling: of all of them.
            advance: called after each token with the number of responses it finished; what it
                raises ends the generation.
            on_done: called with the number of a request and its response as soon as it is over.

        Raises:
            ValueError: a prompt is empty, or leaves no position for a response.
            UserError: the model computes NaN or infinity (70).
        """
        limits = [self._limit(i, request, sampling) for i, request in enumerate(requests)]
        done: dict[int, Generation] = {}
        if not requests:
            return []
        longest = max(
            len(request.prompt_ids) + n for request, n in zip(requests, limits, strict=True)
        )
        with torch.no_grad(), self._ready(longest) as in_slots:
            decoder, waiting = self._decoder(requests, longest, in_slots), self._in_order(requests)
            rows: list[_Row] = []
            logits = torch.empty(0)
            while waiting or rows:
                # A few at a time: a forward pass for each single prompt would cost more.
                if waiting and decoder.free >= min(len(waiting), max(1, self.batch_size // 8)):
                    chosen = [waiting.pop(0) for _ in range(min(decoder.free, len(waiting)))]
                    new = decoder.admit([requests[i].prompt_ids for i in chosen])
                    logits = torch.cat([logits, new]) if rows else new
                    rows += [_Row(i, limits[i], _draws(requests[i], limits[i])) for i in chosen]
                tokens = self._choose(logits, rows, sampling)
                finished = self._take(tokens, rows, sampling)
                for row, stopped in sorted(finished.items(), reverse=True):
                    generation = self._finish(rows[row], stopped)
                    done[rows[row].index] = generation
                    on_done(rows[row].index, generation)
                    last, moved = rows.pop(), tokens[-1]
                    if row < len(rows):
                        rows[row], tokens[row] = last, moved
                    tokens = tokens[:-1]
                    decoder.release(row)
                advance(len(finished))
                if rows:
                    logits = decoder.step(tokens)
        return [done[i] for i in range(len(requests))]

    def _limit(self, number: int, request: Request, sampling: Sampling) -> int:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limit = sampling.max_new_tokens
        if positions is not None:
            limit = min(limit, positions - len(request.prompt_ids))
        if not request.prompt_ids or limit < 1:
            what = "leaves no position for a response" if request.prompt_ids else "is empty"
            raise ValueError(f"prompt {number} (counted from 0) {what}")
        return limit

    @contextmanager
    def _ready(self, longest: int) -> Iterator[bool]:
        """Prepare the model; yields whether it takes slots for rows of this length."""
        training = self.model.training
        self.model.eval()
        try:
            with flat_attention_of(self.model, longest) as flat:
                if flat and self._slots_work is None:
                    self._slots_work = slots_work(self.model, self.autocast_dtype)
                yield flat and bool(self._slots_work)
        finally:
            self.model.train(training)

    def _decoder(self, requests: Sequence[Request], longest: int, in_slots: bool) -> _Decoder:
        slots = min(self.batch_size, len(requests))
        if not in_slots:
            return PaddedDecoder(self.model, slots=slots, autocast_dtype=self.autocast_dtype)
        prompts = [request.prompt_ids for request in requests]
        # What the first and the last in order share, all share; each keeps a token of its own.
        ends, shared = (min(prompts), max(prompts)), 0
        most = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
        while shared < most and ends[0][shared] == ends[1][shared]:
            shared += 1
        return SlotDecoder(
            self.model, prompts[0][:shared], slots=slots, capacity=longest,
            autocast_dtype=self.autocast_dtype,
        )  # fmt: skip

    def _in_order(self, requests: Sequence[Request]) -> list[int]:
        # The longest first: if memory is short, it shows at once.
        return sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))

    def _choose(self, logits: Tensor, rows: Sequence[_Row], sampling: Sampling) -> Tensor:
        """Choose the next token of each row (n,) and note the entropy of what it was chosen of."""
        for number, (row, entropy) in enumerate(zip(rows, _entropies(logits), strict=True)):
            if math.isnan(entropy) and not logits[number].max() < math.inf:
                raise _no_numbers(row)
            row.entropies.append(entropy)
        early = [i for i, row in enumerate(rows) if len(row.tokens) < sampling.min_new_tokens]
        if early and self._eos_ids:
            logits = logits.clone()
            logits[torch.tensor(early)[:, None], torch.tensor(self._eos_ids)] = float("-inf")
        if sampling.temperature == 0:
            return logits.argmax(-1).cpu()
        draws = torch.stack([row.draws[len(row.tokens)] for row in rows]).to(logits.device)
        return draw(logits, draws, sampling.temperature, sampling.top_p).cpu()

    def _take(
        self, tokens: Tensor, rows: Sequence[_Row], sampling: Sampling
    ) -> dict[int, Literal["eos", "stop", "length"]]:
        """Append each row's token; returns which rows are over, and why."""
        over: dict[int, Literal["eos", "stop", "length"]] = {}
        # A token stands for at least one byte, so a stop string lies within so many of them.
        tail = max((len(text.encode()) for text in sampling.stop), default=0) + 1
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.tokens.append(token)
            if token in self._eos_ids:
                over[number] = "eos"
                continue
            if sampling.stop and len(row.tokens) >= sampling.min_new_tokens:
                text = decode(self.tokenizer, row.tokens[-tail:])
                if any(string in text for string in sampling.stop):
                    earlier = decode(self.tokenizer, row.tokens[:-1])
                    row.end = end_of_stop(
                        decode(self.tokenizer, row.tokens), earlier, sampling.stop
                    )
                if row.end is not None:
                    over[number] = "stop"
                    continue
            if len(row.tokens) == row.limit:
                over[number] = "length"
        return over

    def _finish(self, row: _Row, stopped: Literal["eos", "stop", "length"]) -> Generation:
        text = decode(self.tokenizer, row.tokens[: len(row.tokens) - (stopped == "eos")])
        entropy = sum(row.entropies) / len(row.entropies)
        return Generation(text[: row.end], tuple(row.tokens), entropy, len(row.tokens), stopped)


def _entropies(logits: Tensor) -> list[float]:
    """Compute the entropy of each row of (n, V); on a CPU a few rows at a time, whose intermediate
    values then stay in its cache: a third of the time.
    """
    count = len(logits) if logits.is_cuda else max(1, CACHED_VALUES // logits.shape[-1])
    return [h for part in logits.split(count) for h in compute_entropy(part).tolist()]


def draw(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw tokens by inverting the cumulative distribution.

    Args:
        logits: (n, V).
        draws: (n,) float64, uniform in [0, 1).
        temperature: above 0.
        top_p: at most 1; below, only the likeliest tokens that have this probability together.

    Returns:
        (n,) int64 token ids.
    """
    p = (logits.double() / temperature).softmax(-1)
    order = None
    if top_p < 1:
        p, order = p.sort(dim=-1, descending=True, stable=True)
        # The token that passes the threshold still belongs to them, and the first always does.
        p = p.where(p.cumsum(-1) - p < top_p, 0.0)
    sums = p.cumsum(-1)
    # Rounding may bring a draw to the total, which no token reaches; and one that has no
    # probability must not be hit.
    aim = (draws[:, None] * sums[:, -1:]).clamp(max=sums[:, -1:].nextafter(sums.new_zeros(())))
    chosen = torch.searchsorted(sums, aim, right=True)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


def _no_numbers(row: _Row) -> UserError:
    return UserError(
        "R321",
        "the model computes NaN or infinity, of which no token can be chosen",
        got=f"token {len(row.tokens) + 1} of response {row.index + 1} of this process",
        hint="look for NaN in its weights, or for a precision that overflows: "
        "trainer.precision=fp32",
    )


def _draws(request: Request, limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(limit, generator=generator, dtype=torch.float64)
