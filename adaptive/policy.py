"""Exit policies: a `Policy` decides where samples leave; `Exits` are the flags to find and choose one."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptive.confidence import CONFIDENCES, EVERYBODY, check_threshold, confidence_function
from adaptive.exit_tables import ExitTables
from adaptive.thresholds import (
    SWEEPS,
    cheapest,
    exit_of,
    geometric_quotas,
    quota_thresholds,
    share_quotas,
    simulate,
    within_budget,
)
from utils import UserError, option, to_json, write_text

SCHEMA = 1


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


@dataclass(frozen=True)
class Policy:
    """Decides where a sample leaves: at the first exit whose confidence is at least its threshold.

    `thresholds` [K], of which the last always passes. `accuracy` (a fraction), `macs` (multiply-adds per
    image) and `shares` [K] (fraction of the samples that leaves at each exit) are those on the calibration
    images. `model_hash` and `calib_hash` identify weights and images; they are empty where unknown. Raises
    ValueError for an unknown confidence, for no thresholds, and for one that the confidence never reaches.
    """

    thresholds: tuple[float, ...]
    confidence: str = "max_prob"
    name: str = ""
    accuracy: float | None = None
    macs: float | None = None
    shares: tuple[float, ...] = ()
    model_hash: str = ""
    calib_hash: str = ""

    def __post_init__(self) -> None:
        confidence_function(self.confidence)
        if not self.thresholds:
            raise UserError("thresholds []: give a number per exit")
        for value in self.thresholds:
            check_threshold(value, self.confidence)

    @classmethod
    def of(cls, thresholds: "Policy | Tensor | Sequence[float]", confidence: str = "max_prob") -> "Policy":
        """A policy of plain thresholds [K]; a policy is returned as it is."""
        if isinstance(thresholds, Policy):
            return thresholds
        values = thresholds.tolist() if isinstance(thresholds, Tensor) else thresholds
        return cls(tuple(values), confidence)

    def scores(self, logits: Tensor) -> Tensor:
        """The confidence of logits [..., C], [...]."""
        return confidence_function(self.confidence)(logits)

    def leaves(self, k: int, logits: Tensor) -> Tensor:
        """Which samples, whose logits at exit k are [B, C], leave there; bool [B]."""
        if k == len(self.thresholds) - 1:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self.scores(logits) >= self.thresholds[k]

    def exit_of(self, tables: ExitTables | Tensor) -> Tensor:
        """The exit, int64 [N], where each sample of tables, or of a confidence [K, N], leaves."""
        confidence = tables if isinstance(tables, Tensor) else tables.confidence
        return exit_of(confidence, self._limits(confidence))

    def simulate(self, tables: ExitTables, costs: Sequence[float]) -> "OperatingPoint":
        """Accuracy, cost and shares on the samples of tables, where exits cost `costs` [K] multiply-adds."""
        limits = self._limits(tables.confidence)
        found = simulate(tables.confidence, tables.correct, limits, costs)
        return OperatingPoint(self, found.accuracy, found.cost, found.shares)

    def _limits(self, confidence: Tensor) -> Tensor:
        # In the precision of the confidence, as `leaves` compares.
        return torch.tensor(self.thresholds, dtype=confidence.dtype, device=confidence.device)

    def save(self, path: str | Path) -> None:
        """Writes the policy as JSON."""
        write_text(Path(path), to_json({"schema": SCHEMA, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Reads what `save` wrote; ValueError for a damaged file or one of another schema."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = content.pop("schema")
            if schema != SCHEMA:
                raise UserError(f"its schema is {schema!r}, accepted: {SCHEMA}")
            lists = {name: tuple(content[name]) for name in ("thresholds", "shares")}
            return cls(**content | lists)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no policy that can be read: {error}") from error

    def check(self, opened: Any) -> "Policy":
        """The policy itself, if it was made for `opened.network`; ValueError for another network."""
        expected, found = len(self.thresholds), opened.network.num_exits
        if expected != found:
            raise UserError(f"policy {self.name!r} is for {expected} exits, the network has {found}")
        if self.model_hash and self.model_hash != (found := model_hash(opened.network)):
            raise UserError(
                f"policy {self.name!r} is for weights {self.model_hash[:12]}, the network has {found[:12]}"
            )
        return self


@dataclass(frozen=True)
class OperatingPoint:
    """What a policy achieves on images: accuracy (a fraction), multiply-adds per image, share per exit."""

    policy: Policy
    accuracy: float
    macs: float
    shares: list[float]


def model_hash(network: nn.Module) -> str:
    """SHA-256 of a network's state dict: names, types, shapes, values; not device or memory format."""
    return content_hash(network.state_dict())


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Rule:
    """How the thresholds [K] of a policy are found from the confidence [K, N] of calibration images."""

    name: str
    thresholds: Callable[[Tensor], Tensor]


