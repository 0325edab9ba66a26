"""A model directory as its config and headers describe it. Torch-free."""
