"""Virtual environments for systems whose requirements exclude each other, made when needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Environment(NamedTuple):
    """The arguments of one ``pip install`` after another; the first also pins torch."""

    installs: tuple[tuple[str, ...], ...]


ENVIRONMENTS: Mapping[str, Environment] = {
    "torchtitan": Environment(
        (
            ("numpy", "psutil", "transformers==5.23.0"),
            ("--no-deps", "torchtitan==0.3.0"),  # which requires a newer torch than there is
            ("spmd_types==0.2.3", "datasets>=3.6,<4.8", "torchdata", "tensorboard", "triton"),
            ("tyro",),
        )
    ),
    "deepspeed": Environment(
        (
            ("numpy", "psutil", "transformers==5.22.2", "py-cpuinfo", "ninja"),
            ("setuptools", "wheel", "packaging"),
            ("--no-build-isolation", "deepspeed==0.19.8"),
        )
    ),
}


def python_of(name: str, directory: Path) -> Path:
    """The interpreter of an environment, made in ``directory`` unless it is complete.

    Raises:
        RuntimeError: pip failed; the message is the end of what it said.
    """
    if not name:
        return Path(sys.executable)
    place = directory / name
    python, complete = place / "bin" / "python", place / "complete"
    wanted = repr((torch.__version__, ENVIRONMENTS[name]))
    if not complete.exists() or complete.read_text() != wanted:
        print(f"installing {name} in {place}", flush=True)
        _checked([sys.executable, "-m", "venv", str(place)])
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        pin = f"torch=={torch.__version__.split('+')[0]}"
        for arguments in ENVIRONMENTS[name].installs:
            _checked([*pip, *arguments, *(() if "--no-deps" in arguments else (pin,))])
        complete.write_text(wanted)
    return python


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command[1:])}: " + " ".join(said))
