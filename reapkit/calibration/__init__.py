"""Calibration data: reads datasets, tokenizes them and mixes them in exactly the declared shares."""
