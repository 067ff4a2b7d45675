"""Values as FP8 codes with a scale for each block, as DeepSeek-V3 and Qwen3 ship them. Pure torch arithmetic."""

import torch

from flap_stream.config import FP8_BLOCK

_CODES = torch.float8_e4m3fn
_COLUMNS = 64 * FP8_BLOCK  # at a time, so that float32 copies stay small; not measured


def fp8_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of blocks: codes, float8_e4m3fn `[row, column]`, and their scales, float32 `[block of columns]`.

    The largest magnitude of a block becomes the largest code, and a value is about code * scale. All in float32.
    rows: `[FP8_BLOCK, column]`, any dtype, a multiple of FP8_BLOCK columns.
    Source: Fp8Quantize of transformers, of which the results are.
    """
    largest = torch.finfo(_CODES).max
    codes, scales = torch.empty(rows.shape, dtype=_CODES), []
    for start in range(0, rows.shape[1], _COLUMNS):
        part = rows[:, start : start + _COLUMNS].float()
        blocks = part.view(len(rows), -1, FP8_BLOCK)
        most = blocks.abs().amax(dim=(0, 2))
        factor = (largest / torch.where(most > 0, most, 1)).clamp_(max=torch.finfo(torch.float32).max)
        factor = torch.where(most > 0, factor, 1)
        scaled = (blocks * factor[:, None]).clamp_(-largest, largest)
        codes[:, start : start + _COLUMNS] = scaled.view(part.shape).to(_CODES)
        scales.append(1 / factor)
    return codes, torch.cat(scales)
