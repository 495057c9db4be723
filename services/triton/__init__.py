"""The client of a Triton server: inference, preprocessing and transports."""
