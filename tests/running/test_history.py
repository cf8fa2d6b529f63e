"""The identity of a run and the configs that trained it."""

import json

import pytest
from conftest import tiny_config
from etils import epath

from diffusion_jax.errors import UserError
from diffusion_jax.running import history


def starts(folder):
    return [
        (start["step"], start["config"]["seed"]) for start in json.loads((folder / "run.json").read_text())["starts"]
    ]


def test_every_config_is_kept_with_its_step(tmp_path):
    folder = epath.Path(tmp_path)
    assert history.record(folder, "ab", 0, tiny_config()) == []
    assert history.record(folder, "ab", 5, tiny_config()) == []
    changed = tiny_config(seed=1, train__learning_rate=0.5)
    assert history.record(folder, "ab", 7, changed) == [
        "config.seed: 0 before, 1 now",
        "config.train.learning_rate: 0.002 before, 0.5 now",
    ]
    assert history.record(folder, "ab", 9, changed) == []
    assert starts(tmp_path) == [(0, 0), (7, 1)]
    assert history.read(folder)["run"] == "ab"


def test_a_key_that_a_new_version_adds_is_no_change(tmp_path):
    history.record(epath.Path(tmp_path), "ab", 0, tiny_config())
    content = json.loads((tmp_path / "run.json").read_text())
    del content["starts"][0]["config"]["train.label_dropout"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert history.record(epath.Path(tmp_path), "ab", 5, tiny_config()) == []


def test_a_path_that_is_spelled_otherwise_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history.record(epath.Path(tmp_path), "ab", 0, tiny_config(data__path="./faces/"))
    assert history.record(epath.Path(tmp_path), "ab", 0, tiny_config(data__path=str(tmp_path / "faces"))) == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"run": 1, "starts": []}', '{"run": "a", "starts": [3]}', "\xff"]
)
def test_a_damaged_file_is_written_anew(tmp_path, content, capsys):
    folder = epath.Path(tmp_path)
    (tmp_path / "run.json").write_text(content, encoding="latin1")
    assert history.identity(folder, tiny_config(), history.about("ab", tiny_config()), 3) == "ab"
    history.record(folder, "ab", 3, tiny_config())
    assert starts(tmp_path) == [(3, 0)]
    assert "run.json cannot be read: it is written anew" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    folder = epath.Path(tmp_path)
    history.record(folder, "ab", 0, tiny_config())
    assert history.identity(folder, tiny_config(), history.about("ab", tiny_config()), 3) == "ab"
    assert history.identity(folder, tiny_config(), {}, 3) == "ab"  # an earlier version wrote it
    with pytest.raises(UserError, match=r"checkpoint 3 .* belongs to another run \(cd; run.json names ab\): remove"):
        history.identity(folder, tiny_config(), history.about("cd", tiny_config()), 3)


def test_a_run_without_a_history_gets_an_identity(tmp_path):
    folder = epath.Path(tmp_path)
    first, second = (history.identity(folder, tiny_config(), {}, None) for _ in range(2))
    assert len(first) == 16 and first != second


@pytest.mark.parametrize(
    "key, value", [("schedule__name", "cosine"), ("schedule__num_steps", 21), ("model__prediction", "x_0")]
)
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(tmp_path, key, value):
    about = history.about("ab", tiny_config())
    with pytest.raises(
        UserError, match=rf"does not fit checkpoint 3 \(config.{key.replace('__', '.')}: .* in the checkp"
    ):
        history.identity(epath.Path(tmp_path), tiny_config(**{key: value}), about, 3)


def test_what_a_checkpoint_does_not_depend_on_may_change(tmp_path):
    changed = tiny_config(
        model__dtype="bfloat16", model__dropout=0.0, seed=4, sampling__sampler="ddim", data__path="/x"
    )
    assert history.identity(epath.Path(tmp_path), changed, history.about("ab", tiny_config()), 3) == "ab"
