import contextlib
import glob
import itertools
import json
import pathlib
import re
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, lines, run, tiny_config, without_speed, write_random_run
from etils import epath
from PIL import Image
from tensorboardX.proto import event_pb2

from diffusion_jax import losses, parts, process, sample, sampling, step, train
from diffusion_jax.data import pipeline
from diffusion_jax.errors import UserError
from diffusion_jax.interop import samples
from diffusion_jax.interop.samples import write_samples
from diffusion_jax.planning import fit, prepare, programs
from diffusion_jax.running import checkpoint, dispatch, hosts, profile, watch
from diffusion_jax.running import workdir as workdirs
from diffusion_jax.running.lock import Lock
from tools import torture

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def uninterrupted(small_network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


# ---------------------------------------------------------------- the run


@pytest.mark.slow
def test_a_stop_where_a_grid_is_due_loses_nothing(uninterrupted, tmp_path, monkeypatch, capsys):
    """The grid, the line of an interval that is cut, and that of the last, shorter interval."""
    own = {"train__sample_every": 3, "train__log_every": 4}
    run(tmp_path / "whole", **own)
    monkeypatch.setattr(hosts.StopSignals, "agreed", lambda self, manager, step: 15 if step == 3 else None)
    with pytest.raises(hosts.Stopped, match="stopped by a signal after step 3, which is saved"):
        run(tmp_path / "stopped", **own)
    assert not (tmp_path / "stopped/samples/3.png").exists()
    monkeypatch.undo()
    run(tmp_path / "stopped", **own)
    for grid in ("3.png", "6.png"):
        assert (tmp_path / "stopped/samples" / grid).read_bytes() == (tmp_path / "whole/samples" / grid).read_bytes()
    assert without_speed(lines(tmp_path / "stopped")) == without_speed(lines(tmp_path / "whole"))
    assert [line["step"] for line in lines(tmp_path / "whole")] == [4, 6]

    with checkpoint.open_manager(tmp_path / "whole", read_only=True) as manager:
        pending = checkpoint.read_about(manager, 6)["metrics"]  # a copy: the log is emptied while Orbax writes
    assert len(pending) == 2

    grid = tmp_path / "whole/samples/6.png"
    whole = grid.read_bytes()
    grid.write_bytes(whole[:100])  # as after a kill while an earlier version drew it
    capsys.readouterr()
    run(tmp_path / "whole", **own | {"train__num_steps": 5})
    assert grid.read_bytes() == whole
    assert "the run has taken more steps than config.train.num_steps=5: nothing to do" in capsys.readouterr().out


def test_nothing_in_the_loop_touches_the_device_unasked(uninterrupted, tmp_path, monkeypatch):
    """Such an operation queues behind the running step and stalls the host. Batches, metrics and saves are asked."""
    enter, leave = hosts.StopSignals.__enter__, hosts.StopSignals.__exit__
    guard = jax.transfer_guard("disallow")

    def guarded(self):
        guard.__enter__()
        return enter(self)

    def unguarded(self, *error):
        guard.__exit__(*error)
        leave(self, *error)

    monkeypatch.setattr(hosts.StopSignals, "__enter__", guarded)
    monkeypatch.setattr(hosts.StopSignals, "__exit__", unguarded)
    run(tmp_path)
    assert without_speed(lines(tmp_path)) == without_speed(lines(uninterrupted[0]))


class Gate:
    """Lets a step end only after the next one was dispatched; a loop that waits for the running step fails."""

    SECONDS = 20  # after which a step ends all the same

    def __init__(self, steps):
        self.dispatched = [threading.Event() for _ in range(steps + 2)]
        self.late = []

    def pass_(self, number, device):
        number = int(number)
        if device == 0 and number + 1 < len(self.dispatched) - 1 and not self.dispatched[number + 1].wait(self.SECONDS):
            self.late.append(number)
        return np.float32(0)

    def step(self, inner):
        def gated(state, batch_and_indices):
            new, metrics = inner(state, batch_and_indices)
            token = jax.ShapeDtypeStruct((), jnp.float32)
            zero = jax.pure_callback(self.pass_, token, new.step, jax.lax.axis_index(step.AXIS))
            return new, metrics | {"loss": metrics["loss"] + zero}

        return gated

    def program(self, inner, counter):
        def dispatch(k):
            number = next(counter)
            if number < len(self.dispatched):
                self.dispatched[number].set()
            return inner(k)

        return dispatch


def test_the_loop_dispatches_a_step_before_the_last_one_ends(tmp_path, monkeypatch):
    """With metrics of every step: they are read two dispatches late."""
    steps, train_step, program = 12, parts.train_step, dispatch.program_and_feed
    gate, counter = Gate(steps), itertools.count()  # 0: the dispatch that is compiled before the loop
    monkeypatch.setattr(parts, "train_step", lambda config: gate.step(train_step(config)))

    def gated(*args, **options):
        inner, *batches = program(*args, **options)
        return gate.program(inner, counter), *batches

    monkeypatch.setattr(dispatch, "program_and_feed", gated)
    run(tmp_path, train__num_steps=steps, train__checkpoint_every=1000, train__max_bad_steps=3)
    assert gate.late == [] and len(lines(tmp_path)) == steps and all(x.is_set() for x in gate.dispatched[:-1])


def test_a_new_run_makes_its_weights_while_its_step_compiles(tmp_path, monkeypatch):
    compiling, init, foresee = threading.Event(), parts.Parts.init_state, fit.foresee

    def late_init(built):
        assert compiling.wait(60), "the step waits for the weights"
        return init(built)

    def seen(*args):
        compiling.set()
        return foresee(*args)

    monkeypatch.setattr(parts.Parts, "init_state", late_init)
    monkeypatch.setattr(fit, "foresee", seen)
    assert int(run(tmp_path, train__num_steps=1).step) == 1


def test_weights_that_cannot_be_made_end_the_run(tmp_path, monkeypatch):
    def fails(built):
        raise UserError("no weights")

    monkeypatch.setattr(parts.Parts, "init_state", fails)
    with pytest.raises(UserError, match="no weights"):
        run(tmp_path)


def test_a_second_training_in_the_workdir_is_refused(tmp_path):
    write_random_run(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with Lock(workdirs.absolute(tmp_path)), pytest.raises(UserError, match="is in use by a training in process"):
        run(tmp_path, seed=1)
    assert (tmp_path / "config.json").read_text() == before


def test_a_checkpoint_of_another_run_is_neither_trained_nor_sampled(tmp_path):
    own, other = (write_random_run(tmp_path / name) for name in ("own", "other"))
    shutil.rmtree(tmp_path / "own/checkpoints")
    shutil.copytree(tmp_path / "other/checkpoints", tmp_path / "own/checkpoints")
    for use in (run, sample.load, sample.load_network):
        with pytest.raises(UserError, match=rf"belongs to another run \({other}; run.json names {own}\)"):
            use(tmp_path / "own")


def test_a_config_that_was_edited_is_not_sampled(tmp_path):
    write_random_run(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("su_linear", "cosine"))
    with pytest.raises(UserError, match=r"schedule.name: 'su_linear' in the checkpoint, 'cosine' in config.json"):
        sample.load(tmp_path)
    with pytest.raises(UserError, match=r"holds another run .config.schedule.name: 'cosine' there, 'su_linear' here"):
        run(tmp_path)


@pytest.mark.slow
def test_a_first_save_that_cannot_be_read_back_stops_the_run(uninterrupted, tmp_path, monkeypatch):
    def save(manager, step, state, about):
        write(manager, step, state, about)
        checkpoint.wait(manager)
        torture.DAMAGE["array files missing"](tmp_path / "checkpoints" / str(step))

    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match=r"checkpoint 3 was written to .*, but cannot be read back"):
        run(tmp_path)


def forget_position(monkeypatch):
    iterate = pipeline.iterate
    monkeypatch.setattr(pipeline, "iterate", lambda batches, start, threads=1: iterate(batches, 0, threads))


def forget_state(field):
    def forget(monkeypatch):
        restore, fresh = checkpoint.restore, parts.build(tiny_config()).init_state()

        def forgetful(*args, **kwargs):
            state = restore(*args, **kwargs)
            forgotten = state.params if field == "ema_params" else getattr(fresh, field)
            return state and state._replace(**{field: forgotten})

        monkeypatch.setattr(checkpoint, "restore", forgetful)

    return forget


FORGETS = {
    "the position in the data": forget_position,
    "the optimiser": forget_state("opt_state"),
    "the average": forget_state("ema_params"),
    "the step": forget_state("step"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGETS)
def test_a_resume_that_forgets_something_does_not_pass(uninterrupted, tmp_path, monkeypatch, name):
    """The comparison of the test above notices every kind of state that a restore could lose."""
    run(tmp_path, train__num_steps=3)
    FORGETS[name](monkeypatch)
    state, whole = run(tmp_path), uninterrupted[1]
    if name == "the step":
        assert len(lines(tmp_path)) == 6 and without_speed(lines(tmp_path)) != without_speed(lines(uninterrupted[0]))
        return
    with pytest.raises(AssertionError):
        assert_same(state, whole)


def test_a_finished_run_is_left_alone_but_for_lost_samples(uninterrupted):
    workdir, whole = uninterrupted
    metrics, grid = ((workdir / name).read_bytes() for name in ("metrics.jsonl", "samples/6.png"))
    (workdir / "samples/6.png").unlink()
    assert_same(run(workdir), whole)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert (workdir / "samples/6.png").read_bytes() == grid


def test_a_grid_every_so_often(tmp_path):
    run(tmp_path, train__sample_every=2, train__num_steps=5)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["2.png", "4.png", "5.png"]


def test_what_a_workdir_holds(uninterrupted):
    workdir, _ = uninterrupted
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 8
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert [path.name for path in (workdir / "samples").iterdir()] == ["6.png"]


def test_metrics(uninterrupted):
    workdir, _ = uninterrupted
    written = lines(workdir)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in written] == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3])
    assert written[0]["loss"] == pytest.approx(1, abs=0.1)  # the initial network predicts 0
    assert all(line[name] > 0 for line in written for name in ("grad_norm", "param_norm", "images_per_second"))
    seen = np.array([[line[f"loss_t{i}"] or np.nan for i in range(1, 5)] for line in written])
    assert not np.isnan(seen).all(axis=0).any()


