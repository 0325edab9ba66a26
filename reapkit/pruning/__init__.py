"""The smaller checkpoint: the kept experts cut out of the source, byte by byte."""
