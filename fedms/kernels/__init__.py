"""The op: a frozen linear layer plus a gated mixture of LoRA experts, and its eager definition."""

from fedms.kernels.functional import gated_lora_linear as gated_lora_linear
from fedms.kernels.reference import gated_lora_linear_reference as gated_lora_linear_reference
from fedms.kernels.segments import Segments as Segments

__all__ = ["Segments", "gated_lora_linear", "gated_lora_linear_reference"]
