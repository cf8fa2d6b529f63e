"""The evaluation of a run: the numbers are those of the functions, whatever stops it, and say how they were made."""

import json
import math

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import likelihood, parts, sample, train
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import evaluate, quality
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.running import workdir as workdirs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(train__num_steps=3, data__split="train[:100]", data__test_split="train[100:130]")
    train.train(config, str(workdir))
    return workdir


def folder(run):
    return run / "evaluation" / "3"


def test_the_bound_of_a_split(run):
    """Against `likelihood.vlb` on the same images at once, which 4 devices share in batches of 8, the last not full."""
    found = evaluate.evaluate(run, seed=5, num=21)
    config = workdirs.read_config(run)
    _, params = sample.ema_params(parts.build(config), run)
    network, s, sigma = parts.network(config), parts.schedule(config), parts.sigma(config)
    for split, first in (("train[:100]", 0), ("train[100:130]", 100)):
        here = found["splits"][split]
        assert (here["n"], here["of"]) == (21, 100 if first == 0 else 30)
        chosen = np.sort(np.random.default_rng(5).permutation(here["of"])[:21])
        config.data.split = split
        images = parts.images(config)[chosen]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), chosen)
        x_0 = images.astype(np.float32) / 127.5 - 1
        bound = likelihood.vlb(
            lambda x, t: network({"params": params}, x, t), s, sigma, x_0, keys, clip=parts.clip(config)
        )
        for name, key in (("bits_per_dim", "total"), ("prior", "prior"), ("decoder", "decoder"), ("rate", "rate")):
            assert here[name] == pytest.approx(float(bound[key]), rel=1e-4), name
        assert here["distortion"] == pytest.approx(float(bound["distortion"]), rel=1e-4)
        with np.load(folder(run) / f"bound-{evaluate._stem(split)}.npz") as partial:
            total = partial["each"][:, 0]
        assert total.mean() == here["bits_per_dim"]
        assert here["standard_error"] == pytest.approx(total.std(ddof=1) / math.sqrt(21))
        assert here["rate_distortion"]["rate"][0] == pytest.approx(here["rate"], rel=1e-5)
        assert here["rate_distortion"]["distortion"][0] == pytest.approx(here["distortion"], rel=1e-5)
        assert len(here["loss_by_t"]["loss"]) == 20
        assert here["loss"] == pytest.approx(np.mean(here["loss_by_t"]["loss"]), rel=1e-4)
    assert json.loads((folder(run) / "evaluation.json").read_text()) == found
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


def test_an_evaluation_goes_on_where_it_was_stopped(run, monkeypatch):
    whole = evaluate.evaluate(run, seed=6, num=20)["splits"]
    for file in folder(run).glob("bound-*"):
        file.unlink()
    write, batches = evaluate._write_partial, []

    def stop_after_2(*args):
        write(*args)
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_write_partial", stop_after_2)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run, seed=6, num=20)
    assert evaluate.evaluate(run, seed=6, num=20)["splits"] == whole
    assert len(batches) == 2 + 1 + 3  # of 20 images in batches of 8: two, the third, and three of the other split
    evaluate.evaluate(run, seed=6, num=20)
    assert len(batches) == 6  # all is there
    evaluate.evaluate(run, seed=7, num=20)
    assert len(batches) == 12  # other noise, other images


def test_samples_are_judged(run, tmp_path):
    write_samples(run, 40, 0, str(tmp_path / "samples.npz"))
    found = evaluate.evaluate(run, num=8, samples=str(tmp_path / "samples.npz"))["samples"]
    generated = np.load(tmp_path / "samples.npz")["arr_0"]
    config = workdirs.read_config(run)
    real = parts.images(config)[:]
    x, y = quality.pixels(generated), quality.pixels(real)
    assert found["frechet"] == pytest.approx(quality.metrics.frechet_of_features(x, y))
    assert found["frechet_95"][0] < found["frechet"] < found["frechet_95"][1]
    assert found["frechet_extrapolated"] is None  # 40 images of 64 numbers
    assert 0 < found["frechet_floor"] < found["frechet"]
    assert found["protocol"]["samples"]["n"] == 40
    assert found["protocol"]["reference"]["n"] == 100
    assert found["protocol"]["reference"]["features"] == "pixels"
    least = min(np.linalg.norm(y - row, axis=1).min() for row in x)
    assert found["nearest_training_image"]["least"] == pytest.approx(least, rel=1e-5)
    config.data.split = "train[100:130]"
    held_out = [np.linalg.norm(y - row, axis=1).min() for row in quality.pixels(parts.images(config)[:])]
    assert found["nearest_training_image"]["median_of_held_out"] == pytest.approx(np.median(held_out), rel=1e-5)
    with Image.open(folder(run) / "nearest.png") as picture:
        assert picture.height > 2 * 64
    statistics = folder(run) / "statistics-pixels-train--100.npz"
    both = evaluate.evaluate(run, num=8, samples=str(tmp_path / "samples.npz"), reference=str(statistics))
    again = both["samples_to_statistics"]
    assert again["frechet"] == pytest.approx(found["frechet"])
    assert again["frechet_95"][0] < again["frechet"] < again["frechet_95"][1]
    assert again["protocol"]["metrics"]["frechet_95"] == {"method": "bootstrap", "draws": 200, "drawn_again": "samples"}
    assert both["samples"] == found  # the fuller section of before stays
    text = (folder(run) / "evaluation.md").read_text()
    assert "## Samples\n" in text and "## Samples against saved statistics\n" in text
    assert evaluate.evaluate(run, num=8)["samples"] == found


