"""Images with labels: data sets, models, checkpoints, training, evaluation and the report."""
