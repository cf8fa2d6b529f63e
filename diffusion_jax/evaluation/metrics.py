"""Distances between samples and data, each a set of feature vectors.

The functions are pure, and compute in float64 on the host. They take features [n, d] of any real type,
one row for each example. They raise ValueError if a set has the wrong shape, too few rows, or values
that are not finite. A distance has the unit of the features, a squared distance the square of the unit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import tqdm
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.neighbors import NearestNeighbors

BLOCK = 2**25  # largest number of entries of a temporary table, 256 MiB
EXTRAPOLATED = 10  # rows for each feature that an extrapolation needs at least


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter Σ (x − mean)(x − mean)ᵀ of rows; moments of batches and of hosts add up.

        moments = Moments.zeros(d)
        for features in batches:
            moments = moments.add(features)

    Deviations are summed, not products (Chan et al. 1983), so a mean far from 0 costs no precision.
    Arrays of other shapes, or with values that are not finite, raise ValueError.
    """

    count: int
    mean: np.ndarray  # [d], 0 if the count is 0
    scatter: np.ndarray  # [d, d]

    def __post_init__(self) -> None:
        d = np.size(self.mean)
        if (np.shape(self.mean), np.shape(self.scatter)) != ((d,), (d, d)):
            shapes = f"{np.shape(self.mean)} and {np.shape(self.scatter)}"
            raise ValueError(f"moments need a mean [d] and a scatter [d, d], not {shapes}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scatter).all()):
            raise ValueError(f"moments of {self.count} rows must be finite")

    @classmethod
    def zeros(cls, d: int) -> Self:
        """Returns the moments of no rows of d features."""
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, features: ArrayLike) -> Self:
        """Returns the moments of the rows of features [n, d], n >= 0."""
        x = _rows("features", features, 0)
        if not len(x):
            return cls.zeros(x.shape[1])
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def add(self, features: ArrayLike) -> "Moments":
        """Returns new moments that also count the rows of features [n, d]."""
        return self + Moments.of(features)

    def __add__(self, other: "Moments") -> "Moments":
        if np.shape(self.mean) != np.shape(other.mean):
            raise ValueError(
                f"moments of {len(self.mean)} and of {len(other.mean)} features do not add up: need the same number"
            )
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * (other.count / count))
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [d, d], scatter / (n − 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet(mean_x: ArrayLike, cov_x: ArrayLike, mean_y: ArrayLike, cov_y: ArrayLike) -> float:
    """|μ_x − μ_y|² + tr(C_x + C_y − 2 (C_x C_y)^½), the squared distance of Heusel et al. (2017), (6).

    Rounding may make it slightly negative.

    Args:
      mean_x: [d].
      cov_x: [d, d], symmetric and positive semidefinite; it may be singular.
      mean_y: [d].
      cov_y: [d, d], as cov_x.
    """
    mean_x, cov_x, mean_y, cov_y = (np.asarray(a, np.float64) for a in (mean_x, cov_x, mean_y, cov_y))
    d = mean_x.size
    if (mean_x.shape, cov_x.shape, mean_y.shape, cov_y.shape) != ((d,), (d, d), (d,), (d, d)):
        shapes = f"{mean_x.shape}, {cov_x.shape} and {mean_y.shape}, {cov_y.shape}"
        raise ValueError(f"need means [d] and covariances [d, d] of the same d, not {shapes}")
    if not all(np.isfinite(a).all() for a in (mean_x, cov_x, mean_y, cov_y)):
        raise ValueError("means and covariances must be finite")
    return _frechet(mean_x, _root(cov_x), mean_y, cov_y)


def frechet_of_features(x: ArrayLike, y: ArrayLike) -> float:
    """Returns `frechet` of the moments of x [n, d] and y [m, d], n, m >= 2.

    If a set has no more rows than features, tr (C_x C_y)^½ is tr (M Mᵀ)^½, where M = X Yᵀ [n, m] multiplies the
    centred rows over √(n − 1) and √(m − 1). That is exact for a singular C, and forms no [d, d] matrix.
    """
    x, y = _pair(x, y, 2)
    if min(len(x), len(y)) > x.shape[1]:
        return _frechet_of_moments(Moments.of(x), Moments.of(y))
    (mean_x, a), (mean_y, b) = map(_centred, sorted((x, y), key=len))
    product = a @ b.T
    squares = np.linalg.eigvalsh(product @ product.T)[1:]  # without the 0 of the centring, whose root is inexact
    trace_of_root = np.sqrt(np.maximum(squares, 0)).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * trace_of_root)


