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
    from fedms.peft import accelerate as accelerate
    from fedms.peft import disable_peft as disable_peft
    from fedms.peft import enable_peft as enable_peft
    from fedms.peft import gated as gated
    from fedms.peft import mixed_adapters as mixed_adapters
    from fedms.peft import restore as restore
    from fedms.peft import set_adapter_names as set_adapter_names
    from fedms.peft import set_gates as set_gates
    from fedms.peft import stats as stats
    from fedms.peft.routers import LayerRouters as LayerRouters
    from fedms.peft.routers import RoutedModel as RoutedModel
    from fedms.peft.routers import Router as Router

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "LayerRouters": "fedms.peft.routers",
    "RoutedModel": "fedms.peft.routers",
    "Router": "fedms.peft.routers",
    "Segments": "fedms.kernels",
    "accelerate": "fedms.peft",
    "disable_peft": "fedms.peft",
    "enable_peft": "fedms.peft",
    "gated": "fedms.peft",
    "gated_lora_linear": "fedms.kernels",
    "mixed_adapters": "fedms.peft",
    "restore": "fedms.peft",
    "set_adapter_names": "fedms.peft",
    "set_gates": "fedms.peft",
    "stats": "fedms.peft",
}

__all__ = [
    "LayerRouters",
    "RoutedModel",
    "Router",
    "Segments",
    "__version__",
    "accelerate",
    "disable_peft",
    "enable_peft",
    "gated",
    "gated_lora_linear",
    "mixed_adapters",
    "restore",
    "set_adapter_names",
    "set_gates",
    "stats",
]


def __getattr__(name: str) -> object:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'fedms' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
