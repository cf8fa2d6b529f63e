import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from diffusion_jax import losses, parts, schedule, unet
from diffusion_jax.configs import default
from diffusion_jax.errors import UserError
from diffusion_jax.pictures import grids
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs

NAMES = sorted(path.stem for path in pathlib.Path(default.__file__).parent.glob("*.py"))


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_builds(name):
    config = config_of(name)
    configs.check(config)
    if name == "cifar10_classes":
        assert config.model.num_classes == "auto"
        config.model.num_classes = 10  # its images are not here
    assert parts.schedule(config).num_steps == parts.sigma(config).shape[0] - 1
    x = jax.ShapeDtypeStruct((1, *parts.image_shape(config)), jnp.float32)
    jax.eval_shape(parts.model(config).init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.int32))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"default"}))
def test_every_config_opens_with_its_command(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"python main.py --config=configs/{name}.py --workdir=" in module.__doc__


def test_every_name_builds_its_object():
    config = tiny_config(schedule__num_steps=10)
    for name, expected in (
        ("su_linear", schedule.su_linear(10)),
        ("ho_linear", schedule.ho_linear(10)),
        ("cosine", schedule.cosine(10)),
    ):
        config.schedule.name = name
        np.testing.assert_array_equal(parts.schedule(config).beta, expected.beta)
    for name, expected in (
        ("zero", schedule.sigma_zero),
        ("beta", schedule.sigma_beta),
        ("posterior", schedule.sigma_posterior),
    ):
        config.sampling.sigma = name
        np.testing.assert_array_equal(parts.sigma(config), expected(parts.schedule(config)))


def test_model_has_the_configs_fields():
    config = tiny_config(model__dtype="bfloat16", model__multipliers=(1, 2), model__attention_resolutions=(4,))
    wanted = unet.UNet(8, (1, 2), 0, (4,), 0.1, 4, jnp.bfloat16, parts._ATTENTION["xla"])
    assert parts.model(config) == wanted
    assert parts.model(tiny_config(train__remat=True)).remat
    assert parts.model(tiny_config(model__attention="cudnn")).attention.keywords == {"implementation": "cudnn"}


def test_optimizer():
    """Warm-up from 0, clipping before Adam, Adam's own constants."""
    config = tiny_config(train__learning_rate=0.5, train__warmup_steps=2)
    rate = parts.learning_rate(config)
    assert [float(rate(step)) for step in range(4)] == [0, 0.25, 0.5, 0.5]
    assert float(parts.learning_rate(tiny_config(train__warmup_steps=0))(0)) == pytest.approx(2e-3)
    gradients = [jnp.array([30.0, 0.0, 40.0]), jnp.array([0.1, -0.2, 0.0]), jnp.ones(3)]
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8))

    def updates(transform):
        state = transform.init(jnp.ones(3))
        for gradient in gradients:
            update, state = transform.update(gradient, state)
            yield update

    for ours, expected in zip(updates(parts.optimizer(config)), updates(by_hand), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_bound_needs_a_deviation_at_each_step():
    config = config_of("digits")
    config.update_from_flattened_dict({"train.loss": "vlb", "train.t_sampling": "importance"})
    configs.check(config)
    config.sampling.sigma = "zero"
    with pytest.raises(UserError, match=r"config\.sampling\.sigma='zero' must be beta, posterior or learned"):
        configs.check(config)


def test_unknown_missing_and_mistyped_keys():
    config = config_of("digits")
    config.train.lerning_rate = 1e-3
    with pytest.raises(UserError, match=r"train\.lerning_rate is not a key .* nearest is config\.train\.learning_rate"):
        configs.check(config)
    del config.train.lerning_rate
    del config.train.loss
    with pytest.raises(UserError, match=r"config\.train\.loss is missing"):
        configs.check(config)
    config = config_of("digits")
    with config.ignore_type():
        config.train.num_steps = "many"
    with pytest.raises(UserError, match=r"config\.train\.num_steps='many' must be of type int"):
        configs.check(config)


def test_the_same_model_is_told_from_another():
    old = tiny_config()
    configs.check_same_run(old, tiny_config(train__num_steps=9, train__batch_size=4, data__flip=True), "w")
    for change in ({"model__channels": 16}, {"schedule__name": "cosine"}, {"data__image_size": 16}):
        key = next(iter(change)).replace("__", r"\.")
        with pytest.raises(UserError, match=f"w holds another run .*{key}"):
            configs.check_same_run(old, tiny_config(**change), "w")


def test_every_integer_has_a_range():
    """And a message that names its key."""
    keys = [key for key, value in configs.flatten(default.get_config()).items() if type(value) is int]
    assert len(keys) > 20
    for key in keys:
        for value in (10**30, -1):
            config = default.get_config()
            config.update_from_flattened_dict({key: value})
            with pytest.raises(UserError, match=rf"config\.{key}={value} must be "):
                configs.check(config)


def test_images_are_square_or_have_a_height_and_a_width():
    assert parts.image_shape(tiny_config()) == (8, 8, 1)
    config = tiny_config(data__image_size=(16, 8))
    configs.check(config)
    assert parts.image_shape(config) == (16, 8, 1)
    as_json = tiny_config(data__image_size=[16, 8])
    configs.check_same_run(config, as_json, "runs/tiny")
    for other in (16, (8, 16)):
        with pytest.raises(UserError, match=r"data\.image_size: \(16, 8\) there, "):
            configs.check_same_run(config, tiny_config(data__image_size=other), "runs/tiny")
    for size in ((), (16, 8, 8, 8), (16, 0), (2**20 + 1,), (8, 8, 8193), (16, 8.0), "16", 2.5, None, (8193, 8)):
        with pytest.raises(
            UserError, match=r"image_size=.* must be a number of pixels in 1\.\.8,192, or \(height, width"
        ):
            configs.check(tiny_config(data__image_size=size))
    with pytest.raises(UserError, match=r"16x7 cannot be halved 1 times by 2 levels: give multiples of 2"):
        configs.check(tiny_config(data__image_size=(16, 7), model__multipliers=(1, 2)))


def test_signals_have_a_length_and_volumes_three_sizes():
    signals = {"data__image_size": (64,), "data__flip": False}
    for change, shape in ((signals, (64, 1)), ({"data__image_size": (4, 8, 6), "data__flip": True}, (4, 8, 6, 1))):
        config = tiny_config(**change)
        configs.check(config)
        assert parts.image_shape(config) == shape and parts.build(config).image_shape == shape
    with pytest.raises(
        UserError, match=r"data\.flip=True must be False for signals, which a flip would play backwards"
    ):
        configs.check(tiny_config(**signals | {"data__flip": True}))
    for size in ((64,), (8, 8, 8)):
        with pytest.raises(UserError, match=r"data\.crop=4 must be 0 for signals and volumes"):
            configs.check(tiny_config(data__image_size=size, data__crop=4))
    with pytest.raises(UserError, match=r"does not fit .*: 8x8x7 cannot be halved 1 times"):
        configs.check(tiny_config(data__image_size=(8, 8, 7), model__multipliers=(1, 2)))
    several = {"data__channels": 2, "data__dtype": "uint8", "train__ema_warmup": True}
    assert configs.warnings(tiny_config(**signals | several), 0.0) == []  # as many curves
    (text,) = configs.warnings(tiny_config(data__image_size=(8, 8, 8), **several), 0.0)
    assert text.startswith("grids of images have a grey row for each of config.data.channels=2 channels")


def test_the_ends_of_a_range_are_valid():
    for key, (low, high) in configs.RANGES.items():
        for value in (low, high):
            configs.check_integer(key, value, low, high)
        for value in (low - 1, high + 1, float(low), True, str(low)):
            with pytest.raises(UserError, match=f"{key}=.* must be an integer in {low}"):
                configs.check_integer(key, value, low, high)


def test_paths_are_the_same_if_they_mean_the_same(tmp_path, monkeypatch):
    """config.json holds absolute paths, so that a run resumes from another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    workdirs.write_config("run", tiny_config(data__source="files", data__path="data", data__cache_dir="gs://b/c"))
    old = workdirs.read_config("run")
    assert old.data.path == str(tmp_path / "data") and old.data.cache_dir == "gs://b/c" and old.data.source == "files"
    for path in ("data", "./data", "data/", "~/data", "run/../data", str(tmp_path / "data")):
        configs.check_same_run(old, tiny_config(data__source="files", data__path=path), "w")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    configs.check_same_run(old, tiny_config(data__source="files", data__path="../data"), "w")
    with pytest.raises(UserError, match=rf"data\.path: '{tmp_path}/data' there, '{tmp_path}/elsewhere/data' here"):
        configs.check_same_run(old, tiny_config(data__source="files", data__path="data"), "w")
    configs.check_same_run(tiny_config(data__source="../data"), tiny_config(data__source="../data/"), "w")
    assert configs.with_absolute_paths(tiny_config(data__source="tfds:celeb_a")).data.source == "tfds:celeb_a"


def test_what_a_short_run_is_warned_of():
    def warned(**train):
        config = tiny_config(**{f"train__{key}": value for key, value in train.items()})
        configs.check(config)
        return configs.warnings(config, 0.0)

    (text,) = warned(num_steps=300, ema_decay=0.9999)
    assert "ema_decay=0.9999 over config.train.num_steps=300: 97% of the averaged parameters" in text
    assert warned(num_steps=300, ema_decay=0.9999, ema_warmup=True) == []
    assert warned(num_steps=300, ema_decay=0.98) == []
    (text,) = warned(num_steps=300, ema_decay=0.98, warmup_steps=5000)
    assert "warmup_steps=5000 exceeds config.train.num_steps=300" in text and "6.0% of" in text
    assert warned(num_steps=300, ema_decay=0.98, warmup_steps=300) == []
    for channels, dtype in ((2, "uint8"), (4, "float32")):
        config = tiny_config(data__channels=channels, data__dtype=dtype, train__num_steps=3000)
        (text,) = configs.warnings(config, 0.0)
        assert f"for each of config.data.channels={channels} channels, and for {grids.MOST_CHANNELS} at most" in text
    assert configs.warnings(tiny_config(data__channels=4, train__num_steps=3000), 0.0) == []  # RGBA
    assert configs.warnings(config_of("digits"), 0.0065) == configs.warnings(config_of("cifar10"), 0.0065) == []


def test_a_run_of_an_earlier_version_has_no_warmup_of_its_average(tmp_path):
    config = tiny_config()
    del config.train.ema_warmup
    workdirs.write_config(tmp_path, config)
    assert workdirs.read_config(tmp_path).train.ema_warmup is False


def test_config_json_comes_back(tmp_path):
    config = tiny_config()
    workdirs.write_config(tmp_path / "run", config)
    again = workdirs.read_config(tmp_path / "run")
    assert configs.flatten(again) == configs.flatten(config)
    configs.check_same_run(again, config, "w")
    configs.check(again)
    assert parts.model(again) == parts.model(config)
    with pytest.raises(UserError, match="holds no run"):
        workdirs.read_config(tmp_path)


# ---------------------------------------------------------------- one's own pictures, and one's own functions


def test_own_suits_the_machine_and_follows_its_number_of_steps(monkeypatch):
    own = importlib.import_module("configs.own")
    small, large = own.get_config("cpu"), own.get_config("accelerator")
    assert parts.num_parameters(small) < parts.num_parameters(large) / 20
    for expects, config in ((False, small), (True, large)):
        monkeypatch.setattr(own.hosts, "expects_accelerator", lambda expects=expects: expects)
        assert configs.flatten(own.get_config()) == configs.flatten(config)
    small.train.num_steps = 60
    flat = configs.flatten(small)
    assert [flat[f"train.{key}"] for key in ("warmup_steps", "checkpoint_every", "sample_every")] == [3, 6, 15]
    configs.check(small)
    assert configs.warnings(small, 0.0) == []
    with pytest.raises(UserError, match="own:gpu is no size: give own:cpu, own:accelerator, or own"):
        own.get_config("gpu")


def half(eps_bar_fn, s, x_0, t, eps_bar):
    return 0.5 * losses.simple_loss(eps_bar_fn, s, x_0, t, eps_bar)


def flat_schedule(num_steps):
    return schedule.from_beta_squared(np.full(num_steps, 0.1))


@pytest.mark.parametrize("prediction", ["eps_bar", "velocity"])
def test_a_loss_of_ones_own(prediction):
    """It gets ε̄, whatever the network predicts."""
    config = tiny_config(model__prediction=prediction, schedule__name="su_linear")
    own = configs.with_functions(config, loss=half)
    configs.check(own)
    x_0, keys, t = np.ones((3, 8, 8, 1), np.float32), jax.random.split(jax.random.key(0), 3), np.array([1, 7, 20])
    arguments = lambda x, t: 0.1 * x, parts.schedule(config), x_0, t, keys
    predict = parts._prediction_fn(config, *arguments[:2])
    expected = losses.with_noise(half, 1)(lambda x, t: predict(x, t).eps_bar, *arguments[1:])
    np.testing.assert_allclose(parts.loss(own)(*arguments), expected, rtol=1e-6)
    assert not callable(config.train.loss)


def test_a_workdir_names_ones_own_functions(tmp_path):
    config = configs.with_functions(tiny_config(), loss=half, schedule=flat_schedule, sigma=schedule.sigma_posterior)
    np.testing.assert_allclose(parts.schedule(config).beta[1:] ** 2, 0.1, rtol=1e-6)
    np.testing.assert_array_equal(parts.sigma(config), schedule.sigma_posterior(parts.schedule(config)))
    workdirs.write_config(tmp_path, config)
    read = workdirs.read_config(tmp_path)
    names = {"train.loss": "half", "schedule.name": "flat_schedule", "sampling.sigma": "sigma_posterior"}
    assert {key: configs.flatten(read)[key] for key in names} == {key: f"python:{x}" for key, x in names.items()}
    assert configs.flatten(read) == configs.flatten(config)
    with pytest.raises(
        UserError, match=r"schedule\.name='python:flat_schedule' is a function .*schedule=flat_schedule to "
    ):
        parts.build(read)
    with pytest.raises(
        UserError, match=r"train\.loss='python:half' is a function .*: loss=half to diffusion_jax\.train$"
    ):
        parts.loss(read)
    with pytest.raises(UserError, match="schedule=half is not the run's own, flat_schedule: give that one"):
        configs.with_functions(read, schedule=half)
    given = configs.with_functions(read, schedule=flat_schedule, sigma=schedule.sigma_beta)  # another sigma will do
    assert parts.build(given).schedule.num_steps == 20  # and sampling needs no loss
    refused = (
        r"holds another run .*loss: 'python:half' there, 'simple' here.*: give .*loss=half, schedule=flat_schedule"
    )
    with pytest.raises(UserError, match=refused):
        configs.check_same_run(read, tiny_config(), tmp_path)


def test_a_function_without_a_name_is_refused():
    with pytest.raises(UserError, match=r"loss=<function .*lambda.* must be a function with a name"):
        configs.with_functions(tiny_config(), loss=lambda *_: 0)
    with pytest.raises(UserError, match="loss='simple' must be a function with a name"):
        configs.with_functions(tiny_config(), loss="simple")


def test_training_is_a_function_and_a_module():
    import diffusion_jax

    assert diffusion_jax.train.train is diffusion_jax.train.__call__
    with pytest.raises(UserError, match="loss=3 must be a function"):
        diffusion_jax.train(tiny_config(), "nowhere", loss=3)


def test_another_sampler_takes_all_steps():
    config = tiny_config(sampling__sampler="dpmpp_2m", sampling__steps=5)
    assert configs.with_sampling(config, sampler="ancestral").sampling.steps == 0
    assert configs.with_sampling(config, sampler="ddim").sampling.steps == 5
