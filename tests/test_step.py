import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Examples, SmallNetwork, assert_same, tiny_config

from diffusion_jax import losses, parts, schedule, step, unet
from diffusion_jax.data import pipeline
from diffusion_jax.running import dispatch


def make_step(config, loss_fn=None, apply_fn=None, **options):
    return step.make_step(
        apply_fn or parts.model(config).apply,
        loss_fn or parts.loss(config),
        parts.schedule(config),
        parts.optimizer(config),
        config.train.ema_decay,
        config.seed,
        **options,
    )


def batch(devices=4, per_device=2):
    image = np.random.default_rng(0).integers(0, 256, (devices, per_device, 8, 8, 1), np.uint8)
    return {"image": image}, np.arange(devices * per_device).reshape(devices, per_device)


def linear(variables, x, t, train=False, dropout_keys=None, keep=0.7):
    """A network that compiles quickly: a weight and a bias for each pixel, and dropout in training."""
    w, b = variables["params"]["w"], variables["params"]["b"]
    if train:
        x = x * jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(dropout_keys)
    return jax.vmap(lambda x: x * w + b)(x)


def linear_state(optimizer, number=0):
    """Returns the state of `linear` before step `number`, NumPy arrays."""
    params = {"w": np.full((8, 8, 1), 0.5, np.float32), "b": np.zeros((8, 8, 1), np.float32)}
    opt_state = jax.device_get(optimizer.init(params))
    return step.TrainState(np.int32(number), params, jax.tree.map(np.copy, params), opt_state)


def test_one_step_against_its_parts():
    """The gradient of the mean loss over the whole batch, clipping, Adam, EMA, in plain NumPy and optax."""
    config = tiny_config(train__warmup_steps=0, model__dropout=0.0, train__ema_decay=0.75)
    s, seen = parts.schedule(config), {}

    def spy(eps_bar_fn, s, x_0, t, keys):
        eps_bar = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), x_0.shape[1:]))(keys)
        jax.debug.callback(
            lambda i, *values: seen.update({int(i): values}), jax.lax.axis_index("batch"), x_0, t, eps_bar
        )
        return losses.simple_loss(eps_bar_fn, s, x_0, t, eps_bar)

    apply_fn, start = functools.partial(linear, keep=1.0), linear_state(parts.optimizer(config))
    after, metrics = dispatch.pmapped(make_step(config, spy, apply_fn))(dispatch.replicate(start), batch())
    jax.effects_barrier()
    x_0, t, eps_bar = (np.concatenate([seen[i][k] for i in range(4)]) for k in range(3))
    np.testing.assert_allclose(x_0, batch()[0]["image"].reshape(8, 8, 8, 1) / 127.5 - 1, atol=1e-6)
    assert 1 <= t.min() <= t.max() <= 20
    assert len(np.unique(t)) > 2

    def loss(params):
        def eps_bar_fn(x, t):
            return apply_fn({"params": params}, x, t)

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


