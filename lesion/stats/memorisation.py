"""Are synthetic tiles new, or copies of training tiles?

Each tile's nearest training tile over the 8 dihedral views, by pixels and by features; a copy is a tile nearer than
99 % of held-out real tiles are. `relative` distance: to the nearest training tile over that to the 5th nearest, after
the adaptive threshold of Carlini et al. (arXiv:2301.13188): a tile of plain skin has many near neighbours
without being a copy of any. `three_sample` is the test of Meehan et al. (arXiv:2004.05675) for copying that is spread
thin. Proven by tests/stats/test_memorisation.py: brute force, planted copies of real tiles, level by simulation.
"""
from dataclasses import dataclass

import numpy as np
from scipy import stats

SIDE = 16          # pixels across at which tiles are compared, 0.94 mm each: noise and JPEG average out
NEIGHBOUR = 5      # up to 4 near-duplicates of one training tile do not hide its copy
FALSE_ALARMS = 0.01
BLOCK = 512        # queries compared at once: [BLOCK, N] distances in float32


def views(images: np.ndarray) -> list[np.ndarray]:
    """The 8 dihedral views of images [M,R,R,...], numbered as in lesion.tiles.views: v % 4 quarter turns, then mirrored if v >= 4."""
    turned = [np.rot90(images, turns, (1, 2)) for turns in range(4)]
    return turned + [view[:, :, ::-1] for view in turned]


def pixel_vectors(images_u8: np.ndarray) -> np.ndarray:
    """Tiles [M,R,R,3] uint8, R a multiple of 16, as unit vectors [M,768] float32: area means at 16 px, each channel's
    mean removed, the whole divided by its length.

    Brightness, colour cast and contrast are so left out: generators drift in them, and a darker copy is a copy. A tile
    with less than one grey level of contrast is divided by that level instead.
    """
    m, side = images_u8.shape[:2]
    if images_u8.ndim != 4 or images_u8.shape[2] != side or side % SIDE:
        raise ValueError(f"tiles of shape {images_u8.shape}: squares with a side that {SIDE} divides are needed")
    block, vectors = side // SIDE, np.empty((m, SIDE * SIDE, 3), np.float32)
    for start in range(0, m, BLOCK):
        part = images_u8[start:start + BLOCK]
        rows = part.reshape(len(part), SIDE, block, SIDE, block, 3).sum(2, dtype=np.uint32)
        vectors[start:start + BLOCK] = rows.sum(3).reshape(len(part), -1, 3)
    vectors /= block ** 2
    vectors -= vectors.mean(1, keepdims=True)
    length = np.linalg.norm(vectors.reshape(m, -1), axis=1)
    return vectors.reshape(m, -1) / np.maximum(length, np.sqrt(3) * SIDE)[:, None]


@dataclass(frozen=True)
class Nearest:
    """Of each query tile, all [M]: index of the nearest training tile, the view in which the query comes nearest to it,
    its distance, and the relative distance (0 = the training tile itself, 1 = one of several equally near)."""
    index: np.ndarray
    view: np.ndarray
    distance: np.ndarray
    relative: np.ndarray


def nearest(queries: list[np.ndarray], training: np.ndarray, neighbour: int = NEIGHBOUR) -> Nearest:
    """Search training vectors [N,D] for each tile of `queries`: a list of its views' vectors, each [M,D].

    Euclidean distances |q|^2 - 2 q.t + |t|^2 by float32 products, `BLOCK` queries at a time, least over the views; the
    nearest one's is then computed again in full, as that form loses digits near 0. ValueError if N < `neighbour`.
    """
    training = np.ascontiguousarray(training, dtype=np.float32)
    if len(training) < neighbour:
        raise ValueError(f"{len(training)} training tiles are too few: at least {neighbour} are needed")
    m = len(queries[0])
    index, view = np.empty(m, np.int64), np.empty(m, np.int64)
    distance, relative = np.empty(m), np.empty(m)
    lengths = (training ** 2).sum(1)
    for start in range(0, m, BLOCK):
        block = [np.ascontiguousarray(part[start:start + BLOCK], dtype=np.float32) for part in queries]
        rows = np.arange(len(block[0]))
        squared = np.full((len(rows), len(training)), np.inf, np.float32)
        for part in block:
            product = part @ training.T
            product *= -2
            product += lengths
            product += (part ** 2).sum(1)[:, None]
            np.minimum(squared, product, out=squared)
        close = np.argpartition(squared, neighbour - 1, axis=1)[:, :neighbour]
        around = training[close].astype(np.float64)  # [block, neighbour, D]
        exact = np.stack([np.linalg.norm(part[:, None] - around, axis=2) for part in block])
        by_view, exact = exact.argmin(0), exact.min(0)  # [block, neighbour]
        first = exact.argmin(1)
        stop = start + len(rows)
        index[start:stop], view[start:stop] = close[rows, first], by_view[rows, first]
        distance[start:stop] = exact[rows, first]
        furthest = exact.max(1)
        relative[start:stop] = np.divide(distance[start:stop], furthest, out=np.zeros(len(rows)), where=furthest > 0)
    return Nearest(index, view, distance, relative)


def nearest_pixels(images_u8: np.ndarray, training: np.ndarray) -> Nearest:
    """`nearest` of tiles [M,R,R,3] uint8 in their 8 views among `pixel_vectors` [N,768] of the training tiles."""
    vectors = pixel_vectors(images_u8).reshape(-1, SIDE, SIDE, 3)
    return nearest([view.reshape(len(vectors), -1) for view in views(vectors)], training)


