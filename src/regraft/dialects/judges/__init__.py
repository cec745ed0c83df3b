"""What the tools that load adapters do with a file as it is, one file each."""
