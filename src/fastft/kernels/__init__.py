"""Fused operations: a plain torch reference, a Triton kernel and a registered op for each."""