def test_tensorboard_has_the_same_numbers(uninterrupted):
    workdir, _ = uninterrupted
    values = {}
    for name in glob.glob(str(workdir / "events.out.tfevents.*")):
        raw = pathlib.Path(name).read_bytes()
        while raw:  # TFRecord: length, its checksum, the record, its checksum
            length = int.from_bytes(raw[:8], "little")
            event = event_pb2.Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for line in lines(workdir):
        for name in ("loss", "learning_rate", "grad_norm", "param_norm"):
            assert values[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


@pytest.mark.slow
def test_metrics_are_means_over_the_interval(uninterrupted, tmp_path):
    run(tmp_path, train__log_every=3)
    single, averaged = lines(uninterrupted[0]), lines(tmp_path)
    assert [line["step"] for line in averaged] == [3, 6]
    for i in (0, 1):
        assert averaged[i]["loss"] == pytest.approx(np.mean([line["loss"] for line in single[3 * i : 3 * i + 3]]))


def test_a_config_is_checked_without_the_command_line(tmp_path):
    config = tiny_config(seed=2**32)
    for use in (lambda: train.train(config, tmp_path / "run"), lambda: prepare.prepare(config)):
        with pytest.raises(UserError, match=r"config\.seed=4294967296 must be"):
            use()
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_leaves_signal_is_warned_of(tmp_path, capsys):
    with contextlib.ExitStack() as stack:
        train._begin(tiny_config(), workdirs.absolute(tmp_path / "short"), stack)
    printed = capsys.readouterr().out
    assert "warning: alpha_bar_T = 0.900" in printed and "warning: config.train.ema_decay=0.995 over" in printed
    with contextlib.ExitStack() as stack:
        train._begin(tiny_config(schedule__name="cosine"), workdirs.absolute(tmp_path / "cosine"), stack)
    assert "alpha_bar_T" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_training_looks_at_every_so_often(tmp_path):
    """Held-out loss, samples and copies, in lines of their own; the run is the same as without."""
    split = {"data__split": "train[:200]", "data__test_split": "train[200:230]", "sampling__num": 64}
    quiet = run(tmp_path / "quiet", **split)
    looked = run(tmp_path / "looked", train__evaluate_every=2, **split)
    jax.tree.map(np.testing.assert_array_equal, looked, quiet)
    own = [line for line in lines(tmp_path / "looked") if "frechet_pixels" in line]
    assert [line["step"] for line in own] == [2, 4, 6]
    others = [line["loss"] for line in lines(tmp_path / "looked") if "frechet_pixels" not in line]
    assert others == [line["loss"] for line in lines(tmp_path / "quiet")]
    assert own[-1]["loss"] == others[-1]
    assert (tmp_path / "looked" / "samples" / "nearest-6.png").exists()

    config = workdirs.read_config(tmp_path / "looked")
    config.data.split = "train[200:230]"
    x_0 = parts.images(config)[:].astype(np.float32) / 127.5 - 1
    t = 1 + np.arange(30) * 20 // 30
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(30))
    network = parts.network(config)
    loss = losses.with_noise(losses.simple_loss, 1)(
        lambda x, t: network({"params": looked.ema_params}, x, t), parts.schedule(config), x_0, t, keys
    )
    assert own[-1]["held_out_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
    assert own[-1]["held_out_loss_t4"] == pytest.approx(float(loss[t > 15].mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    run(tmp_path, train__num_steps=3)
    restore = checkpoint.restore

    def explode(*args, **kwargs):
        state = restore(*args, **kwargs)
        return state._replace(params=jax.tree.map(lambda leaf: leaf + np.float32(1e38), state.params))

    monkeypatch.setattr(checkpoint, "restore", explode)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step 4; .* of step 3"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))


@pytest.mark.slow
def test_parameters_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path):
    run(tmp_path, train__num_steps=3)
    with pytest.raises(FloatingPointError, match=r"param_norm is inf at step 4; .* of step 3"):
        run(tmp_path, train__learning_rate=1e38)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))


