"""Every example runs as its reader would run it, with warnings as errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# The first takes minutes by design: test_cli.py runs its command on a small recipe. The other needs
# weights: test_pretrained.py gives it some.
LAUNCHED = {"train.py", "finetune.py"}
# As in pyproject.toml: torch.func.jvp scripts torch's own decompositions.
WARNINGS = ["-W", "error", "-W", "ignore:`torch.jit.script` is:DeprecationWarning"]
SECONDS = {"quickstart.py": 20}  # the first thing a reader tries; the others have a minute

ALONE = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in LAUNCHED)


@pytest.mark.parametrize("name", ALONE)
def test_it_runs_and_says_something(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, *WARNINGS, EXAMPLES / name],
        cwd=tmp_path,  # an example depends on nothing that lies beside it
        capture_output=True,
        text=True,
        timeout=SECONDS.get(name, 60),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_no_example_is_forgotten() -> None:
    assert {"quickstart.py", "own_rule.py"} <= set(ALONE)
    assert LAUNCHED | set(SECONDS) <= {path.name for path in EXAMPLES.glob("*.py")}
