"""How far samples are from data, as distances between two sets of feature vectors.

Pure functions of arrays of features [n, d], one row an example, of any real type; computed in float64
on the host. `rng` is a `numpy.random.Generator`. A ValueError says which set has the wrong shape, too
few rows, or numbers that are not finite. Distances have the unit of the features, those named squared
its square.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.neighbors import NearestNeighbors

BLOCK = 2**25  # entries of a table that is made at once, 256 MiB


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ of rows, added up batch by batch and host by host.

        moments = Moments.zeros(d)
        for features in batches:
            moments = moments.add(features)

    Sums of deviations, not of products, Chan et al. (1983): a mean far from 0 costs no digits.
    """

    count: int
    mean: np.ndarray  # [d], 0 where the count is
    scatter: np.ndarray  # [d, d]

    @classmethod
    def zeros(cls, d: int):
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, features):
        """Of the rows of features [n, d], n >= 0."""
        x = _rows("features", features, 0)
        if not len(x):
            return cls.zeros(x.shape[1])
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def add(self, features):
        """These rows and those of features [n, d], as a new Moments."""
        return self + Moments.of(features)

    def __add__(self, other):
        if np.shape(self.mean) != np.shape(other.mean):
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features do not add up")
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * (other.count / count))
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self):
        """[d, d], unbiased: scatter / (n − 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet(mean_x, cov_x, mean_y, cov_y) -> float:
    """|μ_x − μ_y|² + tr(C_x + C_y − 2 (C_x C_y)^½), Heusel et al. (2017), (6); squared, >= 0 but for rounding.

    Args:
      mean_x, mean_y: [d].
      cov_x, cov_y: [d, d], symmetric and positive semidefinite; they may be singular.
    """
    mean_x, cov_x, mean_y, cov_y = (np.asarray(a, np.float64) for a in (mean_x, cov_x, mean_y, cov_y))
    d = mean_x.size
    if (mean_x.shape, cov_x.shape, mean_y.shape, cov_y.shape) != ((d,), (d, d), (d,), (d, d)):
        shapes = f"{mean_x.shape}, {cov_x.shape} and {mean_y.shape}, {cov_y.shape}"
        raise ValueError(f"need means [d] and covariances [d, d] of one d, not {shapes}")
    return _frechet(mean_x, _root(cov_x), mean_y, cov_y)


def frechet_of_features(x, y) -> float:
    """`frechet` of the moments of x [n, d] and y [m, d], n, m >= 2.

    With no more rows than features in a set, tr (C_x C_y)^½ is the sum of the singular values of X Yᵀ [n, m],
    X and Y centred, over √((n − 1)(m − 1)): exact where C is singular, and no [d, d] is formed.
    """
    x, y = _pair(x, y, 2)
    if min(len(x), len(y)) > x.shape[1]:
        return _frechet_of_moments(Moments.of(x), Moments.of(y))
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = (x - mean_x) / np.sqrt(len(x) - 1), (y - mean_y) / np.sqrt(len(y) - 1)
    trace_of_root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(x**2) + np.sum(y**2) - 2 * trace_of_root)


def frechet_interval(x, y, rng, num: int = 200, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (low, high) for the mean of `frechet_of_features` over other x [n, d] and y [m, d].

    That is the distance at these n and m, for comparison with others of the same size, not the one of
    infinitely many rows, for which see `frechet_extrapolated`. Rows of both sets are drawn again with
    replacement `num` times. A set drawn so is further off by about as much as a finite set is from an
    infinite one: only the deviations from the draws' mean are used, Davison & Hinkley (1997), 5.2.

    Args:
      y: or `Moments` of a set that stays as it is: then x alone is drawn again.
      level: in (0, 1), how often the interval should hold the mean.
    """
    if num < 2 or not 0 < level < 1:
        raise ValueError(f"need num >= 2 and level in (0, 1), not {num} and {level}")
    if isinstance(y, Moments):
        distance, sets = _frechet_to(y), [_rows_like(y, x, 2)]
    else:
        distance, sets = frechet_of_features, _pair(x, y, 2)
    draws = [distance(*(a[rng.integers(len(a), size=len(a))] for a in sets)) for _ in range(num)]
    tails = np.quantile(draws - np.mean(draws), [(1 + level) / 2, (1 - level) / 2])
    low, high = distance(*sets) - tails
    return float(low), float(high)


