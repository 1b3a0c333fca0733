"""`tunewright datasets ...`: data files from the command line, without a server."""
