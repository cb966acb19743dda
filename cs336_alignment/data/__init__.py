"""From rows on disk to token batches."""
