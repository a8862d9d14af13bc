"""From batches to a trained network: train, evaluate, checkpoint, and what they need (ranks, precision, schedule)."""
