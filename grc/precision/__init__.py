"""Precision: which tables and layers may be kept in fewer bits, what each costs in quality, and how far to go."""
