"""Evidence before and after writing: packs measured on masked models and on directories, gates, generation, the verdict.

`outputs` measures, `candidates` decides, `generation` watches models write, `summary` (torch-free) prints.
"""
