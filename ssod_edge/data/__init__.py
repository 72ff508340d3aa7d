"""Where images come from, and how a photo becomes the pixels that a graph reads."""
