"""Measures what the absence of each expert does to the model's own output."""
