"""The results of an evaluation as lines for the terminal."""

from collections.abc import Sequence

from adaptive.confidence import EVERYBODY, NOBODY
from adaptive.exit_tables import ExitFigures
from adaptive.front import FrontRow
from adaptive.guarantee import Guarantee
from adaptive.headline import Headline
from adaptive.policy import OperatingPoint, Policy
from adaptive.reading import ANSWERS
from adaptive.routing import Routing
from adaptive.timing import Comparison


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


def front_lines(front: Sequence[FrontRow]) -> list[str]:
    """About eight of the policies that a search found, evenly spaced."""
    lines = [f"{'found by search':25}   MACs, M   {'top-1, %':25}leave at each exit, %"]
    for i in range(0, len(front), max(1, len(front) // 8)):
        row = front[i]
        figures = f"{row.macs / 1e6:10.2f}   {row.accuracy.text(100):25}"
        lines.append(f"{'':25}{figures}{' '.join(f'{100 * share:5.1f}' for share in row.shares)}")
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
        f"thresholds {thresholds_in_words(policy)}",
        *([f"expected latency: {policy.latency_ms:.3g} ms per image"] if policy.latency_ms else []),
        *(_guarantee_lines(policy.guarantee, headline.reason) if policy.guarantee else []),
        *(f"{name:22}{accuracy:25}{macs:23}{shares}".rstrip() for name, accuracy, macs, shares in rows),
        f"{headline.difference.text(100, ' points', '+')} for {headline.fewer_macs.text(unit='x')} fewer "
        "MACs than the static network, which ends at the last exit without earlier heads; "
        f"{headline.fewer_than_all.text(unit='x')} fewer than all exits (95 % intervals over images)",
    ]


def _guarantee_lines(given: Guarantee, reason: str) -> list[str]:
    """What is guaranteed and on what that rests, but for what the reason says already."""
    return [line for line in (given.statement, given.limit, given.assumption) if line not in reason]


def thresholds_in_words(policy: Policy) -> str:
    """The thresholds of all exits but the last, and what they are compared with."""
    values = [f"{value:.4g}" for value in policy.thresholds[:-1]]
    for k, value in enumerate(policy.thresholds[:-1]):
        if value == NOBODY:
            values[k] = "off" if k in policy.off else "nobody"
        if value == EVERYBODY:
            values[k] = "all"
    words = f"{' '.join(values)} of {policy.confidence}"
    if policy.answer != "exit":
        words += f"; the answer is {ANSWERS[policy.answer]}"
    if policy.temperatures:
        words += f"; temperatures {' '.join(f'{value:.3g}' for value in policy.temperatures)}"
    return words


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
    width = max([27, *(len(row.contestant) for row in runtime.table)])
    lines = [
        f"measured on {runtime.num_images} test images",
        f"{'policy':{width}} images/s  micro-batch   p50 ms   p95 ms   MACs, M   top-1 %",
    ]
    for row in runtime.table:
        latencies = (row.latency_p50_ms, row.latency_p95_ms)
        waits = "".join("        -" if value is None else f"{value:9.2f}" for value in latencies)
        speed = f"{row.contestant:{width}}{row.images_per_s:9.0f}{row.micro_batch:13}{waits}"
        lines.append(f"{speed}{row.macs / 1e6:10.2f}{100 * row.accuracy:10.2f}")
    for point in runtime.points:
        differ = ", ".join(f"{count} ({order})" for order, count in point.mismatches.items())
        lines.append(
            f"{point.point}: {point.over_static.text(unit='x')} the images/s of the static network, for "
            f"{point.macs_ratio:.2f}x fewer MACs; {point.over_plain.text(unit='x')} all exits, plain; "
            f"exits unlike the simulation: {differ}"
        )
    return lines
