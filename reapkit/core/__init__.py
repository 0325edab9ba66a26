"""What all other rooms use: errors, progress, stop requests, ranks, files, hashes, formatting. Torch-free."""
