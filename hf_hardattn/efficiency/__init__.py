"""What selection saves: counted in FLOPs, measured in seconds. Never in one column."""
