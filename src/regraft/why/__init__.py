"""Telling why: the way of one key, what two files have in common, and which rule book leads from one to the other."""
