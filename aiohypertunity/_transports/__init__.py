"""Commands and files on this machine or across SSH."""
