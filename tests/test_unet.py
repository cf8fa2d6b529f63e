import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, tiny_config

from diffusion_jax import parts, unet

SMALL = {"channels": 8, "multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "num_groups": 4}
X = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)
T = np.array([1, 7])


def shapes(**fields):
    size = fields.pop("size", 32)
    model = unet.UNet(**fields)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.ones(1, int))["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def small():
    """Returns a network and parameters."""
    model = unet.UNet(**SMALL)
    return model, random_params(model, X, T)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(model, params, x, t, train=False, dropout_keys=None, rngs=None):
    """Applies the network as one program; op by op it takes seconds. So do two batch sizes."""
    return model.apply({"params": params}, x, t, train, dropout_keys, rngs=rngs)


# ---------------------------------------------------------------- Ho et al.'s weights


def test_parameters_of_the_cifar10_network():
    assert count(shapes()) == 35_746_307


def test_parameters_of_the_256_network():
    assert count(shapes(multipliers=(1, 1, 2, 2, 4, 4), size=256)) == 113_673_219


def test_lists_are_as_good_as_tuples():
    listed, network = (unet.UNet(multipliers=kind([1, 2]), attention_resolutions=kind([4])) for kind in (list, tuple))
    assert listed == network and hash(listed) == hash(network)


def test_parameter_names_are_hos_scopes():
    params = shapes(multipliers=(1, 2), attention_resolutions=(16,))
    blocks = {"norm1", "conv1", "temb_proj", "norm2", "conv2"}
    assert set(params["down_0_block_0"]) == blocks
    assert set(params["down_1_block_0"]) == blocks | {"nin_shortcut"}
    assert set(params["mid_attn_1"]) == {"norm", "q", "k", "v", "proj_out"}
    assert [name for name in sorted(params) if "attn" in name] == [
        *("down_1_attn_0", "down_1_attn_1", "mid_attn_1"),
        *("up_1_attn_0", "up_1_attn_1", "up_1_attn_2"),
    ]
    assert params["up_0_block_0"]["conv1"]["kernel"].shape == (3, 3, 256 + 128, 128)
    assert params["up_0_block_2"]["conv1"]["kernel"].shape == (3, 3, 128 + 128, 128)
    assert params["up_1_upsample"]["kernel"].shape == (3, 3, 256, 256)


def test_initial_scales():
    """variance_scaling(1, fan_avg, uniform) has the bound sqrt(3 / fan_avg); residual branches end in 1e-5 of it."""
    params = parts.build(tiny_config()).init_state().params  # a program that other tests compile too
    assert all(np.all(leaf == 0) for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "bias")
    block = params["mid_block_1"]
    bound = np.sqrt(3 / (9 * 8))
    assert 0.9 * bound < abs(block["conv1"]["kernel"]).max() <= bound
    assert 0.9e-5 * bound < abs(block["conv2"]["kernel"]).max() <= 1e-5 * bound
    assert abs(params["mid_attn_1"]["proj_out"]["kernel"]).max() <= 1e-5 * np.sqrt(3 / 8)
    assert abs(params["conv_out"]["kernel"]).max() <= 1e-5 * np.sqrt(3 / (9 * (8 + 1) / 2))


# ---------------------------------------------------------------- modules


def test_time_embedding():
    t = np.array([0, 1, 999])
    frequencies = 1e4 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(np.outer(t, frequencies)), np.cos(np.outer(t, frequencies))], axis=1)
    np.testing.assert_allclose(unet.time_embedding(t, 8), expected, atol=1e-4)


def test_step_1_is_embedded_as_0(small, monkeypatch):
    model, params = small
    embedded = []
    embed = unet.time_embedding
    monkeypatch.setattr(unet, "time_embedding", lambda t, features: embedded.append(t) or embed(t, features))
    jax.eval_shape(lambda: model.apply({"params": params}, X, T))
    np.testing.assert_array_equal(embedded[0], [0, 6])


