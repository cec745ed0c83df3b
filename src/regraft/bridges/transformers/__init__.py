"""The bridge to transformers: rule books from the registry of the release that is installed."""

from regraft.bridges.transformers.imported import Imported, import_model

__all__ = ["Imported", "import_model"]
