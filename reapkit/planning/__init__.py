"""Plans a recipe for a checkpoint: stages with keys, sizes and costs, before any weight is read. Torch-free."""
