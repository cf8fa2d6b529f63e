import json
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from conftest import assert_same, tiny_config, write_random_run
from etils import epath
from safetensors import numpy as safetensors

import diffusion_jax
from diffusion_jax import parts, sample, schedule, train
from diffusion_jax.configs import cifar10, default
from diffusion_jax.errors import UserError
from diffusion_jax.interop import diffusers
from diffusion_jax.running import checkpoint
from diffusion_jax.running import config as configs
from diffusion_jax.running import workdir as workdirs
from tools import pretrained_fixture
from tools.pretrained_fixture import FOLDER

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
CIFAR10 = {  # google/ddpm-cifar10-32's config.json, as of diffusers 0.0.4
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def load(folder):
    return safetensors.load_file(pathlib.Path(folder) / "unet" / WEIGHTS)


def save(folder, tensors):
    safetensors.save_file(tensors, pathlib.Path(folder) / "unet" / WEIGHTS)


def update(file, **keys):
    """Sets keys of a JSON file; the value ... removes a key."""
    content = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def without_dropout():
    """Returns the reference of the fixture, whose dropout was 0."""
    config = default.get_config()
    config.model.dropout = 0.0
    return config


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    diffusers.import_diffusers(str(FOLDER), str(workdir), without_dropout())
    return workdir


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Writes a run of configs/tiny.py with a random checkpoint."""
    workdir = tmp_path_factory.mktemp("untrained")
    write_random_run(workdir, train__num_steps=2)
    return workdir


def restore(workdir, config):
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        return checkpoint.restore(manager, parts.abstract_state(config))


@pytest.fixture
def source(tmp_path):
    """Copies the fixture, for changes."""
    return shutil.copytree(FOLDER, tmp_path / "source")


def to_params(imported, source):
    return diffusers._to_params(workdirs.read_config(imported), epath.Path(source) / "unet" / WEIGHTS)


def error(source, tmp_path, reference=None):
    """Returns the message of the import's error, and asserts that nothing is left behind."""
    workdir = tmp_path / "refused"
    with pytest.raises(UserError) as raised:
        diffusers.import_diffusers(str(source), str(workdir), reference or default.get_config())
    assert "\n" not in str(raised.value) and not [path for path in tmp_path.iterdir() if "refused" in path.name]
    return str(raised.value)


# ---------------------------------------------------------------- against diffusers


@pytest.mark.slow
@pytest.mark.parametrize("outputs, scale, atol", [("unit", 1, 1e-5), ("low", pretrained_fixture.LOW_CONTRAST, 1e-4)])
def test_network_equals_diffusers(imported, outputs, scale, atol):
    apply_fn, params, _ = diffusion_jax.load_network(imported)
    with np.load(FOLDER / "outputs.npz") as file:
        x, t, expected = file["x"], file["t"], file[outputs]
    actual = jax.jit(apply_fn)({"params": params}, np.float32(scale) * x, t)
    assert expected.std() > 0.1 and list(t) == [1, 500, 1000]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def classes(source):
    """Adds four class embeddings to the copy of the fixture; returns them, the labels and diffusers' outputs."""
    with np.load(FOLDER / "classes.npz") as file:
        arrays = {name: file[name] for name in ("embedding", "labels", "unit")}
    save(source, load(source) | {"class_embedding.weight": arrays["embedding"]})
    update(source / "unet/config.json", num_class_embeds=4)
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [3, 4])
def test_network_with_classes_equals_diffusers(imported, source, classes, tmp_path, num_classes, capsys):
    """The reference says whether the last of four embeddings is ∅. One that the file lacks is of zeros."""
    reference = without_dropout()
    reference.model.num_classes, reference.sampling.guidance = num_classes, 2.0
    diffusers.import_diffusers(str(source), str(tmp_path / "run"), reference)
    config = workdirs.read_config(tmp_path / "run")
    assert config.model.num_classes == num_classes and config.sampling.guidance == (2.0 if num_classes == 3 else 1.0)
    assert ("p(x) is untrained" in capsys.readouterr().out) == (num_classes == 4)
    apply_fn, params, _ = diffusion_jax.load_network(tmp_path / "run")
    with np.load(FOLDER / "outputs.npz") as file:
        x, t, plain = file["x"], file["t"], file["unit"]
    actual = jax.jit(apply_fn)({"params": params}, x, t, classes["labels"])
    assert abs(classes["unit"] - plain).max() > 0.05
    np.testing.assert_allclose(actual, classes["unit"], rtol=0, atol=1e-5)
    if num_classes == 4:
        np.testing.assert_allclose(jax.jit(apply_fn)({"params": params}, x, t), plain, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted, exported, num_classes, has_null",
    [(0, None, 4, False), (4, None, 4, False), (3, None, 3, True), (0, 3, 3, True), ("auto", None, 4, False)],
)
def test_number_of_classes_of_an_import(source, classes, wanted, exported, num_classes, has_null):
    """By default all embeddings are classes; our exports say that the last one is not."""
    update(source / "unet/config.json", _num_classes=exported)
    config = tiny_config(model__num_classes=wanted, data__source="files", data__path="", data__classes=("a", "b", "c"))
    assert diffusers._read_unet(config, source / "unet/config.json") == has_null
    assert config.model.num_classes == num_classes
    assert config.data.classes == (("a", "b", "c") if num_classes == 3 and wanted != "auto" else ())
    params = diffusers._to_params(config, epath.Path(source) / "unet" / WEIGHTS, has_null)
    table = params["class_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:4], classes["embedding"])
    assert table.shape == (num_classes + 1, 16) and not table[4:].any()


@pytest.mark.parametrize("num_embeddings, has_null", [(11, True), (10, False)])
def test_auto_is_the_number_of_classes_of_the_images(source, num_embeddings, has_null):
    update(source / "unet/config.json", num_class_embeds=num_embeddings)
    config = tiny_config(model__num_classes="auto")
    assert diffusers._read_unet(config, source / "unet/config.json") == has_null
    assert config.model.num_classes == 10 and config.data.classes == tuple("0123456789")


def test_a_network_without_classes_has_none_whatever_the_reference(source):
    for wanted in (7, "auto"):
        config = tiny_config(model__num_classes=wanted, data__classes=tuple("abcdefg"))
        assert diffusers._read_unet(config, source / "unet/config.json")
        assert config.model.num_classes == 0 and config.data.classes == ()


def test_classes_that_do_not_fit_are_refused(source, classes, tmp_path):
    file = source / "unet/config.json"
    message = error(source, tmp_path, tiny_config(model__num_classes=7))
    assert "num_class_embeds=4, which does not fit config.model.num_classes=7: give 3 if the last embedding" in message
    update(file, _num_classes=3)
    message = error(source, tmp_path, tiny_config(model__num_classes=4))
    assert message.endswith("does not fit config.model.num_classes=4: give 3")
    for number in (4, 0, -1, "3", True):
        update(file, _num_classes=number)
        assert "which must be num_class_embeds - 1, 3" in error(source, tmp_path)
    update(file, num_class_embeds=5, _num_classes=...)
    assert "class_embedding.weight as float32 (4, 16), not float32 (5, 16)" in error(source, tmp_path)
    update(file, num_class_embeds=None)
    assert "1 tensors that are not in this network: class_embedding.weight" in error(source, tmp_path)


@pytest.mark.slow
def test_a_run_with_classes_is_the_same_after_export_and_import(tmp_path, capsys):
    """diffusers reads the export as a network with one embedding more than there are classes."""
    write_random_run(tmp_path / "run", model__num_classes=3)
    diffusers.export_diffusers(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "num_class_embeds=4: 3 classes and, last, no class" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["num_class_embeds"] == 4
    diffusers.import_diffusers(str(tmp_path / "out"), str(tmp_path / "again"), tiny_config())
    before, after = (workdirs.read_config(tmp_path / name) for name in ("run", "again"))
    assert before.to_dict() == after.to_dict() and after.model.num_classes == 3
    assert_same(*(restore(tmp_path / name, before).ema_params for name in ("run", "again")))


@pytest.mark.slow
def test_images_that_are_not_square_keep_their_shape(tmp_path):
    shape = {"data__image_size": (16, 8), "model__multipliers": (1, 2), "model__attention_resolutions": (8,)}
    write_random_run(tmp_path / "run", model__num_res_blocks=1, **shape)
    diffusers.export_diffusers(str(tmp_path / "run"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out/unet/config.json").read_text())
    assert config["sample_size"] == [16, 8]
    assert config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]  # 16 and 8 rows
    diffusers.import_diffusers(str(tmp_path / "out"), str(tmp_path / "again"), tiny_config())
    before, after = (workdirs.read_config(tmp_path / name) for name in ("run", "again"))
    assert before.to_dict() == after.to_dict() and parts.image_shape(after) == (16, 8, 1)
    assert_same(*(restore(tmp_path / name, before).ema_params for name in ("run", "again")))


@pytest.mark.slow
def test_tensors_are_bitwise_equal_after_export_and_import(imported, tmp_path):
    diffusers.export_diffusers(str(imported), str(tmp_path / "out"))
    assert_same(load(tmp_path / "out"), load(FOLDER))
    diffusers.import_diffusers(str(tmp_path / "out"), str(tmp_path / "again"), without_dropout())
    first, again = (
        sample.ema_params(parts.build(workdirs.read_config(workdir)), workdir)[1]
        for workdir in (imported, tmp_path / "again")
    )
    assert_same(first, again)
    assert workdirs.read_config(tmp_path / "again") == workdirs.read_config(imported)


@pytest.mark.slow
def test_exported_configs_equal_those_of_diffusers(imported, tmp_path):
    diffusers.export_diffusers(str(imported), str(tmp_path))
    for name in ("model_index.json", "unet/config.json", SCHEDULER):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, FOLDER))
        assert ours == {key: theirs[key] for key in ours}
        assert all(theirs[key] in (None, "0.42.1") for key in theirs.keys() - ours.keys() if "scheduler" not in name)


@pytest.mark.slow
def test_old_names_of_attention_are_read(imported, source):
    """Files on the hub have these names; a dense weight may be a 1×1 convolution."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load(source).items():
        for new, old_name in old.items():
            if f".{new}." in name:
                name = name.replace(new, old_name)
                tensor = tensor[..., None, None] if tensor.ndim == 2 and new == "to_k" else tensor
        renamed[name] = np.ascontiguousarray(tensor)
    assert sum(".proj_attn." in name for name in renamed) == 2 * 4
    save(source, renamed)
    assert_same(to_params(imported, source), sample.load_network(imported)[1])


@pytest.mark.slow
def test_half_precision_becomes_float32(imported, source):
    save(source, {name: tensor.astype(np.float16) for name, tensor in load(source).items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(to_params(imported, source))} == {np.dtype(np.float32)}


# ---------------------------------------------------------------- the workdir


@pytest.mark.slow
def test_imported_run_samples(imported):
    sample_fn, params = diffusion_jax.load(imported, num=1)
    x = sample_fn(params, jax.random.key(0))
    assert x.shape == (1, 8, 8, 3) and np.isfinite(x).all() and x.std() > 0.01


@pytest.mark.slow
def test_an_imported_run_trains_on(untrained, tmp_path):
    """Exports and imports a run that is grey, has attention only in the middle, and another schedule."""
    diffusers.export_diffusers(str(untrained), str(tmp_path / "out"))
    diffusers.import_diffusers(str(tmp_path / "out"), str(tmp_path / "run"), tiny_config(train__num_steps=2))
    config = workdirs.read_config(untrained)
    assert workdirs.read_config(tmp_path / "run").to_dict() == config.to_dict()
    before, original = (restore(workdir, config) for workdir in (tmp_path / "run", untrained))
    assert_same(before.ema_params, original.ema_params)
    assert_same(before.params, original.ema_params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before.opt_state))
    after = train.train(config, str(tmp_path / "run"))
    assert before.step == 0 and after.step == 2
    changes = jax.tree.map(lambda new, old: abs(new - old).max(), after.params, before.params)
    assert 0 < max(jax.tree.leaves(changes)) < 0.1


def test_config_of_the_published_network(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CIFAR10))
    config = default.get_config()
    diffusers._read_unet(config, tmp_path / "config.json")
    expected = cifar10.get_config()
    assert config.model == expected.model and config.data.image_size == 32 and config.data.channels == 3
    layout = diffusers._layout(config)
    assert sum(np.prod(shape) for _, shape in layout.values()) == 35_746_307
    assert layout["up_blocks.3.resnets.2.conv_shortcut.weight"] == (
        ("up_0_block_2", "nin_shortcut", "kernel"),
        (256, 128),
    )
    assert layout["down_blocks.1.downsamplers.0.conv.bias"] == (("down_1_downsample", "bias"), (256,))
    assert layout["up_blocks.2.attentions.2.to_out.0.weight"] == (("up_1_attn_2", "proj_out", "kernel"), (256, 256))


def test_a_run_is_not_overwritten(imported):
    with pytest.raises(UserError, match=r"holds a run already.*config\.json"):
        diffusers.import_diffusers(str(FOLDER), str(imported), default.get_config())


@pytest.mark.parametrize(
    "write",
    [pytest.param("write_config", id="import"), pytest.param("_write_json", id="export", marks=pytest.mark.slow)],
)
def test_an_interrupted_import_or_export_leaves_no_part(imported, tmp_path, monkeypatch, write):
    """A killed one leaves a folder with a random name beside, which stands in no one's way."""
    (tmp_path / ".new.0123abcd.partial" / "checkpoints").mkdir(parents=True)
    new = tmp_path / "new"
    new.mkdir()  # an empty folder is a new one

    def command():
        if write == "write_config":
            diffusers.import_diffusers(str(FOLDER), str(new), without_dropout())
        else:
            diffusers.export_diffusers(str(imported), str(new))

    def interrupted(*_):
        assert len(list(tmp_path.iterdir())) == 3 and not any(new.iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(diffusers, write, interrupted)
        with pytest.raises(KeyboardInterrupt):
            command()
    assert len(list(tmp_path.iterdir())) == 2 and not any(new.iterdir())
    command()
    assert len(list(tmp_path.iterdir())) == 2 and any(new.iterdir())


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(tmp_path, imported, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(FOLDER, tmp_path / "source")
    diffusers.import_diffusers("~/source", "~/run", without_dropout())
    diffusers.export_diffusers("~/run", "~/out")
    assert (tmp_path / "run" / "config.json").exists() and (tmp_path / "out" / "model_index.json").exists()


# ---------------------------------------------------------------- sources


def test_source_is_a_folder_a_file_or_a_bare_model(source):
    weights, scheduler = source / "unet" / WEIGHTS, source / SCHEDULER
    assert diffusers._find(str(source)) == diffusers._find(str(weights)) == (weights, scheduler)
    flat = shutil.copytree(source / "unet", source / "flat")
    assert diffusers._find(str(flat)) == (flat / WEIGHTS, None)
    beside = shutil.copy(scheduler, flat)
    assert diffusers._find(str(flat / WEIGHTS)) == (flat / WEIGHTS, epath.Path(beside))


def test_chain_is_that_of_the_reference_without_a_scheduler(source, tmp_path):
    (source / SCHEDULER).unlink()
    reference = tiny_config(data__channels=3, sampling__sigma="posterior", sampling__steps=0)
    diffusers.import_diffusers(str(source), str(tmp_path / "run"), reference)
    config = workdirs.read_config(tmp_path / "run")
    assert config.sampling.sigma == "posterior"
    assert config.sampling.to_dict() == reference.sampling.to_dict()
    assert config.schedule.to_dict() == reference.schedule.to_dict()


def test_a_repository_is_fetched(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(snapshot_download=lambda name, **options: calls.append((name, options)) or str(FOLDER))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert diffusers._find("google/ddpm-cifar10-32")[0] == epath.Path(FOLDER) / "unet" / WEIGHTS
    ((name, options),) = calls
    assert name == "google/ddpm-cifar10-32"
    assert {f"unet/{WEIGHTS}", "config.json", SCHEDULER, "scheduler_config.json"} <= {*options["allow_patterns"]}
    fake.snapshot_download = lambda name, **_: (_ for _ in ()).throw(OSError("no\nnetwork"))
    assert "cannot be fetched from the hub (no network)" in error("google/ddpm-cifar10-32", tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error("google/ddpm-cifar10-32", tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_not_read(source, tmp_path, name):
    pickle = source / "unet" / name
    (source / "unet" / WEIGHTS).rename(pickle)
    for path in (pickle, source):
        message = error(path, tmp_path)
        assert str(path) in message and "pickles, which can run code" in message and "safe_serialization" in message


def test_missing_source_or_config_is_refused(source, tmp_path):
    assert "does not exist" in error("/nowhere/at/all", tmp_path)
    (source / "unet/config.json").write_text("{")
    assert "unet/config.json is not a config of diffusers" in error(source, tmp_path)
    (source / "unet/config.json").write_text("[1]")
    assert "unet/config.json is not a config of diffusers" in error(source, tmp_path)
    (source / "unet/config.json").write_text("[" * 100_000)
    assert "unet/config.json is not a config of diffusers" in error(source, tmp_path)
    (source / "unet/config.json").unlink()
    assert "unet/config.json is not a config of diffusers" in error(source, tmp_path)


# ---------------------------------------------------------------- refused settings


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "UNet2DConditionModel"),
        ("act_fn", "mish"),
        ("act_fn", 3),
        ("add_attention", False),
        ("attention_head_dim", 4),
        ("attention_head_dim", ...),  # diffusers' default, 8, which is another number of heads in another network
        ("attn_norm_num_groups", 4),
        ("block_out_channels", [4, 6, 8]),
        ("block_out_channels", []),
        ("block_out_channels", ["4"]),
        ("block_out_channels", [2**40, 2**41, 2**41]),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("down_block_types", None),
        ("downsample_padding", 1),
        ("downsample_padding", ...),
        ("downsample_type", "resnet"),
        ("dropout", "none"),
        ("dropout", None),
        ("fir", True),
        ("flip_sin_to_cos", True),
        ("flip_sin_to_cos", ...),
        ("freq_shift", 0),
        ("freq_shift", ...),
        ("in_channels", 0),
        ("layers_per_block", 1.5),
        ("layers_per_block", 65),
        ("layers_per_block", 0),  # the channels would not change on the way down
        ("mid_block_scale_factor", 1.4),
        ("mid_block_type", None),
        ("norm_eps", 1e-5),
        ("norm_eps", ...),
        ("norm_num_groups", 8),
        ("num_class_embeds", 0),
        ("num_class_embeds", True),
        ("num_class_embeds", "10"),
        ("num_class_embeds", 2**40),
        ("out_channels", 5),
        ("resnet_time_scale_shift", "scale_shift"),
        ("sample_size", None),
        ("sample_size", [8, 16, 3]),
        ("sample_size", [8, 0]),
        ("sample_size", 2**15),
        ("time_embedding_dim", 32),
        ("time_embedding_type", "fourier"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]),
        ("upsample_type", "resnet"),
    ],
)
def test_another_network_is_refused(source, tmp_path, key, value):
    if key == "attention_head_dim" and value is ...:
        update(source / "unet/config.json", block_out_channels=[4, 4, 8])
    update(source / "unet/config.json", **{key: value})
    message = error(source, tmp_path)
    assert f"unet/config.json has {key}=" in message
    assert value is ... or f"{key}={value!r}" in message


def test_equivalent_settings_are_accepted(imported, source):
    """8 channels in the two places with attention are one head of 8."""
    update(source / "unet/config.json", attention_head_dim=8, sample_size=[8, 8], time_embedding_dim=16, act_fn="swish")
    config = without_dropout()
    diffusers._read_unet(config, source / "unet/config.json")
    expected = configs.flatten(workdirs.read_config(imported))
    assert {key: value for key, value in configs.flatten(config).items() if expected[key] != value} == {}


def test_size_that_cannot_be_halved_is_refused(source, tmp_path):
    update(source / "unet/config.json", sample_size=6)
    assert "config.data.image_size=6" in error(source, tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "PNDMScheduler"),
        ("beta_schedule", "scaled_linear"),
        ("beta_end", 0.01),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [[0.1], 0.2]),
        ("beta_start", None),
        ("variance_type", "learned_range"),
        ("variance_type", "fixed_large_log"),
        ("clip_sample_range", 2.0),
        ("clip_sample", "yes"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", None),
        ("num_train_timesteps", 10**9),
        ("prediction_type", "flow"),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_another_chain_is_refused(source, tmp_path, key, value):
    update(source / SCHEDULER, **{key: value})
    message = error(source, tmp_path)
    if key == "beta_end":
        assert "beta_schedule='linear', which with 1000 steps from 0.0001 to 0.01 is none of" in message
    else:
        assert f"{SCHEDULER} has {key}={value!r}" in message


@pytest.mark.slow
def test_tensors_that_do_not_match_are_named(source, tmp_path):
    tensors = load(source)
    name = "up_blocks.1.resnets.0.conv_shortcut.weight"

    def message(changed):
        save(source, changed)
        return error(source, tmp_path)

    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    assert f"lacks the tensor {name}, (8, 16, 1, 1)" in message(missing)
    assert f"has {name} as float32 (8, 15, 1, 1), not float32 (8, 16, 1, 1)" in message(
        tensors | {name: np.zeros((8, 15, 1, 1), np.float32)}
    )
    assert f"has {name} as int32" in message(tensors | {name: np.zeros((8, 16, 1, 1), np.int32)})
    extra = {f"extra.{i}": np.zeros(1, np.float32) for i in range(7)}
    assert "7 tensors that are not in this network: extra.0, extra.1, extra.2, extra.3, extra.4, …" in message(
        tensors | extra
    )


@pytest.mark.parametrize(
    "dtype, value", [(np.float32, np.nan), (np.float32, -np.inf), (np.float16, np.nan), (np.float64, 1e39)]
)
def test_weights_that_are_not_finite_are_named(source, tmp_path, dtype, value):
    tensors, name = load(source), "mid_block.attentions.0.to_q.weight"
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][3, 2] = value
    save(source, tensors)
    assert f"{WEIGHTS} has {name} with values that are not finite" in error(source, tmp_path)


def test_damaged_or_unknown_weights_are_refused(source, tmp_path):
    file = source / "unet" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert f"{file} cannot be read, or is damaged" in error(source, tmp_path)
    header = content.replace(b'"F32","shape":[4]', b'"BF16","shape":[8]')
    assert header != content and len(header) == len(content) + content.count(b'"F32","shape":[4]')
    size = int.from_bytes(header[:8], "little") + content.count(b'"F32","shape":[4]')
    file.write_bytes(size.to_bytes(8, "little") + header[8:])
    assert f"{file} has tensors of type 'BF16': convert them to float32" in error(source, tmp_path)


# ---------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    "variance, sigma", [("fixed_small", "posterior"), ("fixed_small_log", "posterior"), ("fixed_large", "beta")]
)
@pytest.mark.parametrize("prediction, ours", [("epsilon", "eps_bar"), ("sample", "x_0"), ("v_prediction", "velocity")])
def test_config_of_a_scheduler(source, variance, sigma, prediction, ours):
    update(
        source / SCHEDULER, variance_type=variance, prediction_type=prediction, clip_sample=False, clip_sample_range=9.0
    )
    config = default.get_config()
    config.sampling.update({"sampler": "ddim", "steps": 7, "guidance": 2.0, "grid": "quadratic"})
    diffusers._read_scheduler(config, source / SCHEDULER)
    assert config.sampling.to_dict() | {"num": 0, "eta": 0} == {
        **{"sampler": "ancestral", "steps": 0, "sigma": sigma, "clip": False, "num": 0, "eta": 0},
        **{"guidance": 2.0, "guidance_interval": (), "grid": "default"},
    }
    assert config.model.prediction == ours


