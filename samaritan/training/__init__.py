"""Loss, local training, evaluation and 3-D metrics."""
