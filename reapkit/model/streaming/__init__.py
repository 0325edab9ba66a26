"""A model of any size, one decoder layer in memory at a time."""
