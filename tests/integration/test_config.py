"""Presets compose, mistakes get one readable error, and Hydra leaves nothing behind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cs336_alignment import cli, compose
from cs336_alignment.config import ALL_KEYS, Config
from cs336_alignment.config_names import ALIASES, SENTENCES, nearest_key
from cs336_alignment.errors import ExitStatus, UserError
from tests.conftest import ROOT, Sft

GIVEN = ("model.name_or_path=m", "data.train_path=d.jsonl")


def composed(*arguments: str, verb: str = "train") -> list[Config]:
    """Compose as the command line does, and catch the config instead of running it."""
    seen: list[Config] = []

    def job(config: Config) -> ExitStatus:
        seen.append(config)
        return ExitStatus.DONE

    compose.run_with_config(verb, arguments, job)
    return seen


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.run(["train", *arguments])
    return int(status), capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_composes(path: Path) -> None:
    configs = composed(f"experiment={path.stem}")
    assert len(configs) == (4 if "quickstart_data" in path.stem else 5) or len(configs) == 1
    assert (len(configs) > 1) == ("MULTIRUN" in path.read_text())
    for config in configs:
        swept = f"-max_train_examples-{config.data.max_train_examples or 'null'}"
        assert config.run_name == path.stem + (swept if len(configs) > 1 else "")
        assert config.trainer.gradient_accumulation_steps is None


@pytest.mark.parametrize(
    "choice",
    [
        f"{path.parent.name}={path.stem}"
        for path in sorted((ROOT / "configs").glob("*/*.yaml"))
        if path.parent.name not in ("experiment", "hydra", "accelerate")
    ],
)
def test_every_group_option_composes(choice: str) -> None:
    assert len(composed(choice, *GIVEN)) == 1


def test_defaults_are_those_of_the_schema() -> None:
    """YAML repeats the schema's defaults for people to read; they must agree."""
    (config,) = composed(*GIVEN)
    want = Config()
    want.model.name_or_path, want.data.train_path, want.run_name = "m", "d.jsonl", "m-d"
    assert config == want


def test_contract_defaults() -> None:
    (config,) = composed(*GIVEN)
    assert (config.seed, config.output_root) == (42, "outputs")
    assert (config.data.max_length, config.data.overlong) == (2048, "drop")
    assert config.trainer.global_batch_size == 32
    assert config.trainer.microbatch_tokens is config.trainer.gradient_accumulation_steps is None
    assert (config.trainer.num_train_epochs, config.trainer.max_steps) == (3, None)
    assert config.optimizer.betas == [0.9, 0.999]
    assert config.logger.backend == "wandb"


