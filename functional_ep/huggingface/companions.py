"""What stands beside the weights: config, generation defaults and the tokenizer's files."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
)


def write_companions(folder: Path, skeleton: Any, dtype: torch.dtype, source: Any) -> None:
    """config.json as transformers saves it; the rest from a source that is a directory."""
    config = copy.deepcopy(skeleton.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(folder)
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)
    if isinstance(source, str | Path):
        for pattern in (GENERATION, *TOKENIZER):
            for file in sorted(Path(source).glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