def nan_now_and_then(config):
    """The loss of the config, but for about a third of the steps, by the key of an example."""
    loss = parts.loss(config)

    def bad_loss(eps_bar_fn, s, x_0, t, keys):
        return jnp.where(jax.random.uniform(keys[0]) < 0.1, jnp.nan, loss(eps_bar_fn, s, x_0, t, keys))

    return bad_loss


@pytest.mark.slow
def test_bad_steps_are_left_out_on_request(tmp_path, monkeypatch):
    bad_loss = nan_now_and_then(tiny_config())  # of 4 devices: any of them spoils the step
    monkeypatch.setattr(parts, "loss", lambda config: bad_loss)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+; .*max_bad_steps"):
        run(tmp_path / "a", train__num_steps=20)
    state = run(tmp_path / "b", train__num_steps=20, train__max_bad_steps=5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    skipped = [line["skipped"] for line in lines(tmp_path / "b")]
    assert 0 < sum(skipped) < 20
    assert state.opt_state[1][0].count == 20 - sum(skipped)


def test_initial_state():
    config = tiny_config()
    state = parts.build(config).init_state()
    assert_same(state.params, state.ema_params)
    assert_same(state, parts.build(config).init_state())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), parts.abstract_state(config)
    )


# ---------------------------------------------------------------- the levers


