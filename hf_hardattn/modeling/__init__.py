"""Selection inside a model: hooks on its layers choose positions, and its attention computes with the chosen ones."""
