"""Explaining: where one key goes, which rule moves it, and what it is made with."""
