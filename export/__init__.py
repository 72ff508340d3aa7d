"""From a trained run to verified artifacts: the fused graph, its conversions, and the proof that they agree."""
