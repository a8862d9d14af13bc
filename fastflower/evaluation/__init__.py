"""A finished run at work: figures, predictions, ensembles, folds."""
