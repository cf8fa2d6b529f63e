"""The evaluation of a run: its numbers equal those of the functions, survive interruptions and state their protocol."""

import json
import math

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import likelihood, parts, sample, train
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import bound, evaluate, quality
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.running import workdir as workdirs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(train__num_steps=3, data__split="train[:100]", data__test_split="train[100:130]")
    train.train(config, str(workdir))
    return workdir


def folder(run):
    return run / "evaluation" / "3"


def test_bound_equals_that_of_all_images_at_once(run):
    """The evaluation takes batches of 8 on 4 devices, of which the last is not full; `likelihood.vlb` takes all."""
    result = evaluate.evaluate(run, seed=5, num=21)
    config = workdirs.read_config(run)
    _, params = sample.ema_params(parts.build(config), run)
    network, s, sigma = parts.network(config), parts.schedule(config), parts.sigma(config)
    for split, first in (("train[:100]", 0), ("train[100:130]", 100)):
        values = result["splits"][split]
        assert (values["n"], values["of"]) == (21, 100 if first == 0 else 30)
        chosen = np.sort(np.random.default_rng(5).permutation(values["of"])[:21])
        config.data.split = split
        images = parts.images(config)[chosen]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), chosen)
        x_0 = images.astype(np.float32) / 127.5 - 1
        expected = likelihood.vlb(
            lambda x, t: network({"params": params}, x, t), s, sigma, x_0, keys, clip=parts.clip(config)
        )
        for name, key in (("bits_per_dim", "total"), ("prior", "prior"), ("decoder", "decoder"), ("rate", "rate")):
            assert values[name] == pytest.approx(float(expected[key]), rel=1e-4), name
        assert values["distortion"] == pytest.approx(float(expected["distortion"]), rel=1e-4)
        with np.load(folder(run) / f"bound-{evaluate._stem(split)}.npz") as partial:
            total = partial["each"][:, 0]
        assert total.mean() == values["bits_per_dim"]
        assert values["standard_error"] == pytest.approx(total.std(ddof=1) / math.sqrt(21))
        assert values["rate_distortion"]["rate"][0] == pytest.approx(values["rate"], rel=1e-5)
        assert values["rate_distortion"]["distortion"][0] == pytest.approx(values["distortion"], rel=1e-5)
        assert len(values["loss_by_t"]["loss"]) == 20
        assert values["loss"] == pytest.approx(np.mean(values["loss_by_t"]["loss"]), rel=1e-4)
    assert json.loads((folder(run) / "evaluation.json").read_text()) == result
    text = (folder(run) / "evaluation.md").read_text()
    for piece in (
        "step 3",
        "sigma beta",
        "clipped to [-1.0, 1.0]",
        "posterior sigma of t = 2",
        "seed 5",
        "train[:100]",
    ):
        assert piece in text


def test_interrupted_evaluation_resumes(run, monkeypatch):
    whole = evaluate.evaluate(run, seed=6, num=20)["splits"]
    for file in folder(run).glob("bound-*"):
        file.unlink()
    write, batches = bound._write_partial, []

    def stop_after_2(*args):
        write(*args)
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bound, "_write_partial", stop_after_2)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, seed=6, num=20)
    assert evaluate.evaluate(run, seed=6, num=20)["splits"] == whole
    assert len(batches) == 2 + 1 + 3  # of 20 images in batches of 8: two, the third, and three of the other split
    evaluate.evaluate(run, seed=6, num=20)
    assert len(batches) == 6  # nothing is left to do
    evaluate.evaluate(run, seed=7, num=20)
    assert len(batches) == 12  # other noise, other images


def test_samples_are_compared_with_the_first_split(run, tmp_path):
    write_samples(run, 40, 0, str(tmp_path / "samples.npz"))
    values = evaluate.evaluate(run, num=8, samples=str(tmp_path / "samples.npz"))["samples"]
    generated = np.load(tmp_path / "samples.npz")["arr_0"]
    config = workdirs.read_config(run)
    real = parts.images(config)[:]
    x, y = quality.pixels(generated), quality.pixels(real)
    assert values["frechet"] == pytest.approx(quality.metrics.frechet_of_features(x, y))
    assert values["frechet_95"][0] < values["frechet"] < values["frechet_95"][1]
    assert values["frechet_extrapolated"] is None  # 40 images of 64 numbers
    assert 0 < values["frechet_floor"] < values["frechet"]
    assert values["protocol"]["samples"]["n"] == 40
    assert values["protocol"]["reference"]["n"] == 100
    assert values["protocol"]["reference"]["features"] == "pixels"
    least = min(np.linalg.norm(y - row, axis=1).min() for row in x)
    assert values["nearest_training_image"]["least"] == pytest.approx(least, rel=1e-5)
    config.data.split = "train[100:130]"
    held_out = [np.linalg.norm(y - row, axis=1).min() for row in quality.pixels(parts.images(config)[:])]
    assert values["nearest_training_image"]["median_of_held_out"] == pytest.approx(np.median(held_out), rel=1e-5)
    with Image.open(folder(run) / "nearest.png") as picture:
        assert picture.height > 2 * 64
    statistics = folder(run) / "statistics-pixels-train--100.npz"
    both = evaluate.evaluate(run, num=8, samples=str(tmp_path / "samples.npz"), reference=str(statistics))
    again = both["samples_to_statistics"]
    assert again["frechet"] == pytest.approx(values["frechet"])
    assert again["frechet_95"][0] < again["frechet"] < again["frechet_95"][1]
    assert again["protocol"]["metrics"]["frechet_95"] == {"method": "bootstrap", "draws": 200, "drawn_again": "samples"}
    assert both["samples"] == values  # the section of the earlier evaluation stays
    text = (folder(run) / "evaluation.md").read_text()
    assert "## Samples\n" in text and "## Samples against saved statistics\n" in text
    assert evaluate.evaluate(run, num=8)["samples"] == values


