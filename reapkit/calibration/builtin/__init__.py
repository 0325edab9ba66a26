"""What ships inside the package: the demo model and endless streams of generated text. Torch-free."""