def rules_of(exits: Exits, costs: Sequence[float]) -> list[Rule]:
    """A rule for each quota of the published sweep, then for the shares and the thresholds given, if any.

    Raises ValueError for numbers that do not fit exits of these `costs` [K] (multiply-adds), and for rows
    that the sweep does not have.
    """
    num_exits = len(costs)
    if exits.budget is not None:
        within_budget(costs, costs, exits.budget)  # at least the first exit must be affordable
    ratios = exits.ratios
    if exits.calib == "none" and (exits.shares or exits.row or not exits.router_threshold):
        raise UserError("--calib none: give thresholds (--router_threshold), no --shares and no --row")
    row = max(exits.row, default=-1)
    if row >= len(ratios):
        raise UserError(f"--row {row}, but {exits.quota_sweep} has rows 0 to {len(ratios) - 1}")
    sweep = exits.quota_sweep
    quotas = [(f"{sweep} p={p:.4g}", geometric_quotas(p, num_exits, exits.quota_scales)) for p in ratios]
    if exits.shares:
        name = f"shares {' '.join(map(str, exits.shares))}"
        quotas.append((name, share_quotas(exits.shares, num_exits)))
    rules = [Rule(name, partial(quota_thresholds, quotas=wanted)) for name, wanted in quotas]
    if exits.router_threshold:
        if len(exits.router_threshold) != num_exits - 1:
            given = f"{len(exits.router_threshold)} router thresholds for {num_exits} exits"
            raise UserError(f"{given}; give one per exit but the last")
        for value in exits.router_threshold:
            check_threshold(value, exits.confidence)
        limits = torch.tensor([*exits.router_threshold, EVERYBODY], dtype=torch.float64)
        name = f"threshold {' '.join(map(str, exits.router_threshold))}"
        rules.append(Rule(name, lambda confidence: limits))
    return rules


def policies_of(
    rules: Sequence[Rule], calib: ExitTables, costs: Sequence[float], confidence: str
) -> list[Policy]:
    """The policy of every rule, with thresholds found on `calib`; exits cost `costs` [K] multiply-adds."""
    policies = []
    for rule in rules:
        policy = Policy(tuple(rule.thresholds(calib.confidence).tolist()), confidence, rule.name)
        found = policy.simulate(calib, costs)
        policy = replace(policy, accuracy=found.accuracy, macs=found.macs, shares=tuple(found.shares))
        policies.append(policy)
    return policies


@dataclass(frozen=True)
class Choice:
    """Indices of the policies to use, of which the first is to be deployed, and in words why."""

    rows: list[int]
    reason: str


def choose(policies: Sequence[Policy], exits: Exits, last_accuracy: float) -> Choice:
    """The policies given by hand, else the best one on the calibration images.

    The best is the most accurate one within the budget, or the cheapest with the accuracy wanted. By default
    this is `last_accuracy`, that of the last exit, or the nearest to it. Raises ValueError for a budget or an
    accuracy that none of them reaches.
    """
    by_hand = list(exits.row or range(len(exits.ratios), len(policies)))
    if by_hand:
        return Choice(by_hand, "given by hand" + (", the first of these" if len(by_hand) > 1 else ""))
    accuracies, costs = zip(*((policy.accuracy, policy.macs) for policy in policies), strict=True)
    if exits.budget is not None:
        best = within_budget(accuracies, costs, exits.budget)
        good = sum(cost <= exits.budget for cost in costs)
        reason = f"the most accurate of {good} settings within {exits.budget / 1e6:.4g} M multiply-adds"
    else:
        goal = last_accuracy if exits.accuracy is None else exits.accuracy
        good = sum(accuracy >= goal for accuracy in accuracies)
        best = cheapest(accuracies, costs, goal if good or exits.accuracy else max(accuracies))
        wanted = f"{100 * goal:.2f} %" + (", the last exit's accuracy" if exits.accuracy is None else "")
        reason = f"the cheapest of {good} settings that reach {wanted}"
        if not good:
            reason = f"the most accurate setting, since none reaches {wanted}"
    return Choice([best], f"{reason}; all {len(policies)} were judged on the calibration images")
