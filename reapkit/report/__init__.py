"""Everything people read: pages, cards, tables, inspections, comparisons."""
