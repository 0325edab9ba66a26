"""Reports: pages, cards, tables, inspections and comparisons for people."""
