"""What makes up for the dropped experts."""