def frechet_extrapolated(x, y, rng, num_points: int = 15) -> tuple[float, float]:
    """(intercept, its standard error) of a line in 1/n through `frechet` of n rows of x and all of y.

    FID_∞ of Chong & Forsyth (2020): the distance at n = ∞, as the bias is nearly linear in 1/n; the bias
    that y has by its own size stays. The sizes are evenly spaced from a tenth of the rows to all, but no
    smaller than 2 d, as the bias bends towards n = d (the paper's 5000 is 2.4 d): x [n, d] needs n >= 4 d.
    Each size has a subset of its own without repetition. The standard error is that of the regression; the
    subsets overlap, so another x changes the intercept by more, about twice as much for Gaussians. In place of
    y its `Moments` will do.
    """
    moments = y if isinstance(y, Moments) else Moments.of(_rows("y", y, 2))
    x = _rows_like(moments, x, 2)
    n, d = x.shape
    if n < 4 * d or num_points < 3:
        raise ValueError(f"need at least 4 d = {4 * d} rows of x and 3 points, not {n} and {num_points}")
    sizes = np.linspace(max(n // 10, 2 * d), n, num_points).round().astype(int)
    distance = _frechet_to(moments)
    distances = [distance(x[rng.permutation(n)[:size]]) for size in sizes]
    line = stats.linregress(1 / sizes, distances)
    return float(line.intercept), float(line.intercept_stderr)


def kernel_distance(x, y, rng, num_subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """KID, (mean, its standard error) over subsets of the unbiased MMD², Bińkowski et al. (2018); may be < 0.

    The kernel is (a·b/d + 1)³. Each subset has `subset_size` rows of x [n, d] and as many of y [m, d] without
    repetition. Other subsets may share them: with num_subsets · subset_size far beyond n or m the standard
    error says how well the subsets' mean is known, and too little about another x or y.
    """
    x, y = _pair(x, y, subset_size)
    if num_subsets < 2 or subset_size < 2:
        raise ValueError(f"need 2 subsets of 2 rows or more, not {num_subsets} of {subset_size}")
    distances = []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), subset_size, replace=False)] for rows in (x, y))
        distances.append(_unbiased_mmd2(a, b))
    return float(np.mean(distances)), float(np.std(distances, ddof=1) / np.sqrt(num_subsets))


class PrecisionRecall(NamedTuple):
    """What `precision_recall` finds; all in [0, 1] but the density, whose mean is 1 where the sets are alike."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real, fake, k: int = 3, k_density: int = 5) -> PrecisionRecall:
    """How much of fake [m, d] lies near real [n, d] and the other way round.

    The ball of an example reaches to its k-th nearest neighbour in its own set, itself not counted.
    Precision is the share of fake in a ball of real, recall that of real in a ball of fake, Kynkäänniemi et
    al. (2019), with k. Density is the number of balls of real around an example of fake, over k;
    coverage the share of the balls of real that hold any of fake, Naeem et al. (2020), with k_density.
    What lies on the edge of a ball is in it, as in the papers (the code of Naeem et al. leaves it out), up to rounding.
    """
    most = max(k, k_density)
    if min(k, k_density) < 1:
        raise ValueError(f"need k >= 1 and k_density >= 1, not {k} and {k_density}")
    real, fake = _pair(real, fake, most + 1, k + 1, names=("real", "fake"))
    centre = real.mean(axis=0)
    real, fake = real - centre, fake - centre
    # Squared; an edge is met by rounding alone where fake holds examples of real, so it is widened by a little.
    slack = 1e-12 * max(np.max(np.sum(a**2, axis=1)) for a in (real, fake))
    of_real = NearestNeighbors(n_neighbors=most).fit(real).kneighbors()[0] ** 2 + slack
    of_fake = NearestNeighbors(n_neighbors=k).fit(fake).kneighbors()[0] ** 2 + slack
    nearest_fake = NearestNeighbors(n_neighbors=1).fit(fake).kneighbors(real)[0][:, 0] ** 2
    around_fake = _count_balls(fake, real, of_real[:, [k - 1, k_density - 1]])
    around_real = _count_balls(real, fake, of_fake[:, [k - 1]])
    return PrecisionRecall(
        precision=float(np.mean(around_fake[:, 0] > 0)),
        recall=float(np.mean(around_real[:, 0] > 0)),
        density=float(np.mean(around_fake[:, 1]) / k_density),
        coverage=float(np.mean(nearest_fake <= of_real[:, k_density - 1])),
    )


def sliced_wasserstein(x, y, rng, num_directions: int = 512) -> float:
    """√(mean over directions θ of W_2²(θ·x, θ·y)), Bonneel et al. (2015), θ uniform on the unit sphere.

    Exact on each line for any sizes of x [n, d] and y [m, d]. A shift by v gives about |v| / √d.
    """
    x, y = _pair(x, y, 1)
    if num_directions < 1:
        raise ValueError(f"need at least 1 direction, not {num_directions}")
    n, m = len(x), len(y)
    # Both quantile functions are steps: of x at multiples of m, of y of n, on a scale where all is n m.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(ends, prepend=0) / (n * m)
    directions = rng.standard_normal((x.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    total = 0.0
    for some in np.array_split(directions, -(-num_directions // 64), axis=1):
        of_x, of_y = np.sort(x @ some, axis=0), np.sort(y @ some, axis=0)
        total += np.sum(widths @ (of_x[(ends - 1) // m] - of_y[(ends - 1) // n]) ** 2)
    return float(np.sqrt(total / num_directions))


def nearest(samples, train) -> tuple[np.ndarray, np.ndarray]:
    """(distance [n], index [n]) of the row of train [m, d] nearest to each of samples [n, d], Euclidean.

    A distance of 0 is a copy. `train` is read in blocks, train[a:b], and need not be in memory: a memory map, or
    anything that has a shape besides.
    """
    samples = _rows("samples", samples, 1)
    if train.shape[1:] != samples.shape[1:] or not train.shape[0]:
        raise ValueError(f"need train [m, {samples.shape[1]}], m >= 1, as samples have, not {train.shape}")
    distance, index = np.full(len(samples), np.inf), np.zeros(len(samples), int)
    size = max(1, BLOCK // samples.shape[1])
    for start in range(0, train.shape[0], size):
        block = _rows("train", train[start : start + size], 1)
        at = NearestNeighbors(n_neighbors=1).fit(block).kneighbors(samples, return_distance=False)[:, 0]
        # Again from the differences: |a|² + |b|² − 2 a·b, which finds the neighbours, leaves 1e-8 |a| of a 0.
        found = np.linalg.norm(samples - block[at], axis=1)
        index = np.where(found < distance, start + at, index)
        distance = np.minimum(found, distance)
    return distance, index


def _rows(name, x, least):
    """X as float64 [n, d], finite, n >= least."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} must be rows of features, [n, d], not {x.shape}")
    if len(x) < least:
        raise ValueError(f"{name} must have at least {least} rows, not {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite: {np.sum(~np.isfinite(x).all(axis=1))} of {len(x)} rows are not")
    return x


