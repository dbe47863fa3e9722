"""The flags that say how exits are used: which policies to find, and which one to choose."""

from dataclasses import dataclass
from typing import Literal

from adaptive.confidence import CONFIDENCES
from adaptive.thresholds import SWEEPS
from utils import UserError, option


@dataclass(frozen=True)
class Exits:
    """How exits are used in an evaluation; the fields are the flags."""

    weights: Literal["auto", "model", "ema"] = option("auto", "auto: the moving average if there is one")
    mode: Literal["anytime", "dynamic", "runtime", "all"] = option("all", "what to evaluate")
    confidence: str = option(
        "max_prob", f"{', '.join(CONFIDENCES)}; energies with a temperature: energy_logits:2"
    )
    calib: Literal["held_out", "train_augmented", "half_test", "none"] = option(
        "held_out", "images for thresholds; none: without a sweep, only --router_threshold"
    )
    quota_sweep: str = option(
        "msdnet", "list of exit distributions; all but wide are published", choices=tuple(SWEEPS)
    )
    quota_scales: tuple[float, ...] = option(
        (), "factor on the quota of each exit but the last, e.g. 0.85 1 0.5", low=0
    )
    router_threshold: tuple[float, ...] = option(
        (), "thresholds of all exits but the last, beside the sweep's"
    )
    shares: tuple[float, ...] = option(
        (), "shares to leave at all exits but the last, beside the sweep's", low=0
    )
    budget: float | None = option(
        None, "multiply-adds allowed to the policy chosen; default: as good as the last exit", low=0
    )
    accuracy: float | None = option(
        None, "least accuracy wanted of the policy chosen, a fraction, instead of a budget", low=0, high=1
    )
    row: tuple[int, ...] = option((), "rows of dynamic.json to choose instead, from 0: all are timed", low=0)
    runtime_images: int = option(2000, "runtime: how many of the test images to time", low=1)
    micro_batch: int | None = option(
        None, "runtime: images per call; default: the fastest of 16 to 256, measured", low=1
    )
    fold_bn: bool = option(True, "runtime: fold batch norm into the convolutions")

    def __post_init__(self) -> None:
        if self.budget is not None and self.accuracy is not None:
            given = f"--budget {self.budget:g} and --accuracy {self.accuracy:g}"
            raise UserError(f"{given}: give one of them; the other one follows")

    @property
    def ratios(self) -> list[float]:
        """Of the sweep over quotas; there is none without images for it."""
        return [] if self.calib == "none" else SWEEPS[self.quota_sweep]
