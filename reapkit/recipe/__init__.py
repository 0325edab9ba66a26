"""The recipe language: allowed fields and values, positions in the file, error messages. Torch-free."""
