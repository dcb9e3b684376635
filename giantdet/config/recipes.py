"""The recipes that come with giantdet: ds_configs of the checkout, which is a part of the package too."""

from __future__ import annotations

from pathlib import Path

from giantdet.config.names import nearest
from giantdet.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "ds_configs"
"""Their folder. In the checkout it is a link, of which a wheel has a copy."""


def recipe_path(name: str) -> Path:
    """Return the file of a recipe's name, or of a path of a JSON. Raises ConfigError."""
    given = Path(name).expanduser()
    if given.suffix == ".json" and given.is_file():
        return given
    path = RECIPES / f"{name.removesuffix('.json')}.json"
    if not path.is_file():
        known = [path.stem for path in RECIPES.glob("*.json")]
        raise ConfigError(f"{name}: no such recipe{nearest(name, known)}; `giantdet configs` lists them")
    return path
