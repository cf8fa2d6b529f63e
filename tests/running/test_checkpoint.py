import collections
import logging
import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import assert_same
from etils import epath

from diffusion_jax.errors import UserError
from diffusion_jax.running import checkpoint
from diffusion_jax.running import workdir as workdirs
from tools import torture


class State(NamedTuple):
    step: Any
    params: Any


def state(step):
    rng = np.random.default_rng(step)
    return State(
        np.int32(step), {"a": rng.standard_normal((64, 64)).astype(np.float32), "b": (rng.integers(9, size=5),)}
    )


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))


@pytest.fixture
def run(tmp_path):
    """A workdir with checkpoints 10, 20 and 30."""
    with checkpoint.open_manager(tmp_path) as manager:
        for step in (10, 20, 30):
            checkpoint.save(manager, step, state(step))
    return tmp_path


def restore(workdir, **options):
    with checkpoint.open_manager(workdir, read_only=not options) as manager:
        return checkpoint.restore(manager, LIKE, **options)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_restored(run):
    assert_same(restore(run), state(30))


def test_only_the_latest_are_kept(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3, 4):
            checkpoint.save(manager, step, state(step))
    assert names(tmp_path) == ["3", "4"]


def test_checkpoints_in_between_push_out_no_others(tmp_path):
    """A grid at every step, checkpoints at every third: the last two of those stay, and the newest."""
    with checkpoint.open_manager(tmp_path, keep=2, every=3) as manager:
        for step in range(1, 12):
            checkpoint.save(manager, step, state(step))
    assert names(tmp_path) == ["11", "6", "9"]


def test_what_is_known_about_a_checkpoint(run):
    with checkpoint.open_manager(run) as manager:
        checkpoint.save(manager, 40, state(40), {"run": "ab", "metrics": [{"loss": 0.5}]})
    shutil.rmtree(run / "checkpoints" / "30" / "about")  # as earlier versions
    with checkpoint.open_manager(run, read_only=True) as manager:
        assert checkpoint.read_about(manager, 40) == {"run": "ab", "metrics": [{"loss": 0.5}]}
        assert checkpoint.read_about(manager, 30) == {}
    assert_same(restore(run), state(40))


def test_readers_hear_no_warnings(run):
    """In a notebook each `load` would show them."""
    messages, logger = [], logging.getLogger("absl")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with checkpoint.open_manager(run, read_only=True):
            logger.warning("heard")
    finally:
        logger.removeHandler(handler)
    assert messages == ["heard"]


def test_a_field_alone(run):
    with checkpoint.open_manager(run, read_only=True) as manager:
        assert_same(checkpoint.restore(manager, LIKE._replace(params=None)), state(30)._replace(params=None))


def test_a_checkpoint_that_is_replaced_while_it_is_read(run, monkeypatch, capsys):
    read, reads = checkpoint._read, []

    def slow_read(manager, step, like):
        reads.append(step)
        if len(reads) == 1:
            with checkpoint.open_manager(run, keep=1) as training:
                checkpoint.save(training, 40, state(40))
            raise checkpoint._Damaged("a file is missing")
        return read(manager, step, like)

    monkeypatch.setattr(checkpoint, "_read", slow_read)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    assert_same(restore(run), state(40))
    assert "damaged" not in capsys.readouterr().out


def test_a_save_that_cannot_be_read_back_is_noticed(run):
    with checkpoint.open_manager(run) as manager:
        checkpoint.verify(manager, 30, LIKE)
        torture.DAMAGE["array files missing"](run / "checkpoints" / "30")
        with pytest.raises(UserError, match=r"checkpoint 30 was written to .* cannot be read back .*: give a workdir"):
            checkpoint.verify(manager, 30, LIKE)


@pytest.mark.parametrize(
    "name", ["run#2", "100%20", "a b", "a:b", "~", "$HOME", "Ωλ字", "a\nb", "{a,b}", "it's", "-x", "a&b=c"]
)
def test_any_name_of_a_folder_works(tmp_path, name):
    workdirs.check_name(epath.Path(tmp_path / name))
    with checkpoint.open_manager(tmp_path / name) as manager:
        checkpoint.save(manager, 7, state(7))
        checkpoint.verify(manager, 7, LIKE)
    assert_same(restore(tmp_path / name), state(7))


