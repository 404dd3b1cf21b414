"""What all wings share: errors, checks of arguments, files, tables, random numbers, processes."""
