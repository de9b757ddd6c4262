"""A run folder as one HTML file."""
