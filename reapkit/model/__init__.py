"""Models in memory, or streamed layer by layer."""
