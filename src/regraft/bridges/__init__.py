"""Bridges to other libraries: the only place that imports them, one package each."""
