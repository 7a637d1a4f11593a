"""What a user asks for: the knobs with their defaults and checks, and how versions are named."""
