import json
import shutil

import jax
import numpy as np
import pytest
from conftest import assert_same, run, tiny_config, write_random_run

import diffusion_jax
from diffusion_jax import parts, sample
from diffusion_jax.configs import tiny
from diffusion_jax.errors import UserError
from diffusion_jax.evaluation.evaluate import evaluate
from diffusion_jax.interop.card import model_card
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.running import averages, checkpoint, history, measured, snapshots
from diffusion_jax.running import workdir as workdirs

pytestmark = pytest.mark.usefixtures("small_network")
EVERY = 2
ON = {"train__snapshot_every": EVERY}


@pytest.fixture(autouse=True)
def one_identity(monkeypatch):
    """All runs have one identity, so that the files of two runs can be the same."""
    monkeypatch.setattr(history, "new_identity", lambda: "3f9a")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_network):
    """Returns the workdir and the last state of a run with snapshots after steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "new_identity", lambda: "3f9a")
        return workdir, run(workdir, **ON)


@pytest.fixture
def copied(whole, tmp_path):
    """Returns a copy of that workdir."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def contents(workdir):
    return {file.name: file.read_bytes() for file in (workdir / "averages").iterdir()}


def params(workdir, **which):
    return sample.ema_params(parts.build(workdirs.read_config(workdir)), workdir, **which)[1]


def test_a_run_with_averages_is_otherwise_the_run_without(whole, tmp_path, capsys):
    plain = run(tmp_path)
    assert plain.averages is None and not (tmp_path / "averages").exists()
    assert "snapshots" not in capsys.readouterr().out
    assert_same(whole[1]._replace(averages=None), plain)
    assert sorted(contents(whole[0])) == ["2.npz", "4.npz", "6.npz"]


def test_a_resumed_run_has_the_same_averages_and_files(whole, tmp_path, capsys):
    run(tmp_path, train__num_steps=3, **ON)
    assert sorted(contents(tmp_path)) == ["2.npz"]
    assert f"snapshots: 1 × {2 * size() / 1e6:.3g} MB" in capsys.readouterr().out
    of_step_3 = params(tmp_path, ema=0.1)
    (tmp_path / "averages/5.npz").write_bytes(b"of another course")
    assert_same(run(tmp_path, **ON), whole[1])
    assert contents(tmp_path) == contents(whole[0])
    assert_same(params(whole[0], step=3, ema=0.1), of_step_3)


def size():
    return 4 * parts.num_parameters(tiny_config())


@pytest.mark.parametrize("at", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_snapshot_that_a_kill_cut_off_is_made_at_the_next_start(whole, tmp_path, monkeypatch, at):
    write = snapshots.write

    def killed(folder, step, trees):
        if step == at:
            raise KeyboardInterrupt
        write(folder, step, trees)

    monkeypatch.setattr(snapshots, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **ON)
    monkeypatch.setattr(snapshots, "write", write)
    assert f"{at}.npz" not in contents(tmp_path)
    run(tmp_path, **ON)
    assert contents(tmp_path) == contents(whole[0])


@pytest.mark.slow
def test_several_steps_a_dispatch_and_data_on_the_device(whole, tmp_path):
    several = run(tmp_path, train__steps_per_dispatch=3, data__on_device=True, train__accumulate=2, **ON)
    assert sorted(contents(tmp_path)) == sorted(contents(whole[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), several.averages, whole[1].averages)


def test_post_hoc_averages_are_the_weighted_sums_of_the_files(whole):
    workdir, state = whole
    for i, ema in enumerate(averages.SIGMA_REL):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
            params(workdir, ema=ema), state.averages[i],
        )  # fmt: skip
    t, gamma = np.repeat([2.0, 4.0, 6.0], 2), np.tile(averages.EXPONENTS, 3)
    weights, _ = averages.fit(t, gamma, 6.0, averages.exponent(0.08))
    expected = {}
    for step, own in zip((2, 4, 6), weights.reshape(3, 2), strict=True):
        with np.load(workdir / "averages" / f"{step}.npz") as content:
            assert json.loads(str(content["about"])) == {"run": "3f9a", "step": step}
            for sigma_rel, weight in zip(("0.05", "0.1"), own, strict=True):
                for name in (name for name in content.files if name.startswith(f"{sigma_rel}/")):
                    path = name.removeprefix(f"{sigma_rel}/")
                    expected[path] = expected.get(path, 0.0) + weight * content[name]
    for of in (diffusion_jax.load(workdir, ema=0.08)[1], diffusion_jax.load_network(workdir, ema=0.08)[1]):
        flat = {f"{module}/{name}": leaf for module, leaves in of.items() for name, leaf in leaves.items()}
        assert_same(flat, {path: array.astype(np.float32) for path, array in expected.items()})
    assert_same(params(workdir), state.ema_params)


@pytest.mark.slow
def test_a_post_hoc_average_is_the_one_that_training_would_have_tracked(tmp_path, monkeypatch):
    """Twice the same 40 steps, of which the second keeps the averages of the lengths 0.07 and 0.15."""
    how = {"train__num_steps": 40, "train__snapshot_every": 4, "train__learning_rate": 0.01}
    last = run(tmp_path / "a", **how)
    made = [params(tmp_path / "a", ema=ema) for ema in (0.07, 0.15)]
    monkeypatch.setattr(averages, "EXPONENTS", tuple(map(averages.exponent, (0.07, 0.15))))
    tracked = run(tmp_path / "b", **how).averages
    for post_hoc, direct in zip(made, tracked, strict=True):
        distance = [
            np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (x, direct)), strict=True)))
            for x in (post_hoc, last.params)
        ]
        assert 0 < distance[0] < 0.02 * distance[1]


