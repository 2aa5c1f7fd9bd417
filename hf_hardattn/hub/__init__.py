"""The Hub: save and load hard models (full, selectors only, or as a PEFT adapter), push them, and write and check their cards."""