def test_attention_is_one_head_over_all_positions():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)
    block = unet.AttentionBlock(4, jnp.float32)
    params = jax.device_get(jax.jit(block.init)(jax.random.key(0), x)["params"])
    params["proj_out"]["kernel"] = np.eye(8, dtype=np.float32)
    norm = jax.jit(nn.GroupNorm(4, epsilon=1e-6).apply)
    h = np.asarray(norm({"params": params["norm"]}, x), np.float64).reshape(2, 12, 8)
    q, k, v = (h @ params[name]["kernel"] for name in "qkv")
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    actual = jax.jit(block.apply)({"params": params}, x)
    np.testing.assert_allclose(actual, x + (weights @ v).reshape(x.shape), atol=1e-5)


def test_residual_block():
    """The block is norm, SiLU, conv, + time embedding, norm, SiLU, conv, + the input through a 1×1 convolution."""
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32)
    temb = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    block = unet.ResnetBlock(16, 0.0, 4, jnp.float32)
    params = jax.jit(block.init)(jax.random.key(0), x, temb)["params"]
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), params)
    norm, conv = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False), nn.Conv(16, (3, 3))

    @jax.jit
    def by_parts(params):
        def part(module, name, x):
            return module.apply({"params": params[name]}, x)

        h = part(conv, "conv1", nn.silu(part(norm, "norm1", x)))
        h = h + part(nn.Dense(16), "temb_proj", nn.silu(temb))[:, None, None, :]
        h = part(conv, "conv2", nn.silu(part(norm, "norm2", h)))
        return part(nn.Dense(16), "nin_shortcut", x) + h

    actual = jax.jit(block.apply)({"params": params}, x, temb)
    np.testing.assert_allclose(actual, by_parts(params), rtol=1e-5, atol=1e-5)


def test_group_norm_far_from_zero_and_at_low_contrast():
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 32)).astype(np.float32)
    norm = unet.GroupNorm(8, jnp.float32)
    variables, apply_norm = norm.init(jax.random.key(0), x), jax.jit(norm.apply)
    np.testing.assert_allclose(apply_norm(variables, x + 100), apply_norm(variables, x), atol=1e-4)
    groups = x.astype(np.float64).reshape(64, 8, 4) * 1e-3
    expected = (groups - groups.mean(axis=(0, 2), keepdims=True)) / np.sqrt(
        groups.var(axis=(0, 2), keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(apply_norm(variables, x * 1e-3), expected.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("channels, groups", [(128, 32), (384, 32), (16, 16), (48, 16), (6, 2)])
def test_groups_divide_the_channels(channels, groups):
    """Values, gradients and parameter names equal those of Flax's two-pass GroupNorm with the same groups."""
    x = np.random.default_rng(0).standard_normal((2, 4, 4, channels)).astype(np.float32) * 3 + 5
    flax = nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False)
    variables = {"params": random_params(flax, x)}

    def value_and_gradient(module):
        return jax.jit(jax.value_and_grad(lambda v, x: (module.apply(v, x) ** 3).mean(), (0, 1)))(variables, x)

    expected, actual = value_and_gradient(flax), value_and_gradient(unet.GroupNorm(32, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)


def test_group_norm_with_outliers_at_the_row_of_the_shift():
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 32)).astype(np.float32)
    x[:, 4] += 30
    flax = nn.GroupNorm(8, epsilon=1e-6, use_fast_variance=False)
    variables = flax.init(jax.random.key(0), x)
    actual = jax.jit(unet.GroupNorm(8, jnp.float32).apply)(variables, x)
    np.testing.assert_allclose(actual, jax.jit(flax.apply)(variables, x), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 4, 4, 8), (2, 4, 2, 2, 8)])
