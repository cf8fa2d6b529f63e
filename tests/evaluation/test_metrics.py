import itertools

import numpy as np
import pytest
import threadpoolctl
from scipy import linalg

from diffusion_jax.evaluation import metrics
from diffusion_jax.evaluation.metrics import Moments
from tools import frechet_coverage


@pytest.fixture(autouse=True)
def one_thread():
    """Limits BLAS to one thread: threads that compete for the cores take 50 times as long."""
    with threadpoolctl.threadpool_limits(1):
        yield


def rng(seed=0):
    return np.random.default_rng(seed)


def rotation(d):
    return np.linalg.qr(rng(99).standard_normal((d, d)))[0]


def spread(n, d, seed=0):
    """Returns correlated features whose axes differ in scale and whose mean is not 0."""
    generator = rng(seed)
    return generator.standard_normal((n, d)) * np.linspace(0.5, 2, d) @ rotation(d) + generator.standard_normal(d)


@pytest.mark.parametrize("cuts", [[], [0], [1], [50], [1, 2, 3], [16, 32, 48], [7, 7, 40, 50]])
def test_streamed_moments_are_those_of_all_rows(cuts):
    x = spread(50, 6)
    parts = np.split(x, cuts)
    streamed = Moments.zeros(6)
    for part in parts:
        streamed = streamed.add(part)
    merged = sum(reversed([Moments.of(part) for part in parts]), Moments.zeros(6))
    for moments in (streamed, merged, Moments.of(x)):
        assert moments.count == 50
        np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-12, atol=1e-14)


