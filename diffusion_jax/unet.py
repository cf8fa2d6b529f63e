"""The UNet of Ho et al. (2020), appendix B, weight for weight: for images, and for signals and volumes too.

Modules have the names of the variable scopes in Ho's code, with "_" for "/".
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

_EPSILON = 1e-6  # GroupNorm's ε in Ho's weights; 1e-5 visibly changes images of low contrast

# Ho's "init_scale=0": residual branches start close to zero and still receive gradients.
_NEARLY_ZERO = 1e-10


def _init(scale=1.0):
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def conv(
    features: int,
    dtype: DTypeLike,
    axes: int = 2,
    strides: int = 1,
    init_scale: float = 1.0,
    name: str | None = None,
) -> nn.Conv:
    """Returns a convolution, 3×3 for two axes, with padding "SAME": strided ones pad at the end of each axis."""
    return nn.Conv(features, (3,) * axes, strides, dtype=dtype, kernel_init=_init(init_scale), name=name)


def dense(features: int, dtype: DTypeLike, init_scale: float = 1.0, name: str | None = None) -> nn.Dense:
    """Returns a dense layer. On images it is a 1×1 convolution, Ho's `nin`."""
    return nn.Dense(features, dtype=dtype, kernel_init=_init(init_scale), name=name)


class GroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) with float32 statistics, ε = 1e-6.

    The number of groups is the greatest common divisor of `num_groups` and the channels of x. One pass over x computes
    mean and variance of x − c, with c the mean of a row. This is as accurate as two passes, while E[x²] − E[x]² is off
    by 3e-2 at a mean of 100. Sums run over the pixels first, which preserves the layout of x. What differs between
    channels alone is computed without the pixels.

    Attributes:
      num_groups: largest number of groups.
      dtype: dtype of the output.
    """

    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | float = 0.0) -> jax.Array:
        """Normalises x [B, …, C] + added [B, C]."""
        channels, axes = x.shape[-1], tuple(range(1, x.ndim - 1))
        groups = math.gcd(self.num_groups, channels)

        def group_mean(per_channel):  # [B, C] -> [B, C]
            means = per_channel.reshape(-1, groups, channels // groups).mean(axis=-1)
            return jnp.repeat(means, channels // groups, axis=-1)

        # The slice precedes the cast: XLA would write all of the cast x to memory in order to slice it.
        shift = lax.stop_gradient(x[:, x.shape[1] // 2]).astype(jnp.float32).mean(axis=axes[:-1])
        shifted = x.astype(jnp.float32) - _everywhere(shift, x)  # shifted + shift + added is what is normalised
        mean, square = shifted.mean(axis=axes), (shifted**2).mean(axis=axes)
        center = group_mean(mean + shift + added) - (shift + added)
        variance = group_mean(square + center * (center - 2 * mean))
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        factor = lax.rsqrt(variance + _EPSILON) * scale[None]
        offset = bias[None] - center * factor
        return (shifted * _everywhere(factor, x) + _everywhere(offset, x)).astype(self.dtype)


def _everywhere(per_channel, x):
    """Returns [B, C] or [C] with axes of size 1 before the last, as many as x [B, …, C] has."""
    return jnp.expand_dims(per_channel, tuple(range(per_channel.ndim - 1, x.ndim - 1)))


def time_embedding(t: jax.Array, features: int) -> jax.Array:
    """Returns Ho's sinusoidal embedding [sin | cos] of t in 0..T−1: [B] -> float32 [B, features]."""
    half = features // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = jnp.outer(t.astype(jnp.float32), frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def drop(h: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Applies dropout to h [B, ...]. The mask of example i depends on keys[i] alone, not on its batch or device."""

    def keep(key):
        return jax.random.bernoulli(key, np.float32(1 - rate), h.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), h / (1 - rate), 0)


