"""The step on one GPU, arm by arm; needs torch, transformers and this project's core alone.

    python scripts/bench_gpu.py [--shapes 0.5B 1.5B] [--data gsm8k long] [--rounds 5]

Models of Qwen2.5's shapes with drawn weights, fp32 weights and bf16 compute. The lengths: those of
GSM8K under the r1_zero template (91 tokens in common), and a long tail (log-normal, median 700, at
most 4,096). The arms take turns. Prints for each real tokens a second, the share of the bf16 GEMM
rate measured in the same run, peak memory, and the loss and gradient against float64 (of a few
short examples, through the same arm); exit status 1 if an arm is off by more than twice what plain
transformers' padded rows are in the same precision.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from bench_common import (
    LADDER,
    Arm,
    Microbatches,
    Shape,
    product_rate,
    refuse_apart,
    seconds_of,
    sizes_of,
    take_step,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

from cs336_alignment.data.batching import cut_by_tokens
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.model.compile import compile_layers
from cs336_alignment.model.policy import Policy

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
PREFIX = 91
CHECKED = 4  # examples for the comparison with float64
CHECKED_LENGTH = 160


def build(name: str, device: torch.device) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[name], tie_word_embeddings=True, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with device:
        return Qwen2ForCausalLM(config)


def draw(kind: str, count: int, vocabulary: int) -> list[TokenizedExample]:
    """Draw examples whose lengths are like those of a data set."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, count, generator=generator)
    if kind == "gsm8k":  # means of 157 and 132 tokens with SmolLM2's tokenizer
        prompts = PREFIX + (60 * (0.35 * normal[0]).exp()).int().clamp(10, 250)
        responses = (120 * (0.45 * normal[1]).exp()).int().clamp(20, 450)
    else:
        prompts = (256 * (0.3 * normal[0]).exp()).int().clamp(32, 1024)
        responses = (444 * (0.9 * normal[1]).exp()).int().clamp(16, 4096 - 1024)
    shared = torch.randint(vocabulary, (PREFIX,), generator=generator)
    examples = []
    for index, (prompt, response) in enumerate(
        zip(prompts.tolist(), responses.tolist(), strict=True)
    ):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator)
        if kind == "gsm8k":
            ids[:PREFIX] = shared
        examples.append(TokenizedExample(ids, torch.arange(len(ids)) >= prompt, index))
    return examples


def cut(examples: list[TokenizedExample], arm: Arm, tokens: int) -> Microbatches:
    lengths = [len(example.input_ids) for example in examples]
    bins = cut_by_tokens(range(len(examples)), lengths, tokens, batching=arm.batching)
    return [[examples[i] for i in ids] for ids in bins]


def against_float64(
    name: str, policy: Policy, arms: list[Arm], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Give each arm's relative error of loss and gradient on a few short examples."""
    head = policy.head
    examples = [
        replace(e, input_ids=e.input_ids[:CHECKED_LENGTH],
                response_mask=torch.arange(CHECKED_LENGTH) >= PREFIX + 10)
        for e in draw("gsm8k", 40, SHAPES[name]["vocab_size"]) if len(e.input_ids) > CHECKED_LENGTH
    ][:CHECKED]  # fmt: skip

    def gradient(of: Policy) -> torch.Tensor:
        parts = [p.grad.flatten() for p in of.parameters() if p.grad is not None]
        return torch.cat(parts).double().cpu()

    wide = Policy(build(name, device).double())
    wide.load_state_dict(policy.state_dict())
    loss = take_step(wide, wide.head, [examples], LADDER[0])
    want = gradient(wide)
    del wide
    torch.cuda.empty_cache()
    errors = {}
    for arm in arms:
        found = take_step(policy, head, [examples], arm)
        apart = float((gradient(policy) - want).norm() / want.norm())
        errors[arm.name] = abs(found - loss) / loss, apart
    policy.zero_grad(set_to_none=True)
    return errors


def measure(name: str, kind: str, options: argparse.Namespace, device: torch.device) -> None:
    vocabulary = SHAPES[name]["vocab_size"]
    model = build(name, device)
    policy = Policy(model, torch.bfloat16 if device.type == "cuda" else None)
    shape, head = Shape.of(model), policy.head
    arms = list(LADDER)
    if kind != "gsm8k":
        arms.pop()  # nothing in common
    errors = against_float64(name, policy, arms, device)
    examples = draw(kind, options.examples, vocabulary)
    tokens = sum(n for n, _ in sizes_of(examples))
    useful = shape.useful(sizes_of(examples))
    hidden, inner = SHAPES[name]["hidden_size"], SHAPES[name]["intermediate_size"]
    sizes = ((8192, hidden, inner), (8192, inner, hidden), (4096, hidden, vocabulary))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    rates: list[float] = []

    def time_arm(arm: Arm, label: str) -> None:
        # Padded rows with whole logits need gigabytes for each thousand tokens.
        budget = options.tokens if arm.own_head else options.tokens // 4
        microbatches = cut(examples, arm, budget)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds.setdefault(label, []).append(
            seconds_of(lambda: take_step(policy, head, microbatches, arm), device)
        )
        if device.type == "cuda":
            memory[label] = torch.cuda.max_memory_allocated() / 2**30

    def rounds(suffix: str) -> None:
        for _ in range(options.rounds + 1):
            rates.append(product_rate(sizes, dtype, device))
            for arm in arms:
                time_arm(arm, arm.name + suffix)

    rounds("")
    if options.compile:
        compile_layers(model)
        arms[:] = arms[3:]
        rounds(", compiled")
    rate = statistics.median(rates)
    print(f"\n{name}, {kind}: {len(examples)} examples, {tokens:,} tokens a step; microbatches of "
          f"{options.tokens:,} tokens (of a quarter with whole logits); GEMM "
          f"{rate / 1e12:.1f} TFLOP/s\n")  # fmt: skip
    print(
        "| arm | tokens/s | × | share of GEMM rate | peak memory, GiB | loss off | gradient off |"
    )
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(seconds[LADDER[0].name][1:])
    for label, values in seconds.items():
        second = statistics.median(values[1:])
        loss, apart = errors[label.removesuffix(", compiled")]
        print(f"| {label} | {tokens / second:,.0f} | {base / second:.2f} | "
              f"{useful / second / rate:.0%} | {memory.get(label, float('nan')):.1f} | "
              f"{loss:.0e} | {apart:.0e} |")  # fmt: skip
    plain = errors[LADDER[0].name][1]
    refuse_apart({name: apart for name, (_, apart) in errors.items()}, max(2 * plain, 1e-5))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"])
    parser.add_argument("--data", nargs="+", choices=["gsm8k", "long"], default=["gsm8k", "long"])
    parser.add_argument("--examples", type=int, default=256, help="of a step")
    parser.add_argument("--tokens", type=int, default=32768, help="of a microbatch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    options = parser.parse_args()
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape_name in options.shapes:
        for data_kind in options.data:
            measure(shape_name, data_kind, options, place)
