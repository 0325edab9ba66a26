"""How far a candidate is from its base: signals of logits, bootstrap intervals, statistics over rows. Pure tensor
maths."""
