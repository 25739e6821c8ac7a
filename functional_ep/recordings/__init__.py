"""Recordings: what one rank received in a step, kept to be run again by that rank alone."""
