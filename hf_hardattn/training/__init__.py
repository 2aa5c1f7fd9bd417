"""Training: the Trainer's callback, the shared loop of the scripts, and the demo."""
