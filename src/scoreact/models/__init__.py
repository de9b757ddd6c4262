"""Models: anything with the five members of `ScoreModel` can be fine-tuned."""
