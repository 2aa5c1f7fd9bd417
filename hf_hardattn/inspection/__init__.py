"""Tools to show, explain, measure and verify selections."""
