"""Write GGUF files."""
