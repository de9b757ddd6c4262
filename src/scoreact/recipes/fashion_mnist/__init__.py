"""Fashion-MNIST: the main job and its variants, few steps, the data, the classifiers, and how what ships was made."""

from .four_steps import FOUR_STEPS as FOUR_STEPS
from .recipe import RECIPES as OF_PROPERTIES
from .two_steps import TWO_STEPS as TWO_STEPS

RECIPES = [*OF_PROPERTIES, FOUR_STEPS, TWO_STEPS]
