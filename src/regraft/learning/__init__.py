"""Learning rule books: what two files have in common, and which rules lead from one to the other."""
