"""Vocabularies: bytes to tokens and back, one to one or by a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import bytes_of


class Vocabulary(NamedTuple):
    """``decode(encode(text)) = text``, up to what a tokenizer cannot tell apart."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Sequence[int]], bytes]


def bytewise() -> Vocabulary:
    """Every byte is a token.

    >>> bytewise().decode([104, 105])
    b'hi'
    """
    return Vocabulary(lambda text: text, bytes)


def of_directory(directory: Path) -> Vocabulary:
    """The tokenizer that lies beside weights in hub layout, without its special tokens.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        raise ValueError(
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model): copy it there from "
            "where the weights come from"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def encode(text: Tensor) -> Tensor:
        decoded = str(bytes_of(text), "utf-8", errors="replace")
        return torch.tensor(tokenizer(decoded, add_special_tokens=False)["input_ids"])

    return Vocabulary(encode, lambda tokens: tokenizer.decode(tokens).encode())
