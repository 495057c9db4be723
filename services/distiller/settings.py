"""Settings of the distiller."""

from services.dependencies import TransportSettings


class DistillerSettings(TransportSettings):
    """The distiller needs no more than every service that classifies."""