def _pair(x, y, least, least_y=None, names=("x", "y")):
    """Both as `_rows` gives them, of one d."""
    x, y = _rows(names[0], x, least), _rows(names[1], y, least_y or least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} has {x.shape[1]} features and {names[1]} {y.shape[1]}: need the same")
    return x, y


def _root(cov):
    """C^½ of a positive semidefinite C; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def _frechet(mean_x, root_x, mean_y, cov_y):
    """`frechet` with R = C_x^½ in hand: tr (C_x C_y)^½ = tr (R C_y R)^½, where everything is symmetric and >= 0."""
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root_x @ cov_y @ root_x), 0)).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(root_x**2) + np.trace(cov_y) - 2 * trace_of_root)


def _frechet_to(y: Moments):
    """rows -> `frechet` of their moments and y, whose root is taken once."""
    mean, root = y.mean, _root(y.covariance)

    def distance(rows):
        moments = Moments.of(rows)
        return _frechet(mean, root, moments.mean, moments.covariance)

    return distance


def _rows_like(y: Moments, x, least):
    """X as `_rows` gives it, of as many features as y."""
    x = _rows("x", x, least)
    if x.shape[1] != len(y.mean):
        raise ValueError(f"x has {x.shape[1]} features and y {len(y.mean)}: need the same")
    return x


def _frechet_of_moments(x: Moments, y: Moments):
    return _frechet(x.mean, _root(x.covariance), y.mean, y.covariance)


def _unbiased_mmd2(x, y):
    """Of equally many rows; a row is not paired with itself."""
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2 * xy.mean()


def _count_balls(points, centres, squared_radii):
    """Int [n, j]: in how many of the balls each of points [n, d] lies, for each column of squared_radii [m, j]."""
    bounds = (np.sum(centres**2, axis=1)[:, None] - squared_radii).T
    size = max(1, BLOCK // len(centres))
    counts = []
    for start in range(0, len(points), size):
        block = points[start : start + size]
        table = 2 * (block @ centres.T) - np.sum(block**2, axis=1)[:, None]  # |c|² − |p − c|²
        counts.append(np.stack([np.sum(table >= bound, axis=1) for bound in bounds], axis=1))
    return np.concatenate(counts)
