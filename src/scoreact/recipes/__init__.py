"""Ready-made runs. A recipe is one small file with its RECIPES."""
