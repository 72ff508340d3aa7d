"""What tells the unknown: scores, detectors, their sums, figures, and images made to be unknown."""
