"""The command line: parses arguments, calls the package, formats results, exits."""
