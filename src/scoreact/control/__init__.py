"""The controlled process: policy, paths, transitions, advantages and values."""
