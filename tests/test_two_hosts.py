"""Two hosts train, one is lost, the other says so and goes on alone from the last checkpoint."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from farm import free_port
from long_training import EVERY, PATIENCE, train
from namespaces import Namespaces

from functional_ep.checkpoint import committed
from sharding import Mesh, simulate
from sharding.distributed.watch import ANSWER, MARGIN

PROGRAM = str(Path(__file__).with_name("long_training.py"))
AT_MOST = 100.0  # seconds for everything; a machine with nothing else to do needs a quarter


@pytest.fixture
def hosts() -> Iterator[Namespaces]:
    namespaces = Namespaces()
    try:
        namespaces.__enter__()
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield namespaces
    finally:
        namespaces.__exit__()


def losses(directory: Path) -> dict[int, float]:
    """By step, as rank 0 wrote them last."""
    lines = directory / "losses"
    pairs = (line.split() for line in lines.read_text().splitlines()) if lines.exists() else ()
    return {int(number): float(loss) for number, loss in pairs}


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], deadline: float) -> None:
    while not condition():
        assert process.poll() is None, "torchrun has ended"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_host_is_lost_and_the_other_goes_on_alone(hosts: Namespaces, tmp_path: Path) -> None:
    deadline = time.monotonic() + AT_MOST
    port, logs = free_port(), [tmp_path / f"host {i}" for i in range(3)]
    meet = ("--master-addr", hosts.addresses[0], "--master-port", str(port), "--nnodes", "2")
    program = (PROGRAM, str(tmp_path), "100000")
    both = [
        hosts.torchrun(i, logs[i], *meet, "--node-rank", str(i), "--nproc-per-node", "2", *program)
        for i in range(2)
    ]
    saved = tmp_path / "saved"
    until(lambda: saved.is_dir() and len(committed(saved)) > 1, both[0], deadline)
    hosts.kill(1)
    killed = time.monotonic()
    both[0].wait(deadline - killed)
    assert time.monotonic() - killed < PATIENCE + ANSWER + MARGIN
    check_table(logs[0].read_text())

    (*_, last) = committed(saved)
    resumed = int(last.name.split("-")[1])
    seen = losses(tmp_path)
    assert EVERY <= resumed <= max(seen) + 1 <= resumed + 2 * EVERY
    steps = max(seen) + 1 + EVERY
    alone = hosts.torchrun(
        0, logs[2], "--standalone", "--nproc-per-node", "2", PROGRAM, str(tmp_path), str(steps)
    )
    assert alone.wait(deadline - time.monotonic()) == 0, logs[2].read_text()
    expected = simulate(train, Mesh(edp=1, ep=1), [steps])[0]
    assert min(abs(x / y - 1) for x, y in pairwise(expected)) > 1e-6, "no two steps are alike"
    again = losses(tmp_path)
    assert list(again) == list(range(steps)) and again != seen
    for found in (seen, again):
        for number, loss in found.items():
            assert loss == pytest.approx(expected[number], rel=1e-9), f"step {number}"


def check_table(log: str) -> None:
    """A rank of the host that is left says where all of them stood, by which links it reached."""
    near = r"rank 0 reaches \{1: 'SharedLink', 2: 'GlooLink', 3: 'GlooLink'\}"
    assert re.search(near, log), log
    assert "sharding.comm.Divergence: rank " in log, log
    for rank in (0, 1):
        stands = rf"  rank {rank} \{{'edp': 0, 'ep': {rank}\}}: in step \d+, \w+ for \d+\.\d s "
        assert re.search(stands + r"(in|since) its collective no\. \d+ \(no\. \d+ of the", log), log
    for rank in (2, 3):
        gone = rf"  rank {rank} \{{'edp': 1, 'ep': {rank - 2}\}}: (has gone|no answer)"
        assert re.search(gone, log), log
