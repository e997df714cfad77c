"""Reads what a search has left, and never writes."""
