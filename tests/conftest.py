"""Every test runs on 4 CPU devices; silent broadcasting between ranks is an error."""

import atexit
import json
import os
import shutil
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import parts, schedule, train, unet
from diffusion_jax.configs import tiny
from diffusion_jax.running import checkpoint, history
from diffusion_jax.running import workdir as workdirs

# The tests compile thousands of programs and run each for milliseconds: with less of LLVM's optimisation they take a
# quarter less time. (Without any, two programs of one formula round differently.) Processes inherit the flags.
FLAGS = ["--xla_backend_optimization_level=1"]
if jax.__version__.startswith("0.12"):  # with main.py's flag it keeps no compiled program for the next process
    FLAGS += ["--xla_cpu_experimental_ynn_fusion_type="]
if jax.__version__.startswith("0.10"):  # its older emitters compile in two thirds of the time; later ones have one kind
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
set_before = os.environ.get("XLA_FLAGS", "").split()  # a worker has them from pytest; a flag twice is another cache key
os.environ["XLA_FLAGS"] = " ".join(set_before + [flag for flag in FLAGS if flag not in set_before])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # starts them here, so that no test can change XLA's flags for those after it
# Most tests compile the same few programs: once is enough, for all workers, which inherit the variable.
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffusion_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # for the processes that tests start


def pytest_collection_modifyitems(config, items):
    """Marks the tests of the core, and puts those first that would end alone: notebooks, slow ones, whole trainings."""
    for item in items:
        if item.path.parent in (config.rootpath / "tests", config.rootpath / "tests/running"):
            item.add_marker("core")
    longest = ("test_notebooks_run", "test_resumed_run")
    items.sort(key=lambda item: (not item.get_closest_marker("slow"), not item.name.startswith(longest)))


def tiny_config(**overrides):
    """configs/tiny.py with other values; keys with "__" for "."."""
    config = tiny.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return config


def run(workdir, **overrides):
    """Trains configs/tiny.py with other values."""
    return train.train(tiny_config(**overrides), str(workdir))


def lines(workdir):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    """Returns the lines without what depends on the machine."""
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]


class SmallNetwork(nn.Module):
    """Stands for the UNet in tests of what happens around it: its train step compiles in a tenth of the time."""

    num_classes: int
    dropout: float
    dtype: object
    learned_sigma: bool = False

    @nn.compact
    def __call__(self, x, t, train=False, dropout_keys=None, labels=None):
        embedding = unet.time_embedding(t - 1, 8)
        if self.num_classes:
            labels = jnp.full(len(x), self.num_classes) if labels is None else labels
            embedding += nn.Embed(self.num_classes + 1, 8, name="class_embedding")(labels)
        h = unet.conv(8, self.dtype, name="conv_in")(x)
        h = nn.silu(h + unet.dense(8, self.dtype, name="temb_dense0")(embedding)[:, None, None])
        if train and self.dropout:
            h = unet.drop(h, self.dropout, dropout_keys)
        return unet.conv(
            x.shape[-1] * (1 + self.learned_sigma), self.dtype, init_scale=unet._NEARLY_ZERO, name="conv_out"
        )(h).astype(jnp.float32)


def small_model(config):
    """Stands for `parts.model`."""
    num_classes = parts.with_classes(config).model.num_classes
    return SmallNetwork(num_classes, config.model.dropout, jnp.dtype(config.model.dtype), config.model.learned_sigma)


@pytest.fixture(scope="module")
def small_network():
    """Gives the tests of a module a network that compiles quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "model", small_model)
        yield


class Examples:
    """Images, and labels if there are any, in memory; the interface of `cache.Cached` that batches use."""

    def __init__(self, images, labels=None):
        self.arrays = {"image": images} | ({} if labels is None else {"label": labels.astype(np.int32)})

    def __len__(self):
        return len(self.arrays["image"])

    def examples(self, indices):
        return {name: array[indices] for name, array in self.arrays.items()}


def assert_same(a, b):
    """Asserts that two trees have the same paths and, bit for bit, the same leaves of the same types."""
    paths_a, paths_b = (jax.tree.leaves_with_path(tree) for tree in (a, b))
    assert [path for path, _ in paths_a] == [path for path, _ in paths_b]
    for (path, x), (_, y) in zip(paths_a, paths_b, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path), strict=True)


def random_params(model, *inputs):
    """Returns parameters that all matter; the initial residual branches have a scale of 1e-10."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(0, 0.2, leaf.shape) + (leaf.ndim == 1), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


def write_random_run(workdir, **overrides):
    """Writes a run of configs/tiny.py with a checkpoint of step 0 whose values are random; returns its identity."""
    config, rng, run = tiny_config(**overrides), np.random.default_rng(0), history.new_identity()
    workdirs.write_config(workdir, config)
    history.record(workdirs.absolute(workdir), run, 0, config)
    shapes = parts.abstract_state(config)
    state = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.1, leaf.shape)).astype(leaf.dtype), shapes)
    with checkpoint.open_manager(workdir) as manager:
        checkpoint.save(manager, 0, state, history.about(run, config))
    return run


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Compiled programs are let go after each file.

    They take memory maps, of which Linux grants a process 65,530; after 700 tests in one worker XLA crashed.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def rough():
    """Four steps as unlike each other as can be: an index that is off by one shows."""
    return schedule.from_beta_squared([0.3, 0.05, 0.6, 0.2])
