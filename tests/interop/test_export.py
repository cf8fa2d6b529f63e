import hashlib
import json
import pathlib
import re
import shutil
import site

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, small_model, tiny_config, write_random_run

import diffusion_jax
from diffusion_jax import parts, sample, train
from diffusion_jax.errors import UserError
from diffusion_jax.interop import card, export
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs

pytestmark = pytest.mark.slow

RNG = jax.random.key(3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train(tiny_config(train__num_steps=3), str(workdir))
    export.export_sampler(workdir, str(workdir / "sampler.npz"))
    return workdir


def on_one_device(workdir, num, **settings):
    params = sample.load(workdir)[1]
    live = parts.build(configs.with_sampling(workdirs.read_config(workdir), **settings)).indexed_sample_fn()
    return np.asarray(jax.jit(live)(params, RNG, np.arange(num, dtype=np.int32)))


def test_images_are_bitwise_equal_to_the_runs(run):
    sample_fn, params = diffusion_jax.load_exported(run / "sampler.npz")
    np.testing.assert_array_equal(sample_fn(params, RNG, 5), on_one_device(run, 5))
    pmapped, live_params = sample.load(run, num=4)
    np.testing.assert_allclose(sample_fn(params, RNG, 4), pmapped(live_params, RNG), atol=1e-4)


@pytest.mark.slow
def test_image_i_is_the_same_for_any_number(run):
    sample_fn, params = diffusion_jax.load_exported(run / "sampler.npz")
    many = sample_fn(params, RNG, 6)
    assert many.shape == (6, 8, 8, 1)
    np.testing.assert_allclose(sample_fn(params, RNG, 2), many[:2], atol=1e-4)
    np.testing.assert_allclose(sample_fn(params, RNG, 2, first=3), many[3:5], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"sampler": "ddim", "eta": 0.5}, {"sampler": "dpmpp_2m"}, {"sampler": "dpmpp_2m", "eta": 0.7}], ids=str
)
def test_other_samplers_are_exported(run, settings):
    export.export_sampler(run, str(run / "other.npz"), steps=5, **settings)
    sample_fn, params = diffusion_jax.load_exported(run / "other.npz")
    np.testing.assert_array_equal(sample_fn(params, RNG, 3), on_one_device(run, 3, steps=5, **settings))


@pytest.mark.slow
def test_parameters_are_arguments_of_the_program(run):
    sample_fn, params = diffusion_jax.load_exported(run / "sampler.npz")
    live = sample.load(run)[1]
    assert jax.tree.structure(params) == jax.tree.structure(live)
    jax.tree.map(np.testing.assert_array_equal, params, live)
    other = jax.tree.map(lambda leaf: leaf + 0.1, params)
    assert not np.allclose(sample_fn(params, RNG, 2), sample_fn(other, RNG, 2))


def test_file_describes_itself(run):
    with np.load(run / "sampler.npz", allow_pickle=False) as content:
        assert {"program", "about", "checksum"} < set(content.files)
        assert '"platforms": ["cpu", "cuda", "tpu"]' in str(content["about"])
        assert '"step": 3' in str(content["about"])
        assert "six months" in str(content["about"]) and "--mode=export --from=" in str(content["about"])
        assert len(str(content["checksum"])) == hashlib.sha256().digest_size * 2


def test_lines_of_the_guide_do_not_need_this_package(run, monkeypatch, capsys):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (code,) = re.findall(r"```python\n(import json[^`]*sampler\.npz[^`]*)```", text)
    assert "diffusion_jax" not in code
    monkeypatch.chdir(run)
    names = {}
    exec(code.replace("jax.random.key(0)", "jax.random.key(3)"), names)
    np.testing.assert_array_equal(names["x"], on_one_device(run, len(names["x"])))


