"""Serving checks: whether engines give the same output for a finished directory."""
