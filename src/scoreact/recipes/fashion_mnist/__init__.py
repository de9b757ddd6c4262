"""Fashion-MNIST: the main job and its variants, four steps, the data, the classifiers, and how what ships was made."""

from .four_steps import FOUR_STEPS as FOUR_STEPS
from .recipe import RECIPES as OF_PROPERTIES

RECIPES = [*OF_PROPERTIES, FOUR_STEPS]
