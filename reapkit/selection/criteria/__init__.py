"""Saliency criteria: one record each, one file each, named in the registry."""
