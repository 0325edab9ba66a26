"""Data that ships inside the package: the demo model and generators of text. Torch-free."""
