"""The terms that hard attention adds to a training loss."""
