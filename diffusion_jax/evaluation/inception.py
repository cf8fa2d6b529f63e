"""The Inception v3 that defines FID: TensorFlow's graph of 2015-12-05, up to its 2048 features.

It differs from the network of Szegedy et al. (2015): average pools exclude the padding, and the last block
has a max pool in their place. Layouts are NHWC. Modules are named as in the state dict of torch-fidelity and
pytorch-fid, so that their weights load by name.
"""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from diffusion_jax.errors import UserError, one_line

_SIZE = 299
# Flax's names of the arrays: names in the state dict.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def resize(x: jax.Array, size: int = _SIZE) -> jax.Array:
    """Resizes [B, H, W, C] bilinearly to float32 [B, size, size, C] as TensorFlow 1 does: out[i] = x[i · H / size].

    The resize has neither half-pixel centres nor antialiasing, and repeats the last pixel.
    """
    x = x.astype(jnp.float32)
    for axis in (2, 1):
        length = x.shape[axis]
        source = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = source.astype(np.int32)
        weight = np.expand_dims(source - low.astype(np.float32), tuple(i for i in range(4) if i != axis))
        below, above = (jnp.take(x, np.minimum(low + i, length - 1), axis) for i in (0, 1))
        x = below + (above - below) * weight
    return x


class Unit(nn.Module):
    """Applies a convolution without bias, BatchNorm with its stored statistics, and ReLU."""

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        # The default precision rounds to TF32 on GPUs and to bfloat16 on TPUs, which changes FID.
        conv = functools.partial(nn.Conv, use_bias=False, precision=jax.lax.Precision.HIGHEST)
        x = conv(self.features, self.kernel_size, strides, self.padding, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _chain(x, name, *layers, halve=False):
    """Applies units in turn, named {name}_1, {name}_2, …; a layer is (features, height, width of the kernel).

    With `halve` the last unit has stride 2 and no padding.
    """
    for i, (features, *kernel_size) in enumerate(layers, start=1):
        last = {"stride": 2, "padding": "VALID"} if halve and i == len(layers) else {}
        x = Unit(features, tuple(kernel_size), name=f"{name}_{i}", **last)(x)
    return x


def _unit_1x1(x, name, features):
    return Unit(features, (1, 1), name=name)(x)


def _average_pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _concatenate(*branches):
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """Concatenates 1×1 | 5×5 | two 3×3 | pool at 35×35, which gives 224 + pool_features channels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            _unit_1x1(x, "branch1x1", 64),
            _chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            _unit_1x1(_average_pool(x), "branch_pool", self.pool_features),
        )


class BlockB(nn.Module):
    """Concatenates 3×3 | two 3×3 | pool, from 35×35 to 17×17, which adds 480 channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            Unit(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), halve=True),
            _max_pool(x),
        )


class BlockC(nn.Module):
    """Concatenates 1×1 | 7×7 in two parts | two 7×7 in four parts | pool at 17×17, which gives 768 channels."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        row, column = (self.inner, 1, 7), (self.inner, 7, 1)
        return _concatenate(
            _unit_1x1(x, "branch1x1", 192),
            _chain(x, "branch7x7", (self.inner, 1, 1), row, (192, 7, 1)),
            _chain(x, "branch7x7dbl", (self.inner, 1, 1), column, row, column, (192, 1, 7)),
            _unit_1x1(_average_pool(x), "branch_pool", 192),
        )


class BlockD(nn.Module):
    """Concatenates 3×3 | 7×7 and 3×3 | pool, from 17×17 to 8×8, which adds 512 channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _concatenate(
            _chain(x, "branch3x3", (192, 1, 1), (320, 3, 3), halve=True),
            _chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), halve=True),
            _max_pool(x),
        )


class BlockE(nn.Module):
    """Concatenates 1×1 | split 3×3 | two 3×3, the last split | pool at 8×8, which gives 2048 channels."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def split(h, name):
            return _concatenate(Unit(384, (1, 3), name=f"{name}a")(h), Unit(384, (3, 1), name=f"{name}b")(h))

        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pool else _average_pool(x)
        return _concatenate(
            _unit_1x1(x, "branch1x1", 320),
            split(_chain(x, "branch3x3", (384, 1, 1)), "branch3x3_2"),
            split(_chain(x, "branch3x3dbl", (448, 1, 1), (384, 3, 3)), "branch3x3dbl_3"),
            _unit_1x1(pooled, "branch_pool", 192),
        )


class InceptionV3(nn.Module):
    """Maps images [B, H, W, 3] in 0..255, of any size and type, to features float32 [B, 2048]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = (resize(x) - 128) / 128
        x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _max_pool(x)
        x = _unit_1x1(x, "Conv2d_3b_1x1", 80)
        x = Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _max_pool(x)
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = BlockA(pool_features, name=f"Mixed_5{letter}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = BlockC(inner, name=f"Mixed_6{letter}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(max_pool=False, name="Mixed_7b")(x)
        x = BlockE(max_pool=True, name="Mixed_7c")(x)
        return jnp.mean(x, axis=(1, 2))


def load_features(path: epath.PathLike) -> tuple[Callable[..., jax.Array], str]:
    """Returns the network as a feature extractor, with weights that `tools.convert_inception` wrote.

    Returns:
      (features, checksum). features(images uint8 [B, H, W, 1 or 3]) -> float32 [B, 2048] is compiled once for
      each shape, and repeats a grey channel three times. checksum is the hex SHA-256 of the weights' names,
      shapes and values.

    Raises:
      UserError: the file is missing or damaged, or an array is missing or has another shape or type.
    """
    arrays = _read(epath.Path(path).expanduser())
    variables = jax.tree.map_with_path(lambda keys, _: jnp.asarray(_to_flax(arrays[_torch_name(keys)])), _variables())

    @jax.jit
    def apply(variables, images):
        channels = images.shape[-1]
        if channels not in (1, 3):
            raise UserError(f"images of {channels} channels have no Inception features: give images of 1 or 3 channels")
        return InceptionV3().apply(variables, jnp.repeat(images, 3 // channels, axis=-1))

    return functools.partial(apply, variables), _checksum(arrays)


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the network's arrays, with the names and the layout of torch's state dict."""
    return {
        _torch_name(keys): tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if leaf.ndim == 4 else leaf.shape
        for keys, leaf in jax.tree.leaves_with_path(_variables())
    }


@functools.cache
def _variables():
    """Returns the shapes and types of the network's variables."""
    image = jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), jnp.uint8)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), image)


def _torch_name(keys):
    """Returns the state dict's name of the Flax array at the path `keys`."""
    _, *modules, leaf = (key.key for key in keys)
    return ".".join([*modules, _LEAVES[leaf]])


def _to_flax(array):
    """Transposes a kernel from [out, in, height, width] to [height, width, in, out]; returns other arrays unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _read(path):
    """Reads and checks a weights file: returns {name: array} with torch's names and layout."""
    remedy = "convert the weights again with tools.convert_inception"
    if not path.exists():
        raise UserError(f"--inception={path} does not exist: give a file that tools.convert_inception wrote")
    expected = shapes()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files if name in expected}
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        raise UserError(f"{path} holds no Inception weights or is damaged ({one_line(error, 200)}): {remedy}") from None
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"{path} lacks the array {name}: {remedy}")
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise UserError(f"{path} has {name} as {array.dtype} {array.shape}, not float32 {shape}: {remedy}")
        if not np.isfinite(array).all():
            raise UserError(f"{path} has values in {name} that are not finite: {remedy}")
    return arrays


def _checksum(arrays):
    """Returns the hex SHA-256 of the names, shapes and values, in any order of the arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
