"""What every room stands on: errors, progress, stopping, ranks, files, hashes, formatting. Torch-free."""
