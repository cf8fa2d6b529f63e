import pytest
from conftest import tiny_config

from configs import celeba, celebahq256, cifar10, digits, lsun
from diffusion_jax import audit

GOLDEN = {
    "parameters": 35_746_307,
    "channels of the levels": [1, 2, 2, 2],
    "heights of the levels with attention": [16],
    "attention blocks (down, middle, up)": [2, 1, 3],
    "groups of GroupNorm": [32],
    "initial weights of conv_out nearly 0": True,
    "T": 1000,
    "beta² of the first step": 1e-4,
    "beta² of the last step": 0.02,
    "alpha_bar of the last step": 0.006353,
    "beta² linear in t": True,
    "sigma": "beta",
    "EMA decay": 0.9999,
    "warm-up, steps": 5000,
    "batch size": 128,
}


def test_golden_numbers_of_cifar10():
    found = audit.settings(cifar10.get_config())
    assert {name: found[name] for name in GOLDEN} == GOLDEN


@pytest.mark.parametrize("config", [cifar10, celebahq256, lsun])
def test_the_papers_configurations_do_not_depart(config, capsys):
    rows = audit.audit(config.get_config())
    assert [name for name, _, _, agree in rows if not agree] == []
    assert f"0 of {len(rows)} settings depart" in capsys.readouterr().out


def test_every_departure_is_told(tmp_path, capsys):
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
    # Of the changed keys each shows once or more, and the schedule, the attention and the parameters in others.
    names = {"parameters", "dropout", "prediction", "dtype of the computation", "sigma", "loss", "EMA decay"}
    names |= {"clip of the predicted x_0 when sampling", "Adam's learning rate", "warm-up, steps", "batch size"}
    names |= {"largest norm of the gradient", "training steps", "random flips"}
    assert names <= departs.keys()
    assert "alpha_bar of the last step" in departs
    text = (tmp_path / "audit.md").read_text()
    assert text.count("**departs**") == len(departs)
    assert f"{len(departs)} of {len(rows)} settings depart" in text
    assert text.strip() in capsys.readouterr().out


def test_other_sizes_are_held_against_the_nearer_one(capsys):
    for config, size in ((digits.get_config(), 32), (celeba.get_config(), 32), (tiny_config(), 32)):
        audit.audit(config)
        assert f"{size}×{size}" in capsys.readouterr().out
