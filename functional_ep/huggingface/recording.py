"""What transformers records on the way (router logits, attentions), for parts computed twice.

Its hooks append to a list. From inside of a part that is computed again in the backward pass that
would be a tensor without a gradient; so the part returns what it would append, and it is appended
outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils.output_capturing import _active_collector as active


class Record:
    """The lists that are being filled on this thread, if any."""

    def __init__(self) -> None:
        self.lists: dict[str, Any] = active.get() or {}

    def returned(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """``f`` and what its hooks record, as a result."""

        def compute(*args: Any) -> Any:
            inner: dict[str, list[Any]] = {key: [] for key in self.lists}
            token = active.set(inner)
            try:
                return f(*args), inner
            finally:
                active.reset(token)

        return compute

    def add(self, result: tuple[Any, dict[str, list[Any]]]) -> Any:
        """The result of ``f`` alone; what was recorded is where it belongs."""
        y, inner = result
        for key, values in inner.items():
            self.lists[key].extend(values)
        return y
