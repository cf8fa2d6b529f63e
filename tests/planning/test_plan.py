import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_model, tiny_config

from diffusion_jax import parts
from diffusion_jax.errors import UserError
from diffusion_jax.planning import plan, programs, table
from diffusion_jax.planning.prices import Price
from diffusion_jax.running import dispatch

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu")
OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (17.91G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org/xla/errors"
)
LOCKED = 'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'
PRICE = Price(on_demand=2.0, spot=0.5, region="here", read="2026-11-27", source="a page")
CHIP = programs.Chip(flops=100e12, hbm=16 * 2**30, bandwidth=1e12, links=100e9, pod=256)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "COMPILED", tmp_path / "plans")


def test_estimate_of_the_largest_batch():
    memory = {"arguments": 2**29, "code": 2**29, "peak": 2**30 + 16 * 2**20}
    assert plan._estimate_batch(memory, 16, CHIP) == 15 * 1024  # 1 MiB an image


@pytest.mark.parametrize(
    "largest, limit, fits, fails",
    [(64, 4096, 64, 128), (100, 4096, 64, 128), (16, 4096, 16, 32), (10**9, 256, 256, None)],
)
def test_largest_power_of_2(largest, limit, fits, fails):
    tried = []
    result = plan.largest_power_of_2(lambda n: not tried.append(n) and n <= largest, 16, limit)
    assert result == {"fits": fits, "fails": fails}
    assert len(set(tried)) == len(tried) and 16 not in tried  # each is a compilation


def test_search_ends_at_the_deadline():
    assert plan.largest_power_of_2(lambda n: True, 16, 4096, lambda: True) == {"fits": 16, "fails": None}
    line = plan._largest_line({"fits": 16, "fails": None}, 8)
    assert "16 (config.train.batch_size=128); 32 were not tried" in line


def test_search_prints_each_try(capsys):
    def compile_with(n):
        if n > 32:
            raise programs.DoesNotFit

    assert plan._search(compile_with, 12) == {"fits": 32, "fails": 64}
    assert "64 images a chip do not fit" in capsys.readouterr().err


# ---------------------------------------------------------------------------- refused plans


@pytest.mark.parametrize(
    "topology", ["", "tpu", "v5e", "v5x:2x4", "v5e:2", "v5e:0x4", "v5e:2x4x", "v5e:2x2x2x2", "CPU"]
)
def test_unknown_topologies_are_refused(topology):
    with pytest.raises(UserError, match=r"give a TPU and its shape, e\.g\. v5e:2x4"):
        plan.plan(tiny_config(), topology)


def test_more_than_a_pod_is_refused():
    with pytest.raises(UserError, match="has 512 chips, but a pod has 256"):
        plan.plan(tiny_config(), "v5e:16x32")


def test_missing_libtpu_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        plan.plan(tiny_config(), "v5e:2x4")


