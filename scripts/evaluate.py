"""Launcher for `python`, `accelerate launch` and `torchrun`: the same as `cs336-sft evaluate`."""

import sys

from cs336_alignment.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
