"""Supervised fine-tuning of causal language models in PyTorch; `cs336_alignment.sft` is the map."""
