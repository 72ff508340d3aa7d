"""From the fused graph to int8, with its accuracy held. Needs torch."""
