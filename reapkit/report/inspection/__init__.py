"""What lies at a path: facts for machines, tables for people."""
