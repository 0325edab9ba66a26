"""Quantization: fewer bits per weight, with llm-compressor."""
