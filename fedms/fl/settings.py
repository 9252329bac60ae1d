"""What the sections of the configuration are made of. Each part of ``fedms.fl`` declares its own.

A limit stands in a setting's type, its meaning in the docstring below it; ``fedms run --settings``
prints both. Imports nothing else of fedms.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    """Settings that belong together: immutable, hashable, of exactly the declared names and types.

    class Settings(Section):
        mu: NotNegative = 0.01
        \"""Weight of the proximal term.\"""
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True
    )

    def replace(self, **changes: Any) -> Self:
        """The same settings with ``changes``, checked as all settings are."""
        return self.model_validate({**dict(self), **changes})


Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""From nothing to all."""
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
Names = Annotated[tuple[str, ...], Strict(False)]
"""TOML has lists only; the names themselves are still checked strictly."""
