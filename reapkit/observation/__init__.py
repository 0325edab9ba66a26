"""What one pass over the calibration records about every routed expert, and the pass itself."""
