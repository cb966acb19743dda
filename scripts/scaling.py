"""What a step would cost on many GPUs: a model of compute, memory and communication, and its check.

    python scripts/scaling.py [plan lora batch network breaks check] [--gpu H100]

Plain arithmetic: nothing is trained, no GPU is needed. docs/scaling.md says what is assumed, where
the constants come from and how far the predictions were off.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

GIB, NODE = 2**30, 8
# Assumed or fitted; docs/scaling.md has the reasons.
KERNELS = 0.92  # of what a square matrix product reaches, those of a transformer's shapes do
PASSES = {False: 170.0, True: 100.0}  # over hidden and inner units in memory, eager and compiled
WIRE = 0.8  # of a link's rate, a large collective reaches
HOP = 3e-6  # seconds of a step of a ring
LEAK = 0.1  # of communication that is hidden shows all the same
STRAGGLERS = 0.007  # of a step, with each doubling beyond a node
LAUNCH = {False: 0.9e-3, True: 0.3e-3}  # seconds of the host a layer and microbatch
FILL = 0.92  # of the memory, before fragments and libraries' buffers end it
BESIDE = 3.0  # GiB: context, communication buffers, a chunk of logits


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight.

    Attributes:
        peak: dense bf16 TFLOP/s of the data sheet, what MFU divides by.
        reached: TFLOP/s of the best matrix products that were measured.
        memory: GiB.
        traffic: TB/s of its memory.
        link: GB/s in one direction to the others of its node.
        network: GB/s in one direction to other nodes, its share of the node's.
    """

    peak: float
    reached: float
    memory: float
    traffic: float
    link: float
    network: float


GPUS = {
    "A100": Gpu(312, 268, 80, 2.04, 300, 25),
    "H100": Gpu(989, 792, 79, 3.35, 450, 50),
    "H200": Gpu(989, 792, 140, 4.8, 450, 50),
}


@dataclass(frozen=True)
class Model:
    """The shape of a decoder with gated MLPs; biases and norms are left out (under 0.1 %)."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def head(self) -> int:
        """Parameters of the LM head alone."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters of embedding and head, which are gathered together; tied ones are one."""
        return self.head * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.root


