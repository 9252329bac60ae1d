"""The settings of what happens to an update between a client and the server."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedms.fl.settings import NotNegative, PositiveShare, Section


class PrivacyConfig(Section):
    """Differential privacy of clients: what is released hardly depends on any one client."""

    clip: NotNegative = 0.0
    """Largest norm of what a client changes in one round; 0: no privacy. Cohorts are then drawn
    client by client, and clients weigh alike."""
    epsilon: Annotated[float, Field(gt=0.0)] = 8.0
    """Budget of the whole run, which decides the noise; inf: clipped, without noise."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """Probability that epsilon does not hold; less than 1 / clients."""

    @model_validator(mode="after")
    def _has_a_bound_for_its_budget(self) -> Self:
        if not self.clip and self.epsilon != type(self).model_fields["epsilon"].default:
            raise ValueError(
                f"epsilon = {self.epsilon:g} promises nothing without a clip: set "
                "channel.privacy.clip, the largest norm of a client's change, above 0"
            )
        return self


class ChannelConfig(Section):
    """What happens to an update between a client and the server."""

    codec: Literal["none", "fp16", "int8", "topk"] = "none"
    """How clients write what they changed; what int8 and topk lose, they send later."""
    codec_down: Literal["none", "fp16", "int8"] = "none"
    """How the server writes what it sends."""
    topk_share: PositiveShare = 0.05
    """For ``codec = "topk"``: share of the values that are sent."""
    aggregate: Literal["mean", "median", "trimmed_mean", "multi_krum", "bipartition"] = "mean"
    """How updates become one. All but the mean hold a whole cohort's updates, count clients alike
    and bear some hostile ones, "bipartition" also those that turn what they changed round."""
    hostile: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.3
    """Share of a cohort that may be hostile: the trimmed mean cuts as many values at either end,
    multi-Krum and the bipartition leave out as many clients."""
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _noise_needs_a_mean(self) -> Self:
        if self.privacy.clip and self.aggregate != "mean":
            raise ValueError(
                f'aggregate = "{self.aggregate}" moves by more than privacy.clip where one client '
                'joins, so no epsilon would hold: use "mean" with privacy'
            )
        return self
