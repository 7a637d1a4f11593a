"""The order of the steps of each command. Nothing else knows it."""
