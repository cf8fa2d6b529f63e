"""Prices of chips, from a dated file that a user can replace."""

import datetime
import importlib.resources
import tomllib
from typing import Any, NamedTuple

from etils import epath

from diffusion_jax.errors import UserError, one_line
from diffusion_jax.planning.programs import CHIPS


class Price(NamedTuple):
    """The price of one chip, in US dollars an hour, and where it comes from."""

    on_demand: float
    spot: float
    region: str
    read: str  # the date, e.g. 2026-11-27
    source: str


def read_prices(path: epath.PathLike | None = None) -> dict[str, Price]:
    """Returns {key of CHIPS: its Price}; a chip without a price is left out.

    Args:
      path: a TOML file with the date `read`, the text `source`, and for each chip a table with `region`, `on_demand`
        and `spot`; None means the prices that the package ships.

    Raises:
      UserError: the file is missing or has other content.
    """
    shipped = epath.Path(str(importlib.resources.files(__package__) / "prices.toml"))
    file = epath.Path(path).expanduser() if path else shipped
    try:
        content = tomllib.loads(file.read_text())
        about = {"read": _date(content.pop("read")), "source": str(content.pop("source"))}
        return {name: _price(name, table, about) for name, table in content.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:  # tomllib's errors are ValueErrors
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error, 200)
        raise UserError(f"--prices={file} cannot be used ({reason}): give a file like {shipped}") from None


def _date(value):
    if not isinstance(value, datetime.date):
        raise ValueError(f"read={value!r} is not a date")
    return value.isoformat()


def _price(name: str, table: dict[str, Any], about: dict[str, str]) -> Price:
    if name not in CHIPS:
        raise ValueError(f"{name} is no chip: there are {', '.join(CHIPS)}")
    price = Price(float(table["on_demand"]), float(table["spot"]), str(table["region"]), **about)
    if not 0 <= price.spot <= price.on_demand:
        raise ValueError(f"{name} has spot={price.spot}, on_demand={price.on_demand}")
    return price
