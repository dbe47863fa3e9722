"""The results of one evaluation: terminal lines, JSON files, the curve and the report are made of them."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from operator import mul
from pathlib import Path
from typing import Any, Literal

import torch

from adaptive.exit_tables import ExitFigures
from adaptive.headline import Headline
from adaptive.policy import OperatingPoint, Policy
from adaptive.report import Findings, plot_curve, write_report
from adaptive.routing import Routing
from adaptive.timing import FILLED, Comparison, Measurement
from utils import to_json, write_text


@dataclass(frozen=True)
class Unit:
    """The unit of costs in dynamic.txt: so many operations as a counter of `adaptive.flops.Costs` counts."""

    name: str
    counter: Literal["macs", "papers"]
    operations: float = 1.0
    digits: int = 1  # after the point


MACS = Unit("MACs", counter="macs")


def describe_machine(device: torch.device) -> str:
    """Processor, threads and torch version, for the record of a measurement."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), ""
            )
    model = model or platform.processor() or "CPU"
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@dataclass(frozen=True)
class Provenance:
    """Where the metrics of an evaluation come from.

    `weights` says which of the weights in file `source` were used, `calib` which images thresholds were
    chosen on, `uncounted` the costly operators that no formula covers, `unit` that of costs in dynamic.txt.
    """

    network: str
    options: dict[str, Any]
    num_classes: int
    weights: str
    source: str
    data_set: str
    data_path: str
    input_size: int
    num_test: int
    calib: str
    confidence: str
    quota_sweep: str
    uncounted: list[str]
    machine: str
    procedure: str = "ours"
    unit: str = MACS.name

    def facts(self) -> list[tuple[str, str]]:
        """How each number was obtained: pairs of label and text."""
        speed = (
            f"{self.machine}; medians of rounds in turn, which the intervals are over; per kind the fastest "
            f"micro-batch of those that the images fill {FILLED} times"
        )
        macs = (
            f"multiply-adds run for one image, earlier heads included; uncounted: {self.uncounted or 'none'}"
        )
        chosen = f"chosen on {self.calib}; confidence {self.confidence}; quotas of {self.quota_sweep}"
        return [
            ("Network", f"{self.network} {self.options or ''}: {self.weights} in {self.source}"),
            ("Test images", f"{self.data_set} {self.data_path}, {self.input_size} pixels"),
            ("Procedure", f"{self.procedure}; costs in dynamic.txt are {self.unit}"),
            ("Thresholds", chosen),
            ("MACs", macs),
            ("Speed", speed),
            ("Intervals", "95 %, by the bootstrap: images drawn anew, pairs kept together"),
        ]


@dataclass(frozen=True, kw_only=True)
class Record(Findings):
    """The results of one evaluation and how they were obtained; `policy` is the chosen one.

    `unit_costs` [K] are the costs of exits 0..k in the unit of dynamic.txt; by default multiply-adds.
    """

    provenance: Provenance
    policy: Policy | None = None
    unit: Unit = MACS
    unit_costs: Sequence[float] = ()

    def save(self, folder: Path) -> None:
        """Writes what is known so far: a JSON file per table, and the pairs that the papers' tools write."""
        contents = self.plain()
        for name, content in contents.items():
            _write_json(folder / f"{name}.json", content)
        if self.points:
            write_text(folder / "dynamic.txt", "".join(map(self._pair, self.points)))
        if self.policy:
            self.policy.save(folder / "policy.json")

    def plain(self) -> dict[str, Any]:
        """The existing tables as plain types: anytime, dynamic, routing, runtime."""
        tables: dict[str, Any] = {"anytime": [asdict(row) for row in self.exits]}
        if self.points:
            tables["dynamic"] = [self._row(point) for point in self.points]
        if self.routing:
            tables["routing"] = self._row(self.routing.point) | _renamed(self.routing, "point")
        if self.runtime:
            tables["runtime"] = {
                "num_images": self.runtime.num_images,
                "table": [_renamed(row, "exits", "seconds") for row in self.runtime.table],
                "points": [asdict(point) for point in self.runtime.points],
            }
        return tables

    def report(self, folder: Path) -> None:
        """Writes record.json, the curve and the page."""
        about = self.provenance
        headline = {"headline": asdict(self.headline)} if self.headline else {}
        _write_json(folder / "record.json", {"provenance": asdict(about), **headline, **self.plain()})
        title = f"{about.network} on {about.data_set}"
        plot_curve(folder / "curve.png", self, title)
        subtitle = f"{len(self.exits)} exits, {about.num_test} test images"
        write_report(folder / "report.html", self, title=title, subtitle=subtitle, facts=about.facts())

    def _pair(self, point: OperatingPoint) -> str:
        """Accuracy in percent and mean cost, as the papers' tools write them."""
        cost = sum(map(mul, point.shares, self.unit_costs)) if self.unit_costs else point.macs
        return f"{100 * point.accuracy:.6f}\t{cost:.{self.unit.digits}f}\n"

    def _row(self, point: OperatingPoint) -> dict[str, Any]:
        return {
            "policy": point.policy.name,
            "confidence": point.policy.confidence,
            "num_classes": self.provenance.num_classes,
            "thresholds": point.policy.thresholds,
            "accuracy": point.accuracy,
            "macs": point.macs,
            "shares": point.shares,
            "calib_accuracy": point.policy.accuracy,
            "calib_macs": point.policy.macs,
        }


def _write_json(path: Path, content: Any) -> None:
    write_text(path, to_json(content, indent=1))


