"""Evidence before and after writing: packs measured on masked models and on directories, gates, generation, the verdict.

`candidates.evaluate` decides before anything is written, `directory.Yardstick` measures what was; `advice`, `tool_calls` and
`equal_bytes` import without torch.
"""
