"""The bridge to transformers: rule books from the registry of the release that is installed."""
