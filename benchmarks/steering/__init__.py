"""Mitigation: what it removes, against what it costs in quality and in evaluations."""
