"""The torch device and thread count that an operator sets."""

import torch


def device_of(setting: str) -> torch.device:
    """Return the device that a setting means: `auto` is `cuda` if there is one, else `cpu`."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def limit_threads(count: int) -> None:
    """Let torch use as many threads as the operator says; 0 leaves the choice to torch."""
    if count:
        torch.set_num_threads(count)
