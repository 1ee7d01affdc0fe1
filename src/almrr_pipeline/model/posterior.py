"""From the minimizer of the focal loss to the probability that it stands for, and new evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from almrr_pipeline.model.kernels.scan.reference import widen

_FARTHEST = 8.0
"""A larger distance says no more; its 32nd power, the largest exponent, is still a float32."""


def to_probability(confidence: Tensor, gamma: float) -> Tensor:
    """The values of an anomaly map, in [0, 1], from resized confidences; gamma 0: as they are."""
    # Matrices of a GPU's half precision have rows whose sum is a little above 1.
    confidence = confidence.clamp(0.0, 1.0)
    return undo_focal(confidence, gamma) if gamma else confidence


def undo_focal(confidence: Tensor, gamma: float) -> Tensor:
    """The probability of an anomaly behind a confidence that the focal loss has trained.

    The focal loss of gamma above 0 is smallest at confidences nearer to 0.5 than the probabilities,
    in the same order. Closed form of Charoenphakdee et al., CVPR 2021 (arXiv 2011.09172), theorem
    11, for two classes: eta = v d(1 - v) / (v d(1 - v) + (1 - v) d(v)) with
    d(v) = (1 - v)^gamma - gamma (1 - v)^(gamma - 1) v log v.

    Args:
        confidence: float in [0, 1], any shape.
        gamma: of the loss, 1 or more; at 0 confidences are probabilities already.

    Returns:
        Of the same shape and type, in [0, 1]; 0, 0.5 and 1 stay.
    """
    v = widen(confidence)
    ours, theirs = v * _slope(1.0 - v, gamma), (1.0 - v) * _slope(v, gamma)
    return (ours / (ours + theirs)).to(confidence.dtype)


def weigh_odds(probability: Tensor, distance: Tensor, exponent: float) -> Tensor:
    """Multiply the odds of an anomaly by a power of the distance to what is normal.

    Bayes' rule in odds: posterior = prior times likelihood ratio, which is taken to be
    distance^exponent, with distance 1 where its mean over normal images is 1, as that of every
    likelihood ratio is. The network knows defects like the simulated ones, the distance is large
    for all that normal images have not shown.

    Args:
        probability: float in [0, 1], any shape.
        distance: at least 0, of the same shape, see `FeatureMemory.evidence`; values outside of
            [1/8, 8] count as these ends.
        exponent: at least 0.

    Returns:
        Of the shape and type of `probability`, in [0, 1]; 0 and 1 stay.
    """
    p = widen(probability)
    raised = p * widen(distance).clamp(1.0 / _FARTHEST, _FARTHEST).pow(exponent)
    return (raised / (raised + (1.0 - p))).to(probability.dtype)


def _slope(v: Tensor, gamma: float) -> Tensor:
    """d(v), at least float32."""
    logarithm = v.clamp_min(torch.finfo(v.dtype).tiny).log()  # v log v is 0 at 0
    return (1.0 - v).pow(gamma - 1.0) * (1.0 - v - gamma * v * logarithm)
