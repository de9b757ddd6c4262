"""The equation: schedules, time grids, predictions, the SDE, its steps and its change of measure."""
