"""The loss, the loop and everything a step needs."""
