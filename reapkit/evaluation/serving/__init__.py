"""Whether engines serve a finished directory alike."""
