import glob
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from tensorboardX.proto import event_pb2

from diffusion_jax import from_config, losses, process, sample, sampling, schedule, train
from diffusion_jax import state as states
from diffusion_jax.errors import UserError


def run(workdir, **overrides):
    return train.train(tiny_config(**overrides), str(workdir))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]


def assert_same(a, b):
    """Every leaf of the two trees, bit for bit."""
    paths_a, paths_b = (jax.tree.leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in paths_a] == [path for path, _ in paths_b]
    for (path, x), (_, y) in zip(paths_a, paths_b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


# ---------------------------------------------------------------- the run


def test_resumed_run_ends_bit_for_bit_where_the_uninterrupted_ends(uninterrupted, tmp_path):
    whole_workdir, whole = uninterrupted
    run(tmp_path, train__num_steps=3)
    # As after a kill: lines of steps that no checkpoint holds, the last one cut short.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123.0}\n{"step": 5, "lo')
    resumed = run(tmp_path)
    assert int(resumed.step) == 6
    assert_same(resumed, whole)
    assert (tmp_path / "samples/6.png").read_bytes() == (whole_workdir / "samples/6.png").read_bytes()
    assert without_speed(lines(tmp_path)) == without_speed(lines(whole_workdir))


def test_a_finished_run_is_left_alone_but_for_lost_samples(uninterrupted):
    workdir, whole = uninterrupted
    metrics, grid = ((workdir / name).read_bytes() for name in ("metrics.jsonl", "samples/6.png"))
    (workdir / "samples/6.png").unlink()
    assert_same(run(workdir), whole)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert (workdir / "samples/6.png").read_bytes() == grid


def test_a_grid_every_so_often(tmp_path):
    run(tmp_path, train__sample_every=2, train__num_steps=5)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["2.png", "4.png", "5.png"]


def test_what_a_workdir_holds(uninterrupted):
    workdir, _ = uninterrupted
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 8
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert [path.name for path in (workdir / "samples").iterdir()] == ["6.png"]


def test_metrics(uninterrupted):
    workdir, _ = uninterrupted
    written = lines(workdir)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in written] == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3])
    assert written[0]["loss"] == pytest.approx(1, abs=0.1)  # the initial network predicts 0
    assert all(line[name] > 0 for line in written for name in ("grad_norm", "param_norm", "images_per_second"))
    seen = np.array([[line[f"loss_t{i}"] or np.nan for i in range(1, 5)] for line in written])
    assert not np.isnan(seen).all(axis=0).any()


