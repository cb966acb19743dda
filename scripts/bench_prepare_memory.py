"""Peak memory and speed of `cs336-sft prepare` on small and on large data.

    python scripts/bench_prepare_memory.py MODEL [MEGABYTES ...]

Writes question/answer rows of so many megabytes (100 and 500 without numbers) to a temporary
folder and prepares them with MODEL's tokenizer. Memory is the proportional set size of the command
and its processes together, polled every half second; speed is tokens a second and core.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cs336_alignment.cores import count_cores
from cs336_alignment.data.store import NOTE

WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have",
]  # fmt: skip


def write_rows(path: Path, megabytes: int) -> None:
    rng = random.Random(0)
    left = megabytes * 2**20
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            words = rng.choices(WORDS, k=160)
            number = rng.randrange(10**9)
            row = {
                "question": f"{number} {' '.join(words[:60])}?",
                "answer": f"{' '.join(words[60:])} {number}\n#### {number}",
            }
            line = json.dumps(row) + "\n"
            file.write(line)
            left -= len(line)


def tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += tree(int(child))
    except OSError:  # it has ended meanwhile
        pass
    return found


def pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def measure(model: str, megabytes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", megabytes)
        command = [
            sys.executable, "-m", "cs336_alignment.cli", "prepare", f"model.name_or_path={model}",
            f"data.train_path={folder}/rows.jsonl", f"data.cache_dir={folder}/cache",
            "data.lint.duplicate_rows=off",
        ]  # fmt: skip
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                peak = max(peak, sum(pss_kib(pid) for pid in tree(process.pid)))
                time.sleep(0.5)
            assert process.stdout is not None
            said = process.stdout.read()
        assert process.returncode == 0, said
        own = float(said.rpartition("prepared in ")[2].split()[0])
        (note,) = (folder / "cache").glob(f"*/{NOTE}")
        tokens = json.loads(note.read_text())["ledger"]["tokens"]
        return {
            "megabytes": megabytes, "tokens": tokens, "seconds": own,
            "seconds with imports": round(time.perf_counter() - start, 1),
            "tokens a second and core": round(tokens / own / count_cores()),
            "peak MiB": round(peak / 1024),
        }  # fmt: skip


if __name__ == "__main__":
    for size in [int(word) for word in sys.argv[2:]] or [100, 500]:
        print(json.dumps(measure(sys.argv[1], size)), flush=True)
