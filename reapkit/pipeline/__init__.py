"""Walks a plan, stage by stage."""
