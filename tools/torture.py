"""Tries to lose a run: kills, damage, full disks, changing devices and processes, bad input.

Prints the counts of each section. The exit code is 1 if anything was lost, silently wrong or unclear.

    python -m tools.torture --workdir=/tmp/torture                    (everything, about 20 minutes on two cores)
    python -m tools.torture --workdir=/tmp/torture --only=kills,damage
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging

from diffusion_jax import parts
from diffusion_jax.errors import UserError
from diffusion_jax.running import checkpoint
from diffusion_jax.running import workdir as workdirs

ROOT = pathlib.Path(__file__).parent.parent
WORKDIR = flags.DEFINE_string("workdir", None, "new or empty folder for the runs", required=True)
ONLY = flags.DEFINE_list("only", [], "sections to run; default: all")
KILLS = flags.DEFINE_integer("kills", 50, "number of SIGKILLs")
TERMS = flags.DEFINE_integer("terms", 10, "number of SIGTERMs")
STEPS = flags.DEFINE_integer("steps", 1000, "steps of the run that is killed, 60 or more")
FLIPS = flags.DEFINE_integer("flips", 100, "number of single bits to flip")
CLASSES = flags.DEFINE_bool("classes", False, "train with the ten classes of the digits")
SEED = flags.DEFINE_integer("seed", 0, "seed of the moments and places of the damage")

# Changes to configs/tiny.py. Its programs stay the same, so a test of torture compiles none of its own.
CONFIG = {"train.checkpoint_every": 10}


# ---------------------------------------------------------------- runs


def start(workdir, devices=1, code=None, args=(), **overrides):
    """Starts main.py; `code` runs before it and turns the program into a mutant."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{WORKDIR.value}/compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    settings = {"train.num_steps": STEPS.value} | CONFIG
    settings |= {"model.num_classes": "auto"} if CLASSES.value else {}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    mutant = f"import sys; {code}; from diffusion_jax import cli; sys.exit(cli.main())"
    program = ["-c", mutant] if code else ["main.py"]
    command = [sys.executable, *program, f"--workdir={workdir}"]
    if not any(arg.startswith("--mode=") for arg in args):  # training; the other modes take the run's config
        command += ["--config=configs/tiny.py", *(f"--config.{key}={value}" for key, value in settings.items())]
    return subprocess.Popen(
        [*command, *args], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, timeout=300):
    """Returns (exit code, output); the code is None if the process had to be killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[0]


def losses(workdir):
    """Returns {step: line of metrics.jsonl} without the speeds, of complete lines alone."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    by_step = {}
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):
            values = json.loads(line)
            by_step[values["step"]] = {name: value for name, value in values.items() if "per_second" not in name}
    return by_step


