"""Launcher for `python`, `accelerate launch` and `torchrun`: the same as `cs336-sft train`."""

import sys

from cs336_alignment.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
