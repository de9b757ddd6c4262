"""Fashion-MNIST: the main job and its variants, the data, the classifiers, and how what ships was made."""

from .recipe import RECIPES as RECIPES