def frechet_standard_error(x: ArrayLike, y: ArrayLike | Moments) -> float:
    """Returns the standard error of `frechet_of_features` over new sets x and y of the same sizes n and m.

    It describes the scatter about the mean at these sizes, which is above the distance at n = ∞ (see
    `frechet_extrapolated`). The method is the infinitesimal jackknife (Efron 1982, chapter 6): the weight of a row of
    x at c from the mean changes the distance by 2 (μ_x − μ_y)·c + cᵀ (I − T) c n / (n − 1), where T carries
    N(0, C_x) to N(0, C_y). For all rows, cᵀ T c / (n − 1) is the diagonal of (M Mᵀ)^½, with M as in
    `frechet_of_features`. The error is too large on average, as that of every jackknife. With heavy tails
    it is too small for most sets and far too large for a few.

    Args:
      x: [n, d], n >= 2.
      y: [m, d], m >= 2, or the `Moments` of a fixed set; the error is then that over new sets x.
    """
    fixed = isinstance(y, Moments)
    x, y = (_rows_like(y, x, 2), y) if isinstance(y, Moments) else sorted(_pair(x, y, 2), key=len)
    mean_x, a = _centred(x)
    mean_y, b = (y.mean, _root(y.covariance)) if isinstance(y, Moments) else _centred(y)  # bᵀ b = C_y
    factor, whitened = a, np.eye(len(a))  # a = whitened · factor, and factorᵀ factor = C_x
    if len(a) > a.shape[1]:
        scale, vectors = _roots(a.T @ a)
        factor, whitened = scale[:, None] * vectors.T, a @ vectors * _inverse(scale)
    product = b @ factor.T
    roots, vectors = _roots(product.T @ product)
    variance = _variance_of_mean(a, mean_x - mean_y, (whitened @ vectors) ** 2 @ roots)
    if not fixed:
        variance += _variance_of_mean(b, mean_y - mean_x, (product @ vectors) ** 2 @ _inverse(roots))
    return float(np.sqrt(variance))