@pytest.mark.slow
def test_a_data_set_on_the_device_changes_no_bit(uninterrupted, tmp_path):
    workdir, whole = uninterrupted
    assert_same(run(tmp_path, data__on_device=True), whole)
    assert without_speed(lines(tmp_path)) == without_speed(lines(workdir))


@pytest.mark.slow
def test_accumulation_changes_rounding_alone(uninterrupted, tmp_path):
    workdir, expected = uninterrupted
    state = run(tmp_path, train__accumulate=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, expected.params)
    for line, other in zip(lines(tmp_path), lines(workdir), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_several_steps_a_dispatch(uninterrupted, tmp_path):
    """The same run but for what XLA rounds otherwise in a loop; of either data, resumed anywhere, the same bits."""
    workdir, whole = uninterrupted
    several = run(tmp_path / "a", train__steps_per_dispatch=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), several.params, whole.params)
    for line, other in zip(lines(tmp_path / "a"), lines(workdir), strict=True):
        assert line["step"] == other["step"] and line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    run(tmp_path / "b", train__steps_per_dispatch=3, train__num_steps=3)
    assert_same(run(tmp_path / "b", train__steps_per_dispatch=3, data__on_device=True), several)
    assert without_speed(lines(tmp_path / "b")) == without_speed(lines(tmp_path / "a"))


