"""Observation: the pass over the calibration, and the statistics that it records about every routed expert."""