def test_protocol_of_samples_states_their_origin(run, tmp_path):
    write_samples(run, 9, 3, str(tmp_path / "samples.npz"), sampler="ddim", steps=5)
    write_samples(run, 9, 3, f"{tmp_path}/shards/", sampler="ddim", steps=5)
    np.savez(tmp_path / "bare.npz", np.load(tmp_path / "samples.npz")["arr_0"])
    made_by = {}
    for name in ("samples.npz", "shards", "bare.npz"):
        protocol = evaluate.evaluate(run, seed=4, num=2, samples=str(tmp_path / name))["samples"]["protocol"]
        made_by[name] = protocol["samples"]["made_by"]
    assert made_by["bare.npz"] == "unknown"
    assert made_by["samples.npz"] == made_by["shards"] | {"first": 0, "num": 9}
    assert (made_by["shards"]["step"], made_by["shards"]["steps"], made_by["shards"]["seed"]) == (3, 5, 3)
    assert protocol["metrics"] == {
        "frechet_95": {"method": "bootstrap", "draws": 200, "drawn_again": "samples and reference"},
        "kernel_distance": {"kernel": "(a·b/d + 1)³", "num_subsets": 100, "subset_size": 9},
        "precision_recall": {"k": 3},
        "density_coverage": {"k": 5},
        "sliced_wasserstein": {"num_directions": 512},
        "seed": 4,
        "nearest_training_image": {
            "distance": "Euclidean, all pixels, in [-1, 1]",
            **{"n": 9, "training_images": 100, "held_out_images": 30},
        },
    }
    text = (folder(run) / "evaluation.md").read_text()
    for piece in ("num_subsets 100, subset_size 9", "precision_recall: k 3", "made_by: unknown", "held_out_images 30"):
        assert piece in text


def test_unusable_arguments_are_refused(run, tmp_path):
    write_samples(run, 5, 0, str(tmp_path / "samples.npz"))
    samples = str(tmp_path / "samples.npz")
    images = np.zeros((5, 8, 8, 1), np.uint8)
    protocol = quality.protocol(images, "pixels", "", "bicubic", "x")
    statistics = str(tmp_path / "statistics.npz")
    quality.save_statistics(statistics, quality.moments(images, quality.pixels), protocol)
    with pytest.raises(UserError, match=r"different protocols .*resize: bicubic, antialiased.* and bicubic\)"):
        evaluate.evaluate(run, num=2, samples=samples, reference=statistics)
    with pytest.raises(UserError, match=r"reference=.*npz needs --samples to compare with"):
        evaluate.evaluate(run, num=2, reference=statistics)
    with pytest.raises(UserError, match=r"--reference=.*samples\.npz holds no statistics"):
        evaluate.evaluate(run, num=2, samples=samples, reference=samples)
    with pytest.raises(UserError, match=r"--samples=.*statistics\.npz holds no samples"):
        evaluate.evaluate(run, num=2, samples=statistics)
    np.savez(tmp_path / "other.npz", np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(UserError, match=r"holds images of \(4, 4, 1\), but the run's are \(8, 8, 1\)"):
        evaluate.evaluate(run, num=2, samples=str(tmp_path / "other.npz"))
    with pytest.raises(UserError, match=r"split='test': the digits"):
        evaluate.evaluate(run, num=2, splits=("test",))
    with pytest.raises(UserError, match="holds no run"):
        evaluate.evaluate(tmp_path)
    for num in (0, -3):
        with pytest.raises(UserError, match=f"--num={num} must be at least 1"):
            evaluate.evaluate(run, num=num)


def test_statistics_count_every_image_once():
    """The last batch is not full, and is neither dropped nor counted twice."""
    images = np.random.default_rng(0).integers(0, 256, (300, 2, 2, 1), np.uint8)
    moments = quality.moments(images, quality.pixels)
    assert moments.count == 300
    x = quality.pixels(images).astype(np.float64)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(quality.extract(images, quality.pixels), quality.pixels(images))


def test_too_many_features_are_refused():
    images = np.zeros((3, 40, 40, 3), np.uint8)
    protocol = quality.protocol(images, "a", "", "", "")
    with pytest.raises(UserError, match="4800 features are more than the 4096"):
        quality.frechet_to_statistics(images, quality.pixels, protocol, None, protocol)


def test_coders_of_constants_coins_and_noise():
    rng = np.random.default_rng(0)
    constant = np.full((400, 4, 4, 1), 7, np.uint8)
    coin = rng.choice(np.array([0, 255], np.uint8), (4000, 4, 4, 1))
    noise = rng.integers(0, 256, (4000, 4, 4, 3), np.uint8)
    assert bound.histogram_bits(constant) < 0.05 and bound.png_bits(constant) < 0.3
    assert 1 < bound.histogram_bits(coin) < 1.35
    assert 8 < bound.histogram_bits(noise) < 8.3
    assert 8 < bound.png_bits(noise) < 8.6
    one = np.array([3, 3, 5], np.uint8).reshape(3, 1, 1, 1)
    a = 1 / 256
    expected = -math.log2(a / 1 * (1 + a) / 2 * a / 3) / 3
    assert bound.histogram_bits(one) == pytest.approx(expected)
