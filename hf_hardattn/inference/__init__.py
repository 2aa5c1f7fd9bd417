"""Run a model over collections that are too large for a single call, process or run."""
