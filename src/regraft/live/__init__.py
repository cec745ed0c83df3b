"""Live models: what applies to them, and state dicts that fit them."""
