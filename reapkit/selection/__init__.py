"""Which experts stay and which go, and why. Torch-free."""
