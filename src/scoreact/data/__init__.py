"""Data that the package downloads on request, and the statistics of it that ship with the package."""