class ResnetBlock(nn.Module):
    """The residual block: norm, SiLU, conv, + time embedding, norm, SiLU, dropout, conv, + input.

    Attributes:
      features: channels of the output.
      dropout: dropout rate.
      num_groups: see `GroupNorm`.
      dtype: dtype of the computation.
    """

    features: int
    dropout: float
    num_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Applies the block to x [B, …, C] and temb [B, E]; keys [B] turn dropout on. -> [B, …, features]"""
        norm, axes = functools.partial(GroupNorm, self.num_groups, self.dtype), x.ndim - 2
        h = nn.silu(norm(name="norm1")(x))
        h = conv(self.features, self.dtype, axes, name="conv1")(h)
        temb = dense(self.features, self.dtype, name="temb_proj")(nn.silu(temb))
        h = nn.silu(norm(name="norm2")(h, temb))
        if dropout_keys is not None:
            h = drop(h, self.dropout, dropout_keys)
        h = conv(self.features, self.dtype, axes, init_scale=_NEARLY_ZERO, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """The attention block: norm, self-attention over all positions with one head, + input.

    Attributes:
      num_groups: see `GroupNorm`.
      dtype: dtype of the computation.
      attention: see `UNet`.
    """

    num_groups: int
    dtype: DTypeLike
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block: [B, …, C] -> [B, …, C]."""
        batch, *sizes, channels = x.shape
        h = GroupNorm(self.num_groups, self.dtype, name="norm")(x).reshape(batch, math.prod(sizes), 1, channels)
        q, k, v = (dense(channels, self.dtype, name=name)(h) for name in "qkv")
        h = self.attention(q, k, v).reshape(x.shape)
        return x + dense(channels, self.dtype, init_scale=_NEARLY_ZERO, name="proj_out")(h)


