"""The search: which merge weights λ are evaluated, and which are chosen. Pure functions."""
