"""The evaluation of a run: its numbers equal those of the functions, survive interruptions and state their protocol."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Examples, tiny_config, write_random_run
from etils import epath
from PIL import Image

from diffusion_jax import likelihood, parts, sample, schedule, train
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import bound, evaluate, inception, meaning, quality
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.running import workdir as workdirs

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def run(small_network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(train__num_steps=3, data__split="train[:100]", data__test_split="train[100:130]")
    train.train(config, str(workdir))
    return workdir


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the report and the picture that each evaluation draws; tests that look at them draw them."""
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    monkeypatch.setattr(evaluate, "show", lambda *_, **__: None)


def folder(run):
    return run / "evaluation" / "3"


@pytest.mark.slow
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
        with np.load(folder(run) / f"bound-{evaluate.stem(split)}.npz") as partial:
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


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
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


class WithLabels(Examples):
    def __getitem__(self, indices):
        return self.arrays["image"][indices]


@pytest.mark.slow
def test_the_bound_of_a_class_takes_the_labels(rough, tmp_path):
    """A network that knows the noise-free image of each class has a lower bound with labels; ∅ is the default."""

    def network(variables, x, t, labels=None):
        labels = jnp.full(len(x), 3) if labels is None else labels
        guess = jnp.array([-0.9, 0.1, 0.9, 0.0])[labels][:, None, None, None]
        alpha, beta = (a[t][:, None, None, None] for a in (rough.alpha_bar, rough.beta_bar))
        return (x - alpha * guess) / beta

    values = np.array([13, 140, 242], np.uint8)
    labels = np.arange(11) % 3
    dataset = WithLabels(np.broadcast_to(values[labels][:, None, None, None], (11, 2, 2, 1)), labels)
    run = dataclasses.replace(parts.build(tiny_config()), network=network, schedule=rough)
    sigma, chosen = schedule.sigma_beta(rough), np.array([1, 4, 5, 9, 10])

    def bits(with_labels):
        partial = epath.Path(tmp_path / f"bound-{with_labels}.npz")
        return bound.evaluate_split(run, sigma, {"a": np.ones(1)}, dataset, chosen, 5, 8, partial, "a", with_labels)[
            "bits_per_dim"
        ]

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), chosen)
    x_0 = dataset[chosen].astype(np.float32) / 127.5 - 1
    for with_labels, given in ((True, labels[chosen]), (False, None)):
        expected = likelihood.vlb(lambda x, t, y=given: network({}, x, t, y), rough, sigma, x_0, keys, clip=run.clip)
        assert bits(with_labels) == pytest.approx(float(expected["total"]), rel=1e-4)
    assert bits(True) < bits(False) - 0.1


CLASSES = {"model__num_classes": 10, "data__classes": tuple("0123456789")}


def test_densities_of_a_run():
    with_classes = tiny_config(**CLASSES)
    assert evaluate._densities(tiny_config(), ()) == ("x",)
    assert evaluate._densities(with_classes, ()) == ("x given y",)
    assert evaluate._densities(with_classes, ("none",)) == ("x given y", "x given ∅")
    for labels in (("3",), ("none", "3"), ("",)):
        with pytest.raises(UserError, match=r"--labels=.* does not go with --mode=evaluate.* give none"):
            evaluate._densities(with_classes, labels)
    with pytest.raises(UserError, match=r"--labels=none: the run has no classes: leave it out"):
        evaluate._densities(tiny_config(), ("none",))


def test_bounds_of_other_densities_are_not_mixed():
    """A file of results belongs to one density; those of runs without classes are as before."""
    arguments = tiny_config(), {"a": np.ones(2)}, "train", np.arange(3), 0
    names = ("x", "x given y", "x given ∅")
    assert len({evaluate._identity(*arguments, density) for density in names}) == 3


