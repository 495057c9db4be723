"""Uploads of files into the artifact store."""
