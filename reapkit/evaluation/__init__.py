"""Evaluation: packs, gates, metrics, proofs, serving. Is the result good, and is it what it claims to be?"""
