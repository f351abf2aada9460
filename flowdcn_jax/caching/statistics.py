"""Statistics of cached latents, a channel each, streamed in float64."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class LatentStatistics:
    """Sums over the values of drawn latents, x = mean + std * noise, before scale and shift.

    The sums of two sets of images add up to those of both.
    """

    count: int = 0  # values a channel
    means: np.ndarray | float = 0.0  # of mean, float64 [C]
    squares: np.ndarray | float = 0.0  # of mean^2
    variances: np.ndarray | float = 0.0  # of std^2

    def add(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Counts latents with these moments, [n,h,w,C] each."""
        mean, std = (
            moment.reshape(-1, moment.shape[-1]).astype(np.float64) for moment in (mean, std)
        )
        self.merge(LatentStatistics(len(mean), mean.sum(0), (mean**2).sum(0), (std**2).sum(0)))

    def merge(self, other: "LatentStatistics") -> None:
        """Counts what `other` has counted."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def stochastic(self) -> bool:
        """Whether any std is not zero."""
        return bool(np.any(self.variances))

    def summary(self) -> dict[str, list[float]]:
        """{"mean": [C], "std": [C]} of the drawn latents."""
        mean = self.means / self.count
        variance = (self.squares + self.variances) / self.count - mean**2
        return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 0)).tolist()}

    def to_json(self) -> dict:
        """What `from_json` reads."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, saved: dict) -> "LatentStatistics":
        """The sums that `to_json` gave."""
        arrays = {name: np.asarray(value, np.float64) for name, value in saved.items()}
        return cls(**arrays | {"count": saved["count"]})
