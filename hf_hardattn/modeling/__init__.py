"""How selection is put into a model: hooks on its layers choose positions, and its attention computes on what was chosen."""
