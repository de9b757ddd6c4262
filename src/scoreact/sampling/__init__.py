"""Drawing samples, and steering them without training."""