def committed(workdir):
    """Returns the steps of the checkpoints that Orbax has finished."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def in_flight(workdir):
    return bool(list((pathlib.Path(workdir) / "checkpoints").glob("*tmp*")))


def whole_state(workdir):
    """Returns the checksums of every leaf of the newest checkpoint, and the bytes of its samples."""
    config = workdirs.read_config(workdir)
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        state = checkpoint.restore(manager, parts.abstract_state(config))
    grid = pathlib.Path(workdir) / "samples" / f"{state.step}.png"
    return checkpoint.checksums(state), grid.read_bytes()


def baseline(**overrides):
    """Returns the workdir of an undisturbed run; each set of overrides runs once."""
    name = "-".join(["whole", *(f"{key.split('__')[-1]}{value}" for key, value in overrides.items())])
    workdir = pathlib.Path(WORKDIR.value) / name
    if not workdir.exists():
        code, output = finish(start(workdir, **overrides))
        if code != 0:
            sys.exit(f"the undisturbed run has failed:\n{output}")
    return workdir


def fresh(name):
    workdir = pathlib.Path(WORKDIR.value) / name
    shutil.rmtree(workdir, ignore_errors=True)
    return workdir


# ---------------------------------------------------------------- kills


def _stop_in_flight(process, workdir, pause):
    """Stops the process `pause` seconds into a save; returns False if it ends before a save could be caught."""
    while process.poll() is None:
        if in_flight(workdir):
            time.sleep(pause)
            process.send_signal(signal.SIGSTOP)
            if in_flight(workdir):
                return True
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    return False


def kills(failures):
    """Kills a run at random moments and starts it again, until it is done."""
    rng, whole, workdir = random.Random(SEED.value), baseline(), fresh("killed")
    expected = losses(whole)
    moments = ["kill in flight"] * (KILLS.value - KILLS.value // 2) + ["kill"] * (KILLS.value // 2)
    moments += ["term"] * TERMS.value
    rng.shuffle(moments)
    counts = dict.fromkeys(("kill", "in flight", "term", "lost", "steps replayed", "wrong losses"), 0)
    newest, done = 0, set()
    for i, moment in enumerate(moments):
        process = start(workdir)
        first = max(committed(workdir), default=0)
        counts["lost"] += first < newest
        # Spreads the kills over the run: each process may take its share of the steps, and a few more.
        goal = max(first, STEPS.value * i // len(moments)) + rng.randrange(1, 10)
        while process.poll() is None and max(losses(workdir), default=0) < goal:
            time.sleep(0.005)
        pause = rng.random() * 0.02
        flying = _stop_in_flight(process, workdir, pause / 10) if moment == "kill in flight" else False
        if not flying:
            time.sleep(pause)
            flying = in_flight(workdir)
        newest = max(committed(workdir), default=0)
        process.send_signal(signal.SIGTERM if moment == "term" else signal.SIGKILL)
        code, output = finish(process)
        if code not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            failures.append(f"kills: a run ended before its kill with {code}: {output[-300:]}")
            break
        if moment == "term":
            counts["term"] += 1
            if "saved" not in output or max(committed(workdir)) != max(losses(workdir)):
                failures.append(f"kills: SIGTERM without a saved last step: {output[-300:]}")
        else:
            counts["kill"] += 1
            counts["in flight"] += flying
        now = losses(workdir)
        counts["steps replayed"] += len(done & set(now) - set(range(first + 1)))
        done |= set(now)
        counts["wrong losses"] += sum(now[step] != expected[step] for step in now)
    code, output = finish(start(workdir))
    if code != 0:
        failures.append(f"kills: the last run failed: {output[-300:]}")
    elif whole_state(workdir) != whole_state(whole) or losses(workdir) != expected:
        failures.append("kills: the final state differs from that of the uninterrupted run")
    if counts["lost"] or counts["wrong losses"]:
        failures.append(f"kills: {counts}")
    if 2 * counts["in flight"] < counts["kill"]:
        failures.append(f"kills: only {counts['in flight']} with a save in flight")
    return counts


# Mutants of the program, each of which forgets one thing when it restores a run.
FORGETS = {
    "data position": "from diffusion_jax.data import pipeline; go = pipeline.iterate; "
    "pipeline.iterate = lambda ds, start, threads=1: go(ds, 0, threads)",
    "optimiser": "forget = lambda s, like: s._replace(opt_state=like.opt_state)",
    "ema": "forget = lambda s, like: s._replace(ema_params=s.params)",
    "step": "forget = lambda s, like: s._replace(step=like.step)",
}
_FORGET_STATE = (
    "from diffusion_jax.parts import Parts; from diffusion_jax.running import checkpoint; read = checkpoint.restore; "
    "new, shapes = [], Parts.abstract_state; "
    "Parts.abstract_state = lambda run: (new.append(run.init_state()), shapes(run))[1]; "
    "checkpoint.restore = lambda m, like, **k: forget(read(m, like, **k), new[0]); "
)


def mutants(failures):
    """Resumes a run with each of FORGETS and checks that the comparison with the whole run notices."""
    steps = {"train__num_steps": 20}
    whole, half, caught = baseline(**steps), fresh("half"), []
    finish(start(half, train__num_steps=10))
    for name, forget in FORGETS.items():
        workdir = fresh("mutant")
        shutil.copytree(half, workdir)
        code = forget if "go =" in forget else f"{_FORGET_STATE}{forget}"
        code, output = finish(start(workdir, code=code, **steps))
        if code != 0:
            failures.append(f"mutants: {name} failed: {output[-300:]}")
        elif whole_state(workdir) == whole_state(whole):
            failures.append(f"mutants: {name} was not caught")
        else:
            caught.append(name)
    return {"caught": caught, "of": len(FORGETS)}


# ---------------------------------------------------------------- damage


def files_of(folder):
    """Returns the files of a checkpoint that are not empty, the largest last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: path.stat().st_size)


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _unlink_all(folder, pattern):
    for file in folder.rglob(pattern):
        file.unlink()


