"""Evaluation results as lines for a terminal; the forms of the data are those of `adaptive.report`."""

from typing import Any


def anytime_lines(exits: list[dict[str, Any]]) -> list[str]:
    """Every exit: cost, loss and accuracy."""
    lines = ["exit     MACs, M      loss   top-1 %   top-5 %"]
    for row in exits:
        accuracy = f"{100 * row['acc1']:10.2f}{100 * row['acc5']:10.2f}"
        lines.append(f"{row['exit']:4}{row['macs'] / 1e6:12.2f}{row['loss']:10.4f}{accuracy}")
    return lines


def dynamic_lines(rows: list[dict[str, Any]]) -> list[str]:
    """About eight of the operating points of a sweep, evenly spaced."""
    lines = ["row  policy                 MACs, M   top-1 %   leave at each exit, %"]
    for i in range(0, len(rows), max(1, len(rows) // 8)):
        row = rows[i]
        shares = " ".join(f"{100 * share:5.1f}" for share in row["shares"])
        lines.append(
            f"{i:3}  {row['policy']:20}{row['macs'] / 1e6:10.2f}{100 * row['accuracy']:10.2f}   {shares}"
        )
    return lines


def routing_lines(router: dict[str, Any]) -> list[str]:
    """What the router did at one operating point, and how each kind of confidence would rank the samples."""
    n, met = router["samples"], router["four_way"]
    lines = [
        f"{router['policy']}, {router['confidence']}: {100 * router['accuracy']:.2f} % of {n} images right at "
        f"{router['macs'] / 1e6:.2f} M multiply-adds ({router['flops'] / 1e8:.4f} x 10^8 FLOPs by the published count)",
        f"{n - sum(met.values())} stay at exit 0, {sum(met.values())} ({100 * router['routed']:.2f} %) go on; of these"
        f" {met['wrong_right']} are mended, {met['right_wrong']} spoilt,"
        f" {met['right_right']} right and {met['wrong_wrong']} wrong before and after",
        f"oracle: {100 * router['oracle']['accuracy']:.2f} % at {router['oracle']['macs'] / 1e6:.2f} M",
        "how well confidence tells what an exit knows (AUROC, by exit):",
    ]
    for kind, by_exit in router["auroc"].items():
        lines.append(
            f"  {kind:15}" + "".join(f"{'-' if value is None else f'{value:.3f}':>8}" for value in by_exit)
        )
    return lines


def runtime_lines(runtime: dict[str, Any]) -> list[str]:
    """The measured policies, and what early exit gains."""
    lines = [
        f"measured on {runtime['num_images']} test images",
        "policy                      images/s  micro-batch   p50 ms   p95 ms   MACs, M   top-1 %",
    ]
    for row in runtime["table"]:
        waits = "".join("        -" if row[k] is None else f"{row[k]:9.2f}" for k in ("p50_ms", "p95_ms"))
        speed = f"{row['policy']:27}{row['images_per_s']:9.0f}{row['micro_batch']:13}{waits}"
        lines.append(f"{speed}{row['macs'] / 1e6:10.2f}{100 * row['accuracy']:10.2f}")
    for point in runtime["points"]:
        differ = ", ".join(f"{count} ({order})" for order, count in point["mismatches"].items())
        lines.append(
            f"{point['point']}: {point['speedup']:.2f}x the images/s of the last exit alone, for "
            f"{point['macs_ratio']:.2f}x fewer MACs; {point['speedup_over_plain']:.2f}x all exits, plain; "
            f"exits unlike the simulation: {differ}"
        )
    return lines
