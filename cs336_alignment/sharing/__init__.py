"""What leaves a run for others: model card, chat template, GGUF, the hub, the trained rows."""
