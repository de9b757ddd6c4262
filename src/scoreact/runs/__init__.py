"""A run as a folder: written, read, opened again."""