def test_tensorboard_has_the_same_numbers(uninterrupted):
    workdir, _ = uninterrupted
    values = {}
    for name in glob.glob(str(workdir / "events.out.tfevents.*")):
        raw = pathlib.Path(name).read_bytes()
        while raw:  # TFRecord: length, its checksum, the record, its checksum
            length = int.from_bytes(raw[:8], "little")
            event = event_pb2.Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in lines(workdir):
        for name in ("loss", "learning_rate", "grad_norm", "param_norm"):
            assert values[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


def test_metrics_are_means_over_the_interval(uninterrupted, tmp_path):
    run(tmp_path, train__log_every=3)
    single, averaged = lines(uninterrupted[0]), lines(tmp_path)
    assert [line["step"] for line in averaged] == [3, 6]
    for i in (0, 1):
        assert averaged[i]["loss"] == pytest.approx(np.mean([line["loss"] for line in single[3 * i : 3 * i + 3]]))


def test_a_schedule_that_leaves_signal_is_warned_of(tmp_path, capsys):
    run(tmp_path / "short", train__num_steps=1)
    assert "alpha_bar_T = 0.900" in capsys.readouterr().out
    run(tmp_path / "cosine", train__num_steps=1, schedule__name="cosine")
    assert "alpha_bar_T" not in capsys.readouterr().out


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    run(tmp_path, seed=1, train__num_steps=1)
    assert lines(tmp_path)[0]["loss"] != lines(uninterrupted[0])[0]["loss"]


@pytest.mark.parametrize("loss", ["simple", "step", "weighted_step", "vlb", "vlb by importance"])
def test_every_loss_teaches_to_predict_the_noise(tmp_path, loss):
    """Measured by (15), which is 1 for the initial network, whatever it is trained by."""
    config = tiny_config(
        train__loss=loss.removesuffix(" by importance"),
        train__t_sampling="importance" if "importance" in loss else "uniform",
        train__num_steps=60,
        train__batch_size=64,
        train__log_every=20,
        train__learning_rate=5e-3,
    )
    params = train.train(config, str(tmp_path)).params
    x_0 = from_config.images(config)[:256].astype(np.float32) / 127.5 - 1
    t = np.arange(256) % 20 + 1
    eps_bar = np.random.default_rng(0).standard_normal(x_0.shape).astype(np.float32)

    @jax.jit
    def error(params):
        def eps_bar_fn(x, t):
            return from_config.model(config).apply({"params": params}, x, t)

        return losses.simple_loss(eps_bar_fn, from_config.schedule(config), x_0, t, eps_bar).mean()

    assert error(states.init_state(config).params) == pytest.approx(1, abs=0.02)
    assert error(params) < (0.7 if "vlb" in loss else 0.6)  # the bound cares for small t


def test_t_is_drawn_as_often_as_told():
    """And weighted so that the mean of a loss stays what it is under uniform t."""
    p = np.array([0.0, 0.1, 0.4, 0.2, 0.3])
    t = np.asarray(jax.vmap(lambda key: train._draw_t(key, 4, p))(jax.random.split(jax.random.key(0), 40_000)))
    np.testing.assert_allclose(np.bincount(t, minlength=5) / len(t), p, atol=0.01)

    def gradient(t_probabilities):  # of w in the loss w t, whose mean over uniform t is 2.5
        step = train.make_train_step(
            lambda variables, x, t, **_: variables["params"]["w"] * t[:, None].astype(jnp.float32),
            lambda output_fn, s, x_0, t, keys: output_fn(x_0, t)[:, 0],
            schedule.ho_linear(4),
            optax.sgd(1.0),
            0.5,
            0,
            t_probabilities,
        )
        w = {"w": np.zeros((), np.float32)}
        state = states.TrainState(np.zeros((), np.int32), w, {"w": w["w"].copy()}, optax.sgd(1.0).init(w))
        batch = np.zeros((4, 4096, 1), np.uint8), np.arange(4 * 4096).reshape(4, 4096)
        return -step(states.replicate(state, train.AXIS), batch)[0].params["w"]

    assert gradient(None) == pytest.approx(2.5, abs=0.05)
    assert gradient(p) == pytest.approx(2.5, abs=0.05)


def test_what_training_looks_at_every_so_often(tmp_path):
    """Held-out loss, samples and copies, in lines of their own; the run is the same as without."""
    split = {"data__split": "train[:200]", "data__test_split": "train[200:230]"}
    quiet = run(tmp_path / "quiet", **split)
    looked = run(tmp_path / "looked", train__evaluate_every=2, **split)
    jax.tree.map(np.testing.assert_array_equal, looked, quiet)
    own = [line for line in lines(tmp_path / "looked") if "frechet_pixels" in line]
    assert [line["step"] for line in own] == [2, 4, 6]
    others = [line["loss"] for line in lines(tmp_path / "looked") if "frechet_pixels" not in line]
    assert others == [line["loss"] for line in lines(tmp_path / "quiet")]
    assert own[-1]["loss"] == others[-1]
    assert (tmp_path / "looked" / "samples" / "nearest-6.png").exists()

    config = sample.read_config(tmp_path / "looked")
    config.data.split = "train[200:230]"
    x_0 = from_config.images(config)[:].astype(np.float32) / 127.5 - 1
    t = 1 + np.arange(30) * 20 // 30
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(30))
    network = from_config.network(config)
    loss = losses.with_noise(losses.simple_loss, 1)(
        lambda x, t: network({"params": looked.ema_params}, x, t), from_config.schedule(config), x_0, t, keys
    )
    assert own[-1]["held_out_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
    assert own[-1]["held_out_loss_t4"] == pytest.approx(float(loss[t > 15].mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    run(tmp_path, train__num_steps=3)
    with pytest.raises(FloatingPointError, match=r"param_norm is inf at step 4; .* of step 3"):
        run(tmp_path, train__learning_rate=1e38)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))


def nan_now_and_then(config):
    """The loss of the config, but for about a third of the steps, by the key of an example."""
    loss = from_config.loss(config)

    def bad_loss(eps_bar_fn, s, x_0, t, keys):
        return jnp.where(jax.random.uniform(keys[0]) < 0.1, jnp.nan, loss(eps_bar_fn, s, x_0, t, keys))

    return bad_loss


def test_bad_steps_are_left_out_on_request(tmp_path, monkeypatch):
    bad_loss = nan_now_and_then(tiny_config())  # of 4 devices: any of them spoils the step
    monkeypatch.setattr(from_config, "loss", lambda config: bad_loss)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+; .*max_bad_steps"):
        run(tmp_path / "a", train__num_steps=20)
    state = run(tmp_path / "b", train__num_steps=20, train__max_bad_steps=5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    skipped = [line["skipped"] for line in lines(tmp_path / "b")]
    assert 0 < sum(skipped) < 20
    assert state.opt_state[1][0].count == 20 - sum(skipped)


def test_a_bad_step_leaves_everything_but_the_step():
    config = tiny_config()
    before = states.init_state(config)
    step = make_step(config, lambda eps_bar_fn, s, x_0, t, keys: jnp.full(t.shape, jnp.inf) * eps_bar_fn(x_0, t).mean())
    after, metrics = step(states.replicate(before, train.AXIS), batch())
    assert_same(jax.device_get(after), before._replace(step=np.int32(1)))
    assert metrics["skipped"][0] == 1


# ---------------------------------------------------------------- the step


def make_step(config, loss_fn=None):
    return train.make_train_step(
        from_config.model(config).apply,
        loss_fn or from_config.loss(config),
        from_config.schedule(config),
        from_config.optimizer(config),
        config.train.ema_decay,
        config.seed,
    )


def batch(devices=4, per_device=2):
    pixels = np.random.default_rng(0).integers(0, 256, (devices, per_device, 8, 8, 1), np.uint8)
    return pixels, np.arange(devices * per_device).reshape(devices, per_device)


def test_one_step_against_its_parts():
    """The gradient of the mean loss over the whole batch, clipping, Adam, EMA, in plain NumPy and optax."""
    config = tiny_config(train__warmup_steps=0, model__dropout=0.0, train__ema_decay=0.75)
    s, seen = from_config.schedule(config), {}

    def spy(eps_bar_fn, s, x_0, t, keys):
        eps_bar = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]))(keys)
        jax.debug.callback(
            lambda i, *values: seen.update({int(i): values}), jax.lax.axis_index("batch"), x_0, t, eps_bar
        )
        return losses.simple_loss(eps_bar_fn, s, x_0, t, eps_bar)

    start = states.init_state(config)
    after, metrics = make_step(config, spy)(states.replicate(start, train.AXIS), batch())
    jax.effects_barrier()
    x_0, t, eps_bar = (np.concatenate([seen[i][k] for i in range(4)]) for k in range(3))
    np.testing.assert_allclose(x_0, batch()[0].reshape(8, 8, 8, 1) / 127.5 - 1, atol=1e-6)
    assert 1 <= t.min() <= t.max() <= 20
    assert len(np.unique(t)) > 2

    def loss(params):
        def eps_bar_fn(x, t):
            return from_config.model(config).apply({"params": params}, x, t)

        return losses.simple_loss(eps_bar_fn, s, x_0, t, eps_bar).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(start.params)
    norm = optax.tree.norm(grads)
    scale = min(1.0, 1.0 / float(norm))
    expected = jax.tree.map(lambda p, g: p - 2e-3 * scale * g / (abs(scale * g) + 1e-8), start.params, grads)
    np.testing.assert_allclose(metrics["loss"], np.full(4, value), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.full(4, norm), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], np.full(4, optax.tree.norm(after.params)), rtol=1e-5)
    for new, ema, old, hand, g in zip(
        *map(jax.tree.leaves, (after.params, after.ema_params, start.params, expected, grads)), strict=True
    ):
        clear = abs(g) > 1e-6  # Adam's first step is ± the rate: where g is noise, so is its sign
        np.testing.assert_allclose(new[clear], hand[clear], atol=1e-4)
        np.testing.assert_allclose(ema, 0.75 * old + 0.25 * new, atol=1e-6)
    assert int(after.step) == 1