@pytest.mark.parametrize(
    "keys, name, num_steps",
    [
        ({}, "ho_linear", 1000),
        ({"num_train_timesteps": 50}, "ho_linear", 50),
        ({"beta_start": 0.02 / 1000}, "su_linear", 1000),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 30}, "cosine", 30),
        ({"trained_betas": np.linspace(1e-4, 0.02, 1000, dtype=np.float32).tolist()}, "ho_linear", 1000),
    ],
)
def test_schedules_are_recognised_by_their_numbers(source, keys, name, num_steps):
    update(source / SCHEDULER, **keys)
    config = default.get_config()
    diffusers._read_scheduler(config, source / SCHEDULER)
    assert (config.schedule.name, config.schedule.num_steps) == (name, num_steps)


@pytest.mark.parametrize("name", ["ho_linear", "su_linear", "cosine"])
@pytest.mark.parametrize("sigma, prediction, clip", [("beta", "velocity", False), ("posterior", "x_0", True)])
def test_chain_is_the_same_after_export_and_import(tmp_path, name, sigma, prediction, clip):
    changes = {"sampling__sigma": sigma, "sampling__clip": clip, "model__prediction": prediction}
    config = tiny_config(schedule__name=name, schedule__num_steps=25, **changes)
    exported = diffusers._scheduler_config(config)
    (tmp_path / "scheduler.json").write_text(json.dumps(exported))
    back = default.get_config()
    diffusers._read_scheduler(back, tmp_path / "scheduler.json")
    for key in ("schedule.name", "schedule.num_steps", "sampling.sigma", "sampling.clip", "model.prediction"):
        assert configs.flatten(back)[key] == configs.flatten(config)[key]
    betas = exported["trained_betas"]
    if name == "ho_linear":
        assert betas is None and (exported["beta_start"], exported["beta_end"]) == (1e-4, 0.02)
    else:
        alpha_bar = np.sqrt(np.cumprod(1 - np.array(betas)))
        np.testing.assert_allclose(alpha_bar, parts.schedule(config).alpha_bar[1:], rtol=1e-4)
        assert len(betas) == 25


