"""A budget from a calibrated quality curve (Compactor, arXiv 2507.08143), for any score: how much of this context may go?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kvcompress.budget import Budget, Scores
from kvcompress.layer import LayerState

__all__ = ["Calibrated", "calibrated_keep", "fit_quality", "predicted_quality"]


def predicted_quality(keep: ArrayLike, nll: ArrayLike, alpha: float, beta: float) -> np.ndarray:
    """NLL(full) / NLL(compressed) to expect when a share `keep` of a context stays.

    ``f(r) = (exp(r b) - 1) / (exp(b) - 1)`` with ``b = alpha * nll + beta``: f(0) = 0, f(1) = 1, and f(r) = r at b = 0.

    Args:
        keep: shares kept, in [0, 1].
        nll: mean negative log-likelihood of a context's tokens under the model, which the prefill's logits give.
        alpha, beta: of `fit_quality`.
    """
    r, b = np.broadcast_arrays(np.asarray(keep, np.float64), alpha * np.asarray(nll, np.float64) + beta)
    flat = np.abs(b) < 1e-9
    b = np.where(flat, 1.0, b)
    shrink = np.where(b > 0, np.exp(np.minimum(r * b - b, 0)), 1.0)  # divides both by exp(b) where that is large
    curve = shrink * np.expm1(-r * np.abs(b)) / np.expm1(-np.abs(b))
    return np.where(flat, r, curve)


def calibrated_keep(nll: ArrayLike, alpha: float, beta: float, quality: float) -> np.ndarray:
    """The least share to keep for a predicted quality: ``r* = 1 + ln(quality (1 - exp(-b)) + exp(-b)) / b``.

    Raises:
        ValueError: quality outside (0, 1].

    Example:
        >>> calibrated_keep([3.0], alpha=-1.0, beta=0.0, quality=0.95).round(4).tolist()
        [0.7767]
    """
    if not 0 < quality <= 1:
        raise ValueError(f"calibrated_keep: quality must be in (0, 1], got {quality}")
    b = np.atleast_1d(alpha * np.asarray(nll, np.float64) + beta)
    flat = np.abs(b) < 1e-9
    b = np.where(flat, 1.0, b)
    negative = np.minimum(b, 0)
    keep = np.where(
        b < 0,
        np.log1p(quality * np.expm1(negative)) / b,
        1 + np.log(quality + (1 - quality) * np.exp(-np.maximum(b, 0))) / b,
    )
    return np.clip(np.where(flat, quality, keep), 0.0, 1.0)


def fit_quality(
    keep: ArrayLike, nll: ArrayLike, quality: ArrayLike, *, caution: float = 3.0, steps: int = 200
) -> tuple[float, float]:
    """(alpha, beta) of `predicted_quality` by least squares over measured triples, once a model and method.

    Predictions that are too good, which would keep too little, weigh `caution` times: the published loss is asymmetric too, its
    weight is not published. Levenberg-Marquardt from the best of a few flat curves; deterministic.

    Args:
        keep, nll, quality: equally long; share kept, NLL of the context, and NLL(full) / NLL(compressed) of the true answer.
        caution: weight of too good predictions, at least 1.
        steps: most iterations.

    Raises:
        ValueError: fewer than two triples, lists of different lengths, numbers that are not finite, caution below 1.
    """
    r, c, y = (np.asarray(x, np.float64) for x in (keep, nll, quality))
    if not (r.ndim == 1 and r.shape == c.shape == y.shape and len(r) >= 2):
        raise ValueError(
            f"fit_quality: keep, nll and quality must be lists of one length, at least 2, got {r.shape}, {c.shape}, {y.shape}"
        )
    if not all(np.isfinite(x).all() for x in (r, c, y)):
        raise ValueError("fit_quality: keep, nll and quality must be finite, got NaN or infinity")
    if caution < 1:
        raise ValueError(f"fit_quality: caution must be at least 1, got {caution}")
    centre = c.mean()  # alpha and the b of an average context hang together less than alpha and beta

    def error(p: np.ndarray) -> np.ndarray:
        over = predicted_quality(r, c - centre, p[0], p[1]) - y
        return over * np.where(over > 0, caution**0.5, 1.0)

    best = min((np.array([0.0, b]) for b in np.linspace(-20, 20, 41)), key=lambda p: float((error(p) ** 2).sum()))
    residual, damping = error(best), 1e-3
    for _ in range(steps):
        step = 1e-6 * (1 + np.abs(best))
        slopes = [(error(best + d) - error(best - d)) / (2 * d.sum()) for d in np.diag(step)]
        jacobian = np.stack(slopes, axis=1)
        normal = jacobian.T @ jacobian
        move = -np.linalg.lstsq(normal + damping * np.diag(np.diag(normal) + 1e-12), jacobian.T @ residual, rcond=None)[
            0
        ]
        trial = error(best + move)
        if (trial**2).sum() < (residual**2).sum():
            best, residual, damping = best + move, trial, max(damping / 10, 1e-12)
            if np.abs(move).max() < 1e-10 * (1 + np.abs(best).max()):
                break
        elif damping > 1e12:
            break
        else:
            damping *= 10
    alpha, middle = (float(x) for x in best)
    return alpha, middle - alpha * float(centre)


@dataclass(frozen=True)
class Calibrated(Budget):
    """Each context keeps the least share that the fitted curve predicts to hold a quality. Goes with any score.

    The likelihood of a context must be known before its layers are cut: from a first pass over it, or from its prefix
    in a cache that is compressed later.

    Attributes:
        nll: mean negative log-likelihood of each row's tokens; one number stands for all rows.
        alpha, beta: of `fit_quality`.
        quality: NLL(full) / NLL(compressed) to hold (paper: 0.95 for Llama, 0.90 for Qwen).
        least: share kept in any case.
    """

    nll: float | tuple[float, ...]
    alpha: float
    beta: float
    quality: float = 0.95
    least: float = 0.0

    def __post_init__(self) -> None:
        calibrated_keep(self.nll, self.alpha, self.beta, self.quality)
        if not 0 <= self.least <= 1:
            raise ValueError(f"Calibrated: least must be in [0, 1], got {self.least}")

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        shares = calibrated_keep(self.nll, self.alpha, self.beta, self.quality)
        if len(shares) not in (1, len(layer.lengths)):
            raise ValueError(
                f"Calibrated: nll must be one number or one a row ({len(layer.lengths)}), got {len(shares)}"
            )
        shares = np.maximum(np.broadcast_to(shares, len(layer.lengths)), self.least)
        # up, so that the predicted quality holds; a share's last rounding is no reason for one more
        return [min(n, max(1, math.ceil(share * n - 1e-9))) for share, n in zip(shares.tolist(), layer.lengths)]
