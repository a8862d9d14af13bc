"""From files on disk to batches of pictures: records (index), sampler (who and how), pipeline (DALI), loader (batches)."""
