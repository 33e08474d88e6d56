"""Who owns which rank, and how a model is trained on all of them at once."""
