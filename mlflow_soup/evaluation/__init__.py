"""A live model and lm-eval tasks give a score with the log-likelihoods of every item."""
