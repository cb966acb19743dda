"""Where metrics go: console, metrics.jsonl, wandb, pictures."""
