"""What every wing uses and nothing of which knows diffusion: names, settings, files, loading, devices, processes."""
