"""The recipe language: what may be written, where it was written, and what is wrong with it. Torch-free."""
