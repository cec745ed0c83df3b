"""Layouts: their names, and the graph that rule books make of them."""
