"""fedms: fast gated mixtures of LoRA experts, and federated learning of foundation models.

Public names are loaded on first use, so `import fedms` costs little more than importing torch
and never imports triton, peft or transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedms.kernels import Segments as Segments
    from fedms.kernels import gated_lora_linear as gated_lora_linear

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "Segments": "fedms.kernels",
    "gated_lora_linear": "fedms.kernels",
}

__all__ = ["Segments", "__version__", "gated_lora_linear"]


def __getattr__(name: str) -> object:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fedms' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