@pytest.mark.parametrize(
    ("arguments", "status", "texts"),
    [
        (("trainer.learning_rat=1",), 78, ("no key trainer.learning_rat", "optimizer.learning_rate")),
        (("optimizer.lr=1",), 78, ("no key optimizer.lr", "optimizer.learning_rate")),
        (("trainr.max_steps=1",), 78, ("no key trainr", "trainer.max_steps")),
        (("data.sources=[{path: a, formt: text}]",), 78, ("data.sources has no key formt", "mean format?")),
        (("+trainer.foo=1",), 78, ("no key trainer.foo",)),
        (("+=",), 78, ("section.key=value",)),
        (("trainer.max_steps=abc",), 78,
         ("trainer.max_steps has a value of the wrong type", "expected: a whole number of at least 1, or null; got: abc\n")),
        (("trainer.compile=maybe",), 78, ("expected: true or false; got: maybe\n",)),
        (("trainer.global_batch_size=None",), 78, ("trainer.global_batch_size=32 is its default",)),
        (("model.freeze=embed",), 78, ("expected: a list of regular", "brackets make a list: 'model.freeze=[…]'")),
        (("optimizer.betas=[a,b]",), 78, ("error[C108]: optimizer.betas ", "a list of two numbers")),
        (("data.shuffle=null",), 78, ("error[C108]: data.shuffle ", "got: null")),
        (("data.columns=abc",), 78, ("typed one by one: data.columns.messages=…",)),
        (("data.sources=[{path: a, columns: x}]",), 78, ("error[C108]: an entry of data.sources ", "weight: 2")),
        (("data.sources=[{path: a, weight: x}]",), 78, ("weight of data.sources", "got: x")),
        (("trainer.max_steps=None",), 78, ("hint: trainer.max_steps=null",)),
        (("trainer.global_batch_size=1.5",), 78, ("trainer.global_batch_size", "wrong type")),
        (("trainer.global_batch_size=0",), 78, ("trainer.global_batch_size", "at least 1", "0 (int)")),
        (("optimizer.learning_rate=nan",), 78, ("optimizer.learning_rate", "finite")),
        (("trainer.loss_normalization=tokens",), 78, ("one of token, sequence",)),
        (("trainer.batching=packed",), 78, ("one of auto, flat, flat_shared_prefix, padded",)),
        (("evaluation.stop=${seed}",), 78, ("C108", "evaluation.stop")),
        (("experiment=quickstrat",), 78, ("no preset experiment=quickstrat", "experiment=quickstart")),
        (("logger=tensorboard",), 78, ("no preset logger=tensorboard", "none, wandb")),
        (("run_name=../x",), 78, ("run_name", "letters, digits")),
        (("seed=-1",), 78, ("seed",)),
        (("trainer.microbatch_tokens=9", "trainer.gradient_accumulation_steps=2"), 78,
         ("trainer.microbatch_tokens and trainer.gradient_accumulation_steps",
          "got: trainer.microbatch_tokens=9, trainer.gradient_accumulation_steps=2\n")),
        (("optimizer.warmup_steps=9", "optimizer.warmup_ratio=0.1"), 78,
         ("optimizer.warmup_steps and optimizer.warmup_ratio",)),
        (("optimizer.warmup_steps=9", "optimizer.warmup_ratio=0.03"), 78, ("do not combine",)),
        (("model.trust_remote_code=true",), 78, ("model.trust_remote_code and model.revision",)),
        (("trainer.normalize_constant=2",), 78, ("trainer.loss_normalization",)),
        (("trainer.optim=adafactor",), 78, ("no key trainer.optim", "optimizer.name")),
        (("trainer.neftune_noise_alpha=5",), 78, ("trainer.neftune_alpha",)),
        (("trainer.label_smoothing_factor=0.1",), 78, ("trainer.label_smoothing",)),
        (("optimizer.name=adam",), 78, ("one of adamw, adafactor, muon, schedule_free",)),
        (("optimizer=lion",), 78, ("no preset optimizer=lion", "muon")),
        (("trainer.ema_decay=1",), 78, ("a number between 0 and 1",)),
        (("optimizer=schedule_free", "optimizer.lr_scheduler_type=cosine"), 78,
         ("optimizer.name and optimizer.lr_scheduler_type",)),
        (("run_name=a,b",), 78, ("--multirun",)),
        (("trainer.max_steps",), 78, ("cannot read the override `trainer.max_steps`",)),
        (("--learning_rate", "1e-5"), 2, ("type optimizer.learning_rate=1e-5",)),
        (("--learning-rate=1e-5",), 2, ("type optimizer.learning_rate=1e-5",)),
        (("--num_train_epochs", "2"), 2, ("type trainer.num_train_epochs=2",)),
        (("--load_in_4bit", "True"), 2, ("hint: type lora.quantize=nf4\n",)),
        (("--load_in_4bit", "False"), 2, ("leave it out: lora.quantize is as it was",)),
        (("--load_in_8bit", "True"), 2, ("lora.quantize=nf4",)),
        (("--val_set_size", "0.1"), 2, ("type data.eval_fraction=0.1",)),
        (("--packing",), 2, ("trainer.batching=auto",)),
        (("--plot_loss",), 2, ("report.html",)),
        (("--num_beams", "4"), 2, ("`cs336-sft train --help` shows every key",)),
        (("trainer.deepspeed=x.json",), 78, ("did you mean parallel=fsdp2?",)),
        (("data.packing=true",), 78, ("no key data.packing", "trainer.batching=auto")),
        (("max_samples=9",), 78, ("no key max_samples", "data.max_train_examples")),
        (("--html", "page.html"), 2, ("--html is not a flag of train", "inspect and report")),
        (("--memory",), 2, ("--memory is not a flag of train", "belongs to doctor")),
        (("--config-name", "x"), 2, ("--config-dir . experiment=x",)),
        (("my/experiment/run.yaml",), 78, ("hint: type: --config-dir my experiment=run",)),
        (("data.train_path=a=b.yaml",), 78, ("put quotes around",)),
        (("optimizer=adamw,muon",), 78, ("gives several values", "hint: several runs want --multirun (-m)\n")),
        (("d.jsonl",), 78, ("type data.train_path=d.jsonl",)),
        (("data.train_path=a.jsonl,b.jsonl",), 78, ("a text quotes", "several files a pattern")),
        (("optimizer.learning_rate=1,2",), 78, ("hint: several runs want --multirun (-m)\n",)),
        (("my/run.yaml",), 78, ("type: --config-dir my experiment=run",)),
        (("lora.target_modules=a,b",), 78, ("a list brackets: 'lora.target_modules=[a,b]'",)),
        (("lora.modules_to_save=a",), 78, ("a list: 'lora.modules_to_save=[…]'",)),
        (("--cfg", "job", "--multirun"), 78, ("error[C115]", "hint: give one")),
        (("~optimizer.eps",), 78, ("error[C107]", "cannot be taken out", "section.key=null")),
        (("~logger",), 78, ("error[C107]", "cannot be taken out", "got: ~logger")),
        (("--cpu_offload", "trainer.max_steps=1"), 2, ("type parallel.cpu_offload=true\n",)),
        (("lora=8",), 78, ("error[C110]", "got lora=8", "lora.r=…")),
        (("optimizer=2e-4",), 78, ("expected: one of adafactor, adamw", "optimizer.learning_rate=…")),
        (("lora=1e3",), 78, ("error[C110]", "got lora=1e3")),
        (("experiment=quickstart", "+lora=8"), 78, ("error[C110]", "and got +lora=8\n")),
        (("-m", "optimizer=adamw,muon", "lora=8,16"), 78, ("error[C110]", "and got lora=8,16\n")),
        (("lora=[8]",), 78, ("error[C110]", "and got lora=[8]\n")),
        (("lora=[a]",), 78, ("error[C110]", "and got lora=[a]\n")),
        (("~hydra.foo",), 78, ("error[C107]", "cannot be taken out")),
        (("--output_dir", "a/lr=1"), 2, ("type output_root=a/lr=1\n",)),
        (("--cpu_offload", "experiment=quickstart"), 2, ("type parallel.cpu_offload=true\n",)),
        (("data.columns.prompt=[a,b]",), 78, ("error[C108]: data.columns.prompt ", "its default")),
        (("trainer.greater_is_better=maybe",), 78, ("expected: true, false, or null",)),
        (("experiment=2024-05-01",), 78, ("no preset experiment=2024-05-01", "one of ")),
        (("trainer.global_batch_size=0",), 78, ("error[C103]", "global_batch_size=32 is its default")),
        (("optimizer.eps=a",), 78, ("error[C108]", "optimizer.eps=1e-08 is its default")),
        (("--config", "dir/x.yaml"), 2, ("--config-dir dir experiment=x",)),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: tuple[str, ...], status: int, texts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cs336_alignment.training.run.train", lambda *_: ExitStatus.DONE)
    got, error = error_of(capsys, *GIVEN, *arguments)
    assert got == status, error
    assert error.count("error[") == 1, error
    assert "Traceback" not in error
    for text in texts:
        assert text in error


def test_other_frameworks_words_are_answered_with_what_exists() -> None:
    groups = {path.name for path in (ROOT / "configs").iterdir()}
    for word, meant in ALIASES.items():
        key = meant.partition("=")[0]
        assert key in ALL_KEYS or key in groups, word
    for sentence in SENTENCES.values():
        for key in re.findall(r"\b([a-z]+\.[a-z_]+)=", sentence):
            assert key in ALL_KEYS, sentence
    extra = {"lora.quantize=nf4": ["lora.r=4"], "trainer.metric_for_best_model=eval/loss":
             ["data.eval_path=e", "trainer.eval_steps=100"]}  # fmt: skip
    for override in {meant for meant in ALIASES.values() if "=" in meant}:
        assert composed(*GIVEN, override, *extra.get(override, [])), override
    for word in (
        "hub_tokens",
        "eval_stratgy",
        "num_beams",
        "top_k",
        "ignore_index",
        "system_prompt",
    ):
        assert nearest_key(word) is None, word  # merely alike


@pytest.mark.parametrize("secret", ["hf_" + "a1" * 17, "correct-horse"])
def test_no_secret_is_typed_for_hydra(
    secret: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed stands in `status.json`, as the command that goes on."""
    monkeypatch.setenv("MY_PASSWORD", "correct-horse")
    word = f"+hydra.job.env_set.HF_TOKEN={secret}"
    status, error = error_of(capsys, *GIVEN, word)
    assert status == 78 and "error[C116]: +hydra.job.env_set.HF_TOKEN holds a secret" in error
    assert secret not in error
    status, error = error_of(capsys, *GIVEN, "-m", "seed=1,2", "hydra/launcher=slurm",
                             f"hydra.launcher.setup=['export HF_TOKEN={secret}']")  # fmt: skip
    assert status == 78 and "error[C116]: hydra.launcher.setup holds a secret" in error


def test_several_mistakes_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    _, error = error_of(capsys, *GIVEN, "seed=-1", "trainer.save_total_limit=0")
    assert "error[C103]: seed" in error and "trainer.save_total_limit" in error
    assert "2 errors in all" in error


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    status, error = error_of(capsys, "model.name_or_path=m")
    assert status == 78 and "data.train_path is not given" in error and "quickstart" in error
    assert composed("model.name_or_path=m", "data.eval_path=e", verb="evaluate")[0].run_name


def test_a_users_own_preset(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\nrun_name: mine\ntrainer:\n  max_steps: 3\n"
    )
    (config,) = composed("--config-dir", str(tmp_path), "experiment=mine", "seed=7")
    assert (config.run_name, config.trainer.max_steps, config.seed) == ("mine", 3, 7)
    assert config.model.name_or_path == "builtin:arithmetic"


def test_a_mistake_in_a_users_preset_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ntrainer:\n  max_step: 3\n")
    status, error = error_of(capsys, "--config-dir", str(tmp_path), "experiment=mine", *GIVEN)
    assert status == 78
    assert "experiment/mine" in error and "trainer.max_steps" in error


def test_multirun_names_each_run() -> None:
    configs = composed(*GIVEN, "-m", "optimizer.learning_rate=1e-5,2e-5", "run_name=try", "seed=1")
    assert [c.run_name for c in configs] == ["try-learning_rate-1e-05", "try-learning_rate-2e-05"]
    assert [c.optimizer.learning_rate for c in configs] == [1e-5, 2e-5]


def test_the_command_line_replaces_what_a_preset_sweeps() -> None:
    given = ("experiment=quickstart_dataset_size", "run_name=r")
    (one,) = composed(*given, "data.max_train_examples=9")
    assert (one.run_name, one.data.max_train_examples) == ("r", 9)
    pair = composed(*given, "-m", "data.max_train_examples=9,10", "seed=1,2")
    assert [c.run_name for c in pair] == [
        f"r-max_train_examples-{size}-seed-{seed}" for size in (9, 10) for seed in (1, 2)
    ]


def test_a_multirun_with_a_mistake_does_not_begin_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[int] = []

    def train(config: Config, arguments: object) -> ExitStatus:
        ran.append(config.seed)
        return ExitStatus.DONE

    monkeypatch.setattr("cs336_alignment.training.run.train", train)
    status, error = error_of(capsys, *GIVEN, "-m", "seed=1,-1,-2")
    assert (status, ran) == (78, [])
    assert "-1 (int)" in error and "-2 (int)" in error and "2 errors in all" in error
    assert "Error executing job" not in error
    status, error = error_of(capsys, *GIVEN, "-m", "evaluation.reward=r1_zero,r1_zero")
    assert (status, ran) == (78, []) and "C140" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("trainer.max_step=3", "optimizer.lr=1", "+model.nam=x", "data.lint={}", "seed=1",
          "+sweep.space.lora.r=[4,8]", "experiment=quickstart"),
         ["trainer.max_step", "optimizer.lr", "model.nam"]),
        (("trainer.max_step=3", "max_samples=9"), ["trainer.max_step", "max_samples"]),
        (("++trainer.max_step=3", "++optimizer.lr=1"), ["trainer.max_step", "optimizer.lr"]),
    ],
)  # fmt: skip
def test_all_keys_that_do_not_exist_are_told_at_once(
    words: tuple[str, ...], keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = error_of(capsys, *GIVEN, *words)
    assert status == 78 and f"{len(keys)} errors in all" in error
    for key in keys:
        assert error.count(f"no key {key}\n") == 1, error


HIDDEN = (
    (("experiment=gsm8k_dataset_size", "model=smollm2"),
     ["model.name_or_path=models/SmolLM2-135M-Instruct"]),
    (("experiment=quickstart", "model=smollm2", "data=gsm8k", "data.max_length=64"),
     ["model.name_or_path=models/SmolLM2-135M-Instruct", "model.random_init=false",
      "data.train_path=openai/gsm8k:main:train", "data.eval_path=openai/gsm8k:main:test",
      "data.max_train_examples=null", "data.max_eval_examples=null"]),
    (("experiment=gsm8k_smollm2", "optimizer=adafactor"), ["optimizer.learning_rate=0.001"]),
    (("optimizer=adamw", "experiment=gsm8k_smollm2"), ["optimizer.learning_rate=2e-05"]),
    (("experiment=quickstart", "optimizer=adafactor"),
     ["optimizer.learning_rate=0.001", "optimizer.betas=[0.9,0.999]", "optimizer.weight_decay=0.0",
      "optimizer.warmup_ratio=0.03"]),
    (("-m", "experiment=quickstart", "optimizer=adafactor,muon", "optimizer.weight_decay=0",
      "optimizer.warmup_ratio=0"), ["optimizer.learning_rate=0.001", "optimizer.betas=[0.9,0.999]"]),
)  # fmt: skip


@pytest.mark.parametrize(("arguments", "line"), HIDDEN, ids=lambda part: " ".join(part))
def test_a_preset_hides_no_group_that_was_typed(
    arguments: tuple[str, ...], line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = error_of(capsys, *arguments)
    assert status == 78 and error.count("error[") == 1 and "error[C136]" in error, error
    said = error.split("hint: add ")[1].split(", or leave ")[0]
    assert shlex.split(said) == line
    assert next(word for word in arguments if word.startswith("experiment=")) in error
    assert composed(*arguments, *line)  # the line is enough


def test_groups_that_a_preset_leaves_alone(tmp_path: Path) -> None:
    """A group whose own values stand is as it was; what it merely inherits is the preset's."""
    (config,) = composed(
        "experiment=quickstart", "optimizer=muon", "logger=none", "parallel=single"
    )
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("muon", 3e-3)
    (config,) = composed("experiment=gsm8k_smollm2", "model=smollm2", "data=gsm8k")
    assert config.data.max_train_examples == 256
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /logger: none\noptimizer:\n  eps: 1e-6\n"
    )
    mine = ("--config-dir", str(tmp_path), "experiment=mine", *GIVEN)
    assert composed(*mine, "optimizer=muon", "logger=wandb")[0].logger.backend == "wandb"
    with pytest.raises(UserError, match=r"C136.*optimizer=adamw(.|\n)*optimizer.eps=1e-08"):
        composed(*mine, "optimizer=adamw")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: b: c\n", "broken.yaml:1"),
        (b"trainer:\n\tmax_steps: 3\n", "broken.yaml:2"),
        (b"seed: 1\nseed: 2\n", "broken.yaml:2"),
        (b"# @package _global_\nrun_name: \xe9\n", "utf-8"),
    ],
)
def test_a_preset_that_is_no_yaml_is_one_error(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match="C126") as error:
        composed("--config-dir", str(tmp_path), "experiment=broken", *GIVEN)
    assert told in str(error.value) and error.value.status == 78


