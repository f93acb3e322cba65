"""Measuring and comparing: what `flash bench`, `flash compare` and `flash report` are made of."""
