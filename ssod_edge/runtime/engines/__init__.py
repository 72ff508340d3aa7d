"""One runner for each engine."""
