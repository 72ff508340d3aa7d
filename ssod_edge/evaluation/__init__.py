"""What a trained model is worth: figures, tables, pictures, and the peers beside it."""
