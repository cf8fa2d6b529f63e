import json

import numpy as np
import pytest
from conftest import write_random_run

from diffusion_jax.errors import UserError
from diffusion_jax.evaluation import tune
from diffusion_jax.evaluation.evaluate import evaluate

ROW = {
    "sampler": "ddim",
    "grid": "uniform",
    "eta": 1.0,
    "steps": 10,
    "seconds": 1.0,
    "frechet": 2.0,
    "standard_error": 0.1,
}


def test_the_cheapest_row_that_is_no_worse_is_named():
    full = {name: ROW[name] for name in ROW.keys() - {"eta"}} | {"sampler": "ancestral", "steps": 1000}
    rows = [
        full,
        ROW | {"no_worse": True},
        ROW | {"steps": 5, "no_worse": False},
        ROW | {"steps": 20, "no_worse": True},
    ]
    text = tune.markdown(rows, 512)
    assert (
        "--sampler=ddim --steps=10 --grid=uniform --eta=1 is the cheapest that is no worse than all 1000 steps" in text
    )
    assert text.count("| ddim ") == 3 and "2 ± 0.1" in text
    assert "No sampler of up to 250 steps" in tune.markdown(rows[:1], 512)


def test_rows_of_other_samples_are_not_continued(tmp_path):
    file = tmp_path / "tune.json"
    assert tune._earlier(file, {"num": 4}) == []
    file.write_text(json.dumps({"about": {"num": 4}, "rows": [ROW]}))
    assert tune._earlier(file, {"num": 4}) == [ROW] and tune._earlier(file, {"num": 5}) == []
    full, old = {"sampler": "ancestral", "steps": 1000}, {"sampler": "ddim", "grid": "uniform", "steps": 10}
    file.write_text(json.dumps({"about": {"num": 4}, "rows": [full, old, ROW]}))
    assert tune._earlier(file, {"num": 4}) == [full, ROW]
    file.write_text("[")
    assert tune._earlier(file, {"num": 4}) == []


def test_data_that_cannot_be_compared_are_refused(tmp_path):
    write_random_run(tmp_path / "float", data__range=(0, 1))
    with pytest.raises(
        UserError, match=r"--mode=tune compares images of 256 levels, but config\.data\.range=\(0, 1\) makes"
    ):
        tune.tune(tmp_path / "float")
    write_random_run(tmp_path / "large", data__image_size=128)
    with pytest.raises(UserError, match=r"have 16,384 values, more than 4,096: compare by --mode=evaluate"):
        tune.tune(tmp_path / "large")


@pytest.mark.slow
def test_every_sampler_gets_steps_until_it_is_no_worse(tmp_path, monkeypatch, small_network, capsys):
    write_random_run(tmp_path)
    tune.tune(tmp_path, num=64)
    assert "without ddim --grid=bound: --grid=bound needs the errors of the network" in capsys.readouterr().out
    evaluate(tmp_path, num=8)
    rows = tune.tune(tmp_path, num=64)
    assert rows[0]["sampler"] == "ancestral" and rows[0]["steps"] == 20 and "no_worse" not in rows[0]
    series = {of: [] for of in tune.SERIES}
    for row in rows[1:]:
        series[row["sampler"], row["grid"], row["eta"]].append(row)
    for of_grid in series.values():
        assert [row["steps"] for row in of_grid] == [5, 10][: len(of_grid)]
        assert not any(row["no_worse"] for row in of_grid[:-1])
        assert of_grid[-1]["no_worse"] or len(of_grid) == 2
        limit = rows[0]["frechet"] + 2 * np.hypot(rows[0]["standard_error"], of_grid[-1]["standard_error"])
        assert of_grid[-1]["no_worse"] == (of_grid[-1]["frechet"] <= limit)
    before = json.loads((tmp_path / "evaluation/0/tune.json").read_text())
    monkeypatch.setattr(tune, "_draw", lambda *_: pytest.fail("a row is drawn again"))
    assert tune.tune(tmp_path, num=64) == rows == before["rows"]
