"""Classes: labels of samples, guidance, the network's embedding, labels that are dropped."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, random_params, tiny_config, write_random_run
from PIL import Image

from diffusion_jax import parts, sample, sampling, schedule, step, train, unet
from diffusion_jax.errors import UserError
from diffusion_jax.interop import export, samples
from diffusion_jax.pictures import grids
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs

# ---------------------------------------------------------------- guidance of a Gaussian mixture, whose ε̄ is known

MEANS, DEVIATION = np.array([-1.0, 0.5], np.float32), 0.4


def log_densities(s, x, t):
    """Returns log p_t(x | y) for each class and log p_t(x), for a number x."""
    variance = (s.alpha_bar[t] * DEVIATION) ** 2 + s.beta_bar[t] ** 2
    each = -0.5 * (x - s.alpha_bar[t] * MEANS) ** 2 / variance - 0.5 * jnp.log(variance)
    return each, jax.scipy.special.logsumexp(each) - jnp.log(2.0)


def eps_bar_of(s, log_density):
    """Returns the optimal ε̄ = −β̄_t ∂ log p_t(x)/∂x as a function of x [B, 1], t [B]."""
    one = lambda x, t: -s.beta_bar[t] * jax.grad(log_density)(x, t)  # noqa: E731
    return lambda x, t: jax.vmap(one)(x[:, 0], t)[:, None]


def mixture(s, label):
    conditional = eps_bar_of(s, lambda x, t: log_densities(s, x, t)[0][label])
    return conditional, eps_bar_of(s, lambda x, t: log_densities(s, x, t)[1])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_guidance_sharpens_the_density_of_the_class(rough, weight):
    """ε̄ of p(x | y)^w p(x)^(1 − w), Ho & Salimans (2022)."""
    x, t = np.linspace(-2, 2, 12, dtype=np.float32)[:, None], np.repeat([1, 2, 3, 4], 3)
    for label in (0, 1):

        def tilted(x, t, label=label):
            each, whole = log_densities(rough, x, t)
            return weight * each[label] + (1 - weight) * whole

        guided, expected = sampling.guided(*mixture(rough, label), weight), eps_bar_of(rough, tilted)
        np.testing.assert_allclose(jax.jit(guided)(x, t), jax.jit(expected)(x, t), rtol=1e-4, atol=1e-5)


def test_guidance_in_an_interval_of_steps(rough):
    """Outside of it the plain conditional model; both ends are inside."""
    conditional, unconditional = mixture(rough, 1)
    x, t = np.ones((4, 1), np.float32), np.array([1, 2, 3, 4])
    guided = sampling.guided(conditional, unconditional, 3.0)
    within = sampling.guided(conditional, unconditional, 3.0, (2, 3))
    within, everywhere, plain = (np.asarray(jax.jit(fn)(x, t)) for fn in (within, guided, conditional))
    np.testing.assert_allclose(within, np.where((t[:, None] >= 2) & (t[:, None] <= 3), everywhere, plain), rtol=1e-5)
    assert (abs(everywhere - plain) > 0.05).all()


def test_a_guided_chain_draws_the_class():
    """Each class has its own mean; a larger weight leaves less of the other class and of the variance."""
    s = schedule.cosine(50)
    keys = jax.random.split(jax.random.key(0), 2000)
    x = jax.vmap(lambda key: jax.random.normal(key, (1,)))(keys)
    drawn = {}
    for weight in (1.0, 3.0):
        guided = sampling.guided(*mixture(s, 1), weight)
        drawn[weight] = np.asarray(sampling.reverse_chain(guided, s, schedule.sigma_posterior(s), x, keys))
    assert np.mean(drawn[1.0]) == pytest.approx(0.5, abs=0.05)
    assert np.std(drawn[1.0]) == pytest.approx(DEVIATION, abs=0.05)  # the posterior's variance is a little too small
    assert np.mean(drawn[3.0]) > 0.6 and np.std(drawn[3.0]) < 0.95 * np.std(drawn[1.0])


# ---------------------------------------------------------------- which class an image has


def test_labels_of_images():
    numbers = np.arange(5, 9, dtype=np.uint32)
    assert sampling.class_labels(numbers, 0) is None
    assert sampling.class_labels(numbers, 3).tolist() == [2, 0, 1, 2]
    assert sampling.class_labels(numbers, 3, 3).tolist() == [3] * 4
    assert sampling.class_labels(numbers, 3, [0, 1, 1, 2]).tolist() == [0, 1, 1, 2]
    for labels in (-1, 4, [0, 1], [0, 1, 2, 4], 1.0, [[0, 1, 2, 0]]):
        with pytest.raises(ValueError, match="labels"):
            sampling.class_labels(numbers, 3, labels)
    with pytest.raises(ValueError, match="labels need a model with classes"):
        sampling.class_labels(numbers, 0, 1)


def test_image_i_depends_on_the_key_i_and_its_label_alone(rough):
    def apply_fn(variables, x, t, labels):
        return 0.1 * (labels[:, None, None, None] + variables["params"]) * x

    def sampler(num):
        sigma = schedule.sigma_beta(rough)
        return sampling.make_sample_fn(apply_fn, rough, sigma, (num, 2, 2, 1), num_classes=3)

    rng = jax.random.key(0)
    images = sampler(7)(1.0, rng)
    np.testing.assert_array_equal(sampler(7)(1.0, rng, labels=np.arange(7) % 3), images)
    twos = sampler(4)(1.0, rng, labels=2)
    np.testing.assert_array_equal(twos[2], images[2])
    assert (abs(twos[:2] - images[:2]) > 1e-4).all()
    np.testing.assert_array_equal(sampler(2)(1.0, rng, 5, labels=[2, 0]), images[5:])


# ---------------------------------------------------------------- the network

SMALL = {"channels": 8, "multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4}
X, T = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32), np.array([1, 7])


def test_the_network_with_classes_has_one_more_table():
    plain, with_classes = (
        jax.eval_shape(unet.UNet(**SMALL, num_classes=n).init, jax.random.key(0), X, T)["params"] for n in (0, 5)
    )
    assert with_classes.pop("class_embedding")["embedding"].shape == (6, 32)
    assert jax.tree.map(jnp.shape, with_classes) == jax.tree.map(jnp.shape, plain)


def test_the_embedding_is_added_to_that_of_the_step():
    """A table of zeros gives the network without classes; ∅ is the default; other rows give other noise."""
    model, plain = unet.UNet(**SMALL, num_classes=3), unet.UNet(**SMALL)
    params = random_params(model, X, T)

    @jax.jit
    def out(labels, params=params):
        return model.apply({"params": params}, X, T, labels=labels)

    np.testing.assert_array_equal(out(None), out(np.array([3, 3])))
    assert abs(out(np.array([0, 1])) - out(np.array([1, 1])))[0].max() > 1e-3
    np.testing.assert_array_equal(out(np.array([0, 1]))[1], out(np.array([1, 1]))[1])
    zeros = params | {"class_embedding": {"embedding": np.zeros((4, 32), np.float32)}}
    without = {name: value for name, value in params.items() if name != "class_embedding"}
    expected = jax.jit(plain.apply)({"params": without}, X, T)
    np.testing.assert_allclose(out(np.array([0, 2]), zeros), expected, atol=1e-6)
    with pytest.raises(ValueError, match="labels need a network with classes"):
        plain.apply({"params": params}, X, T, labels=np.array([0, 1]))


@pytest.mark.parametrize("weight, interval, images", [(1.0, (), 2), (0.0, (), 2), (0.0, (2, 3), 4), (2.5, (), 4)])
def test_guidance_is_one_call_of_the_network(monkeypatch, weight, interval, images):
    calls = []

    def network(config):
        def apply_fn(variables, x, t, labels=None):
            labels = np.full(len(x), 10) if labels is None else labels
            calls.append(len(x))
            return x * (1 + labels)[:, None, None, None] / t[:, None, None, None]

        return apply_fn

    monkeypatch.setattr(parts, "network", network)
    config = tiny_config(model__num_classes=10, sampling__guidance_interval=interval)
    x, t, labels = np.ones((2, 1, 1, 1), np.float32), np.array([2, 4]), np.array([3, 8])
    out = parts.guided(config, weight)({}, x, t, labels)
    assert calls == [images]
    w = np.where((t >= interval[0]) & (t <= interval[1]), weight, 1) if interval else np.full(2, weight)
    np.testing.assert_allclose(np.ravel(out), (11 + w * (labels - 10)) / t, rtol=1e-6)


def test_labels_are_dropped_by_a_coin_of_the_example():
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = np.arange(4000) % 7
    dropped = np.asarray(step._dropped(labels, keys, 7, 0.1))
    assert np.mean(dropped == 7) == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(dropped[dropped < 7], labels[dropped < 7])
    np.testing.assert_array_equal(step._dropped(labels[10:20], keys[10:20], 7, 0.1), dropped[10:20])
    np.testing.assert_array_equal(step._dropped(labels, keys, 7, 0.0), labels)
    assert (step._dropped(labels, keys, 7, 1.0) == 7).all()


# ---------------------------------------------------------------- a run


def test_the_number_of_classes_agrees_with_the_data():
    config = tiny_config(model__num_classes="auto")
    resolved = configs.with_classes(config, "abc")
    assert (resolved.model.num_classes, resolved.data.classes) == (3, ("a", "b", "c"))
    assert configs.with_classes(tiny_config(model__num_classes=3), "abc").data.classes == ("a", "b", "c")
    assert configs.with_classes(tiny_config(), "abc").data.classes == ()
    for wanted, classes, message in ((4, "abc", "data have 3 classes"), ("auto", "", "data have no classes")):
        with pytest.raises(UserError, match=message):
            configs.with_classes(tiny_config(model__num_classes=wanted), classes)
    for value in (-1, 2.0, "many", True):
        with pytest.raises(UserError, match=r"config\.model\.num_classes=.* must be an integer in"):
            configs.check(tiny_config(model__num_classes=value))
    for interval in ((1,), (3, 2), (0, 2), (1, 21), (1.0, 2)):
        with pytest.raises(UserError, match=r"config\.sampling\.guidance_interval=.* must be \(\) or two steps"):
            configs.check(tiny_config(sampling__guidance_interval=interval))


def test_a_run_keeps_its_number_of_classes(tmp_path):
    write_random_run(tmp_path)
    with pytest.raises(UserError, match=r"holds another run \(config.model.num_classes: 0 there, 10 here\)"):
        train.train(tiny_config(model__num_classes="auto"), str(tmp_path))


def test_labels_by_name_or_number():
    config = configs.with_classes(tiny_config(model__num_classes="auto"), ("cat", "dog", "7"))
    assert configs.choose(config, ["dog", "0", "7"]) == (1, 0, 2)
    assert configs.choose(config, []) == (0, 1, 2)
    assert configs.choose(tiny_config(), []) is None
    for labels, message in (
        (["cow"], "'cow' is not a class of the run: give some of cat, dog, 7"),
        (["3"], "'3' is not"),
    ):
        with pytest.raises(UserError, match=message):
            configs.choose(config, labels)
    with pytest.raises(UserError, match=r"--labels=cat: the run has no classes"):
        configs.choose(tiny_config(), ["cat"])


def test_a_grid_has_a_row_for_each_class():
    x = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 1), 30, np.uint8)
    sheet = grids.by_class(x, ("cat", "dog"))
    assert sheet.shape[0] < sheet.shape[1]  # two rows of four
    np.testing.assert_array_equal(grids.by_class(x, ()), grids.grid(x))
    none = grids.by_class(x, ("cat", "dog"), np.array([2] * 7))  # one row, of no class
    assert none.shape[0] < sheet.shape[0]


CLASSES = {"model__num_classes": "auto", "train__steps_per_dispatch": 1}


@pytest.fixture(scope="module")
def run_with_classes(small_network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classes")
    return workdir, train.train(tiny_config(**CLASSES), str(workdir))


@pytest.mark.slow
def test_a_run_with_classes_resumes_exactly(run_with_classes, tmp_path):
    workdir, whole = run_with_classes
    train.train(tiny_config(**CLASSES, train__num_steps=3), str(tmp_path))
    assert_same(train.train(tiny_config(**CLASSES), str(tmp_path)), whole)
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["num_classes"] == 10 and config["data"]["classes"] == list("0123456789")
    assert (
        abs(whole.params["class_embedding"]["embedding"] - whole.ema_params["class_embedding"]["embedding"]).max() > 0
    )
    on_device = train.train(tiny_config(**CLASSES, data__on_device=True), str(tmp_path / "device"))
    assert_same(on_device, whole)


@pytest.mark.slow
def test_samples_of_a_run_with_classes(run_with_classes, tmp_path):
    workdir, _ = run_with_classes
    sample_fn, params = sample.load(workdir, num=6, guidance=2.0)
    x = sample_fn(params, jax.random.key(0), labels=[0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(sample_fn(params, jax.random.key(0)), x)
    samples.write_samples(workdir, 6, 0, str(tmp_path / "x.npz"), ["3", "5"], guidance=2.0)
    with np.load(tmp_path / "x.npz") as content:
        assert content["labels"].tolist() == [3, 5, 3, 5, 3, 5]
        about = json.loads(str(content["about"]))
    assert about["classes"] == [3, 5] and about["guidance"] == 2.0
    samples.write_samples(workdir, 20, 0, str(tmp_path / "x.png"), guidance=2.0)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.height > 2 * picture.width  # ten rows of two

    export.export_sampler(workdir, str(tmp_path / "sampler.npz"))
    exported, params = export.load_exported(tmp_path / "sampler.npz")
    guided = exported(params, jax.random.key(0), 6, guidance=2.0)
    np.testing.assert_allclose(guided, x, atol=1e-4)
    assert (exported(params, jax.random.key(0), 6, labels=3) != guided).any()  # by little: it has learnt nothing yet


def test_labels_and_guidance_need_classes(tmp_path):
    write_random_run(tmp_path)
    with pytest.raises(UserError, match=r"guidance=2.0 needs a run with classes"):
        sample.load(tmp_path, guidance=2.0)
    sample_fn, params = sample.load(tmp_path)
    with pytest.raises(ValueError, match="labels need a model with classes"):
        sample_fn(params, jax.random.key(0), labels=1)
    shutil.rmtree(tmp_path / "checkpoints")
    config = workdirs.read_config(tmp_path)
    assert config.model.num_classes == 0