def test_a_batch_divides_among_devices_and_parts(tmp_path):
    with pytest.raises(UserError, match=r"batch_size=8 does not divide among 4 devices of .*accumulate=3 parts"):
        run(tmp_path, train__accumulate=3)
    for number in (2, 12):
        with pytest.raises(UserError, match=rf"accumulate={number} does not go with train.deterministic on 4 device"):
            run(tmp_path, train__accumulate=number, train__deterministic=True)
    with pytest.raises(
        UserError, match=r"batch_size=8 does not divide among config.train.accumulate=16 parts: make it"
    ):
        run(tmp_path, train__accumulate=16, train__deterministic=True)


CHIP = programs.Chip(flops=1e12, hbm=1e9, bandwidth=1e11, links=1e10, pod=256)


def test_the_step_is_foreseen(tmp_path, monkeypatch, capsys):
    """A known chip gets an estimate of the compiled step, which is the one that runs."""
    monkeypatch.setattr(programs, "chip_of", lambda device: CHIP)
    monkeypatch.setattr(watch, "SURE", 0.0)
    run(tmp_path)
    out = capsys.readouterr().out
    assert "estimate: at least" in out and "hours to the end" in out and "of 0.93 GiB a device" in out
    foretold, measured = (float(ms) for ms in re.findall(r"(?:least|measured:) ([\d.e+-]+) ms a step", out))
    share = float(re.search(r"([\d.]+)% of the device's peak", out)[1])
    assert share == pytest.approx(100 * foretold / measured, abs=0.6)
    assert "warning: the step" not in out


def test_the_sampler_of_the_grids_is_foreseen(uninterrupted, monkeypatch):
    run, state = parts.build(tiny_config()), uninterrupted[1]
    fit.foresee_sampler(tiny_config(), run.sample_fn(), state)  # no memory is reported
    monkeypatch.setattr(programs, "room", lambda device: 2**30)
    fit.foresee_sampler(tiny_config(), run.sample_fn(), state)
    monkeypatch.setattr(programs, "room", lambda device: 10_000)
    with pytest.raises(UserError, match=r"the sampler does not fit into a .* for the state .*: lower config\.sampling"):
        fit.foresee_sampler(tiny_config(), run.sample_fn(), state)


# ---------------------------------------------------------------- from a notebook


def test_training_takes_arrays_and_keeps_them(tmp_path, small_network):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    labels = np.array(["cat", "dog"])[np.arange(40) % 2]
    config = tiny_config(model__num_classes="auto", data__cache_dir=str(tmp_path / "cache"))
    state = train.train(config, tmp_path / "run", images=images, labels=labels)
    kept = workdirs.read_config(tmp_path / "run")
    assert kept.data.path == str(tmp_path / "run/images.npz") and list(kept.data.classes) == ["cat", "dog"]
    np.testing.assert_array_equal(parts.images(kept)[:], images)
    assert kept.data.dtype == "uint8"
    assert_same(train.train(config, tmp_path / "run", images=images, labels=labels), state)  # nothing is left to do
    assert_same(train.train(kept, tmp_path / "run"), state)
    with pytest.raises(UserError, match=r"images\.npz holds other images or labels: give those that it holds, or"):
        train.train(config, tmp_path / "run", images=images)
    with pytest.raises(UserError, match=r"images are kept in the workdir, and gs://bucket/run is not on a disk"):
        workdirs.keep_images(epath.Path("gs://bucket/run"), images)


def test_load(uninterrupted):
    workdir, state = uninterrupted
    sample_fn, params = sample.load(workdir, num=6)
    assert_same(params, state.ema_params)
    x = sample_fn(params, jax.random.key(0))
    assert x.shape == (6, 8, 8, 1)
    assert float(abs(x).max()) <= 1  # clipped, and no noise at t = 1
    few, _ = sample.load(workdir)
    np.testing.assert_allclose(few(params, jax.random.key(0)), x[:4], atol=1e-4)