@pytest.mark.parametrize("ema", [0, -0.1, 0.29, float("nan"), "long", True])
def test_a_length_out_of_range_is_refused(whole, ema):
    with pytest.raises(UserError, match=r"ema=.* must be a relative length, above 0 and up to 0.2886"):
        diffusion_jax.load(whole[0], ema=ema)


def test_a_run_without_averages_says_so(tmp_path):
    write_random_run(tmp_path)
    with pytest.raises(UserError, match=r"ema=0.1: checkpoint 0 has no averages: train with config.train.snapshot_ev"):
        params(tmp_path, ema=0.1)


def test_lengths_that_the_snapshots_cannot_give_are_refused(copied):
    with pytest.raises(UserError, match=r"ema=0.01: the 2 snapshots in .*averages give its profile only to \d\d%: res"):
        params(copied, ema=0.01)
    shutil.rmtree(copied / "averages")
    with pytest.raises(UserError, match=r"ema=0.2: the 0 snapshots in"):
        params(copied, ema=0.2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "a flipped bit": (flip, r"4.npz cannot be read \(.*\): restore it from a copy, or remove it"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:999]), r"4.npz cannot be read"),
    "empty": (lambda file: file.write_bytes(b""), r"4.npz cannot be read"),
    "of another step": (lambda file: shutil.copy(file.with_name("2.npz"), file), r"4.npz is not of this run and step"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_is_named(copied, name):
    damage, message = DAMAGE[name]
    damage(copied / "averages/4.npz")
    with pytest.raises(UserError, match=message) as raised:
        params(copied, ema=0.1)
    assert "\n" not in str(raised.value)
    (copied / "averages/4.npz").unlink()  # as the message says
    params(copied, ema=0.1)


@pytest.mark.parametrize("what", ["another run", "another network"])
def test_a_foreign_snapshot_is_named(copied, what):
    file = copied / "averages/4.npz"
    with np.load(file) as content:
        arrays = dict(content)
    if what == "another run":
        arrays["about"] = np.array(json.dumps({"run": "beef", "step": 4}))
    else:
        arrays["0.1/conv_in/bias"] = np.zeros(3, np.float32)
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=r"4.npz is not of this run and step .*; the run is 3f9a"):
        params(copied, ema=0.1)