MODELS = {
    "SmolLM2-135M": Model(30, 576, 1536, 9, 3, 64, 49152, True),
    "Qwen2.5-0.5B": Model(24, 896, 4864, 14, 2, 64, 151936, True),
    "Qwen3-0.6B": Model(28, 1024, 3072, 16, 8, 128, 151936, True),
    "Qwen2.5-1.5B": Model(28, 1536, 8960, 12, 2, 128, 151936, True),
    "Qwen3-4B": Model(36, 2560, 9728, 32, 8, 128, 151936, True),
    "Llama-2-7B": Model(32, 4096, 11008, 32, 32, 128, 32000),
    "Qwen2.5-7B": Model(28, 3584, 18944, 28, 4, 128, 152064),
    "Llama-3.1-8B": Model(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-2-13B": Model(40, 5120, 13824, 40, 40, 128, 32000),
    "Qwen2.5-14B": Model(48, 5120, 13824, 40, 8, 128, 152064),
    "Qwen2.5-32B": Model(64, 5120, 27648, 40, 8, 128, 152064),
    "Llama-34B": Model(48, 8192, 22016, 64, 8, 128, 32000),
    "Llama-2-70B": Model(80, 8192, 28672, 64, 8, 128, 32000),
    "Llama-3-70B": Model(80, 8192, 28672, 64, 8, 128, 128256),
}
SIZES = (
    "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3-70B"
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is trained and how.

    Attributes:
        strategy: `ddp`, `fsdp2` (sharded over all GPUs), `hsdp` (over a node, copied between).
        recompute: of the layers' forward pass, the share that is computed once more: 0; 1 with
            checkpointing; a little with the selective one, which keeps matrix products.
        tokens: of a microbatch on one GPU.
        microbatches: of a step on one GPU.
        length: of a row, in tokens.
        response: the share of tokens that the head sees.
        lora: adapters on a base that is not trained.
        compiled: layers.
        reduce_bytes: of a gradient on the wire.
    """

    strategy: str = "fsdp2"
    recompute: float = 0.0
    tokens: int = 16384
    microbatches: int = 1
    length: int = 1024
    response: float = 0.5
    lora: bool = False
    compiled: bool = False
    reduce_bytes: int = 4


SELECTIVE = 0.15
CHECKPOINTING = {0.0: "", SELECTIVE: " selective", 1.0: " checkpointing"}


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        seconds: of the step.
        tokens_per_second: of one GPU.
        mfu: FLOPs that the rows need, none recomputed, by the data sheet's peak.
        memory: GiB of one GPU.
        bound: what takes most of it.
        parts: seconds of each cause alone, as if nothing overlapped.
    """

    seconds: float
    tokens_per_second: float
    mfu: float
    memory: float
    bound: str
    parts: dict[str, float]


def flops_per_token(model: Model, run: Run, recompute: float = 0.0) -> float:
    """Count the FLOPs of matrix products and causal attention, forward and backward."""
    layers = 2.0 * model.layers * model.layer
    attention = 2.0 * model.layers * model.heads * model.head_dim * run.length
    head = 2.0 * model.head * run.response
    backward = 1 if run.lora else 2  # the gradient by a frozen weight is not formed
    return (1 + backward) * (layers + head) + 3 * attention + recompute * (layers + attention)


def collective(size: float, gpus: int, gpu: Gpu) -> float:
    """Give the seconds of an all-gather or reduce-scatter of `size` bytes in all, around a ring; an
    all-reduce is two.
    """
    if gpus == 1:
        return 0.0
    rate = gpu.link if gpus <= NODE else min(gpu.link, NODE * gpu.network)
    return (gpus - 1) / gpus * size / (WIRE * rate * 1e9) + (gpus - 1) * HOP


def memory_of(model: Model, run: Run, gpus: int) -> float:
    """Estimate the peak of one GPU in GiB; fp32 weights, gradients and moments, bf16 compute."""
    shards = {"ddp": 1, "hsdp": min(gpus, NODE), "fsdp2": gpus}[run.strategy]
    state = model.parameters * (4 if run.lora else 16) / shards
    if run.strategy == "ddp":  # held whole, frozen layers are in bf16; else autocast copies them
        cast = -2 * model.layers * model.layer if run.lora else 2 * model.parameters
    else:  # in bf16 two layers and what lies outside of them; gradients of one, and of that
        cast = 4 * model.layer + 2 * model.root
        cast += 0 if run.lora else 4 * model.layer + 2 * model.root
    return (state + cast + run.tokens * activations(model, run)) / GIB + BESIDE


def activations(model: Model, run: Run, element: int = 2) -> float:
    """Count the bytes that a token leaves behind for the backward pass, in all layers."""
    width = model.head_dim * (model.heads + 2 * model.kv_heads)
    products = width + model.head_dim * model.heads + 2 * model.hidden + 2 * model.inner
    # Norms keep their input in fp32, the gated product its two factors and its result.
    whole = element * (products + 2 * model.hidden + 2 * model.inner) + 8 * model.hidden
    kept = {0.0: whole, SELECTIVE: element * products, 1.0: element * model.hidden}
    first = kept.get(run.recompute, whole * (1 - run.recompute))
    return model.layers * first + (whole if run.recompute else 0)


def cost_of(model: Model, run: Run, gpu: Gpu, gpus: int) -> Cost:
    """Estimate a step."""
    per_token = flops_per_token(model, run, run.recompute) / (KERNELS * gpu.reached * 1e12)
    passes = PASSES[run.compiled] * (1 + run.recompute / 3) * (2 / 3 if run.lora else 1)
    moved = passes * 2 * (model.hidden + model.inner) * model.layers / (gpu.traffic * 1e12)
    device = run.tokens * (per_token + moved)
    host = LAUNCH[run.compiled] * model.layers * (1 + run.recompute / 3)
    each = max(device, host)
    forward = each / ((2 if run.lora else 3) + run.recompute)
    backward = each - forward

    size = float(model.parameters)
    trained = 0.005 * size if run.lora else size
    shards = {"ddp": 1, "hsdp": min(gpus, NODE), "fsdp2": gpus}[run.strategy]
    gather = collective(2 * size, shards, gpu)
    scatter = collective(run.reduce_bytes * trained, shards, gpu)
    copies = gpus // shards
    # Between copies of a shard every GPU has its own share of the network.
    between = 0.0
    if run.strategy == "ddp":
        between = 2 * collective(run.reduce_bytes * trained, gpus, gpu)
    elif copies > 1:
        share = run.reduce_bytes * trained / shards
        rate = WIRE * gpu.network * 1e9
        between = 2 * ((copies - 1) / copies * share / rate + (copies - 1) * HOP)

    microbatch = max(forward, gather) + max(backward, gather + scatter)
    communication = run.microbatches * (2 * gather + scatter) + between
    optimizer = 28 * trained / shards / (gpu.traffic * 1e12)
    seconds = run.microbatches * microbatch + max(0.0, between - backward) + optimizer
    seconds += LEAK * communication
    seconds *= 1 + STRAGGLERS * max(0.0, math.log2(gpus / NODE))
    tokens = run.tokens * run.microbatches
    parts = {
        "matrix products": run.microbatches * run.tokens * per_token,
        "memory traffic": run.microbatches * run.tokens * moved + optimizer,
        "host": run.microbatches * host if host > device else 0.0,
        "network" if gpus > NODE and run.strategy != "hsdp" else "links": communication,
    }
    rate = tokens / seconds
    return Cost(
        seconds, rate, flops_per_token(model, run) * rate / (gpu.peak * 1e12),
        memory_of(model, run, gpus), max(parts, key=parts.__getitem__), parts,
    )  # fmt: skip


def best(model: Model, gpu: Gpu, gpus: int, run: Run) -> tuple[Run, Cost] | None:
    """Find the fastest way that fits into memory, of those that can be typed; None: there is none.

    DDP is preferred where it loses less than 3 %.
    """
    found: list[tuple[float, Run, Cost]] = []
    for strategy, handicap in (("ddp", 1.03), ("fsdp2", 1.0)):
        for recompute in CHECKPOINTING:
            tried = replace(run, strategy=strategy, recompute=recompute)
            cost = cost_of(model, tried, gpu, gpus)
            if cost.memory <= FILL * gpu.memory:
                found.append((cost.tokens_per_second * handicap, tried, cost))
    return max(found, key=lambda way: way[0])[1:] if found else None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def way_of(run: Run) -> str:
    return run.strategy + CHECKPOINTING[run.recompute]


def plan(name: str, *, lora: bool = False) -> str:
    """The fastest way that fits, with 16,384 tokens a GPU and step."""
    rows = []
    for size in SIZES:
        for gpus in (8, 64, 512):
            chosen = best(MODELS[size], GPUS[name], gpus, Run(lora=lora))
            if chosen is None:
                rows.append([size, str(gpus), "does not fit", "", "", "", ""])
                continue
            run, cost = chosen
            rows.append([
                size, str(gpus), way_of(run), f"{cost.memory:.0f}",
                f"{cost.tokens_per_second:,.0f}", f"{cost.mfu:.0%}", cost.bound,
            ])  # fmt: skip
    what = f"{'LoRA' if lora else 'full'}, {name}"
    columns = [what, "GPUs", "fastest that fits", "GiB", "tokens/s/GPU", "MFU", "most of it"]
    return table(columns, rows)


def batch(name: str) -> str:
    """One batch of 256 rows of 512 tokens, on more and more GPUs."""
    rows, tokens = [], 256 * 512
    for size in ("Qwen2.5-1.5B", "Llama-3.1-8B"):
        first = 0.0
        for gpus in (8, 32, 128, 256, 512):
            share = tokens // gpus
            chosen = best(MODELS[size], GPUS[name], gpus, Run(tokens=share, length=512))
            if chosen is None:
                rows.append([size, str(gpus), f"{share:,}", "does not fit", "", "", ""])
                continue
            run, cost = chosen
            first = first or cost.tokens_per_second
            rows.append([
                size, str(gpus), f"{share:,}", way_of(run), f"{cost.seconds:.3f}",
                f"{cost.tokens_per_second / first:.0%}", cost.bound,
            ])  # fmt: skip
    what = f"{tokens:,} tokens a step, {name}"
    columns = [what, "GPUs", "tokens a GPU", "way", "s a step", "efficiency", "most of it"]
    return table(columns, rows)


# A node's links to others → a GPU's share, GB/s.
NETWORKS = {
    "8 × 400 Gb/s": 50.0, "8 × 200 Gb/s": 25.0, "1 × 400 Gb/s": 6.25, "1 × 100 Gb/s": 1.5625,
}  # fmt: skip


def network(name: str) -> str:
    """Sharded over all GPUs or over each node, four microbatches of 4,096 tokens; MFU."""
    rows = []
    ways = [(strategy, gpus) for strategy in ("fsdp2", "hsdp") for gpus in (64, 512)]
    for size, recompute in (
        ("Llama-3.1-8B", SELECTIVE), ("Qwen2.5-14B", 1.0), ("Llama-3-70B", 1.0)
    ):  # fmt: skip
        for label, rate in NETWORKS.items():
            cells = []
            for strategy, gpus in ways:
                run = Run(strategy, recompute, tokens=4096, microbatches=4)
                cost = cost_of(MODELS[size], run, replace(GPUS[name], network=rate), gpus)
                fits = cost.memory <= FILL * GPUS[name].memory
                cells.append(f"{cost.mfu:.0%}" if fits else f"needs {cost.memory:.0f} GiB")
            rows.append([size, label, *cells])
    return table([name, "a node", *(f"{way}, {gpus} GPUs" for way, gpus in ways)], rows)


FAILURES = 419 / 54 / 16384  # unforeseen ends a GPU and day
WRITE = 1.0  # GB/s of one writer


def breaks(_: str) -> str:
    """Checkpoints and failures, by who writes; the interval that loses least is Young's."""
    rows = []
    for size, gpus in (
        ("Qwen2.5-7B", 8), ("Qwen2.5-32B", 64), ("Llama-3-70B", 64), ("Llama-3-70B", 512)
    ):  # fmt: skip
        written = 12 * MODELS[size].parameters / 1e9
        a_day = FAILURES * gpus
        cells = []
        for writers in (1, gpus // NODE):
            seconds = written / WRITE / writers
            interval = math.sqrt(2 * seconds * 86400 / a_day)
            lost = seconds / interval + interval / 2 * a_day / 86400
            cells.append(f"{seconds / 60:.1f} min, every {interval / 3600:.1f} h: {lost:.1%}")
        rows.append([size, str(gpus), f"{written:,.0f}", f"{a_day:.3f}", *cells])
    columns = [
        "", "GPUs", "a checkpoint, GB", "failures a day", "one writer: time lost",
        "a writer a node: time lost",
    ]  # fmt: skip
    return table(columns, rows)


@dataclass(frozen=True)
class Point:
    """A published measurement: tokens a second and GPU.

    Attributes:
        source: where it stands; docs/scaling.md has the addresses.
        setting: of the measurement.
        model: of `MODELS`.
        gpu: and its network.
        gpus: how many.
        run: what was trained and how.
        measured: tokens a second and GPU.
        fitted: a constant was chosen by it, so that it checks nothing.
    """

    source: str
    setting: str
    model: str
    gpu: Gpu
    gpus: int
    run: Run
    measured: float
    fitted: bool = False


def points() -> list[Point]:
    """What others measured, with what their pages say of the setting."""
    a100, h100 = GPUS["A100"], GPUS["H100"]
    shared_a100, shared_h100 = replace(a100, network=6.25), replace(h100, network=12.5)
    capped = replace(h100, reached=680, traffic=2.4, memory=94)  # 500 W, HBM2e
    ibm = Run(tokens=8192, length=4096, response=1.0, reduce_bytes=2)
    titan = Run(tokens=8192, length=8192, response=1.0, recompute=0.5)
    found = []
    for model, recompute, on_a100, on_h100 in (
        ("Llama-2-7B", 0.0, 3700, 7500), ("Llama-2-13B", 0.5, 1800, 3800),
        ("Llama-34B", 1.0, 700, 1550), ("Llama-2-70B", 1.0, 370, 800),
    ):  # fmt: skip
        run, fitted = replace(ibm, recompute=recompute), model == "Llama-2-7B"
        found += [
            Point("IBM", "A100, 400 Gb/s a node", model, shared_a100, 128, run, on_a100, fitted),
            Point("IBM", "H100, 800 Gb/s a node", model, shared_h100, 96, run, on_h100, fitted),
        ]
    for gpus, eager, compiled in ((8, 5762, 6667), (128, 5605, 6514)):
        run, setting = replace(titan, tokens=16384), "H100 at 500 W"
        found += [
            Point("torchtitan", setting, "Llama-3.1-8B", capped, gpus, run, eager),
            Point(
                "torchtitan", f"{setting}, compiled", "Llama-3.1-8B", capped, gpus,
                replace(run, compiled=True), compiled, gpus == 8,
            ),
        ]  # fmt: skip
    for model, length, recompute, measured in (
        ("Llama-3.1-8B", 8192, 0.5, 2973), ("Llama-3-70B", 8192, 1.0, 331),
        ("Llama-2-13B", 4096, 0.0, 2162),
    ):  # fmt: skip
        run = replace(titan, length=length, recompute=recompute)
        found.append(Point("torchtitan", "A100", model, a100, 64, run, measured))
    small = (("Qwen3-0.6B", 1, 8192, 26005.0), ("Qwen3-4B", 8, 16384, 49717 / 8))
    for model, gpus, length, rate in small:
        run = Run(tokens=length, microbatches=2, length=length, response=1.0, recompute=1.0)
        found.append(Point("prime-rl", "H100", model, h100, gpus, run, rate))
    return found


RECOMPUTED = {0.0: "nothing", 0.5: "half", 1.0: "all"}


def check(_: str) -> str:
    """Predictions beside what others measured."""
    rows = []
    for point in points():
        cost = cost_of(MODELS[point.model], point.run, point.gpu, point.gpus)
        ratio = f"{cost.tokens_per_second / point.measured:.2f}"
        rows.append([
            point.source, point.setting, point.model, str(point.gpus),
            RECOMPUTED[point.run.recompute], f"{point.measured:,.0f}",
            f"{cost.tokens_per_second:,.0f}", f"{ratio} (fitted)" if point.fitted else ratio,
        ])  # fmt: skip
    columns = [
        "source", "setting", "model", "GPUs", "recomputed", "measured", "predicted", "ratio"
    ]  # fmt: skip
    return table(columns, rows)


def check_here(_: str) -> str:
    """Predictions beside docs/performance.md: on a CPU, where ratios and memory can be told."""
    six = replace(MODELS["SmolLM2-135M"], layers=6)

    def flops(length: int = 256, vocabulary: int = 49152) -> float:
        return flops_per_token(replace(six, vocabulary=vocabulary), Run(length=length))

    def peak(tokens: int, recompute: float = 0.0, state: int = 16) -> float:
        model, run = MODELS["SmolLM2-135M"], Run("ddp", recompute)
        kept = tokens * activations(model, run, element=4)
        return (state * model.parameters + kept) / GIB + 0.7  # the process itself

    whole, shared = 2315, 1574  # tokens of 8 rows, and with their prefix once
    found = (
        ("time: rows of 1,024 tokens, of 256", 2229.6 / 2083.4, flops(1024) / flops()),
        ("time: rows of 4,096 tokens, of 256", 3070.4 / 2083.4, flops(4096) / flops()),
        ("time: vocabulary 151,936, 49,152", 3903.5 / 1986.6, flops(256, 151936) / flops()),
        ("time: vocabulary 8,192, 49,152", 1343.9 / 1986.6, flops(256, 8192) / flops()),
        ("time: two processes, one", 1991.4 / 3832.7, 0.5),
        ("GiB: flat rows", 5.67, peak(whole)),
        ("GiB: a shared prefix", 4.85, peak(shared)),
        ("GiB: selective checkpointing", 3.90, peak(shared, SELECTIVE)),
        ("GiB: checkpointing", 3.17, peak(shared, 1.0)),
        ("GiB: optimizer in 8 bits", 4.13, peak(shared, state=10)),
    )
    rows = [
        [label, f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured:.2f}"]
        for label, measured, predicted in found
    ]
    return table(["docs/performance.md", "measured", "predicted", "ratio"], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "plan": plan, "lora": lambda name: plan(name, lora=True), "batch": batch, "network": network,
    "breaks": breaks, "check": lambda name: f"{check(name)}\n\n{check_here(name)}",
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; none: all")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"there is no {', '.join(unknown)}")
    print("\n\n".join(TABLES[name](options.gpu) for name in options.tables or TABLES))
