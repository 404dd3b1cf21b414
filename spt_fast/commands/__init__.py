"""The command line `spt-fast`: a file for each command, which parses and calls the library."""