def test_averages_start_with_the_run_or_not_at_all(whole, tmp_path, capsys):
    """A checkpoint of step 0, as an import makes, has none and needs none; a later one cannot get any."""
    workdirs.write_config(tmp_path / "imported", tiny_config())
    before = parts.build(tiny_config()).init_state()
    with checkpoint.open_manager(tmp_path / "imported") as manager:
        checkpoint.save(manager, 0, before)
    state = run(tmp_path / "imported", train__num_steps=2, **ON)
    assert len(state.averages) == 2
    assert contents(tmp_path / "imported") == {"2.npz": contents(whole[0])["2.npz"]}
    capsys.readouterr()
    run(tmp_path / "imported", train__num_steps=3)
    assert "snapshot_every=0: the averages of the run end at step 2, and cannot go on later" in capsys.readouterr().out
    config = (tmp_path / "imported/config.json").read_text()
    with pytest.raises(UserError, match=r"snapshot_every: checkpoint 3 has no averages, .*: set .*=0, or give another"):
        run(tmp_path / "imported", train__num_steps=6, **ON)
    assert (tmp_path / "imported/config.json").read_text() == config
    assert not list((tmp_path / "imported/checkpoints").glob("damaged*"))


def test_a_checkpoint_whose_averages_are_lost_is_damaged(copied, monkeypatch):
    """A checkpoint that was saved without averages is whole; one that has lost them is damaged."""
    with checkpoint.open_manager(copied, read_only=True) as manager:
        like, read = parts.abstract_state(workdirs.read_config(copied)), checkpoint._probe
        assert checkpoint.restore_step(manager, like, 6).averages
        monkeypatch.setattr(checkpoint, "_probe", lambda *args: read(*args) - {"averages"})
        with pytest.raises(UserError, match=r"checksum of .averages.* is wrong"):
            checkpoint.restore_step(manager, like, 6)


def test_a_disk_that_is_too_small_is_warned_of_and_one_that_is_full_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    state = run_state()
    snapshots.resume(workdirs.absolute(tmp_path), EVERY, 6, state)
    assert "; warning: 1e-05 MB are free, so raise config.train.snapshot_every=2" in capsys.readouterr().out
    (tmp_path / "averages").write_text("a file in the way")
    with pytest.raises(UserError, match=r"averages/2.npz cannot be written .*: make room or fix the permissions"):
        snapshots.write(workdirs.absolute(tmp_path), 2, state.averages)


def run_state():
    state = parts.build(tiny_config(**ON)).init_state()
    return snapshots.with_averages(state, 2)


# ---------------------------------------------------------------- what is made of them


def test_samples_cards_and_measurements_say_the_length(copied):
    write_samples(copied, 1, 0, str(copied / "a.npz"), ema=0.1)
    with np.load(copied / "a.npz") as content:
        assert json.loads(str(content["about"]))["ema"] == 0.1
    config = workdirs.read_config(copied)
    assert "the weights are a post-hoc average of length 0.1." in model_card(config, copied, 6, "a.npz", "jax", 0.1)
    config = tiny_config(sampling__sampler="ddim", sampling__steps=2, sampling__grid="bound")
    for name, value in (("5", 1), ("6-ema0.1", 2), ("7-ema0.1", 3), ("9-ema0.15", 4)):
        file = copied / "evaluation" / name / "bound-train.npz"
        file.parent.mkdir(parents=True)
        np.savez(file, each=np.zeros((1, 3)), sums=np.full((4, 20), value, np.float64))
    assert measured.read(copied, config).squared_error[1] == 1
    assert measured.read(copied, config, ema=0.1).squared_error[1] == 3
    assert measured.read(copied, config, 6, 0.1).squared_error[1] == 2
    with pytest.raises(UserError, match=r"--step=5 --ema=0.1 --num=256"):
        measured.read(copied, config, 5, 0.1)


@pytest.mark.slow
def test_an_evaluation_has_a_folder_of_its_own(copied):
    plain, other = (evaluate(copied, num=4, quick=True, **how) for how in ({}, {"ema": 0.08}))
    assert other["protocol"]["parameters"] == "post-hoc EMA (relative length 0.08)"
    assert plain["splits"]["train"]["bits_per_dim"] != other["splits"]["train"]["bits_per_dim"]
    assert sorted(path.name for path in (copied / "evaluation").iterdir()) == ["6", "6-ema0.08"]
    assert json.loads((copied / "evaluation/6/evaluation.json").read_text())["protocol"]["parameters"] == "EMA"


def test_the_default_keeps_none():
    assert tiny.get_config().train.snapshot_every == 0
    assert parts.abstract_state(tiny_config()).averages is None
