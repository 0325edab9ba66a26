"""Metrics of the distance between a candidate and its base: signals of logits, bootstrap intervals, statistics over
rows, and the table of all metrics."""
