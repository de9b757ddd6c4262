"""A run's settings, what it is made of, and its loop."""
