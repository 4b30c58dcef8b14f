"""Recipes: a YAML file of a dozen lines becomes checked stages, a run folder and numbers."""

from gnomon._lazy import lazy_attributes as _lazy_attributes

__getattr__, __dir__ = _lazy_attributes(
    __name__,
    {
        "Recipe": "gnomon.recipes.schema:Recipe",
        "RunResult": "gnomon.recipes.runner:RunResult",
        "builtin_recipes": "gnomon.recipes.schema:builtin_recipes",
        "load_recipe": "gnomon.recipes.schema:load_recipe",
    },
)