def test_presets_of_ones_own_are_named_when_another_is_meant(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nseed: 3\n")
    with pytest.raises(UserError, match=r"C110(.|\n)*did you mean experiment=mine\?"):
        composed("--config-dir", str(tmp_path), "experiment=min", *GIVEN)


def test_hydra_flags_and_no_litter(sft: Sft, tmp_path: Path) -> None:
    shown = sft("train", "experiment=quickstart", "--cfg", "job")
    assert shown.returncode == 0 and "global_batch_size: 32" in shown.stdout
    refused = sft("train", "-c", "job", "experiment=quickstart", "trainer.precision=fp8")
    assert refused.returncode == 78 and "global_batch_size: 32" in refused.stdout
    assert "trainer.precision has a value that it cannot take" in refused.stderr
    assert sft("train", "--cfg", "job").returncode == 0  # it shows what is to be given as ???
    assert sft("train", "--cfg", "job", "trainer.precision=fp8").returncode == 78
    launched = sft("train", "--cfg", "job", "experiment=quickstart_dataset_size",
                   "hydra/launcher=local_jobs")  # fmt: skip
    assert launched.returncode == 0 and not launched.stderr, launched.stderr
    helped = sft("train", "--help")
    assert helped.returncode == 0 and "experiment: " in helped.stdout
    assert "cs336-sft" in helped.stdout
    verbs = sft()
    assert "train" in verbs.stdout and "evaluate" in verbs.stdout
    unknown = sft("trian")
    assert unknown.returncode == 2 and "error[C002]" in unknown.stderr
    assert list(tmp_path.iterdir()) == []
