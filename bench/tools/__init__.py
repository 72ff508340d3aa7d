"""Measurements of their own, each run with python -m ssod_edge.bench.tools.NAME."""
