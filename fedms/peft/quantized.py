"""Fused layers on quantised bases: bitsandbytes in 4 and 8 bit, torchao's int8 and float8.

The base product stays the base layer's own, dtype conversion and quantisation error included; the
op adds the adapters to its result, in fp32 with one rounding where peft rounds once an adapter.

Imported when such a layer is met: it brings in bitsandbytes, where that is installed.
"""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear

from fedms.peft.layer import FusedLayer


class FusedTorchaoLoraLinear(FusedLayer, TorchaoLoraLinear):
    """A `peft.tuners.lora.torchao.TorchaoLoraLinear` with a fused forward."""


# peft's class -> its fused one
FUSED: dict[type[LoraLayer], type[FusedLayer]] = {TorchaoLoraLinear: FusedTorchaoLoraLinear}

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(FusedLayer, Linear8bitLt):
        """A `peft.tuners.lora.bnb.Linear8bitLt` with a fused forward."""

    FUSED[Linear8bitLt] = FusedLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(FusedLayer, Linear4bit):
        """A `peft.tuners.lora.bnb.Linear4bit` with a fused forward.

        peft clones the base's result, lest it be a view that is changed in place later; the op's
        result is a tensor of its own.
        """

    FUSED[Linear4bit] = FusedLinear4bit
