"""How tools write adapters: one dialect, one room or file; each reads files into the internal form and back."""