# Names in the files, where they differ from those of the fields.
_KEYS = {
    "contestant": "policy",
    "latency_p50_ms": "p50_ms",
    "latency_p95_ms": "p95_ms",
    "deferred": "routed",
}


def _renamed(row: Measurement | Routing, *left_out: str) -> dict[str, Any]:
    names = [field.name for field in fields(row) if field.name not in left_out]
    return {_KEYS.get(name, name): getattr(row, name) for name in names}


def anytime_lines(exits: Sequence[ExitFigures]) -> list[str]:
    """Every exit: cost, loss and accuracy."""
    lines = ["exit     MACs, M      loss   top-1 %   top-5 %"]
    for row in exits:
        accuracy = f"{100 * row.acc1:10.2f}{100 * row.acc5:10.2f}"
        lines.append(f"{row.exit:4}{row.macs / 1e6:12.2f}{row.loss:10.4f}{accuracy}")
    return lines


def dynamic_lines(points: Sequence[OperatingPoint]) -> list[str]:
    """About eight of the operating points of a sweep, evenly spaced."""
    lines = ["row  policy                 MACs, M   top-1 %   leave at each exit, %"]
    for i in range(0, len(points), max(1, len(points) // 8)):
        point = points[i]
        shares = " ".join(f"{100 * share:5.1f}" for share in point.shares)
        figures = f"{point.macs / 1e6:10.2f}{100 * point.accuracy:10.2f}   {shares}"
        lines.append(f"{i:3}  {point.policy.name:20}{figures}")
    return lines


def headline_lines(headline: Headline) -> list[str]:
    """The chosen policy: why this one, what is expected of it, and what it does beside the static network."""
    point = headline.point
    policy = point.policy
    assert policy.accuracy is not None and policy.macs is not None  # known of all that are found on calib
    calib = f"{100 * policy.accuracy:.2f}", f"{policy.macs / 1e6:.2f}"
    test = headline.accuracy.text(100), headline.macs.text(1e-6)
    static = headline.static_accuracy.text(100), f"{headline.static_macs / 1e6:.2f}"
    rows = [
        ("", "top-1, %", "MACs, M", "leave at each exit, %"),
        *[("expected from calib", *calib, _shares(policy))] * headline.calibrated,
        ("test", *test, _shares(point)),
        ("static network", *static, ""),
    ]
    return [
        f"{headline.title}: {headline.reason}",
        f"thresholds {' '.join(f'{value:.4g}' for value in policy.thresholds[:-1])} of {policy.confidence}",
        *(f"{name:22}{accuracy:23}{macs:23}{shares}".rstrip() for name, accuracy, macs, shares in rows),
        f"{headline.difference.text(100, ' points', '+')} for {headline.fewer_macs.text(unit='x')} fewer "
        "MACs than the static network, which ends at the last exit without earlier heads; "
        f"{headline.fewer_than_all.text(unit='x')} fewer than all exits (95 % intervals over images)",
    ]


def _shares(point: OperatingPoint | Policy) -> str:
    return " ".join(f"{100 * share:5.1f}" for share in point.shares)


def routing_lines(routing: Routing) -> list[str]:
    """What deferring did at one operating point, and how well each kind of confidence ranks the samples."""
    point, met, best = routing.point, routing.four_way, routing.oracle
    deferred = sum(met.values())
    lines = [
        f"{point.policy.name}, {point.policy.confidence}: {100 * point.accuracy:.2f} % of {routing.samples} "
        f"images right at {point.macs / 1e6:.2f} M multiply-adds "
        f"({routing.flops / 1e8:.4f} x 10^8 FLOPs by the published count)",
        f"{routing.samples - deferred} stay at exit 0, {deferred} ({100 * routing.deferred:.2f} %) are "
        f"deferred; of these {met['wrong_right']} are corrected, {met['right_wrong']} degraded, "
        f"{met['right_right']} right and {met['wrong_wrong']} wrong before and after",
        f"oracle: {100 * best['accuracy']:.2f} % at {best['macs'] / 1e6:.2f} M",
        "how well confidence tells what an exit knows (AUROC, by exit):",
    ]
    for kind, by_exit in routing.auroc.items():
        values = ["-" if value is None else f"{value:.3f}" for value in by_exit]
        lines.append(f"  {kind:15}" + "".join(f"{value:>8}" for value in values))
    return lines


def runtime_lines(runtime: Comparison) -> list[str]:
    """Everything that was timed, and what early exit gains."""
    lines = [
        f"measured on {runtime.num_images} test images",
        "policy                      images/s  micro-batch   p50 ms   p95 ms   MACs, M   top-1 %",
    ]
    for row in runtime.table:
        latencies = (row.latency_p50_ms, row.latency_p95_ms)
        waits = "".join("        -" if value is None else f"{value:9.2f}" for value in latencies)
        speed = f"{row.contestant:27}{row.images_per_s:9.0f}{row.micro_batch:13}{waits}"
        lines.append(f"{speed}{row.macs / 1e6:10.2f}{100 * row.accuracy:10.2f}")
    for point in runtime.points:
        differ = ", ".join(f"{count} ({order})" for order, count in point.mismatches.items())
        lines.append(
            f"{point.point}: {point.over_static.text(unit='x')} the images/s of the static network, for "
            f"{point.macs_ratio:.2f}x fewer MACs; {point.over_plain.text(unit='x')} all exits, plain; "
            f"exits unlike the simulation: {differ}"
        )
    return lines
