"""A classifier with its OOD row: model, batches, objective, loop and checkpoints."""
