"""The drop-in for peft: fused LoRA layers in a live model, gates on them, an adapter per sample."""

from fedms.peft.gates import gated as gated
from fedms.peft.gates import mixed_adapters as mixed_adapters
from fedms.peft.gates import set_adapter_names as set_adapter_names
from fedms.peft.gates import set_gates as set_gates
from fedms.peft.install import Report as Report
from fedms.peft.install import Stats as Stats
from fedms.peft.install import accelerate as accelerate
from fedms.peft.install import disable_peft as disable_peft
from fedms.peft.install import enable_peft as enable_peft
from fedms.peft.install import restore as restore
from fedms.peft.install import stats as stats
from fedms.peft.layer import FusedLinear as FusedLinear
from fedms.peft.layer import why_not_fused as why_not_fused

__all__ = [
    "FusedLinear",
    "Report",
    "Stats",
    "accelerate",
    "disable_peft",
    "enable_peft",
    "gated",
    "mixed_adapters",
    "restore",
    "set_adapter_names",
    "set_gates",
    "stats",
    "why_not_fused",
]
