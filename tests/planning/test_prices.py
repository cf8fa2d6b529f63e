import datetime

import pytest

from diffusion_jax.errors import UserError
from diffusion_jax.planning import prices, programs

FILE = """
read = 2026-01-02
source = "a bill"

[v5e]
region = "home"
on_demand = 2
spot = 0.5
"""


def test_shipped_prices_are_dated_and_of_known_chips():
    shipped = prices.read_prices()
    assert {"v4", "v5e", "v5p", "v6e"} <= set(shipped) <= set(programs.CHIPS)
    for price in shipped.values():
        assert 0 < price.spot < price.on_demand and price.region and "commit" in price.source
        assert datetime.date.fromisoformat(price.read) >= datetime.date(2026, 11, 27)


def test_a_file_takes_their_place(tmp_path):
    (tmp_path / "my.toml").write_text(FILE)
    assert prices.read_prices(tmp_path / "my.toml") == {"v5e": prices.Price(2.0, 0.5, "home", "2026-01-02", "a bill")}


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("[v5e]", "[v5x]", "v5x is no chip: there are v4, v5e"),
        ("spot = 0.5", "", "it lacks 'spot'"),
        ("spot = 0.5", "spot = 3", "v5e has spot=3.0, on_demand=2.0"),
        ("spot = 0.5", "spot = nan", "v5e has spot=nan"),
        ("read = 2026-01-02", "read = 3", "read=3 is not a date"),
        ("on_demand = 2", "on_demand = [", "cannot be used"),
        ("on_demand = 2", "on_demand = []", "cannot be used"),
    ],
)
def test_other_content_is_refused(tmp_path, before, after, message):
    file = tmp_path / "my.toml"
    file.write_text(FILE.replace(before, after))
    with pytest.raises(UserError, match=message) as error:
        prices.read_prices(file)
    assert f"--prices={file}" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        prices.read_prices(tmp_path / "none.toml")
