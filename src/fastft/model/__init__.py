"""Load, quantise, adapt and sample from models."""
