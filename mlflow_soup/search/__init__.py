"""Which merge weights λ are evaluated, and which are chosen. Pure functions of the trials."""
