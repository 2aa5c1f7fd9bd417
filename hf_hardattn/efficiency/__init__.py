"""Savings of selection: counted in FLOPs and measured in seconds, never in one column."""
