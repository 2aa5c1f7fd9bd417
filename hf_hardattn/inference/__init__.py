"""Run a model over collections that are too large for one call, one process or one day."""