DAMAGE = {
    "array file cut": lambda folder: truncate(files_of(folder / "state")[-1]),
    "bit of the arrays flipped": lambda folder: flip(
        files_of(folder / "state")[-1], 4 * files_of(folder / "state")[-1].stat().st_size
    ),
    "array files missing": lambda folder: [shutil.rmtree(path) for path in folder.rglob("d") if path.is_dir()],
    "manifests empty": lambda folder: [file.write_bytes(b"") for file in folder.rglob("manifest.ocdbt")],
    "manifests missing": lambda folder: _unlink_all(folder, "manifest.ocdbt"),
    "metadata cut": lambda folder: [truncate(file) for file in folder.rglob("_METADATA")],
    "checksums missing": lambda folder: shutil.rmtree(folder / "checksums"),
    "state missing": lambda folder: shutil.rmtree(folder / "state"),
    "everything missing": lambda folder: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in folder.iterdir()],
}


def restored(workdir):
    """Returns (step, checksums) of the state from which a run would resume, or the UserError."""
    config = workdirs.read_config(workdir)
    try:
        with checkpoint.open_manager(workdir) as manager, contextlib.redirect_stdout(sys.stderr):
            state = checkpoint.restore(manager, parts.abstract_state(config), set_aside=True)
            return int(state.step), checkpoint.checksums(state)
    except UserError as error:
        return error


def damage(failures):
    """Damages the newest checkpoint and all checkpoints in every way of DAMAGE, then single bits of the newest."""
    whole = baseline(train__num_steps=30)
    steps = committed(whole)
    expected, counts = {}, {"kinds": len(DAMAGE), "fell back": 0, "refused": 0, "bits flipped": 0, "bits harmless": 0}
    for step in reversed(steps):  # the checksums of each
        workdir = fresh("damaged")
        shutil.copytree(whole, workdir)
        for newer in [other for other in steps if other > step]:
            shutil.rmtree(workdir / "checkpoints" / str(newer))
        expected[step] = restored(workdir)

    def damaged(spoil, chosen):
        workdir = fresh("damaged")
        shutil.copytree(whole, workdir)
        for step in chosen:
            spoil(workdir / "checkpoints" / str(step))
        before = sorted(map(str, workdir.rglob("*")))
        return workdir, before, restored(workdir)

    for name, spoil in DAMAGE.items():
        workdir, _, result = damaged(spoil, steps[-1:])
        if result == expected[steps[-2]] and (workdir / "checkpoints" / f"damaged-{steps[-1]}").exists():
            counts["fell back"] += 1
        else:
            failures.append(f"damage: {name} of the newest: {str(result)[:200]}")
        workdir, before, result = damaged(spoil, steps)
        if isinstance(result, UserError) and sorted(map(str, workdir.rglob("*"))) == before:
            counts["refused"] += 1
        else:
            failures.append(f"damage: {name} of all: {str(result)[:200]}")

    rng = random.Random(SEED.value)
    for _ in range(FLIPS.value):
        file = rng.choice(files_of(whole / "checkpoints" / str(steps[-1])))
        bit = rng.randrange(8 * file.stat().st_size)
        name = file.relative_to(whole / "checkpoints" / str(steps[-1]))
        *_, result = damaged(lambda folder, name=name, bit=bit: flip(folder / name, bit), steps[-1:])
        counts["bits flipped"] += 1
        counts["bits harmless"] += result == expected[steps[-1]]
        if result not in (expected[steps[-1]], expected[steps[-2]]):
            failures.append(f"damage: bit {bit} of {name}: {str(result)[:200]}")
    return counts


