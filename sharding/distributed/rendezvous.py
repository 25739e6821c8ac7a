"""Rendezvous: the store through which ranks meet, without what an earlier start left in it."""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

POLL = 0.01  # seconds


def fresh_store(timeout: float) -> tuple[dist.Store, int, int]:
    """A store of this start of the ranks alone, this rank, and how many there are.

    torchrun starts failed ranks again with the store of those that failed, where their addresses
    still stand: whoever reads before the new ranks have written tries to reach the dead. So rank 0
    makes up a prefix at every start. It tells it to each token that it finds, and no rank uses a
    token twice, so what is left of earlier starts is answered but never heard.

    Raises:
        TimeoutError: ranks that have not come within ``timeout`` seconds.
    """
    store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    token = uuid4().hex
    prefix = _join(store, rank, token) if rank else _lead(store, ranks, token, timeout)
    return dist.PrefixStore(prefix, store), rank, ranks


def _join(store: dist.Store, rank: int, token: str) -> str:
    store.set(f"hello/{rank}", token)
    prefix = store.get(f"welcome/{token}").decode()
    store.set(f"{prefix}/here/{rank}", "")
    return prefix


def _lead(store: dist.Store, ranks: int, prefix: str, timeout: float) -> str:
    missing, welcomed = set(range(1, ranks)), set[bytes]()
    until = time.monotonic() + timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"{prefix}/here/{rank}"]):
                missing.remove(rank)
            elif store.check([f"hello/{rank}"]):
                token = store.get(f"hello/{rank}")
                if token not in welcomed:
                    store.set(f"welcome/{token.decode()}", prefix)
                    welcomed.add(token)
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(missing)} have not started within {timeout:g} s")
        time.sleep(POLL)
    return prefix
