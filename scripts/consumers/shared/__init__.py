"""What the scripts of this folder have in common: tiny adapters, pinned packages, and how a run is reported."""
