"""The same scenarios by an independent load generator, MLCommons' loadgen; the figures are not MLPerf's.

Nothing else of its rules is kept: no minimal duration, and no closed model or data.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.scenarios import Classify, Samples, Submit
from utils import UserError

MARK = ":::MLLOG "


@dataclass(frozen=True)
class Report:
    """What the generator's log says, and the fraction of its requests whose answers were right.

    `p90_below_ms` is its early-stopping estimate, 0 where it gives none; it measures images per second
    offline alone.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    p90_below_ms: float
    images_per_s: float | None
    accuracy: float


def single_stream(classify: Classify, samples: Samples, requests: int) -> Report:
    """One image after another."""
    return _drive("SingleStream", partial(_at_once, classify), samples, min_query_count=requests)


def offline(classify: Classify, samples: Samples, count: int) -> Report:
    """`count` images in one request."""
    answer = partial(_at_once, classify)
    return _drive("Offline", answer, samples, min_query_count=count, offline_expected_qps=count)


def server(submit: Submit, samples: Samples, rate: float, requests: int, bound_ms: float) -> Report:
    """Requests at random times, `rate` a second on average."""

    def answer(images: np.ndarray, done: Callable[[Sequence[int]], None]) -> None:
        # The generator waits for ever for what is not done: no answer is a wrong one.
        submit(images[0]).add_done_callback(
            lambda future: done([-1 if future.exception() else future.result().label])
        )

    return _drive(
        "Server",
        answer,
        samples,
        min_query_count=requests,
        server_target_qps=rate,
        server_target_latency_ns=int(1e6 * bound_ms),
    )


def _at_once(classify: Classify, images: np.ndarray, done: Callable[[Sequence[int]], None]) -> None:
    done(classify(images).tolist())


def _drive(scenario: str, answer: Callable[..., None], samples: Samples, **settings: Any) -> Report:
    """Runs a scenario; `answer(images, done)` gives their classes to `done`, now or later."""
    try:
        generator: Any = import_module("mlperf_loadgen")
    except ImportError:
        raise UserError("the load generator is not installed: pip install mlcommons-loadgen") from None
    given = generator.TestSettings()
    given.scenario = getattr(generator.TestScenario, scenario)
    given.min_duration_ms = 0
    count = settings["min_query_count"]
    given.max_query_count = count
    given.performance_issue_unique = True
    rows = samples.rows(count, seed=0)  # its library: the images that `stream` asks for, each once
    for name, value in settings.items():
        setattr(given, name, value)
    images = samples.images[rows]  # which are there before the clock runs
    labels = samples.labels[rows]
    right: list[bool] = []

    def issue(queries: Sequence[Any]) -> None:
        queries = sorted(queries, key=lambda query: query.index)
        asked = [query.index for query in queries]

        def done(classes: Sequence[int]) -> None:
            right.extend(labels[asked] == classes)
            generator.QuerySamplesComplete([generator.QuerySampleResponse(one.id, 0, 0) for one in queries])

        answer(images if len(asked) == count else images[asked], done)

    system = generator.ConstructSUT(issue, lambda: None)
    library = generator.ConstructQSL(count, count, lambda _: None, lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        logs = generator.LogSettings()
        logs.log_output.outdir = folder
        generator.StartTestWithLogSettings(system, library, given, logs)
        log = _read(Path(folder) / "mlperf_log_detail.txt")
    generator.DestroyQSL(library)
    generator.DestroySUT(system)
    ms = [1e-6 * log[f"result_{name}_latency_ns"] for name in (*PERCENTILES, "mean")]
    below = 1e-6 * log.get("early_stopping_latency_ss", 0)
    return Report(*ms, below, log.get("result_samples_per_second"), float(np.mean(right)))


PERCENTILES = "50.00_percentile", "90.00_percentile", "99.00_percentile"


def _read(path: Path) -> dict[str, Any]:
    """The entries of the generator's log, by key."""
    lines = (line for line in path.read_text().splitlines() if line.startswith(MARK))
    entries = [json.loads(line.removeprefix(MARK)) for line in lines]
    return {entry["key"]: entry["value"] for entry in entries}
