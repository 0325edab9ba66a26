"""Fewer bits per weight, through llm-compressor."""