def disk(failures):
    """Fills the disk while a run saves, and makes its folder read-only. Needs root for the mount."""
    if os.geteuid() != 0:
        return "left out: needs root to mount a small file system"
    mount, counts = fresh("small-disk"), {}
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
    try:
        code, output = finish(start(mount / "run", train__keep_checkpoints=100))
        counts["full disk"] = output.strip().splitlines()[-1]
        newest = max(committed(mount / "run"), default=0)
        if code != 1 or "Traceback" in output or "MB free" not in output or not newest:
            failures.append(f"disk: full: exit code {code}, {output[-500:]}")
        # Other programs may fill the disk between the check and the save.
        blind = "from diffusion_jax.running import checkpoint; checkpoint._check_room = lambda *_: None"
        code, output = finish(start(mount / "run", code=blind, train__keep_checkpoints=100))
        counts["full disk while saving"] = output.strip().splitlines()[-1]
        newest = max(committed(mount / "run"))
        if code != 1 or "Traceback" in output or "make room" not in output:
            failures.append(f"disk: full while saving: exit code {code}, {output[-900:]}")
        subprocess.run(["mount", "-o", "remount,size=200m", mount], check=True)
        code, output = finish(start(mount / "run", train__num_steps=newest + 10, train__keep_checkpoints=100))
        if code != 0 or f"from step {newest}" not in output:
            failures.append(f"disk: with room again: exit code {code}, {output[-500:]}")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        code, output = finish(start(mount / "run", train__num_steps=newest + 20))
        counts["read-only"] = output.strip().splitlines()[-1]
        if code != 1 or "Traceback" in output:
            failures.append(f"disk: read-only: exit code {code}, {output[-500:]}")
    finally:
        subprocess.run(["umount", mount], check=True)
    return counts


# ---------------------------------------------------------------- devices and processes


