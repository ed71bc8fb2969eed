"""This machine: directories, process trees, captured output and threads."""
