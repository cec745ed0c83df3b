"""Adapters and bases together: adding adapters to a base, and taking them out of the difference of two."""
