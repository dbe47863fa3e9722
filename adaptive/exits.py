"""The flags that say how exits are used: which policies to find, and which one to choose."""

from dataclasses import dataclass
from typing import Literal

from adaptive.confidence import CONFIDENCES
from adaptive.goals import ASSURED, Goal, milliseconds
from adaptive.reading import ANSWERS
from adaptive.thresholds import SWEEPS
from utils import UserError, option

# Flags that choose policies, beside a policy file.
CHOOSING = (
    *("budget", "latency", "accuracy", "drop", *ASSURED, "confidence_level", "guarantee"),
    *("mapped_accuracy", "shares", "router_threshold", "row"),
)
# Goals that can be guaranteed.
ASSURABLE = "--budget", "--drop", "--harm", "--disagreement", "--exit_error"


@dataclass(frozen=True)
class Exits:
    """How exits are used in an evaluation; the fields are the flags."""

    weights: Literal["auto", "model", "ema"] = option("auto", "auto: the moving average if there is one")
    mode: Literal["anytime", "dynamic", "runtime", "all"] = option("all", "what to evaluate")
    confidence: str = option(
        "max_prob",
        f"{', '.join(CONFIDENCES)}; energies with a temperature: energy_logits:2; "
        "agreement: how many exits in a row predict the same class",
    )
    answer: str = option(
        "exit",
        "; ".join(f"{name}: {about}" for name, about in ANSWERS.items()),
        choices=tuple(ANSWERS),
    )
    temperature: bool = option(False, "divide every exit's logits by a temperature, fitted on calib")
    calib: Literal["held_out", "train_augmented", "half_test", "none"] = option(
        "held_out", "images for thresholds; none: without a sweep, only --router_threshold"
    )
    policies: Literal["search", "quotas"] = option(
        "search", "what goals choose among: a search over the thresholds of all exits, or the quota sweep"
    )
    quota_sweep: str = option(
        "msdnet", "list of exit distributions; all but wide are published", choices=tuple(SWEEPS)
    )
    quota_scales: tuple[float, ...] = option(
        (), "factor on the quota of each exit but the last, e.g. 0.85 1 0.5", low=0
    )
    budget: tuple[float, ...] = option((), "goal: multiply-adds per image, at most", low=0)
    latency: tuple[str, ...] = option((), "goal: time per image, one at a time on this machine, at most; 5ms")
    latency_of: Literal["mean", "p50", "p95"] = option("mean", "the latency that --latency limits")
    accuracy: tuple[float, ...] = option((), "goal: least accuracy, a fraction", low=0, high=1)
    drop: tuple[float, ...] = option(
        (), "goal: accuracy lost against the whole network, at most; without any goal: 0", low=0, high=1
    )
    harm: tuple[float, ...] = option(
        (), "goal with a guarantee: share of images wrong only for leaving early, at most", low=0, high=1
    )
    disagreement: tuple[float, ...] = option(
        (), "goal with a guarantee: share of answers unlike the whole network's, at most", low=0, high=1
    )
    exit_error: tuple[float, ...] = option(
        (),
        "goal with a guarantee: share of errors where images leave, at any exit, at most",
        low=0,
        high=1,
    )
    confidence_level: float | None = option(
        None, "guarantee the goals with this probability, e.g. 0.95", low=0.5, high=0.999999
    )
    guarantee: Literal["ltt", "crc"] = option(
        "ltt", "learn then test; or conformal risk control, which holds on average and needs no level"
    )
    mapped_accuracy: tuple[float, ...] = option(
        (), "policies that leave where the accuracy expected of the answer is this (PCEE)", low=0, high=1
    )
    shares: tuple[float, ...] = option((), "policy: shares to leave at all exits but the last", low=0)
    router_threshold: tuple[float, ...] = option((), "policy: thresholds of all exits but the last")
    row: tuple[int, ...] = option((), "policies: rows of dynamic.json, from 0", low=0)
    policy: str = option("", "policy file to evaluate; nothing is calibrated then")
    backend: Literal["auto", "eager", "compile", "onnxruntime", "openvino"] = option(
        "eager", "what runs the network, also for tables and thresholds; auto: the fastest, measured"
    )
    precision: Literal["fp32", "bf16", "int8"] = option("fp32", "of weights and activations in the backend")
    runtime_images: int = option(2000, "runtime: how many of the test images to time", low=1)
    micro_batch: int | None = option(
        None, "runtime: images per call; default: the fastest of 16 to 256, measured", low=1
    )
    fold_bn: bool = option(True, "runtime: fold batch norm into the convolutions")
    export: str = option("", "folder to export the network with the first policy to; runs without PyTorch")
    export_compiled: bool = option(False, "export: also compile its stages for this processor; takes minutes")

    def __post_init__(self) -> None:
        if self.policy:
            self._refuse_other_policies()
        if self.export and self.mode == "anytime":
            raise UserError(f"--export {self.export}: --mode anytime finds no policy to export")
        if self.export_compiled and not self.export:
            raise UserError("--export_compiled true: give the folder, --export DIR")
        for text in self.latency:
            milliseconds(text)  # refuses what is no time
        if self.assures:
            self._check_guarantees()
        for name in ASSURED:
            if getattr(self, name) and not self.assures:
                raise UserError(f"--{name} is met with a guarantee only: add --confidence_level 0.95")

    def _refuse_other_policies(self) -> None:
        for name in (*CHOOSING, "temperature"):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UserError(f"--policy {self.policy} and --{name}: give one of them")

    def _check_guarantees(self) -> None:
        """Raises ValueError for what no guarantee is possible with."""
        for name in ("latency", "accuracy"):
            if getattr(self, name):
                raise UserError(f"--{name} cannot be guaranteed; accepted: {', '.join(ASSURABLE)}")
        if self.by_hand:
            raise UserError("policies given by hand carry no guarantee; give goals: --drop 0.01")
        if self.temperature:
            raise UserError("--temperature true is fitted on images that test a guarantee: give one of them")
        if self.calib in ("train_augmented", "none"):
            unseen = "a guarantee needs images that the network was not trained on: held_out or half_test"
            raise UserError(f"--calib {self.calib}: {unseen}")
        for name in ("drop", *ASSURED):
            for value in getattr(self, name):
                if not 0 < value < 1:
                    accepted = "accepted: numbers above 0 and below 1"
                    raise UserError(f"--{name} {value:g} cannot be guaranteed; {accepted}")
        if self.guarantee == "crc" and self.exit_error:
            raise UserError("--guarantee crc cannot bound --exit_error; accepted: ltt")
        if not any(getattr(self, flag.removeprefix("--")) for flag in ASSURABLE):
            level = self.confidence_level
            asked = "--guarantee crc" if level is None else f"--confidence_level {level:g}"
            raise UserError(f"{asked}: give what to guarantee; accepted: {', '.join(ASSURABLE)}")

    @property
    def assures(self) -> bool:
        """Whether goals are to be met with a guarantee."""
        return self.confidence_level is not None or self.guarantee == "crc"

    @property
    def goals(self) -> list[Goal]:
        """What is wanted of policies; as accurate as the whole network if nothing else is."""
        found = [Goal("budget", value) for value in self.budget]
        found += [Goal("latency", milliseconds(text), self.latency_of) for text in self.latency]
        for kind in ("accuracy", "drop", *ASSURED):
            found += [Goal(kind, value) for value in getattr(self, kind)]
        return found or ([] if self.by_hand else [Goal("drop", 0.0)])

    @property
    def by_hand(self) -> bool:
        """Whether policies are given that no goal chooses."""
        return bool(self.row or self.shares or self.router_threshold or self.mapped_accuracy)

    @property
    def ratios(self) -> list[float]:
        """Of the sweep over quotas; there is none without images for it."""
        return [] if self.calib == "none" else SWEEPS[self.quota_sweep]
