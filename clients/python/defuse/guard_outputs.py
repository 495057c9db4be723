"""What a guard answers for each image, beside the classifier's scores: names of outputs in Triton, each (n, 1)."""

REGION = "defuse_region"
"""Name of the region that the image is inside of, as bytes; empty outside of all."""

INDEX = "defuse_region_index"
"""Position of the likeliest region, inside or not, among those of the guard."""

RISK = "defuse_risk"
"""Log of how much likelier the image is in a region than among real images."""

INSIDE = "defuse_inside"
"""Whether the risk reaches the guard's threshold."""

TYPICALITY = "defuse_typicality"
"""Share of the training images that are less usual."""

# In the order of the ONNX model.
OUTPUTS = (REGION, INDEX, RISK, INSIDE, TYPICALITY)
METADATA = "defuse-guard"
"""Key of the metadata by which a caller of the gateway asks for a guard; the value is `true`."""