def test_splits_have_the_classes_of_the_run(monkeypatch):
    """Labels are numbers: a split that lacks a class would give its images those of others."""
    config, dataset = tiny_config(**CLASSES), WithLabels(np.zeros((3, 8, 8, 1), np.uint8), np.arange(3))
    monkeypatch.setattr(evaluate, "read_images", lambda *_: dataset)
    dataset.classes = tuple("0123456789")
    assert list(evaluate._datasets(config, "run", ())) == ["train"]
    for classes in (tuple("012"), ()):
        dataset.classes = classes
        with pytest.raises(UserError, match=r"the split train has the classes .*, but the run 0, 1, 2"):
            evaluate._datasets(config, "run", ())
        assert evaluate._datasets(tiny_config(), "run", ())  # without classes the labels do not matter


def test_labels_of_samples(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    path, data = tmp_path / "x.npz", WithLabels(images, np.zeros(4, int))
    data.classes = ("a", "b")
    np.savez(path, images, labels=np.array([0, 1, 2, 0]))  # 2 is ∅
    assert evaluate._asked(path, {"train": data, "test": data}).tolist() == [0, 1, 2, 0]
    data.classes = ()
    assert evaluate._asked(path, {"train": data}) is None
    np.savez(path, images)
    assert quality.read_labels(path, 2) is None
    for labels in ([0, 1, 3, 0], [0, -1, 0, 0], [0, 1], [0.0, 1, 0, 0], 1, ["a", "b", "a", "b"]):
        np.savez(path, images, labels=np.array(labels))
        with pytest.raises(UserError, match=r"x\.npz holds labels .*, not a class in 0\.\.2 for each image"):
            quality.read_labels(path, 2)
    for first in (0, 4):
        np.savez(tmp_path / f"{first:08d}-{first + 3:08d}.npz", images, labels=np.arange(4) % 2 + first // 4)
    assert quality.read_labels(tmp_path, 2).tolist() == [0, 1, 0, 1, 1, 2, 1, 2]


@pytest.mark.slow
def test_an_evaluation_with_classes(tmp_path):
    write_random_run(tmp_path, **CLASSES, data__split="train[:100]")
    write_samples(tmp_path, 30, 0, str(tmp_path / "samples.npz"))
    result = evaluate.evaluate(tmp_path, num=8, labels=("none",), samples=str(tmp_path / "samples.npz"))
    given, without = result["splits"]["train[:100]"], result["splits"]["train[:100] without labels"]
    assert (given["density"], without["density"]) == ("x given y", "x given ∅")
    assert given["bits_per_dim"] != without["bits_per_dim"] and given["n"] == without["n"] == 8
    assert result["protocol"]["densities"] == ["x given y", "x given ∅"]
    samples = result["samples"]
    assert samples["classifiers"]["logistic_regression"]["held_out_accuracy"] > 0.5
    assert samples["protocol"]["metrics"]["classifiers"]["n"] == 30
    assert samples["frechet_within_classes"] is None
    assert "3 samples" in samples["protocol"]["metrics"]["frechet_within_classes"]["left_out"]
    folder = tmp_path / "evaluation" / "0"
    text = (folder / "evaluation.md").read_text()
    assert "| x given ∅ |" in text and len({line.count("|") for line in text.splitlines()[2:6]}) == 1
    assert "logistic_regression accuracy" in text and "class 0 has 3 samples" in text
    assert "held_out_accuracy" in (tmp_path / "report.html").read_text()
    assert evaluate.evaluate(tmp_path, num=8)["splits"] == {"train[:100]": given}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_samples_are_compared_with_the_first_split(run, tmp_path):
    write_samples(run, 40, 0, str(tmp_path / "samples.npz"))
    values = evaluate.evaluate(run, num=8, samples=str(tmp_path / "samples.npz"))["samples"]
    generated = np.load(tmp_path / "samples.npz")["arr_0"]
    config = workdirs.read_config(run)
    real = parts.images(config)[:]
    x, y = quality.pixels(generated), quality.pixels(real)
    assert values["frechet"] == pytest.approx(quality.metrics.frechet_of_features(x, y))
    assert values["frechet_standard_error"] == pytest.approx(quality.metrics.frechet_standard_error(x, y))
    assert values["frechet_extrapolated"] is None  # 40 images of 64 numbers
    assert 0 < values["frechet_floor"][0] < values["frechet_at_floor_size"][0]
    assert values["protocol"]["metrics"]["frechet_floor"] == {"rows": [40, 60], "cuts": 4}
    assert "40 samples of 64 features" in (folder(run) / "evaluation.md").read_text()  # why there is no extrapolation
    assert values["protocol"]["samples"]["n"] == 40
    assert values["protocol"]["reference"]["n"] == 100
    assert values["protocol"]["reference"]["features"] == "pixels"
    assert values["protocol"]["reference"]["origin"] == "digits train[:100]"
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
    error = quality.metrics.frechet_standard_error(x, quality.metrics.Moments.of(y))
    assert again["frechet_standard_error"] == pytest.approx(error, rel=1e-4)
    assert again["protocol"]["metrics"]["frechet_standard_error"]["over"] == "new samples"
    assert both["samples"] == values  # the section of the earlier evaluation stays
    text = (folder(run) / "evaluation.md").read_text()
    assert "## Samples\n" in text and "## Samples against saved statistics\n" in text
    assert evaluate.evaluate(run, num=8)["samples"] == values


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
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
        "frechet_standard_error": {"method": "infinitesimal jackknife", "over": "new samples and reference"},
        "frechet_floor": {"rows": [9, 91], "cuts": 4},
        "frechet_extrapolated": {"left_out": "9 samples of 64 features are fewer than 640, 10 for each"},
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


@pytest.mark.slow
def test_unusable_arguments_are_refused(run, tmp_path, monkeypatch):
    write_samples(run, 5, 0, str(tmp_path / "samples.npz"))
    samples = str(tmp_path / "samples.npz")
    images = np.zeros((5, 8, 8, 1), np.uint8)
    protocol = quality.protocol(images, "pixels", "", "bicubic", "x")
    statistics = str(tmp_path / "statistics.npz")
    quality.save_statistics(statistics, quality.moments(images, quality.pixels), protocol)
    np.savez(tmp_path / "other.npz", np.zeros((2, 4, 4, 1), np.uint8))
    np.savez(tmp_path / "three.npz", np.zeros((3, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 1), np.uint8))
    own = protocol | {"resize": "bicubic, antialiased, centre crop of the largest square"}
    quality.save_statistics(tmp_path / "own.npz", quality.moments(images, quality.pixels), own)
    quality.save_statistics(tmp_path / "narrow.npz", quality.moments(images[:, :4], quality.pixels), own)
    file = {name: str(tmp_path / f"{name}.npz") for name in ("other", "three", "one", "own", "narrow")}

    def refused(message, workdir=run, **arguments):
        with pytest.raises(UserError, match=message) as raised:
            evaluate.evaluate(workdir, **({"num": 2} | arguments))
        assert "\n" not in str(raised.value)

    # A refusal comes before the long work.
    monkeypatch.setattr(bound, "evaluate_split", lambda *_: pytest.fail("the bound was measured"))
    differing = r"different protocols .*resize: bicubic, antialiased.* and bicubic\)"
    refused(differing, samples=samples, reference=statistics)
    refused(r"reference=.*npz needs --samples to compare with", reference=statistics)
    refused(r"--inception=.*none.npz does not exist", samples=samples, inception_path="none.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_features", lambda path: (quality.pixels, "checksum"))
        refused(r"inception=x.npz needs --samples to compare with", inception_path="x.npz")
    refused(r"--reference=.*samples\.npz holds no statistics", samples=samples, reference=samples)
    refused(r"--samples=.*statistics\.npz holds no samples", samples=statistics)
    refused(r"holds images of \(4, 4, 1\), but the run's are \(8, 8, 1\)", samples=file["other"])
    refused("--samples holds 3 images, too few to compare: give at least 4", samples=file["three"])
    refused("--samples holds 1 images, too few to compare: give at least 2", samples=file["one"], reference=file["own"])
    refused("cannot be compared with 5 images: give a split of at least 6", samples=samples, splits=("train[:5]",))
    refused("has 32 features, not 64", samples=samples, reference=file["narrow"])
    refused(r"--splits=train,test: config.data.split='test': the digits", splits=("train", "test"))
    refused("--splits=train,,test has an empty name", splits=("train", "", "test"))
    refused("holds no run", workdir=tmp_path)
    for num in (0, -3):
        refused(f"--num={num} must be at least 1", num=num)
    for seed in (-1, 2**32):
        refused(f"--seed={seed} must be in 0", seed=seed)


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "text": lambda content: b"no archive",
    "nested": lambda content: b"[" * 100_000,
    "another archive": lambda content: _npz(arr_0=np.zeros(3)),
}


def _npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_bounds_are_measured_again(tmp_path, capsys, damage):
    path, each, sums = epath.Path(tmp_path / "bound-train.npz"), np.ones((4, 4)), np.ones((4, 20))
    bound._write_partial(path, each, sums, "a")
    assert bound._read_partial(path, "a", 5, 20)[0].shape == (4, 4)
    assert bound._read_partial(path, "b", 5, 20)[0].shape == (0, 4) and not capsys.readouterr().out
    path.write_bytes(damage(path.read_bytes()))
    each, sums = bound._read_partial(path, "a", 5, 20)
    assert (each.shape, sums.shape) == ((0, 4), (4, 20)) and not sums.any()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("num, num_steps", [(3, 20), (5, 19)])
def test_bounds_of_another_size_are_measured_again(tmp_path, capsys, num, num_steps):
    path = epath.Path(tmp_path / "bound-train.npz")
    bound._write_partial(path, np.ones((4, 4)), np.ones((4, 20)), "a")
    assert len(bound._read_partial(path, "a", num, num_steps)[0]) == 0
    assert "is damaged (arrays (4, 4) and (4, 20))" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_of_the_user_are_refused_in_one_line(tmp_path, damage):
    images = np.zeros((5, 8, 8, 1), np.uint8)
    statistics, samples = tmp_path / "statistics.npz", tmp_path / "shards" / "00000000-00000004.npz"
    quality.save_statistics(statistics, quality.moments(images, quality.pixels), PROTOCOL)
    assert quality.load_statistics(statistics)[1] == PROTOCOL
    samples.parent.mkdir()
    np.savez(samples, images)
    (samples.parent / "samples.json").write_text('{"seed": 1}')
    assert quality.read_about(samples.parent) == {"seed": 1}
    for file in (statistics, samples, samples.parent / "samples.json"):
        file.write_bytes(damage(file.read_bytes()))
    for read, path in ((quality.load_statistics, statistics), (quality.read_samples, samples.parent)):
        with pytest.raises(UserError, match=r"holds") as raised:
            read(path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert quality.read_about(samples.parent) == quality.read_about(samples) == "unknown"


PROTOCOL = quality.protocol(np.zeros((5, 8, 8, 1), np.uint8), "pixels", "", "bicubic", "x")


@pytest.mark.parametrize(
    "change",
    [
        {"count": 1},
        {"mean": np.full(64, np.nan)},
        {"mean": np.zeros(63)},
        {"scatter": np.full((64, 64), np.inf)},
        {"mean": np.full(64, "a")},
        {"protocol": "[]"},
        {"protocol": "3"},
        {"protocol": json.dumps({"features": "pixels"})},
        {"protocol": "[" * 100_000},
    ],
)
def test_statistics_of_other_content_are_refused(tmp_path, change):
    content = {"count": 5, "mean": np.zeros(64), "scatter": np.eye(64), "protocol": json.dumps(PROTOCOL)}
    np.savez(tmp_path / "statistics.npz", **(content | change))
    with pytest.raises(UserError, match=r"statistics\.npz holds no statistics \(.*give a statistics"):
        quality.load_statistics(tmp_path / "statistics.npz")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", "[" * 100_000, '{"samples": 3}', '{"samples": {}}', '{"samples": {"protocol": [1]}}'],
)
def test_damaged_evaluations_are_replaced(tmp_path, capsys, content):
    (tmp_path / "evaluation.json").write_text(content)
    assert evaluate._earlier_samples(epath.Path(tmp_path)) == {}
    assert capsys.readouterr().out.count("\n") == (content != "[]")


def test_paths_of_flags_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = np.zeros((5, 8, 8, 1), np.uint8)
    quality.save_statistics(tmp_path / "s.npz", quality.moments(images, quality.pixels), PROTOCOL)
    np.savez(tmp_path / "x.npz", images, about='{"seed": 1}')
    assert quality.load_statistics("~/s.npz")[1] == PROTOCOL
    assert quality.read_samples("~/x.npz").shape == images.shape and quality.read_about("~/x.npz") == {"seed": 1}
    with pytest.raises(UserError, match=f"--inception={tmp_path}/none.npz does not exist"):
        inception.load_features("~/none.npz")


def test_a_longer_shard_replaces_a_shorter_one(tmp_path):
    """Sampling with a larger --num writes the longer shard, and a kill may come before it deletes the shorter."""
    for first, last in ((0, 3), (0, 5), (6, 7)):
        np.savez(tmp_path / f"{first:08d}-{last:08d}.npz", np.full((last - first + 1, 8, 8, 1), last, np.uint8))
    assert quality.read_samples(tmp_path)[:, 0, 0, 0].tolist() == [5] * 6 + [7] * 2


def test_few_samples_with_many_features():
    """More features than a covariance may have: fewer samples than features need none, and nor does the floor."""
    rng = np.random.default_rng(0)
    samples, reference = (rng.integers(0, 256, (n, 4, 4, 1), np.uint8) for n in (5, 90))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quality, "MAX_FEATURES", 8)
        values = quality.compare(samples, reference, quality.pixels)
    assert values["settings"]["frechet_floor"]["rows"] == [5, 85] and values["frechet_extrapolated"] is None
    assert "16 features are more than the 8" in values["settings"]["frechet_extrapolated"]["left_out"]
    assert values["frechet_standard_error"] > 0


def test_real_images_reach_the_floor():
    """At any number: few samples have a high distance, and so has the floor. Other images do not reach it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 2, 2, 1), np.uint8)
    for n in (20, 300):
        real, dark = images[:n].copy(), images[:n] // 2
        values, other = (quality.compare(x, images[100:], quality.pixels) for x in (real, dark))
        floor, spread = values["frechet_floor"]
        assert values["settings"]["frechet_floor"]["rows"] == [min(n, 150), 300 - min(n, 150)]
        assert abs(values["frechet_at_floor_size"][0] - floor) < 6 * (spread + values["frechet_at_floor_size"][1])
        assert other["frechet_at_floor_size"][0] > floor + 6 * spread


def test_every_number_says_what_it_is():
    images = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 1), np.uint8)
    values = quality.compare(images[:30], images, quality.pixels)
    assert [name for name in values if name != "settings" and not meaning.meaning(name)] == []
    for name in ("bits_per_dim", "rate", "loss", "n", "of", "median", "least", "median_of_held_out", "accuracy"):
        assert meaning.meaning(name)
    assert meaning.meaning("density", "x") != meaning.meaning("density", 0.9)


def test_verdicts():
    def of(**values):
        return meaning.verdicts({"samples": values})

    floor = {"frechet_floor": [2.0, 0.1], "frechet_at_floor_size": [2.15, 0.1]}
    near = "samples: Fréchet distance 2.15, where as many real images have 2 ± 0.1; as near to the data as real images."
    assert of(**floor) == [near]
    assert of(**floor | {"frechet_at_floor_size": [5.0, 0.1]})[0].endswith("2 ± 0.1; 2.5 times as far.")
    (text,) = of(nearest_training_image={"median": 0.95, "median_of_held_out": 1.0})
    assert text == "samples: 95% of the distance of held-out images from the training images; no sign of copies."
    assert "may be copies" in of(nearest_training_image={"median": 0.5, "median_of_held_out": 1.0})[0]
    assert of(nearest_training_image={"median": 0.5}) == [] == of()
    bits = {"bits_per_dim": 4.5, "png_bits_per_dim": 4.0}
    (text,) = meaning.verdicts({"splits": {"train": bits}})
    assert text == "train: 4.50 bits/dim, where PNG files take 4.00; no fewer: train for longer or a larger network."


def test_a_null_says_why():
    settings = {"frechet_extrapolated": {"left_out": "few samples"}}
    section = {"frechet_extrapolated": None, "classifiers": None, "curve": [1, None], "protocol": {"metrics": settings}}
    filled = meaning.with_reasons({"samples": section, "splits": {"train": {"standard_error": None}}})
    assert filled["samples"]["frechet_extrapolated"] == "none: few samples"
    assert filled["samples"]["classifiers"] == "none: it was not measured"
    assert filled["splits"]["train"]["standard_error"] == "none: needs at least 2 images"
    assert filled["samples"]["curve"] == [1, None] and section["classifiers"] is None
    assert meaning.with_reasons([None, {"a": None}]) == [None, {"a": None}]
    assert meaning.with_reasons({"protocol": 3, "x": None}) == {"protocol": 3, "x": "none: it was not measured"}


def test_steps_of_a_quick_evaluation():
    """Each image has a step of its own in each stratum, a function of (seed, index); on average they count alike."""
    strata, indices = np.array([0, 1, 5, 20]), np.arange(4000).reshape(2, 2000)
    ts = bound._draw_steps(0, indices, strata)
    assert ts.shape == (2, 2000, 3) and (ts > strata[:-1]).all() and (ts <= strata[1:]).all()
    np.testing.assert_array_equal(ts[1, 5:7], bound._draw_steps(0, indices[1:, 5:7], strata)[0])
    counts = np.bincount(ts[..., 2].ravel(), minlength=21)[6:]
    assert counts.min() > 0.7 * 4000 / 15 and (bound._draw_steps(1, indices, strata) != ts).any()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_quick_evaluation_has_the_mean_of_the_whole(run, tmp_path, monkeypatch, capsys):
    """Its standard error holds the error of the drawing; without strata to draw from, it is the whole evaluation."""
    whole = evaluate.evaluate(run, num=100)["splits"]["train[:100]"]
    as_whole = evaluate.evaluate(run, quick=True)["splits"]["train[:100]"]  # 20 steps are fewer than 25 strata
    assert as_whole == whole
    monkeypatch.setattr(bound, "TERMS", 6)
    capsys.readouterr()
    quick = evaluate.evaluate(run, seed=1, quick=True)
    values = quick["splits"]["train[:100]"]
    assert quick["protocol"]["bound"].endswith("over one step in each of up to 6 strata")
    assert values["standard_error"] > whole["standard_error"] and len(values["loss_by_t"]["t"]) == 6
    for name in ("bits_per_dim", "rate"):
        assert abs(values[name] - whole[name]) < 4 * values["standard_error"]
    assert values["decoder"] == pytest.approx(whole["decoder"], abs=0.3)
    assert values["loss"] == pytest.approx(whole["loss"], rel=0.2)
    assert "evaluation.json (" in capsys.readouterr().out  # the files that it leaves, with their size


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
    for sizes in ((5000, 6000), (6000, 5000), (3, None)):
        with pytest.raises(UserError, match="4800 features are more than the 4096"):
            quality.check_sizes(4800, *sizes)
    quality.check_sizes(4800, 4800, 6000)  # no more samples than features need no covariance


def test_coders_of_constants_coins_and_noise():
    rng = np.random.default_rng(0)
    constant = np.full((400, 4, 4, 1), 7, np.uint8)
    coin = rng.choice(np.array([0, 255], np.uint8), (4000, 4, 4, 1))
    noise = rng.integers(0, 256, (4000, 4, 4, 3), np.uint8)
    assert bound.histogram_bits(constant) < 0.05 and bound.png_bits(constant) < 0.3
    assert 1 < bound.histogram_bits(coin) < 1.35
    assert 8 < bound.histogram_bits(noise) < 8.3
    assert 8 < bound.png_bits(noise) < 8.6
    assert 8 < bound.png_bits(noise.reshape(len(noise), -1, noise.shape[-1])) < 8.6  # signals
    assert 8 < bound.png_bits(noise.reshape(len(noise), 2, -1, *noise.shape[-2:])) < 8.6  # volumes
    one = np.array([3, 3, 5], np.uint8).reshape(3, 1, 1, 1)
    a = 1 / 256
    expected = -math.log2(a / 1 * (1 + a) / 2 * a / 3) / 3
    assert bound.histogram_bits(one) == pytest.approx(expected)
