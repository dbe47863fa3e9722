"""The results of one evaluation: terminal lines, JSON files, the curve and the report are made of them."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from operator import mul
from pathlib import Path
from typing import Any, Literal

import torch

from adaptive.curve import plot_curve
from adaptive.findings import Findings
from adaptive.headline import Headline
from adaptive.policy import OperatingPoint, Policy
from adaptive.reliability import ConfidenceFigures
from adaptive.report import write_report
from adaptive.routing import Routing
from adaptive.timing import FILLED, Measurement
from experiment.portable import portable
from utils import to_json, write_text


@dataclass(frozen=True)
class Unit:
    """The unit of costs in dynamic.txt: so many operations as a counter of `adaptive.flops.Costs` counts."""

    name: str
    counter: Literal["macs", "papers"]
    operations: float = 1.0
    digits: int = 1  # after the point


MACS = Unit("MACs", counter="macs")
SCHEMA = 2  # of record.json; a number is never used for two layouts


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
    backend: str = "eager"

    def facts(self) -> list[tuple[str, str]]:
        """How each number was obtained: pairs of label and text."""
        speed = (
            f"{self.machine}; {self.backend}; medians of rounds in turn, which the intervals are over; per "
            f"kind the fastest micro-batch of those that the images fill {FILLED} times"
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
    """The results of one evaluation and how they were obtained; `policies` are the chosen ones.

    Of each there is one of `headlines`; the first is to be deployed. `confidence` says what that of every
    exit is worth. `unit_costs` [K] are the costs of exits 0..k in the unit of dynamic.txt; by default
    multiply-adds. `origin` (`experiment.origin.Origin`) is what it takes to repeat the evaluation.
    """

    provenance: Provenance
    origin: Any = None
    policies: Sequence[Policy] = ()
    headlines: Sequence[Headline] = ()
    confidence: Sequence[ConfidenceFigures] = ()
    unit: Unit = MACS
    unit_costs: Sequence[float] = ()

    def save(self, folder: Path) -> None:
        """Writes what is known so far: a JSON file per table, and the pairs that the papers' tools write."""
        contents = self.plain()
        for name, content in contents.items():
            _write_json(folder / f"{name}.json", content)
        if self.points:
            write_text(folder / "dynamic.txt", "".join(map(self._pair, self.points)))
        for i, policy in enumerate(self.policies):
            policy.save(folder / (f"policy-{i + 1}.json" if i else "policy.json"))

    def plain(self) -> dict[str, Any]:
        """The existing tables as plain types: anytime, front, dynamic, routing, runtime."""
        tables: dict[str, Any] = {"anytime": [asdict(row) for row in self.exits]}
        if self.front:
            tables["front"] = [asdict(row) for row in self.front]
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

    def content(self) -> dict[str, Any]:
        """What record.json holds, as plain types: all that others need, without paths of this machine.

        Of the front it has no commands, which front.json has, and policies are whole in `policies` alone.
        """
        known = {
            "schema": SCHEMA,
            "provenance": asdict(self.provenance),
            "origin": asdict(self.origin) if self.origin else None,
            "headline": _brief(self.headline) if self.headline else None,
            "headlines": [_brief(one) for one in self.headlines] if len(self.headlines) > 1 else None,
            "policies": [asdict(policy) for policy in self.policies],
            "confidence": [asdict(row) for row in self.confidence],
        }
        content = {name: part for name, part in known.items() if part} | self.plain()
        for row in content.get("front", ()):
            del row["command"]
            row["policy"] = _short(row["policy"])
        return portable(content)

    def write(self, folder: Path) -> None:
        """Writes record.json, a line per table."""
        lines = [f"{to_json(name)}: {to_json(part)}" for name, part in self.content().items()]
        write_text(folder / "record.json", "{\n" + ",\n".join(lines) + "\n}\n")

    def report(self, folder: Path) -> None:
        """Writes record.json, the curve and the page."""
        self.write(folder)
        about = self.provenance
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


def _brief(headline: Headline) -> dict[str, Any]:
    plain = asdict(headline)
    plain["point"]["policy"] = _short(plain["point"]["policy"])
    return plain


def _short(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy in plain types without what is empty and without where it comes from."""
    return {name: part for name, part in policy.items() if name != "made" and part not in (None, "", (), [])}


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
