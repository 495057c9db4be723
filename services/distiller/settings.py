"""Settings of the distiller."""

from services.runtime.transport_settings import TransportSettings


class DistillerSettings(TransportSettings):
    """The distiller needs no more than every service that classifies."""
