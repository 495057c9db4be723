"""Production traffic: reported observations, what they say of known regions, alerts."""
