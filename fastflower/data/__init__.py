"""From files on disk to batches: records (index), sampler (who and how), pipeline (DALI), loader (batches)."""
