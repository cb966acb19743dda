"""What a stranger sees of an exported model: loaded by transformers, an adapter by peft.

A program of its own, started by `reload_check` in a fresh process: it must not import this package.
It reads one line of JSON from standard input, writes one to standard output, and ends when standard
input closes, since then the run that asked is gone. V tokens of the vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # bytes of an element → integers as wide
CONVERSATION = [
    {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"},
]  # fmt: skip


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, list[Any]]:
    """Sum the bits of each saved tensor: [integer, dtype, whether all is finite] by name."""
    found: dict[str, list[Any]] = {}
    for name, tensor in tensors:
        if ".original_module." in name:  # peft trains a copy and keeps this
            continue
        name = name.replace(".modules_to_save.default.", ".")
        words = tensor.detach().contiguous().view(getattr(torch, WORDS[tensor.element_size()]))
        total = int(words.sum(dtype=torch.int64))
        found[name] = [total, str(tensor.dtype), bool(torch.isfinite(tensor).all())]
    return found


def log_probs(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Give the log-prob of each token but the first of each sequence, from whole logits."""
    found = []
    with torch.no_grad():
        for ids in sequences:
            row = torch.tensor([ids], device=model.device)
            mask = torch.ones_like(row)
            logits = model(input_ids=row, attention_mask=mask, use_cache=False).logits
            table = logits[0, :-1].double().log_softmax(-1)  # (tokens - 1, V)
            found.append(table.gather(1, row[0, 1:, None]).squeeze(1).tolist())
    return found


def continuations(model: Any, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Generate greedily for each prompt; ends where the model's generation config says."""
    found = []
    for ids, length in zip(prompts, lengths, strict=True):
        row = torch.tensor([ids], device=model.device)
        output = model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=length
        )
        found.append(output[0, len(ids) :].tolist())
    return found


def readings(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Show what a tokenizer makes of texts, and how it renders a conversation."""
    chat = None
    if tokenizer.chat_template is not None:
        try:
            chat = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
        except Exception as failure:  # a template may refuse it, then so must the other one
            chat = type(failure).__name__
    return {
        "prompt ids": [tokenizer(text)["input_ids"] for text in texts],
        "response ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "chat template": chat,
        "special tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Load the folder and do all that is asked."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    common = {"trust_remote_code": request["trust_remote_code"]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"], **common)
    if dtype := request.get("dtype"):
        common["dtype"] = getattr(torch, dtype)
    if (Path(request["folder"]) / "adapter_config.json").exists():
        # Not by transformers' own reader, which draws DoRA's magnitudes anew (5.23).
        from peft import AutoPeftModelForCausalLM

        adapted: Any = AutoPeftModelForCausalLM.from_pretrained(request["folder"], **common)
        model = adapted.get_base_model()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(request["folder"], **common)
    model.eval()
    return {
        "checksums": checksums(model.state_dict().items()),
        "log_probs": log_probs(model, request["sequences"]),
        "continuations": continuations(model, request["prompts"], request["lengths"]),
        "readings": readings(tokenizer, request["texts"]),
    }


def _end_with_the_run() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    answer, sys.stdout = sys.stdout, sys.stderr  # libraries print
    json.dump(look(request), answer)
    answer.flush()
    os._exit(0)  # the thread may hold standard input's lock, which an orderly exit waits for


if __name__ == "__main__":
    main()
