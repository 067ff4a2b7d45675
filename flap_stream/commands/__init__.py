"""The verbs of the command line, one a file: arguments and printing only."""