# ---------------------------------------------------------------- exports


@pytest.mark.slow
def test_averaged_parameters_are_exported(untrained, tmp_path):
    diffusers.export_diffusers(str(untrained), str(tmp_path))
    start = restore(untrained, workdirs.read_config(untrained))
    kernel = load(tmp_path)["mid_block.attentions.0.to_q.weight"].T
    np.testing.assert_array_equal(kernel, start.ema_params["mid_attn_1"]["q"]["kernel"])
    assert np.any(kernel != start.params["mid_attn_1"]["q"]["kernel"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("sampling.sigma", "zero"),
        ("model.multipliers", (2, 2)),
        ("model.num_res_blocks", 0),
        ("model.num_groups", 6),
        ("data.image_size", (8,)),
        ("data.image_size", (8, 8, 8)),
    ],
)
def test_runs_without_a_diffusers_counterpart_are_refused(untrained, tmp_path, key, value):
    shutil.copytree(untrained, tmp_path / "run")
    changes = {"model__multipliers": (1, 3), "model__num_res_blocks": 1, key.replace(".", "__"): value}
    config = tiny_config(**changes)
    workdirs.write_config(tmp_path / "run", config)
    with pytest.raises(UserError, match=f"config.{key}="):
        diffusers.export_diffusers(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_number_of_steps_is_printed_unless_it_is_the_pipelines(untrained, imported, tmp_path, capsys):
    diffusers.export_diffusers(str(untrained), str(tmp_path / "20"))
    assert "call it with num_inference_steps=20\n" in capsys.readouterr().out
    diffusers.export_diffusers(str(imported), str(tmp_path / "1000"))
    assert "num_inference_steps" not in capsys.readouterr().out


def test_groups_that_all_layers_share_are_exported():
    """Every layer of 16 and 48 channels has 16 groups; every layer of 16 and 32 channels has 8 of 24 groups."""
    config = tiny_config(model__channels=16, model__multipliers=(1, 3), model__num_res_blocks=1, model__num_groups=16)
    assert diffusers._unet_config(config)["norm_num_groups"] == 16
    config.model.update({"multipliers": (1,), "num_groups": 24})  # 16 channels, and 32 where a skip joins
    assert diffusers._unet_config(config)["norm_num_groups"] == 8


@pytest.mark.slow
def test_unusable_folders_are_refused(untrained, tmp_path):
    (tmp_path / "file").write_text("")
    for out, message in (("", "already exists"), ("file", "already exists"), ("file/out", "cannot be written")):
        with pytest.raises(UserError, match=message):
            diffusers.export_diffusers(str(untrained), str(tmp_path / out))
    with pytest.raises(UserError, match="cannot be written"):
        diffusers.import_diffusers(str(FOLDER), str(tmp_path / "file/run"), default.get_config())
    with pytest.raises(UserError, match="holds no run"):
        diffusers.export_diffusers(str(tmp_path), str(tmp_path / "out"))


def test_a_zero_terminal_schedule_is_rescaled_by_diffusers(source):
    """Its betas are those before, and the flag says what becomes of them."""
    update(source / SCHEDULER, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    config = default.get_config()
    diffusers._read_scheduler(config, source / SCHEDULER)
    assert config.schedule.zero_terminal and config.schedule.name == "ho_linear"
    changes = {"schedule__zero_terminal": True, "schedule__log_snr_shift": -1.0, "model__prediction": "velocity"}
    settings = diffusers._scheduler_config(tiny_config(**changes))
    assert settings["rescale_betas_zero_snr"] and settings["prediction_type"] == "v_prediction"
    expected = schedule.shifted(schedule.su_linear(20), -1.0).beta[1:] ** 2
    np.testing.assert_allclose(settings["trained_betas"], expected, rtol=1e-5)