def test_group_norm_of_a_sum(shape):
    """Adding a number to a channel of an image is the same outside and inside, with its gradient."""
    rng = np.random.default_rng(0)
    x, added = rng.standard_normal(shape).astype(np.float32), 20 * rng.standard_normal((2, 8)).astype(np.float32)
    norm = unet.GroupNorm(4, jnp.float32)
    variables = jax.tree.map(lambda leaf: leaf + 0.5, norm.init(jax.random.key(0), x))

    def inside(x, added):
        return norm.apply(variables, x, added)

    def outside(x, added):
        return norm.apply(variables, x + added.reshape(2, *(1,) * (x.ndim - 2), 8))

    def values_and_gradients(function):
        def cubes(*args):
            y = function(*args)
            return (y**3).sum(), y

        gradients, y = jax.jit(jax.grad(cubes, (0, 1), has_aux=True))(x, added)
        return y, *gradients

    (y, *gradients), (other_y, *other_gradients) = values_and_gradients(inside), values_and_gradients(outside)
    np.testing.assert_allclose(y, other_y, atol=1e-5)
    for actual, expected in zip(gradients, other_gradients, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_downsampling_pads_at_the_bottom_and_right():
    """A stride-2 kernel that copies its centre reads pixels 1, 3, 5, …: no padding at the top and left."""
    x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)
    down = unet.conv(1, jnp.float32, strides=2).apply({"params": {"kernel": kernel, "bias": jnp.zeros(1)}}, x)
    np.testing.assert_array_equal(down, x[:, 1::2, 1::2])


def test_upsampling_is_nearest():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(unet._double(x), x.repeat(2, axis=1).repeat(2, axis=2))


# ---------------------------------------------------------------- the network


def test_images_need_not_be_square(small):
    model, params = small
    assert jax.eval_shape(lambda: model.apply({"params": params}, X, T)).shape == X.shape


def test_the_step_and_every_weight_matter(small):
    model, params = small

    @jax.jit
    @jax.value_and_grad
    def loss(params, t):
        return jnp.sum(model.apply({"params": params}, X, t) ** 2)

    (value, gradient), (other, _) = jax.device_get((loss(params, T), loss(params, T + 1)))
    assert not np.isclose(value, other, rtol=1e-4)
    dead = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not np.any(leaf)]
    # Ho's network has a bias of the keys, but a shift of all keys does not change the softmax.
    assert [name for name in dead if "['k']['bias']" not in name] == []


def test_examples_do_not_affect_each_other(small):
    model, params = small
    other = apply(model, params, np.stack([-X[0], X[1]]), np.array([5, T[1]]))
    both = apply(model, params, X, T)
    np.testing.assert_allclose(other[1], both[1], atol=1e-4)
    assert not np.allclose(other[0], both[0], atol=1e-2)


@pytest.mark.parametrize("size", [(9, 8), (8, 6)])
def test_image_sizes_that_cannot_be_halved_are_rejected(size):
    model = unet.UNet(channels=8, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} .* multiples of 4"):
        model.init(jax.random.key(0), jnp.zeros((1, *size, 1)), jnp.ones(1, int))


def test_bfloat16_computes_with_float32_parameters_and_output(small):
    model, params = small
    half = model.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), X, T))} == {
        jnp.dtype("float32")
    }
    exact, rough = apply(model, params, X, T), apply(half, params, X, T)
    assert rough.dtype == jnp.float32
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05  # bfloat16 rounds visibly, and no worse


def test_bfloat16_keeps_statistics_and_softmax_in_float32():
    """Exponentials (the softmax; SiLU compiles to logistic) and reductions of the HLO are float32."""
    block = unet.AttentionBlock(4, jnp.bfloat16)
    x = jnp.zeros((2, 4, 4, 8), jnp.bfloat16)
    params = block.init(jax.random.key(0), x)
    text = jax.jit(block.apply).lower(params, x).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.exponential" in line or "stablehlo.reduce" in line]
    assert len(lines) >= 4
    assert all("bf16" not in line for line in lines)


def test_dropout_only_in_training(small):
    model, params = small
    model = model.clone(dropout=0.5)

    def dropped(key, train):
        return apply(model, params, X, T, train=train, rngs={"dropout": jax.random.key(key)})

    np.testing.assert_array_equal(dropped(0, False), dropped(1, False))
    assert not np.allclose(dropped(0, True), dropped(1, True))
    np.testing.assert_array_equal(dropped(0, True), dropped(0, True))


