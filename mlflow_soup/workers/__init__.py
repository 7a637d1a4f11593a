"""Workers answer frozen requests under merged weights: in this process, in others, on a cluster."""
