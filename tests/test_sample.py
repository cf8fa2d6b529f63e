"""What --mode=sample writes, and what it says of it."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import checkpoint, sample, state
from diffusion_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was never trained."""
    workdir = tmp_path_factory.mktemp("run")
    config, rng = tiny_config(), np.random.default_rng(0)
    checkpoint.write_config(workdir, config)
    shapes = state.abstract_state(config)
    random = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.1, leaf.shape)).astype(leaf.dtype), shapes)
    with checkpoint.open_manager(workdir) as manager:
        checkpoint.save(manager, 0, random)
    return workdir


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SHARD", 3)
    return tmp_path / "shards"


def content(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_fewer_images_than_the_shards_hold_are_refused(workdir, shards):
    sample.sample(workdir, 8, 1, f"{shards}/")
    before = content(shards)
    for fewer in (7, 4, 2):
        with pytest.raises(UserError, match=f"--num={fewer} is less than the 8 images that --out=.*shards/ holds"):
            sample.sample(workdir, fewer, 1, f"{shards}/")
    assert content(shards) == before


def test_the_last_shard_grows(workdir, shards):
    """And a shorter one that a kill has left beside it goes."""
    sample.sample(workdir, 5, 1, f"{shards}/")
    (shards / "00000003-00000003.npz").write_bytes(b"of an earlier, smaller --num")
    (shards / "notes-of-mine.npz").write_bytes(b"")
    sample.sample(workdir, 7, 1, f"{shards}/")
    names = ["00000000-00000002.npz", "00000003-00000005.npz", "00000006-00000006.npz"]
    assert sorted(content(shards)) == [*names, "notes-of-mine.npz", "samples.json"]
