"""What generates where it is not a model that was loaded here: opened, checked, told."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from transformers import AutoConfig, GenerationConfig

from cs336_alignment.config import Config
from cs336_alignment.config_clashes import clash
from cs336_alignment.data.chat_date import writes_date
from cs336_alignment.data.tokenize import decode
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.arms import Arm, identity_of
from cs336_alignment.evaluation.conversations import Asked, find_conversations
from cs336_alignment.evaluation.sampling import Generator, sampling_of
from cs336_alignment.evaluation.server_client import ServerClient
from cs336_alignment.evaluation.server_dialect import Dialect, learn
from cs336_alignment.evaluation.server_generator import PromptForms, ServerGenerator
from cs336_alignment.evaluation.vllm_backend import VllmGenerator
from cs336_alignment.model.fits import check_positions
from cs336_alignment.model.loading import eos_ids
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.preflight import choose_precision

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Backend:
    """A generator that is ready.

    Attributes:
        generator: generates.
        identity: names all that decides what it answers.
        batch_size: responses that one answer may depend on; None: nobody here decides that.
    """

    generator: Generator
    identity: str
    batch_size: int | None


def open_backend(
    arm: Arm,
    gradable: Sequence[int],
    config: Config,
    precision: str,
    processes: Processes,
    console: Console,
) -> Backend:
    """Open the backend that `evaluation.backend` names, for the model of an arm.

    Args:
        arm: the model, its tokenizer and its examples.
        gradable: numbers of the examples that are generated for.
        config: of the command.
        precision: `trainer.precision`, as the launcher leaves it.
        processes: who shares the work.
        console: shows how the backend is asked.

    Raises:
        UserError: it is not there (74), or cannot do what is asked (78).
    """
    if arm.options.random_init:
        raise clash(
            "evaluation.backend",
            "model.random_init",
            "weights that are drawn here are not those that another backend generates with",
        )
    prompts = {number: arm.dataset.prompt_ids(number) for number in gradable}
    longest = max(map(len, prompts.values()), default=0) + config.evaluation.max_new_tokens
    console.note(
        f"no weights of {arm.options.name_or_path} are loaded here, so there is no eval/loss; "
        "its tokenizer makes the prompts"
    )
    if config.evaluation.backend == "vllm":
        return _open_vllm(arm, longest, config, precision, processes)
    return _open_server(arm, prompts, longest, config, processes, console)


def _open_vllm(
    arm: Arm, longest: int, config: Config, precision: str, processes: Processes
) -> Backend:
    if processes.count > 1:
        raise clash(
            "evaluation.backend",
            "parallel.num_processes",
            "vLLM starts its own processes: launch one (`cs336-sft evaluate …`)",
        )
    source = arm.source
    shape = AutoConfig.from_pretrained(
        source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    check_positions(getattr(shape.get_text_config(), "max_position_embeddings", None), longest)
    dtype = choose_precision(precision, processes.device)
    batch_size = config.evaluation.batch_size
    generator = VllmGenerator(
        source, arm.tokenizer, eos=_eos_ids(arm), dtype=dtype, batch_size=batch_size,
        longest=longest,
    )  # fmt: skip
    identity = f"vllm {identity_of(arm, None, config)} {dtype} {processes.device.type}"
    return Backend(generator, identity, batch_size)


def _open_server(
    arm: Arm,
    prompts: dict[int, list[int]],
    longest: int,
    config: Config,
    processes: Processes,
    console: Console,
) -> Backend:
    options = config.evaluation
    client = ServerClient(
        options.server_url, key=os.environ.get(KEY_VARIABLE), timeout=options.server_timeout,
        retries=options.server_retries, connections=options.server_concurrency, tell=console.warn,
    )  # fmt: skip
    conversations: dict[tuple[int, ...], Asked] = {}
    if options.server_api == "chat":
        conversations = _conversations(arm, prompts, config, console)
    forms = PromptForms(arm.tokenizer, conversations)
    sampling = sampling_of(options)
    shortest = min(prompts.values(), key=len)
    asked = processes.on_main(lambda: learn(
        client, model=options.server_model, api=options.server_api, prompt=forms(shortest),
        sampling=sampling,
    ))  # fmt: skip
    dialect: Dialect = processes.agree(asked)
    check_positions(dialect.context, longest)
    console.note(f"server     {options.server_url}, model {dialect.model}")
    console.note(f"           {dialect.describe()}")
    concurrency = options.server_concurrency
    if dialect.options == "generation_config" and sampling.temperature > 0:
        concurrency = 1
        dialect = replace(dialect, notes=(*dialect.notes, _one_seed(processes.count)))
    for line in dialect.notes:
        console.warn(line)
    identity = f"server {client.url} {replace(dialect, notes=())} "
    generator = ServerGenerator(
        client, dialect, arm.tokenizer, forms=forms,
        eos=[decode(arm.tokenizer, [i]) for i in _eos_ids(arm)], concurrency=concurrency,
        warn=console.warn,
    )  # fmt: skip
    return Backend(generator, identity + identity_of(arm, None, config), None)


def _one_seed(processes: int) -> str:
    note = "this server has one seed for all requests, so it is asked for one response at a time"
    if processes > 1:
        note += f"; {processes} processes ask it here, so responses do not repeat: launch one"
    return note


def _conversations(
    arm: Arm, prompts: dict[int, list[int]], config: Config, console: Console
) -> dict[tuple[int, ...], Asked]:
    places = arm.data.places
    by_place = {places[int(arm.chosen[number])]: ids for number, ids in prompts.items()}
    found = find_conversations(config.data, arm.tokenizer, by_place, seed=config.seed)
    others = sum(tuple(ids) not in found for ids in prompts.values())
    if others:
        console.warn(
            f"evaluation.server_api=chat sends {others:,} of {len(prompts):,} prompts, which no "
            "conversation here renders, as one message of the user: the server puts its own chat "
            "template around them"
        )
    if found and writes_date(arm.tokenizer):
        console.warn("the server's chat template writes the date itself, not the one used here")
    return found


def _eos_ids(arm: Arm) -> Collection[int]:
    settings, source = None, arm.source
    with suppress(OSError):  # it has none
        settings = GenerationConfig.from_pretrained(
            source.location, revision=source.revision or "main"
        )
    return sorted(eos_ids(settings, arm.tokenizer))


def refuse_nothing_to_ask(gradable: Sequence[int], config: Config) -> None:
    """Refuse to evaluate without loss and without generations.

    Raises:
        UserError: no row has a ground truth (65).
    """
    if not gradable:
        raise UserError(
            "D333",
            f"no row of {config.data.eval_path} has a ground truth, and without a model here there "
            "is nothing else to evaluate",
            hint="name their column: data.columns.ground_truth=…",
        )
