"""Labels: transformers' models shift theirs by one position, the losses here take them shifted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a position without a target, as in torch's cross_entropy


def next_tokens(labels: Tensor) -> Tensor:
    """``labels[b, s + 1]`` at position s: transformers' labels as a ``loss`` here takes them.

    transformers shifts inside of the model, so its labels are the input ids.

    >>> import torch
    >>> next_tokens(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)
