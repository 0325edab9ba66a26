"""How far a candidate is from its base: signals of logits, bootstrap intervals, statistics over rows; and the table of
all metrics."""
