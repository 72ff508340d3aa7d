"""What runs for long: videos and cameras, and the watch over their scores."""
