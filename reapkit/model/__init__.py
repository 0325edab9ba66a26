"""A model in memory, or streamed through it layer by layer."""
