"""Is the result good, and is it what it claims to be: packs, gates, metrics, proofs, serving."""
