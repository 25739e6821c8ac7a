"""The console command ``functional-ep``: arguments in, one call of a function out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM

from . import config
from .commands import checking, resharding, training
from .config import Recipe
from .program import CannotStart
from .stopping import Stopped


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console command; a wrong argument ends the process with one line that says why.

    A training that a signal has stopped ends it with 128 + the signal's number, as shells do.
    """
    options = parser().parse_args(arguments)
    try:
        act = options.prepare(options)
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        raise SystemExit(f"functional-ep {options.command}: {error}") from error
    try:
        act()
    except (OSError, FloatingPointError, CannotStart) as error:  # a full disk, say
        raise SystemExit(f"functional-ep {options.command}: {error}") from error
    except Stopped as stopped:
        print(f"functional-ep {options.command}: {stopped}", flush=True)
        raise SystemExit(128 + (stopped.signal or SIGTERM)) from stopped


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    command = argparse.ArgumentParser(
        prog="functional-ep", description="Mixture-of-Experts training as pure functions."
    )
    subcommands = command.add_subparsers(dest="command", required=True)
    _add_training(
        subcommands.add_parser(
            "train",
            help="train a language model, or go on training it",
            description="Train a byte-level MoE language model, or a Hugging Face one: in this\n"
            "process alone, on simulated ranks (--simulate N), or on real ones\n"
            "(torchrun --nproc-per-node N -m functional_ep train). States are saved on the way\n"
            "and when SIGTERM or SIGINT stops the run; the same command goes on from there, with\n"
            "as many ranks as there are then.",
            epilog="the recipe that --config and --set change:\n\n" + config.dumps(Recipe()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    check = subcommands.add_parser(
        "check", help="verify every byte of a checkpoint, and say what is in it"
    )
    check.set_defaults(prepare=checking)
    check.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a directory of "
        "several")  # fmt: skip
    moving = subcommands.add_parser(
        "reshard",
        help="the same state in another number of files, every byte verified on the way",
        description="The same state in another number of files, every byte verified on the way. "
        "Nothing needs it to go on with other ranks: any mesh restores any checkpoint.",
    )
    moving.set_defaults(prepare=resharding)
    moving.add_argument("path", type=Path, metavar="FROM", help="a checkpoint")
    moving.add_argument("to", type=Path, metavar="TO", help="a new directory")
    moving.add_argument("--ranks", type=int, default=1, metavar="N", help="files, 1 by default")
    return command


def _add_training(training_parser: argparse.ArgumentParser) -> None:
    training_parser.set_defaults(prepare=training)
    add = training_parser.add_argument
    add("--data", nargs="+", metavar="PATH", help="files and directories to learn from, instead of "
        "Python's standard library")  # fmt: skip
    add("--model", type=Path, metavar="DIR", help="weights of any transformers MoE model, to train "
        "instead of a new one; what they become is written to OUT/weights")  # fmt: skip
    add("--mesh", metavar="edp=1,ep=2", help="its axes, which may change when a run goes on; by "
        "default as much ep as the experts allow")  # fmt: skip
    add("--simulate", type=int, metavar="N", help="N ranks in this one process")
    add("--config", metavar="FILE.toml", help="a recipe")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one value of the recipe, "
        "as in model.layers=2; repeatable")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="for metrics, plot and states; by default under "
        "runs/")  # fmt: skip
    add("--save-every", type=int, default=100, metavar="N", help="steps from one saved state to "
        "the next, 100 by default; 0 saves none")  # fmt: skip
    add("--keep", type=int, default=2, metavar="N", help="how many of them stay, 2 by default")
    add("--restart", action="store_true", help="forget the saved states, and begin anew")
    add("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