def frechet_extrapolated(
    x: ArrayLike, y: ArrayLike | Moments, rng: Generator, num_points: int = 15
) -> tuple[float, float]:
    """Returns the intercept, and its standard error, of a line in 1/n through `frechet` of n rows of x and all of y.

    This is FID_∞ of Chong & Forsyth (2020): the bias is nearly linear in 1/n, so the intercept is the distance
    at n = ∞. The bias from the size of y remains. The sizes are evenly spaced from a tenth of the rows to all
    rows, but at least 5 d, because the bias bends towards n = d: from 5 d the line takes off about 103 % of it for
    white Gaussians, from 2 d 110 %. Each size has its own subset, drawn without repetition. The variance is that of
    the regression plus that of `frechet_standard_error`, as the subsets share the rows of x.

    Args:
      x: [n, d], n >= 10 d.
      y: [m, d], or its `Moments`.
      rng: draws the subsets.
      num_points: the number of sizes, at least 3.
    """
    moments = y if isinstance(y, Moments) else Moments.of(_rows("y", y, 2))
    x = _rows_like(moments, x, 2)
    n, d = x.shape
    if n < EXTRAPOLATED * d or num_points < 3:
        raise ValueError(
            f"need at least {EXTRAPOLATED} d = {EXTRAPOLATED * d} rows of x and 3 points, not {n} and {num_points}"
        )
    sizes = np.linspace(max(n // 10, 5 * d), n, num_points).round().astype(int)
    distance = _frechet_to(moments)
    distances = [distance(x[rng.permutation(n)[:size]]) for size in sizes]
    line = stats.linregress(1 / sizes, distances)
    return float(line.intercept), float(np.hypot(line.intercept_stderr, frechet_standard_error(x, moments)))


def frechet_within_classes(x: ArrayLike, x_labels: ArrayLike, y: ArrayLike, y_labels: ArrayLike) -> tuple[float, float]:
    """Returns the mean over the classes of x of `frechet` within a class, and its standard error.

    The error is that over new sets of the same sizes: classes share no row, so their squared errors add up.

    Args:
      x: [n, d].
      x_labels: int [n].
      y: [m, d].
      y_labels: int [m].

    Raises:
      ValueError: a class of x has no more than d rows of x or of y, where the distance is mostly bias.
    """
    x, y = _pair(x, y, 1)
    x_labels, y_labels = np.asarray(x_labels), np.asarray(y_labels)
    if (x_labels.shape, y_labels.shape) != (x.shape[:1], y.shape[:1]):
        raise ValueError(
            f"need a label for each row, not {x_labels.shape} for {x.shape}, {y_labels.shape} for {y.shape}"
        )
    pairs = [(label, x[x_labels == label], y[y_labels == label]) for label in np.unique(x_labels)]
    for label, a, b in pairs:
        if (least := min(len(a), len(b))) <= x.shape[1]:
            raise ValueError(f"class {label} has {least} rows in a set, too few for {x.shape[1]} features")
    errors = [frechet_standard_error(a, b) for _, a, b in pairs]
    distance = np.mean([frechet_of_features(a, b) for _, a, b in pairs])
    return float(distance), float(np.linalg.norm(errors) / len(errors))


def kernel_distance(
    x: ArrayLike, y: ArrayLike, rng: Generator, num_subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Returns KID (Bińkowski et al. 2018): the mean of the unbiased MMD² over subsets, and its standard error.

    The kernel is (a·b/d + 1)³. The estimate may be negative. Each subset has `subset_size` rows of x and as
    many of y, without repetition, but subsets may share rows. If num_subsets · subset_size far exceeds n or m,
    the standard error describes the mean over subsets, and underestimates the change with another x or y.

    Args:
      x: [n, d], n >= subset_size.
      y: [m, d], m >= subset_size.
      rng: draws the subsets.
      num_subsets: at least 2.
      subset_size: at least 2.
    """
    x, y = _pair(x, y, subset_size)
    if num_subsets < 2 or subset_size < 2:
        raise ValueError(f"need at least 2 subsets of at least 2 rows, not {num_subsets} of {subset_size}")
    distances = []
    for _ in range(num_subsets):
        a, b = (rows[rng.choice(len(rows), subset_size, replace=False)] for rows in (x, y))
        distances.append(_unbiased_mmd2(a, b))
    return float(np.mean(distances)), float(np.std(distances, ddof=1) / np.sqrt(num_subsets))


class PrecisionRecall(NamedTuple):
    """The result of `precision_recall`: in [0, 1], except the density, whose mean for equal distributions is 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3, k_density: int = 5) -> PrecisionRecall:
    """Returns precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of an example reaches to its k-th nearest neighbour in its own set, not counting the example itself.
    Precision is the share of fake examples in a ball of real, and recall the share of real examples in a ball of
    fake, both with k. Density is the mean number of balls of real that contain a fake example, over k, and
    coverage the share of balls of real that contain any fake example, both with k_density. A ball contains its
    edge up to rounding, as in the papers; the code of Naeem et al. excludes it.

    Args:
      real: [n, d], n > max(k, k_density).
      fake: [m, d], m > k.
      k: at least 1.
      k_density: at least 1.
    """
    k_max = max(k, k_density)
    if min(k, k_density) < 1:
        raise ValueError(f"need k >= 1 and k_density >= 1, not {k} and {k_density}")
    real_rows, fake_rows = _pair(real, fake, k_max + 1, k + 1, names=("real", "fake"))
    centre = real_rows.mean(axis=0)
    real_rows, fake_rows = real_rows - centre, fake_rows - centre
    # Squared radii, widened by a slack: rounding must not decide about an example that is in both sets.
    slack = 1e-12 * max(np.max(np.sum(a**2, axis=1)) for a in (real_rows, fake_rows))
    radii_real = NearestNeighbors(n_neighbors=k_max).fit(real_rows).kneighbors()[0] ** 2 + slack
    radii_fake = NearestNeighbors(n_neighbors=k).fit(fake_rows).kneighbors()[0] ** 2 + slack
    nearest_fake = NearestNeighbors(n_neighbors=1).fit(fake_rows).kneighbors(real_rows)[0][:, 0] ** 2
    counts_fake = _count_balls(fake_rows, real_rows, radii_real[:, [k - 1, k_density - 1]])
    counts_real = _count_balls(real_rows, fake_rows, radii_fake[:, [k - 1]])
    return PrecisionRecall(
        precision=float(np.mean(counts_fake[:, 0] > 0)),
        recall=float(np.mean(counts_real[:, 0] > 0)),
        density=float(np.mean(counts_fake[:, 1]) / k_density),
        coverage=float(np.mean(nearest_fake <= radii_real[:, k_density - 1])),
    )


def sliced_wasserstein(x: ArrayLike, y: ArrayLike, rng: Generator, num_directions: int = 512) -> float:
    """√(mean over directions θ of W_2²(θ·x, θ·y)), Bonneel et al. (2015), with θ uniform on the unit sphere.

    The distance along each direction is exact for sets of any sizes. A shift of a set by v gives about |v| / √d.

    Args:
      x: [n, d], n >= 1.
      y: [m, d], m >= 1.
      rng: draws the directions.
      num_directions: at least 1.
    """
    x, y = _pair(x, y, 1)
    if num_directions < 1:
        raise ValueError(f"need at least 1 direction, not {num_directions}")
    n, m = len(x), len(y)
    # Both quantile functions are step functions. On a scale of length n m, that of x has its steps at multiples of m,
    # and that of y at multiples of n.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(ends, prepend=0) / (n * m)
    directions = rng.standard_normal((x.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    total = 0.0
    for block in np.array_split(directions, -(-num_directions // 64), axis=1):
        sorted_x, sorted_y = np.sort(x @ block, axis=0), np.sort(y @ block, axis=0)
        total += np.sum(widths @ (sorted_x[(ends - 1) // m] - sorted_y[(ends - 1) // n]) ** 2)
    return float(np.sqrt(total / num_directions))


def nearest(samples: ArrayLike, train: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the Euclidean distance to the nearest training row of each sample, and the index of that row.

    A distance of 0 is a copy.

    Args:
      samples: [n, d].
      train: [m, d]. It is read in blocks, train[a:b], so a memory map or any other object with a
        shape and slices will do.

    Returns:
      (distances [n], indices [n]).
    """
    samples = _rows("samples", samples, 1)
    if train.shape[1:] != samples.shape[1:] or not train.shape[0]:
        raise ValueError(f"need train [m, {samples.shape[1]}] with m >= 1, to match samples, not {train.shape}")
    distances, indices = np.full(len(samples), np.inf), np.zeros(len(samples), int)
    size = max(1, BLOCK // samples.shape[1])
    for start in tqdm.tqdm(range(0, train.shape[0], size), desc="nearest training images", delay=2, leave=False):
        block = _rows("train", train[start : start + size], 1)
        rows = NearestNeighbors(n_neighbors=1).fit(block).kneighbors(samples, return_distance=False)[:, 0]
        # The search uses |a|² + |b|² − 2 a·b, which turns a distance of 0 into 1e-8 |a|. Differences are exact.
        block_distances = np.linalg.norm(samples - block[rows], axis=1)
        indices = np.where(block_distances < distances, start + rows, indices)
        distances = np.minimum(block_distances, distances)
    return distances, indices


def _rows(name: str, x: ArrayLike, min_rows: int) -> np.ndarray:
    """Returns `x` as float64 [n, d], after checking that it is finite and n >= min_rows."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"{name} must be rows of features, [n, d], not {x.shape}")
    if len(x) < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows, not {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite: {np.sum(~np.isfinite(x).all(axis=1))} of {len(x)} rows are not")
    return x


def _pair(
    x: ArrayLike, y: ArrayLike, min_rows: int, min_rows_y: int | None = None, names: tuple[str, str] = ("x", "y")
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets as `_rows` does, after checking that their d is the same."""
    x, y = _rows(names[0], x, min_rows), _rows(names[1], y, min_rows_y or min_rows)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} has {x.shape[1]} features and {names[1]} has {y.shape[1]}: need the same number")
    return x, y


def _centred(x):
    """Returns (mean [d], deviations from it over √(n − 1) [n, d], whose squares sum to the covariance)."""
    mean = x.mean(axis=0)
    return mean, (x - mean) / np.sqrt(len(x) - 1)


def _roots(cov):
    """Returns the roots of the eigenvalues of a positive semidefinite C, and its eigenvectors.

    Eigenvalues that rounding made negative count as 0.
    """
    values, vectors = np.linalg.eigh(cov)
    return np.sqrt(np.maximum(values, 0)), vectors


def _root(cov):
    """Returns C^½ of a positive semidefinite C."""
    roots, vectors = _roots(cov)
    return vectors * roots @ vectors.T


def _inverse(roots):
    """Returns 1 / roots, and 0 for those that are 0 up to rounding."""
    return np.divide(1, roots, out=np.zeros_like(roots), where=roots > 1e-7 * roots.max())


def _variance_of_mean(a, shift, carried):
    """Returns the variance of the influences of rows, over their number.

    Args:
      a: [n, d], deviations from `_centred`.
      shift: [d], the mean of the set less that of the other set.
      carried: [n], aᵀ T a for each row.
    """
    influences = 2 * np.sqrt(len(a) - 1) * (a @ shift) + len(a) * (np.sum(a**2, axis=1) - carried)
    return np.var(influences, ddof=1) / len(a)


def _frechet(mean_x, root_x, mean_y, cov_y):
    """Returns `frechet` from R = C_x^½: tr (C_x C_y)^½ = tr (R C_y R)^½, and R C_y R is symmetric and >= 0."""
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root_x @ cov_y @ root_x), 0)).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(root_x**2) + np.trace(cov_y) - 2 * trace_of_root)


def _frechet_to(y: Moments) -> Callable[[np.ndarray], float]:
    """Returns a function of rows: `frechet` of their moments and y. It takes the root of y's covariance only once."""
    mean, root = y.mean, _root(y.covariance)

    def distance(rows):
        moments = Moments.of(rows)
        return _frechet(mean, root, moments.mean, moments.covariance)

    return distance


def _rows_like(y: Moments, x: ArrayLike, min_rows: int) -> np.ndarray:
    """Returns `x` as `_rows` does, after checking that it has as many features as y."""
    x = _rows("x", x, min_rows)
    if x.shape[1] != len(y.mean):
        raise ValueError(f"x has {x.shape[1]} features and y has {len(y.mean)}: need the same number")
    return x


def _frechet_of_moments(x: Moments, y: Moments):
    return _frechet(x.mean, _root(x.covariance), y.mean, y.covariance)


def _unbiased_mmd2(x, y):
    """Returns the unbiased MMD² of two sets of equally many rows, where no row is paired with itself."""
    n, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2 * xy.mean()


def _count_balls(points, centres, squared_radii):
    """Returns int [n, j]: the number of balls that contain each of points [n, d], by column of squared_radii [m, j]."""
    bounds = (np.sum(centres**2, axis=1)[:, None] - squared_radii).T
    size = max(1, BLOCK // len(centres))
    counts = []
    for start in range(0, len(points), size):
        block = points[start : start + size]
        table = 2 * (block @ centres.T) - np.sum(block**2, axis=1)[:, None]  # |c|² − |p − c|²
        counts.append(np.stack([np.sum(table >= bound, axis=1) for bound in bounds], axis=1))
    return np.concatenate(counts)
