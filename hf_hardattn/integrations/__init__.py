"""How Transformers, PEFT and the Trainer learn about hard attention."""
