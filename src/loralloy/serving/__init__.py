"""Compositions over HTTP: an OpenAI-compatible server in which every request names, or is given, its own composition."""
