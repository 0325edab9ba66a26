"""The command line: parses, calls, formats, exits."""