def test_randomness_is_of_seed_step_and_index():
    """An example has the t and the keys of its index, wherever in the batch and on whichever device it is."""
    config, streams = tiny_config(), []

    def spy(eps_bar_fn, s, x_0, t, keys):
        jax.debug.callback(lambda *values: streams.append(np.column_stack(values)), t, jax.random.key_data(keys))
        return losses.mean_square(x_0)

    steps = {seed: make_step(tiny_config(seed=seed), spy) for seed in (0, 1)}

    def of(seed, step, indices):
        streams.clear()
        state = states.init_state(config)._replace(step=np.int32(step))
        steps[seed](states.replicate(state, train.AXIS), (batch()[0], indices))
        jax.effects_barrier()
        return sorted(map(tuple, np.concatenate(streams).tolist()))

    indices = batch()[1]
    first = of(0, 5, indices)
    assert len({tuple(key) for _, *key in first}) == 8
    assert of(0, 5, indices[::-1, ::-1]) == first
    assert of(0, 6, indices) != first
    assert of(1, 5, indices) != first


def test_the_step_compiles_once():
    config, traces = tiny_config(), []

    def counted(eps_bar_fn, s, x_0, t, keys):
        traces.append(x_0.shape)
        return from_config.loss(config)(eps_bar_fn, s, x_0, t, keys)

    step = make_step(config, counted)
    state = states.replicate(states.init_state(config), train.AXIS)
    pixels, indices = batch()
    for on_devices in train._to_devices([pixels.reshape(8, 8, 8, 1)] * 5, (4, 2)):
        state, _ = step(state, (on_devices, indices))
    assert int(state.step) == 3
    assert traces == [(2, 8, 8, 1)]


