"""The UNet of Ho et al. (2020), appendix B, weight for weight.

Layouts are NHWC. Modules are named after the variable scopes of Ho's code, with "_" for "/".
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def _init(scale=1.0):
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


_EPSILON = 1e-6  # of GroupNorm, as in Ho's weights: 1e-5 shows in low contrast

# Ho's "init_scale=0": a residual branch that starts as nearly nothing, but not dead.
_NEARLY_ZERO = 1e-10


def conv(features, dtype, kernel_size=3, strides=1, init_scale=1.0, name=None):
    """A 3×3 convolution, padding "SAME" (which pads a strided one at the bottom and right)."""
    return nn.Conv(features, (kernel_size, kernel_size), strides, dtype=dtype, kernel_init=_init(init_scale), name=name)


def dense(features, dtype, init_scale=1.0, name=None):
    """A dense layer; on NHWC images a 1×1 convolution (Ho's `nin`)."""
    return nn.Dense(features, dtype=dtype, kernel_init=_init(init_scale), name=name)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) with float32 statistics, ε = 1e-6.

    With fewer channels than groups, or a number that they do not divide: as many groups as divide both.
    Mean and variance come from one pass over x, and of x less a value near the mean: as exact as two
    passes, where E[x²] − E[x]² errs by 3e-2 at a mean of 100. Sums go over the pixels first, so that x
    keeps its channels side by side.
    """

    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = math.gcd(self.num_groups, channels)

        def group_mean(per_channel):  # [B, C] -> [B, C]
            means = per_channel.reshape(-1, groups, channels // groups).mean(axis=-1)
            return jnp.repeat(means, channels // groups, axis=-1)

        # The pixel is taken before the cast: of the cast x XLA would make an array, to take it from.
        centre = lax.stop_gradient(x[:, x.shape[1] // 2, x.shape[2] // 2])
        near = group_mean(centre.astype(jnp.float32))[:, None, None]
        moved = x.astype(jnp.float32) - near
        mean = group_mean(moved.mean(axis=(1, 2)))
        variance = group_mean((moved**2).mean(axis=(1, 2))) - mean**2
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        factor = lax.rsqrt(variance + _EPSILON) * scale[None]
        return ((moved - mean[:, None, None]) * factor[:, None, None] + bias[None, None, None]).astype(self.dtype)


def time_embedding(t, features):
    """Ho's sinusoidal embedding of t in 0..T−1: [B] -> float32 [B, features], [sin | cos]."""
    half = features // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half) / (half - 1))
    angles = jnp.outer(t.astype(jnp.float32), frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def drop(h, rate, keys):
    """Dropout; the mask of example i is drawn from keys[i] alone, whatever batch or device it is in."""

    def keep(key):
        return jax.random.bernoulli(key, 1 - rate, h.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), h / (1 - rate), 0)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv; + time; norm, SiLU, dropout (with keys [B], if given), conv; + input."""

    features: int
    dropout: float
    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x, temb, dropout_keys=None):
        norm = functools.partial(GroupNorm, self.num_groups, self.dtype)
        h = nn.silu(norm(name="norm1")(x))
        h = conv(self.features, self.dtype, name="conv1")(h)
        h += dense(self.features, self.dtype, name="temb_proj")(nn.silu(temb))[:, None, None, :]
        h = nn.silu(norm(name="norm2")(h))
        if dropout_keys is not None:
            h = drop(h, self.dropout, dropout_keys)
        h = conv(self.features, self.dtype, init_scale=_NEARLY_ZERO, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """norm, self-attention over all positions with one head, + input."""

    num_groups: int
    dtype: Any
    attention: Callable = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, 1, channels)
        q, k, v = (dense(channels, self.dtype, name=name)(h) for name in "qkv")
        h = self.attention(q, k, v).reshape(x.shape)
        return x + dense(channels, self.dtype, init_scale=_NEARLY_ZERO, name="proj_out")(h)


class UNet(nn.Module):
    """The noise predictor: (x [B, H, W, C], t [B] in 1..T) -> ε̄ float32 [B, H, W, C].

    The defaults are Ho's network for CIFAR-10, 35,746,307 parameters at C = 3;
    multipliers (1, 1, 2, 2, 4, 4) are the one for 256×256, 113,673,219.

    Attributes:
      channels: channels at full resolution.
      multipliers: one a level: the level's channels are `channels` times it. Each level
        halves the resolution of the one before.
      num_res_blocks: residual blocks per level on the way down; one more on the way up.
      attention_resolutions: heights of the levels with self-attention after every block.
      dropout: rate inside the residual blocks when train=True: from dropout_keys [B], a key
        per example, or else from rngs={"dropout": key}.
      num_groups: groups of GroupNorm, see `GroupNorm`.
      dtype: of the computation, float32 or bfloat16; parameters, the statistics of
        normalisation, softmax and the output are float32.
      attention: (q, k, v [B, positions, 1, C]) -> [B, positions, 1, C], softmax of q·k / √C in float32.
      remat: compute the activations inside the blocks again for the gradient, rather than keep them.

    Raises (when called):
      ValueError: H or W is not a multiple of 2^(levels − 1).
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    num_groups: int = 32
    dtype: Any = jnp.float32
    attention: Callable = jax.nn.dot_product_attention
    remat: bool = False

    @nn.compact
    def __call__(self, x, t, train=False, dropout_keys=None):
        levels = len(self.multipliers)
        check_image_size(*x.shape[1:3], levels)
        image_channels = x.shape[-1]
        with_dropout = train and self.dropout > 0
        if with_dropout and dropout_keys is None:
            dropout_keys = jax.random.split(self.make_rng("dropout"), len(x))
        counter = itertools.count()
        maybe_remat = nn.remat if self.remat else lambda module: module
        resnet_block, attention_block = maybe_remat(ResnetBlock), maybe_remat(AttentionBlock)

        def residual(h, features, name):
            # Each block has a stream of its own.
            keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, next(counter)) if with_dropout else None
            return resnet_block(features, self.dropout, self.num_groups, self.dtype, name=name)(h, temb, keys)

        def attend(h, name):
            return attention_block(self.num_groups, self.dtype, self.attention, name=name)(h)

        def block(h, level, name):
            h = residual(h, self.channels * self.multipliers[level], name)
            if h.shape[1] in self.attention_resolutions:
                h = attend(h, name.replace("block", "attn"))
            return h

        # Ho's weights know the steps as 0..T−1: here, and only here, 1 is subtracted.
        temb = time_embedding(t - 1, self.channels)
        temb = dense(4 * self.channels, self.dtype, name="temb_dense0")(temb)
        temb = dense(4 * self.channels, self.dtype, name="temb_dense1")(nn.silu(temb))

        h = conv(self.channels, self.dtype, name="conv_in")(x)
        skips = [h]
        for i in range(levels):
            for j in range(self.num_res_blocks):
                h = block(h, i, f"down_{i}_block_{j}")
                skips.append(h)
            if i < levels - 1:
                h = conv(h.shape[-1], self.dtype, strides=2, name=f"down_{i}_downsample")(h)
                skips.append(h)

        h = residual(h, h.shape[-1], "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = residual(h, h.shape[-1], "mid_block_2")

        for i in reversed(range(levels)):
            for j in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"up_{i}_block_{j}")
            if i > 0:
                h = conv(h.shape[-1], self.dtype, name=f"up_{i}_upsample")(_double(h))

        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm_out")(h))
        h = conv(image_channels, self.dtype, init_scale=_NEARLY_ZERO, name="conv_out")(h)
        return h.astype(jnp.float32)


def check_image_size(height, width, levels):
    """Raises ValueError unless `levels` − 1 halvings of the image come out even."""
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"an image of {height}x{width} cannot be halved {levels - 1} times (the UNet has {levels} levels): "
            f"height and width must be multiples of {multiple}"
        )


def _double(x):
    """Nearest-neighbour upsampling by 2."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
