"""How far a result may be from the truth."""

import torch


def assert_as_good_as_torch(
    got: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, factor: float = 2.0
) -> None:
    """got may be at most `factor` times as far from the float64 truth as plain PyTorch is at the same dtype."""
    floor = 4 * torch.finfo(got.dtype).eps * truth.abs().max()
    allowed = factor * (same_dtype.double() - truth).abs().max() + floor
    worst = (got.double() - truth).abs().max()
    assert worst <= allowed, f"error {worst:.2e}, allowed {allowed:.2e}"
