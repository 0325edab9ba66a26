"""Proofs that a pruned or a quantized directory is what it claims to be."""
