"""Score a live model on lm-eval tasks, with the log-likelihoods of every item."""
