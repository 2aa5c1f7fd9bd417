"""Backbones that Transformers does not have: they let recurrent and feed-forward models run in the same comparison."""
