"""Latency and accuracy of every artifact of an export, measured in one run."""