@pytest.mark.slow
def test_load_another_sampler(uninterrupted):
    """Each is its chain, from the latent of the same keys."""
    workdir, _ = uninterrupted
    apply_fn, params, s = sample.load_network(workdir)
    rng = jax.random.key(0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(4))
    latent = sampling.normal(keys, sampling.LATENT, (8, 8, 1))

    def eps_bar_fn(x, t):
        return apply_fn({"params": params}, x, t)

    ddim, _ = sample.load(workdir, sampler="ddim", steps=5, eta=0.5, clip=False)
    expected = sampling.ddim_chain(eps_bar_fn, s, sampling.grid_uniform(s, 5), latent, keys, 0.5)
    np.testing.assert_allclose(ddim(params, rng), expected, rtol=1e-4, atol=1e-4)
    solver, _ = sample.load(workdir, sampler="dpmpp_2m", steps=4)
    ts, clip = sampling.grid_log_snr(s, 4), (-1.0, 1.0)
    expected = sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, latent, clip)
    np.testing.assert_allclose(solver(params, rng), expected, rtol=1e-4, atol=1e-4)
    solver, _ = sample.load(workdir, sampler="dpmpp_2m", steps=4, eta=1.0)
    expected = sampling.dpmpp_2m_chain(eps_bar_fn, s, ts, latent, clip, keys=keys, eta=1.0)
    np.testing.assert_allclose(solver(params, rng), expected, rtol=1e-4, atol=1e-4)
    half, _ = sample.load(workdir, dtype="bfloat16")
    whole, _ = sample.load(workdir)
    assert 0 < float(jnp.abs(half(params, rng) - whole(params, rng)).max()) < 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sampler": "euler"}, "sampler='euler' must be one of ancestral, ddim, dpmpp_2m"),
        ({"sampler": "ddim", "steps": 21}, r"steps=21 must be in 1\.\.20"),
        ({"steps": 5}, "steps=5 does not fit .*ancestral"),
        ({"sampler": "ddim", "eta": -1.0}, r"eta=-1\.0 must be a number >= 0"),
        ({"dtype": "float64"}, "dtype='float64' must be one of"),
    ],
)
def test_load_what_cannot_be(uninterrupted, given, message):
    with pytest.raises(UserError, match=message):
        sample.load(uninterrupted[0], **given)


def test_a_trace_changes_no_bit(uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "WARM_UP", 2)
    state = train.train(tiny_config(), str(tmp_path), profile=3)
    assert_same(state, uninterrupted[1])
    printed = capsys.readouterr().out
    assert "traced steps 3 to 5: " in printed and "waits for input" in printed and "| operation " in printed
    (file,) = (tmp_path / "profile/plugins/profile").glob("*/*.xplane.pb")
    found = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in found.planes for line in plane.lines for event in line.events]
    with warnings.catch_warnings(action="ignore"):  # of jaxlib: its type has no __module__
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "dispatch"]
    assert steps == [2, 3], "xprof takes the steps from these: the whole ones, from 0"
    train.train(tiny_config(train__num_steps=7), str(tmp_path), profile=3)
    assert "nothing was traced: the run ended before step 11" in capsys.readouterr().out
    train.train(tiny_config(train__num_steps=10), str(tmp_path), profile=3)
    assert "the trace was cut: the run ended before step 12" in capsys.readouterr().out


@pytest.mark.slow
def test_a_progress_bar_changes_no_bit(uninterrupted, capsys):
    plain, params = sample.load(uninterrupted[0], sampler="ddim", steps=10)
    watched, _ = sample.load(uninterrupted[0], sampler="ddim", steps=10, progress=True)
    for _ in range(2):
        np.testing.assert_array_equal(watched(params, jax.random.key(0)), plain(params, jax.random.key(0)))
    jax.effects_barrier()
    assert capsys.readouterr().err.count("sampling: 100%") >= 2


@pytest.mark.slow
def test_samples_in_shards(uninterrupted, tmp_path, monkeypatch):
    """Shards hold the images of one file; only missing shards are made; other samples are not mixed in."""
    workdir, _ = uninterrupted
    monkeypatch.setattr(samples, "SHARD", 3)
    write_samples(workdir, 8, 1, str(tmp_path / "all.npz"))
    write_samples(workdir, 8, 1, f"{tmp_path}/shards/")
    names = ["00000000-00000002.npz", "00000003-00000005.npz", "00000006-00000007.npz"]
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "samples.json"]
    (tmp_path / "shards" / names[1]).unlink()
    before = (tmp_path / "shards" / names[0]).stat().st_mtime_ns
    write_samples(workdir, 8, 1, f"{tmp_path}/shards/")
    assert (tmp_path / "shards" / names[0]).stat().st_mtime_ns == before
    shards = np.concatenate([np.load(tmp_path / "shards" / name)["arr_0"] for name in names])
    whole = np.load(tmp_path / "all.npz")["arr_0"]
    assert abs(shards.astype(int) - whole).max() <= 1  # 1e-6 may round to the next grey level
    write_samples(workdir, 9, 1, f"{tmp_path}/shards/")  # one more: the last shard grows
    names[2] = "00000006-00000008.npz"
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [*names, "samples.json"]
    with pytest.raises(UserError, match="holds samples of another run"):
        write_samples(workdir, 8, 2, f"{tmp_path}/shards/")


