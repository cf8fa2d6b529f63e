import pytest
from conftest import tiny_config

from diffusion_jax.configs import celebahq256, cifar10, lsun
from diffusion_jax.errors import UserError
from diffusion_jax.planning import audit

GOLDEN = {
    "parameters": 35_746_307,
    "channels of the levels": [1, 2, 2, 2],
    "heights of the levels with attention": [16],
    "attention blocks (down, middle, up)": [2, 1, 3],
    "groups of GroupNorm": [32],
    "T": 1000,
    "beta² of the first step": 1e-4,
    "beta² of the last step": 0.02,
    "alpha_bar of the last step": 0.006353,
    "beta² linear in t": True,
    "sigma": "beta",
    "EMA decay": 0.9999,
    "EMA warm-up": False,
    "warm-up, steps": 5000,
    "batch size": 128,
}


GOLDEN_256 = GOLDEN | {
    "parameters": 113_673_219,
    "channels of the levels": [1, 1, 2, 2, 4, 4],
    "attention blocks (down, middle, up)": [2, 1, 3],
    "sigma": "posterior",
    "batch size": 64,
}


@pytest.mark.parametrize(
    "config, golden",
    [
        (cifar10, GOLDEN),
        pytest.param(celebahq256, GOLDEN_256, marks=pytest.mark.slow),
        pytest.param(lsun, GOLDEN_256, marks=pytest.mark.slow),
    ],
)
def test_configs_of_the_paper_do_not_depart(config, golden, capsys):
    rows = audit.audit(config.get_config())
    settings = {name: ours for name, ours, _, _ in rows}
    assert {name: settings[name] for name in golden} == golden
    assert [name for name, _, _, agree in rows if not agree] == []
    assert f"0 of {len(rows)} settings depart" in capsys.readouterr().out


def test_unusable_out_is_refused(tmp_path):
    (tmp_path / "none").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"--out=.*/none/audit\.md cannot be written"):
        audit.audit(tiny_config(), str(tmp_path / "none" / "audit.md"))


@pytest.mark.slow
def test_every_departure_is_marked(tmp_path, capsys):
    config = cifar10.get_config()
    changed = {
        "model.num_res_blocks": 1,
        "model.dropout": 0.2,
        "model.attention_resolutions": (8,),
        "model.prediction": "velocity",
        "model.dtype": "bfloat16",
        "schedule.name": "su_linear",
        "sampling.sigma": "posterior",
        "sampling.clip": False,
        "sampling.sampler": "ddim",
        "sampling.steps": 50,
        "train.loss": "step",
        "train.learning_rate": 1e-4,
        "train.warmup_steps": 0,
        "train.ema_decay": 0.999,
        "train.ema_warmup": True,
        "train.grad_clip": 2.0,
        "train.batch_size": 64,
        "train.num_steps": 1000,
        "data.flip": False,
    }
    config.update_from_flattened_dict(changed)
    rows = audit.audit(config, str(tmp_path / "audit.md"))
    departs = {name: ours for name, ours, _, agree in rows if not agree}
    assert departs["residual blocks per level"] == 1
    assert departs["heights of the levels with attention"] == [8]
    assert departs["attention blocks (down, middle, up)"] == [1, 1, 2]
    assert departs["beta² of the first step"] == 2e-5
    assert departs["sampler"] == "ddim, 50 steps"
    # Each changed key departs in at least one setting; the schedule and the attention depart in several.
    names = {"parameters", "dropout", "prediction", "dtype of the computation", "sigma", "loss", "EMA decay"}
    names |= {"clip of the predicted x_0 when sampling", "Adam's learning rate", "warm-up, steps", "batch size"}
    names |= {"largest norm of the gradient", "training steps", "random flips", "EMA warm-up"}
    assert names <= departs.keys()
    assert "alpha_bar of the last step" in departs
    text = (tmp_path / "audit.md").read_text()
    assert text.count("**departs**") == len(departs)
    assert f"{len(departs)} of {len(rows)} settings depart" in text
    assert text.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_classes_depart_with_their_settings(capsys):
    plain = audit.settings(tiny_config())
    assert plain["classes"] == 0 and "label dropout" not in plain and "guidance" not in plain
    changes = {"sampling__guidance": 2.5, "sampling__guidance_interval": (3, 9), "train__label_dropout": 0.2}
    rows = {row[0]: row[1:] for row in audit.audit(tiny_config(model__num_classes="auto", **changes))}
    assert rows["classes"] == (10, 0, False)
    assert rows["label dropout"] == (0.2, "none", False) and rows["guidance"] == (2.5, "none", False)
    assert rows["steps t with guidance"] == ("3..9", "none", False)
    assert rows["parameters"][0] == plain["parameters"] + 11 * 4 * tiny_config().model.channels
    assert "| guidance " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ours, theirs", [(28, 32), (96, 32), (128, 256)])
def test_other_sizes_are_compared_with_the_nearer_one(ours, theirs, capsys):
    audit.audit(tiny_config(data__image_size=ours))
    assert f"{theirs}×{theirs}" in capsys.readouterr().out
