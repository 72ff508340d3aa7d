"""From a model to the fused graph, in fp32 and fp16. Needs torch."""
