"""`cs336-sft export`: another precision, shards, GGUF, the trained rows, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cs336_alignment import cli
from cs336_alignment.data.templates import load_template
from cs336_alignment.sharing import gguf, model_export
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.reload_check import ReloadResult
from tests.conftest import TINY, Zygote, build_dataset, build_model, clean_environment

STEPS = 12
LM_EVAL = shutil.which("lm_eval", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A run of one and a bit epochs of 30 rows, with its best step before the last."""
    home = tmp_path_factory.mktemp("trained")
    with (home / "rows.jsonl").open("w") as file:
        for a in range(40):
            row = {"question": f"{a} + {a % 7} = ?", "answer": f"Add.\n#### {a + a % 7}"}
            file.write(json.dumps(row) + "\n")
    done = zygote.run(
        ["train", *TINY, "data.train_path=rows.jsonl", "run_name=r", "data.eval_fraction=0.25",
         f"trainer.max_steps={STEPS}", "trainer.eval_steps=4", "trainer.save_steps=4",
         "trainer.metric_for_best_model=eval/loss", "trainer.greater_is_better=true",
         "trainer.save_total_limit=5", "optimizer.learning_rate=1e-2",
         "evaluation.max_new_tokens=9"],
        home, tmp_path_factory.mktemp("printed"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder, to be worked in."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process: another test has one."""
    monkeypatch.setattr(model_export, "check_export", lambda *_, **__: ReloadResult("passed"))


def export(*words: str) -> int:
    return int(cli.run(["export", *words]))


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_an_export_is_checked_sharded_and_asked_as_it_was_trained(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("r", "export.dtype=bf16", "export.max_shard_size=300KB")
    assert export(*words) == 0
    printed = capsys.readouterr().out
    folder = home / "outputs/r/exports/step-000004-bf16"
    assert "reload check passed" in printed and "rounded to bf16: log-probs of text move" in printed
    assert f"--model_args pretrained={folder.relative_to(home)} --tasks TASK" in printed
    assert "--tasks TASK --apply_chat_template --num_fewshot 0" in printed
    assert len(list(folder.glob("model-0000*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    want = load_file(home / "outputs/r/model/model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in want:
            assert torch.equal(tensor, want[name].to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_template("r1_zero")
    assert template is not None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 2 = ?"}], tokenize=False)
    assert text == template.fill("1 + 2 = ?")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((folder / "export.json").read_text())["reload_check"] == "passed"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert export(*words) == 0 and "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert export("r", f"export.output_dir={folder}") == 73
    assert "error[R360]" in capsys.readouterr().err
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_rounded_weights_compute_what_a_reader_of_the_file_computes(tmp_path: Path) -> None:
    model, probes = build_model("qwen2", torch.float32), build_dataset()
    model_export._round(model, probes, "bf16", Console())
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(96)[None]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_the_card_is_valid_and_its_code_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of the run's own model."""
    path = home / "outputs/r/model/README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.get("base_model") is None
    text = path.read_text()
    for part in ("| eval/loss |", "(loss.png)", "| rows.jsonl | 40 | 40 |", "optimizer.learning_rate: 0.01",
                 "{question}", "torch ", "| steps | 4 (the best eval/loss: "):  # fmt: skip
        assert part in text, part
    assert 'name = "model"  # this folder' in text and "outputs" not in code_of(text)
    assert str(home) not in text and (path.parent / "loss.png").read_bytes()[:4] == b"\x89PNG"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        monkeypatch.chdir(path.parents[1])
        exec(compile(code_of(text), str(path), "exec"), {})
    assert said.getvalue().strip()


def test_a_failed_check_leaves_nothing_and_ends_with_70(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(folder: Path, *args: Any, **options: Any) -> Any:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].zero_()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return look(folder, *args, **options)

    look = model_export.check_export
    monkeypatch.setattr(model_export, "check_export", damaged)
    assert export("r") == 70
    error = capsys.readouterr().err
    assert "error[R305]" in error and "model.norm.weight" in error
    assert list((home / "outputs/r/exports").iterdir()) == []


@pytest.mark.usefixtures("unchecked")
def test_which_weights_are_meant(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "outputs/r"
    for words, step in (
        (("r",), 4), ((str(run / "model"),), 4), (("r", "export.checkpoint=best"), 4),
        (("r", "export.checkpoint=latest"), STEPS), (("outputs/r", "export.checkpoint=8"), 8),
        ((str(run / "checkpoints/step-000008"),), 8),
    ):  # fmt: skip
        shutil.rmtree(run / "exports", ignore_errors=True)
        assert export(*words) == 0, capsys.readouterr().err
        (folder,) = (run / "exports").iterdir()
        assert folder.name == f"step-{step:06d}-fp32"
        want = load_file(run / f"checkpoints/step-{step:06d}/model.safetensors")
        got = load_file(folder / "model.safetensors")
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert f"| steps | {step}" in (folder / "README.md").read_text()
    (folder / "model.safetensors").write_bytes(b"x")
    assert export("r", "export.checkpoint=8") == 0
    assert "is damaged" in capsys.readouterr().err
    assert load_file(folder / "model.safetensors").keys() == want.keys()
    (run / "checkpoints/step-000008/model.safetensors").write_bytes(b"x")
    (run / "model/model.safetensors").write_bytes(b"x")
    for words, status, code in (
        (("r", "export.checkpoint=8"), 74, "R203"), (("r",), 74, "R203"),
        (("r", "export.checkpoint=9"), 66, "R202"), (("nowhere",), 66, "R332"), ((), 2, "C152"),
        (("r", "trainer.max_steps=3"), 78, "C173"), (("r", "export.dtype=int8"), 78, "C103"),
        (("r", "export.gguf_type=Q4_0"), 78, "C104"), (("r", "hub.hub_model_id=a/b"), 78, "C104"),
        (("r", "export.format=jsonl", "export.dtype=bf16"), 78, "C104"),
    ):  # fmt: skip
        assert export(*words) == status, words
        error = capsys.readouterr().err
        assert f"error[{code}]" in error and "hint: " in error, error
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints/step-000004")
    assert export("r", "export.checkpoint=best") == 66
    (run.parent / "never").mkdir()
    (run.parent / "never/status.json").write_text('{"error": "error[D101]: no file\\n  hint: x"}')
    capsys.readouterr()
    assert export("never") == 66
    error = capsys.readouterr().err
    assert "ended before it began" in error and "got: error[D101]: no file\n" in error


@pytest.mark.usefixtures("unchecked")
def test_gguf_is_made_by_the_converter_that_is_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two programs stand in for llama.cpp's: they check what they are given."""
    tools = home / "tools"
    tools.mkdir()
    (tools / "convert_hf_to_gguf.py").write_text(
        "import json, pathlib, sys\n"
        "folder, one, out, two, kind = sys.argv[1:]\n"
        "assert (one, two) == ('--outfile', '--outtype') and kind in ('f32', 'f16', 'bf16')\n"
        "config = json.loads(pathlib.Path(folder, 'config.json').read_text())\n"
        "if config['dtype'] != {'f32': 'float32', 'bf16': 'bfloat16'}[kind]: sys.exit('the wrong dtype')\n"
        "assert pathlib.Path(folder, 'tokenizer.json').is_file()\n"
        "pathlib.Path(out).write_bytes(b'GGUF' + pathlib.Path(folder, 'model.safetensors').read_bytes())\n"
    )
    (tools / "llama-quantize").write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nwhole, out, kind = sys.argv[1:]\n"
        "assert kind == 'Q4_K_M' and pathlib.Path(whole).read_bytes()[:4] == b'GGUF'\n"
        "pathlib.Path(out).write_bytes(b'GGUF' + kind.encode())\n"
    )
    for path in tools.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    words = ("r", "export.format=gguf", "export.dtype=bf16")
    monkeypatch.setenv("PATH", str(home))
    assert export(*words) == 66
    error = capsys.readouterr().err
    assert "error[R361]" in error and "llama.cpp" in error and "export.gguf_converter=" in error
    given = f"export.gguf_converter={tools / 'convert_hf_to_gguf.py'}"
    assert export(*words, given, "export.gguf_type=Q4_K_M") == 66
    assert "llama-quantize is not there" in capsys.readouterr().err
    assert export(*words, given) == 0, capsys.readouterr().err
    folder = home / "outputs/r/exports/step-000004-bf16-gguf"
    names = {"r-bf16.gguf", "README.md", "loss.png", "export.json"}
    assert {path.name for path in folder.iterdir()} == names
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "gguf" and "llama-cli -m r-bf16.gguf" in card.text
    monkeypatch.setenv("PATH", str(tools))
    assert export(*words, "export.gguf_type=Q4_K_M") == 0, capsys.readouterr().err
    quantized = folder.with_name("step-000004-Q4_K_M-gguf")
    assert (quantized / "r-Q4_K_M.gguf").read_bytes() == b"GGUFQ4_K_M"
    assert {path.suffix for path in quantized.iterdir()} == {".gguf", ".md", ".png", ".json"}
    monkeypatch.setattr(gguf, "NOTE_SECONDS", 0.2)
    slow = tools / "slow.py"  # asks, and waits for no answer
    slow.write_text(
        "import sys, time\ntime.sleep(0.5)\nsys.exit(sys.stdin.read() or 'nobody there')\n"
    )
    assert export("r", "export.format=gguf", f"export.gguf_converter={slow}") == 70
    printed = capsys.readouterr()
    assert "nobody there" in printed.err and "convert  still at work" in printed.out
    assert export("r", "export.format=gguf", "export.dtype=fp16") == 70
    error = capsys.readouterr().err
    assert "error[R362]" in error and "KeyError: 'f16'" in error
    assert not folder.with_name("step-000004-fp16-gguf").exists()


@pytest.mark.parametrize("kind", [pytest.param("jsonl", marks=pytest.mark.slow), "parquet"])
def test_the_trained_rows_are_those_of_the_ledger(
    kind: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("r", f"export.format={kind}") == 0, capsys.readouterr().err
    folder = home / f"outputs/r/exports/rows-{kind}"
    rows = datasets.load_dataset(str(folder), cache_dir=str(home / "cache"))
    ledger = json.loads((home / "outputs/r/data_ledger.json").read_text())
    for split in ("train", "eval"):
        assert len(rows[split]) == ledger[split]["examples"]
    every = [row for split in rows.values() for row in split]
    assert sum(len(row["input_ids"]) for row in every) == ledger["train"]["tokens"]
    assert sum(sum(row["response_mask"]) for row in every) == ledger["train"]["response_tokens"]
    assert sorted(row["place"] for row in every) == sorted(f"rows.jsonl:{n}" for n in range(1, 41))
    assert (
        sum(row["times_trained"] for row in rows["train"]) == 4 * 7 + 2 + 4 * 4
    )  # an epoch, a part
    tokenizer = AutoTokenizer.from_pretrained(home / "outputs/r/model")
    source = (home / "rows.jsonl").read_text().splitlines()
    for row in every:
        question = json.loads(source[int(row["place"].partition(":")[2]) - 1])["question"]
        assert question in row["text"] and row["text"] == tokenizer.decode(row["input_ids"])
        assert row["weight"] == 1 and row["token_weights"] is None
    assert export("r", f"export.format={kind}") == 0 and "nothing to do" in capsys.readouterr().out
    # What was written is trained on again as it was.
    again = ["train", *TINY, f"data.train_path={folder / f'train.{kind}'}", "data.format=tokens",
             "run_name=again", "trainer.max_steps=1", "data.shuffle=false"]  # fmt: skip
    assert cli.run(again) == 0, capsys.readouterr().err
    hashes = [
        json.loads((home / f"outputs/{name}/manifest.json").read_text())["data_sha256"]
        for name in ("r", "again")
    ]
    assert hashes[0] != hashes[1]  # the selection of the split is in the first
    mine = json.loads((home / "outputs/again/data_ledger.json").read_text())["train"]
    assert (mine["examples"], mine["tokens"]) == (
        len(rows["train"]), sum(len(row["input_ids"]) for row in rows["train"]),
    )  # fmt: skip


def test_other_data_than_the_trained_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (home / "rows.jsonl").open("a") as file:
        file.write('{"question": "1 + 1 = ?", "answer": "Add.\\n#### 2"}\n')
    assert export("r", "export.format=jsonl") == 65
    assert "error[R382]" in capsys.readouterr().err
    assert list((home / "outputs/r/exports").iterdir()) == []


def test_rows_of_a_run_with_new_tokens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is that of training: with the tokens that the run added."""
    words = ["train", *TINY, "data.train_path=rows.jsonl", "run_name=n", "trainer.max_steps=1",
             "model.new_tokens=[Add]"]  # fmt: skip
    assert cli.run(words) == 0, capsys.readouterr().err
    assert export("n", "export.format=jsonl") == 0, capsys.readouterr().err
    rows = (home / "outputs/n/exports/rows-jsonl/train.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(home / "outputs/n/model")
    added = tokenizer.convert_tokens_to_ids("Add")
    assert len(rows) == 40 and all(added in json.loads(row)["input_ids"] for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="lm-eval is not installed: pip install lm-eval")
def test_the_line_for_lm_eval_asks_the_model_as_it_was_trained(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("r") == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("lm-eval")]
    tasks = home / "tasks"
    tasks.mkdir()
    questions = [f"{a} + 2 = ?" for a in range(5)]
    rows = [{"question": q, "answer": str(a + 2)} for a, q in enumerate(questions)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "local.yaml").write_text(
        "task: local_sums\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['</answer>'], do_sample: false, max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    words = shlex.split(line.partition(" ")[2].replace("TASK", "local_sums"))
    more = ["--include_path", str(tasks), "--output_path", str(home / "out"), "--log_samples"]
    done = subprocess.run(
        [str(LM_EVAL), *words[1:], *more], cwd=home, env=clean_environment(), text=True,
        capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_sums" in done.stdout and "exact_match" in done.stdout
    (file,) = (home / "out").rglob("samples_*.jsonl")
    said = [json.loads(text)["resps"][0][0] for text in file.read_text().splitlines()]
    folder = home / "outputs/r/exports/step-000004-fp32"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_template("r1_zero")
    assert template is not None
    for question, response in zip(questions, said, strict=True):
        ids = tokenizer(template.fill(question), return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert response == tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.slow
def test_a_kill_costs_nothing_but_the_time(home: Path, tmp_path: Path, zygote: Zygote) -> None:
    process_id = zygote.start(["export", "r"], home, tmp_path)
    until = time.monotonic() + 60
    printed = tmp_path / "stdout"
    while not printed.is_file() or "in a fresh process" not in printed.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process_id, signal.SIGKILL)
    assert zygote.wait(process_id) == -signal.SIGKILL
    exports = home / "outputs/r/exports"
    assert [path.name for path in exports.iterdir()] == [".step-000004-fp32.new"]
    done = zygote.run(["export", "r"], home, tmp_path)
    assert done.returncode == 0 and "reload check passed" in done.stdout, done.stderr
    assert [path.name for path in exports.iterdir()] == ["step-000004-fp32"]
