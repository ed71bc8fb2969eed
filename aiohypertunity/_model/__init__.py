"""Frozen data: jobs, results, errors, events and the settings of a cluster."""