def test_the_state_is_given_away():
    """Donation: the memory of the old state is the new one's."""
    state = states.replicate(states.init_state(tiny_config()), train.AXIS)
    make_step(tiny_config())(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema_params, state.opt_state)))


def test_loss_by_quarter():
    t = np.array([[1, 2], [3, 5], [5, 6], [6, 6]])
    values = np.arange(8.0).reshape(4, 2)
    of = jax.pmap(lambda losses, t: train._loss_by_quarter(losses, t, 8), axis_name=train.AXIS)
    actual = {name: float(value[0]) for name, value in of(values, t).items()}
    assert actual == pytest.approx({"loss_t1": 0.5, "loss_t2": 2, "loss_t3": 5, "loss_t4": np.nan}, nan_ok=True)


def test_initial_state():
    config = tiny_config()
    state = states.init_state(config)
    assert_same(state.params, state.ema_params)
    assert_same(state, states.init_state(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), states.abstract_state(config)
    )


# ---------------------------------------------------------------- from a notebook


def test_load(uninterrupted):
    workdir, state = uninterrupted
    sample_fn, params = sample.load(workdir, num=6)
    assert_same(params, state.ema_params)
    x = sample_fn(params, jax.random.key(0))
    assert x.shape == (6, 8, 8, 1)
    assert float(abs(x).max()) <= 1  # clipped, and no noise at t = 1
    few, _ = sample.load(workdir)
    np.testing.assert_allclose(few(params, jax.random.key(0)), x[:4], atol=1e-4)


def test_load_another_sampler(uninterrupted):
    """Each is its chain, from the latent of the same keys."""
    workdir, _ = uninterrupted
    apply_fn, params, s = sample.load_network(workdir)
    rng = jax.random.key(0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(4))
    latent = sampling.normal(keys, sampling.LATENT, (8, 8, 1))

    def eps_bar_fn(x, t):
        return apply_fn({"params": params}, x, t)

    ddim, _ = sample.load(workdir, sampler="ddim", steps=5, eta=0.5, clip=False)
    expected = sampling.ddim_chain(eps_bar_fn, s, sampling.grid_uniform(s, 5), latent, keys, 0.5)
    np.testing.assert_allclose(ddim(params, rng), expected, rtol=1e-4, atol=1e-4)
    solver, _ = sample.load(workdir, sampler="dpmpp_2m", steps=4)
    expected = sampling.dpmpp_2m_chain(eps_bar_fn, s, sampling.grid_log_snr(s, 4), latent, clip=(-1.0, 1.0))
    np.testing.assert_allclose(solver(params, rng), expected, rtol=1e-4, atol=1e-4)
    half, _ = sample.load(workdir, dtype="bfloat16")
    whole, _ = sample.load(workdir)
    assert 0 < float(jnp.abs(half(params, rng) - whole(params, rng)).max()) < 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sampler": "euler"}, "sampler='euler' must be one of ancestral, ddim, dpmpp_2m"),
        ({"sampler": "ddim", "steps": 21}, r"steps=21 must be in 1\.\.20"),
        ({"steps": 5}, "steps=5 does not fit .*ancestral"),
        ({"sampler": "ddim", "eta": -1.0}, r"eta=-1\.0 must be a number >= 0"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
    ],
)
def test_load_what_cannot_be(uninterrupted, given, message):
    with pytest.raises(UserError, match=message):
        sample.load(uninterrupted[0], **given)


