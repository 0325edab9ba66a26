"""Pruning: writes the smaller checkpoint, with the kept experts copied byte by byte from the source."""
