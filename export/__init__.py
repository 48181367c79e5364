"""Export and measurement."""
