"""The scheduler and what its users hold: handles, collectors, maps and event streams."""