def test_dropout_of_an_example_depends_on_its_key_alone(small):
    model, params = small
    model = model.clone(dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    both = apply(model, params, X, T, True, keys)
    other = apply(model, params, X, T, True, jnp.stack([jax.random.key(7), keys[1]]))
    np.testing.assert_allclose(other[1], both[1], rtol=1e-4, atol=1e-4)
    assert not np.allclose(other[0], both[0])


def test_drop_keeps_the_mean_and_differs_between_examples():
    h = jnp.ones((2, 100, 100, 1))
    dropped = unet.drop(h, 0.25, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert not np.array_equal(dropped[0], dropped[1])


def test_every_block_has_its_own_dropout_keys(small, monkeypatch):
    model, params = small
    block_keys = []
    monkeypatch.setattr(unet, "drop", lambda h, rate, keys: block_keys.append(jax.random.key_data(keys)) or h)

    @jax.jit
    def keys():
        model.clone(dropout=0.1).apply({"params": params}, X, T, True, jax.random.split(jax.random.key(0), 2))
        return jnp.concatenate(block_keys)

    num_blocks = 2 + 2 + 2 * 2  # down, middle, up
    assert len(np.unique(keys(), axis=0)) == 2 * len(block_keys) == 2 * num_blocks  # two examples


# ---------------------------------------------------------------- signals and volumes

THIN = unet.UNet(**SMALL | {"num_res_blocks": 0})  # compiles in half the time, and lacks no kind of layer


@pytest.mark.parametrize("axes", [1, 3])
def test_kernels_alone_differ_between_signals_images_and_volumes(axes):
    model, size = unet.UNet(**SMALL), (1, *[8] * axes, 3)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(size), jnp.ones(1, int))["params"]
    images = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.ones(1, int))["params"]
    expected = jax.tree.map(lambda x: (*[3] * axes, *x.shape[2:]) if len(x.shape) == 4 else x.shape, images)
    assert jax.tree.map(lambda x: x.shape, tree) == expected


@pytest.mark.parametrize("shape", [(8,), pytest.param((8, 8), marks=pytest.mark.slow)])
def test_one_more_axis_of_copies_changes_nothing(shape):
    """Signals are images of equal rows, and images volumes of equal slices, if no kernel looks beyond its own.

    Normalisation, attention, both resamplings and the time embedding are over copies what they are over one.
    """
    x = np.random.default_rng(0).standard_normal((2, *shape, 3)).astype(np.float32)
    params = random_params(THIN, x, T)

    def extended(leaf):
        return jnp.zeros((3, *leaf.shape)).at[1].set(leaf) if leaf.ndim > 2 else leaf

    one = np.asarray(apply(THIN, params, x, T))
    copies = apply(THIN, jax.tree.map(extended, params), np.repeat(x[:, None], 8, axis=1), T)
    assert one.shape == x.shape and one.std() > 0.1
    np.testing.assert_allclose(copies, np.repeat(one[:, None], 8, axis=1), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_axes_of_a_volume_are_alike():
    """The network of permuted kernels takes the permuted volume to the permuted output."""
    model = THIN.clone(attention_resolutions=(1, 2, 4))  # of every level, whichever axis is the first
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 2, 3)).astype(np.float32)
    params = random_params(model, x, T)
    turned = jax.tree.map(lambda leaf: leaf.transpose(2, 0, 1, 3, 4) if leaf.ndim == 5 else leaf, params)
    x_turned = x.transpose(0, 3, 1, 2, 4)
    out = np.asarray(apply(model, params, x, T))
    np.testing.assert_allclose(apply(model, turned, x_turned, T), out.transpose(0, 3, 1, 2, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size, text", [((9,), "9"), ((8, 8, 6), "8x8x6")])
def test_sizes_that_cannot_be_halved_are_rejected(size, text):
    model = unet.UNet(channels=8, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=f"^{text} cannot be halved 2 times by 3 levels: give multiples of 4"):
        model.init(jax.random.key(0), jnp.zeros((1, *size, 1)), jnp.ones(1, int))


def test_upsampling_is_nearest_along_every_axis():
    x = jnp.arange(48.0).reshape(2, 2, 3, 4, 1)
    expected = x.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_array_equal(unet._double(x), expected)
    np.testing.assert_array_equal(unet._double(x[:, :, 0, 0]), x[:, :, 0, 0].repeat(2, axis=1))
