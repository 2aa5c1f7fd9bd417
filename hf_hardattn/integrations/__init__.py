"""Integration of hard attention into Transformers, PEFT and the Trainer."""