def test_a_progress_bar_changes_no_bit(uninterrupted, capsys):
    plain, params = sample.load(uninterrupted[0], sampler="ddim", steps=10)
    watched, _ = sample.load(uninterrupted[0], sampler="ddim", steps=10, progress=True)
    for _ in range(2):
        np.testing.assert_array_equal(watched(params, jax.random.key(0)), plain(params, jax.random.key(0)))
    jax.effects_barrier()
    assert capsys.readouterr().err.count("sampling: 100%") >= 2


def test_samples_in_shards(uninterrupted, tmp_path, monkeypatch):
    """As in one file; only what is missing is made; other samples are not mixed in."""
    workdir, _ = uninterrupted
    monkeypatch.setattr(sample, "SHARD", 3)
    sample.sample(workdir, 8, 1, str(tmp_path / "all.npz"))
    sample.sample(workdir, 8, 1, f"{tmp_path}/shards/")
    names = ["00000000-00000002.npz", "00000003-00000005.npz", "00000006-00000007.npz"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "samples.json"]
    (tmp_path / "shards" / names[1]).unlink()
    before = (tmp_path / "shards" / names[0]).stat().st_mtime_ns
    sample.sample(workdir, 8, 1, f"{tmp_path}/shards/")
    assert (tmp_path / "shards" / names[0]).stat().st_mtime_ns == before
    shards = np.concatenate([np.load(tmp_path / "shards" / name)["arr_0"] for name in names])
    whole = np.load(tmp_path / "all.npz")["arr_0"]
    assert abs(shards.astype(int) - whole).max() <= 1  # 1e-6 may round to the next grey level
    sample.sample(workdir, 9, 1, f"{tmp_path}/shards/")  # one more: the last shard grows
    names[2] = "00000006-00000008.npz"
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "samples.json"]
    with pytest.raises(UserError, match="holds samples of another run"):
        sample.sample(workdir, 8, 2, f"{tmp_path}/shards/")


@pytest.mark.parametrize("loss", ["simple", "step"])
@pytest.mark.parametrize("prediction", ["x_0", "velocity"])
def test_other_predictions_reach_loss_and_sampler(prediction, loss):
    """A network whose output is wired by hand: training and sampling see it as what it predicts."""
    config = tiny_config(model__prediction=prediction, train__loss=loss)
    s = from_config.schedule(config)
    x_0, keys = np.full((3, 8, 8, 1), 0.3, np.float32), jax.random.split(jax.random.key(1), 3)
    t = np.array([2, 9, 20])

    def knows_x_0(x, t):  # the right output for x_0 = 0.3
        if prediction == "x_0":
            return jnp.full_like(x, 0.3)
        eps_bar = jax.vmap(lambda x, t: process.predict_eps_bar(s, x, t, 0.3))(x, t)
        return jax.vmap(lambda t, eps_bar: process.velocity(s, 0.3, t, eps_bar))(t, eps_bar)

    value = from_config.loss(config)(knows_x_0, s, x_0, t, keys)
    if loss == "simple":
        np.testing.assert_allclose(value, 0, atol=1e-9)
    else:  # what ε̄ says of ε alone remains: α_t² β̄_{t−1}²/β̄_t², about
        rest = (s.alpha[t] * s.beta_bar[t - 1] / s.beta_bar[t]) ** 2
        np.testing.assert_allclose(value, rest, rtol=0.6)
    eps_bar_fn = from_config._eps_bar_fn(config, knows_x_0, s)
    ts, x_t = sampling.grid_uniform(s, 20), jnp.ones((3, 8, 8, 1))
    np.testing.assert_allclose(sampling.ddim_chain(eps_bar_fn, s, ts, x_t, keys), x_0, atol=1e-4)


def test_samples_do_not_depend_on_the_devices(uninterrupted, monkeypatch):
    """20 steps: the noise bit for bit, the images to 1e-4."""
    workdir, _ = uninterrupted
    sample_fn, params = sample.load(workdir, num=5)
    four = sample_fn(params, jax.random.key(0))
    local = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda: local[:1])
    sample_fn, _ = sample.load(workdir, num=5)
    one = sample_fn(params, jax.random.key(0))
    assert one.sharding.device_set == {local[0]}
    np.testing.assert_allclose(one, four, atol=1e-4)


def test_load_network(uninterrupted):
    workdir, state = uninterrupted
    apply_fn, params, s = sample.load_network(str(workdir))
    x, t = jnp.zeros((2, 8, 8, 1)), np.array([1, 20])
    assert s.num_steps == 20
    expected = from_config.model(tiny_config()).apply({"params": state.ema_params}, x, t)
    np.testing.assert_array_equal(apply_fn({"params": params}, x, t), expected)