def test_missing_damaged_or_newer_file_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        export.load_exported(tmp_path / "nothing.npz")
    raw = bytearray((run / "sampler.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "text.npz").write_text("not an .npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "bare.npz", about=np.array("{}"), checksum=np.array(""))
    for name in ("cut", "text", "empty", "other", "bare"):
        with pytest.raises(UserError, match=rf"{name}\.npz is not an exported sampler, or is damaged"):
            export.load_exported(tmp_path / f"{name}.npz")
    with np.load(run / "sampler.npz") as content:
        arrays = {name: content[name] for name in content.files}
    name = next(name for name in arrays if name.startswith("params/"))
    np.savez(tmp_path / "changed.npz", **arrays | {name: arrays[name] + 1})
    with pytest.raises(UserError, match="checksum is wrong"):
        export.load_exported(tmp_path / "changed.npz")
    del arrays["checksum"]
    arrays["program"] = arrays["program"][:100]
    np.savez(tmp_path / "newer.npz", checksum=np.array(export._checksum(arrays)), **arrays)
    with pytest.raises(UserError, match=r"was written by jax .*cannot read it .*--from=.*newer\.npz"):
        export.load_exported(tmp_path / "newer.npz")


def test_unusable_out_is_refused(run):
    with pytest.raises(UserError, match=r"--out=x\.bin must end in \.npz"):
        export.export_sampler(run, "x.bin")
    with pytest.raises(UserError, match=r"cannot be written"):
        export.export_sampler(run, str(run / "config.json" / "x.npz"))
    (run / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"--out=.*folder\.npz is a folder"):
        export.export_sampler(run, str(run / "folder.npz"))


def test_no_path_of_the_machine_is_in_the_file(tmp_path):
    paths = {"path": "/home/alice/photos", "cache_dir": "/scratch/alice", "manual_dir": "/archive/alice"}
    write_random_run(tmp_path, data__source="files", **{f"data__{key}": path for key, path in paths.items()})
    limit = jax.config.jax_traceback_in_locations_limit
    export.export_sampler(tmp_path, str(tmp_path / "sampler.npz"))
    content = (tmp_path / "sampler.npz").read_bytes()  # np.savez does not compress
    assert b"StableHLO" in content and limit == jax.config.jax_traceback_in_locations_limit
    here = [str(tmp_path), str(pathlib.Path.home()), str(pathlib.Path(diffusion_jax.__file__).parent)]
    for text in [*paths.values(), *here, *site.getsitepackages(), "alice", "site-packages", ".py"]:
        assert text.encode() not in content, text


def test_a_run_with_the_attention_of_cudnn_is_exported(run, tmp_path):
    """This machine has no cuDNN; the file runs on it nevertheless."""
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"attention": "cudnn", "dtype": "bfloat16"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    export.export_sampler(tmp_path / "run", str(tmp_path / "sampler.npz"), sampler="ddim", steps=2)
    sample_fn, params = diffusion_jax.load_exported(tmp_path / "sampler.npz")
    assert np.isfinite(sample_fn(params, RNG, 1)).all()


def test_an_exported_file_is_written_again(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export.export_again(run / "sampler.npz", "~/again.npz")
    (old, old_about), (new, new_about) = (export._read(file) for file in (run / "sampler.npz", "~/again.npz"))
    assert new_about == old_about
    assert_same(*({name: array for name, array in file.items() if name != "program"} for file in (old, new)))
    sample_fn, params = diffusion_jax.load_exported("~/again.npz")
    np.testing.assert_array_equal(sample_fn(params, RNG, 5), on_one_device(run, 5))
    export.export_again("~/again.npz", "~/again.npz", sampler="ddim", steps=5)
    assert export._read("~/again.npz")[1]["config"]["sampling"]["steps"] == 5
    with pytest.raises(UserError, match=r"--from=.*sampling\.steps=21 must be in 1\.\.20"):
        export.export_again("~/again.npz", "~/more.npz", steps=21)
    with pytest.raises(UserError, match="does not exist"):
        export.export_again("~/nothing.npz", "~/more.npz")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("schedule__num_steps", 10**9, r"config\.schedule\.num_steps=1000000000 must be an integer in 1\.\.16,777,216"),
        ("model__channels", 2**40, r"config\.model\.channels=1099511627776 must be an integer in 4\.\."),
        ("model__channels", 16, "holds the parameters of another network than its config describes"),
        ("model__dtype", 3, r"config\.model\.dtype=3 must be"),
    ],
)
def test_a_file_with_another_config_is_not_written_again(run, tmp_path, key, value, message):
    arrays, about = export._read(run / "sampler.npz")
    section, name = key.split("__")
    about["config"][section][name] = value
    arrays["about"] = np.array(json.dumps(about))
    np.savez(tmp_path / "foreign.npz", checksum=np.array(export._checksum(arrays)), **arrays)
    with pytest.raises(UserError, match=message):
        export.export_again(tmp_path / "foreign.npz", str(tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


def test_indices_are_those_of_a_key(run):
    sample_fn, params = diffusion_jax.load_exported(run / "sampler.npz")
    live = parts.build(workdirs.read_config(run)).indexed_sample_fn()
    expected = jax.jit(live)(params, RNG, np.array([2**31 + 1], np.uint32))
    np.testing.assert_array_equal(sample_fn(params, RNG, 1, first=2**31 + 1), expected)
    for num, first in ((0, 0), (1, -1), (2, 2**32 - 1)):
        with pytest.raises(ValueError, match=r"(num|first)=.* must be an integer in"):
            sample_fn(params, RNG, num, first=first)


@pytest.mark.slow
def test_size_hardly_depends_on_the_number_of_steps(tmp_path, monkeypatch):
    """The schedule is the only part of the program that grows."""
    monkeypatch.setattr(parts, "model", small_model)
    sizes = []
    for num_steps in (20, 400):
        config = tiny_config(schedule__num_steps=num_steps)
        params = parts.build(config).init_state().params
        out = tmp_path / f"{num_steps}.npz"
        export.export(config, params, 0, str(out))
        sizes.append(out.stat().st_size)
    assert sizes[1] - sizes[0] < 400 * 4 * 8
    assert jnp.isfinite(export.load_exported(out)[0](params, RNG, 1)).all()


def test_the_model_card(run, tmp_path):
    """It names data, steps and numbers, no folder of this machine, and goes on to a file that is written again."""
    config = workdirs.read_config(run)
    with config.unlocked():
        config.data.source, config.data.path = "files", "/home/me/faces.zip"
    evaluated = tmp_path / "faces" / "evaluation" / "3"
    text = card.model_card(config, tmp_path / "faces", 3, "/home/me/sampler.npz", "jax")
    assert text.startswith("---\nlicense: ") and "faces.zip" in text and "3 steps of 8 images" in text
    assert "/home" not in text and "was not evaluated" in text and 'load_exported("sampler.npz")' in text
    evaluated.mkdir(parents=True)
    result = {"splits": {"train": {"bits_per_dim": 3.25}}, "samples": {"frechet_floor": [1.5, 0.25], "recall": None}}
    (evaluated / "evaluation.json").write_text(json.dumps(result))
    text = card.model_card(config, tmp_path / "faces", 3, "out/", "diffusers")
    assert "| split train | bits_per_dim | 3.25 |" in text and "| samples | frechet_floor | 1.5 ± 0.25 |" in text
    assert "num_inference_steps=20" in text and "recall" not in text
    for damaged in ("[]", "{", '{"splits": 3}', '{"splits": {"a": {"rate": 1, "recall": "x"}}}'):
        (evaluated / "evaluation.json").write_text(damaged)
        assert "was not evaluated" in card.model_card(config, tmp_path / "faces", 3, "out/", "jax")
    beside = (run / "sampler-card.md").read_text()
    assert "3 steps of 8 images" in beside
    export.export_again(run / "sampler.npz", str(tmp_path / "again.npz"))
    assert (tmp_path / "again-card.md").read_text() == beside