@pytest.mark.parametrize("name", ["t_[br]", "a*b", "a?", "back\\slash"])
def test_names_that_orbax_misreads_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"--workdir=.* in its path, where checkpoints cannot be written: give "):
        workdirs.check_name(epath.Path(tmp_path / name))


def test_what_is_saved_is_a_copy(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        changing = state(1)
        checkpoint.save(manager, 1, changing)
        changing.params["a"][:] = 0
    assert_same(restore(tmp_path), state(1))


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", torture.DAMAGE)
def test_damage_to_the_newest(run, kind, capfd):
    torture.DAMAGE[kind](run / "checkpoints" / "30")
    assert_same(restore(run, set_aside=True), state(20))
    assert names(run) == ["10", "20", "damaged-30"]
    printed, complaints = capfd.readouterr()
    assert "checkpoint 30 is damaged (" in printed and "resuming from checkpoint 20" in printed
    assert "Traceback" not in complaints
    with checkpoint.open_manager(run) as manager:  # the same steps are saved again
        checkpoint.save(manager, 30, state(30))
    assert_same(restore(run), state(30))


@pytest.mark.parametrize("kind", torture.DAMAGE)
def test_damage_to_all(run, kind):
    for folder in (run / "checkpoints").iterdir():
        torture.DAMAGE[kind](folder)
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"none of the checkpoints in .*steps 30, 20, 10; 30: .*nothing was deleted"):
        restore(run, set_aside=True)
    assert sorted(run.rglob("*")) == before


def test_single_bits(run, tmp_path_factory):
    """Three bits of each file: the checkpoint is as it was, or the one before is taken."""
    rng, outcomes = np.random.default_rng(0), collections.Counter()
    for file in torture.files_of(run / "checkpoints" / "30"):
        for bit in rng.integers(8 * file.stat().st_size, size=3).tolist():
            copy = tmp_path_factory.mktemp("flipped") / "run"
            shutil.copytree(run, copy)
            torture.flip(copy / file.relative_to(run), bit)
            found = restore(copy)
            assert_same(found, state(int(found.step)))
            outcomes[int(found.step)] += 1
    assert set(outcomes) == {20, 30}


def test_no_checkpoint_and_not_a_checkpoint(run, tmp_path):
    (tmp_path / "new").mkdir()
    assert restore(tmp_path / "new") is None
    (run / "checkpoints" / "77").mkdir()  # Orbax takes it for one
    assert_same(restore(run, set_aside=True), state(30))
    assert "damaged-77" in names(run)


def test_a_checkpoint_under_the_wrong_step(run, capsys):
    shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "40")
    assert_same(restore(run), state(30))
    assert "checkpoint 40 is damaged (it contains step 20)" in capsys.readouterr().out


def test_half_written_checkpoints_are_never_read_and_only_a_training_run_removes_them(run):
    half = run / "checkpoints" / "40.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "30", half)
    assert_same(restore(run), state(30))
    assert half.exists()  # somebody may be writing it
    assert_same(restore(run, set_aside=True), state(30))
    for _ in range(100):  # Orbax removes it in a thread
        if half.exists():
            time.sleep(0.1)
    assert not half.exists()


# ---------------------------------------------------------------- what cannot be written


def test_a_full_disk_is_seen_before_the_save(run, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: collections.namedtuple("U", "free")(1_000_000))
    with (
        checkpoint.open_manager(run) as manager,
        pytest.raises(
            UserError, match=r"step 40 needs 1\.0 MB, but .* has 1\.0 MB free.*last checkpoint is of step 30"
        ),
    ):
        checkpoint.save(manager, 40, state(40))
    assert names(run) == ["10", "20", "30"]


def test_a_save_that_failed_in_the_background(run, monkeypatch):
    with checkpoint.open_manager(run) as manager:
        checkpoint.check(manager)

        def failed():
            raise OSError("No space left on device\nand more")

        with monkeypatch.context() as patch:
            patch.setattr(manager, "check_for_errors", failed)
            with pytest.raises(UserError, match=r"cannot be written in .*No space left on device and more.*of step 30"):
                checkpoint.check(manager)


def test_the_first_error_is_the_one_that_is_told(tmp_path, monkeypatch):
    def fail_twice():
        with checkpoint.open_manager(tmp_path) as manager:
            monkeypatch.setattr(manager, "close", lambda: 1 / 0)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail_twice()
