"""Settings of the distiller."""

from services.runtime.settings import Settings


class DistillerSettings(Settings):
    """The distiller needs no more than every service's settings."""
