"""Reading and writing what regraft keeps on disk: weight files, JSON files and whole folders."""
