"""Capture a model's graph, find its regions, prove replacements, rewrite and compile."""
