"""Pure functions of tensors: top-k, attention, position biases, packed rows, patches."""