class UNet(nn.Module):
    """The noise predictor: (x [B, H, W, C], t [B] in 1..T) -> ε̄ float32 [B, H, W, C].

    x may also be signals [B, L, C] or volumes [B, D, H, W, C], whose kernels have a size of 3 along each axis. The
    defaults are Ho's network for CIFAR-10, with 35,746,307 parameters at C = 3. Multipliers (1, 1, 2, 2, 4, 4) give the
    network for 256×256, with 113,673,219 parameters.

    Attributes:
      channels: channels at full resolution.
      multipliers: one per level. Level i has multipliers[i] · channels channels and half the resolution of level i − 1.
      num_res_blocks: residual blocks per level on the way down; the way up has one more per level.
      attention_resolutions: heights (lengths, depths) of the levels with self-attention after every block.
      dropout: dropout rate inside the residual blocks when train=True.
      num_groups: see `GroupNorm`.
      dtype: dtype of the computation, float32 or bfloat16. Parameters, the statistics of
        normalisation, the softmax and the output are float32.
      attention: (q, k, v [B, positions, 1, C]) -> [B, positions, 1, C], softmax of q·k / √C in float32.
      num_classes: 0, or the number of classes; the network then has an embedding of each, and of ∅, no class.
      learned_sigma: True appends a second output of C channels, v of `process.interpolated_sigma`.
      remat: True recomputes the activations inside the blocks for the gradient instead of storing them.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    num_groups: int = 32
    dtype: DTypeLike = jnp.float32
    attention: Callable[..., jax.Array] = jax.nn.dot_product_attention
    remat: bool = False
    num_classes: int = 0
    learned_sigma: bool = False

    def __post_init__(self) -> None:
        self.multipliers, self.attention_resolutions = tuple(self.multipliers), tuple(self.attention_resolutions)
        super().__post_init__()  # networks are keys of programs, so lists become tuples

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        train: bool = False,
        dropout_keys: jax.Array | None = None,
        labels: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts ε̄.

        Args:
          x: [B, H, W, C], [B, L, C] or [B, D, H, W, C].
          t: int [B] in 1..T.
          train: True switches dropout on.
          dropout_keys: [B] PRNG keys, one per example; None takes them from rngs={"dropout": key}.
          labels: int [B] in 0..num_classes, where num_classes is ∅; None is ∅ for all.

        Returns:
          float32 of the shape of x.

        Raises:
          ValueError: a size, H or W, is not a multiple of 2^(levels − 1), or a network without classes gets labels.
        """
        if labels is not None and not self.num_classes:
            raise ValueError("labels need a network with classes: num_classes is 0")
        levels, image_channels, axes = len(self.multipliers), x.shape[-1], x.ndim - 2
        check_image_size(x.shape[1:-1], levels)
        with_dropout = train and self.dropout > 0
        if with_dropout and dropout_keys is None:
            dropout_keys = jax.random.split(self.make_rng("dropout"), len(x))
        counter = itertools.count()
        maybe_remat = nn.remat if self.remat else lambda module: module
        resnet_block, attention_block = maybe_remat(ResnetBlock), maybe_remat(AttentionBlock)

        def residual(h, features, name):
            # Each block folds in its own number, so no two blocks share a mask.
            keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, next(counter)) if with_dropout else None
            return resnet_block(features, self.dropout, self.num_groups, self.dtype, name=name)(h, temb, keys)

        def attend(h, name):
            return attention_block(self.num_groups, self.dtype, self.attention, name=name)(h)

        def block(h, level, name):
            h = residual(h, self.channels * self.multipliers[level], name)
            if h.shape[1] in self.attention_resolutions:
                h = attend(h, name.replace("block", "attn"))
            return h

        # Ho's weights expect steps 0..T−1. This is the only place that subtracts 1.
        temb = time_embedding(t - 1, self.channels)
        temb = dense(4 * self.channels, self.dtype, name="temb_dense0")(temb)
        temb = dense(4 * self.channels, self.dtype, name="temb_dense1")(nn.silu(temb))
        if self.num_classes:
            labels = jnp.full(len(x), self.num_classes) if labels is None else labels
            temb += nn.Embed(self.num_classes + 1, 4 * self.channels, dtype=self.dtype, name="class_embedding")(labels)

        h = conv(self.channels, self.dtype, axes, name="conv_in")(x)
        skips = [h]
        for i in range(levels):
            for j in range(self.num_res_blocks):
                h = block(h, i, f"down_{i}_block_{j}")
                skips.append(h)
            if i < levels - 1:
                h = conv(h.shape[-1], self.dtype, axes, strides=2, name=f"down_{i}_downsample")(h)
                skips.append(h)

        h = residual(h, h.shape[-1], "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = residual(h, h.shape[-1], "mid_block_2")

        for i in reversed(range(levels)):
            for j in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"up_{i}_block_{j}")
            if i > 0:
                h = conv(h.shape[-1], self.dtype, axes, name=f"up_{i}_upsample")(_double(h))

        h = nn.silu(GroupNorm(self.num_groups, self.dtype, name="norm_out")(h))
        features = image_channels * (1 + self.learned_sigma)
        h = conv(features, self.dtype, axes, init_scale=_NEARLY_ZERO, name="conv_out")(h)
        return h.astype(jnp.float32)


def check_image_size(sizes: Sequence[int], levels: int) -> None:
    """Raises ValueError unless the sizes, e.g. (height, width), are multiples of 2^(levels − 1)."""
    multiple = 2 ** (levels - 1)
    if any(size % multiple for size in sizes):
        size = "x".join(map(str, sizes))
        raise ValueError(f"{size} cannot be halved {levels - 1} times by {levels} levels: give multiples of {multiple}")


def _double(x):
    """Upsamples [B, …, C] by 2 along each axis in between, nearest neighbour."""
    batch, *sizes, channels = x.shape
    pairs = jnp.expand_dims(x, tuple(range(2, 2 * x.ndim - 2, 2)))  # [B, H, 1, W, 1, C]
    doubled = jnp.broadcast_to(pairs, (batch, *(n for size in sizes for n in (size, 2)), channels))
    return doubled.reshape(batch, *(2 * size for size in sizes), channels)
