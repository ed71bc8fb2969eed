"""Decisions without a clock, a file or an await."""
