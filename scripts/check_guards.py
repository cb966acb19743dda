"""Take each guard out of a copy of the code and see that a test notices.

    python scripts/check_guards.py [WORD ...]

A guard that can go without a failing test is not guarded itself. With words, only guards whose name
holds one of them. Prints a table; exit status 1 if a guard went unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("cs336_alignment", "configs", "scripts", "tests", "pyproject.toml")
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Guard:
    """A piece of code that keeps a promise.

    Attributes:
        name: what it does.
        file: under the package.
        code: as it stands; once in the file.
        without: what stands in its place when it is gone.
        tests: what must fail then, as arguments of pytest.
    """

    name: str
    file: str
    code: str
    without: str
    tests: str


WRITER = "tests/faults/test_writer.py"
STOPS = "tests/faults/test_stops.py"
LORA = "tests/unit/test_lora.py"
GUARDS = (
    Guard("finite loss and gradient", "training/trainer.py",
          "if sums.not_finite:", "if False:", f"{STOPS} -k finite"),
    Guard("a step under way is given up", "training/trainer.py",
          "            if sums.incomplete:\n                raise StopNow(asked)\n", "",
          f"{STOPS} -k microbatch"),
    Guard("a failed write behind the training stops it", "training/checkpoint_writer.py",
          "        if failure is not None:\n            raise failure\n", "", f"{STOPS} -k behind"),
    Guard("spikes are left out", "training/trainer.py",
          'return policy != "skip"', "return True", f"{STOPS} -k spike"),
    Guard("random numbers follow from the step", "training/step.py",
          "torch.manual_seed(mix_seed(seed, step, index, processes.index))", "pass",
          f"{STOPS} -k microbatch"),
    Guard("normalizer of the whole step", "training/step.py",
          "token_weight=float(dataset.token_weights[ids].sum())",
          "token_weight=float(dataset.token_weights[ids[:1]].sum())",
          "tests/integration/test_cuts.py -k dense_gradient"),
    Guard("noise follows from the example", "data/noise.py",
          "mix_seed(seed, step, i)", "mix_seed(seed, step, len(example_ids))",
          "tests/unit/test_embedding_noise.py -k cut"),
    Guard("the noise's scale follows from the example", "data/noise.py",
          "math.sqrt(lengths[i])", "math.sqrt(max(lengths))",
          "tests/unit/test_embedding_noise.py -k cut"),
    Guard("a smoothed target pulls at every logit", "model/lm_head.py",
          "    if every is not None:\n", "    if False:\n",
          "tests/unit/test_objective.py -k chunked"),
    Guard("the weights come back after their average", "training/averaging.py",
          "weight.copy_(state[weight].pop(OTHER))", "state[weight].pop(OTHER)",
          "tests/unit/test_averaging.py -k no_bit"),
    Guard("a schedule-free optimizer counts in its state", "training/schedule_free.py",
          "totals.copy_(", "(", "tests/unit/test_averaging.py -k librarys"),
    Guard("Muon takes hidden matrices alone", "training/optimizer.py",
          "if p.ndim == 2 and p not in outer]", "if p.ndim == 2]",
          "tests/unit/test_optimizer.py -k hidden_matrices_alone"),
    Guard("layer-wise rates reach the groups", "training/optimizer.py",
          "learning_rate * group.get(FACTOR, 1.0)", "learning_rate",
          "tests/unit/test_optimizer.py -k slower"),
    Guard("gradients reduced once", "training/step.py",
          "loss.backward()", "loss.backward(retain_graph=True); loss.backward()",
          "tests/integration/test_cuts.py -k dense_gradient"),
    Guard("adapter of another base model", "model/base_model.py",
          "if not same:", "if False:", f"{LORA} -k goes_on"),
    Guard("adapter of another shape or name", "model/adapter_files.py",
          "        if names:\n            raise", "        if False:\n            raise",
          f"{LORA} -k goes_on"),
    Guard("adapter's tied weights saved by each name", "model/adapters.py",
          "named_parameters(remove_duplicate=False)", "named_parameters()", f"{LORA} -k read_an"),
    Guard("adapter's dropout is not shared", "training/batching_choice.py",
          "of_adapters = adapter_dropout(policy.model)", "of_adapters = 0", f"{LORA} -k dropout"),
    Guard("adapter of the base model's own weights merged", "model/lora.py",
          "layer.merge(safe_merge=True)", "pass", f"{LORA} -k merged_gives"),
    Guard("adapter's frozen layers widened outside autocast", "model/narrow.py",
          "self.weight.to(input.dtype)", "self.weight", f"{LORA} -k compute_the_same"),
    Guard("sha256 of every file", "training/checkpoint_folders.py",
          'if sha256_of(path) != entry.get("sha256"):', "if False:", f"{WRITER} -k flipped"),
    Guard("entries stay inside the checkpoint", "training/checkpoint_folders.py",
          'or ".." in Path(name).parts', "", "tests/unit/test_checkpoint.py -k wrong_entry"),
    Guard("files flushed before the manifest", "files.py",
          "            with path.open(\"rb\") as file:\n                os.fsync(file.fileno())\n",
          "            pass\n", f"{WRITER} -k old_checkpoint"),
    Guard("the rename flushed before the oldest goes", "training/checkpoint.py",
          "        flush_folder(checkpoints)\n", "",
          "tests/unit/test_checkpoint.py -k before_the_name"),
    Guard("processes that tokenize end with their parent", "data/encode_processes.py",
          "    if not end_with(parent):\n        os._exit(0)\n", "",
          "tests/faults/test_kills.py -k tokenize"),
    Guard("a child does not hold the lock", "training/run_folder.py",
          "        os.register_at_fork(after_in_child=self._lock.close)\n", "",
          "tests/unit/test_run_folder.py -k outlives"),
    Guard("damaged checkpoints do not count", "training/checkpoint_folders.py",
          "and (folder not in damaged or _step_of(folder) == latest)", "",
          "tests/unit/test_checkpoint.py -k does_not_count"),
    Guard("the export is looked at again", "training/run_folder.py",
          "if sha256_of(export / name) != digest:", "if False:",
          "tests/unit/test_run_folder.py -k damaged_export"),
    Guard("the export flushed before the old one goes", "files.py",
          "flush_folder(folder.parent)  # the new", "pass  # the new", f"{WRITER} -k half_of_one"),
    Guard("small files flushed before they take their place", "files.py",
          "os.fsync(file.fileno())\n        temporary.replace", "pass\n        temporary.replace",
          f"{WRITER} -k status_file"),
    Guard("room is looked for before writing", "training/checkpoint.py",
          "if free_mib(checkpoints) * 2**20 < needed:", "if False:", f"{STOPS} -k behind"),
    Guard("a later damaged one does not count in rotation", "training/checkpoint_folders.py",
          "if _step_of(folder) <= latest and (", "if (",
          "tests/unit/test_checkpoint.py -k push_out"),
    Guard("leftovers are removed", "training/checkpoint_folders.py",
          'checkpoints.glob(f"{TEMPORARY}*")', "()", f"{WRITER} -k old_checkpoint"),
    Guard("what a rehearsal writes is read back", "training/checkpoint_writer.py",
          "if (reason := verify(written)) is not None:", "if (reason := None) is not None:",
          "tests/unit/test_rehearsal.py -k lies"),
    Guard("metrics end where the checkpoint does", "training/run.py",
          "metrics.truncate_after(", "int(", "tests/faults/test_kills.py -k at_a_step"),
    Guard("one run in a folder", "training/run_folder.py",
          "fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "tests/unit/test_run_folder.py -k second_process"),
    Guard("changed options are refused", "training/earlier_config.py",
          '"trainer.async_save",\n', '"trainer.async_save", "seed",\n',
          "tests/unit/test_run_folder.py -k each_key"),
    Guard("no start from zero beside damaged checkpoints", "training/run_folder.py",
          "if checkpoint is None and not skipped and not saved_step and not exported:",
          "if checkpoint is None:",
          "tests/unit/test_run_folder.py -k from_zero"),
    Guard("the best checkpoint outlives the rotation", "training/checkpoint_folders.py",
          " if _step_of(f) != best]", "]", "tests/unit/test_best.py -k rotation"),
    Guard("the best step of the parts before is kept", "training/held_out.py",
          "return self._told(self._verdict(step), step)\n        if not due",
          "return Verdict()\n        if not due",
          "tests/integration/test_best_run.py -k stopped"),
    Guard("a better step is saved", "training/trainer.py",
          "if best.step == step and not verdict.saved and self._writing != step:", "if False:",
          "tests/faults/test_best_kills.py"),
    Guard("what is not a number never wins", "training/best.py",
          "if value is not None and math.isfinite(value)", "if value is not None",
          "tests/unit/test_best.py -k infinities"),
    Guard("a damaged best checkpoint is not exported", "training/finish.py",
          "(reason := verify(folder)) is not None:", "(reason := None) is not None:",
          "tests/integration/test_best_run.py -k damaged"),
    Guard("the export's weights are compared", "training/reload_check.py",
          "sums[name][:2] != other[name][:2]", "False",
          "tests/unit/test_reload_check.py -k unseen"),
    Guard("the process that loads the export ends with the run", "training/reload_child.py",
          "    threading.Thread(target=_end_with_the_run, daemon=True).start()\n", "",
          "tests/unit/test_reload_check.py -k ends_with_the_run"),
    Guard("secrets are refused", "config_check.py",
          "if errors := list(_secrets(values, os.environ)):", "if errors := []:",
          "tests/faults/test_surroundings.py -k secrets"),
    Guard("the watchdog is armed", "training/watchdog.py",
          "faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)", "pass",
          "tests/faults/test_surroundings.py -k hangs"),
    Guard("no process outlives its launcher", "orphans.py",
          "ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)", "pass",
          "tests/faults/test_kills.py -k outlives"),
    Guard("reducers go before the process group", "training/parallel.py",
          "wrapped.reducer = wrapped.logger = None  # type: ignore[assignment]", "pass",
          "tests/distributed -k leaving"),
)  # fmt: skip


def is_noticed(guard: Guard) -> bool:
    """Whether the tests of a guard fail without it; they must pass with it, which CI sees."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, copy / name)
        path = copy / "cs336_alignment" / guard.file
        text = path.read_text(encoding="utf-8")
        if text.count(guard.code) != 1:
            raise SystemExit(
                f"{guard.name}: its code stands {text.count(guard.code)} times in {path.name}"
            )
        path.write_text(text.replace(guard.code, guard.without), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", *_words(guard.tests)]
        try:
            done = subprocess.run(
                command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_SECONDS,
                env={**os.environ, "PYTHONPATH": str(copy)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 1):  # 5: no such test, 2: does not even import
            raise SystemExit(f"{guard.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


def _words(tests: str) -> list[str]:
    return [*tests.split(), "-m", "not long"]


def main(words: list[str]) -> int:
    """Check the guards, print the table."""
    chosen = [g for g in GUARDS if not words or any(word in g.name for word in words)]
    table = Table("guard taken out", "in", "tests", "noticed", "s", title="guards")
    missed = 0
    for guard in track(chosen, "guards", console=Console(stderr=True)):
        start = time.monotonic()
        noticed = is_noticed(guard)
        missed += not noticed
        row = (guard.name, guard.file, guard.tests, "yes" if noticed else "NO")
        table.add_row(*row, f"{time.monotonic() - start:.0f}")
    Console(width=140).print(table, f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