@pytest.mark.parametrize(
    "message, expected", [(LOCKED, "another process uses libtpu"), ("Invalid", "no such topology")]
)
def test_errors_of_libtpu_are_one_line(monkeypatch, message, expected):
    def fail(**_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(plan.topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=expected) as error:
        plan.plan(tiny_config(), "v5e:2x4")
    assert "\n" not in str(error.value)


def test_missing_platform_is_refused():
    if "gpu" in {device.platform for device in jax.devices()}:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--topology=gpu: this machine has none"):
        plan.plan(tiny_config(), "gpu")


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size=6 does not divide among 4 devices: make it a multiple of 4"):
        plan.plan(tiny_config(train__batch_size=6), "cpu")


def test_of_several_topologies_those_that_hold_the_config_are_compared(monkeypatch, tmp_path, capsys):
    device = types.SimpleNamespace(device_kind="a device")
    monkeypatch.setattr(plan, "_devices", lambda name: ([device] * (8 if name == "many" else 2), None))
    monkeypatch.setattr(plan, "lower_train_step", lambda *_: None)
    monkeypatch.setattr(plan, "lower_chain", lambda *_: None)
    measured = {"per_chip": {"flops": 1.0}, "roofline": None, "memory": {}}
    monkeypatch.setattr(plan, "_measure", lambda *_: dict(measured))
    monkeypatch.setattr(plan, "table", lambda report: f"the table of {report['topology']}")
    reports = plan.plan(tiny_config(train__batch_size=4), "two,many,2", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == reports
    assert [report["topology"] for report in reports] == ["two", "many", "2"] and "train" in reports[2]
    printed = capsys.readouterr().out
    assert "the table of two" in printed and "many: config.train.batch_size=4 does not divide among 8" in printed


class Overfull:
    def __init__(self, message):
        self.message = message

    def as_text(self):
        return self.message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize("dtype, hint", [("float32", True), ("bfloat16", False)])
def test_config_that_does_not_fit_is_refused_with_the_remedies(monkeypatch, dtype, hint):
    monkeypatch.setattr(plan, "lower_train_step", lambda *_: Overfull(OUT_OF_MEMORY))
    with pytest.raises(UserError) as error:
        plan.plan(tiny_config(model__dtype=dtype), "cpu")
    message = str(error.value)
    assert message.startswith("config.train.batch_size=8 does not fit into a chip of cpu")
    assert "(the total memory required for HLO temporaries (17.91G) exceeds available HBM (15.75G)): set " in message
    assert "\n" not in message
    assert "lower config.train.batch_size" in message
    assert "config.train.remat=True, config.train.accumulate=2" in message
    assert ("config.model.dtype=bfloat16" in message) == hint


def test_samples_that_do_not_fit_are_refused_with_their_key(monkeypatch):
    monkeypatch.setattr(plan, "lower_train_step", lambda *_: jax.jit(lambda x: x + 1).lower(1.0))
    monkeypatch.setattr(plan, "lower_chain", lambda *_: Overfull(OUT_OF_MEMORY))
    with pytest.raises(UserError, match=r"config.sampling.num=4 \(1 a chip\) does not fit .*: lower it"):
        plan.plan(tiny_config(), "cpu")


# ---------------------------------------------------------------------------- the programs, on CPU


@pytest.mark.slow
def test_plan_of_the_cpu(tmp_path, capsys):
    config = tiny_config()
    report = plan.plan(config, "cpu", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == report
    assert report["devices"] == report["chips"] == 4 and report["chip"] is None and report["parameters"] == 6_937
    assert report["growth"] is report["price"] is report["train"]["dollars"] is None
    for name, images, steps in (("train", 2, 1), ("sampling", 1, 20)):
        part = report[name]
        assert part["images_per_chip"] == images and part["steps_per_image"] == steps
        assert part["flops_per_image"] == part["per_chip"]["flops"] * steps / images > 0
        assert part["per_chip"]["hbm_bytes"] > 0 and part["compile_seconds"] > 0
        assert part["memory"]["peak"] >= part["memory"]["arguments"] > 4 * 6_937
        assert part["roofline"] is part["hours"] is part["optimal_seconds"] is None
    assert report["train"]["num_steps"] == 6
    assert report["sampling"]["num_steps"] == 20 * 12_500
    # Training sends the gradient and a few losses. Sampling sends nothing.
    assert report["train"]["collectives"]["all-reduce"]["bytes"] == pytest.approx(4 * 6_937, rel=0.02)
    assert report["sampling"]["collectives"] == {}
    assert report["largest_batch_per_chip"] == {"estimate": None}
    printed = capsys.readouterr().out
    assert "6,937 parameters" in printed and "No times" in printed and "estimate" not in printed


def test_table_marks_every_estimate():
    program = {
        "per_chip": {"flops": 2e12, "hbm_bytes": 10e9, "link_bytes": 1e9},
        "memory": dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code", "peak"), 2**30),
        "collectives": {"all-reduce": {"count": 3, "bytes": 2**20}},
        "roofline": programs.roofline(CHIP, 2e12, 10e9, 1e9),
        "optimal_seconds": None,
        "compile_seconds": 1.0,
    }
    report = {
        "topology": "v5e:2x4",
        "device": "TPU v5 lite",
        "devices": 8,
        "chips": 8,
        "chip": CHIP._asdict(),
        "price": PRICE._asdict(),
        "dtype": "bfloat16",
        "parameters": 35_746_307,
        "train": program | plan._totals(program, 16, 8, PRICE, 1, 800_000),
        "sampling": program | plan._totals(program, 8, 8, PRICE, 1000, 782_000),
        "largest_batch_per_chip": {"estimate": 1000},
    }
    assert report["train"]["hours"] == pytest.approx(0.03 * 800_000 / 3600)
    assert report["train"]["chip_hours"] == pytest.approx(8 * 0.03 * 800_000 / 3600)
    assert report["train"]["dollars"]["spot"] == pytest.approx(0.5 * 8 * 0.03 * 800_000 / 3600)
    assert report["sampling"]["flops_per_image"] == 2e12 * 1000 / 8
    lines = table.table(report).splitlines()
    timed = [line for line in lines if " ms " in line or "hours" in line or "US$ on demand (" in line]
    assert len(timed) == 7 and all("estimate" in line for line in timed)
    assert any("107 (26.7)" in line for line in lines if "US$" in line)
    assert any("128 (16)" in line and "64 (8)" in line for line in lines)
    assert any("1 GiB, 6.2% of the HBM" in line for line in lines)
    assert any("3 all-reduce of 1 MiB" in line for line in lines)
    assert "about 1,000 images" in lines[-2]
    assert lines[-1].startswith("Prices: 2 US$ for a chip and hour on demand, 0.5 as spot, in here, read on 2026-11-27")
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert "10 classes, sampled with guidance 2\n" in table.table(report | {"classes": 10, "guidance": 2.0})
    assert "no price for this chip" in table.table(report | {"price": None})
    refused = {"topology": "v5e:16x16", "refused": "the batch does not divide"}
    lines = table.comparison([report, refused]).splitlines()
    assert any(re.match(r"\| v5e:2x4 +\| 8 +\| 16 .* 30 ms +\| 33% .* 107 +\| 26.7 +\|", line) for line in lines), lines
    assert lines[-1] == "v5e:16x16: the batch does not divide"


@pytest.mark.slow
def test_planned_step_equals_that_of_training(monkeypatch):
    """With a network that compiles quickly: the plan knows its interface alone."""
    monkeypatch.setattr(parts, "model", small_model)
    config = tiny_config()
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    indices = np.arange(8, dtype=np.int32)
    train_step = dispatch.pmapped(parts.train_step(config))
    state = parts.build(config).init_state()
    batch = {"image": image.reshape(4, 2, 8, 8, 1)}
    expected, metrics = train_step(dispatch.replicate(state), (batch, indices.reshape(4, 2)))
    compiled = plan.lower_train_step(config, jax.devices(), 2).compile()
    actual, planned = compiled(*jax.device_put((state, {"image": image}, indices), compiled.input_shardings[0]))
    np.testing.assert_allclose(planned["loss"], metrics["loss"][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual.params, expected.params)


@pytest.mark.slow
def test_planned_chain_equals_that_of_sampling():
    config = tiny_config()
    params = parts.build(config).init_state().params
    expected = parts.build(config).sample_fn()(params, jax.random.key(3))
    compiled = plan.lower_chain(config, jax.devices(), 1).compile()
    s, sigma = jax.tree.map(jnp.asarray, (parts.schedule(config), parts.sigma(config)))
    args = (params, jax.random.key(3), np.arange(4, dtype=np.int32), s, sigma)
    actual = compiled(*jax.device_put(args, compiled.input_shardings[0]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_planned_programs_of_a_run_with_classes():
    """A step of a guided chain computes twice the images; a train step reads labels."""
    device, flops = jax.devices()[:1], {}
    for guidance in (0.0, 1.0, 2.0):
        config = tiny_config(model__num_classes=10, sampling__guidance=guidance)
        flops[guidance] = plan.lower_chain(config, device, 2).compile().cost_analysis()["flops"]
    assert flops[0.0] == pytest.approx(flops[1.0], rel=0.01) and flops[2.0] == pytest.approx(2 * flops[1.0], rel=0.05)
    state, batch, _ = plan.lower_train_step(config, device, 2).in_avals[0]
    assert batch["label"].shape == (2,) and state.params["class_embedding"]["embedding"].shape[0] == 11


@pytest.mark.slow
@pytest.mark.parametrize("size, bounds, dtype", [((16,), (-1.0, 1.0), "float32"), ((4, 4, 4), (), "uint8")])
def test_planned_programs_of_signals_and_volumes(size, bounds, dtype):
    """A train step reads arrays of other numbers than uint8 as float32."""
    config, device = tiny_config(data__image_size=size, data__range=bounds, data__channels=2), jax.devices()[:1]
    image = plan.lower_train_step(config, device, 2).in_avals[0][1]["image"]
    assert (image.shape, image.dtype) == ((2, *size, 2), dtype)
    assert plan.lower_chain(config, device, 2).out_info.shape == (2, *size, 2)


@pytest.mark.slow
def test_planned_chain_with_classes_equals_that_of_sampling():
    config = tiny_config(model__num_classes=10, sampling__guidance=2.0)
    shapes, rng = parts.abstract_state(config).params, np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    expected = parts.build(config).sample_fn()(params, jax.random.key(3), labels=[7, 1, 10, 7])
    compiled = plan.lower_chain(config, jax.devices(), 1).compile()
    s, sigma = jax.tree.map(jnp.asarray, (parts.schedule(config), parts.sigma(config)))
    args = (params, jax.random.key(3), np.arange(4, dtype=np.int32), s, sigma, np.array([7, 1, 10, 7], np.int32))
    actual = compiled(*jax.device_put(args, compiled.input_shardings[0]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_program_of_the_chain_does_not_grow_with_its_steps():
    devices = jax.devices()[:1]
    short, long = (plan.lower_chain(tiny_config(schedule__num_steps=steps), devices, 1) for steps in (10, 1000))
    assert short.as_text().count("\n") == long.as_text().count("\n") > 100


# ---------------------------------------------------------------------------- the TPU's compiler


@needs_libtpu
@pytest.mark.slow
def test_plan_of_a_tpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "LARGEST", 4)
    report = plan.plan(tiny_config(model__dtype="bfloat16"), "v5e:2x4", str(tmp_path / "plan.json"))
    assert json.loads((tmp_path / "plan.json").read_text()) == report
    assert report["device"] == "TPU v5 lite" and report["chips"] == 8
    for name in ("train", "sampling"):
        part = report[name]
        assert part["per_chip"]["flops"] > 0 and part["memory"]["code"] > 0
        assert 0 < part["memory"]["peak"] < programs.CHIPS["v5e"].hbm
        assert part["roofline"]["seconds"] > 0 and part["per_chip"]["hbm_bytes"] > 0
        assert part["chip_hours"] == pytest.approx(8 * part["hours"])
        assert part["dollars"]["on_demand"] == pytest.approx(1.2 * part["chip_hours"])
    assert [size["devices"] for size in report["growth"]] == [1, 2, 4, 8]
    # The step that was compiled, and the same step by the formula for its number of chips.
    assert report["growth"][-1]["seconds"] == pytest.approx(report["train"]["roofline"]["seconds"], rel=0.02)
    assert report["train"]["collectives"]["all-reduce"]["bytes"] == pytest.approx(4 * 6_937, rel=0.02)
    assert report["sampling"]["collectives"] == {}
    assert report["largest_batch_per_chip"]["fits"] == 4 and report["largest_batch_per_chip"]["estimate"] > 100
    assert "Largest power of two found to fit" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("size", [(16,), (4, 4, 4)])
def test_chains_of_signals_and_volumes_compile_for_a_tpu(size):
    config = tiny_config(data__image_size=size)
    devices, chip = plan._devices("v5e:2x2")
    needs = plan._measure("v5e:2x2", plan.lower_chain(config, devices, 1), chip, 4, 20, 20)
    assert needs["per_chip"]["flops"] > 0 and needs["memory"]["code"] > 0 and needs["collectives"] == {}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, chips",
    [("v4:2x2x1", 4), ("v5e:1x1", 1), ("v5e:16x16", 256), ("v5p:4x4x4", 64), ("v6e:2x4", 8), ("tpu7x:2x2x1", 4)],
)
def test_devices_of_a_chip(topology, chips):
    devices, chip = plan._devices(topology)
    assert len(devices) == chips * chip.devices and programs.chip_of(devices[0]) == chip


@needs_libtpu
@pytest.mark.slow
def test_shapes_unknown_to_libtpu_are_refused():
    with pytest.raises(UserError, match="libtpu has no such topology"):
        plan.plan(tiny_config(), "v5e:3x5")


@needs_libtpu
@pytest.mark.slow
def test_program_too_large_for_the_chip_raises():
    sharding = jax.sharding.SingleDeviceSharding(plan._devices("v5e:1x1")[0][0])
    x = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32, sharding=sharding)
    with pytest.raises(programs.DoesNotFit, match="exceeds available HBM"):
        programs.compiled(jax.jit(lambda x: x + 1).lower(x))
