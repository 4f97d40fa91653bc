"""Whole runs through the command line: real drivers, real Ray."""
