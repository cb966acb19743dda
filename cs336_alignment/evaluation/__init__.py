"""Generation, rewards and evaluation loss."""
