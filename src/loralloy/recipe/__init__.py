"""The YAML recipe: adapters, weights, rule and output of one merge, checked before anything is read."""

from .job import RECIPE_FILE, Job
from .recipe import VERSION, Recipe

__all__ = ["RECIPE_FILE", "VERSION", "Job", "Recipe"]
