"""Train a byte-level MoE language model on the standard library's own source files.

    torchrun --nproc-per-node 2 examples/train.py           two processes, ep=2
    python examples/train.py                                one process, one rank
    python examples/train.py --simulate 4 --mesh edp=2,ep=2 four ranks in one process

The loss curve is the same, up to rounding, for all three. The arguments are those of
``functional-ep train``: ``--data PATH...``, ``--set steps=200``, ``--help``.
"""

import sys

from functional_ep.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
