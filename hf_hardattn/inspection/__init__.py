"""Selections as people see them."""
