"""The Hub: save and load hard models (whole, selectors only, or a PEFT adapter), push them, write and check their cards."""
