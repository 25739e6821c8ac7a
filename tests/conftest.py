"""Hypothesis profiles, and real ranks that live as long as the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from farm import Farm
from hypothesis import settings
from torch._subclasses import FakeTensorMode

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("nightly", deadline=None, max_examples=3000)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "dev")

# torch built for CUDA, where there is no GPU, keeps a stand-in that ends with the thread which
# first asked for one. Let that be this thread: those of simulated ranks compile and end.
with FakeTensorMode():
    pass


@pytest.fixture(scope="session")
def ranks2() -> Iterator[Farm]:
    """Two processes: ``ranks2.run(program, mesh, *per_rank)`` is ``simulate`` on real ranks."""
    with Farm(2) as farm:
        yield farm


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Farm]:
    """Four processes."""
    with Farm(4) as farm:
        yield farm
