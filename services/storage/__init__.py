"""The artifact store, the record of everything that a user can name."""
