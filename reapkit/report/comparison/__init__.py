"""Several observations, selections, runs or recipes beside each other."""
