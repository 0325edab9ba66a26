"""Inspection: describes what a path contains, as facts for machines and tables for people."""
