"""What is compiled: programs, how they are traced, shown, checked and rewritten."""
