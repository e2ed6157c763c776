"""The command line: a configuration file in, a run folder out."""