def thresholds(held_out: np.ndarray, false_alarms: float = FALSE_ALARMS) -> np.ndarray:
    """Relative distances [S] below which a tile is called a copy, from held-out real tiles' [H,S] under S measures.

    For S = 1 the k-th smallest of the held-out tiles', k = floor(false_alarms (H + 1)): the 1st percentile, and a
    further real tile falls below it with probability k / (H + 1) <= false_alarms, whatever the distribution (conformal
    prediction). For S > 1 the same, lower rank in every measure, such that the alarms of all together are as rare.
    ValueError if k < S: so few tiles cannot calibrate so rare an alarm.
    """
    held_out = np.asarray(held_out, dtype=np.float64)
    if not np.isfinite(held_out).all():
        raise ValueError("distances of held-out tiles are not finite")
    measures = held_out.shape[1]
    k = int(np.floor(false_alarms * (len(held_out) + 1) + 1e-9))
    if k < measures:
        raise ValueError(f"{len(held_out)} held-out real tiles cannot calibrate {false_alarms:.0%} false alarms: at "
                         f"least {int(np.ceil(measures / false_alarms)) - 1} are needed")
    ranks = stats.rankdata(held_out, method="min", axis=0).astype(np.int64)
    lowest = np.sort(ranks.min(1))
    # k - S held-out tiles are below in any measure; a further tile may take the place of the limit in each of S
    return np.sort(held_out, axis=0)[lowest[k - measures] - 1]


def copies(relative: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """[M] bool: tiles whose relative distance [M,S] is below the limit [S] in any measure."""
    return (np.asarray(relative) < limits).any(1)


# -------------------------------------------------------------------------------- three-sample test

@dataclass(frozen=True)
class ThreeSample:
    """z and one-sided p of the whole; c_t and its p over cells (None without); cells: one row each, cell, n, m, z."""
    z: float
    p: float
    c_t: float | None
    c_t_p: float | None
    cells: list[dict]


def three_sample(synthetic: np.ndarray, held_out: np.ndarray, synthetic_cells: np.ndarray | None = None,
                 held_out_cells: np.ndarray | None = None, least: int = 10) -> ThreeSample:
    """Do synthetic tiles lie nearer to the training tiles than held-out real ones do? (Meehan et al., arXiv:2004.05675)

    synthetic [M], held_out [N]: each tile's distance to its nearest training tile. U: the Mann-Whitney count of pairs in
    which the synthetic tile is the further one, ties half. z = (U - NM/2) / sqrt(NM/12 (N+M+1 - sum (t^3 - t) / ((N+M)
    (N+M-1)))), t the sizes of groups of equal distances (exact copies are all 0 away): below 0 is copying, above 0
    under-fitting; 0 where all distances are equal. With cells [M], [N] (`cells`): c_t = mean of the cells' z weighted by
    their shares of held-out tiles, over cells with at least `least` of each kind; its null spread is the root of the
    summed squared weights. It finds a generator that copies in one region and is far off elsewhere. p: one-sided, of no
    copying.
    """
    synthetic, held_out = np.asarray(synthetic, float), np.asarray(held_out, float)
    for name, distances in (("synthetic", synthetic), ("held-out", held_out)):
        if not len(distances) or not np.isfinite(distances).all():
            raise ValueError(f"the three-sample test needs finite distances of {name} tiles, got {len(distances)}")
    z = _mann_whitney_z(synthetic, held_out)
    rows = []
    for cell in [] if synthetic_cells is None else np.union1d(synthetic_cells, held_out_cells):
        own, other = synthetic[synthetic_cells == cell], held_out[held_out_cells == cell]
        tested = len(own) >= least and len(other) >= least
        rows.append({"cell": int(cell), "held_out": len(other), "synthetic": len(own),
                     "z": _mann_whitney_z(own, other) if tested else None})
    tested = [row for row in rows if row["z"] is not None]
    if not tested:
        return ThreeSample(z, float(stats.norm.cdf(z)), None, None, rows)
    weights = np.array([row["held_out"] for row in tested], float)
    weights /= weights.sum()
    c_t = float(weights @ [row["z"] for row in tested])
    c_t_p = float(stats.norm.cdf(c_t / np.sqrt((weights ** 2).sum())))
    return ThreeSample(z, float(stats.norm.cdf(z)), c_t, c_t_p, rows)


def _mann_whitney_z(x, y):
    u = stats.mannwhitneyu(x, y, method="asymptotic").statistic  # pairs with x above y, ties half
    m, n = len(x), len(y)
    ties = np.unique(np.concatenate([x, y]), return_counts=True)[1].astype(float)
    spread = m * n / 12 * (m + n + 1 - (ties ** 3 - ties).sum() / ((m + n) * (m + n - 1)))
    return 0.0 if spread <= 0 else float((u - m * n / 2) / np.sqrt(spread))


def cells(training: np.ndarray, *others: np.ndarray, count: int = 10, seed: int = 0) -> list[np.ndarray]:
    """Cell of each vector of `others` [M,D] in a k-means partition of the training vectors [N,D] into `count` cells."""
    from sklearn.cluster import KMeans
    model = KMeans(min(count, len(training)), n_init=1, random_state=seed).fit(training.astype(np.float32))
    return [model.predict(vectors.astype(np.float32)) for vectors in others]
