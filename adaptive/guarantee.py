"""What is guaranteed about a policy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guarantee:
    """What is promised of a policy, in numbers and in words; plain types only.

    `observed` is the risk on the `images` that tested it, `p_value` bounds the chance of so little if the
    risk were above the bound (None with crc). `smallest_bound` is the least that so many images could
    certify, if none of them showed a loss. Where nothing is `feasible`, the policy is never to exit early,
    and `observed` and `p_value` are those of the safest policy tested; 0 and None where none was.
    """

    risk: str
    bound: float
    delta: float | None
    method: str
    feasible: bool
    images: int
    observed: float
    p_value: float | None
    smallest_bound: float
    statement: str
    limit: str
    assumption: str