def test_a_weight_by_t_shapes_the_gradient_and_not_the_loss_of_the_metrics():
    """Equal weights scale the gradient; weights of 0 up to T/2 leave that of the other half, with the same t."""
    config = tiny_config(train__warmup_steps=0)
    steps = config.schedule.num_steps
    later = np.append(0.0, np.arange(1, steps + 1) > steps // 2).astype(np.float32)

    def metrics(loss_fn=None, weight=None):
        take = dispatch.pmapped(make_step(config, loss_fn, linear, weight=weight))
        return jax.device_get(take(dispatch.replicate(linear_state(parts.optimizer(config))), batch())[1])

    def of_later(eps_bar_fn, s, x_0, t, keys):
        return jnp.where(t > steps // 2, parts.loss(config)(eps_bar_fn, s, x_0, t, keys), 0.0)

    plain, doubled, half, by_hand = (
        metrics(), metrics(weight=np.full(steps + 1, 2.0, np.float32)), metrics(weight=later), metrics(of_later)
    )  # fmt: skip
    assert "weighted_loss" not in plain
    for weighted in (doubled, half):
        for name in ("loss", "loss_t1", "loss_t4"):
            np.testing.assert_array_equal(weighted[name], plain[name])
    np.testing.assert_allclose(doubled["grad_norm"], 2 * plain["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(doubled["weighted_loss"], 2 * plain["loss"], rtol=1e-6)
    assert 0 < half["weighted_loss"][0] < 0.9 * plain["loss"][0]
    np.testing.assert_allclose(half["weighted_loss"], by_hand["loss"], rtol=1e-5)
    np.testing.assert_allclose(half["grad_norm"], by_hand["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("done", [0, 5, 800_000])
def test_power_function_averages_move_by_their_rate(done):
    """By (1 − (1 − 1/n)^(γ+1)) of the way to the new parameters, n steps done; the rest of the state is as without."""
    config, exponents = tiny_config(train__warmup_steps=0), (16.97, 6.94)
    before, trees = linear_state(parts.optimizer(config), done), []
    for i in range(2):
        trees.append(jax.tree.map(lambda x: np.full_like(x, 3 + i), before.params))  # noqa: B023
    plain, with_averages = (
        jax.device_get(dispatch.pmapped(make_step(config, apply_fn=linear, **how))(dispatch.replicate(start), batch()))
        for how, start in [({}, before), ({"power_exponents": exponents}, before._replace(averages=tuple(trees)))]
    )
    assert plain[0].averages is None
    assert_same(with_averages[0]._replace(averages=None), plain[0])
    assert_same(with_averages[1], plain[1])
    for old, new, gamma in zip(trees, with_averages[0].averages, exponents, strict=True):
        share = 1 - (1 - 1 / np.float64(done + 1)) ** (gamma + 1)
        for a, b, p in zip(*map(jax.tree.leaves, (old, new, plain[0].params)), strict=True):
            # float32 keeps 2^-23 of a value, of which a step of 1e-5 is a few hundred units
            np.testing.assert_allclose(b - a, share * (p - a), rtol=1e-5, atol=2.5e-7)


@pytest.mark.parametrize("done", [0, 5, 12_000])
def test_the_decay_of_the_average_rises_with_the_steps_done(done):
    """To min(decay, (1 + n)/(10 + n)) after n steps, however often the run resumed."""
    config = tiny_config(train__ema_decay=0.999, train__warmup_steps=0)
    before = linear_state(parts.optimizer(config), done)
    take = dispatch.pmapped(make_step(config, apply_fn=linear, ema_warmup=True))
    after = jax.device_get(take(dispatch.replicate(before), batch())[0])
    decay = {0: 0.1, 5: 0.4, 12_000: 0.999}[done]
    for new, old, average in zip(*map(jax.tree.leaves, (after.params, before.params, after.ema_params)), strict=True):
        assert abs(new - old).max() > 1e-4
        np.testing.assert_allclose(average - old, (1 - decay) * (new - old), rtol=1e-3, atol=1e-7)


def test_double_precision_changes_no_type_and_no_draw():
    """With JAX_ENABLE_X64 a number without a dtype is a float64, and random bits depend on the dtype."""
    config, network = tiny_config(train__warmup_steps=0), functools.partial(linear, keep=np.float32(0.7))
    keys, h = jax.random.split(jax.random.key(0), 2), np.ones((2, 8), np.float32)

    def stepped():
        state = dispatch.replicate(linear_state(parts.optimizer(config)))
        take = dispatch.pmapped(make_step(config, apply_fn=network, flip=True, accumulate=2, ema_warmup=True))
        return (*jax.device_get(take(state, batch())), jax.device_get(unet.drop(h, 0.3, keys)))

    shapes, (state, metrics, dropped) = parts.abstract_state(config), stepped()
    with jax.enable_x64(True):
        assert parts.abstract_state(config) == shapes
        assert parts.schedule(config).beta.dtype == parts.sigma(config).dtype == np.float32
        wide_state, wide_metrics, wide_dropped = stepped()
    np.testing.assert_array_equal(wide_dropped, dropped, strict=True)
    assert jax.tree.map(lambda x: x.dtype, wide_state) == jax.tree.map(lambda x: x.dtype, state)
    for name in ("loss", "grad_norm"):  # of the t, noise, flips and dropout of the examples
        np.testing.assert_allclose(wide_metrics[name], metrics[name], rtol=1e-5)


def test_randomness_is_of_seed_step_and_index():
    """An example has the t and the keys of its index, wherever in the batch and on whichever device it is."""
    config, streams = tiny_config(), []

    def spy(eps_bar_fn, s, x_0, t, keys):
        jax.debug.callback(lambda *values: streams.append(np.column_stack(values)), t, jax.random.key_data(keys))
        return losses.mean_square(x_0)

    steps = {seed: dispatch.pmapped(make_step(tiny_config(seed=seed), spy, linear)) for seed in (0, 1)}

    def of(seed, number, indices):
        streams.clear()
        state = linear_state(parts.optimizer(config), number)
        steps[seed](dispatch.replicate(state), (batch()[0], indices))
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
        return parts.loss(config)(eps_bar_fn, s, x_0, t, keys)

    take = dispatch.pmapped(make_step(config, counted, linear))
    state = dispatch.replicate(linear_state(parts.optimizer(config)))
    for _ in range(3):
        state, _ = take(state, batch())
    assert int(state.step) == 3
    assert traces == [(2, 8, 8, 1)]


def test_the_step_compiled_for_shapes_is_that_of_the_arrays():
    config, compiled = tiny_config(), []
    take, state = dispatch.pmapped(make_step(config, apply_fn=linear)), linear_state(parts.optimizer(config))

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    take.lower(dispatch.replicated(state), batch()).compile()
    assert compiled
    state = dispatch.replicate(state)
    compiled.clear()
    state, _ = take(state, batch())
    take(state, batch())
    assert compiled == []


def test_the_state_is_given_away():
    """Donation: the memory of the old state is the new one's."""
    config = tiny_config()
    state = dispatch.replicate(linear_state(parts.optimizer(config)))
    dispatch.pmapped(make_step(config, apply_fn=linear))(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema_params, state.opt_state)))


def test_loss_by_quarter():
    sums, counts = step._by_quarter(np.arange(8.0), np.array([1, 2, 3, 5, 5, 6, 6, 6]), 8)
    np.testing.assert_array_equal(counts, [2, 1, 5, 0])
    np.testing.assert_array_equal(sums, [0 + 1, 2, 3 + 4 + 5 + 6 + 7, 0])


def test_t_is_drawn_as_often_as_told():
    """And weighted so that the mean of a loss stays what it is under uniform t."""
    p = np.array([0.0, 0.1, 0.4, 0.2, 0.3])
    t = np.asarray(jax.vmap(lambda key: step._draw_t(key, 4, p))(jax.random.split(jax.random.key(0), 40_000)))
    np.testing.assert_allclose(np.bincount(t, minlength=5) / len(t), p, atol=0.01)

    def gradient(t_probabilities):  # of w in the loss w t, whose mean over uniform t is 2.5
        take = dispatch.pmapped(
            step.make_step(
                lambda variables, x, t, **_: variables["params"]["w"] * t[:, None].astype(jnp.float32),
                lambda output_fn, s, x_0, t, keys: output_fn(x_0, t)[:, 0],
                schedule.ho_linear(4),
                optax.sgd(1.0),
                0.5,
                0,
                t_probabilities,
            )
        )
        w = {"w": np.zeros((), np.float32)}
        state = step.TrainState(np.zeros((), np.int32), w, {"w": w["w"].copy()}, optax.sgd(1.0).init(w))
        batch = {"image": np.zeros((4, 4096, 1), np.uint8)}, np.arange(4 * 4096).reshape(4, 4096)
        return -take(dispatch.replicate(state), batch)[0].params["w"]

    assert gradient(None) == pytest.approx(2.5, abs=0.05)
    assert gradient(p) == pytest.approx(2.5, abs=0.05)


def test_a_bad_step_leaves_everything_but_the_step():
    config = tiny_config()
    before = linear_state(parts.optimizer(config))
    before = before._replace(averages=(jax.tree.map(np.copy, before.params),))

    def infinite(eps_bar_fn, s, x_0, t, keys):
        return jnp.full(t.shape, jnp.inf) * eps_bar_fn(x_0, t).mean()

    take = dispatch.pmapped(make_step(config, infinite, linear, power_exponents=(6.94,)))
    after, metrics = take(dispatch.replicate(before), batch())
    assert_same(jax.device_get(after), before._replace(step=np.int32(1)))
    assert metrics["skipped"][0] == 1


def test_flips_are_a_coin_per_example_and_step():
    """Mirrors images that are dark on the left and bright on the right."""
    pixels = np.zeros((4, 1024, 8, 8, 1), np.uint8)
    pixels[:, :, :, 4:] = 255
    indices = np.arange(4096).reshape(4, 1024)

    def left(output_fn, s, x_0, t, keys):
        return x_0[:, 0, 0, 0]

    def share_of_bright(number, **how):
        take = dispatch.pmapped(make_step(tiny_config(), left, linear, **how))
        state = linear_state(parts.optimizer(tiny_config()), number)
        return (1 + float(take(dispatch.replicate(state), ({"image": pixels}, indices))[1]["loss"][0])) / 2

    assert share_of_bright(0) == pytest.approx(0, abs=1e-6)
    shares = [share_of_bright(number, flip=True) for number in (0, 1)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.04)  # five standard deviations
    assert shares[0] != shares[1]
    keys = jax.random.split(jax.random.key(0), 1024)
    pixels //= 2  # leaves room for the rows' numbers
    first = np.asarray(step._flipped(pixels[0] + np.arange(8, dtype=np.uint8)[:, None, None], keys))
    turned = first[:, 0, 0, 0] != 0
    np.testing.assert_array_equal(first[~turned], pixels[0, ~turned] + np.arange(8)[:, None, None])
    np.testing.assert_array_equal(first[turned], pixels[0, turned, :, ::-1] + np.arange(8)[:, None, None])
    volumes = np.random.default_rng(0).integers(0, 256, (1024, 2, 3, 4, 1), np.uint8)
    expected = np.where(turned[:, None, None, None, None], volumes[:, :, :, ::-1], volumes)
    np.testing.assert_array_equal(step._flipped(volumes, keys), expected)


# ---------------------------------------------------------------- several steps, parts of a step


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(accumulate):
    """To 1e-6, for every leaf: plain gradient descent of rate 1 shows them."""

    config, descent = tiny_config(), optax.sgd(1.0)

    def gradient(accumulate):
        loss, s = parts.loss(config), parts.schedule(config)
        take = dispatch.pmapped(step.make_step(linear, loss, s, descent, 0.5, 0, accumulate=accumulate))
        state = linear_state(descent)
        after, metrics = take(dispatch.replicate(state), batch(per_device=4))
        return jax.tree.map(np.subtract, state.params, jax.device_get(after.params)), jax.device_get(metrics)

    (whole, metrics), (added, others) = gradient(1), gradient(accumulate)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), added, whole)
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("network", [SmallNetwork(0, 0.1, jnp.float32), pytest.param("UNet", marks=pytest.mark.slow)])
def test_a_deterministic_step_does_not_depend_on_the_number_of_devices(network):
    """The state and the metrics after two steps of 8 images in four parts."""
    config = tiny_config(train__warmup_steps=0, train__ema_decay=0.9)
    is_unet = network == "UNet"
    network = parts.model(config) if is_unet else network
    start = jax.device_get(step.init_state(network, parts.optimizer(config), (8, 8, 1), 0))
    take = dispatch.pmapped(make_step(config, apply_fn=network.apply, accumulate=4, deterministic=True, flip=True))
    images = np.random.default_rng(4).integers(0, 256, (8, 8, 8, 1), np.uint8)

    def two_steps(num_devices, order=slice(None)):
        state, indices = start, np.arange(8).reshape(-1, num_devices).T[order]
        for _ in range(2):
            state, metrics = take(state, ({"image": images[indices]}, indices))
        return jax.device_get((state, {name: value[0] for name, value in metrics.items()}))

    two = two_steps(2)
    assert_same(two_steps(4), two)
    assert_same(two_steps(4, order=np.array([2, 0, 3, 1])), two)  # processes list their devices in another order
    if not is_unet:  # for one device XLA divides in the softmax of the UNet in another way
        assert_same(two_steps(1), two)


def test_several_steps_are_so_many_single_ones():
    """The steps of a linear network agree bit for bit; in a loop the CPU rounds convolutions differently."""
    config = tiny_config(train__warmup_steps=0)
    optimizer = parts.optimizer(config)
    one = step.make_step(linear, parts.loss(config), parts.schedule(config), optimizer, 0.5, 0, flip=True)
    images = np.random.default_rng(1).integers(0, 256, (4, 3, 2, 8, 8, 1), np.uint8)
    indices = np.arange(8).reshape(4, 2)
    take, metrics = dispatch.pmapped(dispatch.several(one)), []

    def start():
        return dispatch.replicate(linear_state(optimizer))

    state = start()
    for i in range(3):
        state, found = take(state, ({"image": images[:, i : i + 1]}, indices))
        metrics.append(jax.device_get(found))
    together, found = take(start(), ({"image": images}, indices))
    assert_same(jax.device_get(together), jax.device_get(state))
    for name, values in jax.device_get(found).items():
        np.testing.assert_array_equal(values, np.hstack([line[name] for line in metrics]), err_msg=name)


def test_a_data_set_on_the_device_gives_the_batches_of_the_pipeline():
    """For any place in the run, across the end of an epoch."""
    dataset = Examples(np.random.default_rng(2).integers(0, 256, (37, 8, 8, 1), np.uint8), np.arange(37))
    wanted, indices = pipeline.batches(dataset, seed=5, batch_size=8), np.arange(8).reshape(4, 2)

    def spy(state, batch_and_indices):
        batch, _ = batch_and_indices
        return state._replace(step=state.step + 1), batch

    take = dispatch.pmapped(dispatch.resident(spy, 3, seed=5, batch_size=8), None)
    for start in (0, 4, 12_345):
        state = step.TrainState(np.int32(start), {}, {}, {})
        _, batches = take(dispatch.replicate(state), (dispatch.replicate(dataset.examples(np.arange(37))), indices))
        for i in range(3):
            np.testing.assert_array_equal(batches["image"][:, i].reshape(8, 8, 8, 1), wanted[start + i]["image"])
            np.testing.assert_array_equal(batches["label"][:, i].reshape(8), wanted[start + i]["label"])


@pytest.mark.slow
def test_remat_keeps_fewer_activations():
    """The gradient computes convolutions again; parameters and names stay. `test_train` compares the numbers."""
    config, again = tiny_config(), tiny_config(train__remat=True)
    start = parts.build(config).init_state()
    assert_same(parts.build(again).init_state(), start)
    programs = [
        dispatch.pmapped(make_step(one)).lower(dispatch.replicate(start), batch()).as_text() for one in (config, again)
    ]
    kept, computed_again = (program.count("stablehlo.convolution") for program in programs)
    assert computed_again > kept > 0
