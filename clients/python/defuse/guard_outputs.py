"""Names of a guard's outputs in Triton, each of shape (n, 1)."""

REGION = "defuse_region"
"""Name of the region around the image, as bytes; empty outside of all regions."""

INDEX = "defuse_region_index"
"""Index of the likeliest region of the guard, whether the image is inside or not."""

RISK = "defuse_risk"
"""Log likelihood ratio of the image: the likeliest region against real images."""

INSIDE = "defuse_inside"
"""Whether the risk reaches the guard's threshold."""

TYPICALITY = "defuse_typicality"
"""Share of the training images that are less typical."""

# In the order of the ONNX model.
OUTPUTS = (REGION, INDEX, RISK, INSIDE, TYPICALITY)
METADATA = "defuse-guard"
"""Metadata key that requests the guard's outputs at the gateway; the value is `true`."""
