"""Production traffic: its reports, retention, deletion, and alerts about changes."""