@pytest.mark.parametrize("loss", ["simple", "step"])
@pytest.mark.parametrize("prediction", ["x_0", "velocity"])
def test_other_predictions_reach_loss_and_sampler(prediction, loss):
    """A network whose output is wired by hand: training and sampling see it as what it predicts."""
    config = tiny_config(model__prediction=prediction, train__loss=loss)
    s = parts.schedule(config)
    x_0, keys = np.full((3, 8, 8, 1), 0.3, np.float32), jax.random.split(jax.random.key(1), 3)
    t = np.array([2, 9, 20])

    def knows_x_0(x, t):  # the right output for x_0 = 0.3
        if prediction == "x_0":
            return jnp.full_like(x, 0.3)
        eps_bar = jax.vmap(lambda x, t: process.predict_eps_bar(s, x, t, 0.3))(x, t)
        return jax.vmap(lambda t, eps_bar: process.velocity(s, 0.3, t, eps_bar))(t, eps_bar)

    value = parts.loss(config)(knows_x_0, s, x_0, t, keys)
    if loss == "simple":
        np.testing.assert_allclose(value, 0, atol=1e-9)
    else:  # what ε̄ says of ε alone remains: α_t² β̄_{t−1}²/β̄_t², about
        rest = (s.alpha[t] * s.beta_bar[t - 1] / s.beta_bar[t]) ** 2
        np.testing.assert_allclose(value, rest, rtol=0.6)
    predict = parts._prediction_fn(config, knows_x_0, s)
    ts, x_t = sampling.grid_uniform(s, 20), jnp.ones((3, 8, 8, 1))
    np.testing.assert_allclose(sampling.ddim_chain(predict, s, ts, x_t, keys), x_0, atol=1e-4)


def test_samples_do_not_depend_on_the_devices(uninterrupted, monkeypatch):
    """20 steps: the noise bit for bit, the images to 1e-4."""
    workdir, _ = uninterrupted
    sample_fn, params = sample.load(workdir, num=5)
    four = sample_fn(params, jax.random.key(0))
    local = jax.local_devices()
    monkeypatch.setattr(jax, "local_devices", lambda: local[:1])
    sample_fn, _ = sample.load(workdir, num=5)
    one = sample_fn(params, jax.random.key(0))
    assert one.sharding.device_set == {local[0]}
    np.testing.assert_allclose(one, four, atol=1e-4)


def test_load_network(uninterrupted):
    workdir, state = uninterrupted
    apply_fn, params, s = sample.load_network(str(workdir))
    x, t = jnp.zeros((2, 8, 8, 1)), np.array([1, 20])
    assert s.num_steps == 20
    expected = parts.model(tiny_config()).apply({"params": state.ema_params}, x, t)
    np.testing.assert_array_equal(apply_fn({"params": params}, x, t), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__learned_sigma": True, "train__loss": "hybrid", "sampling__sigma": "learned"},
        {
            "schedule__zero_terminal": True,
            "model__prediction": "velocity",
            "sampling__sampler": "dpmpp_2m",
            "sampling__steps": 5,
        },
        {"train__weight": "min_snr"},
    ],
    ids=["learned deviations", "zero terminal", "weight"],
)
def test_other_losses_and_schedules_train_and_draw(tmp_path, changes):
    run(tmp_path, train__num_steps=2, train__warmup_steps=0, **changes)
    seen = lines(tmp_path)
    assert len(seen) == 2 and all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in seen)
    assert all(("weighted_loss" in line) == ("train__weight" in changes) for line in seen)
    picture = np.asarray(Image.open(tmp_path / "samples" / "2.png"))
    assert picture.std() > 10
