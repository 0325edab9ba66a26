"""Calibration data: any source, the right tokens, exactly the declared mix."""
