"""Parameter-efficient fine-tuning: one method, one file."""
