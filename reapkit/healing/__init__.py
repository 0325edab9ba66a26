"""Healing: makes up for the dropped experts."""
