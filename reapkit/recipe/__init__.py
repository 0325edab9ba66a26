"""The recipe language: types, loading, positions. Torch-free."""

from reapkit.recipe.loading import LoadedRecipe, load, load_recipe
from reapkit.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "load", "load_recipe"]
