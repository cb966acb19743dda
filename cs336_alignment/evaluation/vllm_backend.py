"""Generation by vLLM in this process, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling
from cs336_alignment.evaluation.server_answers import end_after_minimum
from cs336_alignment.model.source import ModelSource


class VllmGenerator:
    """Generates with a vLLM engine; see `Generator`.

    Args:
        source: of the model; vLLM loads it.
        tokenizer: of the model.
        eos: token ids that end a response.
        dtype: of weights and compute.
        batch_size: responses in the making at once.
        longest: tokens of prompt and response at most.

    Raises:
        UserError: vLLM is not installed (78), or cannot load the model (70).
    """

    def __init__(
        self,
        source: ModelSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Collection[int],
        dtype: torch.dtype | None,
        batch_size: int,
        longest: int,
    ) -> None:
        try:
            import vllm
        except ImportError as failure:
            raise UserError(
                "C147",
                f"evaluation.backend=vllm needs vLLM, which cannot be imported: {failure}",
                hint="pip install vllm (it brings the torch that it was built for, so best in an "
                "environment of its own); or evaluation.backend=server, which asks `vllm serve`",
            ) from failure
        self._vllm: Any = vllm
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        try:
            self._engine: Any = vllm.LLM(
                model=source.location, revision=source.revision,
                tokenizer_revision=source.revision, trust_remote_code=source.trust_remote_code,
                dtype="float32" if dtype is None else str(dtype).removeprefix("torch."),
                max_num_seqs=batch_size, max_model_len=longest, seed=0,
            )  # fmt: skip
        except Exception as failure:
            raise UserError("R351", f"vLLM cannot load {source.location}: {failure}") from failure

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        advance: Callable[[int], None] = lambda _: None,
        on_done: Callable[[int, Generation], None] = lambda _, __: None,
    ) -> list[Generation]:
        """Generate one response for each request, all in one call of the engine."""
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._parameters(request, sampling) for request in requests],
            use_tqdm=False,
        )
        found = [self._generation(output.outputs[0], sampling) for output in outputs]
        for number, generation in enumerate(found):
            on_done(number, generation)
        advance(len(found))
        return found

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            n=1, seed=request.seed, temperature=sampling.temperature, top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens, min_tokens=sampling.min_new_tokens,
            stop=list(sampling.stop) or None, include_stop_str_in_output=True,
            stop_token_ids=sorted(self._eos) or None, skip_special_tokens=False,
        )  # fmt: skip

    def _generation(self, output: Any, sampling: Sampling) -> Generation:
        ids = tuple(output.token_ids)
        ended = ids[-1:] and ids[-1] in self._eos and output.finish_reason == "stop"
        text = decode(self._tokenizer, ids[: len(ids) - bool(ended)])
        end = end_after_minimum(text, sampling, self._tokenizer)
        if end is not None:
            return Generation(text[:end], ids, None, len(ids), "stop")
        if output.finish_reason not in ("stop", "length"):
            raise UserError(
                "R352",
                f"vLLM ended a response with {output.finish_reason}",
                hint="its own log says more; what was generated is kept",
            )
        return Generation(text, ids, None, len(ids), "eos" if ended else "length")
