"""Loading, attention over flat rows, and log-probs."""
