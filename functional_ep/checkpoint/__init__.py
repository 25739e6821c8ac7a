"""Checkpoints: states on disk that verify themselves and belong to no mesh."""

from functional_ep.checkpoint.check import Contents, attached, describe, verify
from functional_ep.checkpoint.checkpoints import Checkpoints
from functional_ep.checkpoint.folder import committed
from functional_ep.checkpoint.restoring import restore, restore_params
from functional_ep.checkpoint.saving import save

__all__ = [
    "Checkpoints",
    "Contents",
    "attached",
    "committed",
    "describe",
    "restore",
    "restore_params",
    "save",
    "verify",
]