def test_moments_are_float64_and_immutable():
    x = rng().standard_normal((40, 3)).astype(np.float32)
    moments = Moments.of(x[:10])
    before = moments.scatter.copy()
    more = moments.add(x[10:])
    assert moments.count == 10 and more.count == 40
    np.testing.assert_array_equal(moments.scatter, before)
    assert more.mean.dtype == more.scatter.dtype == np.float64
    np.testing.assert_allclose(more.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(Moments.of(np.uint8([[0], [255], [255]])).mean, [170])


def test_moments_far_from_0_keep_their_digits():
    x = rng().standard_normal((1000, 2))
    far = sum((Moments.of(batch + 1e6) for batch in np.split(x, [0, 1, 300])), Moments.zeros(2))
    np.testing.assert_allclose(far.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_frechet_of_commuting_covariances():
    """The distance is |μ_x − μ_y|² + Σ (σ_x − σ_y)², in any axes."""
    axes = rotation(3)
    mean_x, mean_y = np.array([0.5, 0, 1]), np.array([0, 2.0, 1])
    cov_x, cov_y = (axes * np.square(scale) @ axes.T for scale in ([1, 2, 0.5], [3, 2.5, 0]))
    assert metrics.frechet(mean_x, cov_x, mean_y, cov_y) == pytest.approx(4.25 + 4 + 0.25 + 0.25, rel=1e-7)
    assert metrics.frechet(mean_x, cov_x, mean_x, cov_x) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-14)


def test_frechet_against_the_square_root_of_a_matrix():
    d = 512
    x, y = Moments.of(spread(2 * d, d)), Moments.of(rng(1).standard_normal((3 * d, d)) ** 3)
    root = linalg.sqrtm(x.covariance @ y.covariance).real
    expected = np.sum((x.mean - y.mean) ** 2) + np.trace(x.covariance + y.covariance - 2 * root)
    assert metrics.frechet(x.mean, x.covariance, y.mean, y.covariance) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, m", [(5, 7), (5, 40), (40, 5), (8, 8), (9, 9), (10, 10), (30, 40), (2, 2)])
def test_frechet_of_features_equals_frechet_of_their_moments(n, m):
    x, y = spread(n, 9), spread(m, 9, seed=1)
    expected = metrics.frechet(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert metrics.frechet_of_features(x, y) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_of_features(y, x) == pytest.approx(expected, rel=1e-6)
    turned = metrics.frechet_of_features(x @ rotation(9), y @ rotation(9))
    assert turned == pytest.approx(metrics.frechet_of_features(x, y), rel=1e-9)


def test_frechet_of_few_rows_forms_no_covariance():
    """A matrix [d, d] would take 2 TiB."""
    x = np.zeros((3, 2**19))
    x[0, :2] = 1, 2
    # Both covariances have rank 1, along the same line: |μ|² + (σ − 2 σ)² with |μ|² = 5/9, σ² = 5/3.
    assert metrics.frechet_of_features(x, 2 * x) == pytest.approx(5 / 9 + 5 / 3)


def jackknife(x, y):
    """Returns the variance of the distance over new x: by its derivatives with respect to the weight of each row."""
    n, epsilon = len(x), 1e-4

    def distance(weights):
        mean = weights @ x
        cov = (x - mean).T * weights @ (x - mean) * n / (n - 1)
        return metrics.frechet(mean, cov, y.mean(axis=0), np.cov(y, rowvar=False))

    def derivative(i):
        moved = [(1 - e) / n + e * (np.arange(n) == i) for e in (epsilon, -epsilon)]
        return (distance(moved[0]) - distance(moved[1])) / (2 * epsilon)

    return np.var([derivative(i) for i in range(n)], ddof=1) / n


@pytest.mark.parametrize("n, m", [(5, 7), (5, 40), (40, 5), (9, 9), (10, 30), (30, 40)])
def test_standard_error_sums_the_influences_of_the_rows(n, m):
    x, y = spread(n, 9) ** 3, 2 * spread(m, 9, seed=1)
    of_x, of_y = jackknife(x, y), jackknife(y, x)
    assert metrics.frechet_standard_error(x, y) == pytest.approx((of_x + of_y) ** 0.5, rel=1e-3)
    assert metrics.frechet_standard_error(y, x) == pytest.approx((of_x + of_y) ** 0.5, rel=1e-3)
    assert metrics.frechet_standard_error(x, Moments.of(y)) == pytest.approx(of_x**0.5, rel=1e-3)
    assert metrics.frechet_standard_error(y, Moments.of(x)) == pytest.approx(of_y**0.5, rel=1e-3)


def test_standard_error_with_features_of_unlike_scales():
    x, y = spread(30, 2), spread(40, 2, seed=1)
    x, y = x * [1, 1e-3], y * [1, 1e3]
    assert metrics.frechet_standard_error(x, Moments.of(y)) == pytest.approx(jackknife(x, y) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("n, m", [(50, 60), (5, 60), (60, 5), (50, 7)])
def test_matrices_are_as_small_as_can_be(n, m, monkeypatch):
    sizes = []
    for name in ("eigh", "eigvalsh"):
        plain = getattr(np.linalg, name)
        monkeypatch.setattr(np.linalg, name, lambda a, plain=plain: sizes.append(len(a)) or plain(a))
    x, y = spread(n, 9), spread(m, 9, seed=1)
    metrics.frechet_of_features(x, y)
    metrics.frechet_standard_error(x, y)
    assert len(sizes) >= 2 and max(sizes) == min(n, m, 9)


def test_standard_error_of_sets_without_spread():
    x = np.zeros((6, 3))
    assert metrics.frechet_standard_error(x, x + 1) == metrics.frechet_standard_error(x, Moments.of(x)) == 0
    padded = np.pad(spread(40, 3), ((0, 0), (0, 2)))  # two features are 0, as the margins of digits are
    plain = metrics.frechet_standard_error(padded[:, :3], spread(40, 3, seed=1))
    assert metrics.frechet_standard_error(padded, np.pad(spread(40, 3, seed=1), ((0, 0), (0, 2)))) == pytest.approx(
        plain
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", frechet_coverage.CASES)
def test_standard_error_covers_the_mean_of_new_sets(case):
    """Two standard errors contain the mean as often as docs/evaluation.md says, less than chance may take off."""
    _, deviation, error, coverage = frechet_coverage.simulate(case, 400)
    heavy = case.name.startswith("log-normal")
    assert (0.86 if heavy else 0.92) < coverage and 0.95 < error / deviation < 2


@pytest.mark.parametrize("sigma", [1, 2])
def test_extrapolation_finds_the_intercept_of_gaussians(sigma):
    """x ~ N(0, 1)^d against rows with exactly mean 0 and covariance σ²: the distance is d (σ − 1)² at n = ∞."""
    d, n, repeats = 8, 400, 100
    y = sigma * np.concatenate([np.eye(d), -np.eye(d)]) * np.sqrt((2 * d - 1) / 2)
    xs = [rng(seed).standard_normal((n, d)) for seed in range(repeats)]
    plain = np.array([metrics.frechet_of_features(x, y) for x in xs])
    intercepts, errors = np.array([metrics.frechet_extrapolated(x, y, rng(i)) for i, x in enumerate(xs)]).T
    # The mean adds E |mean|² = d / n, and the root adds σ times E tr (C_x − 1)² / 4 = d (d + 1) / (4 n).
    bias = (d + sigma * d * (d + 1) / 4) / n

    def error_of_mean(values):
        return np.std(values, ddof=1) / np.sqrt(repeats)

    corrected = plain - intercepts
    assert 4 * error_of_mean(corrected) < 0.6 * bias  # otherwise the next two assertions prove nothing
    assert np.mean(corrected) == pytest.approx(bias, abs=4 * error_of_mean(corrected))
    assert np.mean(intercepts) == pytest.approx(d * (sigma - 1) ** 2, abs=4 * error_of_mean(intercepts))
    assert 0.85 < np.mean(errors) / np.std(intercepts) < 1.4


def test_extrapolation_draws_from_all_rows():
    x, y = np.sort(rng().standard_normal((400, 1)), axis=0), rng(1).standard_normal((400, 1))
    intercept, error = metrics.frechet_extrapolated(x, y, rng())
    assert intercept == pytest.approx(metrics.frechet_of_features(x, y), abs=0.05)
    assert error < 0.1
    assert metrics.frechet_extrapolated(x, y, rng()) == (intercept, error) != metrics.frechet_extrapolated(x, y, rng(1))


def test_extrapolation_adds_the_errors_of_the_line_and_of_the_rows(monkeypatch):
    x, y = spread(60, 3), spread(50, 3, seed=1)
    both = metrics.frechet_extrapolated(x, y, rng())[1]
    of_rows = metrics.frechet_standard_error(x, Moments.of(y))
    monkeypatch.setattr(metrics, "frechet_standard_error", lambda x, y: 0)
    of_line = metrics.frechet_extrapolated(x, y, rng())[1]
    assert of_line > 0 and both**2 == pytest.approx(of_line**2 + of_rows**2)


def test_extrapolation_of_an_exact_line(monkeypatch):
    sizes = []

    def distance(mean_y, root_y, mean_x, cov_x):
        assert mean_y == 7 and root_y == pytest.approx(np.std([6, 7, 8], ddof=1))
        sizes.append(round(float(mean_x[0])))
        return 3 + 50 / sizes[-1]

    class Sized(Moments):
        @classmethod
        def of(cls, x):
            return Moments(len(x), x[:1].ravel() * 0 + len(x), np.eye(1)) if len(x) > 3 else Moments.of(x)

    monkeypatch.setattr(metrics, "_frechet", distance)
    monkeypatch.setattr(metrics, "frechet_standard_error", lambda x, y: 0.5)
    monkeypatch.setattr(metrics, "Moments", Sized)
    x, y = rng().standard_normal((1000, 1)), np.array([[6.0], [7.0], [8.0]])
    assert metrics.frechet_extrapolated(x, y, rng(), num_points=10) == pytest.approx((3, 0.5), abs=1e-6)
    assert sizes == list(range(100, 1001, 100))


def test_extrapolation_uses_no_singular_covariance(monkeypatch):
    ranks = []
    plain = metrics._frechet
    monkeypatch.setattr(metrics, "_frechet", lambda *a: ranks.append(np.linalg.matrix_rank(a[3])) or plain(*a))
    metrics.frechet_extrapolated(spread(90, 9), spread(30, 9, seed=1), rng(), num_points=4)
    assert len(ranks) == 4 and min(ranks) == 9
    with pytest.raises(ValueError, match="at least 10 d = 90 rows of x and 3 points, not 89"):
        metrics.frechet_extrapolated(spread(89, 9), spread(30, 9), rng())


def test_extrapolation_from_few_rows_for_each_feature():
    """With 10 rows for each of 32 features, the line takes off all of the bias but for 1 part in 20."""
    d, repeats = 32, 60
    y = Moments(10**6, np.zeros(d), np.eye(d) * (10**6 - 1))  # the distribution of x itself: the distance is 0
    xs = [rng(seed).standard_normal((10 * d, d)) for seed in range(repeats)]
    results = np.array([metrics.frechet_extrapolated(x, y, rng(i), num_points=8) for i, x in enumerate(xs)])
    biased = np.mean([metrics.frechet(0 * y.mean, np.cov(x, rowvar=False), y.mean, y.covariance) for x in xs])
    assert abs(np.mean(results[:, 0])) < 0.05 * biased
    assert np.mean(np.abs(results[:, 0]) < 2 * results[:, 1]) > 0.85


def double_loop(x, y):
    """Returns the unbiased MMD² by its definition."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_equals_its_definition():
    x, y = spread(5, 2), spread(5, 2, seed=1)
    mean, error = metrics.kernel_distance(x, y, rng(), num_subsets=3, subset_size=5)
    assert mean == pytest.approx(double_loop(x, y), rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_kernel_distance_by_subsets():
    x, y = spread(4, 2), spread(3, 2, seed=1)
    pairs = [[rows[list(i)] for i in itertools.combinations(range(len(rows)), 2)] for rows in (x, y)]
    values = [double_loop(a, b) for a in pairs[0] for b in pairs[1]]
    results = np.array([metrics.kernel_distance(x, y, rng(seed), 40, 2) for seed in range(50)])
    error = np.std(values) / np.sqrt(40)
    assert np.mean(results[:, 0]) == pytest.approx(np.mean(values), abs=4 * error / np.sqrt(50))
    assert np.mean(values) == pytest.approx(double_loop(x, y))  # unbiased for any subset size
    assert np.mean(results[:, 1]) == pytest.approx(error, rel=0.1)
    assert np.std(results[:, 0]) == pytest.approx(error, rel=0.3)
    errors_of_2 = [metrics.kernel_distance(x, y, rng(seed), 2, 2)[1] for seed in range(1000)]
    assert np.mean(np.square(errors_of_2)) == pytest.approx(np.var(values) / 2, rel=0.2)  # the variance is unbiased too


def test_precision_recall_of_points_on_a_line():
    """With k = 1 the balls of real have radius 1, and those of fake have radii 1, 1, 7 and 7."""
    real = np.array([[0.0], [1.0], [10.0], [11.0], [100.0], [101.0]])
    fake = np.array([[0.5], [1.5], [13.0], [20.0]])
    result = metrics.precision_recall(real, fake, k=1, k_density=1)
    assert result == pytest.approx((2 / 4, 4 / 6, 3 / 4, 2 / 6))
    assert (result.precision, result.recall, result.density, result.coverage) == result
    # With the sets exchanged, the examples of real lie in 1, 2, 1, 1, 0, 0 balls of fake, and the last ball is empty.
    assert metrics.precision_recall(fake, real, k=1, k_density=1) == pytest.approx((4 / 6, 2 / 4, 5 / 6, 3 / 4))


def brute_force(real, fake, k, k_density):
    def within(points, centres, k):
        radii = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)] for p in points])

    precision, recall = within(fake, real, k).any(axis=1).mean(), within(real, fake, k).any(axis=1).mean()
    balls = within(fake, real, k_density)
    return precision, recall, balls.sum(axis=1).mean() / k_density, balls.any(axis=0).mean()


@pytest.mark.parametrize("k, k_density", [(3, 5), (5, 3), (1, 2)])
@pytest.mark.parametrize("d", [2, 20])
def test_precision_recall_by_brute_force(k, k_density, d, monkeypatch):
    real, fake = spread(40, d), 0.7 * spread(31, d) + 0.2
    expected = brute_force(real, fake, k, k_density)
    assert len({0, 1, *expected}) >= 5
    assert metrics.precision_recall(real, fake, k, k_density) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK", 100)
    assert metrics.precision_recall(real, fake, k, k_density) == pytest.approx(expected)


def test_precision_recall_includes_edges_despite_rounding():
    """A copy lies in its own ball, and on average on the edges of k others."""
    real = rng().standard_normal((60, 64)).astype(np.float32)
    for shift in (0, 1e4):
        result = metrics.precision_recall(real + shift, rng(1).permutation(real) + shift)
        assert result == pytest.approx((1, 1, 6 / 5, 1))
    twice = np.repeat(real[:7], 8, axis=0)  # every ball has the radius 0
    assert metrics.precision_recall(twice, twice) == pytest.approx((1, 1, 8 / 5, 1))
    twice = twice.astype(np.float64) + 1e4
    assert metrics.precision_recall(twice, twice) == pytest.approx((1, 1, 8 / 5, 1))
    assert metrics.precision_recall(twice, twice + 1e-3) == pytest.approx((0, 0, 0, 0))


def test_precision_recall_defaults():
    real, fake = spread(40, 3), 0.7 * spread(30, 3) + 0.2
    assert metrics.precision_recall(real, fake) == pytest.approx(brute_force(real, fake, 3, 5))


@pytest.mark.parametrize("num_directions", [1, 64, 130])
def test_sliced_wasserstein_on_a_line(num_directions):
    """In one dimension every direction is ±1, so the distance is W_2 itself."""

    def distance(x, y):
        return metrics.sliced_wasserstein(np.c_[x], np.c_[y], rng(), num_directions)

    x = rng().standard_normal(30)
    assert distance(x, rng(1).permutation(x) - 2.5) == pytest.approx(2.5)
    assert distance([0.0], [-1.0, 1.0]) == pytest.approx(1)
    # In masses of 1/6, the sets are 0 0 0 3 3 3 and 0 0 1 1 2 2.
    assert (
        distance([3.0, 0.0], [1.0, 0.0, 2.0]) == distance([1.0, 0.0, 2.0], [3.0, 0.0]) == pytest.approx((7 / 6) ** 0.5)
    )
    assert distance(np.repeat(x, 3), 2 * x) == pytest.approx(np.sqrt(np.mean(x**2)))


def test_sliced_wasserstein_in_space():
    """A shift by v gives |v| / √d in any axes, because E (θ·v)² = |v|² / d."""
    x, v = spread(20, 5), np.array([3.0, 0, 4, 0, 0])
    for turn in (np.eye(5), rotation(5)):
        distance = metrics.sliced_wasserstein(x @ turn, (x + v) @ turn, rng(), num_directions=4000)
        assert distance == pytest.approx(np.sqrt(5), rel=0.04)
    y = spread(30, 5, seed=1)
    plain = metrics.sliced_wasserstein(x, y, rng())
    assert metrics.sliced_wasserstein(y, x, rng()) == pytest.approx(plain)
    assert metrics.sliced_wasserstein(x @ rotation(5), y @ rotation(5), rng(1)) == pytest.approx(plain, rel=0.1)
    assert metrics.sliced_wasserstein(3 * x, 3 * y, rng()) == pytest.approx(3 * plain)
    assert metrics.sliced_wasserstein(x, np.repeat(x, 2, axis=0), rng()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("block", [None, 7 * 30])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_nearest_finds_copies_exactly(block, dtype, monkeypatch):
    if block:
        monkeypatch.setattr(metrics, "BLOCK", block)
    train = rng().integers(0, 256, (50, 30)).astype(dtype)
    samples = np.concatenate([train[[49, 0, 6, 7]], rng(1).integers(0, 256, (20, 30)).astype(dtype)])
    distance, index = metrics.nearest(samples, train)
    table = np.linalg.norm(samples[:, None].astype(float) - train, axis=2)
    np.testing.assert_array_equal(index, table.argmin(axis=1))
    np.testing.assert_allclose(distance, table.min(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(distance[:4], 0)
    assert np.issubdtype(index.dtype, np.integer)
    far = rng().standard_normal((50, 30)) + 1e3
    np.testing.assert_array_equal(metrics.nearest(far, far), [np.zeros(50), np.arange(50)])


ONE = np.zeros((1, 3))
TEN = np.arange(30.0).reshape(10, 3)
BROKEN = np.where(np.arange(30).reshape(10, 3) == 4, np.nan, TEN)
FOUR_D = np.zeros((10, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Moments.of(np.zeros(3)), r"features must be rows of features, \[n, d\], not \(3,\)"),
        (lambda: Moments.of(np.zeros((3, 0))), r"not \(3, 0\)"),
        (lambda: Moments.zeros(3).add(FOUR_D), "moments of 3 and of 4 features"),
        (lambda: Moments.of(ONE).covariance, "at least 2 rows, not 1"),
        (lambda: metrics.frechet([0, 0], np.eye(2), [0, 0, 0], np.eye(3)), r"\(2,\), \(2, 2\) and \(3,\), \(3, 3\)"),
        (lambda: metrics.frechet([0, 0], np.eye(3), [0, 0], np.eye(2)), r"not \(2,\), \(3, 3\)"),
        (lambda: metrics.frechet_of_features(TEN, FOUR_D), "x has 3 features and y has 4"),
        (lambda: metrics.frechet_of_features(TEN, ONE), "y must have at least 2 rows, not 1"),
        (lambda: metrics.frechet_of_features(BROKEN, TEN), "x must be finite: 1 of 10 rows are not"),
        (lambda: metrics.frechet([0, 0], np.eye(2) * np.nan, [0, 0], np.eye(2)), "must be finite"),
        (lambda: metrics.frechet([0, 0], np.eye(2), [0, np.inf], np.eye(2)), "must be finite"),
        (lambda: Moments(9, np.zeros(2), np.full((2, 2), np.nan)), "moments of 9 rows must be finite"),
        (lambda: Moments(9, np.array([0, np.inf]), np.eye(2)), "moments of 9 rows must be finite"),
        (lambda: Moments(9, np.zeros(2), np.eye(3)), r"not \(2,\) and \(3, 3\)"),
        (lambda: metrics.frechet_standard_error(TEN, ONE), "must have at least 2 rows, not 1"),
        (lambda: metrics.frechet_standard_error(TEN, BROKEN), "y must be finite"),
        (lambda: metrics.frechet_extrapolated(np.ones((12, 3)), TEN, rng(), num_points=2), "3 points, not 12 and 2"),
        (lambda: metrics.frechet_extrapolated(np.ones((12, 3)), ONE, rng()), "y must have at least 2 rows"),
        (lambda: metrics.kernel_distance(TEN, TEN, rng()), "x must have at least 1000 rows, not 10"),
        (lambda: metrics.kernel_distance(TEN, TEN, rng(), num_subsets=1, subset_size=5), "not 1 of 5"),
        (lambda: metrics.kernel_distance(TEN, TEN, rng(), subset_size=1), "not 100 of 1"),
        (lambda: metrics.precision_recall(TEN[:5], TEN), "real must have at least 6 rows, not 5"),
        (lambda: metrics.precision_recall(TEN, TEN[:3]), "fake must have at least 4 rows, not 3"),
        (lambda: metrics.precision_recall(TEN, FOUR_D), "real has 3 features and fake has 4"),
        (lambda: metrics.precision_recall(TEN, TEN, k=0), "k >= 1"),
        (lambda: metrics.sliced_wasserstein(TEN, TEN, rng(), 0), "at least 1 direction"),
        (lambda: metrics.sliced_wasserstein(TEN, TEN[:0], rng()), "y must have at least 1 rows"),
        (lambda: metrics.nearest(TEN, FOUR_D), r"need train \[m, 3\] with m >= 1, to match samples, not \(10, 4\)"),
        (lambda: metrics.nearest(TEN, TEN[:0]), r"not \(0, 3\)"),
        (lambda: metrics.nearest(TEN, BROKEN), "train must be finite"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_moments_may_replace_the_reference():
    """The extrapolation stays the same."""
    generator = rng(0)
    x, y = generator.standard_normal((120, 3)), generator.standard_normal((150, 3)) + 0.5
    moments = metrics.Moments.of(y)
    assert metrics.frechet_extrapolated(x, moments, rng(1)) == metrics.frechet_extrapolated(x, y, rng(1))
    for formula in (metrics.frechet_standard_error, lambda *args: metrics.frechet_extrapolated(*args, rng())):
        with pytest.raises(ValueError, match="x has 2 features and y has 3"):
            formula(x[:, :2], moments)


def test_frechet_within_classes_is_a_mean_with_an_error():
    """The marginals are equal, but two classes are swapped, which only the distance within classes sees."""
    y_labels, x_labels = np.arange(300) % 3, np.arange(150) % 3
    y = spread(300, 4) + 5 * y_labels[:, None]
    x = spread(150, 4, seed=1) + 5 * x_labels[:, None]
    each = [(x[x_labels == k], y[y_labels == k]) for k in range(3)]
    distance, error = metrics.frechet_within_classes(x, x_labels, y, y_labels)
    assert distance == pytest.approx(np.mean([metrics.frechet_of_features(a, b) for a, b in each]))
    errors = [metrics.frechet_standard_error(a, b) for a, b in each]
    assert error == pytest.approx(np.sqrt(np.sum(np.square(errors))) / 3)
    swapped, _ = metrics.frechet_within_classes(x, np.array([1, 0, 2])[x_labels], y, y_labels)
    assert swapped > distance + 50
    only, _ = metrics.frechet_within_classes(x[x_labels == 1], np.ones(50, int), y, y_labels)
    assert only == pytest.approx(metrics.frechet_of_features(*each[1]))
    with pytest.raises(ValueError, match="class 7 has 0 rows in a set, too few for 4 features"):
        metrics.frechet_within_classes(x, np.full(150, 7), y, y_labels)
    with pytest.raises(ValueError, match="class 0 has 4 rows"):
        metrics.frechet_within_classes(x[:12], x_labels[:12], y, y_labels)
    with pytest.raises(ValueError, match="a label for each row"):
        metrics.frechet_within_classes(x, x_labels[:3], y, y_labels)
