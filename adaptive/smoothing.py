"""How probably each exit is right, given the confidences of all exits: less noisy than whether it was right.

The best of very many settings on a few thousand samples owes part of its accuracy to chance, and the more
so, the noisier what is averaged.
"""

import torch
from torch import Tensor

RIDGE = 1.0
STEPS = 8
PAIRS = 6  # up to so many exits, the products of all pairs of confidences are features
SAMPLES = 10_000  # to fit on; there are at most 28 weights per exit up to 6 exits


def features(confidence: Tensor) -> Tensor:
    """Features [N, F], float64, of confidences [K, N]: a constant, normal scores, squares, products.

    The score of a confidence is the normal quantile of its rank among those of its exit; ties share their
    mean rank. So any kind of confidence may be given.
    """
    ordered = confidence.sort(1).values
    confidence = confidence.contiguous()
    below = torch.searchsorted(ordered, confidence)
    up_to = torch.searchsorted(ordered, confidence, right=True)
    ranks = (below + up_to + 1).double() / (2 * (ordered.shape[1] + 1))
    scores = torch.special.ndtri(ranks).clamp(-3, 3)  # (K, N)
    num_exits = len(scores)
    first, second = torch.triu_indices(num_exits, num_exits)
    if num_exits > PAIRS:
        near = second - first < 2
        first = first[near]
        second = second[near]
    return torch.cat([torch.ones_like(scores[:1]), scores, scores[first] * scores[second]]).mT


def fit(inputs: Tensor, correct: Tensor, start: Tensor | None = None) -> Tensor:
    """Weights [K, F] of a ridge logistic regression from features [N, F] to `correct` [K, N].

    By Newton's method from zero, or in two steps from the weights `start` of other samples of the same kind.
    """
    every = -(-len(inputs) // SAMPLES)  # evenly, since samples may be in the order of classes
    inputs = inputs[::every]
    right = correct[:, ::every].double()
    penalty = torch.full((inputs.shape[1],), RIDGE, dtype=torch.float64)
    penalty[0] = 1e-3  # the constant, which is bounded only where an exit is always right
    weights = torch.zeros(len(right), inputs.shape[1], dtype=torch.float64) if start is None else start
    for _ in range(STEPS if start is None else 2):
        chance = (weights @ inputs.mT).sigmoid()  # (K, N)
        slope = (right - chance) @ inputs - penalty * weights
        spread = (chance * (1 - chance)).clamp_min(1e-6)
        curvature = torch.stack([(inputs * row[:, None]).mT @ inputs for row in spread])
        weights = weights + torch.linalg.solve(curvature + penalty.diag(), slope)
    return weights
