"""``python -m functional_ep train ...``, and so ``torchrun ... -m functional_ep train ...``."""

from .cli import main

main()
