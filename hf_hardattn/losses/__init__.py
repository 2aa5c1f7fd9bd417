"""What hard attention adds to a training loss."""
