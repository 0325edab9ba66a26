"""Repair: after the decision, the kept experts' `down_proj` are re-fitted so that they make up for the dropped ones."""
