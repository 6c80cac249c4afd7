"""How close are two sets of samples, and how well does an energy tell them apart?

Each distance is biased by the number of samples: quote it with both counts, and with its floor (data against data).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = x.detach().flatten(1).double().cpu(), y.detach().flatten(1).double().cpu()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"samples of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    if min(len(x), len(y)) < least:
        raise ValueError(f"too few samples: this metric needs at least {least} in each set, got {len(x)} and {len(y)}")
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("samples contain values that are not finite")
    return x, y


def _quantiles(ordered: Tensor, q: Tensor) -> Tensor:
    """Quantiles q of rows already in order, linear between midpoints (Hazen): (c, n), (m,) -> (c, m)."""
    last = ordered.shape[1] - 1
    position = (q * (last + 1) - 0.5).clamp(0, last)
    low = position.long()
    return torch.lerp(ordered[:, low], ordered[:, (low + 1).clamp(max=last)], (position - low).expand(len(ordered), -1))


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 1000, generator: torch.Generator | None = None) -> float:
    """sqrt(mean over random directions of W_2^2 of the projections), in the data's units. x: (n, *d), y: (m, *d)."""
    x, y = _pair(x, y, 2)
    u = torch.randn(directions, x.shape[1], generator=generator, dtype=x.dtype)
    u = u / u.norm(dim=1, keepdim=True)
    total = 0.0
    for part in u.split(max(1, 20_000_000 // max(len(x), len(y)))):
        # numpy sorts rows four times faster than torch does columns
        px, py = (torch.from_numpy(np.sort((part @ z.T).numpy(), axis=1)) for z in (x, y))
        if len(x) != len(y):  # compare quantiles at the midpoints of the smaller set
            n = min(len(x), len(y))
            middles = (torch.arange(n, dtype=x.dtype) + 0.5) / n
            px, py = (_quantiles(p, middles) for p in (px, py))
        total += float(((px - py) ** 2).mean(1).sum())
    return (total / directions) ** 0.5


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| with the unbiased within-set means (Szekely & Rizzo 2013); may dip below 0."""
    x, y = _pair(x, y, 2)
    n, m = len(x), len(y)
    between = cdist(x, y).mean()
    within = cdist(x, x).sum() / (n * (n - 1)) + cdist(y, y).sum() / (m * (m - 1))
    return float(2 * between - within)


def energy_distance_shares(x: Tensor, y: Tensor) -> Tensor:
    """`energy_distance` of two sets (m, *d), (m, *d) as a number for each pair (x_i, y_i): (m,), float64. Their mean is the
    distance, and their spread over sqrt(m) its error.

    Unlike a distance of empirical distributions it does not favour samples that spread too little, however few they are. A
    U-statistic of the pairs, which may depend on each other within, with kernel |x_i - y_j| + |x_j - y_i| - |x_i - x_j| -
    |y_i - y_j|: to first order its error is twice that of the mean of what the pairs i contribute.
    """
    x, y = (each.flatten(1).double().cpu() for each in (x, y))
    across = torch.cdist(x, y)
    kernel = (across + across.T - torch.cdist(x, x) - torch.cdist(y, y)).fill_diagonal_(0.0)
    each = kernel.sum(1) / (len(x) - 1)
    return 2 * each - each.mean()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2}) of features x (n, f) and y (m, f).

    Name the features wherever it is quoted ("FD-pixels", "FD-ResNet20"): it is an FID only in Inception-v3's.
    """
    x, y = _pair(x, y, 2)
    mx, my = x.mean(0), y.mean(0)
    cx, cy = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    # tr sqrt(C_x C_y) = tr sqrt(C_x^{1/2} C_y C_x^{1/2}), whose argument is symmetric and non-negative
    values, vectors = np.linalg.eigh(cx)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cy @ root), 0, None)).sum()
    return float(((mx - my) ** 2).sum() + np.trace(cx) + np.trace(cy) - 2 * cross)


def _radii(x: Tensor, k: int, rows: int) -> Tensor:
    """The distance of each of x (n, f) to its k-th nearest neighbour within x: (n,)."""
    # the nearest of all is the point itself
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(rows)])


def precision_recall(samples: Tensor, data: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features samples (n, f) and data (m, f).

    precision: share of the samples that lie in a ball around a datum which reaches to its k-th nearest neighbour among the
    data; recall: the same with the roles exchanged. Both depend on the counts: take as many samples as data.
    """
    if k < 1:
        raise ValueError(f"k counts neighbours from 1, got {k}")
    x, y = _pair(samples, data, k + 1)
    x, y = x - y.mean(0), y - y.mean(0)  # torch.cdist multiplies matrices and loses digits far from 0
    rows = max(1, 20_000_000 // max(len(x), len(y)))
    around_x, around_y = _radii(x, k, rows), _radii(y, k, rows)
    covered_x, covered_y = [], torch.zeros(len(y), dtype=torch.bool)
    for part, reach in zip(x.split(rows), around_x.split(rows), strict=True):
        distance = torch.cdist(part, y)
        covered_x.append((distance <= around_y).any(1))
        covered_y |= (distance <= reach[:, None]).any(0)
    return float(torch.cat(covered_x).double().mean()), float(covered_y.double().mean())


def class_coverage(labels: Tensor, classes: int) -> float:
    """The share of the classes 0 .. classes-1 that get at least half of their fair share of labels (n,)."""
    counts = torch.bincount(labels.cpu(), minlength=classes)
    return float((counts >= len(labels) / (2 * classes)).double().mean())


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The share of (normal, anomalous) pairs in which the anomaly has the higher energy. Both (n,)."""
    from sklearn.metrics import roc_auc_score

    scores = torch.cat([normal.flatten(), anomalous.flatten()]).detach().cpu().double()
    if len(normal) == 0 or len(anomalous) == 0:
        raise ValueError(f"too few samples: AUROC needs both kinds, got {len(normal)} normal and {len(anomalous)} anomalous")
    labels = np.r_[np.zeros(len(normal)), np.ones(len(anomalous))]
    return float(roc_auc_score(labels, scores.numpy()))