def together(workdir, processes, devices, extra=(), own=None, **overrides):
    """Starts the processes of one run. `workdir` may be a list with one for each, `own` has arguments of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    args = [f"--coordinator={address}", f"--num_processes={processes}", *extra] if processes > 1 else [*extra]
    workdirs = workdir if isinstance(workdir, list) else [workdir] * processes
    return [
        start(workdirs[i], devices, args=[*args, f"--process_id={i}", *(own[i] if own else [])], **overrides)
        for i in range(processes)
    ]


def devices(failures):
    """Continues one run on changing numbers of devices and processes."""
    steps, shapes = 10, ((1, 4), (2, 2), (1, 2), (1, 8), (2, 2), (1, 1))  # processes, devices of each
    workdir = fresh("devices")
    for i, (processes, count) in enumerate(shapes):
        for process in together(workdir, processes, count, train__num_steps=steps * (i + 1)):
            code, output = finish(process)
            if code != 0:
                failures.append(f"devices: {processes} x {count}: exit code {code}, {output[-500:]}")
    expected, actual = losses(baseline()), losses(workdir)
    if sorted(actual) != list(range(1, steps * len(shapes) + 1)):
        failures.append(f"devices: {shapes}: steps {sorted(actual)}")
    largest = max(abs(actual[step]["loss"] - expected[step]["loss"]) for step in actual)
    if largest > 1e-6:
        failures.append(f"devices: losses differ by {largest}")
    grey, bits = _samples_of_processes(workdir, failures), _evaluation_of_processes(workdir, failures)
    return {
        "largest difference of a loss": largest,
        "of a sample of 2 processes to 1, in grey levels": grey,
        "of bits/dim of 2 processes to 1": bits,
    }


def _samples_of_processes(workdir, failures):
    """Samples in one and in two processes and returns the largest difference, in levels of 0..255."""
    arrays = []
    for processes in (1, 2):
        out = pathlib.Path(WORKDIR.value) / f"samples-{processes}.npz"
        for process in together(workdir, processes, 2, extra=["--mode=sample", "--num=21", f"--out={out}"]):
            code, output = finish(process)
            if code != 0:
                failures.append(f"devices: sampling in {processes}: exit code {code}, {output[-500:]}")
                return None
        arrays.append(np.load(out)["arr_0"].astype(int))
    difference = int(abs(arrays[0] - arrays[1]).max())
    if difference > 1 or arrays[0].shape != arrays[1].shape:
        failures.append(f"devices: samples differ by {difference}")
    return difference


def _evaluation_of_processes(workdir, failures):
    """Evaluates in one and in two processes and returns the largest difference of bits/dim and of the distance."""
    results, samples = [], pathlib.Path(WORKDIR.value) / "samples-1.npz"
    for processes in (1, 2):
        extra = ["--mode=evaluate", "--num=21", f"--samples={samples}"]
        for process in together(workdir, processes, 2, extra=extra):
            code, output = finish(process)
            if code != 0:
                failures.append(f"devices: evaluating in {processes}: exit code {code}, {output[-500:]}")
                return None
        (folder,) = (workdir / "evaluation").iterdir()
        result = json.loads((folder / "evaluation.json").read_text())
        results.append((result["splits"]["train"]["bits_per_dim"], result["samples"]["frechet"]))
        shutil.rmtree(workdir / "evaluation")
    difference = max(abs(a - b) for a, b in zip(*results, strict=True))
    if difference > 1e-5:
        failures.append(f"devices: evaluations differ by {difference}")
    return difference


def peers(failures):
    """Checks that the peer of a killed process ends, that both resume, and that SIGTERM to one stops both."""
    workdir, counts = fresh("peers"), {}

    def wait_for(step, run):
        while all(process.poll() is None for process in run) and max(losses(workdir), default=0) < step:
            time.sleep(0.01)

    for victim in (1, 0):
        run = together(workdir, 2, 2)
        wait_for(max(committed(workdir), default=0) + 25, run)
        run[victim].kill()
        began = time.monotonic()
        code, output = finish(run[1 - victim], timeout=120)
        finish(run[victim])
        counts[f"seconds until process {1 - victim} ends"] = round(time.monotonic() - began, 1)
        counts[f"exit code of process {1 - victim}"] = code
        if code in (0, None) or time.monotonic() - began > 60:
            failures.append(f"peers: process {1 - victim}: {code}, {output[-500:]}")
    newest = max(committed(workdir))
    run = together(workdir, 2, 2)
    wait_for(newest + 15, run)
    run[1].send_signal(signal.SIGTERM)
    ended = [finish(process, timeout=120) for process in run]
    counts["exit codes after SIGTERM to one"] = [code for code, _ in ended]
    if [code for code, _ in ended] != [143, 143] or max(committed(workdir)) != max(losses(workdir)):
        failures.append(f"peers: SIGTERM: {ended}")
    run = together(workdir, 2, 2, train__num_steps=max(committed(workdir)) + 10)
    ended = [finish(process) for process in run]
    if [code for code, _ in ended] != [0, 0]:
        failures.append(f"peers: restarted: {ended}")
    unshared = [finish(process) for process in together([fresh("mine"), fresh("yours")], 2, 1)]
    counts["exit codes of two with a workdir each"] = [code for code, _ in unshared]
    if any(code != 1 or "the processes were started differently (--workdir: " not in o for code, o in unshared):
        failures.append(f"peers: workdirs that are not the same: {unshared}")
    for key, values in {"train.num_steps": (20, 30), "train.learning_rate": (1e-3, 2e-3), "seed": (0, 1)}.items():
        extra = [[f"--config.{key}={value}"] for value in values]
        ended = [finish(process, timeout=120) for process in together(fresh("unlike"), 2, 1, own=extra)]
        if any(code != 1 or f"started differently ({key}: " not in output for code, output in ended):
            failures.append(f"peers: another {key} in process 1: {ended}")
        counts[f"exit codes of two with another {key}"] = [code for code, _ in ended]
    expected, actual = losses(baseline()), losses(workdir)
    counts["largest difference of a loss"] = max(abs(actual[step]["loss"] - expected[step]["loss"]) for step in actual)
    return counts


# ---------------------------------------------------------------- restarts, names, two at once


def restarts(failures):
    """Stops a run where a grid or a line is due, and in the middle of an interval, and compares all that it leaves."""
    own = {"train__num_steps": 30, "train__log_every": 7, "train__sample_every": 5}
    whole, workdir = baseline(**own), fresh("restarted")
    for step in (5, 7, 10, 12, 21):
        stop = f"hosts.StopSignals.agreed = lambda self, manager, step: 15 if step == {step} else None"
        code, output = finish(start(workdir, code=f"from diffusion_jax.running import hosts; {stop}", **own))
        if code != 143 or f"stopped by a signal after step {step}" not in output:
            failures.append(f"restarts: stop at {step}: {code}, {output[-300:]}")
    finish(start(workdir, train__num_steps=26, **{k: v for k, v in own.items() if k != "train__num_steps"}))
    code, output = finish(start(workdir, **own))
    grids = {path.name: path.read_bytes() for path in (whole / "samples").iterdir()}
    others = {path.name: path.read_bytes() for path in (workdir / "samples").iterdir() if path.name != "26.png"}
    if code != 0 or whole_state(workdir) != whole_state(whole):
        failures.append(f"restarts: the final state differs: {code}, {output[-300:]}")
    if losses(workdir) != losses(whole) or others != grids:
        failures.append(f"restarts: lines {losses(workdir).keys()}, grids {others.keys()}")
    return {"stops": 6, "lines": len(losses(whole)), "grids": len(grids)}


def names(failures):
    """Trains, resumes and samples in folders with odd names; others are refused before training."""
    counts, short = {"work": 0, "refused": 0}, {"train__num_steps": 10}
    for name in ("run#2", "100%25", "a b", "~", "ü字", "a\nb", "..", "t_[br]", "a*", "a?b", "back\\slash"):
        workdir = fresh("names") / (f"x/{name}/y" if name == ".." else name)
        code, output = finish(start(workdir, **short))
        if code == 1 and "where checkpoints cannot be written" in output and not committed(workdir):
            counts["refused"] += 1
            continue
        resumed = finish(start(workdir, train__num_steps=15))
        drawn = finish(start(workdir, args=["--mode=sample", "--num=2", f"--out={WORKDIR.value}/x.npz"]))
        if (code, resumed[0], drawn[0]) != (0, 0, 0) or "from step 10" not in resumed[1]:
            failures.append(f"names: {name!r}: {output[-200:]} {resumed[1][-200:]} {drawn[1][-200:]}")
        counts["work"] += 1
    return counts


def pairs(failures):
    """Starts two trainings in one workdir and two preparations of one cache, and kills one of each."""
    steps = {"train__num_steps": 60}
    whole, workdir = baseline(**steps), fresh("two")
    ended = sorted(finish(process) for process in [start(workdir, **steps), start(workdir, **steps)])
    if [code for code, _ in ended] != [0, 1] or "is in use by a training in process" not in ended[1][1]:
        failures.append(f"pairs: two trainings: {ended}")
    if whole_state(workdir) != whole_state(whole) or losses(workdir) != losses(whole):
        failures.append("pairs: the training that went on was disturbed")
    killed = start(fresh("killed-holder"), **steps)
    while not in_flight(workdir.with_name("killed-holder")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    finish(killed)
    code, output = finish(start(workdir.with_name("killed-holder"), **steps))
    if code != 0:
        failures.append(f"pairs: a killed training blocks the next: {output[-300:]}")
    command = [sys.executable, "main.py", "--mode=prepare", "--config=configs/tiny.py"]
    command += [f"--config.data.cache_dir={fresh('cache')}", f"--out={fresh('prepared.png')}"]

    def prepare():
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    first, second = prepare(), prepare()
    time.sleep(3)
    first.kill()
    finish(first)
    codes = [finish(second)[0], finish(prepare())[0]]
    if codes != [0, 0]:
        failures.append(f"pairs: preparations beside a killed one end with {codes}")
    return {"trainings": [code for code, _ in ended], "preparations": codes}


SECTIONS = {
    section.__name__: section for section in (kills, mutants, damage, disk, devices, peers, restarts, names, pairs)
}


def main(_):
    failures = []
    logging.set_verbosity(logging.ERROR)
    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    if any(workdir.iterdir()):  # runs of another version or with other flags would be taken for undisturbed ones
        sys.exit(f"--workdir={workdir} is not empty: give a new folder")
    print(f"jax {jax.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}", flush=True)
    for name in ONLY.value or SECTIONS:
        start = time.monotonic()
        counts = SECTIONS[name](failures)
        print(f"{name} ({time.monotonic() - start:.0f} s): {counts}", flush=True)
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(len(failures) > 0)


if __name__ == "__main__":
    app.run(main)