def test_the_protocol_of_samples(run, tmp_path):
    write_samples(run, 9, 3, str(tmp_path / "samples.npz"), sampler="ddim", steps=5)
    write_samples(run, 9, 3, f"{tmp_path}/shards/", sampler="ddim", steps=5)
    np.savez(tmp_path / "bare.npz", np.load(tmp_path / "samples.npz")["arr_0"])
    made_by = {}
    for name in ("samples.npz", "shards", "bare.npz"):
        found = evaluate.evaluate(run, seed=4, num=2, samples=str(tmp_path / name))["samples"]["protocol"]
        made_by[name] = found["samples"]["made_by"]
    assert made_by["bare.npz"] == "unknown"
    assert made_by["samples.npz"] == made_by["shards"] | {"first": 0, "num": 9}
    assert (made_by["shards"]["step"], made_by["shards"]["steps"], made_by["shards"]["seed"]) == (3, 5, 3)
    assert found["metrics"] == {
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


def test_what_cannot_be_compared(run, tmp_path):
    write_samples(run, 5, 0, str(tmp_path / "samples.npz"))
    samples = str(tmp_path / "samples.npz")
    images = np.zeros((5, 8, 8, 1), np.uint8)
    how = quality.protocol(images, "pixels", "", "bicubic", "x")
    statistics = str(tmp_path / "statistics.npz")
    quality.save_statistics(statistics, quality.moments(images, quality.pixels), how)
    with pytest.raises(UserError, match=r"different protocols .*resize: bicubic, antialiased.* and bicubic\)"):
        evaluate.evaluate(run, num=2, samples=samples, reference=statistics)
    with pytest.raises(UserError, match=r"reference=.*npz is to be compared with --samples"):
        evaluate.evaluate(run, num=2, reference=statistics)
    with pytest.raises(UserError, match=r"--reference=.*samples\.npz holds no statistics"):
        evaluate.evaluate(run, num=2, samples=samples, reference=samples)
    with pytest.raises(UserError, match=r"--samples=.*statistics\.npz holds no samples"):
        evaluate.evaluate(run, num=2, samples=statistics)
    np.savez(tmp_path / "other.npz", np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(UserError, match=r"holds images of \(4, 4, 1\), the run's are \(8, 8, 1\)"):
        evaluate.evaluate(run, num=2, samples=str(tmp_path / "other.npz"))
    with pytest.raises(UserError, match=r"split='test': the digits"):
        evaluate.evaluate(run, num=2, splits=("test",))
    with pytest.raises(UserError, match="holds no run"):
        evaluate.evaluate(tmp_path)
    for num in (0, -3):
        with pytest.raises(UserError, match=f"--num={num} must be at least 1"):
            evaluate.evaluate(run, num=num)


def test_statistics_are_of_every_image():
    """The last batch is not full, and is neither dropped nor counted twice."""
    images = np.random.default_rng(0).integers(0, 256, (300, 2, 2, 1), np.uint8)
    found = quality.moments(images, quality.pixels)
    assert found.count == 300
    x = quality.pixels(images).astype(np.float64)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(quality.extract(images, quality.pixels), quality.pixels(images))


def test_too_many_features():
    images = np.zeros((3, 40, 40, 3), np.uint8)
    with pytest.raises(UserError, match="4800 features are more than the 4096"):
        quality.frechet_to_statistics(
            images,
            quality.pixels,
            *[quality.protocol(images, "a", "", "", "")],
            None,
            quality.protocol(images, "a", "", "", ""),
        )


def test_coders_to_compare_with():
    rng = np.random.default_rng(0)
    constant = np.full((400, 4, 4, 1), 7, np.uint8)
    coin = rng.choice(np.array([0, 255], np.uint8), (4000, 4, 4, 1))
    noise = rng.integers(0, 256, (4000, 4, 4, 3), np.uint8)
    assert evaluate.histogram_bits(constant) < 0.05 and evaluate.png_bits(constant) < 0.3
    assert 1 < evaluate.histogram_bits(coin) < 1.35
    assert 8 < evaluate.histogram_bits(noise) < 8.3
    assert 8 < evaluate.png_bits(noise) < 8.6
    one = np.array([3, 3, 5], np.uint8).reshape(3, 1, 1, 1)
    a = 1 / 256
    expected = -math.log2(a / 1 * (1 + a) / 2 * a / 3) / 3
    assert evaluate.histogram_bits(one) == pytest.approx(expected)
