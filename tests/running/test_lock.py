"""One training at a time in a workdir: by the kernel's locks, and by signs of life where there are none."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from diffusion_jax.errors import UserError
from diffusion_jax.running import lock
from diffusion_jax.running.lock import Lock


def held_elsewhere(folder):
    """Starts a process that holds the lock until it is killed."""
    code = f"from etils import epath; from diffusion_jax.running.lock import Lock; Lock(epath.Path({str(folder)!r}))"
    code += ".__enter__(); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_training_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    with held_elsewhere(tmp_path / "run") as other:
        with pytest.raises(UserError, match=rf"in use by a training in process {other.pid} on .+ since 20\d\d-"):
            Lock(epath.Path(tmp_path / "run")).__enter__()
        other.kill()
    with Lock(epath.Path(tmp_path / "run")) as own:
        own.check()
        assert json.loads((tmp_path / "run" / ".training").read_text())["process"] == os.getpid()


def test_nothing_is_left(tmp_path):
    with Lock(epath.Path(tmp_path / "refused")):
        pass
    assert not (tmp_path / "refused").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with Lock(epath.Path(tmp_path / "run")):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    folder = epath.Path(tmp_path)
    with Lock(folder), pytest.raises(UserError, match="in use by a training in process"):
        Lock(folder).__enter__()
    with Lock(folder):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir=.*file/run cannot be written"):
        Lock(epath.Path(tmp_path / "file" / "run")).__enter__()


# ---------------------------------------------------------------- without file locks


@pytest.fixture
def leases(monkeypatch):
    """No file system has locks; time passes quickly."""
    monkeypatch.setattr(Lock, "_lock", lambda self: False)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "DEAD", 0.5)
    monkeypatch.setattr(lock, "PAUSE", 0.1)


def test_a_lease_is_refused_while_its_holder_gives_signs_of_life(leases, tmp_path, capsys):
    folder = epath.Path(tmp_path)
    with Lock(folder) as own:
        with pytest.raises(UserError, match=f"in use by a training in process {os.getpid()}"):
            Lock(folder).__enter__()
        own.check()
    assert "waiting 0.5 s for a sign of life of a training in process" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_a_dead_holder_is_taken_and_the_dead_notices(leases, tmp_path):
    folder = epath.Path(tmp_path)
    first = Lock(folder).__enter__()
    first._ended.set()  # as a machine that stands still
    with Lock(folder) as second:
        first._ended.clear()
        first._live_once()
        with pytest.raises(UserError, match="taken over by another training"):
            first.check()
        first.__exit__()  # leaves the lease of the other alone
        second.check()
        assert (tmp_path / ".training").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_lease_that_cannot_be_read_is_taken(leases, tmp_path, content):
    (tmp_path / ".training").write_text(content)
    with Lock(epath.Path(tmp_path)) as own:
        own.check()
