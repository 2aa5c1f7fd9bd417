"""Backbones that are not in Transformers, so that recurrent and feed-forward models can run in the same comparison."""
